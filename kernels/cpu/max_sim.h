// Late interaction, written once for every instruction set (kernels_*.cpp only). An entry's tokens
// are looked at from the first on, and no longer than it can still reach the floor. Where there are
// units for products of bytes, a query rounded to bytes says first how far it can come at most.
#pragma once

#include "kernels/cpu/sim_bounds.h"
#include "kernels/cpu/span.h"

namespace wise::WISE_ISA {

// What sums of a few products may be off by.
inline constexpr float kSimRounding = 1e-5f;
// Registers of sixteen tokens that are multiplied with one key at a time.
inline constexpr int kSimGroups = 4;
// Entries that are looked at together.
inline constexpr int64_t kSimEntries = 256;

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

// The score of an entry, or 0 as soon as that cannot be above the floor.
inline float max_sim_of(const MaxSim& m, const SimQuery& q, int64_t entry, float* scratch) {
  const int32_t* places = m.places + entry * m.most;
  const float* weights = m.weights + entry * m.most;
  float left = 0.0f;
  for (int64_t j = 0; j < m.most; ++j) left += places[j] < 0 ? 0.0f : weights[j];
  float total = 0.0f;
  for (int64_t j = 0; j < m.most; ++j) {
    if (places[j] < 0) continue;
    if (total + left <= m.floor - kSimRounding) return 0.0f;
    const float cosine =
        best_of(q, m.keys + places[j] * m.width, m.scales[places[j]], m.width, scratch);
    total += weights[j] * cosine;
    left -= weights[j];
  }
  return total > m.floor ? total : 0.0f;
}

// Of the entries from `begin` on those that the bounds leave a chance, in order: how many there
// are. All entries' heaviest tokens come first, then the next ones of those that are left.
inline int64_t contenders(ByteProducts& units, const MaxSim& m, const SimQuery& q, int64_t begin,
                          int64_t count, int64_t* found) {
  const float limit = m.floor - kSimRounding;
  float bounds[kSimEntries];
  int64_t left = limit < 1.0f ? count : 0;
  for (int64_t i = 0; i < left; ++i) {
    bounds[i] = 1.0f;
    found[i] = begin + i;
  }
  for (int64_t j = 0; j < m.most; ++j) {
    const int64_t there = left;
    left = 0;
    for (int64_t i = 0; i < there;) {
      const int8_t* keys[kSimKeys];
      float scales[kSimKeys];
      float cosines[kSimKeys];
      int64_t of[kSimKeys];
      int several = 0;
      const int64_t first = i;
      for (; i < there && several < kSimKeys; ++i) {
        const int32_t place = m.places[found[i] * m.most + j];
        if (place < 0) continue;
        keys[several] = m.keys + place * m.width;
        scales[several] = m.scales[place];
        of[several++] = i;
      }
      if (several > 0) at_most(units, q, keys, scales, several, m.width, cosines);
      for (int s = 0; s < several; ++s) {
        const float missing = 1.0f - cosines[s];
        if (missing > 0.0f) bounds[of[s]] -= m.weights[found[of[s]] * m.most + j] * missing;
      }
      for (int64_t seen = first; seen < i; ++seen) {
        bounds[left] = bounds[seen];
        found[left] = found[seen];
        if (bounds[left] > limit) ++left;
      }
    }
  }
  return left;
}

// Entries begin..end against every query.
inline void max_sim(const MaxSim& m, const SimQuery* queries, int64_t batch, int64_t begin,
                    int64_t end, float* scratch, float* scores) {
  ByteProducts units(scratch);
  int64_t found[kSimEntries];
  for (int64_t first = begin; first < end; first += kSimEntries) {
    const int64_t count = end - first < kSimEntries ? end - first : kSimEntries;
    for (int64_t b = 0; b < batch; ++b) {
      const SimQuery& q = queries[b];
      float* row = scores + b * m.entries;
      const bool broken = q.panel == nullptr;
      const bool bounded = !broken && q.bytes != nullptr;
      for (int64_t e = first; e < first + count; ++e) {
        row[e] = broken ? __builtin_nanf("") : bounded ? 0.0f : max_sim_of(m, q, e, scratch);
      }
      const int64_t left = bounded ? contenders(units, m, q, first, count, found) : 0;
      for (int64_t i = 0; i < left; ++i) row[found[i]] = max_sim_of(m, q, found[i], scratch);
    }
  }
}

}  // namespace wise::WISE_ISA
