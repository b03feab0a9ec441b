// What add_side and side_norm share: rows of activations that want the same shard are found by
// ballot and put into shared memory together, and the block's warps stream the shard's packed rows
// past them, each once for all of the group.
#pragma once

#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/packed_dot.cuh"

namespace wise::cuda {

// Rows of activations, held as X, that go together: no more than that a piece of a packed row fits
// into the shared memory of every card.
template <typename V, typename X>
inline constexpr int kGroup = sizeof(X) > sizeof(V) ? 2 : 4;

inline constexpr int64_t kSlice = kWarp;  // rows of activations a block looks at: a lane each

// Of a block, and so of a multiprocessor: as many as the registers allow. One row of activations
// takes few registers; it needs many warps, because each waits for its own loads.
template <int R>
inline constexpr int kMaxWarps = R == 1 ? 32 : 16;

// Columns of zeros ahead of a tile's, for the values of chunk 0 that are another piece's.
inline constexpr int kZeros = 32;

// How a launch is laid out; the same for all its blocks.
struct Layout {
  int tile_words;        // mask words whose columns are in shared memory at a time: whole pieces
  int piece;             // mask words of a piece
  int64_t rows_a_block;  // packed rows
  int staged_bytes;      // shared memory that activations take; behind it is the warps' scratch
  bool vector;           // mask rows may be read 16 bytes at once
};

// Bytes of a column in shared memory. Where several rows may go together, one row alone is held as
// fp32 whatever X is: that saves an instruction a value.
template <typename X, int R>
inline constexpr int64_t slot_bytes = R * sizeof(X) < 4 ? 4 : R * sizeof(X);

// The lowest `most` of the set bits.
__host__ __device__ __forceinline__ uint32_t lowest_bits(uint32_t bits, int most) {
  uint32_t taken = 0;
  for (int i = 0; i < most && bits != 0; ++i) {
    taken |= bits & (0u - bits);
    bits &= bits - 1;
  }
  return taken;
}

// The rows of activations of one group; behind the first `count` the first is repeated.
template <int R>
struct Group {
  int64_t row[R];
  int count;
};

// Neighbouring elements of a row, for one load.
template <typename S, int C>
struct alignas(sizeof(S) * C) Together {
  S of[C];
};

// Neighbouring columns of all rows of a group, as 16 bytes of slots.
template <typename X, int R, int C>
__device__ __forceinline__ void store_columns(const float (&columns)[R][C], Slot<X, R>* shared) {
  Slot<X, R> slots[C];
  for (int c = 0; c < C; ++c) {
    for (int r = 0; r < R; ++r) slots[c].of[r] = rounded<X>(columns[r][c]);
  }
  uint4 packed;
  std::memcpy(&packed, slots, sizeof packed);
  store_as<uint4>(shared, packed);
}

// Puts a tile's columns of the group's rows behind the zeros, all threads together. A thread writes
// 16 bytes at once, which no banks conflict on, whatever the types are.
template <typename S, typename X, int R>
__device__ __forceinline__ void stage_as(const Matrix& x, const Group<R>& group, int64_t first,
                                         int columns, Slot<X, R>* shared) {
  constexpr int C = 16 / static_cast<int>(sizeof(Slot<X, R>));
  const int left = static_cast<int>(min(x.columns - first, static_cast<int64_t>(columns)));
  const int begin = static_cast<int>(threadIdx.x) * C;
  const int step = static_cast<int>(blockDim.x) * C;
  const auto* data = static_cast<const S*>(x.data) + first * x.column_stride;
  const S* row[R];
#pragma unroll
  for (int r = 0; r < R; ++r) row[r] = data + group.row[r] * x.row_stride + begin * x.column_stride;
  // A tile begins with a multiple of 128 columns, so the rows' addresses decide.
  if (x.column_stride == 1 && x.columns % C == 0 &&
      (reinterpret_cast<uintptr_t>(data) | x.row_stride * sizeof(S)) % (C * sizeof(S)) == 0) {
    // All loads of a batch are under way before the first is waited for.
    constexpr int kBatch = R == 1 ? 8 / static_cast<int>(sizeof(S)) : 2;
#pragma unroll 1
    for (int from = begin; from < columns; from += kBatch * step) {
      Together<S, C> loaded[kBatch][R];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          loaded[i][r] = {};
          if (from + i * step < left) loaded[i][r] = load_as<Together<S, C>>(row[r]);
          row[r] += step;
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (from + i * step >= columns) break;
        float wide[R][C];
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int c = 0; c < C; ++c) wide[r][c] = to_float(loaded[i][r].of[c]);
        }
        store_columns<X>(wide, shared + kZeros + from + i * step);
      }
    }
    return;
  }
#pragma unroll 1
  for (int at = begin; at < columns; at += step) {
    float loaded[R][C];
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        loaded[r][c] = at + c < left ? to_float(row[r][c * x.column_stride]) : 0.0f;
      }
    }
    store_columns<X>(loaded, shared + kZeros + at);
#pragma unroll
    for (int r = 0; r < R; ++r) row[r] += step * x.column_stride;
  }
}

template <typename X, int R>
__device__ __forceinline__ void stage(const Matrix& x, const Group<R>& group, int64_t first,
                                      int columns, Slot<X, R>* shared) {
  for (int i = static_cast<int>(threadIdx.x); i < kZeros; i += static_cast<int>(blockDim.x)) {
    shared[i] = {};
  }
  if constexpr (sizeof(X) == 2) {
    // The host chooses a 16-bit X only where x is of that type.
    stage_as<X, X, R>(x, group, first, columns, shared);
  } else if (x.dtype == Dtype::kFloat32) {
    stage_as<float, X, R>(x, group, first, columns, shared);
  } else if (x.dtype == Dtype::kBFloat16) {
    stage_as<BFloat16, X, R>(x, group, first, columns, shared);
  } else {
    stage_as<Float16, X, R>(x, group, first, columns, shared);
  }
}

// For all packed rows [begin, end) of a shard: finish(row, sums) with the products of packed row
// `row` and the group's rows, NaN where the packed row is bad. Rows go to the warps in turn, a
// round of them at a time; a row is one warp's, whose first R lanes call finish. After a round all
// threads call after_round(its first row). expect(row) may ask early for memory that finish needs.
template <typename V, typename X, int R, int kAhead, typename Expect, typename Finish,
          typename AfterRound>
__device__ __forceinline__ void for_each_dot(const Packed& bank, const Matrix& x,
                                             const Layout& layout, int64_t shard,
                                             const Group<R>& group, int begin, int end,
                                             const Expect& expect, const Finish& finish,
                                             const AfterRound& after_round) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int words = static_cast<int>(bank.words);
  const int64_t first_row = shard * bank.rows;
  auto* shared = dynamic_shared<Slot<X, R>>();
  auto& scratch =
      *reinterpret_cast<Scratch<V>*>(dynamic_shared<unsigned char>() + layout.staged_bytes +
                                     warp * static_cast<int>(sizeof(Scratch<V>)));

  const auto ask_for = [&](int row) {
    if (row >= end) return;
    prefetch_row<V>(bank, first_row + row);
    if (lane < R) expect(row);
  };
  // Before anything waits for activations, memory is busy with the packed rows.
  ask_for(begin + warp);
  clear_scratch<V>(scratch);
  for (int round = begin; round < end; round += warps) {
    const int mine = round + warp;
    const bool busy = mine < end;
    RowCursor<V> row = {nullptr, 0};
    float sums[R] = {};
    int tile = 0;
    do {  // once where there are no columns: an empty row may be bad, too
      const int stop = min(tile + layout.tile_words, words);
      if (round == begin || layout.tile_words < words) {
        __syncthreads();
        stage<X, R>(x, group, int64_t{32} * tile, 32 * (stop - tile), shared);
        __syncthreads();
      }
      if (busy && tile == 0) {
        row = open_row<V>(bank, first_row + mine);
        ask_for(mine + warps);
      }
      for (int word = tile; busy && word < stop; word += layout.piece) {
        const int count = min(stop - word, layout.piece);
        const int columns =
            min(32 * count, static_cast<int>(bank.columns) - 32 * word) - 128 * lane;
        const uint32_t* mask = bank.mask + (first_row + mine) * bank.words + word + 4 * lane;
        LaneWords<V> lane_words;
#pragma unroll
        for (int q = 0; q < kQuads<V>; ++q) {
          constexpr int kStep = 4 * kWarp;
          lane_words.of[q] = load_words(mask + q * kStep, columns - q * 32 * kStep, layout.vector);
        }
        SharedAt<Slot<X, R>> staged(shared + kZeros);
        staged.move(32 * (word - tile));
        add_piece<V, X, R, kAhead>(bank, row, lane_words, count, staged, scratch, sums);
      }
      tile = stop;
    } while (tile < words);
    if (busy) {
      add_up_lanes<R>(sums);
      // All bits must have had a value, and all values a bit.
      if (row.left != 0) {
#pragma unroll
        for (int r = 0; r < R; ++r) sums[r] = not_a_number<float>();
      }
      if (lane < R) finish(mine, sums);
    }
    after_round(round);
  }
}

// Calls f(shard, group, member) for up to R rows at a time that want the same shard. A lane comes
// with one row of activations and the shard it wants, -1 for none; `member` is the lane whose row
// is the lane-th of the group. All warps of a block see the same groups, in the same order.
template <int R, typename F>
__device__ __forceinline__ void for_each_group(int wanted, int64_t row, const F& f) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  uint32_t left = __ballot_sync(kAllLanes, wanted >= 0);
  while (left != 0) {
    const int leader = select_bit(left, 0);
    const int shard = __shfl_sync(kAllLanes, wanted, leader);
    const uint32_t members = lowest_bits(__ballot_sync(kAllLanes, wanted == shard) & left, R);
    left &= ~members;
    Group<R> group;
    group.count = popcount(members);
    const int member = lane < group.count ? select_bit(members, lane) : leader;
    const int64_t of_member = __shfl_sync(kAllLanes, row, member);
#pragma unroll
    for (int r = 0; r < R; ++r) group.row[r] = __shfl_sync(kAllLanes, of_member, r);
    f(shard, group, member);
  }
}

// Shared memory a block may have on this card, less a little for what kernels declare themselves.
inline int64_t shared_a_block() {
  constexpr int kDeclared = 1024;
#ifdef WISE_EMULATE_CUDA
  return 99 * 1024 - kDeclared;  // the smallest card's
#else
  static std::array<std::atomic<int>, kDevices> known{};
  const int device = current_device("a kernel");
  std::atomic<int>& bytes = known[static_cast<std::size_t>(device)];
  if (bytes.load() == 0) {
    int asked = 0;
    require_success("a kernel", cudaDeviceGetAttribute(
                                    &asked, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    bytes.store(asked);
  }
  return bytes.load() - kDeclared;
#endif
}

// Tiles for a kernel whose columns take `slot_bytes`. Shared memory that is left over goes to the
// tile. `warps` is halved where that makes one tile of all columns, and until a piece fits.
template <typename V>
Layout layout_for(const Packed& bank, int64_t slot_bytes, int* warps, std::size_t* shared_bytes) {
  Layout layout;
  layout.piece = piece_words<V>(bank.words);
  layout.vector = bank.words % 4 == 0 && reinterpret_cast<uintptr_t>(bank.mask) % 16 == 0;
  const auto fitting = [&](int count) {
    const int64_t left = shared_a_block() - count * static_cast<int64_t>(sizeof(Scratch<V>));
    return (left - kZeros * slot_bytes) / (32 * slot_bytes);  // mask words
  };
  for (int fewer = *warps; fewer >= *warps / 2 && fewer > 0; fewer /= 2) {
    if (fitting(fewer) < bank.words) continue;
    *warps = fewer;
    break;
  }
  while (fitting(*warps) < layout.piece && *warps > 1) *warps /= 2;
  const int64_t most = fitting(*warps);
  const int64_t all = divide_up(bank.words, layout.piece) * layout.piece;
  layout.tile_words =
      static_cast<int>(most >= bank.words ? all : most / layout.piece * layout.piece);
  const int64_t staged = layout.tile_words < bank.words ? layout.tile_words : bank.words;
  layout.staged_bytes = static_cast<int>((kZeros + 32 * staged) * slot_bytes);
  *shared_bytes = static_cast<std::size_t>(layout.staged_bytes) + *warps * sizeof(Scratch<V>);
  return layout;
}

}  // namespace wise::cuda
