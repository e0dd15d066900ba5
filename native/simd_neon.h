// Sixteen lanes on ARM's NEON with its dot products (ARMv8.2): the vocabulary of kernels_impl.h.
#include <arm_neon.h>

namespace {

struct vf { float32x4_t a, b, c, d; };  // 16 floats
struct vi { int32x4_t a, b, c, d; };    // 16 int32
struct vb { uint8x16_t a, b, c, d; };   // 64 bytes

constexpr int kTileT = 5;        // 20 int accumulators + 4 weights + 5 of the rows' quads of 32 registers; floats come once a block
constexpr int kTileR = 1;
constexpr int kDirectRows = 4;   // up to here weights go from memory to registers to products
constexpr int kTiledRows = 4;    // the same of Q4_K in tiles, where it is the second cache that is asked
constexpr int kPairRows = 1;     // up to here both halves of a panel go at once
constexpr int kQ8Asks = 1;       // rows of Q8_0 from which on what comes next is asked for
constexpr int kUnaskedRows = 2;  // rows that a core which reads ahead by itself needs not be asked for
constexpr int kScoreRows = 1;    // query rows whose scores against two blocks of keys are summed together
constexpr int kValueVectors = 1;  // of 16 dims, for four rows: what the registers hold
constexpr bool kFullBytes = false;   // a dot product takes two signed operands: weights up to 127
constexpr bool kNarrowSums = false;  // dot4 sums in 32 bits as fast
constexpr bool kQ8Unsigned = false;
constexpr int kPeakChains = 4;  // of peaks.h: latency times products a cycle, as far as registers go
constexpr const char* kIsaName = "neon-dotprod";

#define AUTOGLM_ONE(f, x) {f((x).a), f((x).b), f((x).c), f((x).d)}
#define AUTOGLM_TWO(f, x, y) {f((x).a, (y).a), f((x).b, (y).b), f((x).c, (y).c), f((x).d, (y).d)}
#define AUTOGLM_SAME(x) {x, x, x, x}

inline vf vf_set1(float x) { return AUTOGLM_SAME(vdupq_n_f32(x)); }
inline vf vf_zero() { return vf_set1(0); }
inline vf vf_load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
inline void vf_store(float* p, vf x) {
  vst1q_f32(p, x.a);
  vst1q_f32(p + 4, x.b);
  vst1q_f32(p + 8, x.c);
  vst1q_f32(p + 12, x.d);
}
inline vf vf_add(vf x, vf y) { return AUTOGLM_TWO(vaddq_f32, x, y); }
inline vf vf_sub(vf x, vf y) { return AUTOGLM_TWO(vsubq_f32, x, y); }
inline vf vf_mul(vf x, vf y) { return AUTOGLM_TWO(vmulq_f32, x, y); }
inline vf vf_div(vf x, vf y) { return AUTOGLM_TWO(vdivq_f32, x, y); }
inline vf vf_fma(vf x, vf y, vf z) {
  return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
}
// The second operand if one is not a number, as on the other instruction sets.
inline float32x4_t larger(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
inline float32x4_t smaller(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
inline vf vf_max(vf x, vf y) { return AUTOGLM_TWO(larger, x, y); }
inline vf vf_min(vf x, vf y) { return AUTOGLM_TWO(smaller, x, y); }
inline vf vf_abs(vf x) { return AUTOGLM_ONE(vabsq_f32, x); }
inline float32x4_t f16_to_f32(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline vf vf_load_f16(const uint16_t* p) { return {f16_to_f32(p), f16_to_f32(p + 4), f16_to_f32(p + 8), f16_to_f32(p + 12)}; }
inline void f32_to_f16(uint16_t* p, float32x4_t x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
inline void vf_store_f16(uint16_t* p, vf x) {
  f32_to_f16(p, x.a);
  f32_to_f16(p + 4, x.b);
  f32_to_f16(p + 8, x.c);
  f32_to_f16(p + 12, x.d);
}
inline float32x4_t bf16_to_f32(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline vf vf_load_bf16(const uint16_t* p) {
  return {bf16_to_f32(p), bf16_to_f32(p + 4), bf16_to_f32(p + 8), bf16_to_f32(p + 12)};
}
inline vf vf_from_int(vi x) { return AUTOGLM_ONE(vcvtq_f32_s32, x); }
inline vi widen_i16(int16x8_t low, int16x8_t high) {
  return {vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)};
}
inline vf vf_load_u8(const uint8_t* p) {
  const uint8x16_t x = vld1q_u8(p);
  return vf_from_int(widen_i16(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(x))), vreinterpretq_s16_u16(vmovl_high_u8(x))));
}
inline vf vf_load_i8(const int8_t* p) {
  const int8x16_t x = vld1q_s8(p);
  return vf_from_int(widen_i16(vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x)));
}
inline vi vi_round(vf x) { return AUTOGLM_ONE(vcvtnq_s32_f32, x); }  // to nearest, ties to even
inline float32x4_t pow2(int32x4_t n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }
inline vf vf_scale2(vf x, vi n) {  // x * 2^n, n in -126..127
  const vf power = AUTOGLM_ONE(pow2, n);
  return vf_mul(x, power);
}
inline vi vi_add(vi x, vi y) { return AUTOGLM_TWO(vaddq_s32, x, y); }
inline vi vi_zero() { return AUTOGLM_SAME(vdupq_n_s32(0)); }
inline int16x8_t narrow_i32(int32x4_t low, int32x4_t high) { return vcombine_s16(vqmovn_s32(low), vqmovn_s32(high)); }
inline void vi_store_i8(int8_t* p, vi x) {
  vst1q_s8(p, vcombine_s8(vqmovn_s16(narrow_i32(x.a, x.b)), vqmovn_s16(narrow_i32(x.c, x.d))));
}
inline void vi_store_i16(int16_t* p, vi x) {
  vst1q_s16(p, narrow_i32(x.a, x.b));
  vst1q_s16(p + 8, narrow_i32(x.c, x.d));
}
inline int16x8_t pairs16(int32x4_t low, int32x4_t high) {
  return vtrn1q_s16(vreinterpretq_s16_s32(low), vreinterpretq_s16_s32(high));
}
inline void vi_store_pairs(int16_t* p, vi low, vi high) {  // p[2 i] = low[i], p[2 i + 1] = high[i]
  vst1q_s16(p, pairs16(low.a, high.a));
  vst1q_s16(p + 8, pairs16(low.b, high.b));
  vst1q_s16(p + 16, pairs16(low.c, high.c));
  vst1q_s16(p + 24, pairs16(low.d, high.d));
}
inline int vi_sum(vi x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.a, x.b), vaddq_s32(x.c, x.d))); }
template <int Log2>  // (-sum) * offset, offset a power of two, in all lanes
inline vi vi_offset(const int32_t* neg_sum) { return AUTOGLM_SAME(vdupq_n_s32(*neg_sum * (1 << Log2))); }

inline float32x4_t swap2(float32x4_t x) { return vextq_f32(x, x, 2); }
template <int Step>  // lanes i and i ^ Step change places
inline vf vf_swap(vf x) {
  switch (Step) {
    case 1: return AUTOGLM_ONE(vrev64q_f32, x);
    case 2: return AUTOGLM_ONE(swap2, x);
    case 4: return {x.b, x.a, x.d, x.c};
    default: return {x.c, x.d, x.a, x.b};
  }
}
inline float32x4_t take1(float32x4_t x, float32x4_t y) {
  return vbslq_f32(vreinterpretq_u32_u64(vdupq_n_u64(0xffffffff)), x, y);
}
inline float32x4_t take2(float32x4_t x, float32x4_t y) { return vcombine_f32(vget_low_f32(x), vget_high_f32(y)); }
template <int Step>  // lanes i with bit Step of y, the others of x
inline vf vf_take(vf x, vf y) {
  switch (Step) {
    case 1: return AUTOGLM_TWO(take1, x, y);
    case 2: return AUTOGLM_TWO(take2, x, y);
    case 4: return {x.a, y.b, x.c, y.d};
    default: return {x.a, x.b, y.c, y.d};
  }
}

inline vb vb_load(const uint8_t* p) { return {vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}; }
inline void vb_store(uint8_t* p, vb x) {
  vst1q_u8(p, x.a);
  vst1q_u8(p + 16, x.b);
  vst1q_u8(p + 32, x.c);
  vst1q_u8(p + 48, x.d);
}
inline vb vb_set1(uint8_t x) { return AUTOGLM_SAME(vdupq_n_u8(x)); }
inline vb vb_and(vb x, vb y) { return AUTOGLM_TWO(vandq_u8, x, y); }
inline vb vb_or(vb x, vb y) { return AUTOGLM_TWO(vorrq_u8, x, y); }
inline vb vb_xor(vb x, vb y) { return AUTOGLM_TWO(veorq_u8, x, y); }
template <int N>
inline vb vb_shl(vb x) {
  return {vshlq_n_u8(x.a, N), vshlq_n_u8(x.b, N), vshlq_n_u8(x.c, N), vshlq_n_u8(x.d, N)};
}
template <int N>
inline vb vb_shr(vb x) {
  if constexpr (N == 0) return x;
  else return {vshrq_n_u8(x.a, N), vshrq_n_u8(x.b, N), vshrq_n_u8(x.c, N), vshrq_n_u8(x.d, N)};
}

// Four int8 of an activation, one of four such quads that lie side by side: products take a lane of a vector as it is.
struct Quad { int8x16_t v; int lane; };
// The k-th four from p, where whole sixteens lie.
inline Quad quad_load(const int8_t* p, int k) { return {vld1q_s8(p + 4 * (k & ~3)), k & 3}; }
inline int32x4_t dot4_128(int32x4_t acc, uint8x16_t w, Quad q) {
  const int8x16_t x = vreinterpretq_s8_u8(w);
  switch (q.lane) {  // known once loops are unrolled
    case 0: return vdotq_laneq_s32(acc, x, q.v, 0);
    case 1: return vdotq_laneq_s32(acc, x, q.v, 1);
    case 2: return vdotq_laneq_s32(acc, x, q.v, 2);
    default: return vdotq_laneq_s32(acc, x, q.v, 3);
  }
}
inline vi dot4(vi acc, vb w, Quad q) {
  return {dot4_128(acc.a, w.a, q), dot4_128(acc.b, w.b, q), dot4_128(acc.c, w.c, q), dot4_128(acc.d, w.d, q)};
}
inline vi dot4_q8(vi acc, vb w, Quad q) { return dot4(acc, w, q); }

// There are no dots of pairs: first and second numbers of eight lanes are put side by side, once for all rows of a tile.
template <int Lane>
inline void dot2_256(int32x4_t& low, int32x4_t& high, int16x8_t w0, int16x8_t w1, int16x8_t a) {
  const int16x8_t first = vuzp1q_s16(w0, w1), second = vuzp2q_s16(w0, w1);
  low = vmlal_laneq_s16(low, vget_low_s16(first), a, 2 * Lane);
  high = vmlal_high_laneq_s16(high, first, a, 2 * Lane);
  low = vmlal_laneq_s16(low, vget_low_s16(second), a, 2 * Lane + 1);
  high = vmlal_high_laneq_s16(high, second, a, 2 * Lane + 1);
}
template <int Lane>
inline vi dot2_lane(vi acc, vb w, int16x8_t a) {
  dot2_256<Lane>(acc.a, acc.b, vreinterpretq_s16_u8(w.a), vreinterpretq_s16_u8(w.b), a);
  dot2_256<Lane>(acc.c, acc.d, vreinterpretq_s16_u8(w.c), vreinterpretq_s16_u8(w.d), a);
  return acc;
}
// 16-bit pairs: acc + w[lane][0] * a[0] + w[lane][1] * a[1]
inline vi dot2(vi acc, vb w, Quad q) {
  const int16x8_t a = vreinterpretq_s16_s8(q.v);
  switch (q.lane) {
    case 0: return dot2_lane<0>(acc, w, a);
    case 1: return dot2_lane<1>(acc, w, a);
    case 2: return dot2_lane<2>(acc, w, a);
    default: return dot2_lane<3>(acc, w, a);
  }
}
inline vi dot2(vi acc, const int16_t* m, const int16_t* s) {
  int32_t x;
  __builtin_memcpy(&x, s, 4);
  return dot2_lane<0>(acc, vb_load((const uint8_t*)m), vreinterpretq_s16_s32(vdupq_n_s32(x)));
}
inline void widen_u8(int16_t* dst, const uint8_t* src) {  // 32 values
  for (int i = 0; i < 32; i += 8) vst1q_s16(dst + i, vreinterpretq_s16_u16(vmovl_u8(vld1_u8(src + i))));
}
inline vi dot2_u8(vi acc, const uint8_t* m, const int16_t* s) {
  int16_t wide[32];
  widen_u8(wide, m);
  return dot2(acc, wide, s);
}
inline float vf_reduce_add(vf x) {  // the order of simd_avx512.h
  const float32x4_t y = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
  const float32x2_t z = vadd_f32(vget_low_f32(y), vget_high_f32(y));
  return vget_lane_f32(z, 0) + vget_lane_f32(z, 1);
}
inline float vf_reduce_max(vf x) { return vmaxvq_f32(larger(larger(x.a, x.c), larger(x.b, x.d))); }
// A compiler may drop a loop that does nothing but __builtin_prefetch.
inline void prefetch(const void* p) { asm volatile("prfm pldl1keep, %0" : : "Q"(*(const char*)p)); }
inline void prefetch_second(const void* p) { asm volatile("prfm pldl2keep, %0" : : "Q"(*(const char*)p)); }
// The compiler knows nothing of x from here on.
inline void opaque(vb& x) { asm volatile("" : "+w"(x.a), "+w"(x.b), "+w"(x.c), "+w"(x.d)); }
inline void opaque(vf& x) { asm volatile("" : "+w"(x.a), "+w"(x.b), "+w"(x.c), "+w"(x.d)); }

#undef AUTOGLM_ONE
#undef AUTOGLM_TWO
#undef AUTOGLM_SAME

}  // namespace
