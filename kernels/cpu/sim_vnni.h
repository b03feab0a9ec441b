// Products of a query's bytes with keys, in AVX-512's registers (sim_bounds.h only).
#pragma once

#include "kernels/cpu/span.h"

namespace wise::WISE_ISA {

class ByteProducts {
 public:
  explicit ByteProducts(float*) {}

  void take(const int8_t* const* keys, int64_t width) {
    keys_ = keys;
    width_ = width;
  }

  // best[i] becomes the largest of itself and the bounds of key i with the 16 G tokens from `t` on.
  template <int G>
  void best(const SimQuery& q, int64_t t, const int32_t* excess, const float* scales, int count,
            Vec* best) const {
    constexpr int kKeys = kSimKeys / G;  // as many sums as registers can hold
    const uint8_t* panel = q.bytes + 4 * t;
    for (int first = 0; first < count; first += kKeys) {
      __m512i sums[kKeys][G];
      for (auto& key : sums) {
        for (__m512i& sum : key) sum = _mm512_setzero_si512();
      }
      for (int64_t c = 0; c < width_; c += 4) {
        __m512i tokens[G];
        for (int g = 0; g < G; ++g) tokens[g] = _mm512_loadu_si512(panel + c * q.lanes + 64 * g);
        for (int i = 0; i < kKeys; ++i) {
          const __m512i key = four_bytes(keys_[first + i] + c);
          for (int g = 0; g < G; ++g) sums[i][g] = _mm512_dpbusd_epi32(sums[i][g], tokens[g], key);
        }
      }
      for (int i = 0; i < kKeys; ++i) {
        const int key = first + i;
        for (int g = 0; g < G; ++g) {
          best[key] = largest_of(q, t + 16 * g, sums[i][g], excess[key], scales[key], best[key]);
        }
      }
    }
  }

 private:
  static __m512i four_bytes(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm512_set1_epi32(word);
  }

  const int8_t* const* keys_ = nullptr;
  int64_t width_ = 0;
};

}  // namespace wise::WISE_ISA
