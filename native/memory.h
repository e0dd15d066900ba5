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
    // Huge pages begin at multiples of their size: map more than asked and start at the next one.
    const size_t align = bytes >= 2 * kHuge ? kHuge : 0;
    mapped_ = bytes + align;
    void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = p;
    if (align) p = (void*)(((uintptr_t)p + kHuge - 1) & ~(uintptr_t)(kHuge - 1));
#ifdef MADV_HUGEPAGE
    madvise(p, bytes, MADV_HUGEPAGE);  // one TLB entry for 2 MB: weights are streamed whole every token
#endif
    data_ = (uint8_t*)p;
  }
  ~Pages() {
    if (base_) munmap(base_, mapped_);
  }
  Pages(Pages&& o) noexcept { *this = std::move(o); }
  Pages& operator=(Pages&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(bytes_, o.bytes_);
    std::swap(base_, o.base_);
    std::swap(mapped_, o.mapped_);
    return *this;
  }
  uint8_t* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  static constexpr size_t kHuge = (size_t)2 << 20;
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  void* base_ = nullptr;
  size_t mapped_ = 0;
};

}  // namespace autoglm
