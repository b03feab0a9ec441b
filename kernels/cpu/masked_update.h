// The optimizer step, written once for every instruction set (kernels_*.cpp only). The masked
// entries of a stretch of columns are gathered into small arrays, updated there next to their
// packed states, and written back: the arithmetic is done for masked entries alone.
#pragma once

#include "kernels/cpu/span.h"

namespace wise::WISE_ISA {

inline constexpr int64_t kStretchWords = 16;
inline constexpr int64_t kStretch = 32 * kStretchWords;

struct Coefficients {
  Vec lr, beta1, rest1, beta2, rest2, eps, low, high, correction1, correction2;

  explicit Coefficients(const Update& u)
      : lr(all(u.lr)),
        beta1(all(u.beta1)),
        rest1(all(1.0 - u.beta1)),
        beta2(all(u.beta2)),
        rest2(all(1.0 - u.beta2)),
        eps(all(u.eps)),
        low(all(-u.clamp)),
        high(all(u.clamp)),
        correction1(all(1.0 - power(u.beta1, u.step))),
        correction2(all(1.0 - power(u.beta2, u.step))) {}

 private:
  static Vec all(double value) { return Vec::all(static_cast<float>(value)); }
  static double power(double base, int64_t exponent) {
    return __builtin_pow(base, static_cast<double>(exponent));
  }
};

inline void step_sgd(const Coefficients& k, int64_t count, float* delta, const float* grad) {
  for (int64_t i = 0; i < count; i += 16) {
    const Vec moved = Vec::load(delta + i) - k.lr * Vec::load(grad + i);
    clamped(moved, k.low, k.high).store(delta + i);
  }
}

// Kingma and Ba's Adam, bias-corrected.
inline void step_adam(const Coefficients& k, int64_t count, float* delta, const float* grad,
                      float* m, float* v) {
  for (int64_t i = 0; i < count; i += 16) {
    const Vec g = Vec::load(grad + i);
    const Vec mean = k.beta1 * Vec::load(m + i) + k.rest1 * g;
    const Vec square = k.beta2 * Vec::load(v + i) + k.rest2 * (g * g);
    mean.store(m + i);
    square.store(v + i);
    const Vec scale = square_root(square / k.correction2) + k.eps;
    const Vec moved = Vec::load(delta + i) - k.lr * (mean / k.correction1) / scale;
    clamped(moved, k.low, k.high).store(delta + i);
  }
}

inline bool masked_update(const Update& u, int64_t begin, int64_t end) {
  const Coefficients k(u);
  const uint32_t tail = tail_mask(u.columns);
  alignas(64) float delta[kStretch + 16];
  alignas(64) float grad[kStretch + 16];
  alignas(64) float m[kStretch + 16];
  alignas(64) float v[kStretch + 16];
  bool good = true;
  for (int64_t r = begin; r < end; ++r) {
    const uint32_t* mask = u.mask + r * u.words;
    float* row = u.delta + r * u.columns;
    const float* row_grad = u.grad + r * u.columns;
    int64_t packed = u.row_ptr[r];
    const int64_t bits = count_bits(mask, u.words, tail);
    if (packed < 0 || packed + bits != u.row_ptr[r + 1] || packed + bits > u.count) {
      good = false;
      continue;
    }
    for (int64_t w0 = 0; w0 < u.words; w0 += kStretchWords) {
      const int64_t w1 = w0 + kStretchWords < u.words ? w0 + kStretchWords : u.words;
      int64_t count = 0;
      for (int64_t h = 2 * w0; h < 2 * w1; ++h) {
        const uint32_t word = mask[h / 2] & (h / 2 + 1 < u.words ? ~0u : tail);
        const uint32_t half = h % 2 == 0 ? word & 0xffffu : word >> 16;
        if (half == 0) continue;
        load_left(row + 16 * h, u.columns - 16 * h).compress(half, delta + count);
        load_left(row_grad + 16 * h, u.columns - 16 * h).compress(half, grad + count);
        count += __builtin_popcount(half);
      }
      if (count == 0) continue;
      // What pads the last sixteen takes part in the arithmetic and is dropped.
      Vec::zero().store(delta + count);
      Vec::zero().store(grad + count);
      if (u.m == nullptr) {
        step_sgd(k, count, delta, grad);
      } else {
        const std::size_t bytes = sizeof(float) * static_cast<std::size_t>(count);
        std::memcpy(m, u.m + packed, bytes);
        std::memcpy(v, u.v + packed, bytes);
        Vec::zero().store(m + count);
        Vec::all(1.0f).store(v + count);
        step_adam(k, count, delta, grad, m, v);
        std::memcpy(u.m + packed, m, bytes);
        std::memcpy(u.v + packed, v, bytes);
      }
      const float* next = delta;
      for (int64_t h = 2 * w0; h < 2 * w1; ++h) {
        const uint32_t word = mask[h / 2] & (h / 2 + 1 < u.words ? ~0u : tail);
        const uint32_t half = h % 2 == 0 ? word & 0xffffu : word >> 16;
        if (half == 0) continue;
        Vec::expand(half, next).store(half, row + 16 * h);
        next += __builtin_popcount(half);
      }
      packed += count;
    }
  }
  return good;
}

}  // namespace wise::WISE_ISA
