// add_side: rows of x are ordered by their shard, so that every packed row is streamed once for all
// the rows that want it; threads share out the packed rows. Its backward goes row by row.
#include <atomic>

#include "kernels/cpu/driver.h"
#include "kernels/cpu/routed_rows.h"
#include "kernels/cpu/table.h"

namespace wise {

bool add_side(const Packed& bank, const Matrix& x, void* y, Dtype y_dtype, int64_t y_stride,
              const int32_t* route, ParallelFor parallel) {
  const Groups groups(route, x.rows, bank.shards);
  const auto add = table().add_rounded[static_cast<int>(y_dtype)];
  const int64_t y_size = static_cast<int64_t>(size_of(y_dtype));
  RoutedRows routed(x, bank, groups.total());
  std::atomic<bool> good{true};
  for (int64_t first = 0; first < groups.total(); first += kMaxRows) {
    const int64_t last = first + kMaxRows < groups.total() ? first + kMaxRows : groups.total();
    routed.gather(groups, first, last, groups.order() + first, parallel);
    const auto add_to_y = [&](int64_t from, int64_t to, int64_t r0, int64_t r1, const float* side) {
      for (int64_t i = from; i < to; ++i) {
        char* row = static_cast<char*>(y) + groups.order()[i] * y_stride * y_size;
        add(row + r0 * y_size, side + i - from, to - from, r1 - r0);
      }
    };
    const int64_t cost = bank.columns / 8 * (last - first);
    run(parallel, bank.rows, grain_for(cost), [&](int64_t begin, int64_t end) {
      if (!each_product(bank, groups, first, last, routed, begin, end, add_to_y)) good = false;
    });
  }
  return good;
}

bool add_side_backward(const Packed& bank, const float* grad, int64_t n, const int32_t* route,
                       float* grad_x, ParallelFor parallel) {
  const Table& kernels = table();
  const auto axpy = kernels.side_axpy[static_cast<int>(bank.dtype)];
  std::atomic<bool> good{true};
  run(parallel, n, grain_for(bank.rows * bank.columns / 8), [&](int64_t begin, int64_t end) {
    const Buffer<float> padded = buffer<float>(bank.words * 32);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t c = 0; c < bank.words * 32; ++c) padded[c] = 0.0f;
      if (route[i] >= 0) {
        const int64_t base = route[i] * bank.rows;
        // In blocks, so that only the last few packed rows need the careful way of reading.
        for (int64_t r = 0; r < bank.rows; r += kBlockRows) {
          const int64_t stop = r + kBlockRows < bank.rows ? r + kBlockRows : bank.rows;
          if (!axpy(bank, base + r, base + stop, grad + i * bank.rows + r, padded.get())) {
            good = false;
          }
        }
      }
      for (int64_t c = 0; c < bank.columns; ++c) grad_x[i * bank.columns + c] = padded[c];
    }
  });
  return good;
}

}  // namespace wise
