// Where a CUDA op's kernels go.
#pragma once

#include <optional>

#include "csrc/check.h"
#include "kernels/cuda/kernels.h"

#ifndef WISE_EMULATE_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

namespace wise {

// While it lives, the tensors' device is the current one, and kernels belong on torch's current
// stream there. On the emulator both are the CPU.
class CudaLaunch {
 public:
  CudaLaunch(const char* op, const Device& device);

  cuda::Stream stream() const { return stream_; }

 private:
  cuda::Stream stream_ = nullptr;
#ifndef WISE_EMULATE_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

}  // namespace wise
