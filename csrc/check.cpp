#include "csrc/check.h"

#include <array>
#include <limits>

namespace wise {

std::string sizes_of(const Tensor& tensor) {
  std::ostringstream out;
  const auto sizes = tensor.sizes();
  for (std::size_t i = 0; i < sizes.size(); ++i) out << (i == 0 ? "" : ", ") << sizes[i];
  return out.str();
}

std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Bool:
      return "torch.bool";
    default:
      return std::string("another dtype (") + std::to_string(static_cast<int>(type)) + ")";
  }
}

std::string name_of(const Device& device) {
  if (device.type() == DeviceType::CPU) return "cpu";
  const std::string type = device.type() == DeviceType::CUDA ? "cuda" : "another device";
  return device.has_index() ? type + ":" + std::to_string(device.index()) : type;
}

void require_device(const Argument& argument, const Tensor& tensor) {
  const Device here = tensor.device();
  // A CPU has no number, though its tensors may carry one.
  const bool same = here.type() == argument.device.type() &&
                    (here.type() == DeviceType::CPU || here.index() == argument.device.index());
  require(same, argument.op, ": ", argument.name, " is not on ", name_of(argument.device),
          "; all tensors must be on one device");
}

void require_cpu(const Argument& argument, const Tensor& tensor) {
  require_device({argument.op, argument.name}, tensor);
}

void require_dims(const Argument& argument, const Tensor& tensor, int64_t count) {
  require(tensor.dim() == count, argument.op, ": ", argument.name, " must have ", count,
          " dimension", count > 1 ? "s" : "", ", got ", tensor.dim());
}

void require_type(const Argument& argument, const Tensor& tensor, ScalarType type) {
  require(tensor.scalar_type() == type, argument.op, ": ", argument.name, " must be ",
          name_of(type).substr(sizeof("torch.") - 1), ", got ", name_of(tensor.scalar_type()));
}

void require_shape(const Argument& argument, const Tensor& tensor, int64_t rows, int64_t columns) {
  require(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, argument.op,
          ": ", argument.name, " must have shape [", rows, ", ", columns, "], got [",
          sizes_of(tensor), "]");
}

Dtype dtype_of(const Argument& argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      require(false, argument.op, ": ", argument.name,
              " must be float32, bfloat16 or float16, got ", name_of(tensor.scalar_type()));
      return Dtype::kFloat32;
  }
}

Matrix matrix_of(const Argument& argument, const Tensor& tensor) {
  const Dtype dtype = dtype_of(argument, tensor);
  require_dims(argument, tensor, 2);
  require_device(argument, tensor);
  return {tensor.const_data_ptr(), dtype,           tensor.size(0), tensor.size(1),
          tensor.stride(0),        tensor.stride(1)};
}

const int32_t* int32_vector(const Argument& argument, const Tensor& tensor, Tensor* holder) {
  require_type(argument, tensor, ScalarType::Int);
  require_dims(argument, tensor, 1);
  require_device(argument, tensor);
  *holder = torch::stable::contiguous(tensor);
  return static_cast<const int32_t*>(holder->const_data_ptr());
}

void require_mask(const char* op, const Tensor& mask_bits, int64_t d_out, int64_t d_in,
                  const Device& device) {
  require_type({op, "mask_bits"}, mask_bits, ScalarType::Int);
  require_dims({op, "mask_bits"}, mask_bits, 2);
  require_device({op, "mask_bits", device}, mask_bits);
  const int64_t words = (d_in + 31) / 32;
  require(mask_bits.size(0) == d_out, op, ": mask_bits has ", mask_bits.size(0),
          " rows, expected d_out = ", d_out);
  require(mask_bits.size(1) == words, op, ": mask_bits has ", mask_bits.size(1),
          " words a row, d_in = ", d_in, " needs ", words);
}

void require_pointers(const char* op, const Tensor& row_ptr, int64_t rows, const Device& device) {
  require_type({op, "row_ptr"}, row_ptr, ScalarType::Long);
  require_dims({op, "row_ptr"}, row_ptr, 1);
  require_device({op, "row_ptr", device}, row_ptr);
  require(row_ptr.size(0) == rows + 1, op, ": row_ptr must have ", rows + 1,
          " entries (one a packed row, plus one), got ", row_ptr.size(0));
}

HeldBank hold_bank(const char* op, int64_t d_in, int64_t d_out, const Tensor& mask_bits,
                   const Tensor& values, const Tensor& row_ptr, const Device& device) {
  const Dtype dtype = dtype_of({op, "values"}, values);
  require_type({op, "mask_bits"}, mask_bits, ScalarType::Int);
  require_dims({op, "mask_bits"}, mask_bits, 3);
  require_dims({op, "values"}, values, 1);
  require_device({op, "mask_bits", device}, mask_bits);
  require_device({op, "values", device}, values);
  const int64_t rows = mask_bits.size(1);
  const int64_t words = (d_in + 31) / 32;
  require(d_out < 0 || rows == d_out, op, ": mask_bits has ", rows,
          " rows a shard, expected d_out = ", d_out);
  require(mask_bits.size(2) == words, op, ": mask_bits has ", mask_bits.size(2),
          " words a row, d_in = ", d_in, " needs ", words);
  require_pointers(op, row_ptr, mask_bits.size(0) * rows, device);
  HeldBank bank{torch::stable::contiguous(mask_bits), torch::stable::contiguous(values),
                torch::stable::contiguous(row_ptr), Packed{}};
  bank.packed = {static_cast<const uint32_t*>(bank.mask_bits.const_data_ptr()),
                 bank.values.const_data_ptr(),
                 dtype,
                 static_cast<const int64_t*>(bank.row_ptr.const_data_ptr()),
                 mask_bits.size(0),
                 rows,
                 d_in,
                 words,
                 values.size(0)};
  return bank;
}

Tensor linear(const char* op, const Tensor& x, const Tensor& weight,
              const std::optional<Tensor>& bias, const Device& device) {
  const Matrix in = matrix_of({op, "x", device}, x);
  const Matrix base = matrix_of({op, "weight", device}, weight);
  require(in.dtype == base.dtype, op, ": weight is ", name_of(weight.scalar_type()), " but x is ",
          name_of(x.scalar_type()));
  require(in.columns == base.columns, op, ": x has d_in = ", in.columns, ", weight has ",
          base.columns);
  if (bias.has_value()) {
    require_device({op, "bias", device}, *bias);
    require(bias->scalar_type() == x.scalar_type(), op, ": bias is ", name_of(bias->scalar_type()),
            " but x is ", name_of(x.scalar_type()));
    require(bias->dim() == 1 && bias->size(0) == base.rows, op, ": bias must have shape [",
            base.rows, "], got [", sizes_of(*bias), "]");
  }
  const NoGrad no_grad;
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

HeldDeltas hold_deltas(const char* op, const std::vector<Tensor>& deltas,
                       const std::vector<double>& weights, double density, const Device& device) {
  require(!deltas.empty(), op, ": needs at least one delta");
  require(weights.size() == deltas.size(), op, ": got ", weights.size(), " weights for ",
          deltas.size(), " deltas");
  HeldDeltas out;
  for (const double weight : weights) {
    require(weight >= 0.0 && weight < std::numeric_limits<double>::infinity(), op,
            ": weights must be finite and not negative");
    out.weights.push_back(static_cast<float>(weight));
  }
  require(density > 0.0 && density <= 1.0, op, ": density must be in (0, 1], got ", density);
  for (std::size_t i = 0; i < deltas.size(); ++i) {
    const std::string name = "deltas[" + std::to_string(i) + "]";
    const Argument argument{op, name.c_str(), device};
    require_type(argument, deltas[i], ScalarType::Float);
    require_device(argument, deltas[i]);
    require(sizes_of(deltas[i]) == sizes_of(deltas[0]), op, ": ", name, " has shape [",
            sizes_of(deltas[i]), "], deltas[0] has [", sizes_of(deltas[0]), "]");
    out.held.push_back(torch::stable::contiguous(deltas[i]));
    out.data.push_back(static_cast<const float*>(out.held.back().const_data_ptr()));
  }
  return out;
}

void require_in_range(const Argument& argument, const int32_t* index, int64_t count, int64_t low,
                      int64_t high) {
  for (int64_t i = 0; i < count; ++i) {
    require(low <= index[i] && index[i] <= high, argument.op, ": ", argument.name,
            " must be between ", low, " and ", high, ", got ", index[i]);
  }
}

void require_consistent(const char* op, bool good, int64_t values) {
  require(good, op, ": row_ptr does not match the bits set in mask_bits and the ", values,
          " values");
}

void parallel_for(int64_t count, int64_t grain, Body body, void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

}  // namespace wise
