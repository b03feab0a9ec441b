// Products with dense rows, written once for every instruction set (kernels_*.cpp only); summed in
// the order of packed ones (side_product.h).
#pragma once

#include "kernels/cpu/dot_tile.h"

namespace wise::WISE_ISA {

// R rows, `stride` rows apart and `columns` long, against X rows of x, padded with zeros:
// out[i * stride * n + j].
template <int R, int X, typename T>
void dense_rows(const T* rows, int64_t stride, int64_t columns, const float* x, int64_t width,
                int64_t n, float* out) {
  Vec sum[R][X];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < X; ++j) sum[i][j] = Vec::zero();
  }
  const int64_t whole = columns / 16 * 16;
  const int64_t apart = stride * columns;
  for (int64_t c = 0; c < whole; c += 16) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      __builtin_prefetch(reinterpret_cast<const char*>(rows + i * apart + c) + kAhead);
      const Vec left = Vec::load(rows + i * apart + c);
#pragma GCC unroll 16
      for (int j = 0; j < X; ++j) sum[i][j] = fma(left, Vec::load(x + j * width + c), sum[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    const Few<T> rest(rows + i * apart + whole, static_cast<int>(columns - whole));
    const Vec left = Vec::load(rest.values);
#pragma GCC unroll 16
    for (int j = 0; j < X; ++j) {
      if (whole < columns) sum[i][j] = fma(left, Vec::load(x + j * width + whole), sum[i][j]);
      out[i * stride * n + j] = sum[i][j].sum();
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
  // Rows far apart are walked together, as in `dot_few`.
  const int64_t stride = count / Vec::kFlight;
  for (int64_t r = 0; r < stride; ++r) {
    dense_rows<Vec::kFlight, X>(rows + r * columns, stride, columns, x, width, n, out + r * n);
  }
  for (int64_t r = stride * Vec::kFlight; r < count; ++r) {
    dense_rows<1, X>(rows + r * columns, 1, columns, x, width, n, out + r * n);
  }
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

// R rows, `stride` apart, times X rows of scales, added to X rows of `out` in the order of the R.
template <int R, int X, typename T>
void axpy_rows(const T* rows, int64_t stride, int64_t columns, const float* scale, int64_t apart,
               float* out, int64_t width) {
  Vec by[R][X];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < X; ++i) by[r][i] = Vec::all(scale[r * apart + i]);
  }
  for (int64_t c = 0; c < columns; c += 16) {
    Vec row[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const T* from = rows + r * stride + c;
      __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
      row[r] = columns - c >= 16 ? Vec::load(from)
                                 : Vec::load(Few<T>(from, static_cast<int>(columns - c)).values);
    }
#pragma GCC unroll 16
    for (int i = 0; i < X; ++i) {
      Vec sum = Vec::load(out + i * width + c);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum = fma(row[r], by[r][i], sum);
      sum.store(out + i * width + c);
    }
  }
}

// The first `most` rows of `out`, no more than X.
template <int X, typename T>
void axpy_up_to(int64_t most, const T* rows, int64_t count, int64_t stride, int64_t columns,
                const float* scale, int64_t apart, float* out, int64_t width) {
  if constexpr (X > 1) {
    if (most < X) {
      return axpy_up_to<X - 1>(most, rows, count, stride, columns, scale, apart, out, width);
    }
  }
  int64_t r = 0;
  for (; r + Vec::kFlight <= count; r += Vec::kFlight) {
    axpy_rows<Vec::kFlight, X>(rows + r * stride, stride, columns, scale + r * apart, apart, out,
                               width);
  }
  for (; r < count; ++r) {
    axpy_rows<1, X>(rows + r * stride, stride, columns, scale + r * apart, apart, out, width);
  }
}

template <typename T>
void dense_axpy(const void* rows, int64_t count, int64_t stride, int64_t columns,
                const float* scale, int64_t apart, int64_t n, float* out, int64_t width) {
  for (int64_t i = 0; i < n; i += Vec::kFewRows) {
    axpy_up_to<Vec::kFewRows>(n - i, static_cast<const T*>(rows), count, stride, columns, scale + i,
                              apart, out + i * width, width);
  }
}

}  // namespace wise::WISE_ISA
