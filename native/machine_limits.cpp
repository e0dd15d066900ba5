// Runs the loops of peaks.h on all threads and keeps the fastest time of each.
#include "machine_limits.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "memory.h"

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

MachineLimits measure_limits(const KernelTable& kernels, ThreadPool& pool, size_t read_bytes, double seconds) {
  const int pieces = (int)std::max<size_t>(1, read_bytes / kParts / kPiece);  // of a part
  const size_t part = (size_t)pieces * kPiece;
  const Pages pages(kParts * part);
  // Pages nobody wrote are all one page of zeros.
  pool.parallel_for(kParts * pieces, [&](int i, int) { std::memset(pages.data() + (size_t)i * kPiece, 1, kPiece); });
  double read = 0;
  size_t turn = 0;
  for (size_t ahead : kAhead) {
    read = std::max(read, best_rate(seconds / std::size(kAhead), [&] {
      const uint8_t* p = pages.data() + turn++ % kParts * part;
      pool.parallel_for(pieces, [&](int i, int) { kernels.peak_read(p + (size_t)i * kPiece, kPiece, ahead); });
      return (double)part;
    }));
  }
  return {read, macs_per_s(pool, kernels.peak_int8, seconds), macs_per_s(pool, kernels.peak_int16, seconds),
          macs_per_s(pool, kernels.peak_float, seconds)};
}

}  // namespace autoglm
