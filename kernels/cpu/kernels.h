// The CPU kernels: torch-free, on raw pointers. This header is what csrc/ sees. Work that gains
// from wide registers goes through a table of functions, one table for each instruction set, each
// built in its own translation unit (kernels_*.cpp) and chosen at run time (dispatch.cpp).
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace wise {

enum class Isa : int { kPortable, kAvx2, kAvx512, kAvx512Vbmi2, kAmx, kBest };

// Runs body(begin, end, context) over the pieces of [0, count), in parallel. `grain` is the least
// number of items worth a thread. Results never depend on where the pieces are cut.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, int64_t grain, Body body, void* context);

struct Update {
  float* delta;
  const float* grad;
  const uint32_t* mask;
  const int64_t* row_ptr;
  int64_t rows;
  int64_t columns;
  int64_t words;
  int64_t count;
  float* m;  // both null: SGD
  float* v;
  double lr;
  double beta1;
  double beta2;
  double eps;
  int64_t step;
  double clamp;
};

// Stored entries of late interaction: an entry's token j is row places[entry * most + j] of keys
// (-1: there is none) times its scale, of length at most 1, and counts weights[...] >= 0, which are
// together at most 1.
struct MaxSim {
  const int8_t* keys;
  const float* scales;
  int64_t width;
  const int32_t* places;
  const float* weights;
  int64_t entries;
  int64_t most;
  float floor;
};

// Shards of low rank, D_e = left_e^T right_e: entry e has rows rank_ptr[e]..rank_ptr[e + 1] of left
// [R, d_out] and of right [R, d_in], one row after the other.
struct LowRank {
  const void* left;
  const void* right;
  Dtype dtype;
  const int64_t* rank_ptr;  // [entries + 1], ascending within 0..R
  int64_t entries;
  int64_t d_out;
};

// y[n] += D_route[n] x[n]; route is within [-1, entries), and x has d_in columns.
void add_low_rank(const LowRank& bank, const Matrix& x, void* y, Dtype y_dtype, int64_t y_stride,
                  const int32_t* route, ParallelFor parallel);

// The functions below return false when row_ptr does not agree with the mask or the values.

// y[n] += D_route[n] x[n]; route is within [-1, shards).
[[nodiscard]] bool add_side(const Packed& bank, const Matrix& x, void* y, Dtype y_dtype,
                            int64_t y_stride, const int32_t* route, ParallelFor parallel);
// grad_x[n] = D_route[n]^T grad[n], zero for rows on the main memory; grad is fp32 [rows, d_out].
[[nodiscard]] bool add_side_backward(const Packed& bank, const float* grad, int64_t n,
                                     const int32_t* route, float* grad_x, ParallelFor parallel);
// norms[p] = ||D_shards[p] x[rows[p]]||_2; rows and shards are within range.
[[nodiscard]] bool side_norm(const Packed& bank, const Matrix& x, const int32_t* rows,
                             const int32_t* shards, int64_t pairs, float* norms,
                             ParallelFor parallel);
// norms[n * shards + s] = ||S_s x[n]||_2; sketch is [shards, rank, x.columns].
void sketch_norm(const Matrix& x, const void* sketch, Dtype dtype, int64_t shards, int64_t rank,
                 float* norms, ParallelFor parallel);
// scores[b * entries + e] = sum_j weight_ej max(0, max_t query[b, t] . key_ej), or 0 where that is
// not above the floor; query is [batch, tokens, width], of rows no longer than 1.
void max_sim(const MaxSim& stored, const float* query, int64_t batch, int64_t tokens, float* scores,
             ParallelFor parallel);
[[nodiscard]] bool masked_update(const Update& update, ParallelFor parallel);
[[nodiscard]] bool unpack(const Packed& shard, void* delta, ParallelFor parallel);

// row_ptr [rows + 1] from the mask; returns the number of set bits.
int64_t count_rows(const uint32_t* mask, int64_t rows, int64_t columns, int64_t* row_ptr,
                   ParallelFor parallel);
// The masked entries of delta [rows, columns] to values, at the offsets count_rows found.
void pack(const void* delta, Dtype dtype, const uint32_t* mask, int64_t rows, int64_t columns,
          const int64_t* row_ptr, void* values, ParallelFor parallel);

// y = base + side and norms = ||side||_2 by row: what follows the training matmul.
void side_epilogue(const float* side, const Matrix& base, void* y, float* norms,
                   ParallelFor parallel);
// grad_side = grad_y + grad_norm side / norm, the second term zero where the norm is.
void side_epilogue_backward(const Matrix& grad_y, const float* grad_norms, const float* side,
                            const float* norms, float* grad_side, ParallelFor parallel);
// Zeroes the entries of grad [rows, columns] outside the mask.
void mask_gradient(float* grad, const uint32_t* mask, int64_t rows, int64_t columns,
                   ParallelFor parallel);

// TIES over `deltas` arrays of `size` floats into `out`.
void ties_merge(const float* const* deltas, const float* weights, int64_t deltas_count,
                int64_t size, double density, float* out, ParallelFor parallel);

// The instruction set in use; force_isa falls back to the best at or below the one asked for.
Isa current_isa();
Isa force_isa(Isa isa);

}  // namespace wise
