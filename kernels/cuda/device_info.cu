#include "kernels/cuda/device_info.h"

#include "kernels/cuda/launch.cuh"

int wise_cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    // The error is sticky per thread: clear it, or the next kernel launch would report it.
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

namespace wise::cuda {

void use_device(int index) { require_success("a kernel", cudaSetDevice(index)); }

}  // namespace wise::cuda

const char* wise_cuda_archs() { return WISE_CUDA_ARCHS; }

const char* wise_cuda_toolkit() { return WISE_CUDA_TOOLKIT; }
