// The loading thread: one matrix after another, the pool let go between two, so that a small program need not wait for all.
#include "weight_loader.h"

#include <sys/stat.h>

#include <cerrno>
#include <chrono>

namespace autoglm {
namespace {

// One core reads this much before Python has read its modules. Of a large file the reading is what a start waits for:
// the 9B's layer shapes came 0.3 s later with a core left to Python (2 cores, memory fresh from the host, 2026-11-29).
constexpr int64_t kSmallBytes = 256 << 20;

bool is_small(int fd) {
  struct stat status;
  return fstat(fd, &status) == 0 && status.st_size <= kSmallBytes;
}

}  // namespace

WeightLoader::WeightLoader(int fd, ThreadPool& pool, std::mutex& in_use)
    : file_(fd), pool_(pool), in_use_(in_use), beside_(pool.size() > 2 ? pool.size() - 1 : 1), is_small_(is_small(fd)) {}

WeightLoader::~WeightLoader() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return jobs_.empty(); });
  }
  stop();
}

void WeightLoader::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
  for (Job& job : jobs_) job.matrix->fail(ECANCELED);
  jobs_.clear();
}

void WeightLoader::add(std::shared_ptr<Matrix> matrix, uint64_t offset) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stop_) return matrix->fail(ECANCELED);
    jobs_.push_back({std::move(matrix), offset});
    if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
  }
  changed_.notify_all();
}

bool WeightLoader::wait(double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  is_waited_for_ = true;
  changed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return jobs_.empty(); });
  if (failed_) throw ReadError{failed_};
  return jobs_.empty();
}

uint64_t WeightLoader::done_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return done_bytes_;
}

void WeightLoader::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stop_ || !jobs_.empty(); });
    if (stop_) return;
    const Job job = jobs_.front();
    int code = failed_;
    const bool takes_all = is_waited_for_ || !is_small_;
    lock.unlock();
    if (code) {
      job.matrix->fail(code);
    } else if (takes_all) {
      std::lock_guard<std::mutex> pool_lock(in_use_);
      code = job.matrix->fill({nullptr, &file_, job.offset}, pool_);
    } else {
      code = job.matrix->fill({nullptr, &file_, job.offset}, beside_);
    }
    lock.lock();
    failed_ = code;
    done_bytes_ += job.matrix->source_bytes();
    jobs_.pop_front();
    changed_.notify_all();
  }
}

}  // namespace autoglm
