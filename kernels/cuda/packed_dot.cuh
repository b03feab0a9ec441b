// The product of packed rows with up to four rows of activations, a warp to a packed row.
//
// Each lane takes chunks of 32 bytes of values, straight into registers by aligned loads, and walks
// the mask's bits from where the chunk begins, gathering its activations from shared memory. Where
// chunks begin, a scan over the popcounts of a piece of the mask says.
//
// Why so, at density 0.2 in 16-bit types: what memory delivers leaves about 18 issue slots and 4.5
// shared-memory wavefronts for each 32 values on an H200. A lane for each column costs some eight
// instructions a column, 40 a value. A lane for each mask word reads values from shared memory too,
// with bank conflicts on top of those of the activations (3.5 wavefronts for 32 random banks). Here
// a value takes 12 instructions and one conflicted read; with what is shared by eight or sixteen
// values, about 20. So issue slots decide on an H200, and memory on cards with less of it.
//
// The order of a row's sum depends on its mask and on where in memory its values begin modulo 32
// bytes; neither on other rows nor on how many of them go together.
#pragma once

#include <type_traits>

#include "kernels/cuda/packed_walk.cuh"

namespace wise::cuda {

// Mask words of a piece at most, so that the table of chunks takes one KiB.
template <typename V>
inline constexpr int kPieceWords = 512 / static_cast<int>(sizeof(V));

// A lane has so many of them, four neighbours at a time.
template <typename V>
inline constexpr int kQuads = kPieceWords<V> / (4 * kWarp);

// Steps between two waits for shared memory.
inline constexpr int kGathered = 4;

// A row's words in equal pieces, in multiples of four. They are the same whatever fits into shared
// memory: sums start anew with each piece.
template <typename V>
__host__ __device__ __forceinline__ int piece_words(int64_t words) {
  const int64_t pieces = divide_up(words, kPieceWords<V>);
  return pieces == 0 ? 4 : static_cast<int>(divide_up(divide_up(words, pieces), 4) * 4);
}

// A warp's own shared memory.
template <typename V>
struct Scratch {
  uint32_t words[4 + kPieceWords<V> + 4];  // four ahead of the piece's, and four behind, zero
  uint16_t starts[kPieceWords<V> * 32 / kPerChunk<V> + 8];
  uint4 zeros[kPerChunk<V>];  // for idle lanes: one for each value of a chunk, however wide

  __device__ __forceinline__ uint32_t* piece() { return words + 4; }
};
static_assert(sizeof(Scratch<float>) % 16 == 0 && sizeof(Scratch<BFloat16>) % 16 == 0);

// Before the first piece of all; the warp must meet before the scratch is used.
template <typename V>
__device__ __forceinline__ void clear_scratch(Scratch<V>& scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane < kPerChunk<V>) scratch.zeros[lane] = make_uint4(0, 0, 0, 0);
  if (lane < 4) scratch.piece()[kPieceWords<V> + lane] = 0;
}

// One column of R rows of activations.
template <typename X, int R>
struct alignas(sizeof(X) * R) Slot {
  X of[R];
};

template <typename X, int R>
__device__ __forceinline__ void to_floats(const Slot<X, R>& slot, float (&out)[R]) {
  if constexpr (R == 1 || sizeof(X) == 4) {
    for (int r = 0; r < R; ++r) out[r] = to_float(slot.of[r]);
  } else {
    // As whole words: a half word apart would be an instruction more.
    uint32_t pairs[R / 2];
    std::memcpy(pairs, &slot, sizeof pairs);
    for (int r = 0; r < R; r += 2) {
      out[r] = low_float<X>(pairs[r / 2]);
      out[r + 1] = high_float<X>(pairs[r / 2]);
    }
  }
}

// Asks for a line of memory to be brought into the L2 cache. It takes no register while it is under
// way, so a warp may ask for whole rows ahead; it changes no result.
__device__ __forceinline__ void prefetch(const void* address) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  (void)address;
#endif
}

// A packed row on its way through the pieces.
template <typename V>
struct RowCursor {
  const V* next;  // the next piece's first value
  int left;       // how many values there are from there on; -1 once the row was found bad
};

template <typename V>
__device__ __forceinline__ RowCursor<V> open_row(const Packed& bank, int64_t packed_row) {
  const int64_t first = bank.row_ptr[packed_row];
  const int64_t last = bank.row_ptr[packed_row + 1];
  const bool good =
      first >= 0 && first <= last && last <= bank.count && last - first <= bank.columns;
  const auto* values = static_cast<const V*>(bank.values);
  return good ? RowCursor<V>{values + first, static_cast<int>(last - first)}
              : RowCursor<V>{values, -1};
}

// Asks for all of a row, all lanes of a warp together.
template <typename V>
__device__ __forceinline__ void prefetch_row(const Packed& bank, int64_t packed_row) {
  constexpr int kLine = 128;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto* mask = reinterpret_cast<const char*>(bank.mask + packed_row * bank.words);
  const int mask_bytes = 4 * static_cast<int>(bank.words);
#pragma unroll 1
  for (int at = lane * kLine; at < mask_bytes; at += kWarp * kLine) prefetch(mask + at);
  const RowCursor<V> row = open_row<V>(bank, packed_row);
  const auto* values = reinterpret_cast<const char*>(row.next);
  const int value_bytes = row.left * static_cast<int>(sizeof(V));
#pragma unroll 1
  for (int at = lane * kLine; at < value_bytes; at += kWarp * kLine) prefetch(values + at);
}

// Four words of a row, the first of them at `from`, of which `columns` are columns (left).
__device__ __forceinline__ uint4 load_words(const uint32_t* from, int columns, bool vector) {
  uint4 four = make_uint4(0, 0, 0, 0);
  if (columns <= 0) return four;
  if (vector) {
    four = load_as<uint4>(from);
  } else {
    four.x = from[0];
    if (columns > 32) four.y = from[1];
    if (columns > 64) four.z = from[2];
    if (columns > 96) four.w = from[3];
  }
  if (columns < 128) {
    const auto kept = [columns](int before) {
      return columns <= before ? 0u : low_bits(columns - before);
    };
    four.x &= kept(0);
    four.y &= kept(32);
    four.z &= kept(64);
    four.w &= kept(96);
  }
  return four;
}

// The values of a piece, as chunks. Few numbers, because they live in registers through the walk.
template <typename V>
struct Chunks {
  const char* first;  // 32-byte aligned; may lie before the values
  int total;          // values of the piece, and of what shares its first chunk
  int full;           // as many chunks, from the first on, hold nothing that lies behind the values

  __device__ __forceinline__ Chunks(const Packed& bank, const V* next, int lead, int values) {
    first = reinterpret_cast<const char*>(next - lead);
    total = lead + values;
    // Only a tensor that is not aligned itself begins within a chunk.
    full = first < static_cast<const char*>(bank.values) ? 0 : total / kPerChunk<V>;
  }

  __device__ __forceinline__ int count() const { return (total + kPerChunk<V> - 1) / kPerChunk<V>; }

  // What follows the piece's values.
  __device__ __forceinline__ const V* end() const {
    return reinterpret_cast<const V*>(first) + total;
  }

  // Half of a chunk; zeros for what lies behind the values, and never from outside the tensor.
  __device__ __forceinline__ uint4 load(const Packed& bank, int chunk, int half) const {
    const char* from = first + (32 * static_cast<int64_t>(chunk) + 16 * half);
    if (__builtin_expect(chunk < full, 1)) return load_once<uint4>(from);
    const int own = total - chunk * kPerChunk<V> - half * kPerVector<V>;
    if (own <= 0) return make_uint4(0, 0, 0, 0);
    const int64_t index = reinterpret_cast<const V*>(from) - static_cast<const V*>(bank.values);
    if (index >= 0 && index + kPerVector<V> <= bank.count) {
      return only_elements<V>(load_once<uint4>(from), 0, own);
    }
    using Raw = std::conditional_t<sizeof(V) == 4, uint32_t, uint16_t>;
    constexpr int kBits = 8 * static_cast<int>(sizeof(V));
    uint64_t low = 0;
    uint64_t high = 0;
#pragma unroll 1
    for (int i = kPerVector<V>; i-- > 0;) {
      high = high << kBits | low >> (64 - kBits);
      low <<= kBits;
      if (i < own && index + i >= 0) low |= reinterpret_cast<const Raw*>(from)[i];
    }
    return make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
                      static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32));
  }
};

// The mask words of a piece that are one lane's.
template <typename V>
struct LaneWords {
  uint4 of[kQuads<V>];
};

__device__ __forceinline__ int bits_in(const uint4& four) {
  return popcount(four.x) + popcount(four.y) + popcount(four.z) + popcount(four.w);
}

// Where chunks begin in four words, the first of which is `first_word`; `rank` is that of their
// first value.
template <typename V>
__device__ __forceinline__ void fill_table(Scratch<V>& scratch, const uint4& four, int first_word,
                                           int rank, int lead) {
  store_as<uint4>(scratch.piece() + first_word, four);
  const uint32_t word[4] = {four.x, four.y, four.z, four.w};
  int chunk = chunk_from<V>(rank, lead);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int last = rank + popcount(word[i]);
    for (; rank_of_chunk<V>(chunk, lead) < last; ++chunk) {
      scratch.starts[chunk] = entry_of({first_word + i, rank_of_chunk<V>(chunk, lead) - rank});
    }
    rank = last;
  }
}

// Adds a piece's products to `sums`, which hold this lane's share. All lanes of the warp call it.
// `x` is for the piece's first column. Values are loaded kAhead half chunks before they are needed.
template <typename V, typename X, int R, int kAhead>
__device__ __forceinline__ void add_piece(const Packed& bank, RowCursor<V>& row,
                                          const LaneWords<V>& lane_words, int words,
                                          SharedAt<Slot<X, R>> x, Scratch<V>& scratch,
                                          float (&sums)[R]) {
  constexpr int kEach = kPerVector<V>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int rank[kQuads<V>];
  int values = 0;
#pragma unroll
  for (int q = 0; q < kQuads<V>; ++q) {
    const int mine = bits_in(lane_words.of[q]);
    int upto = mine;
#pragma unroll
    for (int by = 1; by < kWarp; by *= 2) {
      const int before = __shfl_up_sync(kAllLanes, upto, by);
      if (lane >= by) upto += before;
    }
    rank[q] = values + upto - mine;
    values += __shfl_sync(kAllLanes, upto, kWarp - 1);
  }
  if (values > row.left) row.left = -1;
  if (row.left < 0) return;
  row.left -= values;
  const int lead = static_cast<int>(reinterpret_cast<uintptr_t>(row.next) % 32 / sizeof(V));
  const Chunks<V> chunks(bank, row.next, lead, values);
  uint4 ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) ahead[i] = chunks.load(bank, lane + i / 2 * kWarp, i % 2);
  if (lane == 0) {
    scratch.piece()[-1] = lead_word(lead);
    if (lead > 0) scratch.starts[0] = entry_of({-1, 0});
  }
#pragma unroll
  for (int q = 0; q < kQuads<V>; ++q) {
    fill_table<V>(scratch, lane_words.of[q], 4 * (lane + q * kWarp), rank[q], lead);
  }
  __syncwarp();
  // Foreign values must not get into the sums: they may be anything.
  if (lane == 0) {
    ahead[0] = only_elements<V>(ahead[0], lead, kEach);
    ahead[1] = only_elements<V>(ahead[1], lead - kEach, kEach);
  }

  const uint32_t* piece = scratch.piece();
  const SharedAt<Slot<X, R>> zeros(reinterpret_cast<const Slot<X, R>*>(scratch.zeros));
  Walk<Slot<X, R>> walk = idle_walk(zeros);
  const int halves = 2 * static_cast<int>(divide_up(chunks.count(), kWarp));
#pragma unroll 1
  for (int step = 0; step < halves; ++step) {
    const int half = step % 2;
    const int chunk = lane + step / 2 * kWarp;
    if (half != 0) {
      // 96 bits are enough for one half, rarely for both.
      walk = walk_on(piece, words, walk, x, zeros);
    } else if (chunk < chunks.count()) {
      const ChunkStart start = start_of(scratch.starts[chunk]);
      walk = walk_from(piece, start.word, without_lowest(piece[start.word], start.skip), x);
    } else {
      walk = idle_walk(zeros);
    }
    // A few are gathered before any is used, or each step would wait for shared memory.
#pragma unroll
    for (int first = 0; first < kEach; first += kGathered) {
      Slot<X, R> right[kGathered];
#pragma unroll
      for (int i = 0; i < kGathered; ++i) {
        if (__builtin_expect(walk.now == 0, 0)) walk = walk_on(piece, words, walk, x, zeros);
        take_bit(walk);
        right[i] = *walk.x;
      }
      float value[kEach];
      to_floats<V>(ahead[0], value);
#pragma unroll
      for (int i = 0; i < kGathered; ++i) {
        float wide[R];
        to_floats<X, R>(right[i], wide);
#pragma unroll
        for (int r = 0; r < R; ++r) sums[r] = fmaf(value[first + i], wide[r], sums[r]);
      }
    }
#pragma unroll
    for (int i = 1; i < kAhead; ++i) ahead[i - 1] = ahead[i];
    ahead[kAhead - 1] = chunks.load(bank, lane + (step + kAhead) / 2 * kWarp, (step + kAhead) % 2);
  }
  row.next = chunks.end();  // not kept, to free registers
  __syncwarp();             // the next piece overwrites the scratch
}

// The warp's sums, in every lane.
template <int R>
__device__ __forceinline__ void add_up_lanes(float (&sums)[R]) {
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) {
#pragma unroll
    for (int r = 0; r < R; ++r) sums[r] += __shfl_xor_sync(kAllLanes, sums[r], by);
  }
}

}  // namespace wise::cuda
