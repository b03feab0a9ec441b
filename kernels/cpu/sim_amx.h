// Products of a query's bytes with keys, in AMX's tiles (sim_bounds.h only).
#pragma once

#include "kernels/cpu/span.h"

namespace wise::WISE_ISA {

// While one lives, this thread's tiles are shaped for it; whoever else uses them finds them shaped
// as they were.
class ByteProducts {
 public:
  explicit ByteProducts(float* scratch) : rows_(reinterpret_cast<int8_t*>(scratch)) {
    _tile_storeconfig(&before_);
    Shape shape;
    shape.palette = 1;
    for (int tile = 0; tile < kTiles; ++tile) {
      shape.row_bytes[tile] = 64;
      shape.rows[tile] = 16;
    }
    _tile_loadconfig(&shape);
  }
  ~ByteProducts() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }
  ByteProducts(const ByteProducts&) = delete;
  ByteProducts& operator=(const ByteProducts&) = delete;

  // Brings the keys together, 64 columns of them at a time.
  void take(const int8_t* const* keys, int64_t width) {
    width_ = width;
    for (int i = 0; i < kSimKeys; ++i) {
      for (int64_t c = 0; c < width; c += 64) {
        _mm512_store_si512(rows_ + c * kSimKeys + 64 * i, _mm512_loadu_si512(keys[i] + c));
      }
    }
  }

  // best[i] becomes the largest of itself and the bounds of key i with the 16 G tokens from `t` on.
  template <int G>
  void best(const SimQuery& q, int64_t t, const int32_t* excess, const float* scales, int count,
            Vec* best) const {
    _tile_zero(0);
    if constexpr (G > 1) _tile_zero(1);
    if constexpr (G > 2) _tile_zero(2);
    if constexpr (G > 3) _tile_zero(3);
    const auto stride = static_cast<std::size_t>(4 * q.lanes);
    for (int64_t c = 0; c < width_; c += 64) {
      const uint8_t* tokens = q.bytes + c * q.lanes + 4 * t;
      _tile_loadd(4, rows_ + c * kSimKeys, 64);
      _tile_loadd(5, tokens, stride);
      _tile_dpbsud(0, 4, 5);
      if constexpr (G > 1) {
        _tile_loadd(6, tokens + 64, stride);
        _tile_dpbsud(1, 4, 6);
      }
      if constexpr (G > 2) {
        _tile_loadd(7, tokens + 128, stride);
        _tile_dpbsud(2, 4, 7);
      }
      if constexpr (G > 3) {
        _tile_loadd(5, tokens + 192, stride);
        _tile_dpbsud(3, 4, 5);
      }
    }
    alignas(64) int32_t products[G][kSimKeys][16];
    _tile_stored(0, products[0], 64);
    if constexpr (G > 1) _tile_stored(1, products[1], 64);
    if constexpr (G > 2) _tile_stored(2, products[2], 64);
    if constexpr (G > 3) _tile_stored(3, products[3], 64);
    for (int i = 0; i < count; ++i) {
      for (int g = 0; g < G; ++g) {
        const __m512i these = _mm512_load_si512(products[g][i]);
        best[i] = largest_of(q, t + 16 * g, these, excess[i], scales[i], best[i]);
      }
    }
  }

 private:
  static constexpr int kTiles = 8;
  struct alignas(64) Shape {
    uint8_t palette = 0;
    uint8_t start = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Shape) == 64);

  Shape before_;
  int8_t* rows_;
  int64_t width_ = 0;
};

}  // namespace wise::WISE_ISA
