// What kernels see of CUDA. They include this and never <cuda_runtime.h>, so that the same files
// also compile with a plain C++ compiler, under WISE_EMULATE_CUDA, and run on the emulator of
// tests/emulator: that is how they are tested where there is no card. The rules this takes:
//
// * Shared memory is WISE_SHARED(float, tile, [8][33]) or dynamic_shared<float>(), both aligned to
//   16 bytes; never the keyword itself.
// * Vector accesses go through load_as<uint4>(p), load_once<uint4>(p) and store_as(p, v), which the
//   emulator checks for alignment. The types are CUDA's own vectors.
// * Warp functions take a mask that names exactly the lanes that call them from that line. There
//   is no __activemask, no cooperative groups, no cub, no atomics on floats (their order is not
//   fixed), and no waiting for another block.
// * Inline PTX only beside an equal expression in C++ (see half.cuh).
// * Write fmaf(a, b, c) where a fused one is meant: the emulator never fuses by itself, nvcc may.
// * Launch through launch.cuh only; blocks are whole warps.
// * C++17 for nvcc, C++20 for the emulator.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef WISE_EMULATE_CUDA

#include "tests/emulator/cuda_emulator.h"

#else

#include <cuda_runtime.h>

#define WISE_SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__

#endif

namespace wise::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef WISE_EMULATE_CUDA

// The block's dynamic shared memory, as many bytes as the launch asked for.
template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::dynamic_shared());
}

// A vector access; V's size is its alignment.
template <typename V>
V load_as(const void* from, emulator::Place place = emulator::Place::current()) {
  emulator::require_aligned(from, sizeof(V), place);
  return *static_cast<const V*>(from);
}

// The same for data that is read once: it should not push out what is read again.
template <typename V>
V load_once(const void* from, emulator::Place place = emulator::Place::current()) {
  return load_as<V>(from, place);
}

template <typename V>
void store_as(void* to, const V& value, emulator::Place place = emulator::Place::current()) {
  emulator::require_aligned(to, sizeof(V), place);
  *static_cast<V*>(to) = value;
}

#else

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char wise_dynamic_shared[];
  return reinterpret_cast<T*>(wise_dynamic_shared);
}

template <typename V>
__device__ __forceinline__ V load_as(const void* from) {
  return *static_cast<const V*>(from);
}

template <typename V>
__device__ __forceinline__ V load_once(const void* from) {
  return __ldcs(static_cast<const V*>(from));
}

template <typename V>
__device__ __forceinline__ void store_as(void* to, const V& value) {
  *static_cast<V*>(to) = value;
}

#endif

}  // namespace wise::cuda
