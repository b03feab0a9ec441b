// pack and unpack: copies of masked entries, whose speed is memory's.
#include <atomic>
#include <cstring>

#include "kernels/cpu/driver.h"
#include "kernels/cpu/table.h"

namespace wise {

namespace {

// Calls f(column) for the set bits of one row's mask, in order; bits past `columns` do not count.
template <typename F>
void each_bit(const uint32_t* mask, int64_t columns, const F& f) {
  for (int64_t w = 0; 32 * w < columns; ++w) {
    const int64_t left = columns - 32 * w;
    uint32_t bits = mask[w] & (left >= 32 ? ~0u : (1u << left) - 1u);
    for (; bits != 0; bits &= bits - 1) f(32 * w + __builtin_ctz(bits));
  }
}

int64_t count_row(const uint32_t* mask, int64_t columns) {
  int64_t count = 0;
  for (int64_t w = 0; 32 * w < columns; ++w) {
    const int64_t left = columns - 32 * w;
    count += __builtin_popcount(mask[w] & (left >= 32 ? ~0u : (1u << left) - 1u));
  }
  return count;
}

template <typename T>
void pack_rows(const T* delta, const uint32_t* mask, int64_t columns, const int64_t* row_ptr,
               int64_t begin, int64_t end, T* values) {
  const int64_t words = divide_up(columns, 32);
  for (int64_t r = begin; r < end; ++r) {
    T* next = values + row_ptr[r];
    const T* row = delta + r * columns;
    each_bit(mask + r * words, columns, [&](int64_t c) { *next++ = row[c]; });
  }
}

template <typename T>
bool unpack_rows(const Packed& shard, int64_t begin, int64_t end, T* delta) {
  const T* values = static_cast<const T*>(shard.values);
  for (int64_t r = begin; r < end; ++r) {
    T* row = delta + r * shard.columns;
    std::memset(row, 0, sizeof(T) * static_cast<std::size_t>(shard.columns));
    const uint32_t* mask = shard.mask + r * shard.words;
    const int64_t first = shard.row_ptr[r];
    const int64_t last = shard.row_ptr[r + 1];
    if (first < 0 || last > shard.count || last - first != count_row(mask, shard.columns)) {
      return false;
    }
    const T* next = values + first;
    each_bit(mask, shard.columns, [&](int64_t c) { row[c] = *next++; });
  }
  return true;
}

}  // namespace

int64_t count_rows(const uint32_t* mask, int64_t rows, int64_t columns, int64_t* row_ptr,
                   ParallelFor parallel) {
  const int64_t words = divide_up(columns, 32);
  run(parallel, rows, grain_for(words), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row_ptr[r + 1] = count_row(mask + r * words, columns);
  });
  row_ptr[0] = 0;
  for (int64_t r = 0; r < rows; ++r) row_ptr[r + 1] += row_ptr[r];
  return row_ptr[rows];
}

void pack(const void* delta, Dtype dtype, const uint32_t* mask, int64_t rows, int64_t columns,
          const int64_t* row_ptr, void* values, ParallelFor parallel) {
  run(parallel, rows, grain_for(columns), [&](int64_t begin, int64_t end) {
    if (size_of(dtype) == 4) {
      pack_rows(static_cast<const uint32_t*>(delta), mask, columns, row_ptr, begin, end,
                static_cast<uint32_t*>(values));
    } else {
      pack_rows(static_cast<const uint16_t*>(delta), mask, columns, row_ptr, begin, end,
                static_cast<uint16_t*>(values));
    }
  });
}

bool unpack(const Packed& shard, void* delta, ParallelFor parallel) {
  std::atomic<bool> good{true};
  run(parallel, shard.rows, grain_for(shard.columns), [&](int64_t begin, int64_t end) {
    const bool fits = size_of(shard.dtype) == 4
                          ? unpack_rows(shard, begin, end, static_cast<uint32_t*>(delta))
                          : unpack_rows(shard, begin, end, static_cast<uint16_t*>(delta));
    if (!fits) good = false;
  });
  return good;
}

}  // namespace wise
