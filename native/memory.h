// Zeroed memory in huge pages where the system grants them: alone, or as a piece of pages that others share.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
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

// Memory for many matrices, most of them smaller than a huge page: each is cut from a slab that is in huge pages.
// The system hands out memory eight times as fast in pages of 2 MB as in pages of 4 kB.
class Slabs {
 public:
  struct Piece {
    std::shared_ptr<Pages> pages;  // kept by all of its pieces
    uint8_t* data = nullptr;       // 64-byte aligned
    size_t bytes = 0;
  };

  Piece cut(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > kSlab / 4) {
      auto own = std::make_shared<Pages>(bytes);
      return {own, own->data(), bytes};
    }
    if (!slab_ || slab_->size() - used_ < bytes) {
      slab_ = std::make_shared<Pages>(kSlab);
      used_ = 0;
    }
    used_ += bytes;
    return {slab_, slab_->data() + used_ - bytes, bytes};
  }

 private:
  static constexpr size_t kSlab = (size_t)16 << 20;
  std::mutex mutex_;
  std::shared_ptr<Pages> slab_;
  size_t used_ = 0;
};

}  // namespace autoglm
