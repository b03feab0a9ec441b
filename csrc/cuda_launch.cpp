#include "csrc/cuda_launch.h"

#if defined(WISE_EMULATE_CUDA)

namespace wise {

CudaLaunch::CudaLaunch(const char*, const Device&) {}

}  // namespace wise

#elif defined(WISE_WITH_CUDA)

#include <dlfcn.h>

namespace wise {

namespace {

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

// torch's current stream is to be had from libtorch_cuda alone. Linking with that would tie this
// module to CUDA builds of torch, and a weak symbol stays null, because Python loads torch's
// libraries for themselves only. So it is looked up by name in the copy torch has loaded.
CurrentStream find_current_stream() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  void* found = dlsym(RTLD_DEFAULT, kName);
  if (found == nullptr) {
    // The handle is kept: the library stays as long as torch does.
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library != nullptr) found = dlsym(library, kName);
  }
  return reinterpret_cast<CurrentStream>(found);
}

void* current_stream(const char* op, int32_t device_index) {
  static const CurrentStream ask = find_current_stream();
  require(ask != nullptr, op,
          ": this torch has no CUDA streams (libtorch_cuda.so offers no "
          "aoti_torch_get_current_cuda_stream); install a CUDA build of torch 2.11 or newer");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(ask(device_index, &stream));
  return stream;
}

}  // namespace

CudaLaunch::CudaLaunch(const char* op, const Device& device)
    : stream_(current_stream(op, device.index())), guard_(device.index()) {
  cuda::use_device(device.index());
}

}  // namespace wise

#endif
