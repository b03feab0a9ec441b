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

// Up to kMaxRows rows of x as the products with a bank take them, or those with dense rows: fp32,
// padded to whole words, and group by group, in tiles of columns if they are many. A row that is
// alone in its group is x's own memory where that will do.
class RoutedRows {
 public:
  RoutedRows(const Matrix& x, const Packed& bank, int64_t most)
      : RoutedRows(x, table().arrange[static_cast<int>(bank.dtype)], most) {}
  RoutedRows(const Matrix& x, int64_t most) : RoutedRows(x, nullptr, most) {}

  // The groups within places [first, last), whose rows of x are which[0], which[1], ...
  void gather(const Groups& groups, int64_t first, int64_t last, const int64_t* which,
              ParallelFor parallel) {
    groups.each(first, last, [&](int64_t, int64_t from, int64_t to) {
      const int64_t place = from - first;
      const int64_t n = to - from;
      if (n == 1 && direct_) {
        starts_[place] = static_cast<const float*>(x_.data) + which[place] * x_.row_stride;
        return;
      }
      if (!copy_) copy_ = buffer<float>(most_ * width_);
      float* start = copy_.get() + place * width_;
      starts_[place] = start;
      run(parallel, n, grain_for(x_.columns), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) copy_row(which[place + i], i, n, start);
      });
    });
  }

  // Of the group that begins at this place after the first.
  const float* group(int64_t place) const { return starts_[place]; }

 private:
  using Arrange = void (*)(float* x, int64_t words);

  RoutedRows(const Matrix& x, Arrange arrange, int64_t most)
      : x_(x),
        arrange_(arrange),
        width_(divide_up(x.columns, 32) * 32),
        most_(most < kMaxRows ? most : kMaxRows),
        direct_(x.dtype == Dtype::kFloat32 && x.column_stride == 1 && x.columns == width_ &&
                arrange == nullptr) {}

  void copy_row(int64_t row, int64_t i, int64_t n, float* start) const {
    const auto to_fp32 = table().widen[static_cast<int>(x_.dtype)];
    const int64_t size = static_cast<int64_t>(size_of(x_.dtype));
    const char* data = static_cast<const char*>(x_.data) + row * x_.row_stride * size;
    const int64_t tile = n <= table().few ? width_ : kTileColumns;
    for (int64_t from = 0; from < width_; from += tile) {
      const int64_t columns = width_ - from < tile ? width_ - from : tile;
      const int64_t there = x_.columns - from < columns ? x_.columns - from : columns;
      float* target = start + from * n + i * columns;
      to_fp32(data + from * x_.column_stride * size, x_.column_stride, there, target);
      for (int64_t c = there; c < columns; ++c) target[c] = 0.0f;
      if (arrange_ != nullptr) arrange_(target, columns / 32);
    }
  }

  Matrix x_;
  Arrange arrange_;
  int64_t width_;
  int64_t most_;
  bool direct_;
  Buffer<float> copy_;
  const float* starts_[kMaxRows] = {};
};

// How many packed or dense rows to take at a time with n rows of x.
inline int64_t block_rows(int64_t n) {
  const int64_t height = kBlockRows * n <= kMaxResults ? kBlockRows : kMaxResults / n;
  return height / kTileRows * kTileRows;
}

// out[r * n + i] = row r . x_i for `count` dense rows and the n rows of a group.
inline void dense_products(const void* rows, Dtype dtype, int64_t count, int64_t columns,
                           const float* x, int64_t n, float* out) {
  const Table& kernels = table();
  if (n <= kernels.few) {
    kernels.dense_dot[static_cast<int>(dtype)](rows, count, columns, x, n, out);
    return;
  }
  const auto many = kernels.dense_dots[static_cast<int>(dtype)];
  const int64_t row_bytes = columns * static_cast<int64_t>(size_of(dtype));
  const Buffer<float> scratch = buffer<float>(kScratch);
  const int64_t step = block_rows(n);
  for (int64_t r = 0; r < count; r += step) {
    const int64_t height = r + step < count ? step : count - r;
    many(static_cast<const char*>(rows) + r * row_bytes, height, columns, x, n, scratch.get(),
         out + r * n);
  }
}

// use(from, to, r0, r1, side) for every group within places [first, last): the products of packed
// rows r0..r1 of its shard with rows from..to of the order, side[(r - r0) * (to - from) + i].
// Packed rows come block by block, or all of begin..end at once; false when row_ptr is wrong.
template <typename F>
bool each_product(const Packed& bank, const Groups& groups, int64_t first, int64_t last,
                  const RoutedRows& routed, int64_t begin, int64_t end, const F& use) {
  const Table& kernels = table();
  const int dtype = static_cast<int>(bank.dtype);
  Buffer<float> scratch;
  Buffer<float> block;
  Buffer<float> all;
  const int64_t most = last - first < kernels.few ? last - first : kernels.few;
  bool good = true;
  groups.each(first, last, [&](int64_t shard, int64_t from, int64_t to) {
    const int64_t n = to - from;
    const int64_t base = shard * bank.rows;
    const float* x = routed.group(from - first);
    if (n <= kernels.few) {
      if (!all) all = buffer<float>((end - begin) * most);
      good = good && kernels.side_dot[dtype](bank, base + begin, base + end, x, n, all.get());
      if (good) use(from, to, begin, end, all.get());
      return;
    }
    if (!scratch) scratch = buffer<float>(kScratch);
    if (!block) block = buffer<float>(kMaxResults);
    const int64_t step = block_rows(n);
    for (int64_t r0 = begin; good && r0 < end; r0 += step) {
      const int64_t r1 = r0 + step < end ? r0 + step : end;
      good = kernels.side_dots[dtype](bank, base + r0, base + r1, x, n, scratch.get(), block.get());
      if (good) use(from, to, r0, r1, block.get());
    }
  });
  return good;
}

}  // namespace wise
