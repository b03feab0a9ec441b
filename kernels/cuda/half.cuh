// Storage types and their conversions, for host and device. On the device each is one instruction;
// the expressions beside them say the same bit for bit (NaN is 0x7fff, as the instructions have
// it).
#pragma once

#include <cstring>

#include "kernels/cuda/simt.cuh"
#include "kernels/types.h"

namespace wise::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__host__ __device__ __forceinline__ float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

__host__ __device__ __forceinline__ uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

__host__ __device__ __forceinline__ float to_float(float value) { return value; }

__host__ __device__ __forceinline__ float to_float(BFloat16 value) {
  return float_of(uint32_t{value.bits} << 16);
}

__host__ __device__ __forceinline__ float to_float(Float16 value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Moving the exponent field leaves it 112 too small; the product puts that right, and turns
  // what was subnormal into a normal number, exactly.
  const float scaled = float_of(magnitude << 13) * float_of(0x77800000u);  // 2^112
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;        // infinity or NaN
  return float_of(sign | special | bits_of(scaled));
#endif
}

// To nearest, ties to even; T is float, BFloat16 or Float16.
template <typename T>
__host__ __device__ __forceinline__ T rounded(float value);

template <>
__host__ __device__ __forceinline__ float rounded<float>(float value) {
  return value;
}

template <>
__host__ __device__ __forceinline__ BFloat16 rounded<BFloat16>(float value) {
#ifdef __CUDA_ARCH__
  BFloat16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
  return out;
#else
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
__host__ __device__ __forceinline__ Float16 rounded<Float16>(float value) {
#ifdef __CUDA_ARCH__
  Float16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
  return out;
#else
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 2^16 and more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the adder of 0.5 rounds to subnormal steps
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
#endif
}

// A quiet NaN of storage type T.
template <typename T>
__host__ __device__ __forceinline__ T not_a_number() {
  return rounded<T>(float_of(0x7fffffffu));
}

// The two halves of a 32-bit word that holds a pair of T, lower address first.
template <typename T>
__host__ __device__ __forceinline__ float low_float(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <typename T>
__host__ __device__ __forceinline__ float high_float(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}
template <>
__host__ __device__ __forceinline__ float high_float<BFloat16>(uint32_t pair) {
  return float_of(pair & 0xffff0000u);
}

// How many T sixteen bytes hold, and those as floats.
template <typename T>
inline constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

template <typename T>
__host__ __device__ __forceinline__ void to_floats(const uint4& packed,
                                                   float (&out)[kPerVector<T>]) {
  const uint32_t word[4] = {packed.x, packed.y, packed.z, packed.w};
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = float_of(word[i]);
    } else {
      out[2 * i] = low_float<T>(word[i]);
      out[2 * i + 1] = high_float<T>(word[i]);
    }
  }
}

// Calls f(T{}) with the storage type of `dtype`.
template <typename F>
void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kBFloat16:
      return f(BFloat16{});
    case Dtype::kFloat16:
      return f(Float16{});
  }
}

}  // namespace wise::cuda
