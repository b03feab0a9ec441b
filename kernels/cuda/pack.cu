// pack and unpack: copies of masked entries, whose speed is memory's. A block takes one row, a warp
// one stretch of its columns. Each lane moves sixteen bytes of the dense row at once; where its
// entries are among the packed ones, a scan over the warp says.
#include "kernels/cuda/bits.cuh"
#include "kernels/cuda/launch.cuh"

namespace wise::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kScanThreads = 1024;
constexpr int kScanEach = 4;
constexpr int64_t kScanned = kScanThreads * kScanEach;  // numbers a block scans at once

__device__ int sum_of_warp(int value) {
  for (int by = kWarp / 2; by > 0; by /= 2) value += __shfl_xor_sync(kAllLanes, value, by);
  return value;
}

// The sum of the lanes up to and including this one.
template <typename T>
__device__ T scan_of_warp(T value) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int by = 1; by < kWarp; by *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, by);
    if (lane >= by) value += before;
  }
  return value;
}

// Set bits of the words [begin, end) of a row; every lane of the warp gets the sum.
__device__ int count_words(const uint32_t* row, int64_t begin, int64_t end, int64_t columns) {
  int count = 0;
  for (int64_t w = begin + static_cast<int>(threadIdx.x) % kWarp; w < end; w += kWarp) {
    count += popcount(row[w] & valid_bits(w, columns));
  }
  return sum_of_warp(count);
}

// counts[r] = set bits of row r; one warp a row.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const uint32_t* mask, int64_t rows, int64_t columns, int64_t* counts) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (row >= rows) return;
  const int64_t words = words_of(columns);
  const int count = count_words(mask + row * words, 0, words, columns);
  if (threadIdx.x % kWarp == 0) counts[row] = count;
}

// One block scans, in place, every stride-th number of numbers[begin, end), `kScanned` at a time:
// each becomes the sum of those up to it, plus the carry of the pieces before.
__device__ void scan_numbers(int64_t* numbers, int64_t begin, int64_t end, int64_t stride) {
  WISE_SHARED(int64_t, totals, [kScanThreads / kWarp]);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int64_t carry = 0;
  for (int64_t piece = begin; piece < end; piece += kScanned * stride) {
    int64_t each[kScanEach];
    int64_t sum = 0;
    const int64_t first = piece + threadIdx.x * kScanEach * stride;
#pragma unroll
    for (int i = 0; i < kScanEach; ++i) {
      const int64_t at = first + i * stride;
      sum += at < end ? numbers[at] : 0;
      each[i] = sum;
    }
    const int64_t upto = scan_of_warp(sum);
    if (lane == kWarp - 1) totals[warp] = upto;
    __syncthreads();
    const int64_t total = scan_of_warp(totals[lane]);
    const int64_t before = warp == 0 ? 0 : __shfl_sync(kAllLanes, total, warp - 1);
    const int64_t offset = carry + before + upto - sum;
#pragma unroll
    for (int i = 0; i < kScanEach; ++i) {
      const int64_t at = first + i * stride;
      if (at < end) numbers[at] = offset + each[i];
    }
    carry += __shfl_sync(kAllLanes, total, kWarp - 1);
    __syncthreads();  // before the next piece overwrites the totals
  }
}

// The scan over all rows takes three steps and no memory of its own: pieces are scanned apart, so
// that the last number of each is its total; the totals are scanned where they are; and what was
// summed before a piece is added to its other numbers. Integers: the same in any order.
__global__ void __launch_bounds__(kScanThreads, 1)
    scan_pieces_kernel(int64_t* row_ptr, int64_t rows) {
  if (blockIdx.x == 0 && threadIdx.x == 0) row_ptr[0] = 0;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kScanned;
  scan_numbers(row_ptr + 1, begin, min(begin + kScanned, rows), 1);
}

__global__ void __launch_bounds__(kScanThreads, 1)
    scan_totals_kernel(int64_t* row_ptr, int64_t rows) {
  scan_numbers(row_ptr + 1, kScanned - 1, rows, kScanned);
}

__global__ void __launch_bounds__(kScanThreads, 1)
    add_totals_kernel(int64_t* row_ptr, int64_t rows) {
  // The first piece needs nothing added, and has no block.
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) + 1) * kScanned;
  const int64_t before = row_ptr[begin];
  for (int64_t at = begin + threadIdx.x; at < min(begin + kScanned, rows); at += kScanThreads) {
    // A full piece's last number is its total, which the second step has dealt with.
    if (at != begin + kScanned - 1) row_ptr[1 + at] += before;
  }
}

// The columns of one row that one warp goes through, and where their values are in the packed row.
struct Stretch {
  int64_t begin;
  int64_t end;
  int64_t rank;
};

// Shares out the row's words among the block's warps, and counts what lies before each. `total`
// becomes the number of bits set in the row.
__device__ Stretch stretch_of(const uint32_t* row, int64_t columns, int* total) {
  WISE_SHARED(int, counts, [kWarps]);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t words = words_of(columns);
  // A multiple of eight words: sixteen bytes of the narrowest type take no more than that.
  const int64_t each = divide_up(divide_up(words, kWarps), 8) * 8;
  const int64_t begin = min(warp * each, words);
  const int64_t end = min(begin + each, words);
  const int count = count_words(row, begin, end, columns);
  if (threadIdx.x % kWarp == 0) counts[warp] = count;
  __syncthreads();
  int64_t rank = 0;
  *total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) rank += counts[w];
    *total += counts[w];
  }
  return {32 * begin, min(32 * end, columns), rank};
}

template <typename T>
inline constexpr int kEach = 16 / static_cast<int>(sizeof(T));  // columns a lane has at a time

// The mask bits of a lane's columns, column `column` first.
template <typename T>
__device__ uint32_t lane_bits(const uint32_t* row, int64_t column, int64_t end) {
  if (column >= end) return 0;
  const uint32_t word = row[column / 32] & valid_bits(column / 32, end);
  return bit_field(word, static_cast<int>(column % 32), kEach<T>);
}

// One lane's columns. T is an integer as wide as the storage type: nothing is computed with it.
template <typename T>
struct Entries {
  T of[kEach<T>];
};

template <typename T>
__device__ Entries<T> entries_of(const uint4& vector) {
  const uint32_t word[4] = {vector.x, vector.y, vector.z, vector.w};
  Entries<T> out;
#pragma unroll
  for (int i = 0; i < kEach<T>; ++i) {
    out.of[i] = static_cast<T>(sizeof(T) == 4 ? word[i % 4] : word[i / 2] >> (16 * (i % 2)));
  }
  return out;
}

template <typename T>
__device__ uint4 vector_of(const Entries<T>& entries) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      word[i] = entries.of[i];
    } else {
      word[i] = entries.of[2 * i] | uint32_t{entries.of[2 * i + 1]} << 16;
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const T* delta, const uint32_t* mask, int64_t columns, const int64_t* row_ptr,
                T* values) {
  WISE_SHARED(T, staged, [kWarps][kWarp * kEach<T>]);
  const int64_t row = blockIdx.x;
  const uint32_t* bits_of_row = mask + row * words_of(columns);
  const T* dense = delta + row * columns;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  T* stage = staged[threadIdx.x / kWarp];
  int total;
  const Stretch stretch = stretch_of(bits_of_row, columns, &total);
  T* packed = values + row_ptr[row] + stretch.rank;
  const bool aligned = reinterpret_cast<uintptr_t>(dense) % 16 == 0;
  for (int64_t from = stretch.begin; from < stretch.end; from += kWarp * kEach<T>) {
    const int64_t column = from + lane * kEach<T>;
    const uint32_t bits = lane_bits<T>(bits_of_row, column, stretch.end);
    Entries<T> entries{};
    if (aligned && column + kEach<T> <= columns) {
      if (bits != 0) entries = entries_of<T>(load_once<uint4>(dense + column));
    } else {
#pragma unroll
      for (int i = 0; i < kEach<T>; ++i) {
        if ((bits >> i & 1u) != 0) entries.of[i] = dense[column + i];
      }
    }
    // Through shared memory, so that the warp writes values that lie side by side.
    const int upto = scan_of_warp(popcount(bits));
    int next = upto - popcount(bits);
#pragma unroll
    for (int i = 0; i < kEach<T>; ++i) {
      if ((bits >> i & 1u) != 0) stage[next++] = entries.of[i];
    }
    __syncwarp();
    const int found = __shfl_sync(kAllLanes, upto, kWarp - 1);
    for (int i = lane; i < found; i += kWarp) packed[i] = stage[i];
    __syncwarp();
    packed += found;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) unpack_kernel(Packed shard, T* delta) {
  const int64_t row = blockIdx.x;
  const uint32_t* bits_of_row = shard.mask + row * shard.words;
  T* dense = delta + row * shard.columns;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int total;
  const Stretch stretch = stretch_of(bits_of_row, shard.columns, &total);
  const int64_t first = shard.row_ptr[row];
  const bool good = row_fits(first, shard.row_ptr[row + 1], total, shard.count);
  const T* packed = static_cast<const T*>(shard.values) + (good ? first : 0) + stretch.rank;
  const bool aligned = reinterpret_cast<uintptr_t>(dense) % 16 == 0;
  for (int64_t from = stretch.begin; from < stretch.end; from += kWarp * kEach<T>) {
    const int64_t column = from + lane * kEach<T>;
    const uint32_t bits = lane_bits<T>(bits_of_row, column, stretch.end);
    const int upto = scan_of_warp(popcount(bits));
    int next = upto - popcount(bits);
    Entries<T> entries;
#pragma unroll
    for (int i = 0; i < kEach<T>; ++i) {
      const bool chosen = (bits >> i & 1u) != 0;
      // All ones are NaN in each of the storage types.
      entries.of[i] = !good ? static_cast<T>(~T{0}) : chosen ? packed[next] : T{0};
      next += chosen;
    }
    if (aligned && column + kEach<T> <= stretch.end) {
      store_as(dense + column, vector_of(entries));
    } else {
#pragma unroll
      for (int i = 0; i < kEach<T>; ++i) {
        if (column + i < stretch.end) dense[column + i] = entries.of[i];
      }
    }
    packed += __shfl_sync(kAllLanes, upto, kWarp - 1);
  }
}

}  // namespace

void count_rows(const uint32_t* mask, int64_t rows, int64_t columns, int64_t* row_ptr,
                Stream stream) {
  launch<count_kernel>("count_rows", {divide_up(rows, kWarps)}, kThreads, 0, stream, mask, rows,
                       columns, row_ptr + 1);
  const int64_t pieces = divide_up(rows, kScanned);
  // Without a row there is still the 0 at the front.
  launch<scan_pieces_kernel>("count_rows", {pieces > 0 ? pieces : 1}, kScanThreads, 0, stream,
                             row_ptr, rows);
  if (pieces < 2) return;
  launch<scan_totals_kernel>("count_rows", {1}, kScanThreads, 0, stream, row_ptr, rows);
  launch<add_totals_kernel>("count_rows", {pieces - 1}, kScanThreads, 0, stream, row_ptr, rows);
}

void pack(const void* delta, Dtype dtype, const uint32_t* mask, int64_t rows, int64_t columns,
          const int64_t* row_ptr, void* values, Stream stream) {
  if (columns == 0) return;
  if (size_of(dtype) == 4) {
    launch<pack_kernel<uint32_t>>("pack", {rows}, kThreads, 0, stream,
                                  static_cast<const uint32_t*>(delta), mask, columns, row_ptr,
                                  static_cast<uint32_t*>(values));
  } else {
    launch<pack_kernel<uint16_t>>("pack", {rows}, kThreads, 0, stream,
                                  static_cast<const uint16_t*>(delta), mask, columns, row_ptr,
                                  static_cast<uint16_t*>(values));
  }
}

void unpack(const Packed& shard, void* delta, Stream stream) {
  if (shard.columns == 0) return;
  if (size_of(shard.dtype) == 4) {
    launch<unpack_kernel<uint32_t>>("unpack", {shard.rows}, kThreads, 0, stream, shard,
                                    static_cast<uint32_t*>(delta));
  } else {
    launch<unpack_kernel<uint16_t>>("unpack", {shard.rows}, kThreads, 0, stream, shard,
                                    static_cast<uint16_t*>(delta));
  }
}

int64_t read_back(const int64_t* device_value, Stream stream) {
  int64_t value = 0;
  copy_to_host("read_back", &value, device_value, sizeof value, stream);
  return value;
}

}  // namespace wise::cuda
