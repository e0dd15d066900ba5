// Page-aligned zeroed memory in huge pages where the system grants them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#include <sys/mman.h>

namespace autoglm {

class Pages {
 public:
  Pages() = default;
  explicit Pages(size_t bytes) : bytes_(bytes) {
    if (!bytes) return;
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(p, bytes, MADV_HUGEPAGE);  // one TLB entry for 2 MB: weights are streamed whole every token
#endif
    data_ = (uint8_t*)p;
  }
  ~Pages() {
    if (data_) munmap(data_, bytes_);
  }
  Pages(Pages&& o) noexcept : data_(std::exchange(o.data_, nullptr)), bytes_(std::exchange(o.bytes_, 0)) {}
  Pages& operator=(Pages&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(bytes_, o.bytes_);
    return *this;
  }
  uint8_t* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace autoglm
