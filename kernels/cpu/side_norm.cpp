// side_norm: the products of a block of packed rows are squared and summed at once, in double, and
// the blocks' sums are added in their order: nothing of the size of D x exists, and the number of
// threads does not show.
#include <atomic>
#include <cmath>

#include "kernels/cpu/driver.h"
#include "kernels/cpu/routed_rows.h"
#include "kernels/cpu/table.h"

namespace wise {

bool side_norm(const Packed& bank, const Matrix& x, const int32_t* rows, const int32_t* shards,
               int64_t pairs, float* norms, ParallelFor parallel) {
  const Groups groups(shards, pairs, bank.shards);
  const int64_t blocks = divide_up(bank.rows, kTileRows);
  const int64_t most = pairs < kMaxRows ? pairs : kMaxRows;
  const Buffer<double> partial = buffer<double>(blocks * most);
  const Buffer<int64_t> wanted = buffer<int64_t>(most);
  RoutedRows routed(x, bank, pairs);
  std::atomic<bool> good{true};
  for (int64_t first = 0; first < pairs; first += kMaxRows) {
    const int64_t last = first + kMaxRows < pairs ? first + kMaxRows : pairs;
    for (int64_t p = first; p < last; ++p) wanted[p - first] = rows[groups.order()[p]];
    routed.gather(groups, first, last, wanted.get(), parallel);
    const auto sum_squares = [&](int64_t from, int64_t to, int64_t r0, int64_t r1,
                                 const float* side) {
      const int64_t n = to - from;
      for (int64_t b0 = r0; b0 < r1; b0 += kTileRows) {
        const int64_t b1 = b0 + kTileRows < r1 ? b0 + kTileRows : r1;
        for (int64_t i = 0; i < n; ++i) {
          double sum = 0.0;
          for (int64_t r = b0; r < b1; ++r) {
            const double value = side[(r - r0) * n + i];
            sum += value * value;
          }
          partial[b0 / kTileRows * most + from - first + i] = sum;
        }
      }
    };
    const int64_t cost = kTileRows * bank.columns / 8 * (last - first);
    run(parallel, blocks, grain_for(cost), [&](int64_t begin, int64_t end) {
      const int64_t r1 = end * kTileRows < bank.rows ? end * kTileRows : bank.rows;
      if (!each_product(bank, groups, first, last, routed, begin * kTileRows, r1, sum_squares)) {
        good = false;
      }
    });
    if (!good) return false;
    for (int64_t p = first; p < last; ++p) {
      double sum = 0.0;
      for (int64_t block = 0; block < blocks; ++block) sum += partial[block * most + p - first];
      norms[groups.order()[p]] = static_cast<float>(std::sqrt(sum));
    }
  }
  return good;
}

}  // namespace wise
