// What this machine can do at most, measured: reading memory, whole-number and float multiply-adds.
#pragma once
#include <cstddef>

#include "kernels.h"
#include "thread_pool.h"

namespace autoglm {

struct MachineLimits {
  double read_bytes_per_s, int8_macs_per_s, int16_macs_per_s, float_macs_per_s;
};

// All threads of the pool at once, each limit for about `seconds`, the fastest of its repetitions (at least three).
// read_bytes: what is read at a time; more than the last cache holds, or it is the cache that is measured.
MachineLimits measure_limits(const KernelTable& kernels, ThreadPool& pool, size_t read_bytes, double seconds);

}  // namespace autoglm
