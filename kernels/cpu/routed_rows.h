// Rows ordered by the shard they go to, and their activations as padded fp32 rows.
#pragma once

#include <vector>

#include "kernels/cpu/driver.h"
#include "kernels/cpu/table.h"

namespace wise {

// A stable counting sort of row numbers by shard; -1 (the main memory) is left out.
class Groups {
 public:
  Groups(const int32_t* shard_of, int64_t rows, int64_t shards)
      : starts_(static_cast<std::size_t>(shards) + 1, 0) {
    for (int64_t i = 0; i < rows; ++i) {
      if (shard_of[i] >= 0) ++starts_[static_cast<std::size_t>(shard_of[i]) + 1];
    }
    for (std::size_t s = 1; s < starts_.size(); ++s) starts_[s] += starts_[s - 1];
    order_.resize(static_cast<std::size_t>(starts_.back()));
    std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
    for (int64_t i = 0; i < rows; ++i) {
      if (shard_of[i] < 0) continue;
      order_[static_cast<std::size_t>(next[static_cast<std::size_t>(shard_of[i])]++)] = i;
    }
  }

  int64_t total() const { return starts_.back(); }
  const int64_t* order() const { return order_.data(); }

  // f(shard, from, to) for the groups within places [first, last) of the order.
  template <typename F>
  void each(int64_t first, int64_t last, const F& f) const {
    for (std::size_t s = 0; s + 1 < starts_.size(); ++s) {
      const int64_t from = starts_[s] > first ? starts_[s] : first;
      const int64_t to = starts_[s + 1] < last ? starts_[s + 1] : last;
      if (from < to) f(static_cast<int64_t>(s), from, to);
    }
  }

 private:
  std::vector<int64_t> starts_;
  std::vector<int64_t> order_;
};

// Up to kMaxRows rows of x, each as 32 * words floats: x itself where it already is that.
class RoutedRows {
 public:
  RoutedRows(const Matrix& x, int64_t words, int64_t most)
      : x_(x),
        width_(32 * words),
        direct_(x.dtype == Dtype::kFloat32 && x.column_stride == 1 && x.columns == width_),
        copy_(buffer<float>(direct_ ? 0 : (most < kMaxRows ? most : kMaxRows) * width_)) {}

  void widen(const int64_t* order, int64_t count, ParallelFor parallel) {
    const int64_t size = static_cast<int64_t>(size_of(x_.dtype));
    const char* data = static_cast<const char*>(x_.data);
    if (direct_) {
      for (int64_t i = 0; i < count; ++i) {
        rows_[i] = reinterpret_cast<const float*>(data + order[i] * x_.row_stride * size);
      }
      return;
    }
    const auto to_fp32 = table().widen[static_cast<int>(x_.dtype)];
    run(parallel, count, grain_for(x_.columns), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* row = copy_.get() + i * width_;
        to_fp32(data + order[i] * x_.row_stride * size, x_.column_stride, x_.columns, row);
        for (int64_t c = x_.columns; c < width_; ++c) row[c] = 0.0f;
        rows_[i] = row;
      }
    });
  }

  const float* const* rows() const { return rows_; }

 private:
  Matrix x_;
  int64_t width_;
  bool direct_;
  Buffer<float> copy_;
  const float* rows_[kMaxRows] = {};
};

}  // namespace wise
