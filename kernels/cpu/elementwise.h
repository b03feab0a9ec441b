// Conversions, rounded sums and masking, written once for every instruction set (kernels_*.cpp
// only).
#pragma once

#include "kernels/cpu/span.h"

namespace wise::WISE_ISA {

template <typename T>
void widen(const void* source, int64_t stride, int64_t count, float* target) {
  const T* from = static_cast<const T*>(source);
  int64_t i = 0;
  if (stride == 1) {
    for (; i + 16 <= count; i += 16) Vec::load(from + i).store(target + i);
  }
  for (; i < count; ++i) target[i] = to_float(from[i * stride]);
}

// x in the order that products with packed values of T take it: word by word, the even columns
// before the odd ones.
template <typename T, typename V = Vec>
void arrange(float* x, int64_t words) {
  if constexpr (kSplits<T>) {
    for (; words > 0; --words, x += 32) V::split(x);
  }
}

// Null where x is taken as it is.
template <typename T>
inline constexpr void (*kArrange)(float* x, int64_t words) = kSplits<T> ? arrange<T> : nullptr;

template <typename T>
void add_rounded(void* y, const float* side, int64_t side_stride, int64_t count) {
  T* out = static_cast<T*>(y);
  for (int64_t i = 0; i < count; ++i) from_float(to_float(out[i]) + side[i * side_stride], out + i);
}

template <typename T>
void store_sum(const float* base, const float* side, int64_t count, void* y) {
  T* out = static_cast<T*>(y);
  for (int64_t i = 0; i < count; ++i) from_float(base[i] + side[i], out + i);
}

inline void mask_gradient(float* grad, const uint32_t* mask, int64_t columns, int64_t words,
                          int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    float* row = grad + r * columns;
    for (int64_t w = 0; w < words; ++w) {
      const uint32_t drop = ~mask[r * words + w];
      float* at = row + 32 * w;
      if (32 * (w + 1) <= columns) {
        Vec::zero().store(drop & 0xffffu, at);
        Vec::zero().store(drop >> 16, at + 16);
      } else {
        for (int64_t c = 0; c < columns - 32 * w; ++c) at[c] = drop >> c & 1u ? 0.0f : at[c];
      }
    }
  }
}

}  // namespace wise::WISE_ISA
