// Runs the loops of peaks.h on all threads and keeps the fastest time of each.
#include "machine_limits.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

namespace autoglm {

namespace {

constexpr size_t kPiece = (size_t)1 << 20;  // bytes a thread reads before it takes the next piece
constexpr size_t kAhead[] = {0, 1024, 4096};  // asking ahead helps some machines and hinders others: the best counts
constexpr int kRounds = 1 << 14, kPiecesPerThread = 16;
// Timed by the eighth, one after the other: a short time is left alone by other programs more often than a long one,
// and what was read last is far behind when its turn comes again.
constexpr int kParts = 8;

// The largest of work / time over runs of f, which returns the work it did.
template <class F>
double best_rate(double seconds, const F& f) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  double best = 0;
  for (int runs = 0; runs < 3 || Clock::now() < end; ++runs) {
    const auto start = Clock::now();
    const double work = f();
    best = std::max(best, work / std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

double macs_per_s(ThreadPool& pool, int64_t (*peak)(int), double seconds) {
  std::vector<int64_t> done((size_t)(kPiecesPerThread * pool.size()));
  return best_rate(seconds, [&] {
    pool.parallel_for((int)done.size(), [&](int i, int) { done[(size_t)i] = peak(kRounds); });
    double total = 0;
    for (int64_t n : done) total += (double)n;
    return total;
  });
}

}  // namespace

MemoryReader::MemoryReader(const KernelTable& kernels, ThreadPool& pool, size_t num_bytes)
    : kernels_(kernels), pool_(pool), pieces_((int)std::max<size_t>(1, num_bytes / kParts / kPiece)),
      pages_(kParts * (size_t)pieces_ * kPiece) {
  // Pages nobody wrote are all one page of zeros.
  pool.parallel_for(kParts * pieces_, [&](int i, int) { std::memset(pages_.data() + (size_t)i * kPiece, 1, kPiece); });
}

double MemoryReader::bytes_per_s(double seconds) {
  double best = 0;
  const size_t part = (size_t)pieces_ * kPiece;
  for (size_t ahead : kAhead)
    best = std::max(best, best_rate(seconds / std::size(kAhead), [&] {
      const uint8_t* p = pages_.data() + turn_++ % kParts * part;
      pool_.parallel_for(pieces_, [&](int i, int) { kernels_.peak_read(p + (size_t)i * kPiece, kPiece, ahead); });
      return (double)part;
    }));
  return best;
}

MachineLimits measure_limits(const KernelTable& kernels, ThreadPool& pool, size_t read_bytes, double seconds) {
  return {MemoryReader(kernels, pool, read_bytes).bytes_per_s(seconds), macs_per_s(pool, kernels.peak_int8, seconds),
          macs_per_s(pool, kernels.peak_int16, seconds), macs_per_s(pool, kernels.peak_float, seconds)};
}

}  // namespace autoglm
