// The table of functions that exist once for every instruction set, and helpers for the code that
// drives them. Included by the driving translation units and by kernels_*.cpp: the latter may only
// take declarations from here, because an inline function compiled there for AVX-512 could be the
// copy that the linker keeps for everyone.
#pragma once

#include <cstdint>

#include "kernels/cpu/kernels.h"

namespace wise {

// Rows of x, packed rows, and results (their product) one call of `side_dots` takes at most.
inline constexpr int64_t kMaxRows = 128;
inline constexpr int64_t kBlockRows = 64;
inline constexpr int64_t kMaxResults = 4096;
// What it expands at a time: small enough for the first cache, next to a few rows of x.
inline constexpr int64_t kTileRows = 8;
inline constexpr int64_t kTileColumns = 512;
// Floats of scratch it wants: the expanded tile, and 16 partial sums a result.
inline constexpr int64_t kScratch = kTileRows * kTileColumns + kMaxResults * 16;
// Keys that `max_sim` bounds together.
inline constexpr int kSimKeys = 16;
// Histogram bins of the two radix passes over 31 bits of magnitude.
inline constexpr int64_t kHighBins = int64_t{1} << 15;
inline constexpr int64_t kLowBins = int64_t{1} << 16;

// A row of the batch as `max_sim` takes it: tokens in a panel [width, lanes] (zeros behind the
// last; null where one is not finite), and, or null, as bytes + 128 in [width / 4, lanes, 4], which
// are off by no more than `errors` in length when multiplied by `steps`.
struct SimQuery {
  const float* panel;
  const uint8_t* bytes;
  const float* steps;
  const float* errors;
  int64_t lanes;
};

struct Table {
  // The most rows of x `side_dot` and `dense_dot` are for.
  int64_t few;
  // out[(r - begin) * n + i] = D_r . x_i for packed rows begin..end of the bank. x holds 32 * words
  // floats of each of n rows, in the order of `arrange`. A sum's order depends on the columns
  // alone.
  bool (*side_dot[kDtypes])(const Packed& bank, int64_t begin, int64_t end, const float* x,
                            int64_t n, float* out);
  // The same for more rows of x and a few packed rows: the same bits. x holds kTileColumns columns
  // of all n rows, row after row, then the next columns, and so on.
  bool (*side_dots[kDtypes])(const Packed& bank, int64_t begin, int64_t end, const float* x,
                             int64_t n, float* scratch, float* out);
  // out += sum over packed rows begin..end of grad[r - begin] D_r; out holds 32 * words floats.
  bool (*side_axpy[kDtypes])(const Packed& bank, int64_t begin, int64_t end, const float* grad,
                             float* out);
  // Like `side_dot` and `side_dots`, with dense rows one after the other, and x in no special
  // order.
  void (*dense_dot[kDtypes])(const void* rows, int64_t count, int64_t columns, const float* x,
                             int64_t n, float* out);
  void (*dense_dots[kDtypes])(const void* rows, int64_t count, int64_t columns, const float* x,
                              int64_t n, float* scratch, float* out);
  // out[i * width + c] += sum over r of scale[r * apart + i] * rows[r * stride + c] for n rows of
  // `out` and `columns` columns, one r after the other; width has room for whole registers.
  void (*dense_axpy[kDtypes])(const void* rows, int64_t count, int64_t stride, int64_t columns,
                              const float* scale, int64_t apart, int64_t n, float* out,
                              int64_t width);
  // Puts 32 * words floats of x in the order in which products with packed values take them; null
  // where that is the order they are in.
  void (*arrange[kDtypes])(float* x, int64_t words);
  // `count` elements, `stride` apart, to fp32.
  void (*widen[kDtypes])(const void* source, int64_t stride, int64_t count, float* target);
  // y[i] = round(y[i] + side[i * side_stride]).
  void (*add_rounded[kDtypes])(void* y, const float* side, int64_t side_stride, int64_t count);
  void (*store_sum[kDtypes])(const float* base, const float* side, int64_t count, void* y);
  bool (*masked_update)(const Update& update, int64_t begin, int64_t end);
  void (*mask_gradient)(float* grad, const uint32_t* mask, int64_t columns, int64_t words,
                        int64_t begin, int64_t end);
  // Whether `max_sim` gains from bytes, and the scores of entries begin..end; `scratch` holds one
  // key in floats or kSimKeys of them in bytes.
  bool sim_bytes;
  void (*max_sim)(const MaxSim& stored, const SimQuery* queries, int64_t batch, int64_t begin,
                  int64_t end, float* scratch, float* scores);
  // Counts the non-zero magnitudes by their top 15 bits, or those with the top 15 bits `prefix` by
  // their low 16.
  void (*count_high)(const float* values, int64_t count, uint32_t* bins);
  void (*count_low)(const float* values, int64_t count, uint32_t prefix, uint32_t* bins);
  // Writes the magnitudes whose bits are within low..high (low > 0) to `found` and returns their
  // number, or stops where fewer than 16 more would have room. Adds to the counts of what is not
  // zero, and of what is above `high`.
  int64_t (*pick)(const float* values, int64_t count, uint32_t low, uint32_t high, float* found,
                  int64_t room, int64_t* nonzeros, int64_t* above);
  // Elements begin..end of the merge, given each delta's least kept magnitude.
  void (*merge)(const float* const* deltas, const float* weights, const float* thresholds,
                int64_t deltas_count, int64_t begin, int64_t end, float* out);
};

extern const Table kPortableTable;
extern const Table kAvx2Table;
extern const Table kAvx512Table;
extern const Table kAvx512Vbmi2Table;
extern const Table kAmxTable;

// The table in use.
const Table& table();

}  // namespace wise
