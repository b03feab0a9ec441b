// Sixteen floats in one AVX-512 register (F, BW, VL, DQ).
#pragma once

// GCC would keep the pointers of rows walked together in a vector register, at a high price.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-slp-vectorize")
#endif

// GCC 12 warns about the undefined registers its own header passes for unused operands.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

#include "kernels/cpu/half.h"

namespace wise::WISE_ISA {

struct Vec {
  // Whether a single row's products go set bit by set bit, or through `expand`.
  static constexpr bool kWalksBits = false;
  // Packed rows walked together (to hide the latency of finding the next value), and the shape of
  // the register tile of many-row products.
  static constexpr int kFlight = 8;
  static constexpr int kTileD = 8;
  static constexpr int kTileX = 2;

  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec all(float value) { return {_mm512_set1_ps(value)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static Vec load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }

  // Spreads the next popcount(mask) values over the lanes whose bit is set, zero elsewhere; reads
  // sixteen values whatever the mask.
  template <typename T>
  static Vec expand(uint32_t mask, const T* p) {
    return {_mm512_maskz_expand_ps(_cvtu32_mask16(mask), load(p).v)};
  }
  // Moves the lanes whose bit is set to the front; writes sixteen floats.
  void compress(uint32_t mask, float* p) const {
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), v));
  }
  // Writes the lanes whose bit is set.
  void store(uint32_t mask, float* p) const {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), v);
  }
  float sum() const {
    alignas(64) float lanes[16];
    _mm512_store_ps(lanes, v);
    return sum_lanes(lanes);
  }
};

inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec square_root(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
// NaN in `a` stays NaN: the instruction returns its second operand then.
inline Vec clamped(Vec a, Vec low, Vec high) {
  return {_mm512_min_ps(high.v, _mm512_max_ps(low.v, a.v))};
}

inline Vec magnitude(Vec a) { return {_mm512_abs_ps(a.v)}; }
// value where a >= limit (a > limit), zero elsewhere.
inline Vec where_at_least(Vec a, Vec limit, Vec value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, limit.v, _CMP_GE_OQ), value.v)};
}
inline Vec where_above(Vec a, Vec limit, Vec value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, limit.v, _CMP_GT_OQ), value.v)};
}
// One bit a lane: bits other than the sign's are set; the fifteen bits after the sign are `prefix`.
inline uint32_t nonzero(Vec a) {
  return _mm512_test_epi32_mask(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff));
}
inline uint32_t high_bits_are(Vec a, uint32_t prefix) {
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fff0000));
  return _mm512_cmpeq_epi32_mask(bits, _mm512_set1_epi32(static_cast<int>(prefix << 16)));
}

}  // namespace wise::WISE_ISA
