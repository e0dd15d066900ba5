// parallel_for over an index range; the only native threads of the program.
//
// Workers spin for about a tenth of a millisecond after each job and then sleep, so that the dozen jobs
// of a layer follow each other without a system call and an idle server uses no CPU.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace autoglm {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return (int)workers_.size() + 1; }

  // Calls f(index, thread) once for every index in 0..count-1; the caller is thread 0 and takes part.
  template <class F>
  void parallel_for(int count, const F& f) {
    if (count <= 0) return;
    if (count == 1 || workers_.empty()) {
      for (int i = 0; i < count; ++i) f(i, 0);
      return;
    }
    run([](const void* ctx, int index, int thread) { (*(const F*)ctx)(index, thread); }, &f, count);
  }

 private:
  using Call = void (*)(const void*, int, int);
  void run(Call call, const void* context, int count);
  void work(int thread);
  void take(int thread);

  std::vector<std::thread> workers_;
  alignas(64) std::atomic<uint64_t> generation_{0};
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<int> pending_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<bool> stop_{false};
  Call call_ = nullptr;
  const void* context_ = nullptr;
  int count_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace autoglm
