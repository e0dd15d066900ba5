// The worker loop: spin, sleep, join a job, take indices from a shared counter.
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

// A job is open from its start until its work is all taken: who comes later, since the system ran something else on its
// core, is not waited for. The job's number and who has joined it and left it are one word, so that none joins a closed one.
struct ThreadPool::Crew {
  static constexpr uint64_t kOpen = (uint64_t)1 << 31, kJoin = 1 << 16, kLeave = 1;

  std::vector<std::thread> workers;
  alignas(64) std::atomic<uint64_t> job{0};  // number << 32 | kOpen | workers that joined << 16 | workers that left
  alignas(64) std::atomic<int> next{0};
  std::atomic<bool> is_any_asleep{false};
  std::atomic<bool> stop{false};
  Call call = nullptr;
  const void* context = nullptr;
  int count = 0;
  std::mutex mutex;
  std::condition_variable wake;

  void open_next_job() {
    job.store(((job.load(std::memory_order_relaxed) >> 32) + 1) << 32 | kOpen);
    if (!is_any_asleep.load()) return;
    {
      std::lock_guard<std::mutex> lock(mutex);
      is_any_asleep = false;
    }
    wake.notify_all();
  }

  static size_t joined(uint64_t job) { return job >> 16 & 0x7fff; }

  void close_job() {
    if (joined(job.load(std::memory_order_relaxed)) < workers.size()) job.fetch_and(~kOpen, std::memory_order_relaxed);
    for (int spin = 0;; ++spin) {
      const uint64_t now = job.load(std::memory_order_acquire);
      if (joined(now) == (now & 0xffff)) return;
      if (spin < kSpins) relax();
      else std::this_thread::yield();
    }
  }

  bool join(uint64_t number) {
    uint64_t seen = job.load(std::memory_order_relaxed);
    while (seen >> 32 == number && (seen & kOpen))
      if (job.compare_exchange_weak(seen, seen + kJoin, std::memory_order_acquire)) return true;
    return false;
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
    const auto number = [this] { return job.load() >> 32; };
    for (uint64_t done = 0;;) {
      for (int spin = 0; spin < kSpins && number() == done; ++spin) relax();
      if (number() == done) {
        std::unique_lock<std::mutex> lock(mutex);
        while (number() == done) {
          is_any_asleep = true;
          if (number() == done) wake.wait(lock);
        }
      }
      if (stop) return;
      done = number();
      if (!join(done)) continue;
      take(thread);
      job.fetch_add(kLeave, std::memory_order_release);
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
  crew_->open_next_job();
  for (auto& worker : crew_->workers) worker.join();
}

bool ThreadPool::forked() const { return forks.load(std::memory_order_relaxed) != process_; }

void ThreadPool::run(Call call, const void* context, int count) {
  Crew& crew = *crew_;
  crew.call = call;
  crew.context = context;
  crew.count = count;
  crew.next.store(0, std::memory_order_relaxed);
  crew.open_next_job();
  crew.take(0);
  crew.close_job();
}

}  // namespace autoglm
