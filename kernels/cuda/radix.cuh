// Selecting the n-th largest magnitude exactly by its bits, for host and device: tests call these
// same functions on the CPU. Three passes count the 31 bits of a magnitude 11, 10 and 10 at a time:
// their counters fit 8 KiB of shared memory.
#pragma once

#include "kernels/cuda/half.cuh"

namespace wise::cuda {

inline constexpr int kPasses = 3;
inline constexpr int kMaxBins = 2048;

// The digit a pass counts: `bits` of them, of which the lowest is bit `shift` of the magnitude.
struct Digit {
  int shift;
  int bits;

  __host__ __device__ constexpr int bins() const { return 1 << bits; }
};

__host__ __device__ constexpr Digit digit_of(int pass) {
  return pass == 0 ? Digit{20, 11} : pass == 1 ? Digit{10, 10} : Digit{0, 10};
}

// Where a pass's counters begin among all of a delta's, and how many there are in all.
__host__ __device__ constexpr int bins_before(int pass) {
  return pass == 0 ? 0 : pass == 1 ? 2048 : pass == 2 ? 3072 : 4096;
}
inline constexpr int kAllBins = bins_before(kPasses);

// The bin of a float in a pass, -1 where it is not counted: zeros never are, and later passes count
// only what has the digits found so far (`prefix`, the magnitude above the digit).
__host__ __device__ __forceinline__ int bin_of(uint32_t bits, Digit digit, uint32_t prefix) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude == 0 || magnitude >> (digit.shift + digit.bits) != prefix) return -1;
  return static_cast<int>(magnitude >> digit.shift & ((1u << digit.bits) - 1u));
}

// How many of the non-zero entries stay: as many as the CPU's kernel says, to the last bit.
__host__ __device__ __forceinline__ int64_t rank_to_keep(double density, int64_t nonzero) {
  const auto rank = static_cast<int64_t>(ceil(density * static_cast<double>(nonzero)));
  return rank < 1 ? 1 : rank > nonzero ? nonzero : rank;
}

// One delta on its way to its threshold.
struct Selection {
  uint32_t prefix;  // the threshold's digits found so far
  float threshold;  // valid after the last pass
  int64_t rank;     // of the threshold among what has the prefix, from the largest, from 1
};

// Whether the rank-th largest is in a bin of `count` entries with `above` entries in larger bins.
__host__ __device__ __forceinline__ bool bin_holds(int64_t rank, int64_t above, int64_t count) {
  return above < rank && rank <= above + count;
}

// The state after a pass that found `bin`.
__host__ __device__ __forceinline__ Selection narrowed(const Selection& selection, Digit digit,
                                                       int bin, int64_t above) {
  const uint32_t prefix = selection.prefix << digit.bits | static_cast<uint32_t>(bin);
  return {prefix, float_of(prefix), selection.rank - above};
}

// One entry's way into the merge, as the CPU has it: whatever is not at least the threshold, a NaN
// too, counts as zero; of both signs everything is kept until it is known which is elected.
struct Merging {
  float total = 0.0f;
  float positive = 0.0f;
  float positive_weight = 0.0f;
  float negative = 0.0f;
  float negative_weight = 0.0f;
};

// Each product and sum is rounded: a fused one would not be the CPU's.
#ifdef __CUDA_ARCH__
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float rounded_sum(float a, float b) { return __fadd_rn(a, b); }
#else
inline float rounded_product(float a, float b) { return a * b; }
inline float rounded_sum(float a, float b) { return a + b; }
#endif

__host__ __device__ __forceinline__ void merge_entry(Merging& merging, float delta, float weight,
                                                     float threshold) {
  const bool kept = float_of(bits_of(delta) & 0x7fffffffu) >= threshold;
  const float weighted = kept ? rounded_product(delta, weight) : 0.0f;
  const float counted = kept ? weight : 0.0f;
  merging.total = rounded_sum(merging.total, weighted);
  if (delta > 0.0f) {
    merging.positive = rounded_sum(merging.positive, weighted);
    merging.positive_weight = rounded_sum(merging.positive_weight, counted);
  }
  if (delta < 0.0f) {
    merging.negative = rounded_sum(merging.negative, weighted);
    merging.negative_weight = rounded_sum(merging.negative_weight, counted);
  }
}

// The disjoint mean over the elected sign; a total of zero elects plus, NaN minus.
__host__ __device__ __forceinline__ float merged(const Merging& merging) {
  const bool plus = merging.total >= 0.0f;
  const float numerator = plus ? merging.positive : merging.negative;
  const float denominator = plus ? merging.positive_weight : merging.negative_weight;
  return denominator > 0.0f ? numerator / denominator : 0.0f;
}

}  // namespace wise::cuda
