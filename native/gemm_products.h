// Products of an unpacked chunk with tiles of activation rows: exact integer dots, then float steps in fixed order.
#pragma once

namespace {

// What four bytes of a lane are: unsigned bytes, Q8_0's form on this instruction set, or two 16-bit numbers. Narrow: bytes
// whose products are summed in 16 bits.
enum class Lane { Bytes, Narrow, Q8, Pairs };
constexpr Lane kQ8Lane = kQ8Unsigned ? Lane::Bytes : Lane::Q8;

template <Lane L, class Sums>
AUTOGLM_INLINE Sums dot_lane(Sums acc, vb w, Quad a) {
  if constexpr (L == Lane::Narrow) return dot4_narrow(acc, w, a);
  return L == Lane::Bytes ? dot4(acc, w, a) : L == Lane::Q8 ? dot4_q8(acc, w, a) : dot2(acc, w, a);
}

// Dots of one 32-column block (or of another number of quads) with T rows: d[t][g] += w . q
template <int T, int R, Lane L, int Quads>
AUTOGLM_INLINE void block_dots(const uint8_t* w, const int8_t* const (&q)[T], int offset, vi (&d)[T][R]) {
#pragma GCC unroll 8
  for (int k = 0; k < Quads; ++k) {
    vb x[R];
#pragma GCC unroll 2
    for (int g = 0; g < R; ++g) x[g] = vb_load(w + k * kQuadBytes + g * kVec);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Quad a = quad_load(q[t] + offset, k);
#pragma GCC unroll 2
      for (int g = 0; g < R; ++g) d[t][g] = dot_lane<L>(d[t][g], x[g], a);
    }
  }
}

#define AUTOGLM_TILE(body)                  \
  _Pragma("GCC unroll 8")                   \
  for (int t = 0; t < T; ++t)               \
    _Pragma("GCC unroll 2")                 \
    for (int g = 0; g < R; ++g) { body; }

// Quads of weights of so many bits whose products 16-bit sums hold: one is at most 2 * (2^Bits - 1) * 128.
constexpr int narrow_run(int bits) { return 1 << (7 - bits); }

// The same as block_dots with weights of less than 8 bits.
template <int T, int R, int Bits, int Quads>
AUTOGLM_INLINE void narrow_dots(const uint8_t* w, const int8_t* const (&q)[T], int offset, vi (&d)[T][R]) {
  if constexpr (kNarrowSums) {
    constexpr int run = narrow_run(Bits);
#pragma GCC unroll 2
    for (int k = 0; k < Quads; k += run) {
      vi sums[T][R];
      AUTOGLM_TILE(sums[t][g] = vi_zero())
      block_dots<T, R, Lane::Narrow, run>(w + k * kQuadBytes, q, offset + 4 * k, sums);
      AUTOGLM_TILE(d[t][g] = widen_sums(d[t][g], sums[t][g]))
    }
  } else {
    block_dots<T, R, Lane::Bytes, Quads>(w, q, offset, d);
  }
}

// Asks for an eighth of what the next T rows of the activation have in a chunk, while block b of this tile's is multiplied:
// the first cache is full of weights, and rows come from the second (one core of Zen 4, 512 rows: Q4_K 174 to 181
// GMAC/s, Q8_0 169 to 174).
template <int T, class Q, class Meta>
AUTOGLM_INLINE void ask_next_rows(const Q* q, const Meta* meta, int b) {
  constexpr int q_lines = divide_up(T * kChunk * (int)sizeof(Q), kBlocks * 64);
  constexpr int meta_lines = divide_up(T * (int)sizeof(Meta), kBlocks * 64);
#pragma GCC unroll 8
  for (int i = 0; i < q_lines; ++i) prefetch((const char*)(q + T * kChunk) + 64 * (b * q_lines + i));
#pragma GCC unroll 2
  for (int i = 0; i < meta_lines; ++i) prefetch((const char*)(meta + T) + 64 * (b * meta_lines + i));
}

// Q4_K and Q5_K: c += scale_x * (sum_b d_b * dot_b - dmin * sum_b m_b * sum32_b)
template <int T, int R, int Bits>
inline void product_k32(const Scratch& s, int half, const int8_t* qx, const ActMetaK* meta, float* c) {
  const int8_t* q[T];
  vf acc[T][R];
  for (int t = 0; t < T; ++t) q[t] = qx + t * kChunk;
  AUTOGLM_TILE(acc[t][g] = vf_zero())
  for (int b = 0; b < kBlocks; ++b) {
    vi d[T][R];
    AUTOGLM_TILE(d[t][g] = vi_zero())
    s.ahead->ask();
    if (half == 0) ask_next_rows<T>(qx, meta, b);
    narrow_dots<T, R, Bits, 8>(s.w + b * kBlockBytes + half * kVec, q, 32 * b, d);
    AUTOGLM_TILE(acc[t][g] = vf_fma(vf_from_int(d[t][g]), vf_load(s.scale + 32 * b + 16 * (half + g)), acc[t][g]))
  }
  vi m[T][R];
  AUTOGLM_TILE(m[t][g] = vi_zero())
  for (int pair = 0; pair < 4; ++pair)
    AUTOGLM_TILE(m[t][g] = dot2(m[t][g], s.m16 + 64 * pair + 32 * (half + g), meta[t].sum32 + 2 * pair))
  AUTOGLM_TILE({
    float* out = c + t * kPanelRows + 16 * (half + g);
    const vf a = vf_fma(vf_from_int(m[t][g]), vf_load(s.minimum + 16 * (half + g)), acc[t][g]);
    vf_store(out, vf_fma(a, vf_set1(meta[t].scale), vf_load(out)));
  })
}

// Q6_K: c += scale_x * sum_j d_j * (dot_j - 32 * sum16_j)
template <int T, int R>
inline void product_k16(const Scratch& s, int half, const int8_t* qx, const ActMetaK* meta, float* c) {
  const int8_t* q[T];
  vf acc[T][R];
  for (int t = 0; t < T; ++t) q[t] = qx + t * kChunk;
  AUTOGLM_TILE(acc[t][g] = vf_zero())
  for (int j = 0; j < 2 * kBlocks; ++j) {
    vi d[T][R];
    for (int t = 0; t < T; ++t) {
      const vi start = vi_offset<5>(meta[t].neg_sum16 + j);
      for (int g = 0; g < R; ++g) d[t][g] = start;
    }
    s.ahead->ask();
    if (half == 0 && j % 2 == 0) ask_next_rows<T>(qx, meta, j / 2);
    narrow_dots<T, R, 6, 4>(s.w + j * (kBlockBytes / 2) + half * kVec, q, 16 * j, d);
    AUTOGLM_TILE(acc[t][g] = vf_fma(vf_from_int(d[t][g]), vf_load(s.scale + 32 * j + 16 * (half + g)), acc[t][g]))
  }
  AUTOGLM_TILE({
    float* out = c + t * kPanelRows + 16 * (half + g);
    vf_store(out, vf_fma(acc[t][g], vf_set1(meta[t].scale), vf_load(out)));
  })
}

// Types with a scale per 32 columns on both sides. Offset: log2 of the constant a weight is raised by,
// or -1 for none. HasMin: Q4_1, Q5_1. c += sum_b d_b * (scale_x_b * dot_b) + m_b * scaled_sum_b
template <int T, int R, int Offset, bool HasMin, int Bits>
inline void product_b32(const Scratch& s, int half, int blocks, const int8_t* qx, const ActMetaB* meta, float* c) {
  const int8_t* q[T];
  vf acc[T][R];
  for (int t = 0; t < T; ++t) q[t] = qx + t * kChunk;
  AUTOGLM_TILE(acc[t][g] = vf_load(c + t * kPanelRows + 16 * (half + g)))
  for (int b = 0; b < blocks; ++b) {
    vi d[T][R];
    for (int t = 0; t < T; ++t) {
      const vi start = Offset >= 0 ? vi_offset<(Offset < 0 ? 0 : Offset)>(meta[t].neg_sum + b) : vi_zero();
      for (int g = 0; g < R; ++g) d[t][g] = start;
    }
    s.ahead->ask();
    if (half == 0) ask_next_rows<T>(qx, meta, b);
    const uint8_t* w = s.w + b * kBlockBytes + half * kVec;
    if constexpr (Bits < 8) narrow_dots<T, R, Bits, 8>(w, q, 32 * b, d);
    else block_dots<T, R, kQ8Lane, 8>(w, q, 32 * b, d);
    AUTOGLM_TILE({
      const vf x = vf_mul(vf_from_int(d[t][g]), vf_set1(meta[t].scale[b]));
      acc[t][g] = vf_fma(x, vf_load(s.scale + 32 * b + 16 * (half + g)), acc[t][g]);
      if (HasMin)
        acc[t][g] = vf_fma(vf_set1(meta[t].scaled_sum[b]), vf_load(s.minimum + 32 * b + 16 * (half + g)), acc[t][g]);
    })
  }
  AUTOGLM_TILE(vf_store(c + t * kPanelRows + 16 * (half + g), acc[t][g]))
}

// I16: c += sum_b d_b * (scale_x_b * dot_b), straight from the packed blocks of 64 columns, scales in front of each.
constexpr int kI16BlockBytes = kPanelRows * 4 + kI16Columns * kPanelRows * 2;

template <int T, int R>
inline void product_i16(const uint8_t* p, int half, int blocks, const int16_t* qx, const ActMetaI16* meta, Ahead& ahead,
                        float* c) {
  const int8_t* q[T];
  vf acc[T][R];
  for (int t = 0; t < T; ++t) q[t] = (const int8_t*)(qx + t * kChunk);
  AUTOGLM_TILE(acc[t][g] = vf_load(c + t * kPanelRows + 16 * (half + g)))
  for (int b = 0; b < blocks; ++b, p += kI16BlockBytes) {
    vi d[T][R];
    AUTOGLM_TILE(d[t][g] = vi_zero())
    for (int part = 0; part < kI16Columns / 16; ++part) {
      if (part % 2 == 0) {  // once for 32 columns, as all products do
        ahead.ask();
        if (half == 0) ask_next_rows<T>(qx, meta, 2 * b + part / 2);
      }
      block_dots<T, R, Lane::Pairs, 8>(p + kPanelRows * 4 + part * kBlockBytes + half * kVec, q,
                                       2 * (kI16Columns * b + 16 * part), d);
    }
    AUTOGLM_TILE({
      const vf x = vf_mul(vf_from_int(d[t][g]), vf_set1(meta[t].scale[b]));
      acc[t][g] = vf_fma(x, vf_load((const float*)p + 16 * (half + g)), acc[t][g]);
    })
  }
  AUTOGLM_TILE(vf_store(c + t * kPanelRows + 16 * (half + g), acc[t][g]))
}

// Float weights, unpacked to [column][32]; columns strictly in order.
template <int T, int R>
inline void product_float(const float* w, int half, int cols, const float* x, int stride, float* c) {
  vf acc[T][R];
  AUTOGLM_TILE(acc[t][g] = vf_load(c + t * kPanelRows + 16 * (half + g)))
  for (int k = 0; k < cols; ++k) {
    vf y[R];
    for (int g = 0; g < R; ++g) y[g] = vf_load(w + k * kPanelRows + 16 * (half + g));
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const vf a = vf_set1(x[t * stride + k]);
#pragma GCC unroll 2
      for (int g = 0; g < R; ++g) acc[t][g] = vf_fma(a, y[g], acc[t][g]);
    }
  }
  AUTOGLM_TILE(vf_store(c + t * kPanelRows + 16 * (half + g), acc[t][g]))
}

}  // namespace
