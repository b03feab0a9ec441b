// Products with the packed bank: add_side_ and its backward, dual_linear, side_norm;
// with sketches of it: sketch_norm; and with shards of low rank: add_low_rank_.
#include "csrc/check.h"

namespace wise {

namespace {

// y is changed in place, a row of it for every row of x.
void require_rows_to_change(const char* op, const Matrix& y, const Matrix& x) {
  require(y.rows == x.rows, op, ": y has ", y.rows, " rows, x has ", x.rows);
  require(y.columns <= 1 || y.column_stride == 1, op,
          ": y is changed in place, so its rows must be contiguous");
}

// One route a row, each a shard or -1; `holder` keeps a copy alive where one was needed.
const int32_t* routes_of(const char* op, const Tensor& route, int64_t rows, int64_t shards,
                         Tensor* holder) {
  const int32_t* routes = int32_vector({op, "route"}, route, holder);
  require(route.size(0) == rows, op, ": route must have one entry a row of x (", rows, "), got ",
          route.size(0));
  require_in_range({op, "route"}, routes, rows, -1, shards - 1);
  return routes;
}

void add_side_(Tensor y, const Tensor x, const Tensor mask_bits, const Tensor values,
               const Tensor row_ptr, const Tensor route) {
  const char* op = "add_side_";
  const Matrix out = matrix_of({op, "y"}, y);
  const Matrix in = matrix_of({op, "x"}, x);
  require_rows_to_change(op, out, in);
  const HeldBank bank = hold_bank(op, in.columns, out.columns, mask_bits, values, row_ptr);
  Tensor held;
  const int32_t* routes = routes_of(op, route, in.rows, bank.packed.shards, &held);
  const bool good = add_side(bank.packed, in, y.mutable_data_ptr(), out.dtype, out.row_stride,
                             routes, parallel_for);
  require_consistent(op, good, bank.packed.count);
}

Tensor add_side_backward_op(const Tensor grad, const Tensor mask_bits, const Tensor values,
                            const Tensor row_ptr, const Tensor route, int64_t d_in) {
  const char* op = "add_side_backward";
  require_type({op, "grad"}, grad, ScalarType::Float);
  require_dims({op, "grad"}, grad, 2);
  const NoGrad no_grad;
  const HeldBank bank = hold_bank(op, d_in, grad.size(1), mask_bits, values, row_ptr);
  Tensor held;
  const int32_t* routes = routes_of(op, route, grad.size(0), bank.packed.shards, &held);
  const Tensor dense = torch::stable::contiguous(grad);
  Tensor grad_x = torch::stable::new_empty(grad, {grad.size(0), d_in});
  const bool good = add_side_backward(
      bank.packed, static_cast<const float*>(dense.const_data_ptr()), grad.size(0), routes,
      static_cast<float*>(grad_x.mutable_data_ptr()), parallel_for);
  require_consistent(op, good, bank.packed.count);
  return grad_x;
}

void add_low_rank_(Tensor y, const Tensor x, const Tensor left, const Tensor right,
                   const Tensor rank_ptr, const Tensor route) {
  const char* op = "add_low_rank_";
  const Matrix out = matrix_of({op, "y"}, y);
  const Matrix in = matrix_of({op, "x"}, x);
  const Matrix to = matrix_of({op, "left"}, left);
  const Matrix from = matrix_of({op, "right"}, right);
  require_type({op, "rank_ptr"}, rank_ptr, ScalarType::Long);
  require_dims({op, "rank_ptr"}, rank_ptr, 1);
  require_cpu({op, "rank_ptr"}, rank_ptr);
  require_rows_to_change(op, out, in);
  require(to.dtype == from.dtype, op, ": right is ", name_of(right.scalar_type()), " but left is ",
          name_of(left.scalar_type()));
  require(to.rows == from.rows, op, ": left has ", to.rows, " rows, right has ", from.rows);
  require(out.columns == to.columns, op, ": y has d_out = ", out.columns, ", left has ",
          to.columns);
  require(in.columns == from.columns, op, ": x has d_in = ", in.columns, ", right has ",
          from.columns);
  const int64_t entries = rank_ptr.size(0) - 1;
  require(entries >= 0, op, ": rank_ptr must have an entry a shard, plus one, got none");
  const Tensor held_ranks = torch::stable::contiguous(rank_ptr);
  const int64_t* ranks = static_cast<const int64_t*>(held_ranks.const_data_ptr());
  bool good = ranks[0] == 0 && ranks[entries] == to.rows;
  for (int64_t e = 0; e < entries; ++e) good = good && ranks[e] <= ranks[e + 1];
  require(good, op, ": rank_ptr must ascend from 0 to the ", to.rows, " rows of left and right");
  Tensor held;
  const int32_t* routes = routes_of(op, route, in.rows, entries, &held);
  const Tensor held_left = torch::stable::contiguous(left);
  const Tensor held_right = torch::stable::contiguous(right);
  const LowRank bank{held_left.const_data_ptr(),
                     held_right.const_data_ptr(),
                     to.dtype,
                     ranks,
                     entries,
                     to.columns};
  add_low_rank(bank, in, y.mutable_data_ptr(), out.dtype, out.row_stride, routes, parallel_for);
}

Tensor dual_linear(const Tensor x, const Tensor weight, const std::optional<Tensor> bias,
                   const Tensor mask_bits, const Tensor values, const Tensor row_ptr,
                   const Tensor route) {
  const char* op = "dual_linear";
  const NoGrad no_grad;
  const Tensor y = linear(op, x, weight, bias);
  add_side_(y, x, mask_bits, values, row_ptr, route);
  return y;
}

Tensor side_norm_op(const Tensor x, const Tensor mask_bits, const Tensor values,
                    const Tensor row_ptr, const Tensor rows, const Tensor shards) {
  const char* op = "side_norm";
  const Matrix in = matrix_of({op, "x"}, x);
  const HeldBank bank = hold_bank(op, in.columns, -1, mask_bits, values, row_ptr);
  Tensor held_rows;
  Tensor held_shards;
  const int32_t* row = int32_vector({op, "rows"}, rows, &held_rows);
  const int32_t* shard = int32_vector({op, "shards"}, shards, &held_shards);
  const int64_t pairs = rows.size(0);
  require(shards.size(0) == pairs, op, ": rows has ", pairs, " entries, shards has ",
          shards.size(0));
  require_in_range({op, "rows"}, row, pairs, 0, in.rows - 1);
  require_in_range({op, "shards"}, shard, pairs, 0, bank.packed.shards - 1);
  const NoGrad no_grad;
  Tensor norms = torch::stable::new_empty(x, {pairs}, ScalarType::Float);
  const bool good = side_norm(bank.packed, in, row, shard, pairs,
                              static_cast<float*>(norms.mutable_data_ptr()), parallel_for);
  require_consistent(op, good, bank.packed.count);
  return norms;
}

Tensor sketch_norm_op(const Tensor x, const Tensor sketch) {
  const char* op = "sketch_norm";
  const Matrix in = matrix_of({op, "x"}, x);
  const Dtype dtype = dtype_of({op, "sketch"}, sketch);
  require_dims({op, "sketch"}, sketch, 3);
  require_cpu({op, "sketch"}, sketch);
  require(in.columns == sketch.size(2), op, ": x has d_in = ", in.columns, ", sketch has ",
          sketch.size(2));
  const NoGrad no_grad;
  const Tensor held = torch::stable::contiguous(sketch);
  Tensor norms = torch::stable::new_empty(x, {in.rows, sketch.size(0)}, ScalarType::Float);
  sketch_norm(in, held.const_data_ptr(), dtype, sketch.size(0), sketch.size(1),
              static_cast<float*>(norms.mutable_data_ptr()), parallel_for);
  return norms;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wise_ext, CPU, m) {
  m.impl("add_side_", TORCH_BOX(&add_side_));
  m.impl("add_side_backward", TORCH_BOX(&add_side_backward_op));
  m.impl("add_low_rank_", TORCH_BOX(&add_low_rank_));
  m.impl("dual_linear", TORCH_BOX(&dual_linear));
  m.impl("side_norm", TORCH_BOX(&side_norm_op));
  m.impl("sketch_norm", TORCH_BOX(&sketch_norm_op));
}

}  // namespace wise
