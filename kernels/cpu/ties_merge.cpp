// TIES without a sort. A sample of each delta tells about where the least magnitude to keep lies;
// one pass over the delta picks out what is near there, and it is found exactly among that. Where
// the sample misled, two passes count the magnitudes by their bits instead. One pass over all
// deltas then elects signs and takes the disjoint mean.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
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

float magnitude_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// How many of `nonzeros` entries to keep.
int64_t kept(double density, int64_t nonzeros) {
  const auto rank = static_cast<int64_t>(std::ceil(density * static_cast<double>(nonzeros)));
  return rank < 1 ? 1 : rank > nonzeros ? nonzeros : rank;
}

// Magnitudes, as bits, that the least kept one most likely lies between.
struct Range {
  uint32_t low;
  uint32_t high;
};

// False where there is too little to take a sample from.
bool guess(const float* delta, int64_t size, double density, Range* range) {
  constexpr int64_t kPiece = 64;
  constexpr int64_t kMostPieces = 1024;
  constexpr int64_t kOneIn = 32;
  const int64_t most = size / (kPiece * kOneIn);
  const int64_t pieces = most < kMostPieces ? most : kMostPieces;
  std::vector<uint32_t> sample(static_cast<std::size_t>(pieces * kPiece));
  int64_t n = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    uint32_t bits[kPiece];
    std::memcpy(bits, delta + size / pieces * piece, sizeof bits);
    for (const uint32_t pattern : bits) {
      sample[static_cast<std::size_t>(n)] = pattern & 0x7fffffffu;
      n += sample[static_cast<std::size_t>(n)] != 0;
    }
  }
  if (n < 1000) return false;
  // Five standard deviations to either side.
  const double spread = 5.0 * std::sqrt(static_cast<double>(n) * density * (1.0 - density)) + 8.0;
  const double rank = density * static_cast<double>(n);
  const auto from_top = [&](double place) {
    const auto nth = sample.begin() + static_cast<std::ptrdiff_t>(place);
    std::nth_element(sample.begin(), nth, sample.begin() + n, std::greater<>());
    return *nth;
  };
  range->high = rank - spread < 0.0 ? 0x7fffffffu : from_top(rank - spread);
  range->low = rank + spread >= static_cast<double>(n) ? 1u : from_top(rank + spread);
  return true;
}

// The least magnitude to keep, if it is within the range.
bool find_within(const Range& range, const float* delta, int64_t size, double density, float* least,
                 ParallelFor parallel) {
  const auto pick = table().pick;
  std::vector<uint32_t> found;
  int64_t nonzeros = 0;
  int64_t above = 0;
  bool complete = true;
  std::mutex mutex;
  run(parallel, size, kGrain, [&](int64_t begin, int64_t end) {
    const int64_t room = (end - begin) / 4 + 64;
    const Buffer<float> mine = buffer<float>(room);
    int64_t my_nonzeros = 0;
    int64_t my_above = 0;
    const int64_t n = pick(delta + begin, end - begin, range.low, range.high, mine.get(), room,
                           &my_nonzeros, &my_above);
    const std::lock_guard<std::mutex> lock(mutex);
    nonzeros += my_nonzeros;
    above += my_above;
    complete = complete && n + 16 <= room;
    const std::size_t before = found.size();
    found.resize(before + static_cast<std::size_t>(n));
    std::memcpy(found.data() + before, mine.get(), sizeof(float) * static_cast<std::size_t>(n));
  });
  if (!complete || nonzeros == 0) return false;
  const int64_t rank = kept(density, nonzeros) - above;
  if (rank < 1 || rank > static_cast<int64_t>(found.size())) return false;
  const auto nth = found.begin() + (rank - 1);
  std::nth_element(found.begin(), nth, found.end(), std::greater<>());
  *least = magnitude_of(*nth);
  return true;
}

// The least magnitude among the kept: the ceil(density * n)-th largest of the n that are not zero.
float threshold(const float* delta, int64_t size, double density, ParallelFor parallel) {
  Range range;
  float least;
  if (guess(delta, size, density, &range) &&
      find_within(range, delta, size, density, &least, parallel)) {
    return least;
  }
  const Table& kernels = table();
  const std::vector<int64_t> high = histogram(
      size, kHighBins,
      [&](int64_t from, int64_t length, uint32_t* bins) {
        kernels.count_high(delta + from, length, bins);
      },
      parallel);
  int64_t nonzeros = 0;
  for (const int64_t count : high) nonzeros += count;
  if (nonzeros == 0) return 0.0f;
  int64_t rank = kept(density, nonzeros);
  const uint32_t prefix = bin_from_top(high, &rank);
  const std::vector<int64_t> low = histogram(
      size, kLowBins,
      [&](int64_t from, int64_t length, uint32_t* bins) {
        kernels.count_low(delta + from, length, prefix, bins);
      },
      parallel);
  return magnitude_of(prefix << 16 | bin_from_top(low, &rank));
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
