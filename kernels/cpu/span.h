// Rows whose length is no multiple of a register or of a mask word (kernels_*.cpp only).
#pragma once

#include "kernels/cpu/table.h"

namespace wise::WISE_ISA {

// Bytes of stored rows fetched in advance: half a page, which goes on into the next row.
inline constexpr int64_t kAhead = 2048;

// The bits of a row's last mask word that stand for columns.
inline uint32_t tail_mask(int64_t columns) {
  const int64_t rest = columns & 31;
  return rest == 0 ? ~0u : (1u << rest) - 1u;
}

inline int64_t count_bits(const uint32_t* mask, int64_t words, uint32_t tail) {
  int64_t bits = 0;
  for (int64_t w = 0; w + 1 < words; ++w) bits += __builtin_popcount(mask[w]);
  return words > 0 ? bits + __builtin_popcount(mask[words - 1] & tail) : 0;
}

// The 64 bytes from `from` on, of which only the first `count` values are there to be read.
template <typename T>
struct Few {
  alignas(64) T values[64 / sizeof(T)] = {};
  Few(const T* from, int count) { Vec::copy(from, count, values); }
};

// Sixteen floats, the rest zero where fewer are left.
inline Vec load_left(const float* p, int64_t left) {
  if (left >= 16) return Vec::load(p);
  float few[16] = {};
  std::memcpy(few, p, sizeof(float) * static_cast<std::size_t>(left));
  return Vec::load(few);
}

inline void store_left(Vec value, float* p, int64_t left) {
  if (left >= 16) return value.store(p);
  float few[16];
  value.store(few);
  std::memcpy(p, few, sizeof(float) * static_cast<std::size_t>(left));
}

}  // namespace wise::WISE_ISA
