// The table of functions that exist once for every instruction set, and helpers for the code that
// drives them. Included by the driving translation units and by kernels_*.cpp: the latter may only
// take declarations from here, because an inline function compiled there for AVX-512 could be the
// copy that the linker keeps for everyone.
#pragma once

#include <cstdint>

#include "kernels/cpu/kernels.h"

namespace wise {

// Rows of x one call of `side_dots` takes at most; columns it expands at a time.
inline constexpr int64_t kMaxRows = 256;
inline constexpr int64_t kTileColumns = 1024;
inline constexpr int64_t kBlockRows = 8;
// Floats of scratch `side_dots` wants: the expanded tile, and 16 partial sums a result.
inline constexpr int64_t kScratch = kBlockRows * kTileColumns + kBlockRows * kMaxRows * 16;
// Histogram bins of the two radix passes over 31 bits of magnitude.
inline constexpr int64_t kHighBins = int64_t{1} << 15;
inline constexpr int64_t kLowBins = int64_t{1} << 16;

struct Table {
  // out[(r - begin) * n + i] = D_r . x[i] for packed rows begin..end (at most kBlockRows) of the
  // bank; each x[i] holds 32 * words floats. The sum's order depends on the columns alone.
  bool (*side_dots[kDtypes])(const Packed& bank, int64_t begin, int64_t end, const float* const* x,
                             int64_t n, float* scratch, float* out);
  // out += sum over packed rows begin..end of grad[r - begin] D_r; out holds 32 * words floats.
  bool (*side_axpy[kDtypes])(const Packed& bank, int64_t begin, int64_t end, const float* grad,
                             float* out);
  // `count` elements, `stride` apart, to fp32.
  void (*widen[kDtypes])(const void* source, int64_t stride, int64_t count, float* target);
  // y[i] = round(y[i] + side[i * side_stride]).
  void (*add_rounded[kDtypes])(void* y, const float* side, int64_t side_stride, int64_t count);
  void (*store_sum[kDtypes])(const float* base, const float* side, int64_t count, void* y);
  bool (*masked_update)(const Update& update, int64_t begin, int64_t end);
  void (*mask_gradient)(float* grad, const uint32_t* mask, int64_t columns, int64_t words,
                        int64_t begin, int64_t end);
  // Counts the non-zero magnitudes by their top 15 bits, or those with the top 15 bits `prefix` by
  // their low 16.
  void (*count_high)(const float* values, int64_t count, uint32_t* bins);
  void (*count_low)(const float* values, int64_t count, uint32_t prefix, uint32_t* bins);
  // Elements begin..end of the merge, given each delta's least kept magnitude.
  void (*merge)(const float* const* deltas, const float* weights, const float* thresholds,
                int64_t deltas_count, int64_t begin, int64_t end, float* out);
};

extern const Table kPortableTable;
extern const Table kAvx2Table;
extern const Table kAvx512Table;

// The table in use.
const Table& table();

}  // namespace wise
