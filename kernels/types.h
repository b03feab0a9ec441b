// What every backend's kernels see of tensors: raw pointers with shapes, free of torch and of CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wise {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline constexpr int kDtypes = 3;

inline std::size_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// A 2-d activation matrix of any of the three dtypes; strides count elements.
struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

// The packed rows of a bank (or of one shard): see docs/ops.md. `rows` is per shard.
struct Packed {
  const uint32_t* mask;
  const void* values;
  Dtype dtype;
  const int64_t* row_ptr;
  int64_t shards;
  int64_t rows;
  int64_t columns;
  int64_t words;  // mask words a row
  int64_t count;  // values in all
};

}  // namespace wise
