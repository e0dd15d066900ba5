// Every kernel, once, over the sixteen lanes of a simd_*.h; included by one file per instruction set.
//
// All code sits in an anonymous namespace: the linker must never merge two instruction sets' bodies.
// The unpacked form of a chunk lives in a 12 KB scratch in L1: unsigned bytes [block 8][quad 8][half 2][64]
// (a vector is 16 rows x 4 columns), float scales, minimums. Unpacking differs by weight type; the
// products over the unpacked form are a few templates shared by all types.
#include <math.h>
#include <string.h>

namespace {

using namespace autoglm;

#define AUTOGLM_INLINE inline __attribute__((always_inline))

constexpr int kVec = 64;                      // bytes of a weight vector
constexpr int kQuadBytes = 2 * kVec;          // both halves of a panel, one quad of columns
constexpr int kBlockBytes = 8 * kQuadBytes;   // an unpacked 32-column block

struct Scratch {
  uint8_t* w;      // [8][8][2][64]
  float* scale;    // [16][32]: per 32 columns, or per 16 for Q6_K
  float* minimum;  // [8][32]; K-quants use row 0 for -dmin
  int16_t* m16;    // [4][32][2]: 6-bit minimums of block pairs
};

inline Scratch carve(uint8_t* p) {
  return {p, (float*)(p + 8192), (float*)(p + 8192 + 2048), (int16_t*)(p + 8192 + 2048 + 2048)};
}

// ---------------------------------------------------------------- unpacking, one function a storage form

inline const uint8_t* unpack_k_scales(const uint8_t* p, const Scratch& s) {
  for (int g = 0; g < 2; ++g) {
    const vf d = vf_load_f16((const uint16_t*)p + 16 * g);
    const vf dmin = vf_load_f16((const uint16_t*)(p + 64) + 16 * g);
    vf_store(s.minimum + 16 * g, vf_sub(vf_zero(), dmin));
    for (int b = 0; b < 8; ++b) vf_store(s.scale + 32 * b + 16 * g, vf_mul(d, vf_load_u8(p + 128 + 32 * b + 16 * g)));
  }
  const uint8_t* m = p + 128 + 256;
  for (int pair = 0; pair < 4; ++pair)
    for (int g = 0; g < 2; ++g) widen_u8(s.m16 + 64 * pair + 32 * g, m + 64 * pair + 32 * g);
  return m + 256;
}

inline void unpack_q4_k(const uint8_t* p, const Scratch& s) {
  p = unpack_k_scales(p, s);
  const vb low = vb_set1(15);
  for (int pair = 0; pair < 4; ++pair) {
    uint8_t* w = s.w + 2 * pair * kBlockBytes;
    for (int i = 0; i < 16; ++i, p += kVec) {
      prefetch(p + 2048);
      const vb x = vb_load(p);
      vb_store(w + i * kVec, vb_and(x, low));
      vb_store(w + kBlockBytes + i * kVec, vb_and(vb_shr<4>(x), low));
    }
  }
}

template <int Q>
inline vb high_bit_raw(vb plane) {  // bit Q of every byte moved to bit 4, other bits left in
  return Q <= 4 ? vb_shl<(Q <= 4 ? 4 - Q : 0)>(plane) : vb_shr<(Q > 4 ? Q - 4 : 0)>(plane);
}

template <int Pair>
inline void unpack_q5_k_pair(const uint8_t* p, const uint8_t* plane, uint8_t* w) {
  const vb low = vb_set1(15), high = vb_set1(16);
  for (int i = 0; i < 16; ++i) {
    prefetch(p + i * kVec + 2560);
    const vb x = vb_load(p + i * kVec), h = vb_load(plane + i * kVec);
    vb_store(w + i * kVec, vb_or(vb_and(x, low), vb_and(high_bit_raw<2 * Pair>(h), high)));
    vb_store(w + kBlockBytes + i * kVec, vb_or(vb_and(vb_shr<4>(x), low), vb_and(high_bit_raw<2 * Pair + 1>(h), high)));
  }
}

inline void unpack_q5_k(const uint8_t* p, const Scratch& s) {
  p = unpack_k_scales(p, s);
  const uint8_t* plane = p + 4096;
  unpack_q5_k_pair<0>(p, plane, s.w);
  unpack_q5_k_pair<1>(p + 1024, plane, s.w + 2 * kBlockBytes);
  unpack_q5_k_pair<2>(p + 2048, plane, s.w + 4 * kBlockBytes);
  unpack_q5_k_pair<3>(p + 3072, plane, s.w + 6 * kBlockBytes);
}

inline void unpack_q6_k(const uint8_t* p, const Scratch& s) {
  for (int g = 0; g < 2; ++g) {
    const vf d = vf_load_f16((const uint16_t*)p + 16 * g);
    for (int j = 0; j < 16; ++j)
      vf_store(s.scale + 32 * j + 16 * g, vf_mul(d, vf_load_i8((const int8_t*)p + 64 + 32 * j + 16 * g)));
  }
  const uint8_t *nib = p + 64 + 512, *plane = nib + 4096;
  const vb low = vb_set1(15), high = vb_set1(48);
  for (int h = 0; h < 2; ++h) {
    uint8_t* w = s.w + 4 * h * kBlockBytes;
    const uint8_t *n0 = nib + (2 * h) * 1024, *n1 = n0 + 1024, *pl = plane + h * 1024;
    for (int i = 0; i < 16; ++i) {  // blocks 4h..4h+3: nibbles (n0 low, n1 low, n0 high, n1 high), 2 bits each of pl
      prefetch(n0 + i * kVec + 3072);
      prefetch(n1 + i * kVec + 3072);
      prefetch(pl + i * kVec + 3072);
      const vb x0 = vb_load(n0 + i * kVec), x1 = vb_load(n1 + i * kVec), y = vb_load(pl + i * kVec);
      uint8_t* o = w + i * kVec;
      vb_store(o, vb_or(vb_and(x0, low), vb_and(vb_shl<4>(y), high)));
      vb_store(o + kBlockBytes, vb_or(vb_and(x1, low), vb_and(vb_shl<2>(y), high)));
      vb_store(o + 2 * kBlockBytes, vb_or(vb_and(vb_shr<4>(x0), low), vb_and(y, high)));
      vb_store(o + 3 * kBlockBytes, vb_or(vb_and(vb_shr<4>(x1), low), vb_and(vb_shr<2>(y), high)));
    }
  }
}

inline void load_block_halves(const uint8_t* p, float* dst) {
  for (int g = 0; g < 2; ++g) vf_store(dst + 16 * g, vf_load_f16((const uint16_t*)p + 16 * g));
}

template <int Q>
inline vb high_bit(vb plane) { return vb_and(high_bit_raw<Q>(plane), vb_set1(16)); }

// Legacy 32-column blocks: [d][m][512 nibbles or 1024 bytes][plane], the parts a type has.
template <bool HasMin, bool HasPlane>
inline void unpack_b32(const uint8_t* p, int blocks, const Scratch& s) {
  const vb low = vb_set1(15);
  for (int b = 0; b < blocks; ++b) {
    load_block_halves(p, s.scale + 32 * b);
    p += 64;
    if (HasMin) {
      load_block_halves(p, s.minimum + 32 * b);
      p += 64;
    }
    uint8_t* w = s.w + b * kBlockBytes;
    for (int i = 0; i < 8; ++i) {
      prefetch(p + i * kVec + 2048);
      const vb x = vb_load(p + i * kVec);
      vb_store(w + i * kVec, vb_and(x, low));
      vb_store(w + 4 * kQuadBytes + i * kVec, vb_and(vb_shr<4>(x), low));
    }
    p += 512;
    if (HasPlane) {
      prefetch(p + 2048);
      for (int g = 0; g < 2; ++g) {
        const vb h = vb_load(p + g * kVec);
        uint8_t* o = w + g * kVec;
#define AUTOGLM_HIGH(Q) vb_store(o + Q * kQuadBytes, vb_or(vb_load(o + Q * kQuadBytes), high_bit<Q>(h)));
        AUTOGLM_HIGH(0) AUTOGLM_HIGH(1) AUTOGLM_HIGH(2) AUTOGLM_HIGH(3)
        AUTOGLM_HIGH(4) AUTOGLM_HIGH(5) AUTOGLM_HIGH(6) AUTOGLM_HIGH(7)
#undef AUTOGLM_HIGH
      }
      p += 128;
    }
  }
}

inline void unpack_q8_0(const uint8_t* p, int blocks, const Scratch& s) {
  const vb flip = vb_set1(kQ8Unsigned ? 0x80 : 0);
  for (int b = 0; b < blocks; ++b) {
    load_block_halves(p, s.scale + 32 * b);
    p += 64;
    for (int i = 0; i < 16; ++i, p += kVec) {
      prefetch(p + 2048);
      vb_store(s.w + b * kBlockBytes + i * kVec, vb_xor(vb_load(p), flip));
    }
  }
}

// ---------------------------------------------------------------- integer products over an unpacked chunk

// Dots of one 32-column block (or of 16 columns of it) with T rows: d[t][g] += w . q
template <int T, int R, bool Signed, int Quads>
AUTOGLM_INLINE void block_dots(const uint8_t* w, const int8_t* const (&q)[T], int offset, vi (&d)[T][R]) {
#pragma GCC unroll 8
  for (int k = 0; k < Quads; ++k) {
    vb x[R];
#pragma GCC unroll 2
    for (int g = 0; g < R; ++g) x[g] = vb_load(w + k * kQuadBytes + g * kVec);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Quad a = quad_load(q[t] + offset + 4 * k);
#pragma GCC unroll 2
      for (int g = 0; g < R; ++g) d[t][g] = Signed ? dot4_q8(d[t][g], x[g], a) : dot4(d[t][g], x[g], a);
    }
  }
}

#define AUTOGLM_TILE(body)                  \
  _Pragma("GCC unroll 8")                   \
  for (int t = 0; t < T; ++t)               \
    _Pragma("GCC unroll 2")                 \
    for (int g = 0; g < R; ++g) { body; }

// Q4_K and Q5_K: c += scale_x * (sum_b d_b * dot_b - dmin * sum_b m_b * sum32_b)
template <int T, int R>
inline void product_k32(const Scratch& s, int half, const int8_t* qx, const ActMetaK* meta, float* c) {
  const int8_t* q[T];
  vf acc[T][R];
  for (int t = 0; t < T; ++t) q[t] = qx + t * kChunk;
  AUTOGLM_TILE(acc[t][g] = vf_zero())
  for (int b = 0; b < kBlocks; ++b) {
    vi d[T][R];
    AUTOGLM_TILE(d[t][g] = vi_zero())
    block_dots<T, R, false, 8>(s.w + b * kBlockBytes + half * kVec, q, 32 * b, d);
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
    block_dots<T, R, false, 4>(s.w + j * (kBlockBytes / 2) + half * kVec, q, 16 * j, d);
    AUTOGLM_TILE(acc[t][g] = vf_fma(vf_from_int(d[t][g]), vf_load(s.scale + 32 * j + 16 * (half + g)), acc[t][g]))
  }
  AUTOGLM_TILE({
    float* out = c + t * kPanelRows + 16 * (half + g);
    vf_store(out, vf_fma(acc[t][g], vf_set1(meta[t].scale), vf_load(out)));
  })
}

// Types with a scale per 32 columns on both sides. Offset: log2 of the constant a weight is raised by,
// or -1 for none. HasMin: Q4_1, Q5_1. c += sum_b d_b * (scale_x_b * dot_b) + m_b * scaled_sum_b
template <int T, int R, int Offset, bool HasMin, bool Signed>
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
    block_dots<T, R, Signed, 8>(s.w + b * kBlockBytes + half * kVec, q, 32 * b, d);
    AUTOGLM_TILE({
      const vf x = vf_mul(vf_from_int(d[t][g]), vf_set1(meta[t].scale[b]));
      acc[t][g] = vf_fma(x, vf_load(s.scale + 32 * b + 16 * (half + g)), acc[t][g]);
      if (HasMin)
        acc[t][g] = vf_fma(vf_set1(meta[t].scaled_sum[b]), vf_load(s.minimum + 32 * b + 16 * (half + g)), acc[t][g]);
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

// ---------------------------------------------------------------- few rows: straight from the packed bytes
//
// With one to four rows a product is bound by the reading of weights; unpacking into registers instead of
// the scratch halves its instructions. The integer sums and the order of float steps are those of the
// products above, so the results are the same bits.

// acc += scale * dot for both halves of T rows
template <int T, int R>
AUTOGLM_INLINE void add_scaled(vi (&d)[T][R], const vf (&scale)[R], vf (&acc)[T][R]) {
  AUTOGLM_TILE(acc[t][g] = vf_fma(vf_from_int(d[t][g]), scale[g], acc[t][g]))
}

template <int T, int R, bool Five, int Pair>
AUTOGLM_INLINE void direct_k32_pair(const uint8_t* p, int half, const int8_t* qx, vf (&acc)[T][R]) {
  const vb low = vb_set1(15), high = vb_set1(16);
  const uint8_t *nib = p + 640 + Pair * 1024, *plane = p + 640 + 4096;
  vi d0[T][R], d1[T][R];
  AUTOGLM_TILE(d0[t][g] = d1[t][g] = vi_zero())
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    vb x0[R], x1[R];
#pragma GCC unroll 2
    for (int g = 0; g < R; ++g) {
      const int at = k * kQuadBytes + (half + g) * kVec;
      prefetch(nib + at + 4736);
      const vb x = vb_load(nib + at);
      x0[g] = vb_and(x, low);
      x1[g] = vb_and(vb_shr<4>(x), low);
      if (Five) {
        const vb h = vb_load(plane + at);
        x0[g] = vb_or(x0[g], vb_and(high_bit_raw<2 * Pair>(h), high));
        x1[g] = vb_or(x1[g], vb_and(high_bit_raw<2 * Pair + 1>(h), high));
      }
    }
    AUTOGLM_TILE({
      d0[t][g] = dot4(d0[t][g], x0[g], quad_load(qx + t * kChunk + 64 * Pair + 4 * k));
      d1[t][g] = dot4(d1[t][g], x1[g], quad_load(qx + t * kChunk + 64 * Pair + 32 + 4 * k));
    })
  }
  vf s0[R], s1[R];
#pragma GCC unroll 2
  for (int g = 0; g < R; ++g) {
    const vf d = vf_load_f16((const uint16_t*)p + 16 * (half + g));
    s0[g] = vf_mul(d, vf_load_u8(p + 128 + 64 * Pair + 16 * (half + g)));
    s1[g] = vf_mul(d, vf_load_u8(p + 128 + 64 * Pair + 32 + 16 * (half + g)));
  }
  add_scaled<T, R>(d0, s0, acc);
  add_scaled<T, R>(d1, s1, acc);
}

template <int T, int R, bool Five>
inline void direct_k32(const uint8_t* p, int half, const int8_t* qx, const ActMetaK* meta, float* c) {
  vf acc[T][R];
  AUTOGLM_TILE(acc[t][g] = vf_zero())
  direct_k32_pair<T, R, Five, 0>(p, half, qx, acc);
  direct_k32_pair<T, R, Five, 1>(p, half, qx, acc);
  direct_k32_pair<T, R, Five, 2>(p, half, qx, acc);
  direct_k32_pair<T, R, Five, 3>(p, half, qx, acc);
  vi m[T][R];
  AUTOGLM_TILE(m[t][g] = vi_zero())
  for (int pair = 0; pair < 4; ++pair)
    AUTOGLM_TILE(m[t][g] = dot2_u8(m[t][g], p + 128 + 256 + 64 * pair + 32 * (half + g), meta[t].sum32 + 2 * pair))
  AUTOGLM_TILE({
    float* out = c + t * kPanelRows + 16 * (half + g);
    const vf dmin = vf_sub(vf_zero(), vf_load_f16((const uint16_t*)(p + 64) + 16 * (half + g)));
    const vf a = vf_fma(vf_from_int(m[t][g]), dmin, acc[t][g]);
    vf_store(out, vf_fma(a, vf_set1(meta[t].scale), vf_load(out)));
  })
}

template <int T, int R>
inline void direct_k16(const uint8_t* p, int half, const int8_t* qx, const ActMetaK* meta, float* c) {
  const vb low = vb_set1(15), high = vb_set1(48);
  vf acc[T][R], d[R];
  AUTOGLM_TILE(acc[t][g] = vf_zero())
  for (int g = 0; g < R; ++g) d[g] = vf_load_f16((const uint16_t*)p + 16 * (half + g));
  for (int h = 0; h < 2; ++h) {
    const uint8_t *n0 = p + 576 + 2048 * h, *n1 = n0 + 1024, *plane = p + 576 + 4096 + 1024 * h;
    float part[4][2][T][R][16];  // dots of blocks 4h..4h+3, two halves of 16 columns each, as scaled in order below
    for (int s = 0; s < 2; ++s) {
      vi dot[4][T][R];
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b)
        AUTOGLM_TILE(dot[b][t][g] = vi_offset<5>(meta[t].neg_sum16 + 8 * h + 2 * b + s))
#pragma GCC unroll 4
      for (int k = 4 * s; k < 4 * s + 4; ++k) {
#pragma GCC unroll 2
        for (int g = 0; g < R; ++g) {
          const int at = k * kQuadBytes + (half + g) * kVec;
          prefetch(n0 + at + 6720);
          prefetch(n1 + at + 6720);
          prefetch(plane + at + 6720);
          const vb x0 = vb_load(n0 + at), x1 = vb_load(n1 + at), y = vb_load(plane + at);
          const vb w0 = vb_or(vb_and(x0, low), vb_and(vb_shl<4>(y), high));
          const vb w1 = vb_or(vb_and(x1, low), vb_and(vb_shl<2>(y), high));
          const vb w2 = vb_or(vb_and(vb_shr<4>(x0), low), vb_and(y, high));
          const vb w3 = vb_or(vb_and(vb_shr<4>(x1), low), vb_and(vb_shr<2>(y), high));
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) {
            const int8_t* q = qx + t * kChunk + 128 * h + 4 * k;
            dot[0][t][g] = dot4(dot[0][t][g], w0, quad_load(q));
            dot[1][t][g] = dot4(dot[1][t][g], w1, quad_load(q + 32));
            dot[2][t][g] = dot4(dot[2][t][g], w2, quad_load(q + 64));
            dot[3][t][g] = dot4(dot[3][t][g], w3, quad_load(q + 96));
          }
        }
      }
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) AUTOGLM_TILE(vf_store(part[b][s][t][g], vf_from_int(dot[b][t][g])))
    }
    for (int j = 0; j < 8; ++j)
#pragma GCC unroll 2
      for (int g = 0; g < R; ++g) {
        const vf scale = vf_mul(d[g], vf_load_i8((const int8_t*)p + 64 + 32 * (8 * h + j) + 16 * (half + g)));
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) acc[t][g] = vf_fma(vf_load(part[j / 2][j % 2][t][g]), scale, acc[t][g]);
      }
  }
  AUTOGLM_TILE({
    float* out = c + t * kPanelRows + 16 * (half + g);
    vf_store(out, vf_fma(acc[t][g], vf_set1(meta[t].scale), vf_load(out)));
  })
}

template <int T, int R, int Offset, bool HasMin, bool Signed>
AUTOGLM_INLINE void add_b32(vi (&d)[T][R], const uint8_t* p, int half, int b, const ActMetaB* meta, vf (&acc)[T][R]) {
#pragma GCC unroll 2
  for (int g = 0; g < R; ++g) {
    const vf scale = vf_load_f16((const uint16_t*)p + 16 * (half + g));
    const vf minimum = HasMin ? vf_load_f16((const uint16_t*)(p + 64) + 16 * (half + g)) : vf_zero();
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      acc[t][g] = vf_fma(vf_mul(vf_from_int(d[t][g]), vf_set1(meta[t].scale[b])), scale, acc[t][g]);
      if (HasMin) acc[t][g] = vf_fma(vf_set1(meta[t].scaled_sum[b]), minimum, acc[t][g]);
    }
  }
}

template <int T, int R, bool HasPlane, int V>
AUTOGLM_INLINE void direct_nibbles(const uint8_t* p, int half, const int8_t* q, vi (&d)[T][R]) {
  const vb low = vb_set1(15);
#pragma GCC unroll 2
  for (int g = 0; g < R; ++g) {
    const int at = V * kQuadBytes + (half + g) * kVec;
    prefetch(p + at + 4096);
    const vb x = vb_load(p + at);
    vb x0 = vb_and(x, low), x1 = vb_and(vb_shr<4>(x), low);
    if (HasPlane) {
      const vb h = vb_load(p + 512 + (half + g) * kVec);
      x0 = vb_or(x0, high_bit<V>(h));
      x1 = vb_or(x1, high_bit<V + 4>(h));
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      d[t][g] = dot4(d[t][g], x0, quad_load(q + t * kChunk + 4 * V));
      d[t][g] = dot4(d[t][g], x1, quad_load(q + t * kChunk + 16 + 4 * V));
    }
  }
}

template <int T, int R, int Offset, bool HasMin, bool HasPlane>
inline void direct_b32(const uint8_t* p, int half, int blocks, const int8_t* qx, const ActMetaB* meta, float* c) {
  constexpr int header = HasMin ? 128 : 64, size = header + 512 + (HasPlane ? 128 : 0);
  vf acc[T][R];
  AUTOGLM_TILE(acc[t][g] = vf_load(c + t * kPanelRows + 16 * (half + g)))
  for (int b = 0; b < blocks; ++b, p += size) {
    vi d[T][R];
    AUTOGLM_TILE(d[t][g] = Offset >= 0 ? vi_offset<(Offset < 0 ? 0 : Offset)>(meta[t].neg_sum + b) : vi_zero())
    direct_nibbles<T, R, HasPlane, 0>(p + header, half, qx + 32 * b, d);
    direct_nibbles<T, R, HasPlane, 1>(p + header, half, qx + 32 * b, d);
    direct_nibbles<T, R, HasPlane, 2>(p + header, half, qx + 32 * b, d);
    direct_nibbles<T, R, HasPlane, 3>(p + header, half, qx + 32 * b, d);
    add_b32<T, R, Offset, HasMin, false>(d, p, half, b, meta, acc);
  }
  AUTOGLM_TILE(vf_store(c + t * kPanelRows + 16 * (half + g), acc[t][g]))
}

template <int T, int R>
inline void direct_q8(const uint8_t* p, int half, int blocks, const int8_t* qx, const ActMetaB* meta, float* c) {
  const vb flip = vb_set1(kQ8Unsigned ? 0x80 : 0);
  vf acc[T][R];
  AUTOGLM_TILE(acc[t][g] = vf_load(c + t * kPanelRows + 16 * (half + g)))
  for (int b = 0; b < blocks; ++b, p += 1088) {
    vi d[T][R];
    AUTOGLM_TILE(d[t][g] = kQ8Unsigned ? vi_offset<7>(meta[t].neg_sum + b) : vi_zero())
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k)
#pragma GCC unroll 2
      for (int g = 0; g < R; ++g) {
        const uint8_t* at = p + 64 + k * kQuadBytes + (half + g) * kVec;
        prefetch(at + 4352);
        const vb x = vb_xor(vb_load(at), flip);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const Quad a = quad_load(qx + t * kChunk + 32 * b + 4 * k);
          d[t][g] = kQ8Unsigned ? dot4(d[t][g], x, a) : dot4_q8(d[t][g], x, a);
        }
      }
    add_b32<T, R, 0, false, false>(d, p, half, b, meta, acc);
  }
  AUTOGLM_TILE(vf_store(c + t * kPanelRows + 16 * (half + g), acc[t][g]))
}

#define AUTOGLM_HALVES for (int half = 0; half < 2; half += kTileR)

template <int T>
void direct_chunk(QuantType type, const uint8_t* p, int blocks, const int8_t* q, const void* meta, float* c) {
  const ActMetaK* mk = (const ActMetaK*)meta;
  const ActMetaB* mb = (const ActMetaB*)meta;
  AUTOGLM_HALVES switch (type) {
    case QuantType::Q4_K: direct_k32<T, kTileR, false>(p, half, q, mk, c); break;
    case QuantType::Q5_K: direct_k32<T, kTileR, true>(p, half, q, mk, c); break;
    case QuantType::Q6_K: direct_k16<T, kTileR>(p, half, q, mk, c); break;
    case QuantType::Q4_0: direct_b32<T, kTileR, 3, false, false>(p, half, blocks, q, mb, c); break;
    case QuantType::Q4_1: direct_b32<T, kTileR, -1, true, false>(p, half, blocks, q, mb, c); break;
    case QuantType::Q5_0: direct_b32<T, kTileR, 4, false, true>(p, half, blocks, q, mb, c); break;
    case QuantType::Q5_1: direct_b32<T, kTileR, -1, true, true>(p, half, blocks, q, mb, c); break;
    default: direct_q8<T, kTileR>(p, half, blocks, q, mb, c);
  }
}

// Calls f.run<T>(first row) over tiles of at most kTileT rows, as even as possible.
template <class F>
inline void for_tiles(int rows, const F& f) {
  const int tiles = (rows + kTileT - 1) / kTileT;
  for (int i = 0, t0 = 0; i < tiles; ++i) {
    const int n = (rows - t0) / (tiles - i) + ((rows - t0) % (tiles - i) != 0);
    switch (n) {
      case 1: f.template run<1>(t0); break;
      case 2: f.template run<2>(t0); break;
#define AUTOGLM_CASE(N) case N: f.template run<(kTileT >= N ? N : 1)>(t0); break;
      AUTOGLM_CASE(3) AUTOGLM_CASE(4) AUTOGLM_CASE(5) AUTOGLM_CASE(6)
#undef AUTOGLM_CASE
    }
    t0 += n;
  }
}

struct RunK32 {
  const Scratch& s; const int8_t* q; const ActMetaK* meta; float* c;
  template <int T> void run(int t0) const {
    AUTOGLM_HALVES product_k32<T, kTileR>(s, half, q + t0 * kChunk, meta + t0, c + t0 * kPanelRows);
  }
};
struct RunK16 {
  const Scratch& s; const int8_t* q; const ActMetaK* meta; float* c;
  template <int T> void run(int t0) const {
    AUTOGLM_HALVES product_k16<T, kTileR>(s, half, q + t0 * kChunk, meta + t0, c + t0 * kPanelRows);
  }
};
template <int Offset, bool HasMin, bool Signed>
struct RunB32 {
  const Scratch& s; int blocks; const int8_t* q; const ActMetaB* meta; float* c;
  template <int T> void run(int t0) const {
    AUTOGLM_HALVES product_b32<T, kTileR, Offset, HasMin, Signed>(s, half, blocks, q + t0 * kChunk, meta + t0,
                                                                 c + t0 * kPanelRows);
  }
};
struct RunFloat {
  const float* w; int cols; const float* x; int stride; float* c;
  template <int T> void run(int t0) const {
    AUTOGLM_HALVES product_float<T, kTileR>(w, half, cols, x + (size_t)t0 * stride, stride, c + t0 * kPanelRows);
  }
};

void gemm_float(const PackedMatrix& w, const uint8_t* p, const ActView& x, int row_begin, int rows, float* c,
                float* unpacked) {
  for (int k0 = 0; k0 < w.cols; k0 += 64) {
    const int cols = w.cols - k0 < 64 ? w.cols - k0 : 64;
    const float* weights = unpacked;
    if (w.type == QuantType::F32) {
      weights = (const float*)p + (size_t)k0 * kPanelRows;
    } else {
      const uint16_t* src = (const uint16_t*)p + (size_t)k0 * kPanelRows;
      for (int i = 0; i < 2 * cols; ++i) {
        prefetch(src + 16 * i + 1024);
        vf_store(unpacked + 16 * i, w.type == QuantType::F16 ? vf_load_f16(src + 16 * i) : vf_load_bf16(src + 16 * i));
      }
    }
    for_tiles(rows, RunFloat{weights, cols, x.f32 + (size_t)row_begin * x.stride + k0, x.stride, c});
  }
}

// Q6_K works on four blocks at once: beyond two rows its sums spill (measured 107 against 124 GOPS at four rows).
int direct_rows(QuantType t) { return t == QuantType::Q6_K && kDirectRows > 2 ? 2 : kDirectRows; }

bool block_elements_256(QuantType t) { return t == QuantType::Q4_K || t == QuantType::Q5_K || t == QuantType::Q6_K; }

size_t chunk_bytes(QuantType type, int blocks) {
  switch (type) {
    case QuantType::Q4_K: return 640 + 4096;
    case QuantType::Q5_K: return 640 + 4096 + 1024;
    case QuantType::Q6_K: return 576 + 4096 + 2048;
    case QuantType::Q4_0: return (size_t)blocks * 576;
    case QuantType::Q4_1: return (size_t)blocks * 640;
    case QuantType::Q5_0: return (size_t)blocks * 704;
    case QuantType::Q5_1: return (size_t)blocks * 768;
    default: return (size_t)blocks * 1088;
  }
}

void gemm_panel(const PackedMatrix& w, int panel, const ActView& x, int row_begin, int rows, float* c,
                uint8_t* scratch) {
  const uint8_t* p = w.data + (size_t)panel * w.panel_bytes;
  memset(c, 0, sizeof(float) * (size_t)rows * kPanelRows);
  if (w.type == QuantType::F32 || w.type == QuantType::F16 || w.type == QuantType::BF16)
    return gemm_float(w, p, x, row_begin, rows, c, (float*)scratch);
  const Scratch s = carve(scratch);
  for (int chunk = 0; chunk < w.chunks; ++chunk) {
    const int left = (w.cols - chunk * kChunk) / 32, blocks = left < kBlocks ? left : kBlocks;
    const size_t at = (size_t)chunk * x.capacity + row_begin;
    if (rows <= direct_rows(w.type)) {
      const bool k = block_elements_256(w.type);
      const int8_t* q = (k ? x.qk : x.qb) + at * kChunk;
      const void* meta = k ? (const void*)(x.meta_k + at) : (const void*)(x.meta_b + at);
      switch (rows) {
        case 1: direct_chunk<1>(w.type, p, blocks, q, meta, c); break;
#define AUTOGLM_CASE(N) case N: direct_chunk<(kDirectRows >= N ? N : 1)>(w.type, p, blocks, q, meta, c); break;
        AUTOGLM_CASE(2) AUTOGLM_CASE(3) AUTOGLM_CASE(4)
#undef AUTOGLM_CASE
      }
      p += chunk_bytes(w.type, blocks);
      continue;
    }
    switch (w.type) {
      case QuantType::Q4_K:
        unpack_q4_k(p, s);
        for_tiles(rows, RunK32{s, x.qk + at * kChunk, x.meta_k + at, c});
        break;
      case QuantType::Q5_K:
        unpack_q5_k(p, s);
        for_tiles(rows, RunK32{s, x.qk + at * kChunk, x.meta_k + at, c});
        break;
      case QuantType::Q6_K:
        unpack_q6_k(p, s);
        for_tiles(rows, RunK16{s, x.qk + at * kChunk, x.meta_k + at, c});
        break;
      case QuantType::Q4_0:
        unpack_b32<false, false>(p, blocks, s);
        for_tiles(rows, RunB32<3, false, false>{s, blocks, x.qb + at * kChunk, x.meta_b + at, c});
        break;
      case QuantType::Q4_1:
        unpack_b32<true, false>(p, blocks, s);
        for_tiles(rows, RunB32<-1, true, false>{s, blocks, x.qb + at * kChunk, x.meta_b + at, c});
        break;
      case QuantType::Q5_0:
        unpack_b32<false, true>(p, blocks, s);
        for_tiles(rows, RunB32<4, false, false>{s, blocks, x.qb + at * kChunk, x.meta_b + at, c});
        break;
      case QuantType::Q5_1:
        unpack_b32<true, true>(p, blocks, s);
        for_tiles(rows, RunB32<-1, true, false>{s, blocks, x.qb + at * kChunk, x.meta_b + at, c});
        break;
      default:
        unpack_q8_0(p, blocks, s);
        for_tiles(rows, RunB32<(kQ8Unsigned ? 7 : -1), false, !kQ8Unsigned>{s, blocks, x.qb + at * kChunk,
                                                                           x.meta_b + at, c});
    }
    p += chunk_bytes(w.type, blocks);
  }
}

// ---------------------------------------------------------------- activations

inline vf load_tail(const float* p, int n) {
  float x[16] = {};
  memcpy(x, p, sizeof(float) * (size_t)n);
  return vf_load(x);
}

// The largest magnitude of n floats, n a multiple of 16; NaN if one of them is NaN or infinite.
inline float max_abs(const float* x, int n) {
  vf m = vf_zero(), bad = vf_zero();
  for (int i = 0; i < n; i += 16) {
    const vf v = vf_load(x + i);
    m = vf_max(vf_abs(v), m);
    bad = vf_fma(v, vf_zero(), bad);
  }
  return vf_reduce_max(m) + vf_reduce_add(bad);
}

// q = round(x * 127 / max|x|); returns the scale. n a multiple of 16; sums[i] of each 16.
// A span that is not finite becomes zeros with the scale NaN, so that the row's results are NaN and seen.
inline float quantize_span(const float* x, int n, int8_t* q, int32_t* sum16) {
  const float top = max_abs(x, n);
  if (!(top > 0)) {
    memset(q, 0, (size_t)n);
    for (int i = 0; i < n; i += 16) sum16[i / 16] = 0;
    return top;
  }
  const vf inv = vf_set1(127.0f / top);
  for (int i = 0; i < n; i += 16) {
    const vi r = vi_round(vf_mul(vf_load(x + i), inv));
    vi_store_i8(q + i, r);
    sum16[i / 16] = vi_sum(r);
  }
  return top / 127.0f;
}

void quantize_chunk_k(const float* x, int n, int8_t* q, ActMetaK* meta) {
  int32_t sum16[16] = {};
  memset(q, 0, kChunk);
  meta->scale = quantize_span(x, n, q, sum16);
  for (int j = 0; j < 8; ++j) meta->sum32[j] = (int16_t)(sum16[2 * j] + sum16[2 * j + 1]);
  for (int j = 0; j < 16; ++j) meta->neg_sum16[j] = -sum16[j];
}

void quantize_chunk_b(const float* x, int n, int8_t* q, ActMetaB* meta) {
  memset(q, 0, kChunk);
  memset(meta, 0, sizeof(*meta));
  for (int b = 0; 32 * b < n; ++b) {
    int32_t sum16[2];
    meta->scale[b] = quantize_span(x + 32 * b, 32, q + 32 * b, sum16);
    meta->neg_sum[b] = -(sum16[0] + sum16[1]);
    meta->scaled_sum[b] = meta->scale[b] * (float)(sum16[0] + sum16[1]);
  }
}

void quantize_chunk(const float* src, int chunk, const ActView& out, int row) {
  const int k0 = chunk * kChunk, n = out.width - k0 < kChunk ? out.width - k0 : kChunk;
  const size_t at = (size_t)chunk * out.capacity + row;
  if (out.f32) {
    float* dst = out.f32 + (size_t)row * out.stride + k0;
    if (dst != src) memcpy(dst, src, sizeof(float) * (size_t)n);
  }
  if (out.qk) quantize_chunk_k(src, n, out.qk + at * kChunk, out.meta_k + at);
  if (out.qb) quantize_chunk_b(src, n, out.qb + at * kChunk, out.meta_b + at);
}

void rms_norm(const float* src, const float* weight, float eps, int n, float* dst) {
  vf sum[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
  int i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; ++j) {
      const vf x = vf_load(src + i + 16 * j);
      sum[j] = vf_fma(x, x, sum[j]);
    }
  for (; i < n; i += 16) {
    const vf x = n - i >= 16 ? vf_load(src + i) : load_tail(src + i, n - i);
    sum[0] = vf_fma(x, x, sum[0]);
  }
  const float total = vf_reduce_add(vf_add(vf_add(sum[0], sum[1]), vf_add(sum[2], sum[3])));
  const float scale = 1.0f / sqrtf(total / (float)n + eps);
  const vf k = vf_set1(scale);
  for (i = 0; i + 16 <= n; i += 16) vf_store(dst + i, vf_mul(vf_mul(vf_load(src + i), k), vf_load(weight + i)));
  for (; i < n; ++i) dst[i] = src[i] * scale * weight[i];
}

void add(float* dst, const float* src, int n) {
  int i = 0;
  for (; i + 16 <= n; i += 16) vf_store(dst + i, vf_add(vf_load(dst + i), vf_load(src + i)));
  for (; i < n; ++i) dst[i] += src[i];
}

// exp by 2^n * p(r), |r| <= ln2/2; degree-6 polynomial with Cephes' coefficients, relative error under 2e-7.
inline vf vf_exp(vf x) {
  x = vf_max(vf_min(x, vf_set1(88.0f)), vf_set1(-87.0f));
  const vi n = vi_round(vf_mul(x, vf_set1(1.44269504f)));
  const vf fn = vf_from_int(n);
  vf r = vf_fma(fn, vf_set1(-0.693359375f), x);
  r = vf_fma(fn, vf_set1(2.12194440e-4f), r);
  vf p = vf_set1(1.9875691500e-4f);
  p = vf_fma(p, r, vf_set1(1.3981999507e-3f));
  p = vf_fma(p, r, vf_set1(8.3334519073e-3f));
  p = vf_fma(p, r, vf_set1(4.1665795894e-2f));
  p = vf_fma(p, r, vf_set1(1.6666665459e-1f));
  p = vf_fma(p, r, vf_set1(5.0000001201e-1f));
  p = vf_fma(p, vf_mul(r, r), vf_add(r, vf_set1(1.0f)));
  return vf_scale2(p, n);
}

void silu_mul(const float* gate, const float* up, int n, float* dst) {
  const vf one = vf_set1(1.0f);
  for (int i = 0; i < n; i += 16) {
    const vf g = vf_load(gate + i);
    const vf e = vf_exp(vf_sub(vf_zero(), g));
    vf_store(dst + i, vf_mul(vf_div(g, vf_add(one, e)), vf_load(up + i)));
  }
}

int argmax(const float* x, int n) {
  vf top = vf_set1(-INFINITY), bad = vf_zero();
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const vf v = vf_load(x + i);
    top = vf_max(v, top);
    bad = vf_fma(v, vf_zero(), bad);  // NaN once a NaN or infinity is seen
  }
  float best = vf_reduce_max(top), nan = vf_reduce_add(bad);
  for (; i < n; ++i) {
    best = x[i] > best ? x[i] : best;
    nan += x[i] * 0.0f;
  }
  if (nan != nan) return -1;
  for (i = 0; i < n; ++i)
    if (x[i] == best) return i;
  return -1;
}

// ---------------------------------------------------------------- KV cache and attention

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

const KernelTable kTable = {kIsaName, gemm_panel, quantize_chunk, rms_norm, add, silu_mul, kv_write, attention, argmax};

}  // namespace
