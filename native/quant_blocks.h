// GGUF weight types and their block structs, little endian; no code.
//
// Assumes the host is little endian. Source: the block tables of the GGUF format (docs of ggml).
#pragma once
#include <cstdint>

namespace autoglm {

enum class QuantType : int {
  F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8,
  Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30,
  I16 = 256,  // ours, in memory only: floats in 16-bit whole numbers, for products as fine as half floats'
};

struct BlockQ4_0 { uint16_t d; uint8_t qs[16]; };
struct BlockQ4_1 { uint16_t d, m; uint8_t qs[16]; };
struct BlockQ5_0 { uint16_t d; uint8_t qh[4]; uint8_t qs[16]; };
struct BlockQ5_1 { uint16_t d, m; uint8_t qh[4]; uint8_t qs[16]; };
struct BlockQ8_0 { uint16_t d; int8_t qs[32]; };
struct BlockQ4_K { uint16_t d, dmin; uint8_t scales[12]; uint8_t qs[128]; };
struct BlockQ5_K { uint16_t d, dmin; uint8_t scales[12]; uint8_t qh[32]; uint8_t qs[128]; };
struct BlockQ6_K { uint8_t ql[128]; uint8_t qh[64]; int8_t scales[16]; uint16_t d; };
struct BlockI16 { float d; int16_t qs[64]; };  // value = d * qs[i], the length of qs at most 32767

static_assert(sizeof(BlockQ4_0) == 18, "Q4_0");
static_assert(sizeof(BlockQ4_1) == 20, "Q4_1");
static_assert(sizeof(BlockQ5_0) == 22, "Q5_0");
static_assert(sizeof(BlockQ5_1) == 24, "Q5_1");
static_assert(sizeof(BlockQ8_0) == 34, "Q8_0");
static_assert(sizeof(BlockQ4_K) == 144, "Q4_K");
static_assert(sizeof(BlockQ5_K) == 176, "Q5_K");
static_assert(sizeof(BlockQ6_K) == 210, "Q6_K");
static_assert(sizeof(BlockI16) == 132, "I16");

}  // namespace autoglm
