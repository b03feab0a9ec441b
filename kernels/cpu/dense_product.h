// Products with dense rows, written once for every instruction set (kernels_*.cpp only); summed in
// the order of packed ones (side_product.h).
#pragma once

#include "kernels/cpu/dot_tile.h"

namespace wise::WISE_ISA {

// R rows, `columns` long, against X rows of x, padded with zeros: out[i * n + j].
template <int R, int X, typename T>
void dense_rows(const T* rows, int64_t columns, const float* x, int64_t width, int64_t n,
                float* out) {
  Vec sum[R][X];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < X; ++j) sum[i][j] = Vec::zero();
  }
  const int64_t whole = columns / 16 * 16;
  for (int64_t c = 0; c < whole; c += 16) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vec left = Vec::load(rows + i * columns + c);
#pragma GCC unroll 16
      for (int j = 0; j < X; ++j) sum[i][j] = fma(left, Vec::load(x + j * width + c), sum[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    const Few<T> rest(rows + i * columns + whole, static_cast<int>(columns - whole));
    const Vec left = Vec::load(rest.values);
#pragma GCC unroll 16
    for (int j = 0; j < X; ++j) {
      if (whole < columns) sum[i][j] = fma(left, Vec::load(x + j * width + whole), sum[i][j]);
      out[i * n + j] = sum[i][j].sum();
    }
  }
}

// The first `most` rows of x, no more than X.
template <int X, typename T>
void dense_up_to(int64_t most, const T* rows, int64_t count, int64_t columns, const float* x,
                 int64_t width, int64_t n, float* out) {
  if constexpr (X > 1) {
    if (most < X) {
      return dense_up_to<X - 1>(most, rows, count, columns, x, width, n, out);
    }
  }
  int64_t r = 0;
  for (; r + Vec::kFlight <= count; r += Vec::kFlight) {
    dense_rows<Vec::kFlight, X>(rows + r * columns, columns, x, width, n, out + r * n);
  }
  for (; r < count; ++r) dense_rows<1, X>(rows + r * columns, columns, x, width, n, out + r * n);
}

template <typename T>
void dense_dot(const void* rows, int64_t count, int64_t columns, const float* x, int64_t n,
               float* out) {
  const int64_t width = (columns + 31) / 32 * 32;
  for (int64_t i = 0; i < n; i += Vec::kFewRows) {
    dense_up_to<Vec::kFewRows>(n - i, static_cast<const T*>(rows), count, columns, x + i * width,
                               width, n, out + i);
  }
}

template <typename T>
void dense_dots(const void* rows, int64_t count, int64_t columns, const float* x, int64_t n,
                float* scratch, float* out) {
  const T* first = static_cast<const T*>(rows);
  dot_panel(count, (columns + 31) / 32, x, n, scratch, out,
            [&](int64_t r, int64_t word, int64_t words, float* target) {
              const int64_t there = columns - 32 * word;
              const T* row = first + r * columns + 32 * word;
              for (int64_t c = 0; c < 32 * words; c += 16) {
                if (there - c >= 16) {
                  Vec::load(row + c).store(target + c);
                } else {
                  const int left = static_cast<int>(there > c ? there - c : 0);
                  Vec::load(Few<T>(row + c, left).values).store(target + c);
                }
              }
            });
}

}  // namespace wise::WISE_ISA
