// parallel_for over an index range; the only native threads that compute.
//
// Each thread has a stretch of the indices to itself, since what lies side by side in memory is read fastest (two cores of
// Zen 4 that take panels of 75 kB in turns: 30 GB/s, each from a stretch of its own: 40); who is done takes half of what
// another has left. Workers spin for about a tenth of a millisecond after each job and then sleep, so that the dozen jobs
// of a layer follow each other without a system call and an idle server uses no CPU. A worker whose core runs another
// program is waited for only once it has begun. A forked child has no workers: there the pool runs alone, and lets go of
// what it cannot join.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace autoglm {

// What a job reads from memory: so many bytes for each index, one behind the other.
struct Pieces { const uint8_t* data = nullptr; size_t bytes = 0; int count = 0; };

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return num_workers_ + 1; }

  // Calls f(index, thread) once for every index in 0..count-1; the caller is thread 0 and takes part. A worker that is
  // done asks for what it will probably read first of `next`, which need not come.
  template <class F>
  void parallel_for(int count, const F& f, const Pieces& next = {}) {
    if (count <= 0) return;
    if (count == 1 || num_workers_ == 0 || forked()) {
      for (int i = 0; i < count; ++i) f(i, 0);
      return;
    }
    run([](const void* ctx, int index, int thread) { (*(const F*)ctx)(index, thread); }, &f, count, next);
  }

 private:
  using Call = void (*)(const void*, int, int);
  struct Crew;  // the threads and what they share
  bool forked() const;
  void run(Call call, const void* context, int count, const Pieces& next);

  int num_workers_;
  int process_;  // how many forks lay before the process that made the crew
  std::unique_ptr<Crew> crew_;
};

}  // namespace autoglm
