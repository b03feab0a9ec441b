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
  const auto dots = table().side_dots[static_cast<int>(bank.dtype)];
  const int64_t blocks = divide_up(bank.rows, kBlockRows);
  const int64_t most = pairs < kMaxRows ? pairs : kMaxRows;
  const Buffer<double> partial = buffer<double>(blocks * most);
  const Buffer<int64_t> wanted = buffer<int64_t>(most);
  RoutedRows routed(x, bank.words, pairs);
  std::atomic<bool> good{true};
  for (int64_t first = 0; first < pairs; first += kMaxRows) {
    const int64_t last = first + kMaxRows < pairs ? first + kMaxRows : pairs;
    for (int64_t p = first; p < last; ++p) wanted[p - first] = rows[groups.order()[p]];
    routed.widen(wanted.get(), last - first, parallel);
    const int64_t cost = kBlockRows * bank.columns / 8 * (last - first);
    run(parallel, blocks, grain_for(cost), [&](int64_t begin, int64_t end) {
      const Buffer<float> scratch = buffer<float>(kScratch);
      const Buffer<float> side = buffer<float>(kBlockRows * kMaxRows);
      groups.each(first, last, [&](int64_t shard, int64_t from, int64_t to) {
        const int64_t n = to - from;
        for (int64_t block = begin; block < end; ++block) {
          const int64_t r0 = block * kBlockRows;
          const int64_t r1 = r0 + kBlockRows < bank.rows ? r0 + kBlockRows : bank.rows;
          const int64_t base = shard * bank.rows;
          if (!dots(bank, base + r0, base + r1, routed.rows() + from - first, n, scratch.get(),
                    side.get())) {
            good = false;
            return;
          }
          for (int64_t i = 0; i < n; ++i) {
            double sum = 0.0;
            for (int64_t r = 0; r < r1 - r0; ++r) {
              const double value = side[r * n + i];
              sum += value * value;
            }
            partial[block * most + from - first + i] = sum;
          }
        }
      });
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
