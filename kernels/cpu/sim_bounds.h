// What a token of a query rounded to bytes can have in common with a key at most, for `max_sim`,
// where there are units for products of bytes (kernels_*.cpp only).
#pragma once

#include "kernels/cpu/span.h"

namespace wise::WISE_ISA {

#if defined(__AVX512VNNI__)
inline constexpr bool kSimBytes = true;

// The largest of `best` and, for the 16 tokens from `t` on, what their cosine with a key can be at
// most. The query's bytes are unsigned, 128 too large: `excess` is what that adds to the products.
inline Vec largest_of(const SimQuery& q, int64_t t, __m512i products, int32_t excess, float scale,
                      Vec best) {
  const __m512i right = _mm512_sub_epi32(products, _mm512_set1_epi32(excess));
  const Vec cosine = Vec{_mm512_cvtepi32_ps(right)} * Vec::all(scale) * Vec::load(q.steps + t);
  return {_mm512_max_ps(best.v, (cosine + Vec::load(q.errors + t)).v)};
}
#else
inline constexpr bool kSimBytes = false;
#endif

}  // namespace wise::WISE_ISA

#if defined(__AMX_INT8__)
#include "kernels/cpu/sim_amx.h"
#elif defined(__AVX512VNNI__)
#include "kernels/cpu/sim_vnni.h"
#endif

namespace wise::WISE_ISA {

#if defined(__AVX512VNNI__)
// The sum of a key's bytes.
inline int32_t sum_of(const int8_t* key, int64_t width) {
  __m512i sums = _mm512_setzero_si512();
  for (int64_t c = 0; c < width; c += 64) {
    sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(key + c));
  }
  return _mm512_reduce_add_epi32(sums);
}

// What the cosine of any token of the query with each of `count` keys can be at most. There is room
// for kSimKeys of them.
inline void at_most(ByteProducts& units, const SimQuery& q, const int8_t** keys,
                    const float* scales, int count, int64_t width, float* cosines) {
  int32_t excess[kSimKeys] = {};
  Vec best[kSimKeys];
  for (int i = 0; i < kSimKeys; ++i) {
    if (i < count) {
      excess[i] = 128 * sum_of(keys[i], width);
    } else {
      keys[i] = keys[0];
    }
    best[i] = Vec::zero();
  }
  units.take(keys, width);
  int64_t t = 0;
  for (; t + 64 <= q.lanes; t += 64) units.best<4>(q, t, excess, scales, count, best);
  if (t + 32 <= q.lanes) {
    units.best<2>(q, t, excess, scales, count, best);
    t += 32;
  }
  if (t < q.lanes) units.best<1>(q, t, excess, scales, count, best);
  for (int i = 0; i < count; ++i) cosines[i] = _mm512_reduce_max_ps(best[i].v);
}
#else
struct ByteProducts {
  explicit ByteProducts(float*) {}
};

inline void at_most(ByteProducts&, const SimQuery&, const int8_t**, const float*, int count,
                    int64_t, float* cosines) {
  for (int i = 0; i < count; ++i) cosines[i] = 1.0f;
}
#endif

}  // namespace wise::WISE_ISA
