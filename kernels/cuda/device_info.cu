#include "kernels/cuda/device_info.h"

#include <cuda_runtime_api.h>

int wise_cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    // The error is sticky per thread: clear it, or the next kernel launch would report it.
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

const char* wise_cuda_archs() { return WISE_CUDA_ARCHS; }

const char* wise_cuda_toolkit() { return WISE_CUDA_TOOLKIT; }
