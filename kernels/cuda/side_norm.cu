// side_norm: ||D_s x|| for pairs of a row of activations and a shard. Pairs are ordered by shard on
// the device, so that D streams past several at once. Every block squares and sums the products of
// its packed rows, in double, a tile of rows at a time; a last kernel adds up the tiles. All sums
// have one order, which no other pair has a part in, and nothing of the size of D x is written.
#include "kernels/cuda/side_rows.cuh"

namespace wise::cuda {

namespace {

constexpr int kTileRows = 16;  // packed rows of a partial sum
constexpr int kThreads = 256;
constexpr int64_t kWindow = 8192;
constexpr int kMaxGroup = 4;

struct Workspace {
  double* partial;  // [tiles, pairs], pairs in the order of `order`
  int64_t* order;   // [pairs]
};

int64_t tiles_of(const Packed& bank) { return divide_up(bank.rows, kTileRows); }

Workspace workspace_at(void* memory, const Packed& bank, int64_t pairs) {
  auto* partial = static_cast<double*>(memory);
  return {partial, reinterpret_cast<int64_t*>(partial + tiles_of(bank) * pairs)};
}

// order[place] = pair, ascending by shard within every window of pairs, and stable. Each pair
// counts those that go before it: that many comparisons cost less than streaming one shard does,
// and no counters have to be kept. Windows bound it for very many pairs.
__global__ void __launch_bounds__(kThreads)
    order_kernel(const int32_t* shards, int64_t pairs, int64_t* order) {
  WISE_SHARED(int32_t, others, [kThreads]);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kThreads + thread;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads / kWindow * kWindow;
  const int64_t end = min(begin + kWindow, pairs);
  const int32_t mine = pair < pairs ? shards[pair] : 0;
  int64_t place = begin;
  for (int64_t from = begin; from < end; from += kThreads) {
    __syncthreads();
    if (from + thread < end) others[thread] = shards[from + thread];
    __syncthreads();
    const int count = static_cast<int>(min(end - from, static_cast<int64_t>(kThreads)));
    for (int i = 0; i < count; ++i) {
      place += others[i] < mine || (others[i] == mine && from + i < pair) ? 1 : 0;
    }
  }
  if (pair < pairs) order[place] = pair;
}

// partial[tile][place] of the block's tiles for one group; `place` is the lane's.
template <typename V, typename X, int R, int kAhead>
__device__ __forceinline__ void square_group(const Packed& bank, const Matrix& x,
                                             const Layout& layout, int shard, const Group<R>& group,
                                             int64_t place, int64_t pairs,
                                             float (*products)[kMaxGroup], double* partial) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first_row = blockIdx.x * layout.rows_a_block;
  const int begin = static_cast<int>(first_row);
  const int end = static_cast<int>(min(first_row + layout.rows_a_block, bank.rows));
  for_each_dot<V, X, R, kAhead>(
      bank, x, layout, shard, group, begin, end, [](int) {},
      [&](int row, const float (&sums)[R]) {
        float sum = sums[0];
#pragma unroll
        for (int i = 1; i < R; ++i) sum = thread % kWarp == i ? sums[i] : sum;
        products[row % kTileRows][thread % kWarp] = sum;
      },
      [&](int first) {
        // With fewer warps than a tile has rows, a tile takes several rounds.
        const int last = min(first + static_cast<int>(blockDim.x) / kWarp, end);
        if (last % kTileRows != 0 && last != end) return;
        __syncthreads();
        if (thread < group.count) {
          const int tile = (last - 1) / kTileRows;
          double sum = 0.0;
          for (int i = 0; i < last - tile * kTileRows; ++i) {
            const double product = products[i][thread];
            sum += product * product;
          }
          partial[tile * pairs + place] = sum;
        }
        __syncthreads();  // before the next round's products
      });
}

template <typename V, typename X>
__global__ void __launch_bounds__(kTileRows* kWarp, 1)
    squares_kernel(Packed bank, Matrix x, const int32_t* rows, const int32_t* shards, int64_t pairs,
                   Workspace workspace, Layout layout) {
  WISE_SHARED(float, products, [kTileRows][kMaxGroup]);
  constexpr int kSize = kGroup<V, X>;
  const int64_t step = gridDim.y * kSlice;
  for (int64_t slice = blockIdx.y * kSlice; slice < pairs; slice += step) {
    const int64_t place = slice + threadIdx.x % kWarp;
    int wanted = -1;
    int64_t row = 0;
    if (place < pairs) {
      const int64_t pair = workspace.order[place];
      row = rows[pair];
      if (row >= 0 && row < x.rows && shards[pair] < bank.shards) wanted = shards[pair];
    }
    for_each_group<kSize>(wanted, row, [&](int shard, const Group<kSize>& group, int member) {
      if (group.count == 1) {
        square_group<V, float, 1, 4>(bank, x, layout, shard, {{group.row[0]}, 1}, slice + member,
                                     pairs, products, workspace.partial);
      } else {
        square_group<V, X, kSize, 2>(bank, x, layout, shard, group, slice + member, pairs, products,
                                     workspace.partial);
      }
    });
  }
}

__global__ void __launch_bounds__(kThreads)
    root_kernel(const int32_t* rows, int64_t x_rows, const int32_t* shards, int64_t shards_count,
                int64_t pairs, int64_t tiles, Workspace workspace, float* norms) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= pairs) return;
  const int64_t pair = workspace.order[place];
  const bool good =
      rows[pair] >= 0 && rows[pair] < x_rows && shards[pair] >= 0 && shards[pair] < shards_count;
  double sum = 0.0;
  for (int64_t tile = 0; good && tile < tiles; ++tile) {
    sum += workspace.partial[tile * pairs + place];
  }
  norms[pair] = good ? static_cast<float>(sqrt(sum)) : not_a_number<float>();
}

template <typename V, typename X>
void square(const Packed& bank, const Matrix& x, const int32_t* rows, const int32_t* shards,
            int64_t pairs, const Workspace& workspace, Stream stream) {
  const int64_t slices = std::min<int64_t>(divide_up(pairs, kSlice), 65535);
  const int64_t blocks = std::max<int64_t>(multiprocessors() / slices, 1);
  const int64_t tiles_a_block = divide_up(tiles_of(bank), blocks);
  int warps = kTileRows;  // or that halved, so that tiles end with a round
  std::size_t shared_bytes = 0;
  Layout layout = layout_for<V>(bank, slot_bytes<X, kGroup<V, X>>, &warps, &shared_bytes);
  layout.rows_a_block = tiles_a_block * kTileRows;
  launch<squares_kernel<V, X>>("side_norm", {divide_up(tiles_of(bank), tiles_a_block), slices},
                               warps * kWarp, shared_bytes, stream, bank, x, rows, shards, pairs,
                               workspace, layout);
}

}  // namespace

int64_t side_norm_workspace(const Packed& bank, int64_t, int64_t pairs) {
  return pairs * (tiles_of(bank) * static_cast<int64_t>(sizeof(double)) +
                  static_cast<int64_t>(sizeof(int64_t)));
}

void side_norm(const Packed& bank, const Matrix& x, const int32_t* rows, const int32_t* shards,
               int64_t pairs, float* norms, void* memory, Stream stream) {
  if (pairs == 0) return;
  const Workspace workspace = workspace_at(memory, bank, pairs);
  const int64_t blocks = divide_up(pairs, kThreads);
  launch<order_kernel>("side_norm", {blocks}, kThreads, 0, stream, shards, pairs, workspace.order);
  if (bank.rows > 0) {
    with_type(bank.dtype, [&](auto value) {
      using V = decltype(value);
      if (sizeof(V) == 2 && x.dtype == bank.dtype) {
        square<V, V>(bank, x, rows, shards, pairs, workspace, stream);
      } else {
        square<V, float>(bank, x, rows, shards, pairs, workspace, stream);
      }
    });
  }
  launch<root_kernel>("side_norm", {blocks}, kThreads, 0, stream, rows, x.rows, shards, bank.shards,
                      pairs, tiles_of(bank), workspace, norms);
}

}  // namespace wise::cuda
