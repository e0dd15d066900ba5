// Reads and repacks the matrices of one file on a thread of its own, so that whoever asked for them can go on.
//
// A matrix is there at once, with its shape and memory; its contents come when its turn does, in the order asked for.
// Whoever computes waits for it: Matrix::wait. A file that cannot be read fails every matrix still to come.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

#include "tensor_file.h"
#include "thread_pool.h"
#include "weights.h"

namespace autoglm {

class WeightLoader {
 public:
  // The pool serves one caller at a time: whoever holds `in_use`.
  WeightLoader(int fd, ThreadPool& pool, std::mutex& in_use);
  // Finishes what was asked for: others hold the matrices.
  ~WeightLoader();

  const TensorFile& file() const { return file_; }
  void add(std::shared_ptr<Matrix> matrix, uint64_t offset);
  // Waits for at most so long; whether all that was asked for is there. Throws ReadError.
  bool wait(double seconds);
  // Gives up what has not begun, and waits for the rest.
  void stop();
  // Bytes of the file that are done with.
  uint64_t done_bytes() const;

 private:
  struct Job {
    std::shared_ptr<Matrix> matrix;
    uint64_t offset;
  };
  void work();

  TensorFile file_;
  ThreadPool& pool_;
  std::mutex& in_use_;
  ThreadPool beside_;  // reads a small file until somebody waits: one core is left to whoever goes on
  const bool is_small_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;  // the first is being worked on
  uint64_t done_bytes_ = 0;
  int failed_ = 0;
  bool stop_ = false, is_waited_for_ = false;
  std::thread thread_;  // from the first job to the end
};

}  // namespace autoglm
