// Asks for what comes next of an open file while the last part of it is repacked, and for whole files before a start.
//
// Read and not mapped: no page of the file ever counts as this process's memory, and a file that somebody cuts
// short meanwhile is an error here and not a signal that ends the process.
#pragma once
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace autoglm {

class TensorFile {
 public:
  // Duplicates the descriptor: the caller's may be closed. check fd() >= 0 before use.
  explicit TensorFile(int fd) : fd_(dup(fd)) {}
  ~TensorFile() {
    if (fd_ >= 0) close(fd_);
  }
  TensorFile(const TensorFile&) = delete;
  TensorFile& operator=(const TensorFile&) = delete;

  int fd() const { return fd_; }

  // Bytes [offset, offset + n) into out. Returns 0, or what went wrong as errno; kCut: the file ends before them.
  static constexpr int kCut = -1;
  int read(uint64_t offset, size_t n, uint8_t* out) {
    ask_ahead(offset + n);
    while (n) {
      const ssize_t got = pread(fd_, out, n, (off_t)offset);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) return got < 0 ? errno : kCut;
      out += got;
      offset += (uint64_t)got;
      n -= (size_t)got;
    }
    return 0;
  }

 private:
  // Enough for a fast disk's queue while two cores repack; of it no more than is needed is asked at a time.
  static constexpr uint64_t kAhead = 64 << 20, kPiece = 4 << 20;

  // Advice only: whatever fails here, read() still reads.
  void ask_ahead(uint64_t end) {
#ifdef POSIX_FADV_WILLNEED
    uint64_t asked = asked_.load(std::memory_order_relaxed);
    const bool elsewhere = asked < end || asked > end + kAhead;  // the first read, or not in the file's order
    const uint64_t from = elsewhere ? end : asked;
    if (end + kAhead - from < kPiece) return;
    if (asked_.compare_exchange_strong(asked, end + kAhead))
      (void)posix_fadvise(fd_, (off_t)from, (off_t)(end + kAhead - from), POSIX_FADV_WILLNEED);
#else
    (void)end;
#endif
  }

  int fd_;
  std::atomic<uint64_t> asked_{0};  // the file's bytes up to here have been asked for
};

// Asks for whole files on a thread of its own; what is no readable file is passed over.
inline void ask_for_files(std::vector<std::string> paths) {
#ifdef POSIX_FADV_WILLNEED
  std::thread([paths = std::move(paths)] {
    for (const std::string& path : paths) {
      const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe would wait for its writer
      if (fd < 0) continue;
      (void)posix_fadvise(fd, 0, 0, POSIX_FADV_WILLNEED);
      close(fd);
    }
  }).detach();
#else
  (void)paths;
#endif
}

}  // namespace autoglm
