// Writing the paged KV cache, and softmax attention over it in spans of 64 keys from the first key on.
//
// Spans begin at multiples of 64 whatever the batch, so a row takes the same float steps alone, in a chunk or in a
// batch; keys a row may not see are skipped, never multiplied by zero.
#pragma once

namespace {

inline float span_scale(const float* x, int n) {  // NaN if one is not finite
  float top = 0, bad = 0;
  for (int i = 0; i < n; ++i) {
    const float a = fabsf(x[i]);
    top = a > top ? a : top;
    bad += 0 * a;
  }
  return top / 127.0f + bad;
}

inline int8_t to_int8(float x, float scale) { return scale > 0 ? (int8_t)rintf(x / scale) : 0; }

void kv_write(const KvLayer& L, int block, int offset, int head, const float* key, const float* value) {
  uint8_t *kb = key_block(L, block, head), *vbase = value_block(L, block, head);
  const int group = L.head_dim < 32 ? L.head_dim : 32;
  if (L.k_type == KvType::I16) {
    write_i16_key(kb, offset, key, L.head_dim);
  } else if (L.k_type == KvType::F32) {
    for (int d = 0; d < L.head_dim; ++d) ((float*)kb)[d * kKvBlock + offset] = key[d];
  } else if (L.k_type == KvType::F16) {
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
  if (L.v_type == KvType::I16) {
    write_i16_value(vbase, offset, value, L.head_dim);
  } else if (L.v_type == KvType::F32) {
    memcpy((float*)vbase + (size_t)offset * L.head_dim_pad, value, sizeof(float) * (size_t)L.head_dim);
  } else if (L.v_type == KvType::F16) {
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

// Keys of one block as floats [head_dim][16], values as floats [16][head_dim_pad]: where they lie, or in `room`.
inline const float* load_keys(const KvLayer& L, int block, int head, float* room) {
  const uint8_t* p = key_block(L, block, head);
  if (L.k_type == KvType::F32) return (const float*)p;
  if (L.k_type == KvType::F16) {
    for (int d = 0; d < L.head_dim; ++d) vf_store(room + 16 * d, vf_load_f16((const uint16_t*)p + 16 * d));
    return room;
  }
  const int group = L.head_dim < 32 ? L.head_dim : 32;
  const float* scales = (const float*)(p + (size_t)L.head_dim * kKvBlock);
  for (int d = 0; d < L.head_dim; ++d)
    vf_store(room + 16 * d, vf_mul(vf_load_i8((const int8_t*)p + 16 * d), vf_load(scales + (d / group) * kKvBlock)));
  return room;
}

inline const float* load_values(const KvLayer& L, int block, int head, int keys, float* room) {
  const uint8_t* p = value_block(L, block, head);
  const int w = L.head_dim_pad;
  if (L.v_type == KvType::F32) return (const float*)p;
  if (L.v_type == KvType::F16) {
    for (int i = 0; i < keys * w; i += 16) vf_store(room + i, vf_load_f16((const uint16_t*)p + i));
    return room;
  }
  const float* scales = (const float*)(p + (size_t)w * kKvBlock);
  for (int j = 0; j < keys; ++j)
    for (int d = 0; d < w; d += 16) {
      const int g = d / 32 < L.groups ? d / 32 : L.groups - 1;
      vf_store(room + j * w + d, vf_mul(vf_load_i8((const int8_t*)p + j * w + d), vf_set1(scales[j * L.groups + g])));
    }
  return room;
}

// Scores of R rows against the 16 keys of each of B blocks: even and odd dims in two chains.
//   q[r]  [dim], k[b]  [dim][16], s  row r and block b at s + r * kAttnKeys + b * 16
template <int R, int B>
inline void scores(const float* const* rows, const float* const* blocks, int dim, float* s) {
  const float *q[R], *k[B];
  vf even[R][B], odd[R][B];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) q[r] = rows[r];
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) k[b] = blocks[b];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) even[r][b] = odd[r][b] = vf_zero();
  for (int d = 0; d < dim; d += 2) {
    vf k0[B], k1[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      k0[b] = vf_load(k[b] + 16 * d);
      k1[b] = vf_load(k[b] + 16 * d + 16);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf q0 = vf_set1(q[r][d]), q1 = vf_set1(q[r][d + 1]);
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) {
        even[r][b] = vf_fma(q0, k0[b], even[r][b]);
        odd[r][b] = vf_fma(q1, k1[b], odd[r][b]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) vf_store(s + kAttnKeys * r + kKvBlock * b, vf_add(even[r][b], odd[r][b]));
}

template <int B>
inline void row_scores(int rows, const float* const* q, const float* const* k, int dim, float* s) {
  switch (rows) {
    case 1: return scores<1, B>(q, k, dim, s);
    case 2: return scores<2, B>(q, k, dim, s);
    case 3: return scores<(kScoreRows > 3 ? 3 : kScoreRows), B>(q, k, dim, s);
    default: return scores<kScoreRows, B>(q, k, dim, s);
  }
}

// acc[r][0 .. 16 V) += sum over keys of p[r][j] * v[j] for R rows, keys in order; 16 keys lie in each block of v.
template <int R, int V>
inline void weighted_values(const float* p, const float* const* v, int column, int stride, int keys, float* acc) {
  vf a[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) a[r][i] = vf_load(acc + r * stride + 16 * i);
  for (int begin = 0; begin < keys; begin += kKvBlock, ++v, p += kKvBlock) {
    const float* value = *v + column;
    const int n = keys - begin < kKvBlock ? keys - begin : kKvBlock;
    for (int j = 0; j < n; ++j, value += stride) {
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i) {
        const vf x = vf_load(value + 16 * i);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) a[r][i] = vf_fma(vf_set1(p[kAttnKeys * r + j]), x, a[r][i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) vf_store(acc + r * stride + 16 * i, a[r][i]);
}

// Rows first .. last - 1 share one number of keys; slabs of 64 dims, four rows at a time.
inline void add_values(const float* p, const float* const* v, int w, int keys, int first, int last, float* acc) {
  int d = 0;
  for (; d + 64 <= w; d += 64) {
    int r = first;
    for (; r + 4 <= last; r += 4)
      for (int e = d; e < d + 64; e += 16 * kValueVectors)
        weighted_values<4, kValueVectors>(p + kAttnKeys * r, v, e, w, keys, acc + r * w + e);
    if (kValueVectors == 4 && last - r == 3) {
      weighted_values<3, kValueVectors>(p + kAttnKeys * r, v, d, w, keys, acc + r * w + d);
      r += 3;
    }
    for (; r < last; ++r) weighted_values<1, 4>(p + kAttnKeys * r, v, d, w, keys, acc + r * w + d);
  }
  for (; d < w; d += 16)
    for (int r = first; r < last; ++r) weighted_values<1, 1>(p + kAttnKeys * r, v, d, w, keys, acc + r * w + d);
}

// Turns one row's scores of up to kAttnKeys keys into weights; rescales what was summed when the maximum rises.
inline void softmax_step(float* s, int keys, float* top, float* sum, float* acc, int w) {
  const int vectors = (keys + 15) / 16;
  vf m = vf_set1(-INFINITY);
  for (int i = 0; i < vectors; ++i) {
    const int valid = clamp_keys(keys - 16 * i, 16);
    const vf x = vf_min(vf_load(s + 16 * i), vf_load(kCap + 16 - valid));
    vf_store(s + 16 * i, x);
    m = vf_max(x, m);
  }
  raise_top(vf_reduce_max(m), top, sum, acc, w);
  const vf shift = vf_set1(*top);
  vf total = vf_load(sum);
  for (int i = 0; i < vectors; ++i) {
    const int valid = clamp_keys(keys - 16 * i, 16);
    const vf p = vf_mul(vf_exp(vf_sub(vf_load(s + 16 * i), shift)), vf_load(kValid + 16 - valid));
    vf_store(s + 16 * i, p);
    total = vf_add(total, p);
  }
  vf_store(sum, total);
}

// 64 keys, and the rows that see some of them: `first` and those after it.
struct Span {
  const KvLayer& L;
  const AttnTile& t;
  const AttnScratch& x;
  int start, first, blocks;
  const int32_t* table;
  SpanAhead ahead;

  int keys(int row) const { return clamp_keys(t.limit[row] - start, kAttnKeys); }
};

void float_scores(Span& s) {
  const AttnTile& t = s.t;
  for (int b = 0; b < s.blocks; b += kPair) {
    const int count = s.blocks - b < kPair ? 1 : kPair;
    const float* keys[kPair];
    s.ahead.ask();
    for (int i = 0; i < count; ++i) keys[i] = load_keys(s.L, s.table[b + i], t.kv_head, s.x.block + i * kKvBlock * kMaxHeadDim);
    for (int r = s.first / kScoreRows * kScoreRows; r < t.rows; r += kScoreRows) {
      float* to = s.x.s + kAttnKeys * r + kKvBlock * b;
      if (count == kPair) row_scores<kPair>(t.rows - r, t.q + r, keys, s.L.head_dim, to);
      else row_scores<1>(t.rows - r, t.q + r, keys, s.L.head_dim, to);
    }
  }
}

template <bool Often>
void i16_scores(Span& s) {
  const uint8_t* keys[kAttnKeys / kKvBlock];
  for (int b = 0; b < s.blocks; ++b) keys[b] = key_block(s.L, s.table[b], s.t.kv_head);
  for_tiles(s.t.rows - s.first, RunI16Scores<Often>{s.x.q + s.first * s.L.head_dim, s.x.q_scale + s.first, s.L.head_dim,
                                                    s.blocks, keys, s.x.s + kAttnKeys * s.first, &s.ahead});
}

void float_values(Span& s) {
  const AttnTile& t = s.t;
  const AttnScratch& x = s.x;
  const int w = s.L.head_dim_pad;
  for (int r = s.first; r < t.rows; ++r)
    softmax_step(x.s + kAttnKeys * r, s.keys(r), x.top + r, x.sum + 16 * r, x.acc + r * w, w);
  for (int b = 0; b < s.blocks; b += kPair) {
    const int begin = s.start + kKvBlock * b, longest = t.limit[t.rows - 1];
    const float* values[kPair];
    s.ahead.ask();
    for (int i = 0; i < kPair && b + i < s.blocks; ++i)
      values[i] = load_values(s.L, s.table[b + i], t.kv_head, clamp_keys(longest - begin - kKvBlock * i, kKvBlock),
                              x.block + i * kKvBlock * kMaxHeadDim);
    for (int r = s.first; r < t.rows;) {
      const int keys = clamp_keys(t.limit[r] - begin, kPair * kKvBlock);
      int last = r + 1;
      while (last < t.rows && clamp_keys(t.limit[last] - begin, kPair * kKvBlock) == keys) ++last;
      if (keys) add_values(x.s + kKvBlock * b, values, w, keys, r, last, x.acc);
      r = last;
    }
  }
}

template <bool Often>
void i16_values(Span& s) {
  const AttnScratch& x = s.x;
  const int w = s.L.head_dim_pad;
  const uint8_t* values[kAttnKeys / kKvBlock];
  for (int b = 0; b < s.blocks; ++b) {
    values[b] = value_block(s.L, s.table[b], s.t.kv_head);
    vf_store(x.scale + kKvBlock * b, vf_load(i16_scales(values[b], w)));
  }
  const I16Softmax softmax{x, w};
  for (int r = s.first; r < s.t.rows; r += 16) softmax.run(r, std::min(16, s.t.rows - r), [&](int row) { return s.keys(row); });
  for_tiles(s.t.rows - s.first, RunI16Values<Often>{x.p + kAttnKeys * s.first, x.step + s.first, w, s.blocks, values,
                                                    x.acc + s.first * w, &s.ahead});
}

void attention(const KvLayer& L, const AttnTile& t, uint8_t* scratch) {
  const int w = L.head_dim_pad;
  const bool i16_keys = L.k_type == KvType::I16, i16_both = i16_keys && L.v_type == KvType::I16;
  const AttnScratch x = carve_attention(scratch);
  for (int r = 0; r < t.rows; ++r) {
    memset(x.acc + r * w, 0, sizeof(float) * (size_t)w);
    vf_store(x.sum + 16 * r, vf_zero());
    x.top[r] = -INFINITY;
    if (i16_keys) x.q_scale[r] = round_to_length(t.q[r], w, x.q + r * w);
  }
  const int longest = t.limit[t.rows - 1];  // rows come in order of position
  int first = 0;
  for (int start = 0; start < longest; start += kAttnKeys) {
    while (t.limit[first] <= start) ++first;  // rows that have seen all their keys
    const int left = longest - start;
    Span s{L, t, x, start, first, (clamp_keys(left, kAttnKeys) + kKvBlock - 1) / kKvBlock, t.block_table + start / kKvBlock, {}};
    for (int b = kAttnKeys; b < 2 * kAttnKeys && b < left; b += kKvBlock) s.ahead.add(L, s.table[b / kKvBlock], t.kv_head);
    s.ahead.share(i16_both ? i16_asks(t.rows - first, w) : 2 * kAttnKeys / kKvBlock / kPair);
    const bool often = i16_asks_often(t.rows - first);
    i16_keys ? often ? i16_scores<true>(s) : i16_scores<false>(s) : float_scores(s);
    L.v_type == KvType::I16 ? often ? i16_values<true>(s) : i16_values<false>(s) : float_values(s);
  }
  for (int r = 0; r < t.rows; ++r) {
    const float inv = 1.0f / vf_reduce_add(vf_load(x.sum + 16 * r));
    for (int d = 0; d < w; d += 16) vf_store(t.out[r] + d, vf_mul(vf_load(x.acc + r * w + d), vf_set1(inv)));
  }
}

}  // namespace
