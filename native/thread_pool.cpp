// The worker loop: spin, sleep, take indices from a shared counter.
#include "thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace autoglm {

namespace {
inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}
// A pause is about 140 cycles on server cores since Skylake: 3000 are some 0.15 ms, longer than any
// gap inside a step and shorter than what the web server needs the core for.
constexpr int kSpins = 3000;
}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    generation_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::take(int thread) {
  for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) call_(context_, i, thread);
}

void ThreadPool::run(Call call, const void* context, int count) {
  call_ = call;
  context_ = context;
  count_ = count;
  next_.store(0, std::memory_order_relaxed);
  pending_.store((int)workers_.size(), std::memory_order_relaxed);
  generation_.fetch_add(1);
  if (sleeping_.load() > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  take(0);
  for (int spin = 0; pending_.load(std::memory_order_acquire) > 0; ++spin) {
    if (spin < kSpins) relax();
    else std::this_thread::yield();
  }
}

void ThreadPool::work(int thread) {
  uint64_t seen = 0;
  for (;;) {
    for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spin) relax();
    if (generation_.load() == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_.fetch_add(1);
      wake_.wait(lock, [&] { return generation_.load() != seen; });
      sleeping_.fetch_sub(1);
    }
    if (stop_) return;
    ++seen;  // run() waits for every worker, so none ever misses a generation
    take(thread);
    pending_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace autoglm
