// Weight matrices: repacked from GGUF rows into panels, and rows dequantized exactly.
#pragma once
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include "kernels.h"
#include "memory.h"
#include "tensor_file.h"
#include "thread_pool.h"

namespace autoglm {

int block_elements(QuantType type);
size_t block_bytes(QuantType type);
size_t row_bytes(QuantType type, int cols);
bool known_type(int id);
ActKind activation_kind(QuantType type);

// dst[i] = value of element i; the same float operations in the same order as the format's reference.
void dequantize(QuantType type, const uint8_t* src, size_t num_elements, float* dst);

// Where the rows of a matrix lie: in memory, or in a file that is read as they are repacked.
struct Rows {
  const uint8_t* memory = nullptr;
  TensorFile* file = nullptr;
  uint64_t offset = 0;  // in the file
};

// What went wrong with a file: errno, or TensorFile::kCut.
struct ReadError {
  int code;
};

// A matrix repacked for the kernels; it owns its memory or shares it with others.
class Matrix {
 public:
  // Of `stored` type in the source; in_floats: unpacked to F32. Memory only, fill() brings the contents; the slabs have
  // to be there until then.
  Matrix(QuantType stored, int rows, int cols, bool in_floats, Slabs& slabs);
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;

  // Repacks source_bytes() of src, once. Returns 0, or ReadError's code.
  int fill(const Rows& src, ThreadPool& pool);
  // Instead of fill(): there will be no contents.
  void fail(int code) { settle(code); }
  // Waits for the contents. Throws ReadError if there are none.
  void wait() const;

  const PackedMatrix& view() const { return view_; }
  size_t nbytes() const { return piece_.bytes; }
  size_t source_bytes() const { return row_bytes(stored_, view_.cols) * (size_t)view_.rows; }

 private:
  static constexpr int kEmpty = INT32_MIN;
  int fill_group(const Rows& src, int first, int end, Pages& buffer);
  void settle(int code);

  QuantType stored_;
  Slabs& slabs_;
  Slabs::Piece piece_;
  PackedMatrix view_;
  mutable std::mutex mutex_;
  mutable std::condition_variable settled_;
  int state_ = kEmpty;  // then what fill() returned
};

}  // namespace autoglm
