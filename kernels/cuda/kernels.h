// The CUDA kernels: torch-free, on raw device pointers. This header is what csrc/ sees, and it
// needs no CUDA header. Every function queues work on `stream` and returns: nothing but read_back
// waits for the device, nothing allocates, so all of it may run under CUDA graph capture.
//
// A wrong index or offset cannot be reported without waiting. A route outside [-1, shards), a row
// or shard out of range, a packed row whose row_ptr disagrees with its mask or leaves the values:
// none of them is followed, and the results that depend on it are NaN.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace wise::cuda {

using Stream = void*;  // a cudaStream_t

// Makes the calling thread launch on this device. torch's guard does that too, but through torch's
// copy of the CUDA runtime; the module has one of its own.
void use_device(int index);

// y[n] += D_route[n] x[n], added in fp32 and rounded once; rows routed to -1 are left alone.
void add_side(const Packed& bank, const Matrix& x, void* y, Dtype y_dtype, int64_t y_stride,
              const int32_t* route, Stream stream);

// norms[p] = ||D_shards[p] x[rows[p]]||_2. The workspace's size in bytes depends on shapes alone.
int64_t side_norm_workspace(const Packed& bank, int64_t n_rows, int64_t pairs);
void side_norm(const Packed& bank, const Matrix& x, const int32_t* rows, const int32_t* shards,
               int64_t pairs, float* norms, void* workspace, Stream stream);

// row_ptr [rows + 1] from the mask: where each packed row starts, then the number of set bits.
void count_rows(const uint32_t* mask, int64_t rows, int64_t columns, int64_t* row_ptr,
                Stream stream);
// The masked entries of delta [rows, columns] to values, at the offsets count_rows found.
void pack(const void* delta, Dtype dtype, const uint32_t* mask, int64_t rows, int64_t columns,
          const int64_t* row_ptr, void* values, Stream stream);
// One shard's dense delta [rows, columns]; a row whose offsets are wrong becomes NaN.
void unpack(const Packed& shard, void* delta, Stream stream);
// One number from the device: the only function here that waits.
int64_t read_back(const int64_t* device_value, Stream stream);

// TIES over `deltas` arrays of `size` floats into `out`. `deltas` (device pointers) and `weights`
// are themselves on the host, and are no longer needed when the call returns.
int64_t ties_merge_workspace(int64_t deltas_count);
void ties_merge(const float* const* deltas, const float* weights, int64_t deltas_count,
                int64_t size, double density, float* out, void* workspace, Stream stream);

}  // namespace wise::cuda
