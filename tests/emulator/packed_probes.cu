// What tests/cuda calls by way of ctypes: the arithmetic of the packed kernels and of the radix
// select, put together on the host the way the kernels put it together over lanes and blocks.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cuda/packed_dot.cuh"
#include "kernels/cuda/radix.cuh"
#include "kernels/cuda/side_rows.cuh"

#define WISE_PROBE extern "C" __attribute__((visibility("default")))

namespace wise::cuda {

namespace {

constexpr int kLead = 32;  // columns ahead of the piece's, as in shared memory

// Which column each value of each chunk of a piece is multiplied with: columns[chunk * per chunk +
// i], -1 - i for one of the columns ahead (the lead), and the number of columns for an idle lane.
template <typename V>
int walk_piece(const uint32_t* mask, int count, int lead, int* columns) {
  std::vector<uint32_t> words(static_cast<std::size_t>(count) + 8, 0);
  uint32_t* piece = words.data() + 4;
  std::copy(mask, mask + count, piece);
  piece[-1] = lead_word(lead);
  int values = 0;
  for (int w = 0; w < count; ++w) values += popcount(piece[w]);
  const int chunks = (lead + values + kPerChunk<V> - 1) / kPerChunk<V>;
  std::vector<uint16_t> starts(static_cast<std::size_t>(chunks) + 1);
  if (lead > 0) starts[0] = entry_of({-1, 0});
  for (int w = 0, rank = 0; w < count; ++w) {
    const int last = rank + popcount(piece[w]);
    for (int c = chunk_from<V>(rank, lead); rank_of_chunk<V>(c, lead) < last; ++c) {
      starts[static_cast<std::size_t>(c)] = entry_of({w, rank_of_chunk<V>(c, lead) - rank});
    }
    rank = last;
  }
  const int zeros_at = kLead + 32 * count;
  std::vector<int> slots(static_cast<std::size_t>(zeros_at) + kPerChunk<V>);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const int at = static_cast<int>(i) - kLead;
    slots[i] = std::min(at, 32 * count);
  }
  const SharedAt<int> x(slots.data() + kLead);
  const SharedAt<int> zeros(slots.data() + zeros_at);
  for (int c = 0; c < chunks; ++c) {
    const ChunkStart start = start_of(starts[static_cast<std::size_t>(c)]);
    Walk<int> walk = walk_from(piece, start.word, without_lowest(piece[start.word], start.skip), x);
    for (int i = 0; i < kPerChunk<V>; ++i) {
      if (i == kPerChunk<V> / 2 || walk.now == 0) walk = walk_on(piece, count, walk, x, zeros);
      take_bit(walk);
      *columns++ = *walk.x;
    }
  }
  return chunks;
}

}  // namespace

WISE_PROBE int wise_walk_piece(const uint32_t* mask, int count, int lead, int value_bytes,
                               int* columns) {
  return value_bytes == 4 ? walk_piece<float>(mask, count, lead, columns)
                          : walk_piece<BFloat16>(mask, count, lead, columns);
}

WISE_PROBE uint32_t wise_without_lowest(uint32_t bits, int count) {
  return without_lowest(bits, count);
}

WISE_PROBE uint32_t wise_lowest_bits(uint32_t bits, int most) { return lowest_bits(bits, most); }

WISE_PROBE int wise_piece_words(int64_t words, int value_bytes) {
  return value_bytes == 4 ? piece_words<float>(words) : piece_words<BFloat16>(words);
}

// Four words in place.
WISE_PROBE void wise_only_elements(uint32_t* chunk, int from, int to, int value_bytes) {
  const uint4 all = make_uint4(chunk[0], chunk[1], chunk[2], chunk[3]);
  const uint4 left = value_bytes == 4 ? only_elements<float>(all, from, to)
                                      : only_elements<BFloat16>(all, from, to);
  std::memcpy(chunk, &left, sizeof left);
}

WISE_PROBE int64_t wise_rank_to_keep(double density, int64_t nonzero) {
  return rank_to_keep(density, nonzero);
}

// The threshold of `size` floats, given by their bits: three passes of counting and selecting.
WISE_PROBE uint32_t wise_select(const uint32_t* bits, int64_t size, double density) {
  Selection selection = {0, 0.0f, 0};
  for (int pass = 0; pass < kPasses; ++pass) {
    const Digit digit = digit_of(pass);
    std::vector<int64_t> bins(static_cast<std::size_t>(digit.bins()), 0);
    int64_t counted = 0;
    for (int64_t i = 0; i < size; ++i) {
      const int bin = bin_of(bits[i], digit, selection.prefix);
      if (bin < 0) continue;
      ++bins[static_cast<std::size_t>(bin)];
      ++counted;
    }
    if (pass == 0) {
      if (counted == 0) break;
      selection.rank = rank_to_keep(density, counted);
    }
    const Selection before = selection;
    int64_t above = 0;
    for (int b = digit.bins() - 1; b >= 0; --b) {
      const int64_t count = bins[static_cast<std::size_t>(b)];
      if (bin_holds(before.rank, above, count)) selection = narrowed(before, digit, b, above);
      above += count;
    }
  }
  return bits_of(selection.threshold);
}

}  // namespace wise::cuda
