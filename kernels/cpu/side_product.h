// Products with packed rows, written once for every instruction set (kernels_*.cpp only).
//
// A result is summed in sixteen lanes, column block after column block, and the lanes at the end.
// Both ways below keep that order exactly: a row of x gives the same bits alone or among others.
#pragma once

#include "kernels/cpu/dot_tile.h"

namespace wise::WISE_ISA {

// Spreads one half word of values over sixteen lanes. Vec::expand reads sixteen values whatever
// the mask; kExact reads none past the last one.
template <bool kExact, typename T>
inline Vec expand(uint32_t mask, const T* p) {
  if constexpr (kExact) return Vec::expand(mask, Few<T>(p, __builtin_popcount(mask)).values);
  return Vec::expand(mask, p);
}

// The same for a whole word: the lanes of columns 0..15 and 16..31, or of the even and the odd
// columns where the instruction set would rather have it so.
template <bool kExact, typename T, typename V>
inline void expand_word(uint32_t bits, const T* next, V* first, V* second) {
  if constexpr (!kSplits<T>) {
    const uint32_t low = bits & 0xffffu;
    *first = expand<kExact>(low, next);
    *second = expand<kExact>(bits >> 16, next + __builtin_popcount(low));
  } else if constexpr (kExact) {
    V::expand_split(bits, Few<T>(next, __builtin_popcount(bits)).values, first, second);
  } else {
    V::expand_split(bits, next, first, second);
  }
}

// The packed rows from `row` on.
template <typename T>
struct Rows {
  const uint32_t* mask;
  const T* values;
  const int64_t* row_ptr;
  int64_t columns;
  int64_t words;
  int64_t count;
  uint32_t tail;

  Rows(const Packed& bank, int64_t row)
      : mask(bank.mask + row * bank.words),
        values(static_cast<const T*>(bank.values)),
        row_ptr(bank.row_ptr + row),
        columns(bank.columns),
        words(bank.words),
        count(bank.count),
        tail(tail_mask(bank.columns)) {}

  const uint32_t* mask_of(int64_t i) const { return mask + i * words; }
  const T* values_of(int64_t i) const { return values + row_ptr[i]; }
};

// Reading a word's values wide may touch this many past the row's last one.
inline constexpr int64_t kSlack = 32;

enum class Reading { kBad, kExact, kWide };

// Whether row `at` can be read wide without leaving the array, must be read exactly (the last few
// rows of a bank), or does not fit it at all. Only in the second case are the bits counted
// beforehand: elsewhere a wrong row_ptr is noticed afterwards.
template <typename T>
Reading reading(const Rows<T>& rows, int64_t at) {
  const int64_t first = rows.row_ptr[at];
  if (first < 0 || first > rows.count) return Reading::kBad;
  if (first + rows.columns + kSlack <= rows.count) return Reading::kWide;
  const int64_t bits = count_bits(rows.mask_of(at), rows.words, rows.tail);
  const bool fits = first + bits == rows.row_ptr[at + 1] && first + bits <= rows.count;
  return fits ? Reading::kExact : Reading::kBad;
}

// The way that suits all of `count` rows from `at` on, `stride` apart.
template <typename T>
Reading reading(const Rows<T>& rows, int64_t at, int64_t count, int64_t stride) {
  Reading all = Reading::kWide;
  for (int64_t i = 0; i < count; ++i) {
    const Reading one = reading(rows, at + i * stride);
    if (one < all) all = one;
  }
  return all;
}

// Adds the products of one mask word's values with 32 columns of X rows of x, `width` apart;
// returns where the next values are.
template <bool kExact, int X, typename T, typename V>
inline const T* accumulate(const uint32_t* word, const T* next, const float* x, int64_t width,
                           V* sum) {
  const uint32_t bits = *word;
  if constexpr (V::kWalksBits) {
    static_assert(X == 1);
    for (uint32_t left = bits; left != 0; left &= left - 1) {
      const int column = __builtin_ctz(left);
      sum->lane[column & 15] += to_float(*next++) * x[column];
    }
    return next;
  } else {
    V first;
    V second;
    if constexpr (kExact) {
      expand_word<true>(bits, next, &first, &second);
    } else {
      __builtin_prefetch(reinterpret_cast<const char*>(next) + kAhead);
      V::expand_word(word, next, &first, &second);
    }
#pragma GCC unroll 16
    for (int j = 0; j < X; ++j) {
      sum[j] = fma(first, Vec::load(x + j * width), sum[j]);
      sum[j] = fma(second, Vec::load(x + j * width + 16), sum[j]);
    }
    return next + __builtin_popcount(bits);
  }
}

// X rows of x against R packed rows, `stride` apart: out[i * stride * n + j].
template <bool kExact, int R, int X, typename T>
bool dot_rows(const Rows<T>& rows, int64_t at, int64_t stride, const float* x, int64_t n,
              float* out) {
  const int64_t width = 32 * rows.words;
  // The loops over R and X are unrolled early, or GCC keeps the arrays in memory.
  Vec sum[R][X];
  const T* next[R];
  const uint32_t* mask[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < X; ++j) sum[i][j] = Vec::zero();
    next[i] = rows.values_of(at + i * stride);
    mask[i] = rows.mask_of(at + i * stride);
  }
  for (int64_t w = 0; w + 1 < rows.words; ++w) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      next[i] = accumulate<kExact, X>(mask[i] + w, next[i], x + 32 * w, width, sum[i]);
    }
  }
  bool good = true;
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    if (rows.words > 0) {
      const int64_t w = rows.words - 1;
      const uint32_t word = mask[i][w] & rows.tail;
      next[i] = accumulate<kExact, X>(&word, next[i], x + 32 * w, width, sum[i]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < X; ++j) out[i * stride * n + j] = sum[i][j].sum();
    good = good && next[i] == rows.values_of(at + i * stride + 1);
  }
  return good;
}

template <int X, typename T>
bool dot_few(const Rows<T>& rows, int64_t count, const float* x, int64_t n, float* out) {
  bool good = true;
  const auto alone = [&](int64_t r) {
    const Reading how = reading(rows, r);
    good = good && how != Reading::kBad &&
           (how == Reading::kExact ? dot_rows<true, 1, X>(rows, r, 1, x, n, out + r * n)
                                   : dot_rows<false, 1, X>(rows, r, 1, x, n, out + r * n));
  };
  // Rows far apart are walked together: each is the next piece of one of kFlight streams that go
  // through memory without a jump, while the sums of kFlight rows hide one another's latency.
  const int64_t stride = count / Vec::kFlight;
  for (int64_t r = 0; r < stride; ++r) {
    if (reading(rows, r, Vec::kFlight, stride) == Reading::kWide) {
      good = dot_rows<false, Vec::kFlight, X>(rows, r, stride, x, n, out + r * n) && good;
    } else {
      for (int i = 0; i < Vec::kFlight; ++i) alone(r + i * stride);
    }
  }
  for (int64_t r = stride * Vec::kFlight; r < count; ++r) alone(r);
  return good;
}

// The first `most` rows of x, no more than X.
template <int X, typename T>
bool dot_up_to(int64_t most, const Rows<T>& rows, int64_t count, const float* x, int64_t n,
               float* out) {
  if constexpr (X > 1) {
    if (most < X) return dot_up_to<X - 1>(most, rows, count, x, n, out);
  }
  return dot_few<X>(rows, count, x, n, out);
}

template <typename T>
bool side_dot(const Packed& bank, int64_t begin, int64_t end, const float* x, int64_t n,
              float* out) {
  const Rows<T> rows(bank, begin);
  bool good = true;
  for (int64_t i = 0; good && i < n; i += Vec::kFewRows) {
    good = dot_up_to<Vec::kFewRows>(n - i, rows, end - begin, x + i * 32 * rows.words, n, out + i);
  }
  return good;
}

// `count` words of one packed row, dense; returns where the next values are.
template <bool kExact, typename T, typename V = Vec>
const T* expand_row(const uint32_t* mask, int64_t count, uint32_t tail, const T* next,
                    float* target) {
  for (int64_t w = 0; w < count; ++w, target += 32) {
    const uint32_t word = mask[w] & (w + 1 < count ? ~0u : tail);
    V first;
    V second;
    if constexpr (kExact) {
      expand_word<true>(word, next, &first, &second);
    } else {
      __builtin_prefetch(reinterpret_cast<const char*>(next) + kAhead);
      V::expand_word(&word, next, &first, &second);
    }
    first.store(target);
    second.store(target + 16);
    next += __builtin_popcount(word);
  }
  return next;
}

template <typename T>
bool dot_many(const Rows<T>& rows, int64_t count, const float* x, int64_t n, float* scratch,
              float* out) {
  const T* next[kBlockRows];
  Reading how[kBlockRows];
  for (int64_t r = 0; r < count; ++r) {
    how[r] = reading(rows, r);
    if (how[r] == Reading::kBad) return false;
    next[r] = rows.values_of(r);
  }
  dot_panel(count, rows.words, x, n, scratch, out,
            [&](int64_t r, int64_t word, int64_t words, float* target) {
              const auto expand =
                  how[r] == Reading::kExact ? expand_row<true, T> : expand_row<false, T>;
              const uint32_t tail = word + words < rows.words ? ~0u : rows.tail;
              next[r] = expand(rows.mask_of(r) + word, words, tail, next[r], target);
            });
  bool good = true;
  for (int64_t r = 0; r < count; ++r) good = good && next[r] == rows.values_of(r + 1);
  return good;
}

template <typename T>
bool side_dots([[maybe_unused]] const Packed& bank, [[maybe_unused]] int64_t begin,
               [[maybe_unused]] int64_t end, [[maybe_unused]] const float* x,
               [[maybe_unused]] int64_t n, [[maybe_unused]] float* scratch,
               [[maybe_unused]] float* out) {
  if constexpr (Vec::kWalksBits) {
    return false;
  } else {
    return dot_many(Rows<T>(bank, begin), end - begin, x, n, scratch, out);
  }
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
  const Reading how = reading(rows, 0, end - begin, 1);
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
