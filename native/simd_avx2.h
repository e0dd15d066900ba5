// Sixteen lanes on AVX2 + FMA + F16C, with AVX-VNNI's dot products where compiled for it: the vocabulary of kernels_impl.h.
#include <immintrin.h>

namespace {

struct vf { __m256 a, b; };   // 16 floats
struct vi { __m256i a, b; };  // 16 int32
struct vb { __m256i a, b; };  // 64 bytes

#ifdef __AVXVNNI__
constexpr int kTileT = 5;       // 10 int accumulators + 2 weights + 1 broadcast of 16 registers; floats come once a block
constexpr bool kFullBytes = true;    // dot4 takes weights up to 255
constexpr bool kNarrowSums = false;  // dot4 sums in 32 bits as fast
constexpr bool kQ8Unsigned = true;
constexpr int kPeakChains = 5;  // of peaks.h: latency times products a cycle, as far as registers go
constexpr const char* kIsaName = "avx-vnni";
#else
constexpr int kTileT = 3;       // 6 int + 6 float accumulators + 2 weights + 1 broadcast + ones = 16 registers
constexpr bool kFullBytes = false;   // vpmaddubsw would saturate: dot4 takes weights up to 127
constexpr bool kNarrowSums = true;   // products of four bytes may be summed in 16 bits first, see dot4_narrow
constexpr bool kQ8Unsigned = false;  // vpmaddubsw would saturate on 255 * 127 * 2: keep the sign instead
constexpr int kPeakChains = 4;
constexpr const char* kIsaName = "avx2";
#endif
constexpr int kTileR = 1;
constexpr int kDirectRows = 4;   // up to here weights go from memory to registers to products
constexpr int kTiledRows = 4;    // the same of Q4_K in tiles, where it is the second cache that is asked
constexpr int kPairRows = 2;     // up to here both halves of a panel go at once
constexpr int kQ8Asks = 1;       // rows of Q8_0 from which on what comes next is asked for
constexpr int kUnaskedRows = 2;  // rows that a core which reads ahead by itself needs not be asked for
constexpr int kScoreRows = 2;    // query rows whose scores against two blocks of keys are summed together
constexpr int kValueVectors = 1;  // of 16 dims, for four rows: what the registers hold

inline vf vf_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline vf vf_set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline vf vf_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void vf_store(float* p, vf x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline vf vf_add(vf x, vf y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline vf vf_sub(vf x, vf y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline vf vf_mul(vf x, vf y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline vf vf_div(vf x, vf y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline vf vf_fma(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline vf vf_max(vf x, vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline vf vf_min(vf x, vf y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline vf vf_abs(vf x) {
  const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
inline vf vf_load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline void vf_store_f16(uint16_t* p, vf x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
inline __m256 bf16_to_ps(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline vf vf_load_bf16(const uint16_t* p) {
  return {bf16_to_ps(_mm_loadu_si128((const __m128i*)p)), bf16_to_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline vf vf_from_int(vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline vf vf_load_u8(const uint8_t* p) {
  return vf_from_int({_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
                      _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))});
}
inline vf vf_load_i8(const int8_t* p) {
  return vf_from_int({_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
                      _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))});
}
inline vi vi_round(vf x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline __m256 pow2(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline vf vf_scale2(vf x, vi n) { return {_mm256_mul_ps(x.a, pow2(n.a)), _mm256_mul_ps(x.b, pow2(n.b))}; }
inline vi vi_add(vi x, vi y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline vi vi_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline void vi_store_i8(int8_t* p, vi x) {
  const __m128i a = _mm_packs_epi32(_mm256_castsi256_si128(x.a), _mm256_extracti128_si256(x.a, 1));
  const __m128i b = _mm_packs_epi32(_mm256_castsi256_si128(x.b), _mm256_extracti128_si256(x.b, 1));
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(a, b));
}
template <int Step>
inline vf vf_swap(vf x) {
  switch (Step) {
    case 1: return {_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1)};
    case 2: return {_mm256_permute_ps(x.a, 0x4e), _mm256_permute_ps(x.b, 0x4e)};
    case 4: return {_mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1)};
    default: return {x.b, x.a};
  }
}
template <int Step>  // lanes i with bit Step of b, the others of a
inline vf vf_take(vf a, vf b) {
  constexpr int mask = Step == 1 ? 0xaa : Step == 2 ? 0xcc : 0xf0;
  if (Step == 8) return {a.a, b.b};
  return {_mm256_blend_ps(a.a, b.a, mask), _mm256_blend_ps(a.b, b.b, mask)};
}
inline __m256i pairs16(__m256i low, __m256i high) {
  return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(0xffff)), _mm256_slli_epi32(high, 16));
}
inline void vi_store_pairs(int16_t* p, vi low, vi high) {
  _mm256_storeu_si256((__m256i*)p, pairs16(low.a, high.a));
  _mm256_storeu_si256((__m256i*)(p + 16), pairs16(low.b, high.b));
}
inline void vi_store_i16(int16_t* p, vi x) {
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8));
}
inline int vi_sum(vi x) {
  const __m256i s = _mm256_add_epi32(x.a, x.b);
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}
template <int Log2>
inline vi vi_offset(const int32_t* neg_sum) {
  const __m256i x = _mm256_slli_epi32(_mm256_set1_epi32(*neg_sum), Log2);
  return {x, x};
}

inline vb vb_load(const uint8_t* p) {
  return {_mm256_load_si256((const __m256i*)p), _mm256_load_si256((const __m256i*)(p + 32))};
}
inline void vb_store(uint8_t* p, vb x) {
  _mm256_store_si256((__m256i*)p, x.a);
  _mm256_store_si256((__m256i*)(p + 32), x.b);
}
inline vb vb_set1(uint8_t x) { return {_mm256_set1_epi8((char)x), _mm256_set1_epi8((char)x)}; }
inline vb vb_and(vb x, vb y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline vb vb_or(vb x, vb y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline vb vb_xor(vb x, vb y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
template <int N> inline vb vb_shr(vb x) { return {_mm256_srli_epi16(x.a, N), _mm256_srli_epi16(x.b, N)}; }
template <int N> inline vb vb_shl(vb x) { return {_mm256_slli_epi16(x.a, N), _mm256_slli_epi16(x.b, N)}; }

struct Quad { __m256i v; };
inline Quad quad_load(const int8_t* p, int k) {
  int32_t x;
  __builtin_memcpy(&x, p + 4 * k, 4);
  return {_mm256_set1_epi32(x)};
}
#ifdef __AVXVNNI__
inline __m256i dot4_256(__m256i acc, __m256i u, __m256i s) { return _mm256_dpbusd_avx_epi32(acc, u, s); }
inline __m256i dot2_256(__m256i acc, __m256i w, __m256i a) { return _mm256_dpwssd_avx_epi32(acc, w, a); }
#else
// Sums that take one product after the other: GCC would add products to products, and store them all on the way.
inline __m256i in_order(__m256i sums) {
  asm("" : "+x"(sums));
  return sums;
}
inline __m256i dot4_256(__m256i acc, __m256i u, __m256i s) {
  return in_order(_mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1))));
}
inline __m256i dot2_256(__m256i acc, __m256i w, __m256i a) { return in_order(_mm256_add_epi32(acc, _mm256_madd_epi16(w, a))); }
// 32 sums of 16 bits, two a lane, for as many quads as cannot overflow them; widen_sums adds them to a lane's 32 bits. Each
// quad has two instructions so, not three, and only one that multiplies.
inline __m256i dot4_narrow_256(__m256i sums, __m256i u, __m256i s) {
  return in_order(_mm256_add_epi16(sums, _mm256_maddubs_epi16(u, s)));
}
inline vi dot4_narrow(vi sums, vb w, Quad a) {
  return {dot4_narrow_256(sums.a, w.a, a.v), dot4_narrow_256(sums.b, w.b, a.v)};
}
inline vi widen_sums(vi acc, vi sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(sums.a, ones)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(sums.b, ones))};
}
#endif
inline vi dot4(vi acc, vb w, Quad a) { return {dot4_256(acc.a, w.a, a.v), dot4_256(acc.b, w.b, a.v)}; }
inline vi dot4_q8(vi acc, vb w, Quad a) {
  if (kQ8Unsigned) return dot4(acc, w, a);
  // w signed: |w| * (a with w's sign); 128 * 127 * 2 = 32512 does not saturate
  return {dot4_256(acc.a, _mm256_abs_epi8(w.a), _mm256_sign_epi8(a.v, w.a)),
          dot4_256(acc.b, _mm256_abs_epi8(w.b), _mm256_sign_epi8(a.v, w.b))};
}
inline vi dot2(vi acc, vb w, Quad a) { return {dot2_256(acc.a, w.a, a.v), dot2_256(acc.b, w.b, a.v)}; }
inline vi dot2(vi acc, const int16_t* m, const int16_t* s) {
  int32_t x;
  __builtin_memcpy(&x, s, 4);
  const __m256i v = _mm256_set1_epi32(x);
  return {dot2_256(acc.a, _mm256_load_si256((const __m256i*)m), v), dot2_256(acc.b, _mm256_load_si256((const __m256i*)(m + 16)), v)};
}
inline vi dot2_u8(vi acc, const uint8_t* m, const int16_t* s) {
  int32_t x;
  __builtin_memcpy(&x, s, 4);
  const __m256i v = _mm256_set1_epi32(x);
  return {dot2_256(acc.a, _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)m)), v),
          dot2_256(acc.b, _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(m + 16))), v)};
}
inline void widen_u8(int16_t* dst, const uint8_t* src) {
  _mm256_store_si256((__m256i*)dst, _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)src)));
  _mm256_store_si256((__m256i*)(dst + 16), _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(src + 16))));
}
inline float vf_reduce_add(vf v) {  // the order of simd_avx512.h
  const __m256 x = _mm256_add_ps(v.a, v.b);
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float vf_reduce_max(vf v) {
  const __m256 x = _mm256_max_ps(v.a, v.b);
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
// GCC drops a loop that does nothing but _mm_prefetch.
inline void prefetch(const void* p) { asm volatile("prefetcht0 %0" : : "m"(*(const char*)p)); }
inline void prefetch_second(const void* p) { asm volatile("prefetcht1 %0" : : "m"(*(const char*)p)); }
inline void opaque(vb& x) { asm volatile("" : "+x"(x.a), "+x"(x.b)); }  // the compiler knows nothing of x from here on
inline void opaque(vf& x) { asm volatile("" : "+x"(x.a), "+x"(x.b)); }

}  // namespace
