// The ops that have CUDA C++ kernels. The same file, compiled with WISE_EMULATE_CUDA, binds the
// kernels that run on the emulator, in a namespace of their own.
#if defined(WISE_WITH_CUDA) || defined(WISE_EMULATE_CUDA)

#include <algorithm>
#include <tuple>
#include <vector>

#include "csrc/cuda_launch.h"

namespace wise {

namespace {

// Memory for a kernel's intermediate results, from torch's allocator: on a card that orders its
// reuse by the stream.
Tensor workspace_like(const Tensor& tensor, int64_t bytes) {
  return torch::stable::new_empty(tensor, {bytes}, ScalarType::Byte);
}

void add_side_op(Tensor y, const Tensor x, const Tensor mask_bits, const Tensor values,
                 const Tensor row_ptr, const Tensor route) {
  const char* op = "add_side_";
  const Device device = x.device();
  const Matrix out = matrix_of({op, "y", device}, y);
  const Matrix in = matrix_of({op, "x", device}, x);
  require(out.rows == in.rows, op, ": y has ", out.rows, " rows, x has ", in.rows);
  require(out.columns <= 1 || out.column_stride == 1, op,
          ": y is changed in place, so its rows must be contiguous");
  const HeldBank bank = hold_bank(op, in.columns, out.columns, mask_bits, values, row_ptr, device);
  Tensor held;
  const int32_t* routes = int32_vector({op, "route", device}, route, &held);
  require(route.size(0) == in.rows, op, ": route must have one entry a row of x (", in.rows,
          "), got ", route.size(0));
  const CudaLaunch launch(op, device);
  cuda::add_side(bank.packed, in, y.mutable_data_ptr(), out.dtype, out.row_stride, routes,
                 launch.stream());
}

Tensor dual_linear_op(const Tensor x, const Tensor weight, const std::optional<Tensor> bias,
                      const Tensor mask_bits, const Tensor values, const Tensor row_ptr,
                      const Tensor route) {
  const Tensor y = linear("dual_linear", x, weight, bias, x.device());
  add_side_op(y, x, mask_bits, values, row_ptr, route);
  return y;
}

Tensor side_norm_op(const Tensor x, const Tensor mask_bits, const Tensor values,
                    const Tensor row_ptr, const Tensor rows, const Tensor shards) {
  const char* op = "side_norm";
  const Device device = x.device();
  const Matrix in = matrix_of({op, "x", device}, x);
  const HeldBank bank = hold_bank(op, in.columns, -1, mask_bits, values, row_ptr, device);
  Tensor held_rows;
  Tensor held_shards;
  const int32_t* row = int32_vector({op, "rows", device}, rows, &held_rows);
  const int32_t* shard = int32_vector({op, "shards", device}, shards, &held_shards);
  const int64_t pairs = rows.size(0);
  require(shards.size(0) == pairs, op, ": rows has ", pairs, " entries, shards has ",
          shards.size(0));
  const NoGrad no_grad;
  const CudaLaunch launch(op, device);
  Tensor norms = torch::stable::new_empty(x, {pairs}, ScalarType::Float);
  const Tensor workspace =
      workspace_like(x, cuda::side_norm_workspace(bank.packed, in.rows, pairs));
  cuda::side_norm(bank.packed, in, row, shard, pairs, static_cast<float*>(norms.mutable_data_ptr()),
                  workspace.mutable_data_ptr(), launch.stream());
  return norms;
}

std::tuple<Tensor, Tensor> pack_op(const Tensor delta, const Tensor mask_bits) {
  const char* op = "pack";
  const Device device = delta.device();
  const Dtype dtype = dtype_of({op, "delta"}, delta);
  require_dims({op, "delta"}, delta, 2);
  const int64_t rows = delta.size(0);
  const int64_t columns = delta.size(1);
  require_mask(op, mask_bits, rows, columns, device);
  const NoGrad no_grad;
  const Tensor dense = torch::stable::contiguous(delta);
  const Tensor held_mask = torch::stable::contiguous(mask_bits);
  const CudaLaunch launch(op, device);
  const auto* mask = static_cast<const uint32_t*>(held_mask.const_data_ptr());
  Tensor row_ptr = torch::stable::new_empty(delta, {rows + 1}, ScalarType::Long);
  auto* pointers = static_cast<int64_t*>(row_ptr.mutable_data_ptr());
  cuda::count_rows(mask, rows, columns, pointers, launch.stream());
  const int64_t count = cuda::read_back(pointers + rows, launch.stream());
  Tensor values = torch::stable::new_empty(delta, {count});
  cuda::pack(dense.const_data_ptr(), dtype, mask, rows, columns, pointers,
             values.mutable_data_ptr(), launch.stream());
  return {values, row_ptr};
}

Tensor unpack_op(const Tensor mask_bits, const Tensor values, const Tensor row_ptr, int64_t d_in) {
  const char* op = "unpack";
  const Device device = values.device();
  require_dims({op, "mask_bits"}, mask_bits, 2);
  const int64_t rows = mask_bits.size(0);
  require_mask(op, mask_bits, rows, d_in, device);
  const NoGrad no_grad;
  const HeldBank shard =
      hold_bank(op, d_in, rows, torch::stable::unsqueeze(mask_bits, 0), values, row_ptr, device);
  const CudaLaunch launch(op, device);
  Tensor delta = torch::stable::new_empty(values, {rows, d_in});
  cuda::unpack(shard.packed, delta.mutable_data_ptr(), launch.stream());
  return delta;
}

Tensor ties_merge_op(const std::vector<Tensor> deltas, const std::vector<double> weights,
                     double density) {
  const char* op = "ties_merge";
  const Device device = deltas.empty() ? kCpu : deltas[0].device();
  const NoGrad no_grad;
  const HeldDeltas held = hold_deltas(op, deltas, weights, density, device);
  const CudaLaunch launch(op, device);
  const auto count = static_cast<int64_t>(held.data.size());
  const Tensor& first = held.held[0];
  Tensor merged = torch::stable::new_empty(first, first.sizes());
  const Tensor workspace = workspace_like(first, cuda::ties_merge_workspace(count));
  cuda::ties_merge(held.data.data(), held.weights.data(), count, merged.numel(), density,
                   static_cast<float*>(merged.mutable_data_ptr()), workspace.mutable_data_ptr(),
                   launch.stream());
  return merged;
}

}  // namespace

#ifdef WISE_EMULATE_CUDA
STABLE_TORCH_LIBRARY_IMPL(wise_ext_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(wise_ext, CUDA, m) {
#endif
  m.impl("add_side_", TORCH_BOX(&add_side_op));
  m.impl("dual_linear", TORCH_BOX(&dual_linear_op));
  m.impl("side_norm", TORCH_BOX(&side_norm_op));
  m.impl("pack", TORCH_BOX(&pack_op));
  m.impl("unpack", TORCH_BOX(&unpack_op));
  m.impl("ties_merge", TORCH_BOX(&ties_merge_op));
}

}  // namespace wise

#endif
