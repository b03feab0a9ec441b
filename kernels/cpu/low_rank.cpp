// add_low_rank: rows of x are ordered by their entry. Their products with the entry's rows of right
// are the scales with which its rows of left are summed up, one after the other. Every stored row
// is read once for a few rows of x, and from cache for more of them. Threads share out first the
// rows of right, then the columns of left.
#include <vector>

#include "kernels/cpu/driver.h"
#include "kernels/cpu/routed_rows.h"
#include "kernels/cpu/table.h"

namespace wise {

namespace {

// Threads take y in blocks of columns, so that no two of them write to one cache line.
constexpr int64_t kColumns = 64;
// Rows of y that are summed up together, kTileColumns columns of them, or more of fewer rows.
constexpr int64_t kRows = kMaxResults / kTileColumns;

// An entry's stored rows and its rows of x.
struct Product {
  int64_t from;  // places of the order
  int64_t to;
  int64_t stored;  // the first row of left and right
  int64_t begin;   // its stored rows, counted through all products
  int64_t end;
  int64_t scales;  // where the [end - begin, to - from] products with right are
};

// Those of the groups within places [first, last), entries of no rank left out.
std::vector<Product> products_of(const LowRank& bank, const Groups& groups, int64_t first,
                                 int64_t last) {
  std::vector<Product> products;
  int64_t begin = 0;
  int64_t scales = 0;
  groups.each(first, last, [&](int64_t entry, int64_t from, int64_t to) {
    const int64_t stored = bank.rank_ptr[entry];
    const int64_t rank = bank.rank_ptr[entry + 1] - stored;
    if (rank == 0) return;
    products.push_back({from, to, stored, begin, begin + rank, scales});
    begin += rank;
    scales += rank * (to - from);
  });
  return products;
}

// Columns c0..c1 of y += left^T scales for one product; order[p.from] is its first row of y.
void add_columns(const LowRank& bank, const Product& p, const float* scales, const int64_t* order,
                 int64_t c0, int64_t c1, float* side, char* y, Dtype y_dtype, int64_t y_stride) {
  const auto axpy = table().dense_axpy[static_cast<int>(bank.dtype)];
  const auto add = table().add_rounded[static_cast<int>(y_dtype)];
  const int64_t size = static_cast<int64_t>(size_of(bank.dtype));
  const int64_t y_size = static_cast<int64_t>(size_of(y_dtype));
  const char* left = static_cast<const char*>(bank.left) + p.stored * bank.d_out * size;
  const int64_t n = p.to - p.from;
  const int64_t most = n < kRows ? n : kRows;
  const int64_t width = kMaxResults / most / kColumns * kColumns;
  for (int64_t c = c0; c < c1; c += width) {
    const int64_t columns = c + width < c1 ? width : c1 - c;
    for (int64_t i = 0; i < n; i += most) {
      const int64_t height = i + most < n ? most : n - i;
      for (int64_t j = 0; j < height * width; ++j) side[j] = 0.0f;
      axpy(left + c * size, p.end - p.begin, bank.d_out, columns, scales + i, n, height, side,
           width);
      for (int64_t j = 0; j < height; ++j) {
        char* row = y + order[p.from + i + j] * y_stride * y_size;
        add(row + c * y_size, side + j * width, 1, columns);
      }
    }
  }
}

}  // namespace

void add_low_rank(const LowRank& bank, const Matrix& x, void* y, Dtype y_dtype, int64_t y_stride,
                  const int32_t* route, ParallelFor parallel) {
  const int64_t row_bytes = x.columns * static_cast<int64_t>(size_of(bank.dtype));
  const char* right = static_cast<const char*>(bank.right);
  const Groups groups(route, x.rows, bank.entries);
  RoutedRows routed(x, groups.total());
  for (int64_t first = 0; first < groups.total(); first += kMaxRows) {
    const int64_t last = first + kMaxRows < groups.total() ? first + kMaxRows : groups.total();
    const std::vector<Product> products = products_of(bank, groups, first, last);
    if (products.empty()) continue;
    routed.gather(groups, first, last, groups.order() + first, parallel);
    const Product& tail = products.back();
    const int64_t rows = tail.end;
    const int64_t count = tail.scales + (rows - tail.begin) * (tail.to - tail.from);
    const Buffer<float> scales = buffer<float>(count);
    run(parallel, rows, grain_for(count / rows * x.columns / 8), [&](int64_t begin, int64_t end) {
      for (const Product& p : products) {
        const int64_t r0 = (begin > p.begin ? begin : p.begin) - p.begin;
        const int64_t r1 = (end < p.end ? end : p.end) - p.begin;
        if (r0 >= r1) continue;
        const int64_t n = p.to - p.from;
        dense_products(right + (p.stored + r0) * row_bytes, bank.dtype, r1 - r0, x.columns,
                       routed.group(p.from - first), n, scales.get() + p.scales + r0 * n);
      }
    });
    const int64_t blocks = divide_up(bank.d_out, kColumns);
    run(parallel, blocks, grain_for(count * kColumns / 8), [&](int64_t begin, int64_t end) {
      const int64_t c1 = end * kColumns < bank.d_out ? end * kColumns : bank.d_out;
      const Buffer<float> side = buffer<float>(kMaxResults);
      for (const Product& p : products) {
        add_columns(bank, p, scales.get() + p.scales, groups.order(), begin * kColumns, c1,
                    side.get(), static_cast<char*>(y), y_dtype, y_stride);
      }
    });
  }
}

}  // namespace wise
