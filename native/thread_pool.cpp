// The worker loop: spin, sleep, take indices from a shared counter.
#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

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
constexpr int kParts = 2;  // of what is left, for each thread

// Counted in the child by pthread_atfork: getpid would be a system call for every job.
std::atomic<int> forks{0};
int count_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  (void)registered;
  return forks.load(std::memory_order_relaxed);
}
}  // namespace

struct ThreadPool::Crew {
  std::vector<std::thread> workers;
  alignas(64) std::atomic<uint64_t> generation{0};
  alignas(64) std::atomic<int> next{0};
  alignas(64) std::atomic<int> pending{0};
  std::atomic<int> sleeping{0};
  std::atomic<bool> stop{false};
  Call call = nullptr;
  const void* context = nullptr;
  int count = 0;
  std::mutex mutex;
  std::condition_variable wake;

  void start_next_generation() {
    generation.fetch_add(1);
    if (sleeping.load() == 0) return;
    std::lock_guard<std::mutex> lock(mutex);
    wake.notify_all();
  }

  // Neighbours lie side by side in memory, so a thread takes several: a part of what is left, in the end one by one.
  void take(int thread) {
    const int parts = kParts * ((int)workers.size() + 1);
    for (int i = next.load(std::memory_order_relaxed); i < count;) {
      const int end = i + std::max(1, (count - i) / parts);
      if (!next.compare_exchange_weak(i, end, std::memory_order_relaxed)) continue;
      for (; i < end; ++i) call(context, i, thread);
      i = next.load(std::memory_order_relaxed);
    }
  }

  void work(int thread) {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && generation.load(std::memory_order_acquire) == seen; ++spin) relax();
      if (generation.load() == seen) {
        std::unique_lock<std::mutex> lock(mutex);
        sleeping.fetch_add(1);
        wake.wait(lock, [&] { return generation.load() != seen; });
        sleeping.fetch_sub(1);
      }
      if (stop) return;
      ++seen;  // run() waits for every worker, so none ever misses a generation
      take(thread);
      pending.fetch_sub(1, std::memory_order_release);
    }
  }
};

ThreadPool::ThreadPool(int num_threads)
    : num_workers_(num_threads - 1), process_(count_forks()), crew_(std::make_unique<Crew>()) {
  for (int i = 1; i < num_threads; ++i) crew_->workers.emplace_back([crew = crew_.get(), i] { crew->work(i); });
}

ThreadPool::~ThreadPool() {
  if (forked()) {
    crew_.release();  // its threads are the parent's: joining them, or ending what they wait on, never returns
    return;
  }
  crew_->stop = true;
  crew_->start_next_generation();
  for (auto& worker : crew_->workers) worker.join();
}

bool ThreadPool::forked() const { return forks.load(std::memory_order_relaxed) != process_; }

void ThreadPool::run(Call call, const void* context, int count) {
  Crew& crew = *crew_;
  crew.call = call;
  crew.context = context;
  crew.count = count;
  crew.next.store(0, std::memory_order_relaxed);
  crew.pending.store(num_workers_, std::memory_order_relaxed);
  crew.start_next_generation();
  crew.take(0);
  for (int spin = 0; crew.pending.load(std::memory_order_acquire) > 0; ++spin) {
    if (spin < kSpins) relax();
    else std::this_thread::yield();
  }
}

}  // namespace autoglm
