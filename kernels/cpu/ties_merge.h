// Counting magnitudes and merging, written once for every instruction set (kernels_*.cpp only).
#pragma once

#include "kernels/cpu/span.h"

namespace wise::WISE_ISA {

inline constexpr int64_t kBatch = 512;

// Gathers the bit patterns that `chosen` picks, a batch at a time, and passes each to `count`:
// picking is done by wide registers, and counting needs no branch for what was not picked.
template <typename Chosen, typename Count>
void for_each_chosen(const float* values, int64_t size, const Chosen& chosen, const Count& count) {
  alignas(64) float found[kBatch + 16];
  for (int64_t start = 0; start < size; start += kBatch) {
    const int64_t stop = start + kBatch < size ? start + kBatch : size;
    int64_t n = 0;
    for (int64_t i = start; i < stop; i += 16) {
      // Zeros, which pad the end, are never chosen.
      const Vec sixteen = load_left(values + i, stop - i);
      const uint32_t mask = chosen(sixteen);
      sixteen.compress(mask, found + n);
      n += __builtin_popcount(mask);
    }
    for (int64_t j = 0; j < n; ++j) count(as_bits(found[j]) & 0x7fffffffu);
  }
}

inline void count_high(const float* values, int64_t count, uint32_t* bins) {
  for_each_chosen(
      values, count, [](const Vec& v) { return nonzero(v); },
      [bins](uint32_t magnitude) { ++bins[magnitude >> 16]; });
}

inline void count_low(const float* values, int64_t count, uint32_t prefix, uint32_t* bins) {
  // A zero shares its top bits with the smallest subnormals.
  for_each_chosen(
      values, count, [prefix](const Vec& v) { return high_bits_are(v, prefix) & nonzero(v); },
      [bins](uint32_t magnitude) { ++bins[magnitude & 0xffffu]; });
}

inline int64_t pick(const float* values, int64_t count, uint32_t low, uint32_t high, float* found,
                    int64_t room, int64_t* nonzeros, int64_t* above) {
  int64_t n = 0;
  int64_t not_zero = 0;
  int64_t over = 0;
  for (int64_t i = 0; i < count && n + 16 <= room; i += 16) {
    const Vec sixteen = load_left(values + i, count - i);
    const uint32_t higher = bits_above(sixteen, high);
    const uint32_t picked = bits_above(sixteen, low - 1) & ~higher;
    not_zero += __builtin_popcount(nonzero(sixteen));
    over += __builtin_popcount(higher);
    magnitude(sixteen).compress(picked, found + n);
    n += __builtin_popcount(picked);
  }
  *nonzeros += not_zero;
  *above += over;
  return n;
}

// Sixteen elements of the merge.
template <typename Load>
inline Vec merge_sixteen(const float* weights, const float* thresholds, int64_t deltas_count,
                         const Load& load) {
  const Vec zero = Vec::zero();
  Vec total = zero;
  for (int64_t d = 0; d < deltas_count; ++d) {
    const Vec delta = load(d);
    const Vec least = Vec::all(thresholds[d]);
    total = total + where_at_least(magnitude(delta), least, delta * Vec::all(weights[d]));
  }
  const Vec sign = where_at_least(total, zero, Vec::all(2.0f)) - Vec::all(1.0f);
  Vec numerator = zero;
  Vec denominator = zero;
  for (int64_t d = 0; d < deltas_count; ++d) {
    const Vec delta = load(d);
    const Vec least = Vec::all(thresholds[d]);
    const Vec weight = Vec::all(weights[d]);
    // Of the elected sign: turned by it, the value is positive, and so not zero either.
    const Vec turned = delta * sign;
    numerator = numerator +
                where_above(turned, zero, where_at_least(magnitude(delta), least, delta * weight));
    denominator =
        denominator + where_above(turned, zero, where_at_least(magnitude(delta), least, weight));
  }
  return where_above(denominator, zero, numerator / denominator);
}

inline void merge(const float* const* deltas, const float* weights, const float* thresholds,
                  int64_t deltas_count, int64_t begin, int64_t end, float* out) {
  int64_t i = begin;
  for (; i + 16 <= end; i += 16) {
    merge_sixteen(weights, thresholds, deltas_count, [&](int64_t d) {
      return Vec::load(deltas[d] + i);
    }).store(out + i);
  }
  if (i == end) return;
  const Vec last = merge_sixteen(weights, thresholds, deltas_count,
                                 [&](int64_t d) { return load_left(deltas[d] + i, end - i); });
  store_left(last, out + i, end - i);
}

}  // namespace wise::WISE_ISA
