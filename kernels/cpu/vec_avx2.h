// Sixteen floats in two AVX2 registers (with FMA and F16C).
#pragma once

// GCC would keep the pointers of rows walked together in a vector register, at a high price.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-slp-vectorize")
#endif

#include <immintrin.h>

#include "kernels/cpu/half.h"

namespace wise::WISE_ISA {

// For each byte of mask: from which packed lane each lane takes its value (expand; negative where
// it takes one), and which lane goes to each packed place (compress).
struct Permutations {
  alignas(32) uint32_t expand[256][8] = {};
  alignas(8) uint8_t compress[256][8] = {};
  constexpr Permutations() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if ((mask >> lane & 1) == 0) continue;
        expand[mask][lane] = static_cast<uint32_t>(next) | 0x80000000u;
        compress[mask][next++] = static_cast<uint8_t>(lane);
      }
    }
  }
};

static constexpr Permutations kPermutations;

inline __m256i permutation(const uint8_t (&entry)[8]) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(entry)));
}

// All ones in the lanes whose bit of the low byte is set.
inline __m256i lanes_of(uint32_t mask) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), bit);
}

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 load8(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <typename T>
inline __m256 expand8(uint32_t mask, const T* p) {
  const __m256i from =
      _mm256_load_si256(reinterpret_cast<const __m256i*>(kPermutations.expand[mask]));
  const __m256 spread = _mm256_permutevar8x32_ps(load8(p), from);
  return _mm256_and_ps(spread, _mm256_castsi256_ps(_mm256_srai_epi32(from, 31)));
}

struct Vec {
  static constexpr bool kWalksBits = false;
  static constexpr int kFlight = 4;
  static constexpr int kFewRows = 1;
  static constexpr int kFew = 2;
  static constexpr int kTileD = 2;
  static constexpr int kTileX = 2;

  __m256 a;
  __m256 b;

  static Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Vec all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  template <typename T>
  static Vec load(const T* p) {
    return {load8(p), load8(p + 8)};
  }
  static Vec load_once(const float* p) { return load(p); }
  void store(float* p) const {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }
  template <typename T>
  static Vec expand(uint32_t mask, const T* p) {
    const uint32_t low = mask & 0xffu;
    return {expand8(low, p), expand8(mask >> 8, p + __builtin_popcount(low))};
  }
  template <typename T>
  static void expand_word(const uint32_t* word, const T* p, Vec* first, Vec* second) {
    const uint32_t low = *word & 0xffffu;
    *first = expand(low, p);
    *second = expand(*word >> 16, p + __builtin_popcount(low));
  }
  template <typename T>
  static void copy(const T* from, int count, T* to) {
    for (int i = 0; i < count; ++i) to[i] = from[i];
  }
  void compress(uint32_t mask, float* p) const {
    const uint32_t low = mask & 0xffu;
    const uint32_t high = mask >> 8;
    _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(a, permutation(kPermutations.compress[low])));
    _mm256_storeu_ps(p + __builtin_popcount(low),
                     _mm256_permutevar8x32_ps(b, permutation(kPermutations.compress[high])));
  }
  void store(uint32_t mask, float* p) const {
    _mm256_maskstore_ps(p, lanes_of(mask), a);
    _mm256_maskstore_ps(p + 8, lanes_of(mask >> 8), b);
  }
  // In the order of `sum_lanes`.
  float sum() const {
    const __m256 eight = _mm256_add_ps(a, b);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

inline Vec fma(Vec x, Vec y, Vec z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Vec operator+(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Vec operator-(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Vec operator*(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Vec operator/(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Vec square_root(Vec x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
// NaN in `x` stays NaN: the instruction returns its second operand then.
inline Vec clamped(Vec x, Vec low, Vec high) {
  return {_mm256_min_ps(high.a, _mm256_max_ps(low.a, x.a)),
          _mm256_min_ps(high.b, _mm256_max_ps(low.b, x.b))};
}

inline Vec magnitude(Vec x) {
  const __m256 bits = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, bits), _mm256_and_ps(x.b, bits)};
}
// value where x >= limit (x > limit), zero elsewhere.
inline Vec where_at_least(Vec x, Vec limit, Vec value) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.a, limit.a, _CMP_GE_OQ), value.a),
          _mm256_and_ps(_mm256_cmp_ps(x.b, limit.b, _CMP_GE_OQ), value.b)};
}
inline Vec where_above(Vec x, Vec limit, Vec value) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.a, limit.a, _CMP_GT_OQ), value.a),
          _mm256_and_ps(_mm256_cmp_ps(x.b, limit.b, _CMP_GT_OQ), value.b)};
}

inline uint32_t lanes_set(__m256i a, __m256i b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(a))) |
         static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(b))) << 8;
}
// One bit a lane: whether the bits of `field` are those of `wanted`.
inline uint32_t equal_bits(Vec x, int field, int wanted) {
  const __m256i fields = _mm256_set1_epi32(field);
  const __m256i target = _mm256_set1_epi32(wanted);
  return lanes_set(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_castps_si256(x.a), fields), target),
                   _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_castps_si256(x.b), fields), target));
}
// One bit a lane: bits other than the sign's are set; are above `limit`; the fifteen bits after the
// sign are `prefix`.
inline uint32_t nonzero(Vec x) { return ~equal_bits(x, 0x7fffffff, 0) & 0xffffu; }
inline uint32_t bits_above(Vec x, uint32_t limit) {
  const Vec bits = magnitude(x);
  const __m256i limits = _mm256_set1_epi32(static_cast<int>(limit));
  return lanes_set(_mm256_cmpgt_epi32(_mm256_castps_si256(bits.a), limits),
                   _mm256_cmpgt_epi32(_mm256_castps_si256(bits.b), limits));
}
inline uint32_t high_bits_are(Vec x, uint32_t prefix) {
  return equal_bits(x, 0x7fff0000, static_cast<int>(prefix << 16));
}

}  // namespace wise::WISE_ISA
