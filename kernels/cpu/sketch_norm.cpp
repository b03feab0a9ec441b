// sketch_norm: all products of a few rows of x with the sketches' rows, then a norm for every row
// of x and sketch. Sums are taken as in side_norm, so that neither the other rows nor the number of
// threads shows.
#include <cmath>
#include <vector>

#include "kernels/cpu/driver.h"
#include "kernels/cpu/routed_rows.h"
#include "kernels/cpu/table.h"

namespace wise {

void sketch_norm(const Matrix& x, const void* sketch, Dtype dtype, int64_t shards, int64_t rank,
                 float* norms, ParallelFor parallel) {
  const int64_t row_bytes = x.columns * static_cast<int64_t>(size_of(dtype));
  const int64_t count = shards * rank;
  const std::vector<int32_t> together(static_cast<std::size_t>(x.rows), 0);
  const Groups groups(together.data(), x.rows, 1);
  RoutedRows rows(x, x.rows);
  const int64_t most = x.rows < kMaxRows ? x.rows : kMaxRows;
  const Buffer<float> products = buffer<float>(count * most);
  for (int64_t first = 0; first < x.rows; first += kMaxRows) {
    const int64_t n = first + kMaxRows < x.rows ? kMaxRows : x.rows - first;
    rows.gather(groups, first, first + n, groups.order() + first, parallel);
    run(parallel, count, grain_for(x.columns * n / 8), [&](int64_t begin, int64_t end) {
      dense_products(static_cast<const char*>(sketch) + begin * row_bytes, dtype, end - begin,
                     x.columns, rows.group(0), n, products.get() + begin * n);
    });
    run(parallel, shards, grain_for(rank * n), [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        for (int64_t i = 0; i < n; ++i) {
          double sum = 0.0;
          for (int64_t r = s * rank; r < (s + 1) * rank; ++r) {
            const double value = products[r * n + i];
            sum += value * value;
          }
          norms[(first + i) * shards + s] = static_cast<float>(std::sqrt(sum));
        }
      }
    });
  }
}

}  // namespace wise
