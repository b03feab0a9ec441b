// Sixteen floats in an array: what every compiler can build, left to its vectoriser.
#pragma once

#include <cmath>

#include "kernels/cpu/half.h"

namespace wise::WISE_ISA {

struct Vec {
  // Expanding bit by bit costs more than to multiply bit by bit.
  static constexpr bool kWalksBits = true;
  static constexpr int kFlight = 1;
  static constexpr int kFewRows = 1;
  static constexpr int kFew = 1;
  static constexpr int kTileD = 1;
  static constexpr int kTileX = 1;
  static constexpr int kLanes = 16;

  float lane[kLanes];

  static Vec zero() { return all(0.0f); }
  static Vec all(float value) {
    Vec out;
    for (float& lane : out.lane) lane = value;
    return out;
  }
  template <typename T>
  static Vec load(const T* p) {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = to_float(p[i]);
    return out;
  }
  static Vec load_once(const float* p) { return load(p); }
  void store(float* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = lane[i];
  }
  template <typename T>
  static Vec expand(uint32_t mask, const T* p) {
    Vec out = zero();
    for (; mask != 0; mask &= mask - 1) out.lane[__builtin_ctz(mask)] = to_float(*p++);
    return out;
  }
  template <typename T>
  static void copy(const T* from, int count, T* to) {
    for (int i = 0; i < count; ++i) to[i] = from[i];
  }
  void compress(uint32_t mask, float* p) const {
    for (; mask != 0; mask &= mask - 1) *p++ = lane[__builtin_ctz(mask)];
  }
  void store(uint32_t mask, float* p) const {
    for (; mask != 0; mask &= mask - 1) p[__builtin_ctz(mask)] = lane[__builtin_ctz(mask)];
  }
  float sum() const { return sum_lanes(lane); }
};

template <typename F>
inline Vec each(const F& f) {
  Vec out;
  for (int i = 0; i < Vec::kLanes; ++i) out.lane[i] = f(i);
  return out;
}

// Two roundings: a fused one is a slow library call where the processor has no instruction for it.
inline Vec fma(const Vec& x, const Vec& y, const Vec& z) {
  return each([&](int i) { return x.lane[i] * y.lane[i] + z.lane[i]; });
}
inline Vec operator+(const Vec& x, const Vec& y) {
  return each([&](int i) { return x.lane[i] + y.lane[i]; });
}
inline Vec operator-(const Vec& x, const Vec& y) {
  return each([&](int i) { return x.lane[i] - y.lane[i]; });
}
inline Vec operator*(const Vec& x, const Vec& y) {
  return each([&](int i) { return x.lane[i] * y.lane[i]; });
}
inline Vec operator/(const Vec& x, const Vec& y) {
  return each([&](int i) { return x.lane[i] / y.lane[i]; });
}
inline Vec square_root(const Vec& x) {
  return each([&](int i) { return __builtin_sqrtf(x.lane[i]); });
}
inline Vec clamped(const Vec& x, const Vec& low, const Vec& high) {
  return each([&](int i) {
    const float raised = x.lane[i] < low.lane[i] ? low.lane[i] : x.lane[i];
    return raised > high.lane[i] ? high.lane[i] : raised;
  });
}

inline Vec magnitude(const Vec& x) {
  return each([&](int i) { return __builtin_fabsf(x.lane[i]); });
}
// value where x >= limit (x > limit), zero elsewhere.
inline Vec where_at_least(const Vec& x, const Vec& limit, const Vec& value) {
  return each([&](int i) { return x.lane[i] >= limit.lane[i] ? value.lane[i] : 0.0f; });
}
inline Vec where_above(const Vec& x, const Vec& limit, const Vec& value) {
  return each([&](int i) { return x.lane[i] > limit.lane[i] ? value.lane[i] : 0.0f; });
}

// One bit a lane: bits other than the sign's are set; are above `limit`; the fifteen bits after the
// sign are `prefix`.
inline uint32_t nonzero(const Vec& x) {
  uint32_t mask = 0;
  for (int i = 0; i < Vec::kLanes; ++i) {
    mask |= uint32_t{(as_bits(x.lane[i]) & 0x7fffffffu) != 0} << i;
  }
  return mask;
}
inline uint32_t bits_above(const Vec& x, uint32_t limit) {
  uint32_t mask = 0;
  for (int i = 0; i < Vec::kLanes; ++i) {
    mask |= uint32_t{(as_bits(x.lane[i]) & 0x7fffffffu) > limit} << i;
  }
  return mask;
}
inline uint32_t high_bits_are(const Vec& x, uint32_t prefix) {
  uint32_t mask = 0;
  for (int i = 0; i < Vec::kLanes; ++i) {
    mask |= uint32_t{(as_bits(x.lane[i]) & 0x7fffffffu) >> 16 == prefix} << i;
  }
  return mask;
}

}  // namespace wise::WISE_ISA
