// Shards as wholes: pack, unpack, ties_merge; and the choice of the CPU's instruction set.
#include <tuple>
#include <vector>

#include "csrc/check.h"

namespace wise {

namespace {

std::tuple<Tensor, Tensor> pack_op(const Tensor delta, const Tensor mask_bits) {
  const char* op = "pack";
  const Dtype dtype = dtype_of({op, "delta"}, delta);
  require_dims({op, "delta"}, delta, 2);
  require_cpu({op, "delta"}, delta);
  const int64_t rows = delta.size(0);
  const int64_t columns = delta.size(1);
  require_mask(op, mask_bits, rows, columns);
  const NoGrad no_grad;
  const Tensor dense = torch::stable::contiguous(delta);
  const Tensor held_mask = torch::stable::contiguous(mask_bits);
  const auto* mask = static_cast<const uint32_t*>(held_mask.const_data_ptr());
  Tensor row_ptr = torch::stable::new_empty(delta, {rows + 1}, ScalarType::Long);
  auto* pointers = static_cast<int64_t*>(row_ptr.mutable_data_ptr());
  const int64_t count = count_rows(mask, rows, columns, pointers, parallel_for);
  Tensor values = torch::stable::new_empty(delta, {count});
  pack(dense.const_data_ptr(), dtype, mask, rows, columns, pointers, values.mutable_data_ptr(),
       parallel_for);
  return {values, row_ptr};
}

Tensor unpack_op(const Tensor mask_bits, const Tensor values, const Tensor row_ptr, int64_t d_in) {
  const char* op = "unpack";
  require_dims({op, "mask_bits"}, mask_bits, 2);
  const int64_t rows = mask_bits.size(0);
  require_mask(op, mask_bits, rows, d_in);
  const NoGrad no_grad;
  const HeldBank shard =
      hold_bank(op, d_in, rows, torch::stable::unsqueeze(mask_bits, 0), values, row_ptr);
  Tensor delta = torch::stable::new_empty(values, {rows, d_in});
  const bool good = unpack(shard.packed, delta.mutable_data_ptr(), parallel_for);
  require_consistent(op, good, shard.packed.count);
  return delta;
}

Tensor ties_merge_op(const std::vector<Tensor> deltas, const std::vector<double> weights,
                     double density) {
  const char* op = "ties_merge";
  const NoGrad no_grad;
  const HeldDeltas held = hold_deltas(op, deltas, weights, density);
  Tensor merged = torch::stable::new_empty(held.held[0], held.held[0].sizes());
  ties_merge(held.data.data(), held.weights.data(), static_cast<int64_t>(held.data.size()),
             merged.numel(), density, static_cast<float*>(merged.mutable_data_ptr()), parallel_for);
  return merged;
}

// Forces an instruction set (negative: leaves it) and returns the one in use.
int64_t cpu_isa(int64_t force) {
  if (force < 0) return static_cast<int64_t>(current_isa());
  const int64_t best = static_cast<int64_t>(Isa::kBest);
  return static_cast<int64_t>(force_isa(static_cast<Isa>(force < best ? force : best)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wise_ext, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack_op));
  m.impl("unpack", TORCH_BOX(&unpack_op));
  m.impl("ties_merge", TORCH_BOX(&ties_merge_op));
}

STABLE_TORCH_LIBRARY_IMPL(wise_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

}  // namespace wise
