// Products with packed rows, written once for every instruction set (kernels_*.cpp only).
//
// A result is summed in sixteen lanes, column block after column block, and the lanes at the end.
// Both ways below keep that order exactly: a row of x gives the same bits alone or among others.
#pragma once

#include "kernels/cpu/span.h"
#include "kernels/cpu/table.h"

namespace wise::WISE_ISA {

// Spreads one half word of values like Vec::expand, but reads no value past the last one.
template <typename T>
inline Vec expand_exactly(uint32_t mask, const T* p) {
  T few[16] = {};
  for (int i = 0; i < __builtin_popcount(mask); ++i) few[i] = p[i];
  return Vec::expand(mask, few);
}

template <bool kExact, typename T>
inline Vec expand(uint32_t mask, const T* p) {
  if constexpr (kExact) {
    return expand_exactly(mask, p);
  } else {
    return Vec::expand(mask, p);
  }
}

// The packed rows from `row` on.
template <typename T>
struct Rows {
  const uint32_t* mask;
  const T* values;
  const int64_t* row_ptr;
  int64_t words;
  uint32_t tail;

  Rows(const Packed& bank, int64_t row)
      : mask(bank.mask + row * bank.words),
        values(static_cast<const T*>(bank.values)),
        row_ptr(bank.row_ptr + row),
        words(bank.words),
        tail(tail_mask(bank.columns)) {}

  const uint32_t* mask_of(int64_t i) const { return mask + i * words; }
  const T* values_of(int64_t i) const { return values + row_ptr[i]; }
};

enum class Reading { kBad, kExact, kWide };

// Whether rows begin..end can be read sixteen values at a time without leaving the array, must be
// read exactly (the last few rows of a bank), or do not fit it at all. Only in the second case are
// the bits counted beforehand: elsewhere a wrong row_ptr is noticed afterwards.
inline Reading reading(const Packed& bank, int64_t begin, int64_t end) {
  bool wide = true;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t first = bank.row_ptr[r];
    if (first < 0 || first > bank.count) return Reading::kBad;
    if (first + bank.columns + 16 <= bank.count) continue;
    wide = false;
    const int64_t bits =
        count_bits(bank.mask + r * bank.words, bank.words, tail_mask(bank.columns));
    if (first + bits != bank.row_ptr[r + 1] || first + bits > bank.count) return Reading::kBad;
  }
  return wide ? Reading::kWide : Reading::kExact;
}

// Adds the products of one mask word's values with 32 of x; returns where the next values are.
template <bool kExact, typename T, typename V>
inline const T* accumulate(uint32_t bits, const T* next, const float* x, V* sum) {
  if constexpr (V::kWalksBits) {
    for (; bits != 0; bits &= bits - 1) {
      const int column = __builtin_ctz(bits);
      sum->lane[column & 15] += to_float(*next++) * x[column];
    }
    return next;
  } else {
    const uint32_t low = bits & 0xffffu;
    const T* middle = next + __builtin_popcount(low);
    *sum = fma(expand<kExact>(low, next), Vec::load(x), *sum);
    *sum = fma(expand<kExact>(bits >> 16, middle), Vec::load(x + 16), *sum);
    return next + __builtin_popcount(bits);
  }
}

// One row of x against R packed rows.
template <bool kExact, int R, typename T>
bool dot_one(const Rows<T>& rows, int64_t at, const float* x, float* out, int64_t stride) {
  Vec sum[R];
  const T* next[R];
  const uint32_t* mask[R];
  for (int i = 0; i < R; ++i) {
    sum[i] = Vec::zero();
    next[i] = rows.values_of(at + i);
    mask[i] = rows.mask_of(at + i);
  }
  const auto step = [&](int64_t w, uint32_t valid) {
    for (int i = 0; i < R; ++i) {
      next[i] = accumulate<kExact>(mask[i][w] & valid, next[i], x + 32 * w, &sum[i]);
    }
  };
  for (int64_t w = 0; w + 1 < rows.words; ++w) step(w, ~0u);
  if (rows.words > 0) step(rows.words - 1, rows.tail);
  bool good = true;
  for (int i = 0; i < R; ++i) {
    out[i * stride] = sum[i].sum();
    good = good && next[i] == rows.values_of(at + i + 1);
  }
  return good;
}

template <bool kExact, typename T>
bool dot_one_row(const Rows<T>& rows, int64_t count, const float* x, float* out, int64_t stride) {
  bool good = true;
  int64_t r = 0;
  for (; r + Vec::kFlight <= count; r += Vec::kFlight) {
    good = dot_one<kExact, Vec::kFlight>(rows, r, x, out + r * stride, stride) && good;
  }
  for (; r < count; ++r) {
    good = dot_one<kExact, 1>(rows, r, x, out + r * stride, stride) && good;
  }
  return good;
}

// D packed rows of the tile against X rows of x, from column `from` on; sums live in `sums`.
template <int D, int X>
void dot_tile(const float* tile, const float* const* x, int64_t from, int64_t columns, float* sums,
              int64_t sums_stride) {
  Vec sum[D][X];
  for (int d = 0; d < D; ++d) {
    for (int i = 0; i < X; ++i) sum[d][i] = Vec::load(sums + d * sums_stride + i * 16);
  }
  for (int64_t c = 0; c < columns; c += 16) {
    Vec right[X];
    for (int i = 0; i < X; ++i) right[i] = Vec::load(x[i] + from + c);
    for (int d = 0; d < D; ++d) {
      const Vec left = Vec::load(tile + d * kTileColumns + c);
      for (int i = 0; i < X; ++i) sum[d][i] = fma(left, right[i], sum[d][i]);
    }
  }
  for (int d = 0; d < D; ++d) {
    for (int i = 0; i < X; ++i) sum[d][i].store(sums + d * sums_stride + i * 16);
  }
}

template <int D>
void dot_tile_rows(const float* tile, const float* const* x, int64_t n, int64_t from,
                   int64_t columns, float* sums) {
  int64_t i = 0;
  for (; i + Vec::kTileX <= n; i += Vec::kTileX) {
    dot_tile<D, Vec::kTileX>(tile, x + i, from, columns, sums + i * 16, n * 16);
  }
  for (; i < n; ++i) dot_tile<D, 1>(tile, x + i, from, columns, sums + i * 16, n * 16);
}

// Many rows of x: each packed row is expanded once, a tile of columns at a time.
template <bool kExact, typename T>
bool dot_many(const Rows<T>& rows, int64_t count, const float* const* x, int64_t n, float* scratch,
              float* out) {
  float* tile = scratch;
  float* sums = scratch + kBlockRows * kTileColumns;
  const T* next[kBlockRows];
  for (int64_t r = 0; r < count; ++r) next[r] = rows.values_of(r);
  for (int64_t i = 0; i < count * n; ++i) Vec::zero().store(sums + i * 16);
  constexpr int64_t kTileWords = kTileColumns / 32;
  for (int64_t w0 = 0; w0 < rows.words; w0 += kTileWords) {
    const int64_t w1 = w0 + kTileWords < rows.words ? w0 + kTileWords : rows.words;
    for (int64_t r = 0; r < count; ++r) {
      float* target = tile + r * kTileColumns;
      for (int64_t w = w0; w < w1; ++w, target += 32) {
        const uint32_t bits = rows.mask_of(r)[w] & (w + 1 < rows.words ? ~0u : rows.tail);
        const uint32_t low = bits & 0xffffu;
        expand<kExact>(low, next[r]).store(target);
        expand<kExact>(bits >> 16, next[r] + __builtin_popcount(low)).store(target + 16);
        next[r] += __builtin_popcount(bits);
      }
    }
    const int64_t columns = 32 * (w1 - w0);
    int64_t r = 0;
    for (; r + Vec::kTileD <= count; r += Vec::kTileD) {
      dot_tile_rows<Vec::kTileD>(tile + r * kTileColumns, x, n, 32 * w0, columns,
                                 sums + r * n * 16);
    }
    for (; r < count; ++r) {
      dot_tile_rows<1>(tile + r * kTileColumns, x, n, 32 * w0, columns, sums + r * n * 16);
    }
  }
  bool good = true;
  for (int64_t r = 0; r < count; ++r) good = good && next[r] == rows.values_of(r + 1);
  for (int64_t i = 0; i < count * n; ++i) out[i] = Vec::load(sums + i * 16).sum();
  return good;
}

template <bool kExact, typename T>
bool dot_rows(const Rows<T>& rows, int64_t count, const float* const* x, int64_t n, float* scratch,
              float* out) {
  if (n == 1) return dot_one_row<kExact>(rows, count, x[0], out, 1);
  if constexpr (Vec::kWalksBits) {
    // Skipping what is not there costs no more than a dense tile, and rounds as one row does.
    bool good = true;
    for (int64_t i = 0; i < n; ++i) {
      good = dot_one_row<kExact>(rows, count, x[i], out + i, n) && good;
    }
    return good;
  } else {
    return dot_many<kExact>(rows, count, x, n, scratch, out);
  }
}

template <typename T>
bool side_dots(const Packed& bank, int64_t begin, int64_t end, const float* const* x, int64_t n,
               float* scratch, float* out) {
  const Rows<T> rows(bank, begin);
  const Reading how = reading(bank, begin, end);
  if (how == Reading::kBad) return false;
  return how == Reading::kExact ? dot_rows<true>(rows, end - begin, x, n, scratch, out)
                                : dot_rows<false>(rows, end - begin, x, n, scratch, out);
}

template <bool kExact, typename T>
bool axpy_row(const Rows<T>& rows, int64_t r, float grad, float* out) {
  const Vec scale = Vec::all(grad);
  const T* next = rows.values_of(r);
  for (int64_t w = 0; w < rows.words; ++w, out += 32) {
    const uint32_t bits = rows.mask_of(r)[w] & (w + 1 < rows.words ? ~0u : rows.tail);
    const uint32_t low = bits & 0xffffu;
    fma(expand<kExact>(low, next), scale, Vec::load(out)).store(out);
    next += __builtin_popcount(low);
    fma(expand<kExact>(bits >> 16, next), scale, Vec::load(out + 16)).store(out + 16);
    next += __builtin_popcount(bits >> 16);
  }
  return next == rows.values_of(r + 1);
}

template <typename T>
bool side_axpy(const Packed& bank, int64_t begin, int64_t end, const float* grad, float* out) {
  const Rows<T> rows(bank, begin);
  const Reading how = reading(bank, begin, end);
  if (how == Reading::kBad) return false;
  bool good = true;
  for (int64_t r = 0; r < end - begin; ++r) {
    good = (how == Reading::kExact ? axpy_row<true>(rows, r, grad[r], out)
                                   : axpy_row<false>(rows, r, grad[r], out)) &&
           good;
  }
  return good;
}

}  // namespace wise::WISE_ISA
