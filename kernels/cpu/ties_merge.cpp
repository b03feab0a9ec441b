// TIES without a sort: two passes count each delta's magnitudes by their bits, which finds the
// least magnitude to keep exactly; one pass then elects signs and takes the disjoint mean.
#include <cmath>
#include <cstring>
#include <mutex>
#include <vector>

#include "kernels/cpu/driver.h"
#include "kernels/cpu/table.h"

namespace wise {

namespace {

constexpr int64_t kGrain = int64_t{1} << 16;

// Adds up `bins` counters over an array; integers, so that the order of the sums is no matter.
template <typename Count>
std::vector<int64_t> histogram(int64_t size, int64_t bins, const Count& count,
                               ParallelFor parallel) {
  std::vector<int64_t> total(static_cast<std::size_t>(bins), 0);
  std::mutex mutex;
  run(parallel, size, kGrain, [&](int64_t begin, int64_t end) {
    const Buffer<uint32_t> mine = buffer<uint32_t>(bins);
    // A 32-bit counter holds any piece of fewer elements than this.
    constexpr int64_t kPiece = int64_t{1} << 31;
    for (int64_t from = begin; from < end; from += kPiece) {
      const int64_t length = end - from < kPiece ? end - from : kPiece;
      std::memset(mine.get(), 0, sizeof(uint32_t) * static_cast<std::size_t>(bins));
      count(from, length, mine.get());
      const std::lock_guard<std::mutex> lock(mutex);
      for (int64_t b = 0; b < bins; ++b) total[static_cast<std::size_t>(b)] += mine[b];
    }
  });
  return total;
}

// The bin that holds the `rank`-th element from the top, 1-based; lowers rank to that within it.
uint32_t bin_from_top(const std::vector<int64_t>& bins, int64_t* rank) {
  std::size_t bin = bins.size() - 1;
  for (; bin > 0 && bins[bin] < *rank; --bin) *rank -= bins[bin];
  return static_cast<uint32_t>(bin);
}

// The least magnitude among the kept: the ceil(density * n)-th largest of the n that are not zero.
float threshold(const float* delta, int64_t size, double density, ParallelFor parallel) {
  const Table& kernels = table();
  const std::vector<int64_t> high = histogram(
      size, kHighBins,
      [&](int64_t from, int64_t length, uint32_t* bins) {
        kernels.count_high(delta + from, length, bins);
      },
      parallel);
  int64_t nonzero = 0;
  for (const int64_t count : high) nonzero += count;
  if (nonzero == 0) return 0.0f;
  int64_t rank = static_cast<int64_t>(std::ceil(density * static_cast<double>(nonzero)));
  rank = rank < 1 ? 1 : rank > nonzero ? nonzero : rank;
  const uint32_t prefix = bin_from_top(high, &rank);
  const std::vector<int64_t> low = histogram(
      size, kLowBins,
      [&](int64_t from, int64_t length, uint32_t* bins) {
        kernels.count_low(delta + from, length, prefix, bins);
      },
      parallel);
  const uint32_t bits = prefix << 16 | bin_from_top(low, &rank);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

void ties_merge(const float* const* deltas, const float* weights, int64_t deltas_count,
                int64_t size, double density, float* out, ParallelFor parallel) {
  std::vector<float> thresholds(static_cast<std::size_t>(deltas_count), 0.0f);
  for (int64_t d = 0; density < 1.0 && d < deltas_count; ++d) {
    thresholds[static_cast<std::size_t>(d)] = threshold(deltas[d], size, density, parallel);
  }
  const auto merge = table().merge;
  run(parallel, size, kGrain / deltas_count, [&](int64_t begin, int64_t end) {
    merge(deltas, weights, thresholds.data(), deltas_count, begin, end, out);
  });
}

}  // namespace wise
