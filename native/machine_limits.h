// What this machine can do at most, measured: reading memory, whole-number and float multiply-adds.
#pragma once
#include <cstddef>

#include "kernels.h"
#include "memory.h"
#include "thread_pool.h"

namespace autoglm {

struct MachineLimits {
  double read_bytes_per_s, int8_macs_per_s, int16_macs_per_s, float_macs_per_s;
};

// Memory held for as long as it is to be read again and again, by all threads of the pool at once.
// num_bytes: more than the last cache holds several times over, or it is the cache that is measured.
class MemoryReader {
 public:
  MemoryReader(const KernelTable& kernels, ThreadPool& pool, size_t num_bytes);
  // The fastest eighth of what is read in about so many seconds, three eighths at least.
  double bytes_per_s(double seconds);

 private:
  const KernelTable& kernels_;
  ThreadPool& pool_;
  int pieces_;  // of an eighth
  Pages pages_;
  size_t turn_ = 0;
};

// All threads of the pool at once, each limit for about `seconds`, the fastest of its repetitions (at least three).
// read_bytes: as MemoryReader's num_bytes.
MachineLimits measure_limits(const KernelTable& kernels, ThreadPool& pool, size_t read_bytes, double seconds);

}  // namespace autoglm
