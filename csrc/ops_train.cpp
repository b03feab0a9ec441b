// The shard in training: dual_linear_train and its backward, masked_update_. The matmuls are
// torch's; what goes with them is fused.
#include <tuple>

#include "csrc/check.h"

namespace wise {

namespace {

const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

float* mutable_floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

const uint32_t* bits(const Tensor& tensor) {
  return static_cast<const uint32_t*>(tensor.const_data_ptr());
}

Tensor single(const Tensor& tensor) { return torch::stable::to(tensor, ScalarType::Float); }

Tensor transposed(const Tensor& tensor) { return torch::stable::transpose(tensor, 0, 1); }

void require_train(const char* op, const Tensor& x, const Tensor& delta, const Tensor& mask_bits) {
  matrix_of({op, "x"}, x);
  require_type({op, "delta"}, delta, ScalarType::Float);
  require_dims({op, "delta"}, delta, 2);
  require_cpu({op, "delta"}, delta);
  require(x.size(1) == delta.size(1), op, ": x has d_in = ", x.size(1), ", delta has ",
          delta.size(1));
  require_mask(op, mask_bits, delta.size(0), delta.size(1));
}

std::tuple<Tensor, Tensor, Tensor> dual_linear_train(const Tensor x, const Tensor base,
                                                     const Tensor delta, const Tensor mask_bits) {
  const char* op = "dual_linear_train";
  require_train(op, x, delta, mask_bits);
  const int64_t rows = x.size(0);
  dtype_of({op, "base"}, base);
  require_shape({op, "base"}, base, rows, delta.size(0));
  const Matrix added = matrix_of({op, "base"}, base);
  const NoGrad no_grad;
  const Tensor side =
      torch::stable::contiguous(torch::stable::matmul(single(x), transposed(delta)));
  Tensor y = torch::stable::new_empty(base, {rows, delta.size(0)});
  Tensor indicator = torch::stable::new_empty(base, {rows}, ScalarType::Float);
  side_epilogue(floats(side), added, y.mutable_data_ptr(), mutable_floats(indicator), parallel_for);
  return {y, side, indicator};
}

std::tuple<Tensor, Tensor> dual_linear_train_backward(const Tensor grad_y,
                                                      const Tensor grad_indicator, const Tensor x,
                                                      const Tensor delta, const Tensor mask_bits,
                                                      const Tensor side, const Tensor indicator,
                                                      bool need_x, bool need_delta) {
  const char* op = "dual_linear_train_backward";
  require_train(op, x, delta, mask_bits);
  const int64_t rows = x.size(0);
  const int64_t d_out = delta.size(0);
  require_shape({op, "grad_y"}, grad_y, rows, d_out);
  require_type({op, "side"}, side, ScalarType::Float);
  require_shape({op, "side"}, side, rows, d_out);
  for (const auto& [name, norms] :
       {std::pair<const char*, const Tensor&>("indicator", indicator),
        std::pair<const char*, const Tensor&>("grad_indicator", grad_indicator)}) {
    require_type({op, name}, norms, ScalarType::Float);
    require_cpu({op, name}, norms);
    require(norms.dim() == 1 && norms.size(0) == rows, op, ": ", name, " must have shape [", rows,
            "], got [", sizes_of(norms), "]");
  }
  const Matrix from_y = matrix_of({op, "grad_y"}, grad_y);
  require_cpu({op, "side"}, side);
  const NoGrad no_grad;
  const Tensor held_side = torch::stable::contiguous(side);
  const Tensor held_norms = torch::stable::contiguous(indicator);
  const Tensor held_grad = torch::stable::contiguous(grad_indicator);
  Tensor grad_side = torch::stable::new_empty(side, {rows, d_out});
  side_epilogue_backward(from_y, floats(held_grad), floats(held_side), floats(held_norms),
                         mutable_floats(grad_side), parallel_for);
  Tensor grad_x = torch::stable::new_empty(x, {0});
  Tensor grad_delta = torch::stable::new_empty(delta, {0});
  if (need_x) {
    grad_x = torch::stable::to(torch::stable::matmul(grad_side, delta), x.scalar_type());
  }
  if (need_delta) {
    grad_delta = torch::stable::contiguous(torch::stable::matmul(transposed(grad_side), single(x)));
    const Tensor held_mask = torch::stable::contiguous(mask_bits);
    mask_gradient(mutable_floats(grad_delta), bits(held_mask), d_out, delta.size(1), parallel_for);
  }
  return {grad_x, grad_delta};
}

void masked_update_op(Tensor delta, const Tensor grad, const Tensor mask_bits, const Tensor row_ptr,
                      std::optional<Tensor> m, std::optional<Tensor> v, double lr, double beta1,
                      double beta2, double eps, int64_t step, double clamp) {
  const char* op = "masked_update_";
  require_type({op, "delta"}, delta, ScalarType::Float);
  require_type({op, "grad"}, grad, ScalarType::Float);
  require_dims({op, "delta"}, delta, 2);
  require_cpu({op, "delta"}, delta);
  require_cpu({op, "grad"}, grad);
  require(delta.is_contiguous(), op, ": delta is changed in place, so it must be contiguous");
  const int64_t rows = delta.size(0);
  const int64_t columns = delta.size(1);
  require(grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == columns, op,
          ": grad has shape [", sizes_of(grad), "], delta has [", sizes_of(delta), "]");
  require_mask(op, mask_bits, rows, columns);
  require_pointers(op, row_ptr, rows);
  require(m.has_value() == v.has_value(), op, ": give both m and v (Adam) or neither (SGD)");
  const Tensor held_grad = torch::stable::contiguous(grad);
  const Tensor held_mask = torch::stable::contiguous(mask_bits);
  const Tensor held_ptr = torch::stable::contiguous(row_ptr);
  const int64_t* pointers = static_cast<const int64_t*>(held_ptr.const_data_ptr());
  require(pointers[0] == 0, op, ": row_ptr must start at 0, one shard at a time");
  int64_t count = pointers[rows];
  if (m.has_value()) {
    for (const auto& [name, state] : {std::pair<const char*, const Tensor&>("m", *m),
                                      std::pair<const char*, const Tensor&>("v", *v)}) {
      require_type({op, name}, state, ScalarType::Float);
      require_cpu({op, name}, state);
      require_dims({op, name}, state, 1);
      require(state.is_contiguous(), op, ": m and v must be contiguous");
    }
    require(m->size(0) == v->size(0), op, ": m has ", m->size(0), " entries, v has ", v->size(0));
    require(step >= 1, op, ": step counts from 1, got ", step);
    count = m->size(0);
    require_consistent(op, pointers[rows] == count, count);
  }
  const Update update{static_cast<float*>(delta.mutable_data_ptr()),
                      floats(held_grad),
                      bits(held_mask),
                      pointers,
                      rows,
                      columns,
                      mask_bits.size(1),
                      count,
                      m.has_value() ? mutable_floats(*m) : nullptr,
                      v.has_value() ? mutable_floats(*v) : nullptr,
                      lr,
                      beta1,
                      beta2,
                      eps,
                      step,
                      clamp};
  require_consistent(op, masked_update(update, parallel_for), count);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wise_ext, CPU, m) {
  m.impl("dual_linear_train", TORCH_BOX(&dual_linear_train));
  m.impl("dual_linear_train_backward", TORCH_BOX(&dual_linear_train_backward));
  m.impl("masked_update_", TORCH_BOX(&masked_update_op));
}

}  // namespace wise
