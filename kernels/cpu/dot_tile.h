// Products of many rows of x with rows that come from anywhere, a tile of columns at a time,
// written once for every instruction set (kernels_*.cpp only).
#pragma once

#include "kernels/cpu/span.h"
#include "kernels/cpu/table.h"

namespace wise::WISE_ISA {

// The most rows of x that `side_dot` and `dense_dot` are for. Where bits are walked it is for all:
// skipping what is not there costs no more than a dense tile, and rounds the same.
inline constexpr int64_t kFew = Vec::kWalksBits ? kMaxRows : Vec::kFew;

// D rows of the tile against X rows of x, `columns` floats each. The sums of row i of x lie at
// sums + i * kTileRows * 16, one row of the tile after the other.
template <int D, int X>
void dot_tile(const float* tile, const float* x, int64_t columns, float* sums) {
  Vec sum[X][D];
#pragma GCC unroll 8
  for (int i = 0; i < X; ++i) {
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) sum[i][d] = Vec::load(sums + (i * kTileRows + d) * 16);
  }
  for (int64_t c = 0; c < columns; c += 16) {
    Vec right[X];
#pragma GCC unroll 8
    for (int i = 0; i < X; ++i) {
      right[i] = Vec::load_once(x + i * columns + c);
      // What the next X rows will need.
      __builtin_prefetch(x + (i + X) * columns + c);
    }
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) {
      const Vec left = Vec::load_once(tile + d * kTileColumns + c);
#pragma GCC unroll 8
      for (int i = 0; i < X; ++i) sum[i][d] = fma(left, right[i], sum[i][d]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < X; ++i) {
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) sum[i][d].store(sums + (i * kTileRows + d) * 16);
  }
}

template <int D>
void dot_tile_rows(const float* tile, const float* x, int64_t n, int64_t columns, float* sums) {
  int64_t i = 0;
  for (; i + Vec::kTileX <= n; i += Vec::kTileX) {
    dot_tile<D, Vec::kTileX>(tile, x + i * columns, columns, sums + i * kTileRows * 16);
  }
  for (; i < n; ++i) dot_tile<D, 1>(tile, x + i * columns, columns, sums + i * kTileRows * 16);
}

// out[r * n + i] = row r . x_i for `count` rows, no more than kBlockRows; fill(r, word, words,
// target) writes 32 * words columns of a row from column 32 * word on. Each row is made up once,
// and all of them take a tile's columns of x one after the other, so that those stay in cache.
template <typename F>
void dot_panel(int64_t count, int64_t words, const float* x, int64_t n, float* scratch, float* out,
               const F& fill) {
  float* tile = scratch;
  float* sums = scratch + kTileRows * kTileColumns;
  const int64_t tiles = (count + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < tiles * kTileRows * n; ++i) Vec::zero().store(sums + i * 16);
  for (int64_t w0 = 0; w0 < words; w0 += kTileColumns / 32) {
    const int64_t left = words - w0;
    const int64_t here = left < kTileColumns / 32 ? left : kTileColumns / 32;
    for (int64_t r0 = 0; r0 < count; r0 += kTileRows) {
      const int64_t height = r0 + kTileRows < count ? kTileRows : count - r0;
      for (int64_t r = 0; r < height; ++r) fill(r0 + r, w0, here, tile + r * kTileColumns);
      float* of_tile = sums + r0 * n * 16;
      int64_t r = 0;
      for (; r + Vec::kTileD <= height; r += Vec::kTileD) {
        dot_tile_rows<Vec::kTileD>(tile + r * kTileColumns, x, n, 32 * here, of_tile + r * 16);
      }
      for (; r < height; ++r) {
        dot_tile_rows<1>(tile + r * kTileColumns, x, n, 32 * here, of_tile + r * 16);
      }
    }
    x += n * 32 * here;
  }
  for (int64_t r = 0; r < count; ++r) {
    const int64_t in_tile = r % kTileRows;
    const float* sum = sums + ((r - in_tile) * n + in_tile) * 16;
    for (int64_t i = 0; i < n; ++i) out[r * n + i] = Vec::load(sum + i * kTileRows * 16).sum();
  }
}

}  // namespace wise::WISE_ISA
