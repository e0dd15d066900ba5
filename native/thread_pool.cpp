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
constexpr size_t kAskBytes = (size_t)1 << 18;  // a part of the second cache

// Counted in the child by pthread_atfork: getpid would be a system call for every job.
std::atomic<int> forks{0};
int count_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  (void)registered;
  return forks.load(std::memory_order_relaxed);
}
}  // namespace

// A job's number, how many workers are at it and how much of it nobody has taken yet are one word, beside what the job is:
// between two dies every word that changes hands costs a fifth of a microsecond. Who comes when all is taken, since the
// system ran something else on its core, does not join and is not waited for.
struct ThreadPool::Crew {
  static constexpr int kNumber = 44;
  static constexpr uint64_t kWorker = (uint64_t)1 << 32;

  std::vector<std::thread> workers;
  alignas(64) std::atomic<uint64_t> job{0};  // 20 bits of its number, 12 of workers at it, 32 of what is left
  Call call = nullptr;                       // these four are read only by who is at the job
  const void* context = nullptr;
  int count = 0;
  Pieces next;
  alignas(64) std::atomic<bool> is_any_asleep{false};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::condition_variable wake;

  static uint32_t left(uint64_t job) { return (uint32_t)job; }
  static bool has_workers(uint64_t job) { return (job >> 32 & 0xfff) != 0; }
  // Neighbours lie side by side in memory, so a thread takes several: a part of what is left, in the end one by one.
  uint32_t share(uint32_t left) const {
    return std::max(std::min(1u, left), left / (kParts * (uint32_t)(workers.size() + 1)));
  }

  void open_next_job(uint32_t left) {
    job.store(((job.load(std::memory_order_relaxed) >> kNumber) + 1) << kNumber | left);
    if (!is_any_asleep.load()) return;
    {
      std::lock_guard<std::mutex> lock(mutex);
      is_any_asleep = false;
    }
    wake.notify_all();
  }

  // Share after share of a job as `seen`, until none is left; with the first, `joining` is added to its word.
  bool take(uint64_t seen, uint64_t joining, int thread) {
    bool any = false;
    while (left(seen)) {
      const uint32_t size = share(left(seen));
      if (!job.compare_exchange_weak(seen, seen + joining - size, std::memory_order_acquire)) continue;
      const int begin = count - (int)left(seen);
      for (int i = begin; i < begin + (int)size; ++i) call(context, i, thread);
      any = true, joining = 0;
      seen = job.load(std::memory_order_relaxed);
    }
    return any;
  }

  uint64_t number() const { return job.load() >> kNumber; }

  // Asks, until the job after `done` is there, for what comes to this thread of it if all come at once.
  void ask_for(const Pieces& pieces, int thread, uint64_t done) const {
    uint32_t left = (uint32_t)pieces.count;
    for (int t = 0; t < thread; ++t) left -= share(left);
    const uint8_t* p = pieces.data + ((uint32_t)pieces.count - left) * pieces.bytes;
    const uint8_t* end = p + std::min(kAskBytes, share(left) * pieces.bytes);
    for (; p < end && number() == done; p += 64) __builtin_prefetch(p, 0, 2);
  }

  void work(int thread) {
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
      const uint64_t seen = job.load(std::memory_order_acquire);
      done = seen >> kNumber;
      if (!take(seen, kWorker, thread)) continue;
      const Pieces pieces = next;
      job.fetch_sub(kWorker, std::memory_order_release);
      ask_for(pieces, thread, done);
    }
  }

  void run() {
    // The caller's first share is its own before anybody else hears of the job.
    const uint32_t first = share((uint32_t)count);
    open_next_job((uint32_t)count - first);
    for (int i = 0; i < (int)first; ++i) call(context, i, 0);
    take(job.load(std::memory_order_relaxed), 0, 0);
    for (int spin = 0; has_workers(job.load(std::memory_order_acquire)); ++spin) {
      if (spin < kSpins) relax();
      else std::this_thread::yield();
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
  crew_->open_next_job(0);
  for (auto& worker : crew_->workers) worker.join();
}

bool ThreadPool::forked() const { return forks.load(std::memory_order_relaxed) != process_; }

void ThreadPool::run(Call call, const void* context, int count, const Pieces& next) {
  Crew& crew = *crew_;
  crew.call = call;
  crew.context = context;
  crew.count = count;
  crew.next = next;
  crew.run();
}

}  // namespace autoglm
