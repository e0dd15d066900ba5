// Packed chunk -> unpacked chunk: one function a storage form.
//
// The unpacked form lives in a 12 KB scratch in L1: unsigned bytes [block 8][quad 8][half 2][64] (a vector is
// 16 rows x 4 columns), float scales, minimums. Unpacking differs by weight type; the products over the
// unpacked form (gemm_products.h) are a few templates shared by all types.
#pragma once

namespace {

constexpr int kVec = 64;                      // bytes of a weight vector
constexpr int kQuadBytes = 2 * kVec;          // both halves of a panel, one quad of columns
constexpr int kBlockBytes = 8 * kQuadBytes;   // an unpacked 32-column block

// The packed bytes that come next, asked for in as many shares as the products of a chunk have places for it: where the
// products take long, all at once would keep a core waiting (8 rows of Q4_K: 11 GB/s on one core of Zen 5, in shares
// 16, in shares that also run further ahead 20). Between two of those places are others, where lines go into the second
// cache: it is fed a few at a time (Zen 4, three rows of Q6_K: 31 GB/s, in four shares 24).
struct Ahead {
  const uint8_t *next, *end;
  int lines;  // each time
  AUTOGLM_INLINE void ask() {
    for (int i = 0; i < lines && next < end; ++i, next += 64) ask_line(next);
  }
  AUTOGLM_INLINE void ask_between() {
    if (!fills_first_cache) ask();
  }
};

struct Scratch {
  uint8_t* w;      // [8][8][2][64]
  float* scale;    // [16][32]: per 32 columns, or per 16 for Q6_K
  float* minimum;  // [8][32]; K-quants use row 0 for -dmin
  int16_t* m16;    // [4][32][2]: 6-bit minimums of block pairs
  Ahead* ahead;
};

inline Scratch carve(uint8_t* p, Ahead* ahead) {
  return {p, (float*)(p + 8192), (float*)(p + 8192 + 2048), (int16_t*)(p + 8192 + 2048 + 2048), ahead};
}

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
    const vb x = vb_load(p + i * kVec), h = vb_load(plane + i * kVec);
    vb_store(w + i * kVec, vb_or(vb_and(x, low), vb_and(high_bit_raw<2 * Pair>(h), high)));
    vb_store(w + kBlockBytes + i * kVec, vb_or(vb_and(vb_shr<4>(x), low), vb_and(high_bit_raw<2 * Pair + 1>(h), high)));
  }
}

inline void unpack_q5_k(const uint8_t* p, const Scratch& s) {
  p = unpack_k_scales(p, s);
  const uint8_t* plane = p;
  p += 1024;
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
  const uint8_t* columns = p + 64 + 512;
  const vb low = vb_set1(15), high = vb_set1(48);
  for (int h = 0; h < 2; ++h) {
    uint8_t* w = s.w + 4 * h * kBlockBytes;
    for (int i = 0; i < 16; ++i) {  // blocks 4h..4h+3: nibbles (x0 low, x1 low, x0 high, x1 high), 2 bits each of y
      const uint8_t* at = columns + h * 3072 + i / 2 * 3 * kQuadBytes + i % 2 * kVec;
      const vb x0 = vb_load(at), x1 = vb_load(at + kQuadBytes), y = vb_load(at + 2 * kQuadBytes);
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
    const uint8_t* plane = p;
    if (HasPlane) p += 128;
    for (int i = 0; i < 8; ++i) {
      const vb x = vb_load(p + i * kVec);
      vb_store(w + i * kVec, vb_and(x, low));
      vb_store(w + 4 * kQuadBytes + i * kVec, vb_and(vb_shr<4>(x), low));
    }
    p += 512;
    if (HasPlane) {
      for (int g = 0; g < 2; ++g) {
        const vb h = vb_load(plane + g * kVec);
        uint8_t* o = w + g * kVec;
#define AUTOGLM_HIGH(Q) vb_store(o + Q * kQuadBytes, vb_or(vb_load(o + Q * kQuadBytes), high_bit<Q>(h)));
        AUTOGLM_HIGH(0) AUTOGLM_HIGH(1) AUTOGLM_HIGH(2) AUTOGLM_HIGH(3)
        AUTOGLM_HIGH(4) AUTOGLM_HIGH(5) AUTOGLM_HIGH(6) AUTOGLM_HIGH(7)
#undef AUTOGLM_HIGH
      }
    }
  }
}

inline void unpack_q8_0(const uint8_t* p, int blocks, const Scratch& s) {
  const vb flip = vb_set1(kQ8Unsigned ? 0x80 : 0);
  for (int b = 0; b < blocks; ++b) {
    load_block_halves(p, s.scale + 32 * b);
    p += 64;
    for (int i = 0; i < 16; ++i, p += kVec) {
      vb_store(s.w + b * kBlockBytes + i * kVec, vb_xor(vb_load(p), flip));
    }
  }
}

}  // namespace
