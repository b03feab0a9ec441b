// A small SIMT emulator: what kernels/cuda/simt.cuh offers in place of <cuda_runtime.h>, so that
// the very .cu files run in the test suite. Every CUDA thread is a fiber; blocks run one after
// another.
//
// It is stricter than a card. A launch ends with an exception, naming the place, when lanes that a
// mask names do not meet, when a barrier is not reached by all threads, when a lane reads from one
// that takes no part, or when a vector access is misaligned. Shared memory is full of NaN at the
// start of every block. The order in which threads and blocks run is permuted by a seed
// (wise_emulator_schedule), so that a missing barrier shows under some seeds.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Of the thread that runs; every switch of fibers sets them.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace wise::cuda::emulator {

using Place = std::source_location;

struct Extent {
  int64_t x, y, z;
};

// What a collective does with the lanes' operands.
enum class Kind : uint8_t {
  kSyncWarp,
  kShuffle,  // operand: the source lane
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kMatchAny,
  kAdd,
  kMin,
  kMax,
  kAnd,
  kOr,
  kXor,
};

// Runs `thread` once for every thread of the grid; the closure is called through `call`.
void run_grid(const char* name, Extent grid, int threads, std::size_t shared_bytes,
              void (*call)(const void*), const void* thread);

template <typename F>
void run_grid(const char* name, Extent grid, int threads, std::size_t shared_bytes,
              const F& thread) {
  run_grid(
      name, grid, threads, shared_bytes, [](const void* f) { (*static_cast<const F*>(f))(); },
      &thread);
}

// Ends the launch with an exception that names the kernel and the thread.
[[noreturn]] void fail(const char* reason, const Place& place);

// Waits for the lanes of `mask`; returns what `kind` makes of their values.
uint64_t warp_collective(Kind kind, unsigned mask, uint64_t value, int operand, int width,
                         const Place& place);
// Waits for all threads of the block; returns how many of them passed true.
int block_barrier(bool value, const Place& place);

void* dynamic_shared();
// The block's memory of one WISE_SHARED variable, by the address of its tag.
void* static_shared(const void* tag, std::size_t size);

inline void require_aligned(const void* address, std::size_t size, const Place& place) {
  if (reinterpret_cast<uintptr_t>(address) % size != 0) fail("misaligned vector access", place);
}

template <typename T>
uint64_t to_word(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <typename T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <typename T>
T shuffle(Kind kind, unsigned mask, T value, int operand, int width, const Place& place) {
  return from_word<T>(warp_collective(kind, mask, to_word(value), operand, width, place));
}

template <typename T>
T reduce(Kind kind, unsigned mask, T value, const Place& place) {
  // Sign extension makes signed minima and maxima those of 64-bit numbers.
  const uint64_t word = static_cast<uint64_t>(static_cast<int64_t>(value));
  return static_cast<T>(warp_collective(kind, mask, word, 0, 32, place));
}

}  // namespace wise::cuda::emulator

#define WISE_SHARED(type, name, ...)              \
  using name##_type = type __VA_ARGS__;           \
  static const char name##_tag = 0;               \
  name##_type& name = *static_cast<name##_type*>( \
      wise::cuda::emulator::static_shared(&name##_tag, sizeof(name##_type)))

#define WISE_PLACE wise::cuda::emulator::Place place = wise::cuda::emulator::Place::current()
#define WISE_EMULATOR wise::cuda::emulator

inline void __syncthreads(WISE_PLACE) { WISE_EMULATOR::block_barrier(true, place); }
inline int __syncthreads_count(int value, WISE_PLACE) {
  return WISE_EMULATOR::block_barrier(value != 0, place);
}
inline int __syncthreads_or(int value, WISE_PLACE) {
  return WISE_EMULATOR::block_barrier(value != 0, place) > 0;
}
inline int __syncthreads_and(int value, WISE_PLACE) {
  return WISE_EMULATOR::block_barrier(value == 0, place) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, WISE_PLACE) {
  WISE_EMULATOR::warp_collective(WISE_EMULATOR::Kind::kSyncWarp, mask, 0, 0, 32, place);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, WISE_PLACE) {
  return WISE_EMULATOR::shuffle(WISE_EMULATOR::Kind::kShuffle, mask, value, lane, width, place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, WISE_PLACE) {
  return WISE_EMULATOR::shuffle(WISE_EMULATOR::Kind::kShuffleUp, mask, value, static_cast<int>(by),
                                width, place);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, WISE_PLACE) {
  return WISE_EMULATOR::shuffle(WISE_EMULATOR::Kind::kShuffleDown, mask, value,
                                static_cast<int>(by), width, place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32, WISE_PLACE) {
  return WISE_EMULATOR::shuffle(WISE_EMULATOR::Kind::kShuffleXor, mask, value, with, width, place);
}

inline unsigned __ballot_sync(unsigned mask, int value, WISE_PLACE) {
  return static_cast<unsigned>(
      WISE_EMULATOR::warp_collective(WISE_EMULATOR::Kind::kBallot, mask, value != 0, 0, 32, place));
}
inline int __any_sync(unsigned mask, int value, WISE_PLACE) {
  return __ballot_sync(mask, value, place) != 0;
}
inline int __all_sync(unsigned mask, int value, WISE_PLACE) {
  return __ballot_sync(mask, value, place) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, WISE_PLACE) {
  return static_cast<unsigned>(WISE_EMULATOR::warp_collective(
      WISE_EMULATOR::Kind::kMatchAny, mask, WISE_EMULATOR::to_word(value), 0, 32, place));
}

template <typename T>
  requires(std::is_same_v<T, int> || std::is_same_v<T, unsigned>)
T __reduce_add_sync(unsigned mask, T value, WISE_PLACE) {
  return WISE_EMULATOR::reduce(WISE_EMULATOR::Kind::kAdd, mask, value, place);
}
template <typename T>
  requires(std::is_same_v<T, int> || std::is_same_v<T, unsigned>)
T __reduce_min_sync(unsigned mask, T value, WISE_PLACE) {
  return WISE_EMULATOR::reduce(WISE_EMULATOR::Kind::kMin, mask, value, place);
}
template <typename T>
  requires(std::is_same_v<T, int> || std::is_same_v<T, unsigned>)
T __reduce_max_sync(unsigned mask, T value, WISE_PLACE) {
  return WISE_EMULATOR::reduce(WISE_EMULATOR::Kind::kMax, mask, value, place);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, WISE_PLACE) {
  return WISE_EMULATOR::reduce(WISE_EMULATOR::Kind::kAnd, mask, value, place);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, WISE_PLACE) {
  return WISE_EMULATOR::reduce(WISE_EMULATOR::Kind::kOr, mask, value, place);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, WISE_PLACE) {
  return WISE_EMULATOR::reduce(WISE_EMULATOR::Kind::kXor, mask, value, place);
}

#undef WISE_PLACE
#undef WISE_EMULATOR

// One fiber runs at a time: plain arithmetic is atomic, and fences have nothing to do.
template <typename T>
concept WiseAtomic =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;

template <WiseAtomic T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  const T before = *address;
  *address = value;
  return before;
}
template <WiseAtomic T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return atomicExch(address, static_cast<T>(*address + value));
}
template <WiseAtomic T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return atomicExch(address, static_cast<T>(*address - value));
}
template <WiseAtomic T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return atomicExch(address, std::max(*address, value));
}
template <WiseAtomic T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return atomicExch(address, std::min(*address, value));
}
template <WiseAtomic T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return atomicExch(address, *address & value);
}
template <WiseAtomic T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return atomicExch(address, *address | value);
}
template <WiseAtomic T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  const T before = *address;
  if (before == expected) *address = value;
  return before;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) {
  return bits == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(bits));
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline unsigned __brev(unsigned bits) {
  unsigned out = 0;
  for (int i = 0; i < 32; ++i) out |= (bits >> i & 1u) << (31 - i);
  return out;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned which = selector >> (4 * i);
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (which & 7u))) & 0xffu;
    if ((which & 8u) != 0) byte = (byte & 0x80u) != 0 ? 0xffu : 0u;
    out |= byte << (8 * i);
  }
  return out;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (by & 31u) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (by & 31u));
}

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <typename T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}

using std::max;
using std::min;
