// Sixteen lanes as plain loops: the portable vocabulary of kernels_impl.h, which compilers vectorize.
#include <cmath>

namespace {

struct vf { float v[16]; };
struct vi { int32_t v[16]; };
struct vb { uint8_t v[64]; };

constexpr int kTileT = 2;
constexpr int kTileR = 1;
constexpr int kDirectRows = 1;  // up to here weights go from memory to registers to products
constexpr int kTiledRows = 1;
constexpr int kPairRows = 0;
constexpr int kQ8Asks = 1;      // rows of Q8_0 from which on what comes next is asked for
constexpr int kUnaskedRows = 0;  // rows that a core which reads ahead by itself needs not be asked for
constexpr int kScoreRows = 2;   // query rows whose scores against two blocks of keys are summed together
constexpr int kValueVectors = 1;  // of 16 dims, for four rows: what the registers hold
constexpr bool kFullBytes = true;  // dot4 takes weights up to 255
constexpr bool kNarrowSums = false;  // dot4 sums in 32 bits as fast
constexpr bool kQ8Unsigned = false;
constexpr const char* kIsaName = "scalar";

#define LANES for (int i = 0; i < 16; ++i)
#define BYTES for (int i = 0; i < 64; ++i)

inline float fma1(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  // a * b is exact in double; without an FMA unit fmaf is a slow library call
  return (float)((double)a * (double)b + (double)c);
#endif
}
inline float half_to_float(uint16_t h) {
#if defined(__aarch64__)
  __fp16 x;
  __builtin_memcpy(&x, &h, 2);
  return (float)x;
#else
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, em = h & 0x7fff;
  uint32_t bits;
  if (em >= 0x7c00) bits = sign | 0x7f800000 | ((em & 0x3ff) << 13);
  else if (em >= 0x400) bits = sign | ((em << 13) + (112u << 23));
  else {  // subnormal: em * 2^-24
    const float x = (float)em * 5.9604644775390625e-08f;
    return sign ? -x : x;
  }
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
#endif
}
inline uint16_t float_to_half(float f) {
  uint32_t x;
  __builtin_memcpy(&x, &f, 4);
  const uint32_t sign = (x >> 16) & 0x8000, a = x & 0x7fffffff;
  if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (a < 0x38800000) {  // subnormal half: add 0.5 so that the FPU rounds at the right bit
    float y;
    const uint32_t magic = 0x3f000000;
    float half;
    __builtin_memcpy(&half, &magic, 4);
    __builtin_memcpy(&y, &a, 4);
    y += half;
    uint32_t r;
    __builtin_memcpy(&r, &y, 4);
    return (uint16_t)(sign | (r - magic));
  }
  const uint32_t r = a - (112u << 23) + 0xfff + ((a >> 13) & 1);
  return (uint16_t)(sign | (r >> 13));
}

inline vf vf_zero() { vf r; LANES r.v[i] = 0; return r; }
inline vf vf_set1(float x) { vf r; LANES r.v[i] = x; return r; }
inline vf vf_load(const float* p) { vf r; LANES r.v[i] = p[i]; return r; }
inline void vf_store(float* p, vf x) { LANES p[i] = x.v[i]; }
inline vf vf_add(vf a, vf b) { LANES a.v[i] += b.v[i]; return a; }
inline vf vf_sub(vf a, vf b) { LANES a.v[i] -= b.v[i]; return a; }
inline vf vf_mul(vf a, vf b) { LANES a.v[i] *= b.v[i]; return a; }
inline vf vf_div(vf a, vf b) { LANES a.v[i] /= b.v[i]; return a; }
inline vf vf_fma(vf a, vf b, vf c) { LANES c.v[i] = fma1(a.v[i], b.v[i], c.v[i]); return c; }
inline vf vf_max(vf a, vf b) { LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
inline vf vf_min(vf a, vf b) { LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
inline vf vf_abs(vf a) { LANES a.v[i] = __builtin_fabsf(a.v[i]); return a; }
inline vf vf_load_f16(const uint16_t* p) { vf r; LANES r.v[i] = half_to_float(p[i]); return r; }
inline void vf_store_f16(uint16_t* p, vf x) { LANES p[i] = float_to_half(x.v[i]); }
inline vf vf_load_bf16(const uint16_t* p) {
  vf r;
  LANES { const uint32_t x = (uint32_t)p[i] << 16; __builtin_memcpy(&r.v[i], &x, 4); }
  return r;
}
inline vf vf_load_u8(const uint8_t* p) { vf r; LANES r.v[i] = (float)p[i]; return r; }
inline vf vf_load_i8(const int8_t* p) { vf r; LANES r.v[i] = (float)p[i]; return r; }
inline vf vf_from_int(vi a) { vf r; LANES r.v[i] = (float)a.v[i]; return r; }
inline vi vi_round(vf a) { vi r; LANES r.v[i] = (int32_t)__builtin_rintf(a.v[i]); return r; }
inline vf vf_scale2(vf a, vi n) {
  LANES { const uint32_t x = (uint32_t)(n.v[i] + 127) << 23; float s; __builtin_memcpy(&s, &x, 4); a.v[i] *= s; }
  return a;
}
inline vi vi_add(vi a, vi b) { LANES a.v[i] += b.v[i]; return a; }
inline vi vi_zero() { vi r; LANES r.v[i] = 0; return r; }
inline void vi_store_i8(int8_t* p, vi a) {
  LANES p[i] = (int8_t)(a.v[i] > 127 ? 127 : a.v[i] < -128 ? -128 : a.v[i]);
}
template <int Step>
inline vf vf_swap(vf a) { vf r; LANES r.v[i] = a.v[i ^ Step]; return r; }
template <int Step>  // lanes i with bit Step of b, the others of a
inline vf vf_take(vf a, vf b) { vf r; LANES r.v[i] = i & Step ? b.v[i] : a.v[i]; return r; }
inline void vi_store_pairs(int16_t* p, vi low, vi high) { LANES { p[2 * i] = (int16_t)low.v[i]; p[2 * i + 1] = (int16_t)high.v[i]; } }
inline void vi_store_i16(int16_t* p, vi a) {
  LANES p[i] = (int16_t)(a.v[i] > 32767 ? 32767 : a.v[i] < -32768 ? -32768 : a.v[i]);
}
inline int vi_sum(vi a) { int s = 0; LANES s += a.v[i]; return s; }
template <int Log2>
inline vi vi_offset(const int32_t* neg_sum) { vi r; LANES r.v[i] = *neg_sum * (1 << Log2); return r; }

inline vb vb_load(const uint8_t* p) { vb r; __builtin_memcpy(r.v, p, 64); return r; }
inline void vb_store(uint8_t* p, vb a) { __builtin_memcpy(p, a.v, 64); }
inline vb vb_set1(uint8_t x) { vb r; BYTES r.v[i] = x; return r; }
inline vb vb_and(vb a, vb b) { BYTES a.v[i] &= b.v[i]; return a; }
inline vb vb_or(vb a, vb b) { BYTES a.v[i] |= b.v[i]; return a; }
inline vb vb_xor(vb a, vb b) { BYTES a.v[i] ^= b.v[i]; return a; }
template <int N> inline vb vb_shr(vb a) { BYTES a.v[i] = (uint8_t)(a.v[i] >> N); return a; }
template <int N> inline vb vb_shl(vb a) { BYTES a.v[i] = (uint8_t)(a.v[i] << N); return a; }

struct Quad { int8_t v[4]; };
inline Quad quad_load(const int8_t* p, int k) { Quad q; __builtin_memcpy(q.v, p + 4 * k, 4); return q; }
inline vi dot4(vi acc, vb w, Quad a) {
  LANES {
    const uint8_t* x = w.v + 4 * i;
    acc.v[i] += x[0] * a.v[0] + x[1] * a.v[1] + x[2] * a.v[2] + x[3] * a.v[3];
  }
  return acc;
}
inline vi dot4_q8(vi acc, vb w, Quad a) {
  LANES {
    const int8_t* x = (const int8_t*)w.v + 4 * i;
    acc.v[i] += x[0] * a.v[0] + x[1] * a.v[1] + x[2] * a.v[2] + x[3] * a.v[3];
  }
  return acc;
}
inline vi dot2(vi acc, vb w, Quad a) {
  int16_t x[32], y[2];
  __builtin_memcpy(x, w.v, 64);
  __builtin_memcpy(y, a.v, 4);
  LANES acc.v[i] += x[2 * i] * y[0] + x[2 * i + 1] * y[1];
  return acc;
}
inline vi dot2(vi acc, const int16_t* m, const int16_t* s) {
  LANES acc.v[i] += m[2 * i] * s[0] + m[2 * i + 1] * s[1];
  return acc;
}
inline vi dot2_u8(vi acc, const uint8_t* m, const int16_t* s) {
  LANES acc.v[i] += m[2 * i] * s[0] + m[2 * i + 1] * s[1];
  return acc;
}
inline void widen_u8(int16_t* dst, const uint8_t* src) { for (int i = 0; i < 32; ++i) dst[i] = src[i]; }
inline float vf_reduce_add(vf a) {  // the order of simd_avx512.h
  float x[8];
  for (int i = 0; i < 8; ++i) x[i] = a.v[i] + a.v[i + 8];
  for (int i = 0; i < 4; ++i) x[i] += x[i + 4];
  return (x[0] + x[2]) + (x[1] + x[3]);
}
inline float vf_reduce_max(vf a) {
  float m = a.v[0];
  for (int i = 1; i < 16; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void prefetch_second(const void* p) { __builtin_prefetch(p, 0, 2); }
constexpr int kPeakChains = 2;  // of peaks.h: latency times products a cycle, as far as registers go
inline void opaque(vb& x) { asm volatile("" : "+m"(x)); }  // the compiler knows nothing of x from here on
inline void opaque(vf& x) { asm volatile("" : "+m"(x)); }

#undef LANES
#undef BYTES

}  // namespace
