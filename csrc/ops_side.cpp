// Products with the packed bank: add_side_ and its backward, dual_linear, side_norm;
// and with sketches of it: sketch_norm.
#include "csrc/check.h"

namespace wise {

namespace {

void add_side_(Tensor y, const Tensor x, const Tensor mask_bits, const Tensor values,
               const Tensor row_ptr, const Tensor route) {
  const char* op = "add_side_";
  const Matrix out = matrix_of({op, "y"}, y);
  const Matrix in = matrix_of({op, "x"}, x);
  require(out.rows == in.rows, op, ": y has ", out.rows, " rows, x has ", in.rows);
  require(out.columns <= 1 || out.column_stride == 1, op,
          ": y is changed in place, so its rows must be contiguous");
  const HeldBank bank = hold_bank(op, in.columns, out.columns, mask_bits, values, row_ptr);
  Tensor held;
  const int32_t* routes = int32_vector({op, "route"}, route, &held);
  require(route.size(0) == in.rows, op, ": route must have one entry a row of x (", in.rows,
          "), got ", route.size(0));
  require_in_range({op, "route"}, routes, in.rows, -1, bank.packed.shards - 1);
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
  const int32_t* routes = int32_vector({op, "route"}, route, &held);
  require(route.size(0) == grad.size(0), op, ": route must have one entry a row of x (",
          grad.size(0), "), got ", route.size(0));
  require_in_range({op, "route"}, routes, grad.size(0), -1, bank.packed.shards - 1);
  const Tensor dense = torch::stable::contiguous(grad);
  Tensor grad_x = torch::stable::new_empty(grad, {grad.size(0), d_in});
  const bool good = add_side_backward(
      bank.packed, static_cast<const float*>(dense.const_data_ptr()), grad.size(0), routes,
      static_cast<float*>(grad_x.mutable_data_ptr()), parallel_for);
  require_consistent(op, good, bank.packed.count);
  return grad_x;
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
  m.impl("dual_linear", TORCH_BOX(&dual_linear));
  m.impl("side_norm", TORCH_BOX(&side_norm_op));
  m.impl("sketch_norm", TORCH_BOX(&sketch_norm_op));
}

}  // namespace wise
