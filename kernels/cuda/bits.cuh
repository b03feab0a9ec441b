// Arithmetic on mask words, for host and device: tests call these same functions on the CPU.
#pragma once

#include "kernels/cuda/simt.cuh"

namespace wise::cuda {

__host__ __device__ __forceinline__ int popcount(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

__host__ __device__ constexpr int64_t divide_up(int64_t count, int64_t by) {
  return (count + by - 1) / by;
}

// Mask words a row of this many columns takes.
__host__ __device__ constexpr int64_t words_of(int64_t columns) { return divide_up(columns, 32); }

// The lowest `count` bits, 0 <= count <= 32.
__host__ __device__ __forceinline__ uint32_t low_bits(int count) {
  return count >= 32 ? ~0u : (1u << count) - 1u;
}

// The bits of word `word` that are columns at all: all of them, except in a row's last word.
__host__ __device__ __forceinline__ uint32_t valid_bits(int64_t word, int64_t columns) {
  const int64_t left = columns - 32 * word;
  return left >= 32 ? ~0u : left <= 0 ? 0u : low_bits(static_cast<int>(left));
}

// Set bits below `bit`: where the value of column `bit` is among the word's values.
__host__ __device__ __forceinline__ int rank_of(uint32_t bits, int bit) {
  return popcount(bits & low_bits(bit));
}

// The position of the n-th set bit, counted from 0; 32 where there are no more than n.
__host__ __device__ __forceinline__ int select_bit(uint32_t bits, int n) {
  if (n >= popcount(bits)) return 32;
  int position = 0;
  for (int width = 16; width > 0; width /= 2) {
    const int below = popcount((bits >> position) & low_bits(width));
    if (n >= below) {
      n -= below;
      position += width;
    }
  }
  return position;
}

// The `count` bits from `bit` on, bit + count <= 32: one lane's share of a word.
__host__ __device__ __forceinline__ uint32_t bit_field(uint32_t bits, int bit, int count) {
  return (bits >> bit) & low_bits(count);
}

// Whether a packed row can be read: its offsets lie in the values and leave room for what its mask
// has set. Kernels ask this before they follow row_ptr.
__host__ __device__ __forceinline__ bool row_fits(int64_t first, int64_t last, int64_t set,
                                                  int64_t values) {
  return first >= 0 && last <= values && last - first == set;
}

}  // namespace wise::cuda
