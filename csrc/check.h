// Checks of arguments, worded as in wise_ext/ops/checks.py, and tensors as the kernels see them.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace wise {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::DeviceType;
using torch::stable::Tensor;

// Throws what Python sees as a RuntimeError. (STD_TORCH_CHECK would put the path of this file on
// the build machine before every message.)
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// "3, 5" for the sizes of a tensor.
std::string sizes_of(const Tensor& tensor);
std::string name_of(ScalarType type);
std::string name_of(const Device& device);

inline const Device kCpu{DeviceType::CPU};

// The names of an op and of its argument, for messages, and where the op's tensors must be.
struct Argument {
  const char* op;
  const char* name;
  Device device = kCpu;
};

void require_device(const Argument& argument, const Tensor& tensor);
void require_cpu(const Argument& argument, const Tensor& tensor);
void require_dims(const Argument& argument, const Tensor& tensor, int64_t count);
void require_type(const Argument& argument, const Tensor& tensor, ScalarType type);
void require_shape(const Argument& argument, const Tensor& tensor, int64_t rows, int64_t columns);

// The dtype of a floating-point tensor the kernels take.
Dtype dtype_of(const Argument& argument, const Tensor& tensor);
// A 2-d floating-point tensor, strides and all.
Matrix matrix_of(const Argument& argument, const Tensor& tensor);
// A contiguous int32 or int64 vector; `holder` keeps a copy alive where one was needed.
const int32_t* int32_vector(const Argument& argument, const Tensor& tensor, Tensor* holder);

// One shard's mask [d_out, W] for delta [d_out, d_in].
void require_mask(const char* op, const Tensor& mask_bits, int64_t d_out, int64_t d_in,
                  const Device& device = kCpu);
void require_pointers(const char* op, const Tensor& row_ptr, int64_t rows,
                      const Device& device = kCpu);

// A bank whose tensors are held, contiguous, while it is used.
struct HeldBank {
  Tensor mask_bits;
  Tensor values;
  Tensor row_ptr;
  Packed packed;
};

// The bank of mask_bits [k, d_out, W] for rows of d_in columns; d_out < 0: any.
HeldBank hold_bank(const char* op, int64_t d_in, int64_t d_out, const Tensor& mask_bits,
                   const Tensor& values, const Tensor& row_ptr, const Device& device = kCpu);

// F.linear of checked arguments: what dual_linear begins with on every device.
Tensor linear(const char* op, const Tensor& x, const Tensor& weight,
              const std::optional<Tensor>& bias, const Device& device = kCpu);

// Checked deltas for ties_merge, held contiguous, and weights as the kernels take them.
struct HeldDeltas {
  std::vector<Tensor> held;
  std::vector<const float*> data;
  std::vector<float> weights;
};

HeldDeltas hold_deltas(const char* op, const std::vector<Tensor>& deltas,
                       const std::vector<double>& weights, double density,
                       const Device& device = kCpu);

void require_in_range(const Argument& argument, const int32_t* index, int64_t count, int64_t low,
                      int64_t high);
// For the kernels' verdict on row_ptr.
void require_consistent(const char* op, bool good, int64_t values);

// at::parallel_for, as the kernels call it.
void parallel_for(int64_t count, int64_t grain, Body body, void* context);

// Nothing an op calls inside may be recorded: its gradient is defined outside.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

}  // namespace wise
