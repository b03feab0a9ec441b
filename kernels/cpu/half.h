// Storage types and their conversions, for kernels_*.cpp only: everything lives in WISE_ISA's own
// namespace, so that no two translation units share an inline function.
#pragma once

// A fused multiply-add where the source says a * b + c would make results depend on the compiler.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <cstdint>
#include <cstring>

namespace wise::WISE_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Whether expanding a mask word of T values gives the even and the odd columns, not two halves.
template <typename T>
inline constexpr bool kSplits = false;

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return as_float(uint32_t{value.bits} << 16); }

inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Moving the exponent field leaves it 112 too small; the product puts that right, and turns
  // what was subnormal into a normal number, exactly.
  const float scaled = as_float(magnitude << 13) * as_float(0x77800000u);  // 2^112
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;        // infinity or NaN
  return as_float(sign | special | as_bits(scaled));
}

inline void from_float(float value, float* out) { *out = value; }

inline void from_float(float value, BFloat16* out) {
  const uint32_t bits = as_bits(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded =
      (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  out->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
}

inline void from_float(float value, Float16* out) {
  const uint32_t bits = as_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 2^16 and more, infinity, NaN
    half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the adder of 0.5 rounds to subnormal steps
    half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// The sum of sixteen lanes, in one order for every instruction set.
inline float sum_lanes(const float* lane) {
  float partial[4];
  for (int i = 0; i < 4; ++i) {
    partial[i] = (lane[i] + lane[i + 8]) + (lane[i + 4] + lane[i + 12]);
  }
  return (partial[0] + partial[2]) + (partial[1] + partial[3]);
}

}  // namespace wise::WISE_ISA
