// Loops that do one thing only, as fast as this instruction set can: what the products' rates are held against.
//
// Every factor is one, so that what a loop returns is the number of multiply-adds it did; the compiler does not know it
// (opaque), and each product has a sum and an operand of its own: none waits for another, no two become one. The
// portable loops are as good as the compiler makes them, and its kernels may come out a little above.
#pragma once

namespace {

// `ones` fills both factors; dot adds up products of two vectors of them.
template <class F>
int64_t peak_int(int rounds, const uint8_t* ones, const F& dot) {
  const Quad a = quad_load((const int8_t*)ones, 0);
  vb w = vb_load(ones);
  vi sum[kPeakChains];
  for (int k = 0; k < kPeakChains; ++k) sum[k] = vi_zero();
  for (int i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < kPeakChains; ++k) {
      opaque(w);
      sum[k] = dot(sum[k], w, a);
    }
  }
  int64_t total = 0;
  for (int k = 0; k < kPeakChains; ++k) total += vi_sum(sum[k]);
  return total;
}

int64_t peak_int8(int rounds) {
  alignas(64) uint8_t ones[64];
  memset(ones, 1, sizeof ones);
  asm volatile("" : "+m"(ones));
  return peak_int(rounds, ones, [](auto sum, vb w, Quad a) {
    if constexpr (kNarrowSums) {  // as four-bit weights are summed
      decltype(sum) narrow = vi_zero();
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        opaque(w);
        narrow = dot4_narrow(narrow, w, a);
      }
      return widen_sums(sum, narrow);
    }
    return dot4(sum, w, a);
  });
}

int64_t peak_int16(int rounds) {
  alignas(64) int16_t ones[32];
  for (int16_t& x : ones) x = 1;
  asm volatile("" : "+m"(ones));
  return peak_int(rounds, (const uint8_t*)ones, [](vi sum, vb w, Quad a) { return dot2(sum, w, a); });
}

int64_t peak_float(int rounds) {
  vf a = vf_set1(1), w = a, sum[kPeakChains];
  opaque(a);
  for (int k = 0; k < kPeakChains; ++k) sum[k] = vf_zero();
  for (int i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < kPeakChains; ++k) {
      opaque(w);
      sum[k] = vf_fma(w, a, sum[k]);
    }
  }
  int64_t total = 0;
  for (int k = 0; k < kPeakChains; ++k) total += (int64_t)vf_reduce_add(sum[k]);
  return total;
}

void peak_read(const uint8_t* p, size_t bytes, size_t ahead) {
  vb seen[4] = {vb_set1(0), vb_set1(0), vb_set1(0), vb_set1(0)};
  for (size_t i = 0; i < bytes; i += 256) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      if (ahead) prefetch(p + i + 64 * (size_t)k + ahead);  // past the end it asks for nothing
      seen[k] = vb_or(seen[k], vb_load(p + i + 64 * (size_t)k));
    }
  }
  for (int k = 0; k < 4; ++k) opaque(seen[k]);
}

}  // namespace
