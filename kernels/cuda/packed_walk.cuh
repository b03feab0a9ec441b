// Arithmetic on one piece of a packed row, for host and device: tests call these same functions on
// the CPU.
//
// A piece is some mask words and the values of their bits. The values are read in chunks: aligned
// 32 bytes each, so the first chunk may begin with values of what comes before the piece (its
// `lead`), and the last may end with values of what comes after.
#pragma once

#include "kernels/cuda/bits.cuh"
#include "kernels/cuda/half.cuh"

namespace wise::cuda {

template <typename V>
inline constexpr int kPerChunk = 2 * kPerVector<V>;

// A table entry of the packed kernels: the piece's word in which a chunk begins, and how many of
// the word's set bits belong to earlier chunks. Word -1 goes ahead of the piece: its bits stand for
// the foreign values of chunk 0. Fits 16 bits: at most 256 words, and 31 earlier bits.
struct ChunkStart {
  int word;
  int skip;
};

__host__ __device__ __forceinline__ uint16_t entry_of(ChunkStart start) {
  return static_cast<uint16_t>((start.word + 1) << 5 | start.skip);
}

__host__ __device__ __forceinline__ ChunkStart start_of(uint16_t entry) {
  return {(entry >> 5) - 1, entry & 31};
}

// Word -1: its last `lead` columns.
__host__ __device__ __forceinline__ uint32_t lead_word(int lead) { return ~low_bits(32 - lead); }

// The first chunk that begins at the piece's value `rank` or later.
template <typename V>
__host__ __device__ __forceinline__ int chunk_from(int rank, int lead) {
  return (rank + lead + kPerChunk<V> - 1) / kPerChunk<V>;
}

// The piece's value with which a chunk begins; that of chunk 0 is -lead.
template <typename V>
__host__ __device__ __forceinline__ int rank_of_chunk(int chunk, int lead) {
  return chunk * kPerChunk<V> - lead;
}

__host__ __device__ __forceinline__ uint32_t reversed(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __brev(bits);
#else
  uint32_t out = 0;
  for (int i = 0; i < 32; ++i) out |= (bits >> i & 1u) << (31 - i);
  return out;
#endif
}

// Without its `count` lowest set bits. Rarely more than seven, hence the straight line for those.
__host__ __device__ __forceinline__ uint32_t without_lowest(uint32_t bits, int count) {
  if ((count & 4) != 0) {
    for (int i = 0; i < 4; ++i) bits &= bits - 1;
  }
  if ((count & 2) != 0) {
    for (int i = 0; i < 2; ++i) bits &= bits - 1;
  }
  if ((count & 1) != 0) bits &= bits - 1;
  if (__builtin_expect(count >= 8, 0)) {
#pragma unroll 1
    for (int i = count & ~7; i > 0; --i) bits &= bits - 1;
  }
  return bits;
}

// Sixteen bytes with nothing but the elements [from, to) of V left.
template <typename V>
__host__ __device__ __forceinline__ uint4 only_elements(uint4 chunk, int from, int to) {
  constexpr int kBits = 8 * static_cast<int>(sizeof(V));
  constexpr int kHalf = 64 / kBits;
  // The lowest `count` elements of eight bytes.
  const auto lowest = [](int count) {
    return count >= kHalf ? ~uint64_t{0} : (uint64_t{1} << (count < 0 ? 0 : count) * kBits) - 1;
  };
  const uint64_t low = lowest(to) & ~lowest(from);
  const uint64_t high = lowest(to - kHalf) & ~lowest(from - kHalf);
  return make_uint4(
      chunk.x & static_cast<uint32_t>(low), chunk.y & static_cast<uint32_t>(low >> 32),
      chunk.z & static_cast<uint32_t>(high), chunk.w & static_cast<uint32_t>(high >> 32));
}

__host__ __device__ __forceinline__ int leading_zeros(uint32_t bits) {
#ifdef __CUDA_ARCH__
  int count;  // for a word that is not zero, in one instruction; __clz takes two
  asm("bfind.shiftamt.u32 %0, %1;" : "=r"(count) : "r"(bits));
  return count;
#else
  return __builtin_clz(bits);
#endif
}

// The upper word of (high:low) << by, 0 <= by < 32.
__host__ __device__ __forceinline__ uint32_t shifted(uint32_t high, uint32_t low, int by) {
#ifdef __CUDA_ARCH__
  return __funnelshift_l(low, high, by);
#else
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) << by >> 32);
#endif
}

// A pointer into shared memory that advances by one instruction: through a loop, the compiler would
// take a plain one for a pointer to anything, of 64 bits.
template <typename S>
struct SharedAt {
#ifdef __CUDA_ARCH__
  uint32_t address;

  __device__ __forceinline__ explicit SharedAt(const S* from)
      : address(static_cast<uint32_t>(__cvta_generic_to_shared(from))) {}
  __device__ __forceinline__ S operator*() const {
    return *static_cast<const S*>(__cvta_shared_to_generic(address));
  }
  __device__ __forceinline__ void move(int by) { address += by * static_cast<int>(sizeof(S)); }
  __device__ __forceinline__ int operator-(SharedAt other) const {
    return static_cast<int>(address - other.address) / static_cast<int>(sizeof(S));
  }
#else
  const S* address;

  explicit SharedAt(const S* from) : address(from) {}
  S operator*() const { return *address; }
  void move(int by) { address += by; }
  int operator-(SharedAt other) const { return static_cast<int>(address - other.address); }
#endif
};

// Where a lane is: 96 bits of the mask, first column first, the uppermost of which is the column
// whose activations (S) are at `x`. That bit itself is gone once it was taken.
template <typename S>
struct Walk {
  uint32_t now;
  uint32_t next;
  uint32_t after;
  SharedAt<S> x;
};

// Of a lane that has no values (left): it takes zeros, of which it needs as many as a chunk has
// values.
template <typename S>
__host__ __device__ __forceinline__ Walk<S> idle_walk(SharedAt<S> zeros) {
  return {~0u, 0u, 0u, zeros};
}

// From a word of the piece of which only `bits` are left; `x` is for the piece's first column. Two
// zero words must follow the piece's own.
template <typename S>
__host__ __device__ __forceinline__ Walk<S> walk_from(const uint32_t* words, int word,
                                                      uint32_t bits, SharedAt<S> x) {
  x.move(32 * word);
  return {reversed(bits), reversed(words[word + 1]), reversed(words[word + 2]), x};
}

// Goes on behind walk.x with 96 bits again; an idle lane stays idle, for zeros lie behind all x.
template <typename S>
__host__ __device__ __forceinline__ Walk<S> walk_on(const uint32_t* words, int count,
                                                    const Walk<S>& walk, SharedAt<S> x,
                                                    SharedAt<S> zeros) {
  const int from = walk.x - x + 1;
  int word = from >> 5;
  if (word >= count) return idle_walk(zeros);
  uint32_t bits = words[word] & ~low_bits(from & 31);
  while (bits == 0) {
    if (++word >= count) return idle_walk(zeros);
    bits = words[word];
  }
  return walk_from(words, word, bits, x);
}

// Moves to the next set bit, which must be in `now`, and takes it; walk.x is what it stands for.
template <typename S>
__host__ __device__ __forceinline__ void take_bit(Walk<S>& walk) {
  const int by = leading_zeros(walk.now);
  walk.now = shifted(walk.now, walk.next, by) & 0x7fffffffu;
  walk.next = shifted(walk.next, walk.after, by);
  walk.after <<= by;
  walk.x.move(by);
}

}  // namespace wise::cuda
