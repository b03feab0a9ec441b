// Sixteen floats in one AVX-512 register (F, BW, VL, DQ; VBMI2 and VNNI where the compiler is told
// of it).
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

#if defined(__AVX512VBMI2__)
template <>
inline constexpr bool kSplits<BFloat16> = true;
#endif

struct Vec {
  // Whether a single row's products go set bit by set bit, or through `expand`.
  static constexpr bool kWalksBits = false;
  // Packed rows and rows of x walked together where the latter are few, that is up to kFew; and the
  // shape of the register tile where they are many.
  static constexpr int kFlight = 4;
  static constexpr int kFewRows = 4;
  static constexpr int kFew = 8;
  static constexpr int kTileD = 8;
  static constexpr int kTileX = 3;

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
  // For several uses: a compiler that sees through the load would rather repeat it for each.
  static Vec load_once(const float* p) {
    Vec out = load(p);
    asm("" : "+v"(out.v));
    return out;
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }

  // Spreads the next popcount(mask) values over the lanes whose bit is set, zero elsewhere; reads
  // sixteen values whatever the mask.
  template <typename T>
  static Vec expand(uint32_t mask, const T* p) {
    return {_mm512_maskz_expand_ps(_cvtu32_mask16(mask), load(p).v)};
  }
  // A whole word at once: values of columns 0..15 and 16..31. One mask is made by shifts and the
  // other by a load: they keep different execution ports busy, and what expands has only one.
  template <typename T>
  static void expand_word(const uint32_t* word, const T* p, Vec* first, Vec* second) {
    const __m512i to_sign =
        _mm512_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16);
    __m512i all;
    // A compiler that sees the word in a general register too would broadcast that, on the port.
    asm("vpbroadcastd %1, %0" : "=v"(all) : "m"(*word));
    const __mmask16 low = _mm512_movepi32_mask(_mm512_sllv_epi32(all, to_sign));
    const auto* halves = reinterpret_cast<const __mmask16*>(word);
    const T* middle = p + _mm_popcnt_u32(*word & 0xffffu);
    first->v = _mm512_maskz_expand_ps(low, load(p).v);
    second->v =
        _mm512_maskz_expand_ps(_load_mask16(const_cast<__mmask16*>(halves + 1)), load(middle).v);
  }
  // `count` values, no more than 64 bytes, to `to`, which has room for 64.
  template <typename T>
  static void copy(const T* from, int count, T* to) {
    const uint64_t bytes = static_cast<uint64_t>(count) * sizeof(T);
    const __mmask64 there = bytes < 64 ? (uint64_t{1} << bytes) - 1 : ~uint64_t{0};
    _mm512_store_si512(to, _mm512_maskz_loadu_epi8(there, from));
  }
#if defined(__AVX512VBMI2__)
  // Reorders 32 floats: those at even places first.
  static void split(float* p) {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512 low = _mm512_loadu_ps(p);
    const __m512 high = _mm512_loadu_ps(p + 16);
    _mm512_storeu_ps(p, _mm512_permutex2var_ps(low, even, high));
    _mm512_storeu_ps(p + 16, _mm512_permutex2var_ps(low, odd, high));
  }
  static void expand_split(uint32_t bits, const BFloat16* p, Vec* even, Vec* odd) {
    const __m512i pairs = _mm512_maskz_expand_epi16(_cvtu32_mask32(bits), _mm512_loadu_si512(p));
    even->v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd->v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
  }
  static void expand_word(const uint32_t* word, const BFloat16* p, Vec* even, Vec* odd) {
    expand_split(*word, p, even, odd);
  }
  static void expand_word(const uint32_t* word, const Float16* p, Vec* first, Vec* second) {
    const __m512i halves = _mm512_maskz_expand_epi16(_cvtu32_mask32(*word), _mm512_loadu_si512(p));
    first->v = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    second->v = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
  }
#endif
  // Moves the lanes whose bit is set to the front; writes sixteen floats.
  void compress(uint32_t mask, float* p) const {
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), v));
  }
  // Writes the lanes whose bit is set.
  void store(uint32_t mask, float* p) const {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), v);
  }
  // In the order of `sum_lanes`.
  float sum() const {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
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
// One bit a lane: bits other than the sign's are set; are above `limit`; the fifteen bits after the
// sign are `prefix`.
inline uint32_t nonzero(Vec a) {
  return _mm512_test_epi32_mask(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff));
}
inline uint32_t bits_above(Vec a, uint32_t limit) {
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff));
  return _mm512_cmpgt_epu32_mask(bits, _mm512_set1_epi32(static_cast<int>(limit)));
}
inline uint32_t high_bits_are(Vec a, uint32_t prefix) {
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fff0000));
  return _mm512_cmpeq_epi32_mask(bits, _mm512_set1_epi32(static_cast<int>(prefix << 16)));
}

}  // namespace wise::WISE_ISA
