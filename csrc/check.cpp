#include "csrc/check.h"

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

void require_cpu(Argument argument, const Tensor& tensor) {
  require(tensor.is_cpu(), argument.op, ": ", argument.name,
          " is not on cpu; all tensors must be on one device");
}

void require_dims(Argument argument, const Tensor& tensor, int64_t count) {
  require(tensor.dim() == count, argument.op, ": ", argument.name, " must have ", count,
          " dimension", count > 1 ? "s" : "", ", got ", tensor.dim());
}

void require_type(Argument argument, const Tensor& tensor, ScalarType type) {
  require(tensor.scalar_type() == type, argument.op, ": ", argument.name, " must be ",
          name_of(type).substr(sizeof("torch.") - 1), ", got ", name_of(tensor.scalar_type()));
}

void require_shape(Argument argument, const Tensor& tensor, int64_t rows, int64_t columns) {
  require(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, argument.op,
          ": ", argument.name, " must have shape [", rows, ", ", columns, "], got [",
          sizes_of(tensor), "]");
}

Dtype dtype_of(Argument argument, const Tensor& tensor) {
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

Matrix matrix_of(Argument argument, const Tensor& tensor) {
  const Dtype dtype = dtype_of(argument, tensor);
  require_dims(argument, tensor, 2);
  require_cpu(argument, tensor);
  return {tensor.const_data_ptr(), dtype,           tensor.size(0), tensor.size(1),
          tensor.stride(0),        tensor.stride(1)};
}

const int32_t* int32_vector(Argument argument, const Tensor& tensor, Tensor* holder) {
  require_type(argument, tensor, ScalarType::Int);
  require_dims(argument, tensor, 1);
  require_cpu(argument, tensor);
  *holder = torch::stable::contiguous(tensor);
  return static_cast<const int32_t*>(holder->const_data_ptr());
}

void require_mask(const char* op, const Tensor& mask_bits, int64_t d_out, int64_t d_in) {
  require_type({op, "mask_bits"}, mask_bits, ScalarType::Int);
  require_dims({op, "mask_bits"}, mask_bits, 2);
  require_cpu({op, "mask_bits"}, mask_bits);
  const int64_t words = (d_in + 31) / 32;
  require(mask_bits.size(0) == d_out, op, ": mask_bits has ", mask_bits.size(0),
          " rows, expected d_out = ", d_out);
  require(mask_bits.size(1) == words, op, ": mask_bits has ", mask_bits.size(1),
          " words a row, d_in = ", d_in, " needs ", words);
}

void require_pointers(const char* op, const Tensor& row_ptr, int64_t rows) {
  require_type({op, "row_ptr"}, row_ptr, ScalarType::Long);
  require_dims({op, "row_ptr"}, row_ptr, 1);
  require_cpu({op, "row_ptr"}, row_ptr);
  require(row_ptr.size(0) == rows + 1, op, ": row_ptr must have ", rows + 1,
          " entries (one a packed row, plus one), got ", row_ptr.size(0));
}

HeldBank hold_bank(const char* op, int64_t d_in, int64_t d_out, const Tensor& mask_bits,
                   const Tensor& values, const Tensor& row_ptr) {
  const Dtype dtype = dtype_of({op, "values"}, values);
  require_type({op, "mask_bits"}, mask_bits, ScalarType::Int);
  require_dims({op, "mask_bits"}, mask_bits, 3);
  require_dims({op, "values"}, values, 1);
  require_cpu({op, "mask_bits"}, mask_bits);
  require_cpu({op, "values"}, values);
  const int64_t rows = mask_bits.size(1);
  const int64_t words = (d_in + 31) / 32;
  require(d_out < 0 || rows == d_out, op, ": mask_bits has ", rows,
          " rows a shard, expected d_out = ", d_out);
  require(mask_bits.size(2) == words, op, ": mask_bits has ", mask_bits.size(2),
          " words a row, d_in = ", d_in, " needs ", words);
  require_pointers(op, row_ptr, mask_bits.size(0) * rows);
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

void require_in_range(Argument argument, const int32_t* index, int64_t count, int64_t low,
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
