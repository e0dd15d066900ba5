// Sixteen lanes on AVX-512 with VNNI: the vocabulary that kernels_impl.h is written in.
#include <immintrin.h>

namespace {

using vf = __m512;   // 16 floats
using vi = __m512i;  // 16 int32
using vb = __m512i;  // 64 bytes: 16 rows x 4 columns

constexpr int kTileT = 6;      // 12 int + 12 float accumulators + 2 weights + 1 broadcast fit 32 registers
constexpr int kTileR = 2;
constexpr int kDirectRows = 8;  // up to here weights go from memory to registers to products
constexpr int kTiledRows = 16;  // the same of Q4_K in tiles, where it is the second cache that is asked
constexpr int kPairRows = 4;    // up to here both halves of a panel go at once
constexpr int kQ8Asks = 4;      // rows of Q8_0 from which on what comes next is asked for
constexpr int kUnaskedRows = 2;  // rows that a core which reads ahead by itself needs not be asked for
constexpr int kScoreRows = 4;   // query rows whose scores against two blocks of keys are summed together
constexpr int kValueVectors = 4;  // of 16 dims, for four rows: what the registers hold
constexpr bool kFullBytes = true;  // dot4 takes weights up to 255
constexpr bool kNarrowSums = false;  // dot4 sums in 32 bits as fast
constexpr bool kQ8Unsigned = true;
constexpr const char* kIsaName = "avx512-vnni";

inline vf vf_zero() { return _mm512_setzero_ps(); }
inline vf vf_set1(float x) { return _mm512_set1_ps(x); }
inline vf vf_load(const float* p) { return _mm512_loadu_ps(p); }
inline void vf_store(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf vf_abs(vf a) { return _mm512_abs_ps(a); }
inline vf vf_load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void vf_store_f16(uint16_t* p, vf x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline vf vf_load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline vf vf_load_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline vf vf_load_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline vf vf_from_int(vi a) { return _mm512_cvtepi32_ps(a); }
inline vi vi_round(vf a) { return _mm512_cvtps_epi32(a); }  // to nearest, ties to even
inline vf vf_scale2(vf a, vi n) {  // a * 2^n, n in -126..127
  return _mm512_mul_ps(a, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23)));
}
inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi vi_zero() { return _mm512_setzero_si512(); }
inline void vi_store_i8(int8_t* p, vi a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a)); }
template <int Step>  // lanes i and i ^ Step change places
inline vf vf_swap(vf a) {
  switch (Step) {
    case 1: return _mm512_permute_ps(a, 0xb1);
    case 2: return _mm512_permute_ps(a, 0x4e);
    case 4: return _mm512_shuffle_f32x4(a, a, 0xb1);
    default: return _mm512_shuffle_f32x4(a, a, 0x4e);
  }
}
template <int Step>  // lanes i with bit Step of b, the others of a
inline vf vf_take(vf a, vf b) {
  return _mm512_mask_blend_ps(Step == 1 ? 0xaaaa : Step == 2 ? 0xcccc : Step == 4 ? 0xf0f0 : 0xff00, a, b);
}
inline void vi_store_pairs(int16_t* p, vi low, vi high) {  // p[2 i] = low[i], p[2 i + 1] = high[i]
  _mm512_storeu_si512((void*)p, _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(high, 16)));
}
inline void vi_store_i16(int16_t* p, vi a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi32_epi16(a)); }
inline int vi_sum(vi a) { return _mm512_reduce_add_epi32(a); }
// (-sum) * offset, offset a power of two, in all lanes
template <int Log2>
inline vi vi_offset(const int32_t* neg_sum) { return _mm512_slli_epi32(_mm512_set1_epi32(*neg_sum), Log2); }

inline vb vb_load(const uint8_t* p) { return _mm512_load_si512((const void*)p); }
inline void vb_store(uint8_t* p, vb a) { _mm512_store_si512((void*)p, a); }
inline vb vb_set1(uint8_t x) { return _mm512_set1_epi8((char)x); }
inline vb vb_and(vb a, vb b) { return _mm512_and_si512(a, b); }
inline vb vb_or(vb a, vb b) { return _mm512_or_si512(a, b); }
inline vb vb_xor(vb a, vb b) { return _mm512_xor_si512(a, b); }
template <int N> inline vb vb_shr(vb a) { return _mm512_srli_epi16(a, N); }
template <int N> inline vb vb_shl(vb a) { return _mm512_slli_epi16(a, N); }

struct Quad { __m512i v; };  // four int8 of an activation, in every lane
inline Quad quad_load(const int8_t* p, int k) {  // the k-th four from p
  int32_t x;
  __builtin_memcpy(&x, p + 4 * k, 4);
  return {_mm512_set1_epi32(x)};
}
inline vi dot4(vi acc, vb w, Quad a) { return _mm512_dpbusd_epi32(acc, w, a.v); }
inline vi dot4_q8(vi acc, vb w, Quad a) { return _mm512_dpbusd_epi32(acc, w, a.v); }
// 16-bit pairs: acc + w[lane][0] * a[0] + w[lane][1] * a[1]
inline vi dot2(vi acc, vb w, Quad a) { return _mm512_dpwssd_epi32(acc, w, a.v); }
// acc + m[lane][0] * s[0] + m[lane][1] * s[1], 16-bit pairs
inline vi dot2(vi acc, const int16_t* m, const int16_t* s) {
  int32_t x;
  __builtin_memcpy(&x, s, 4);
  return _mm512_dpwssd_epi32(acc, _mm512_load_si512((const void*)m), _mm512_set1_epi32(x));
}
inline vi dot2_u8(vi acc, const uint8_t* m, const int16_t* s) {
  int32_t x;
  __builtin_memcpy(&x, s, 4);
  return _mm512_dpwssd_epi32(acc, _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)m)), _mm512_set1_epi32(x));
}
inline void widen_u8(int16_t* dst, const uint8_t* src) {  // 32 values
  _mm512_store_si512((void*)dst, _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)src)));
}
inline float vf_reduce_add(vf a) {
  __m256 x = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float vf_reduce_max(vf a) { return _mm512_reduce_max_ps(a); }
// GCC drops a loop that does nothing but _mm_prefetch.
inline void prefetch(const void* p) { asm volatile("prefetcht0 %0" : : "m"(*(const char*)p)); }
inline void prefetch_second(const void* p) { asm volatile("prefetcht1 %0" : : "m"(*(const char*)p)); }
constexpr int kPeakChains = 12;  // of peaks.h: latency times products a cycle, as far as registers go
inline void opaque(__m512i& x) { asm volatile("" : "+v"(x)); }  // the compiler knows nothing of x from here on
inline void opaque(__m512& x) { asm volatile("" : "+v"(x)); }

}  // namespace
