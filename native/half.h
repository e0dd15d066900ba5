// IEEE half <-> float in integer arithmetic, rounding to nearest even, for code that no instruction set specialises.
#pragma once
#include <cstdint>
#include <cstring>

namespace autoglm {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, em = h & 0x7fff;
  uint32_t bits;
  if (em >= 0x7c00) {
    bits = sign | 0x7f800000 | ((em & 0x3ff) << 13);
  } else if (em >= 0x400) {
    bits = sign | ((em << 13) + (112u << 23));
  } else {
    const float x = (float)em * 5.9604644775390625e-08f;  // subnormal: em * 2^-24
    return sign ? -x : x;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t x;
  std::memcpy(&x, &f, 4);
  const uint32_t sign = (x >> 16) & 0x8000, a = x & 0x7fffffff;
  if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (a < 0x38800000) {  // subnormal half: add 0.5 so that the FPU rounds at the right bit
    float y;
    std::memcpy(&y, &a, 4);
    y += 0.5f;
    uint32_t r;
    std::memcpy(&r, &y, 4);
    return (uint16_t)(sign | (r - 0x3f000000u));
  }
  const uint32_t r = a - (112u << 23) + 0xfff + ((a >> 13) & 1);
  return (uint16_t)(sign | (r >> 13));
}

}  // namespace autoglm
