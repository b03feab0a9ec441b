// The extension module wise_ext._C. Loading it registers the operators with torch's dispatcher:
// each csrc/ops*.cpp does so from a static initialiser. What Python can call here is the report of
// how the module was built and of what this processor can run.

#include <pybind11/pybind11.h>

#include <string>

#ifdef WISE_WITH_CUDA
#include "kernels/cuda/device_info.h"
#endif

namespace py = pybind11;

namespace {

const char* architecture() {
#if defined(__x86_64__)
  return "x86_64";
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "other";
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = WISE_COMPILER;
  info["architecture"] = architecture();
  info["torch"] = WISE_TORCH_VERSION;
#ifdef WISE_WITH_CUDA
  info["cuda"] = true;
  info["cuda_archs"] = wise_cuda_archs();
  info["cuda_toolkit"] = wise_cuda_toolkit();
#else
  info["cuda"] = false;
#endif
  return info;
}

py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__)
  // These ask the operating system too: a register file it does not save counts as absent.
  __builtin_cpu_init();
  features["avx2"] = __builtin_cpu_supports("avx2") != 0;
  features["fma"] = __builtin_cpu_supports("fma") != 0;
  features["f16c"] = __builtin_cpu_supports("f16c") != 0;
  features["avx512f"] = __builtin_cpu_supports("avx512f") != 0;
  features["avx512bw"] = __builtin_cpu_supports("avx512bw") != 0;
  features["avx512vl"] = __builtin_cpu_supports("avx512vl") != 0;
  features["avx512dq"] = __builtin_cpu_supports("avx512dq") != 0;
  features["avx512_vnni"] = __builtin_cpu_supports("avx512vnni") != 0;
  features["avx512_vbmi2"] = __builtin_cpu_supports("avx512vbmi2") != 0;
#elif defined(__aarch64__)
  features["neon"] = true;
#endif
  return features;
}

int cuda_device_count() {
#ifdef WISE_WITH_CUDA
  return wise_cuda_device_count();
#else
  return 0;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of wise-ext; importing it registers torch.ops.wise_ext.*";
  m.def("build_info", &build_info, "How this module was compiled.");
  m.def("cpu_features", &cpu_features, "Instruction sets of this processor, by name.");
  m.def("cuda_device_count", &cuda_device_count,
        "Number of CUDA devices the driver offers; 0 without a CUDA build or a driver.");
}
