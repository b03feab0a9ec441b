// Helpers of the driving translation units (never included by kernels_*.cpp, see table.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "kernels/cpu/kernels.h"

namespace wise {

inline constexpr std::size_t kCacheLine = 64;

struct FreeAligned {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{kCacheLine}); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], FreeAligned>;

// `count` uninitialised elements on a cache line's boundary.
template <typename T>
Buffer<T> buffer(int64_t count) {
  static_assert(std::is_trivial_v<T>);
  const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(count > 0 ? count : 1);
  return Buffer<T>(static_cast<T*>(::operator new(bytes, std::align_val_t{kCacheLine})));
}

// body(begin, end) over the pieces of [0, count).
template <typename F>
void run(ParallelFor parallel, int64_t count, int64_t grain, const F& body) {
  if (count <= 0) return;
  parallel(
      count, grain < 1 ? 1 : grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Items of `cost` operations each that make up about twenty microseconds: less is not worth a
// second thread.
inline int64_t grain_for(int64_t cost) { return divide_up(32768, cost > 0 ? cost : 1); }

}  // namespace wise
