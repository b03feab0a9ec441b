// add_side: y[n] += D_route[n] x[n], for the few rows of a decode step, at the speed at which the
// packed rows stream by. One launch; a block takes a stretch of packed rows and a slice of 32 rows
// of activations, and nothing happens where no row is routed. Right for any number of rows; of
// many, every slice streams the bank again.
#include "kernels/cuda/side_rows.cuh"

namespace wise::cuda {

namespace {

// y[at] + sum, added in fp32 and rounded once.
struct Output {
  void* data;
  Dtype dtype;
  int64_t stride;

  __device__ void* at(int64_t index) const {
    return static_cast<char*>(data) + (dtype == Dtype::kFloat32 ? 4 * index : 2 * index);
  }
  __device__ float load(int64_t index) const {
    if (dtype == Dtype::kFloat32) return *static_cast<const float*>(at(index));
    if (dtype == Dtype::kBFloat16) return to_float(*static_cast<const BFloat16*>(at(index)));
    return to_float(*static_cast<const Float16*>(at(index)));
  }
  __device__ void store(int64_t index, float value) const {
    if (dtype == Dtype::kFloat32) {
      *static_cast<float*>(at(index)) = value;
    } else if (dtype == Dtype::kBFloat16) {
      *static_cast<BFloat16*>(at(index)) = rounded<BFloat16>(value);
    } else {
      *static_cast<Float16*>(at(index)) = rounded<Float16>(value);
    }
  }
};

struct Rows {
  int begin;
  int end;
};

// The packed rows of this block.
__device__ __forceinline__ Rows rows_of_block(const Packed& bank, const Layout& layout) {
  const int64_t begin = blockIdx.x * layout.rows_a_block;
  return {static_cast<int>(begin), static_cast<int>(min(begin + layout.rows_a_block, bank.rows))};
}

// Adds the shard's packed rows times the group's rows of activations; `n` is the lane's row of y.
template <typename V, typename X, int R, int kAhead>
__device__ __forceinline__ void add_group(const Packed& bank, const Matrix& x, const Output& y,
                                          const Layout& layout, int shard, const Group<R>& group,
                                          int64_t n, const Rows& rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const bool mine = lane < group.count;
  const int64_t row_of_y = n * y.stride;
  for_each_dot<V, X, R, kAhead>(
      bank, x, layout, shard, group, rows.begin, rows.end,
      [&](int r) {
        if (mine) prefetch(y.at(row_of_y + r));
      },
      [&](int r, const float (&sums)[R]) {
        float sum = sums[0];
#pragma unroll
        for (int i = 1; i < R; ++i) sum = lane == i ? sums[i] : sum;
        if (mine) y.store(row_of_y + r, y.load(row_of_y + r) + sum);
      },
      [](int) {});
}

// A route that names nothing makes its row NaN.
__device__ __forceinline__ void spoil(const Output& y, int64_t n, const Rows& rows) {
  const int begin = rows.begin + static_cast<int>(threadIdx.x);
  for (int r = begin; r < rows.end; r += static_cast<int>(blockDim.x)) {
    y.store(n * y.stride + r, not_a_number<float>());
  }
}

// One row of activations.
template <typename V>
__global__ void __launch_bounds__(kMaxWarps<1>* kWarp, 1)
    add_one_kernel(Packed bank, Matrix x, Output y, const int32_t* route, Layout layout) {
  const Rows rows = rows_of_block(bank, layout);
  const int shard = route[0];
  if (shard == -1) return;
  if (shard < 0 || shard >= bank.shards) return spoil(y, 0, rows);
  add_group<V, float, 1, 2>(bank, x, y, layout, shard, {{0}, 1}, 0, rows);
}

template <typename V, typename X>
__global__ void __launch_bounds__(kMaxWarps<kGroup<V, X>>* kWarp, 1)
    add_many_kernel(Packed bank, Matrix x, Output y, const int32_t* route, Layout layout) {
  const Rows rows = rows_of_block(bank, layout);
  constexpr int kSize = kGroup<V, X>;
  const int64_t step = gridDim.y * kSlice;
  for (int64_t slice = blockIdx.y * kSlice; slice < x.rows; slice += step) {
    const int64_t n = slice + threadIdx.x % kWarp;
    const int wanted = n < x.rows ? route[n] : -1;
    const bool bad = wanted < -1 || wanted >= bank.shards;
    for (uint32_t left = __ballot_sync(kAllLanes, bad); left != 0; left &= left - 1) {
      spoil(y, slice + select_bit(left, 0), rows);
    }
    for_each_group<kSize>(
        bad ? -1 : wanted, n, [&](int shard, const Group<kSize>& group, int member) {
          if (group.count == 1) {
            // Fewer warps than above: each has more under way.
            add_group<V, float, 1, 4>(bank, x, y, layout, shard, {{group.row[0]}, 1},
                                      slice + member, rows);
          } else {
            add_group<V, X, kSize, 2>(bank, x, y, layout, shard, group, slice + member, rows);
          }
        });
  }
}

// How to launch a kernel of groups of up to R rows of X.
struct Plan {
  Layout layout;
  Grid grid;
  int threads;
  std::size_t shared_bytes;
};

template <typename V, typename X, int R>
Plan plan(const Packed& bank, int64_t rows) {
  Plan plan;
  plan.grid.y = std::min<int64_t>(divide_up(rows, kSlice), 65535);
  // One block fills a multiprocessor; where there are several slices they share it out.
  const int64_t blocks = std::max<int64_t>(multiprocessors() / plan.grid.y, 1);
  const int64_t rows_a_block = divide_up(bank.rows, blocks);
  plan.grid.x = divide_up(bank.rows, rows_a_block);
  // So many warps that they all have equally many rows.
  int warps = static_cast<int>(divide_up(rows_a_block, divide_up(rows_a_block, kMaxWarps<R>)));
  plan.layout = layout_for<V>(bank, slot_bytes<X, R>, &warps, &plan.shared_bytes);
  plan.layout.rows_a_block = rows_a_block;
  plan.threads = warps * kWarp;
  return plan;
}

template <typename V>
void add_one(const Packed& bank, const Matrix& x, const Output& y, const int32_t* route,
             Stream stream) {
  const Plan how = plan<V, float, 1>(bank, 1);
  launch<add_one_kernel<V>>("add_side", how.grid, how.threads, how.shared_bytes, stream, bank, x, y,
                            route, how.layout);
}

template <typename V, typename X>
void add_many(const Packed& bank, const Matrix& x, const Output& y, const int32_t* route,
              Stream stream) {
  const Plan how = plan<V, X, kGroup<V, X>>(bank, x.rows);
  launch<add_many_kernel<V, X>>("add_side", how.grid, how.threads, how.shared_bytes, stream, bank,
                                x, y, route, how.layout);
}

}  // namespace

void add_side(const Packed& bank, const Matrix& x, void* y, Dtype y_dtype, int64_t y_stride,
              const int32_t* route, Stream stream) {
  if (x.rows == 0 || bank.rows == 0) return;
  const Output out{y, y_dtype, y_stride};
  with_type(bank.dtype, [&](auto value) {
    using V = decltype(value);
    if (x.rows == 1) {
      add_one<V>(bank, x, out, route, stream);
    } else if (sizeof(V) == 2 && x.dtype == bank.dtype) {
      add_many<V, V>(bank, x, out, route, stream);
    } else {
      add_many<V, float>(bank, x, out, route, stream);
    }
  });
}

}  // namespace wise::cuda
