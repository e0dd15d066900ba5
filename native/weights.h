// Weight matrices: repacked from GGUF rows into panels, and rows dequantized exactly.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "memory.h"
#include "thread_pool.h"

namespace autoglm {

int block_elements(QuantType type);
size_t block_bytes(QuantType type);
size_t row_bytes(QuantType type, int cols);
bool known_type(int id);
ActKind activation_kind(QuantType type);

// dst[i] = value of element i; the same float operations in the same order as the format's reference.
void dequantize(QuantType type, const uint8_t* src, size_t num_elements, float* dst);

// A repacked matrix that owns its memory.
class Matrix {
 public:
  // src holds `rows` rows of row_bytes(type, cols) bytes.
  Matrix(QuantType type, int rows, int cols, const uint8_t* src, ThreadPool& pool);
  const PackedMatrix& view() const { return view_; }
  size_t nbytes() const { return pages_.size(); }

 private:
  Pages pages_;
  PackedMatrix view_;
};

}  // namespace autoglm
