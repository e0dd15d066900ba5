// Writing the paged KV cache and softmax attention over it, keys visited in blocks of 16 from the first on.
#pragma once

namespace {

inline float span_scale(const float* x, int n) {
  float top = 0;
  for (int i = 0; i < n; ++i) {
    const float a = fabsf(x[i]);
    top = a > top ? a : top;
  }
  return top / 127.0f;
}

inline int8_t to_int8(float x, float scale) { return scale > 0 ? (int8_t)rintf(x / scale) : 0; }

void kv_write(const KvLayer& L, int block, int offset, int head, const float* key, const float* value) {
  uint8_t* kb = L.k + ((size_t)block * L.num_kv_heads + head) * L.k_bytes;
  uint8_t* vbase = L.v + ((size_t)block * L.num_kv_heads + head) * L.v_bytes;
  const int group = L.head_dim < 32 ? L.head_dim : 32;
  if (L.k_type == KvType::F16) {
    uint16_t* k = (uint16_t*)kb + offset;
    uint16_t half[16];
    for (int d = 0; d < L.head_dim; d += 16) {
      const int n = L.head_dim - d < 16 ? L.head_dim - d : 16;
      vf_store_f16(half, n == 16 ? vf_load(key + d) : load_tail(key + d, n));
      for (int i = 0; i < n; ++i) k[(d + i) * kKvBlock] = half[i];
    }
  } else {
    int8_t* k = (int8_t*)kb + offset;
    float* scales = (float*)(kb + (size_t)L.head_dim * kKvBlock) + offset;
    for (int g = 0, d = 0; g < L.groups; ++g, d += group) {
      const int n = L.head_dim - d < group ? L.head_dim - d : group;
      const float scale = scales[g * kKvBlock] = span_scale(key + d, n);
      for (int i = 0; i < n; ++i) k[(d + i) * kKvBlock] = to_int8(key[d + i], scale);
    }
  }
  if (L.v_type == KvType::F16) {
    uint16_t* v = (uint16_t*)vbase + (size_t)offset * L.head_dim_pad;
    for (int d = 0; d < L.head_dim; d += 16)
      vf_store_f16(v + d, L.head_dim - d >= 16 ? vf_load(value + d) : load_tail(value + d, L.head_dim - d));
  } else {
    int8_t* v = (int8_t*)vbase + (size_t)offset * L.head_dim_pad;
    float* scales = (float*)(vbase + (size_t)L.head_dim_pad * kKvBlock) + (size_t)offset * L.groups;
    for (int g = 0, d = 0; g < L.groups; ++g, d += group) {
      const int n = L.head_dim - d < group ? L.head_dim - d : group;
      const float scale = scales[g] = span_scale(value + d, n);
      for (int i = 0; i < n; ++i) v[d + i] = to_int8(value[d + i], scale);
    }
  }
}

// Keys of one block as floats [head_dim][16], values as floats [16][head_dim_pad].
inline void load_keys(const KvLayer& L, int block, int head, float* k) {
  const uint8_t* p = L.k + ((size_t)block * L.num_kv_heads + head) * L.k_bytes;
  if (L.k_type == KvType::F16) {
    for (int d = 0; d < L.head_dim; ++d) vf_store(k + 16 * d, vf_load_f16((const uint16_t*)p + 16 * d));
    return;
  }
  const int group = L.head_dim < 32 ? L.head_dim : 32;
  const float* scales = (const float*)(p + (size_t)L.head_dim * kKvBlock);
  for (int d = 0; d < L.head_dim; ++d)
    vf_store(k + 16 * d, vf_mul(vf_load_i8((const int8_t*)p + 16 * d), vf_load(scales + (d / group) * kKvBlock)));
}

inline void load_values(const KvLayer& L, int block, int head, int keys, float* v) {
  const uint8_t* p = L.v + ((size_t)block * L.num_kv_heads + head) * L.v_bytes;
  const int w = L.head_dim_pad;
  if (L.v_type == KvType::F16) {
    for (int i = 0; i < keys * w; i += 16) vf_store(v + i, vf_load_f16((const uint16_t*)p + i));
    return;
  }
  const float* scales = (const float*)(p + (size_t)w * kKvBlock);
  for (int j = 0; j < keys; ++j)
    for (int d = 0; d < w; d += 16) {
      const int g = d / 32 < L.groups ? d / 32 : L.groups - 1;
      vf_store(v + j * w + d, vf_mul(vf_load_i8((const int8_t*)p + j * w + d), vf_set1(scales[j * L.groups + g])));
    }
}

alignas(64) const float kValid[32] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
alignas(64) const float kCap[32] = {
    INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY,
    INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, -1e30f, -1e30f, -1e30f, -1e30f, -1e30f, -1e30f, -1e30f, -1e30f,
    -1e30f, -1e30f, -1e30f, -1e30f, -1e30f, -1e30f, -1e30f, -1e30f};

// Scores of R rows against 16 keys: even and odd dims in two chains.
template <int R>
inline void scores(const float* const* q, const float* k, int dim, float* s) {
  vf a[R], b[R];
  for (int r = 0; r < R; ++r) a[r] = b[r] = vf_zero();
  int d = 0;
  for (; d + 2 <= dim; d += 2) {
    const vf k0 = vf_load(k + 16 * d), k1 = vf_load(k + 16 * d + 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      a[r] = vf_fma(vf_set1(q[r][d]), k0, a[r]);
      b[r] = vf_fma(vf_set1(q[r][d + 1]), k1, b[r]);
    }
  }
  if (d < dim) {
    const vf k0 = vf_load(k + 16 * d);
    for (int r = 0; r < R; ++r) a[r] = vf_fma(vf_set1(q[r][d]), k0, a[r]);
  }
  for (int r = 0; r < R; ++r) vf_store(s + 16 * r, vf_add(a[r], b[r]));
}

inline void all_scores(const AttnTile& t, int first, const float* k, int dim, float* s) {
  int r = first;
  for (; r + 8 <= t.rows; r += 8) scores<8>(t.q + r, k, dim, s + 16 * r);
  switch (t.rows - r) {
    case 7: scores<7>(t.q + r, k, dim, s + 16 * r); break;
    case 6: scores<6>(t.q + r, k, dim, s + 16 * r); break;
    case 5: scores<5>(t.q + r, k, dim, s + 16 * r); break;
    case 4: scores<4>(t.q + r, k, dim, s + 16 * r); break;
    case 3: scores<3>(t.q + r, k, dim, s + 16 * r); break;
    case 2: scores<2>(t.q + r, k, dim, s + 16 * r); break;
    case 1: scores<1>(t.q + r, k, dim, s + 16 * r); break;
  }
}

// acc[0 .. 16 V) += sum over keys of p[j] * v[j]
template <int V>
inline void weighted_values(const float* p, const float* v, int stride, int keys, float* acc) {
  vf a[V];
  for (int i = 0; i < V; ++i) a[i] = vf_load(acc + 16 * i);
  for (int j = 0; j < keys; ++j) {
    const vf w = vf_set1(p[j]);
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) a[i] = vf_fma(w, vf_load(v + j * stride + 16 * i), a[i]);
  }
  for (int i = 0; i < V; ++i) vf_store(acc + 16 * i, a[i]);
}

inline void scale_row(float* x, int n, float k) {
  for (int i = 0; i < n; i += 16) vf_store(x + i, vf_mul(vf_load(x + i), vf_set1(k)));
}

void attention(const KvLayer& L, const AttnTile& t, uint8_t* scratch) {
  const int w = L.head_dim_pad;
  float* k = (float*)scratch;
  float* v = k + 16 * kMaxHeadDim;
  float* acc = v + 16 * kMaxHeadDim;
  float* s = acc + kAttnRows * kMaxHeadDim;  // scores, then weights [rows][16]
  float* sum = s + kAttnRows * 16;           // running sums in 16 lanes
  float* top = sum + kAttnRows * 16;         // running maximum
  int longest = 0;
  for (int r = 0; r < t.rows; ++r) {
    memset(acc + r * w, 0, sizeof(float) * (size_t)w);
    vf_store(sum + 16 * r, vf_zero());
    top[r] = -INFINITY;
    longest = t.limit[r] > longest ? t.limit[r] : longest;
  }
  for (int start = 0; start < longest; start += kKvBlock) {
    const int block = t.block_table[start / kKvBlock];
    const int in_block = longest - start < kKvBlock ? longest - start : kKvBlock;
    load_keys(L, block, t.kv_head, k);
    load_values(L, block, t.kv_head, in_block, v);
    int first = 0;  // rows before it have seen all their keys (rows come in order of position)
    while (first < t.rows && t.limit[first] <= start) ++first;
    all_scores(t, first, k, L.head_dim, s);
    for (int r = first; r < t.rows; ++r) {
      if (t.limit[r] <= start) continue;
      const int keys = t.limit[r] - start < kKvBlock ? t.limit[r] - start : kKvBlock;
      const vf x = vf_min(vf_load(s + 16 * r), vf_load(kCap + 16 - keys));
      const float m = vf_reduce_max(x);
      if (m > top[r]) {
        if (top[r] > -INFINITY) {
          float e[16];
          vf_store(e, vf_exp(vf_set1(top[r] - m)));
          vf_store(sum + 16 * r, vf_mul(vf_load(sum + 16 * r), vf_set1(e[0])));
          scale_row(acc + r * w, w, e[0]);
        }
        top[r] = m;
      }
      const vf p = vf_mul(vf_exp(vf_sub(x, vf_set1(top[r]))), vf_load(kValid + 16 - keys));
      vf_store(s + 16 * r, p);
      vf_store(sum + 16 * r, vf_add(vf_load(sum + 16 * r), p));
      int d = 0;
      for (; d + 128 <= w; d += 128) weighted_values<8>(s + 16 * r, v + d, w, keys, acc + r * w + d);
      for (; d + 64 <= w; d += 64) weighted_values<4>(s + 16 * r, v + d, w, keys, acc + r * w + d);
      for (; d < w; d += 16) weighted_values<1>(s + 16 * r, v + d, w, keys, acc + r * w + d);
    }
  }
  for (int r = 0; r < t.rows; ++r) {
    const float inv = 1.0f / vf_reduce_add(vf_load(sum + 16 * r));
    for (int d = 0; d < w; d += 16) vf_store(t.out[r] + d, vf_mul(vf_load(acc + r * w + d), vf_set1(inv)));
  }
}

}  // namespace
