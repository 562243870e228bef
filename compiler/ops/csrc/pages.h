// Memory that kernels stream over.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fxlm {

// Large pages, before the first touch: a stream over small ones waits for address translation.
inline void prefer_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 1 << 21;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// A thread's working memory: grows, never shrinks, forgets what it held when it grows.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // `count` elements from a cache line on; from 2 MiB on in large pages.
  template <class T>
  T* take(int64_t count) {
    constexpr int64_t line = 64, page = 1 << 21;
    const int64_t bytes = count * int64_t(sizeof(T)), unit = bytes < page ? line : page;
    if (bytes > bytes_) {
      std::free(data_);
      bytes_ = (bytes + unit - 1) / unit * unit;
      data_ = std::aligned_alloc(unit, bytes_);
      if (data_ == nullptr) {
        bytes_ = 0;
        throw std::bad_alloc();
      }
      prefer_large_pages(data_, bytes_);
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace fxlm
