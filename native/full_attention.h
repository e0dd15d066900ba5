// Attention in which all rows of one sequence see each other: an image encoder's, in whole numbers.
//
// Queries and keys are 8 bits with a scale a row, values 12 bits with a scale a dimension and span of 64 keys, softmax
// weights 14 bits of the row's largest so far; every sum inside a span is exact. Rotating q and k by the same
// orthogonal matrix leaves q . k as it was, and a Hadamard matrix spreads a channel that is far larger than the others
// over all of them, so that one scale serves the row (QuaRot, arXiv:2404.00456). A row of the result depends on no other
// query, and the steps are the same on every instruction set.
#pragma once

namespace {

template <int Step>
inline vf mix_lanes(vf v) {
  alignas(64) static const float kSign[16] = {
#define AUTOGLM_SIGN(i) (i) & Step ? -1.0f : 1.0f
      AUTOGLM_SIGN(0), AUTOGLM_SIGN(1), AUTOGLM_SIGN(2), AUTOGLM_SIGN(3), AUTOGLM_SIGN(4), AUTOGLM_SIGN(5),
      AUTOGLM_SIGN(6), AUTOGLM_SIGN(7), AUTOGLM_SIGN(8), AUTOGLM_SIGN(9), AUTOGLM_SIGN(10), AUTOGLM_SIGN(11),
      AUTOGLM_SIGN(12), AUTOGLM_SIGN(13), AUTOGLM_SIGN(14), AUTOGLM_SIGN(15)};
#undef AUTOGLM_SIGN
  return vf_fma(v, vf_load(kSign), vf_swap<Step>(v));
}

// x = H y, H unnormalized of size `power`, which divides n and is 16 or more: (H a) . (H b) = power * a . b.
inline void hadamard(const float* y, int n, int power, float* x) {
  for (int i = 0; i < n; i += 16) vf_store(x + i, mix_lanes<8>(mix_lanes<4>(mix_lanes<2>(mix_lanes<1>(vf_load(y + i))))));
  for (int step = 16; step < power; step *= 2)
    for (int i = 0; i < n; i += 2 * step)
      for (int j = i; j < i + step; j += 16) {
        const vf a = vf_load(x + j), b = vf_load(x + j + step);
        vf_store(x + j, vf_add(a, b));
        vf_store(x + j + step, vf_sub(a, b));
      }
}

constexpr float kValueSteps = 2047.0f, kWeightBits = 14.0f;  // 64 * 2^14 * 2047 < 2^31

// Dims of a head's values as they lie packed: whole panels.
inline int value_width(int dim) { return (dim + kPanelRows - 1) / kPanelRows * kPanelRows; }

// One head's rows first .. first + 63 of a sequence of H.rows, fewer at its end, from the fused rows [q | k | v].
void pack_heads(const FullHeads& H, int head, int span, const float* qkv, size_t stride, const float* cs, int half,
                bool interleaved) {
  const int dim = H.head_dim, width = value_width(dim), power = dim & -dim, first = span * kAttnKeys;
  const int rows = H.rows - first < kAttnKeys ? H.rows - first : kAttnKeys;
  const size_t at = (size_t)head * H.capacity + first;
  const float softmax_scale = kLog2E / (sqrtf((float)dim) * (float)power);
  alignas(64) float x[kMaxHeadDim], turned[kMaxHeadDim];
  const auto turn = [&](int r, const float* from) {
    memcpy(turned, from, sizeof(float) * (size_t)dim);
    rotate(cs + (size_t)(first + r) * 2 * half, half, interleaved, 1.0f, dim, turned);
    return turned;
  };
  alignas(64) int8_t q8[kMaxHeadDim];
  float poison = 0;  // NaN once a key is: a softmax would pass such a score over, so the values tell
  memset(H.k + at * dim, kQ8Unsigned ? 128 : 0, (size_t)kAttnKeys * dim);
  for (int r = 0; r < rows; ++r) {
    const float* row = qkv + (size_t)(first + r) * stride + (size_t)head * dim;
    vi sums = vi_zero();
    hadamard(turn(r, row), dim, power, x);
    H.q_scale[at + r] = quantize_span(x, dim, H.q + (at + r) * dim, [&](int, vi q) { sums = vi_add(sums, q); }) * softmax_scale;
    H.q_neg_sum[at + r] = -vi_sum(sums);
    hadamard(turn(r, row + (size_t)H.num_heads * dim), dim, power, x);
    H.k_scale[at + r] = quantize_span(x, dim, q8, [](int, vi) {});
    poison += 0 * H.k_scale[at + r];
    uint8_t* k = H.k + (at + r / kPanelRows * kPanelRows) * dim + r % kPanelRows * 4;
    for (int d = 0; d < dim; d += 4) {
      uint32_t quad;
      memcpy(&quad, q8 + d, 4);
      if (kQ8Unsigned) quad ^= 0x80808080u;
      memcpy(k + d / 4 * kQuadBytes, &quad, 4);
    }
  }
  for (int r = rows; r < kAttnKeys; ++r) H.k_scale[at + r] = 0;

  float* scale = H.v_scale + ((size_t)head * (H.capacity / kAttnKeys) + span) * width;
  int16_t* v = H.v + at * width;
  const float* values = qkv + (size_t)first * stride + (size_t)(2 * H.num_heads + head) * dim;
  memset(scale, 0, sizeof(float) * (size_t)width);
  memset(v, 0, sizeof(int16_t) * (size_t)kAttnKeys * width);
  for (int d = 0; d < dim; d += 16) {
    vf top = vf_zero(), bad = vf_zero();
    for (int r = 0; r < rows; ++r) {
      const vf y = vf_load(values + r * stride + d);
      top = vf_max(vf_abs(y), top);
      bad = vf_fma(y, vf_zero(), bad);  // NaN once there is one, or an infinity
    }
    vf_store(scale + d, vf_add(vf_mul(top, vf_set1(1.0f / kValueSteps)), vf_add(bad, vf_set1(poison))));
    if (vf_reduce_add(bad) != 0) continue;  // the scale tells
    const vf inverse = vf_div(vf_set1(kValueSteps), vf_max(top, vf_set1(1e-30f)));
    const auto row = [&](int r) { return r < rows ? vi_round(vf_mul(vf_load(values + r * stride + d), inverse)) : vi_zero(); };
    int16_t* to = v + d / kPanelRows * kPanelRows * kAttnKeys + d % kPanelRows * 2;
    for (int r = 0; r < rows; r += 2) vi_store_pairs(to + r * kPanelRows, row(r), row(r + 1));
  }
}

struct FullScratch {
  float* s;      // scores [rows][64]
  int16_t* p;    // weights [rows][64]
  float* acc;    // [rows][value_width]
  float* sum;    // running sums of weights in 16 lanes [rows][16]
  float* top;    // running maximum [rows]
};

inline FullScratch carve_full(uint8_t* p) {
  FullScratch x;
  x.s = (float*)p;
  x.p = (int16_t*)(x.s + kFullRows * kAttnKeys);
  x.acc = (float*)(x.p + kFullRows * kAttnKeys);
  x.sum = x.acc + kFullRows * kMaxHeadDim;
  x.top = x.sum + kFullRows * 16;
  return x;
}

// Scores of T queries against one panel of 32 keys, in units of log 2.
struct RunScores {
  const FullHeads& H; size_t row, key; float* s;
  template <int T> void run(int t0) const {
    const int dim = H.head_dim;
    const int8_t* q[T];
    for (int t = 0; t < T; ++t) q[t] = H.q + (row + t0 + t) * dim;
    for (int half = 0; half < 2; half += kTileR) {
      const uint8_t* w = H.k + key * dim + half * kVec;
      vi d[T][kTileR];
      for (int t = 0; t < T; ++t) {
        const vi start = kQ8Unsigned ? vi_offset<7>(H.q_neg_sum + row + t0 + t) : vi_zero();
        for (int g = 0; g < kTileR; ++g) d[t][g] = start;
      }
      int c = 0;
      for (; c + 32 <= dim; c += 32) block_dots<T, kTileR, kQ8Lane, 8>(w + c * kPanelRows, q, c, d);
      for (; c < dim; c += 16) block_dots<T, kTileR, kQ8Lane, 4>(w + c * kPanelRows, q, c, d);
      for (int t = 0; t < T; ++t)
        for (int g = 0; g < kTileR; ++g) {
          const vf scale = vf_mul(vf_load(H.k_scale + key + 16 * (half + g)), vf_set1(H.q_scale[row + t0 + t]));
          vf_store(s + (t0 + t) * kAttnKeys + 16 * (half + g), vf_mul(vf_from_int(d[t][g]), scale));
        }
    }
  }
};

// acc += sum over a span's keys of p * v for T rows and one panel of 32 dims.
struct RunWeights {
  const int16_t *p, *v; const float* scale; int width; float* acc;
  template <int T> void run(int t0) const {
    const int8_t* q[T];
    for (int t = 0; t < T; ++t) q[t] = (const int8_t*)(p + (t0 + t) * kAttnKeys);
    for (int half = 0; half < 2; half += kTileR) {
      vi d[T][kTileR];
      for (int t = 0; t < T; ++t)
        for (int g = 0; g < kTileR; ++g) d[t][g] = vi_zero();
      for (int b = 0; b < kAttnKeys / 16; ++b)
        block_dots<T, kTileR, Lane::Pairs, 8>((const uint8_t*)v + b * kBlockBytes + half * kVec, q, 32 * b, d);
      for (int t = 0; t < T; ++t)
        for (int g = 0; g < kTileR; ++g) {
          float* a = acc + (t0 + t) * width + 16 * (half + g);
          vf_store(a, vf_fma(vf_from_int(d[t][g]), vf_load(scale + 16 * (half + g)), vf_load(a)));
        }
    }
  }
};

// Scores of a span -> weights in steps of a row's largest so far; what was summed follows when that rises. Rows first ..
// first + count - 1, at most sixteen of them: none waits for its own maximum.
inline void full_softmax(const FullScratch& x, int first, int count, int width) {
  alignas(64) float lanes[16 * 16], highest[16];
  for (int i = 0; i < count; ++i) {
    const float* s = x.s + kAttnKeys * (first + i);
    vf m = vf_load(s);
    for (int j = 16; j < kAttnKeys; j += 16) m = vf_max(vf_load(s + j), m);
    vf_store(lanes + 16 * i, m);
  }
  vf_store(highest, largest_of_rows(lanes));
  for (int i = 0; i < count; ++i) {
    const int r = first + i;
    if (!(highest[i] > x.top[r])) continue;
    float less[16];
    vf_store(less, vf_exp2_down(vf_set1(x.top[r] - highest[i])));
    vf_store(x.sum + 16 * r, vf_mul(vf_load(x.sum + 16 * r), vf_set1(less[0])));
    scale_row(x.acc + width * r, width, less[0]);
    x.top[r] = highest[i];
  }
  for (int r = first; r < first + count; ++r) {
    const vf shift = vf_set1(x.top[r] - kWeightBits);
    vf total = vf_load(x.sum + 16 * r);
    for (int j = 0; j < kAttnKeys; j += 16) {
      const vf s = vf_load(x.s + kAttnKeys * r + j);
      const vi w = vi_round(vf_exp2_down(vf_sub(s, shift)));
      vi_store_i16(x.p + kAttnKeys * r + j, w);
      total = vf_add(total, vf_from_int(w));
    }
    vf_store(x.sum + 16 * r, total);
  }
}

void full_attention(const FullHeads& H, int head, int first, int rows, float* const* out, uint8_t* scratch) {
  const int dim = H.head_dim, width = value_width(dim);
  const FullScratch x = carve_full(scratch);
  const size_t at = (size_t)head * H.capacity;
  memset(x.acc, 0, sizeof(float) * (size_t)rows * (size_t)width);
  memset(x.sum, 0, sizeof(float) * (size_t)rows * 16);
  for (int r = 0; r < rows; ++r) x.top[r] = -INFINITY;
  for (int start = 0; start < H.rows; start += kAttnKeys) {
    for (int panel = 0; panel < kAttnKeys; panel += kPanelRows)
      for_tiles(rows, RunScores{H, at + first, at + start + panel, x.s + panel});
    for (int r = 0; r < rows; ++r)
      for (int i = H.rows - start; i < kAttnKeys; ++i) x.s[r * kAttnKeys + i] = -INFINITY;
    for (int r = 0; r < rows; r += 16) full_softmax(x, r, std::min(16, rows - r), width);
    const int16_t* v = H.v + (at + start) * width;
    const float* scale = H.v_scale + (at + start) / kAttnKeys * width;
    for (int d = 0; d < width; d += kPanelRows)
      for_tiles(rows, RunWeights{x.p, v + d * kAttnKeys, scale + d, width, x.acc + d});
  }
  for (int r = 0; r < rows; ++r) {
    const vf inv = vf_set1(1.0f / vf_reduce_add(vf_load(x.sum + 16 * r)));
    for (int d = 0; d < dim; d += 16) vf_store(out[r] + d, vf_mul(vf_load(x.acc + r * width + d), inv));
  }
}

}  // namespace
