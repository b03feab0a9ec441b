// Late interaction, written once for every instruction set (kernels_*.cpp only). An entry's tokens
// are looked at from the first on, and no longer than it can still reach the floor. Where there are
// units for products of bytes, a query rounded to bytes says first how far it can come at most.
#pragma once

#include "kernels/cpu/span.h"

namespace wise::WISE_ISA {

// What sums of a few products may be off by.
inline constexpr float kSimRounding = 1e-5f;
// Registers of sixteen tokens that are multiplied with one key at a time.
inline constexpr int kSimGroups = 4;

#if defined(__AVX512VNNI__)
inline constexpr bool kSimBytes = true;

inline __m512i four_bytes(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return _mm512_set1_epi32(word);
}

// The largest of `best` and, for 16 G tokens, what their cosine with a key can be at most. The
// panel's bytes are unsigned, 128 too large.
template <int G>
inline Vec bytes_best(const uint8_t* panel, int64_t lanes, const int8_t* key, int64_t width,
                      __m512i excess, Vec scale, const float* steps, const float* errors,
                      Vec best) {
  __m512i even[G];
  __m512i odd[G];
  for (int g = 0; g < G; ++g) even[g] = odd[g] = _mm512_setzero_si512();
  for (int64_t c = 0; c < width; c += 8) {
    const uint8_t* at = panel + c * lanes;
    const __m512i first = four_bytes(key + c);
    const __m512i second = four_bytes(key + c + 4);
    for (int g = 0; g < G; ++g) {
      even[g] = _mm512_dpbusd_epi32(even[g], _mm512_loadu_si512(at + 64 * g), first);
      odd[g] = _mm512_dpbusd_epi32(odd[g], _mm512_loadu_si512(at + 4 * lanes + 64 * g), second);
    }
  }
  for (int g = 0; g < G; ++g) {
    const __m512i sum = _mm512_sub_epi32(_mm512_add_epi32(even[g], odd[g]), excess);
    const Vec cosine = Vec{_mm512_cvtepi32_ps(sum)} * scale * Vec::load(steps + 16 * g);
    best = {_mm512_max_ps(best.v, (cosine + Vec::load(errors + 16 * g)).v)};
  }
  return best;
}

inline float at_most(const SimQuery& q, const int8_t* key, float scale, int64_t width) {
  __m512i sums = _mm512_setzero_si512();
  for (int64_t c = 0; c < width; c += 64) {
    sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(key + c));
  }
  const __m512i excess = _mm512_set1_epi32(128 * _mm512_reduce_add_epi32(sums));
  const Vec scales = Vec::all(scale);
  Vec best = Vec::zero();
  int64_t t = 0;
  for (; t + 16 * kSimGroups <= q.lanes; t += 16 * kSimGroups) {
    best = bytes_best<kSimGroups>(q.bytes + 4 * t, q.lanes, key, width, excess, scales, q.steps + t,
                                  q.errors + t, best);
  }
  for (; t < q.lanes; t += 16) {
    best = bytes_best<1>(q.bytes + 4 * t, q.lanes, key, width, excess, scales, q.steps + t,
                         q.errors + t, best);
  }
  return _mm512_reduce_max_ps(best.v);
}
#else
inline constexpr bool kSimBytes = false;

inline float at_most(const SimQuery&, const int8_t*, float, int64_t) { return 1.0f; }
#endif

// The largest of `best` and the products of 16 G tokens with a key.
template <int G>
inline Vec floats_best(const float* panel, int64_t lanes, const float* key, int64_t width,
                       Vec best) {
  Vec even[G];
  Vec odd[G];
  for (int g = 0; g < G; ++g) even[g] = odd[g] = Vec::zero();
  int64_t c = 0;
  for (; c + 1 < width; c += 2) {
    const float* at = panel + c * lanes;
    const Vec first = Vec::all(key[c]);
    const Vec second = Vec::all(key[c + 1]);
    for (int g = 0; g < G; ++g) {
      even[g] = fma(Vec::load(at + 16 * g), first, even[g]);
      odd[g] = fma(Vec::load(at + lanes + 16 * g), second, odd[g]);
    }
  }
  for (int g = 0; g < G && c < width; ++g) {
    even[g] = fma(Vec::load(panel + c * lanes + 16 * g), Vec::all(key[c]), even[g]);
  }
  const Vec unbounded = Vec::all(__builtin_inff());
  for (int g = 0; g < G; ++g) best = clamped(even[g] + odd[g], best, unbounded);
  return best;
}

// max over tokens of q . key, or 0; `scratch` holds `width` floats.
inline float best_of(const SimQuery& q, const int8_t* key, float scale, int64_t width,
                     float* scratch) {
  for (int64_t c = 0; c < width; ++c) scratch[c] = static_cast<float>(key[c]) * scale;
  Vec best = Vec::zero();
  int64_t t = 0;
  for (; t + 16 * kSimGroups <= q.lanes; t += 16 * kSimGroups) {
    best = floats_best<kSimGroups>(q.panel + t, q.lanes, scratch, width, best);
  }
  for (; t < q.lanes; t += 16) best = floats_best<1>(q.panel + t, q.lanes, scratch, width, best);
  float lanes[16];
  best.store(lanes);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    }
  }
  return lanes[0];
}

inline float max_sim_of(const MaxSim& m, const SimQuery& q, int64_t entry, float* scratch) {
  const int32_t* places = m.places + entry * m.most;
  const float* weights = m.weights + entry * m.most;
  const float limit = m.floor - kSimRounding;
  float left = 0.0f;
  for (int64_t j = 0; j < m.most; ++j) left += places[j] < 0 ? 0.0f : weights[j];
  if (q.bytes != nullptr) {
    float bound = left;
    for (int64_t j = 0; j < m.most; ++j) {
      if (places[j] < 0) continue;
      const float cosine = at_most(q, m.keys + places[j] * m.width, m.scales[places[j]], m.width);
      if (cosine < 1.0f) bound -= weights[j] * (1.0f - cosine);
      if (bound <= limit) return 0.0f;
    }
  }
  float total = 0.0f;
  for (int64_t j = 0; j < m.most; ++j) {
    if (places[j] < 0) continue;
    if (total + left <= limit) return 0.0f;
    const float cosine =
        best_of(q, m.keys + places[j] * m.width, m.scales[places[j]], m.width, scratch);
    total += weights[j] * cosine;
    left -= weights[j];
  }
  return total > m.floor ? total : 0.0f;
}

// Entries begin..end against every query; each entry's keys are read once for all of them.
inline void max_sim(const MaxSim& m, const SimQuery* queries, int64_t batch, int64_t begin,
                    int64_t end, float* scratch, float* scores) {
  for (int64_t e = begin; e < end; ++e) {
    for (int64_t b = 0; b < batch; ++b) {
      const bool broken = queries[b].panel == nullptr;
      scores[b * m.entries + e] =
          broken ? __builtin_nanf("") : max_sim_of(m, queries[b], e, scratch);
    }
  }
}

}  // namespace wise::WISE_ISA
