// What goes with the training matmuls: output and norm after the forward's, the norm's gradient
// before the backward's, and the mask after it.
#include <cmath>

#include "kernels/cpu/driver.h"
#include "kernels/cpu/table.h"

namespace wise {

namespace {

void widen_row(const Matrix& matrix, int64_t row, float* out) {
  const int64_t offset = row * matrix.row_stride * static_cast<int64_t>(size_of(matrix.dtype));
  table().widen[static_cast<int>(matrix.dtype)](static_cast<const char*>(matrix.data) + offset,
                                                matrix.column_stride, matrix.columns, out);
}

}  // namespace

void side_epilogue(const float* side, const Matrix& base, void* y, float* norms,
                   ParallelFor parallel) {
  const int64_t columns = base.columns;
  const int64_t y_bytes = columns * static_cast<int64_t>(size_of(base.dtype));
  const auto store = table().store_sum[static_cast<int>(base.dtype)];
  run(parallel, base.rows, grain_for(columns), [&](int64_t begin, int64_t end) {
    const Buffer<float> wide = buffer<float>(columns);
    for (int64_t r = begin; r < end; ++r) {
      const float* row = side + r * columns;
      widen_row(base, r, wide.get());
      store(wide.get(), row, columns, static_cast<char*>(y) + r * y_bytes);
      double sum = 0.0;
      for (int64_t c = 0; c < columns; ++c) sum += static_cast<double>(row[c]) * row[c];
      norms[r] = static_cast<float>(std::sqrt(sum));
    }
  });
}

void side_epilogue_backward(const Matrix& grad_y, const float* grad_norms, const float* side,
                            const float* norms, float* grad_side, ParallelFor parallel) {
  const int64_t columns = grad_y.columns;
  run(parallel, grad_y.rows, grain_for(columns), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* out = grad_side + r * columns;
      widen_row(grad_y, r, out);
      if (!(norms[r] > 0.0f)) continue;
      const float scale = grad_norms[r] / norms[r];
      for (int64_t c = 0; c < columns; ++c) out[c] += scale * side[r * columns + c];
    }
  });
}

void mask_gradient(float* grad, const uint32_t* mask, int64_t rows, int64_t columns,
                   ParallelFor parallel) {
  const auto drop = table().mask_gradient;
  const int64_t words = divide_up(columns, 32);
  run(parallel, rows, grain_for(columns),
      [&](int64_t begin, int64_t end) { drop(grad, mask, columns, words, begin, end); });
}

}  // namespace wise
