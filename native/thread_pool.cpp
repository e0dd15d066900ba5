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
// Waits a moment between two looks, as long as that takes some 0.1 ms in all: longer than nearly any gap inside a step and
// shorter than what the web server needs the core for.
class Patience {
 public:
#if defined(__aarch64__)  // where a pause is anything from nothing to 40 cycles, but a clock is at hand
  bool wait() {
    asm volatile("isb");
    return ticks() < end_;
  }

 private:
  static uint64_t ticks() {
    uint64_t t;
    asm volatile("mrs %0, cntvct_el0" : "=r"(t));
    return t;
  }
  static uint64_t ticks_per_second() {
    uint64_t t;
    asm("mrs %0, cntfrq_el0" : "=r"(t));
    return t;
  }
  const uint64_t end_ = ticks() + ticks_per_second() / 10000;
#else  // a pause is 65 cycles on Zen 4 and about 140 on server cores since Skylake
  bool wait() {
    if (left_ == 0) return false;
#if defined(__x86_64__)
    _mm_pause();
#endif
    return --left_ > 0;
  }

 private:
  int left_ = 3000;
#endif
};

#if defined(__APPLE__) && defined(__aarch64__)
constexpr size_t kCacheLine = 128;
#else
constexpr size_t kCacheLine = 64;
#endif
constexpr size_t kAskBytes = (size_t)1 << 18;  // a part of the second cache

// Counted in the child by pthread_atfork: getpid would be a system call for every job.
std::atomic<int> forks{0};
int count_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  (void)registered;
  return forks.load(std::memory_order_relaxed);
}
}  // namespace

struct ThreadPool::Crew {
  // A job is offered to each worker by itself; who comes when all is taken, since the system ran something else on its core,
  // finds the offer withdrawn, does not join and is not waited for.
  enum class Turn { Over, Offered, Joined };

  // What one thread is to do of a job. One cache line: between two dies each that changes hands costs a fifth of a
  // microsecond. The stretch is of indices nobody has taken yet: their end, and in the lower half their begin.
  struct alignas(kCacheLine) Place {
    std::atomic<Turn> turn{Turn::Over};
    std::atomic<uint64_t> stretch{0};
    Call call = nullptr;  // this and the rest are a worker's to read while it has joined
    const void* context = nullptr;
    Pieces next;
  };
  static_assert(sizeof(Place) == kCacheLine, "one cache line");

  std::vector<std::thread> workers;
  const std::unique_ptr<Place[]> places;  // the caller's is the first
  const int num_threads;
  std::atomic<bool> is_any_asleep{false}, stop{false};
  std::mutex mutex;
  std::condition_variable wake;

  explicit Crew(int num_threads) : places(new Place[(size_t)num_threads]), num_threads(num_threads) {}

  static uint64_t stretch(int begin, int end) { return (uint64_t)end << 32 | (uint32_t)begin; }
  static int begin(uint64_t stretch) { return (int)(uint32_t)stretch; }
  static int end(uint64_t stretch) { return (int)(stretch >> 32); }
  int first(int count, int thread) const { return (int)((int64_t)count * thread / num_threads); }
  static bool is_offered(const Place& place) { return place.turn.load(std::memory_order_acquire) == Turn::Offered; }

  void offer() {
    for (int t = 1; t < num_threads; ++t) places[(size_t)t].turn.store(Turn::Offered, std::memory_order_release);
    std::atomic_thread_fence(std::memory_order_seq_cst);  // either a worker sees the offer, or this that it sleeps
    if (!is_any_asleep.load(std::memory_order_relaxed)) return;
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

  // Asks, until a job is offered, for what this thread has of it.
  void ask_for(const Pieces& pieces, int thread) const {
    const uint8_t* p = pieces.data + (size_t)first(pieces.count, thread) * pieces.bytes;
    const uint8_t* end = pieces.data + (size_t)first(pieces.count, thread + 1) * pieces.bytes;
    for (end = std::min(end, p + kAskBytes); p < end && !is_offered(places[(size_t)thread]); p += 64) __builtin_prefetch(p, 0, 2);
  }

  void work(int thread) {
    Place& place = places[(size_t)thread];
    for (;;) {
      for (Patience patience; !is_offered(place) && patience.wait();) {}
      if (!is_offered(place)) {
        std::unique_lock<std::mutex> lock(mutex);
        while (!is_offered(place)) {
          is_any_asleep.store(true, std::memory_order_relaxed);
          std::atomic_thread_fence(std::memory_order_seq_cst);
          if (!is_offered(place)) wake.wait(lock);
        }
      }
      if (stop) return;
      Turn offered = Turn::Offered;
      if (!place.turn.compare_exchange_strong(offered, Turn::Joined, std::memory_order_acquire)) continue;
      for (int i; (i = take(thread)) >= 0;) place.call(place.context, i, thread);
      const Pieces pieces = place.next;
      place.turn.store(Turn::Over, std::memory_order_release);
      ask_for(pieces, thread);
    }
  }

  void run(Call call, const void* context, int count, const Pieces& next) {
    for (int t = 0; t < num_threads; ++t) {
      Place& place = places[(size_t)t];
      place.stretch.store(stretch(first(count, t), first(count, t + 1)), std::memory_order_relaxed);
      place.call = call;
      place.context = context;
      place.next = next;
    }
    offer();
    for (int i; (i = take(0)) >= 0;) call(context, i, 0);
    for (int t = 1; t < num_threads; ++t) {
      std::atomic<Turn>& turn = places[(size_t)t].turn;
      Turn offered = Turn::Offered;
      if (turn.compare_exchange_strong(offered, Turn::Over, std::memory_order_acquire)) continue;
      for (Patience patience; turn.load(std::memory_order_acquire) != Turn::Over;)
        if (!patience.wait()) std::this_thread::yield();
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
  crew_->offer();
  for (auto& worker : crew_->workers) worker.join();
}

bool ThreadPool::forked() const { return forks.load(std::memory_order_relaxed) != process_; }

void ThreadPool::run(Call call, const void* context, int count, const Pieces& next) {
  crew_->run(call, context, count, next);
}

}  // namespace autoglm
