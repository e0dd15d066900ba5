// The worker loop: spin, sleep, join a job, work off a part of it and then half of what another has left.
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
constexpr size_t kAskBytes = (size_t)1 << 18;  // a part of the second cache

// Counted in the child by pthread_atfork: getpid would be a system call for every job.
std::atomic<int> forks{0};
int count_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  (void)registered;
  return forks.load(std::memory_order_relaxed);
}
}  // namespace

// A job's number, how many workers are at it and whether it is closed are one word. Who comes when all is taken, since the
// system ran something else on its core, finds it closed, does not join and is not waited for.
struct ThreadPool::Crew {
  static constexpr int kNumber = 44;
  static constexpr uint64_t kWorker = (uint64_t)1 << 32, kClosed = 1;

  // What one thread is to do of a job. Neighbours lie side by side in memory, so each has a stretch of its own; one cache
  // line, since between two dies every line that changes hands costs a fifth of a microsecond.
  struct alignas(64) Place {
    std::atomic<uint64_t> stretch{0};  // of indices nobody has taken yet: the end, and in the lower half the begin
    Call call = nullptr;               // the rest is read only by who is at the job
    const void* context = nullptr;
    Pieces next;
  };

  std::vector<std::thread> workers;
  const std::unique_ptr<Place[]> places;
  const int num_threads;
  alignas(64) std::atomic<uint64_t> job{0};  // 20 bits of its number, 12 of workers at it, 32 of which one is kClosed
  alignas(64) std::atomic<bool> is_any_asleep{false};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::condition_variable wake;

  explicit Crew(int num_threads) : places(new Place[(size_t)num_threads]), num_threads(num_threads) {}

  static bool has_workers(uint64_t job) { return (job >> 32 & 0xfff) != 0; }
  static uint64_t stretch(int begin, int end) { return (uint64_t)end << 32 | (uint32_t)begin; }
  static int begin(uint64_t stretch) { return (int)(uint32_t)stretch; }
  static int end(uint64_t stretch) { return (int)(stretch >> 32); }
  int first(int count, int thread) const { return (int)((int64_t)count * thread / num_threads); }

  void open_next_job() {
    job.store(((job.load(std::memory_order_relaxed) >> kNumber) + 1) << kNumber);
    if (!is_any_asleep.load()) return;
    {
      std::lock_guard<std::mutex> lock(mutex);
      is_any_asleep = false;
    }
    wake.notify_all();
  }

  // The next index of the thread's stretch, or of half of what another has left, from then on its own; -1: all are taken.
  int take(int thread) {
    std::atomic<uint64_t>& own = places[(size_t)thread].stretch;
    do {
      for (uint64_t left = own.load(std::memory_order_relaxed); begin(left) < end(left);)
        if (own.compare_exchange_weak(left, left + 1, std::memory_order_relaxed)) return begin(left);
    } while (take_half(thread));
    return -1;
  }

  bool take_half(int thread) {
    for (int k = 1; k < num_threads; ++k) {
      std::atomic<uint64_t>& other = places[(size_t)((thread + k) % num_threads)].stretch;
      for (uint64_t left = other.load(std::memory_order_relaxed); begin(left) < end(left);) {
        const int middle = begin(left) + (end(left) - begin(left)) / 2;
        if (!other.compare_exchange_weak(left, stretch(begin(left), middle), std::memory_order_relaxed)) continue;
        places[(size_t)thread].stretch.store(stretch(middle, end(left)), std::memory_order_relaxed);
        return true;
      }
    }
    return false;
  }

  void work_off(int thread) {
    const Place& place = places[(size_t)thread];
    for (int i; (i = take(thread)) >= 0;) place.call(place.context, i, thread);
  }

  uint64_t number() const { return job.load() >> kNumber; }

  // Asks, until the job after `done` is there, for what this thread has of it.
  void ask_for(const Pieces& pieces, int thread, uint64_t done) const {
    const uint8_t* p = pieces.data + (size_t)first(pieces.count, thread) * pieces.bytes;
    const uint8_t* end = pieces.data + (size_t)first(pieces.count, thread + 1) * pieces.bytes;
    for (end = std::min(end, p + kAskBytes); p < end && number() == done; p += 64) __builtin_prefetch(p, 0, 2);
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
      uint64_t seen = job.load(std::memory_order_acquire);
      while (!(seen & kClosed) && !job.compare_exchange_weak(seen, seen + kWorker, std::memory_order_acquire)) continue;
      done = seen >> kNumber;
      if (seen & kClosed) continue;
      work_off(thread);
      const Pieces pieces = places[(size_t)thread].next;
      job.fetch_sub(kWorker, std::memory_order_release);
      ask_for(pieces, thread, done);
    }
  }

  void run(Call call, const void* context, int count, const Pieces& next) {
    for (int t = 0; t < num_threads; ++t) {
      Place& place = places[(size_t)t];
      place.call = call;
      place.context = context;
      place.next = next;
      place.stretch.store(stretch(first(count, t), first(count, t + 1)), std::memory_order_relaxed);
    }
    open_next_job();
    work_off(0);
    job.fetch_or(kClosed, std::memory_order_relaxed);
    for (int spin = 0; has_workers(job.load(std::memory_order_acquire)); ++spin) {
      if (spin < kSpins) relax();
      else std::this_thread::yield();
    }
  }
};

ThreadPool::ThreadPool(int num_threads)
    : num_workers_(num_threads - 1), process_(count_forks()), crew_(std::make_unique<Crew>(num_threads)) {
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

void ThreadPool::run(Call call, const void* context, int count, const Pieces& next) {
  crew_->run(call, context, count, next);
}

}  // namespace autoglm
