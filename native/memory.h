// Zeroed memory in huge pages where the system grants them: alone, or as a piece of pages that others share.
#pragma once
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace autoglm {

class Pages {
 public:
  Pages() = default;
  // in_huge: in pages of 2 MB where they fit, which are handed out whole on first use.
  explicit Pages(size_t bytes, bool in_huge = true) : bytes_(bytes) {
    if (!bytes) return;
    // Huge pages begin at multiples of their size: map more than asked and start at the next one.
    in_huge = in_huge && bytes >= 2 * kHuge;
    mapped_ = bytes + (in_huge ? kHuge : 0);
    void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = p;
    if (in_huge) p = (void*)(((uintptr_t)p + kHuge - 1) & ~(uintptr_t)(kHuge - 1));
    data_ = (uint8_t*)p;
    if (in_huge) advise_huge(true);  // one TLB entry for 2 MB: weights are streamed whole every token
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

  // What is used for the first time from now on is handed out in huge pages, or is not.
  void advise_huge(bool in_huge) const {
#ifdef MADV_HUGEPAGE
    (void)madvise(data_, bytes_, in_huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#else
    (void)in_huge;
#endif
  }

  // Has the system hand out these bytes now, whoever else uses them meanwhile; they are handed out on first use if it
  // does not know how (Linux before 5.14). Returns the seconds it worked for this thread, which others may interrupt.
  double populate(size_t begin, size_t bytes) const {
    const double before = cpu_seconds();
#ifdef __linux__
    constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack
    advise_pages(begin, bytes, kPopulateWrite);
#else
    (void)begin, (void)bytes;
#endif
    return cpu_seconds() - before;
  }

  // Copies the huge page at `begin`, whoever else uses it meanwhile, out of small ones: if there are some, and memory for
  // it, and the system knows how (Linux 6.1).
  void collapse(size_t begin) const {
#ifdef __linux__
    constexpr int kCollapse = 25;  // MADV_COLLAPSE
    advise_pages(begin, kHuge, kCollapse);
#else
    (void)begin;
#endif
  }

  static constexpr size_t kHuge = (size_t)2 << 20;
  // A huge page that takes longer is slow to get, however slow a machine is at clearing 2 MB.
  static constexpr double kSlow = 1e-3;

 private:
  static double cpu_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
  }

  void advise_pages(size_t begin, size_t bytes, int advice) const {
    constexpr uintptr_t kPage = 4096;
    const uintptr_t first = (uintptr_t)(data_ + begin) & ~(kPage - 1);
    const uintptr_t end = (uintptr_t)(data_ + std::min(bytes_, begin + bytes));
    if (first < end) (void)madvise((void*)first, (size_t)(end - first), advice);
  }

  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  void* base_ = nullptr;
  size_t mapped_ = 0;
};

// Memory for many matrices, most of them smaller than a huge page: each is cut from a slab that is in huge pages.
//
// A system with memory at hand gives pages of 2 MB eight times as fast as pages of 4 kB. A virtual machine's may have told
// its host that it does not need them, which then finds each anew: 4.5 ms a page, where 512 small ones, which are never
// given back, took 0.7 (2 cores of an AMD EPYC, 2026-11-30). So once a huge page took long the rest comes in small ones,
// and collapse() makes huge ones of them when there is time.
class Slabs {
 public:
  struct Slab {
    Pages pages;
    std::atomic<bool> is_small{false};  // asked for in small pages from some time on
    explicit Slab(size_t bytes) : pages(bytes) {}
  };
  // slow_page_s: a page of 2 MB that takes longer to be handed out makes the system one that is slow at it.
  explicit Slabs(double slow_page_s) : slow_page_s_(slow_page_s) {}

  struct Piece {
    std::shared_ptr<Slab> slab;  // kept by all of its pieces
    uint8_t* data = nullptr;     // 64-byte aligned
    size_t bytes = 0;
  };

  Piece cut(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > kSlab / 4) {
      const auto own = make(bytes);
      return {own, own->pages.data(), bytes};
    }
    if (!slab_ || slab_->pages.size() - used_ < bytes) {
      slab_ = make(kSlab);
      used_ = 0;
    }
    used_ += bytes;
    return {slab_, slab_->pages.data() + used_ - bytes, bytes};
  }

  // Has bytes of a piece handed out that are about to be written; of fewer than a huge page at a time.
  void hand_out(const Piece& piece, size_t begin, size_t bytes) {
    Slab& slab = *piece.slab;
    if (is_slow_ && !slab.is_small.exchange(true)) slab.pages.advise_huge(false);
    const double took = slab.pages.populate((size_t)(piece.data - slab.pages.data()) + begin, bytes);
    if (!slab.is_small && took > slow_page_s_) is_slow_ = true;
  }

  // Makes the next huge page out of small ones, and waits for it; false once there are no more.
  bool collapse() {
    const std::shared_ptr<Slab> slab = next_small();
    if (!slab) return false;
    if (!next_page_) slab->pages.advise_huge(true);
    slab->pages.collapse(next_page_);
    next_page_ += Pages::kHuge;
    return true;
  }

 private:
  static constexpr size_t kSlab = (size_t)16 << 20;

  std::shared_ptr<Slab> next_small() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (; next_slab_ < all_.size(); ++next_slab_, next_page_ = 0) {
      const std::shared_ptr<Slab> slab = all_[next_slab_].lock();
      if (slab && slab->is_small && next_page_ + Pages::kHuge <= slab->pages.size()) return slab;
    }
    return nullptr;
  }

  std::shared_ptr<Slab> make(size_t bytes) {
    auto slab = std::make_shared<Slab>(bytes);
    all_.push_back(slab);
    return slab;
  }

  const double slow_page_s_;
  std::mutex mutex_;
  std::shared_ptr<Slab> slab_;
  size_t used_ = 0;
  std::vector<std::weak_ptr<Slab>> all_;
  std::atomic<bool> is_slow_{false};
  size_t next_slab_ = 0, next_page_ = 0;  // of collapse()
};

}  // namespace autoglm
