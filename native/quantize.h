// Float rows -> GGUF blocks: Q8_0, Q5_0, Q4_K, Q6_K.
//
// Equal bit for bit to autoglm/kernels/reference_quantize.py, which says how the search goes; no result depends on
// threads, vector width or neighbouring blocks.
#pragma once
#include <cstddef>
#include <cstdint>

#include "quant_blocks.h"

namespace autoglm {

bool has_quantizer(QuantType type);

// src holds whole blocks of finite values; dst receives block_bytes(type) for each.
void quantize(QuantType type, const float* src, size_t num_elements, uint8_t* dst);

}  // namespace autoglm
