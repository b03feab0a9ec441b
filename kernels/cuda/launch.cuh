// The one way kernels are launched.
//
//   __global__ void __launch_bounds__(256) scale_kernel(float* x, float by, int64_t size);
//   launch<scale_kernel>("scale", {blocks}, 256, shared_bytes, stream, x, by, size);
//
// A grid without a block is no launch. More than 48 KiB of dynamic shared memory is asked for here,
// once a kernel and device. Nothing waits, so a fault inside a kernel shows in a later call.
#pragma once

#include <array>
#include <atomic>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/simt.cuh"

namespace wise::cuda {

// Numbers of blocks.
struct Grid {
  int64_t x = 1;
  int64_t y = 1;
  int64_t z = 1;
};

[[noreturn]] inline void fail_launch(const char* name, const std::string& reason) {
  throw std::runtime_error(std::string("wise_ext: ") + name + " could not be launched: " + reason);
}

inline void require_launchable(const char* name, const Grid& grid, int threads) {
  if (grid.x < 0 || grid.x > 0x7fffffff || grid.y < 0 || grid.y > 65535 || grid.z < 0 ||
      grid.z > 65535) {
    fail_launch(name, "a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) +
                          " x " + std::to_string(grid.z) + " blocks is too large");
  }
  if (threads <= 0 || threads > 1024 || threads % kWarp != 0) {
    fail_launch(name, std::to_string(threads) + " threads a block are not 1 to 32 whole warps");
  }
}

template <typename... Parameters>
std::tuple<Parameters...> parameters_of(void (*)(Parameters...));

#ifdef WISE_EMULATE_CUDA

inline int multiprocessors() { return 4; }

inline void copy_to_host(const char*, void* to, const void* from, std::size_t bytes, Stream) {
  std::memcpy(to, from, bytes);
}

template <auto kKernel, typename... Arguments>
void launch(const char* name, Grid grid, int threads, std::size_t shared_bytes, Stream,
            const Arguments&... arguments) {
  require_launchable(name, grid, threads);
  const decltype(parameters_of(kKernel)) parameters(arguments...);
  const auto thread = [&] { std::apply(kKernel, parameters); };
  emulator::run_grid(name, {grid.x, grid.y, grid.z}, threads, shared_bytes, thread);
}

#else

inline constexpr int kDevices = 64;

inline void require_success(const char* name, cudaError_t status) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next launch of anybody would report it again
  fail_launch(name, cudaGetErrorString(status));
}

inline int current_device(const char* name) {
  int device = 0;
  require_success(name, cudaGetDevice(&device));
  if (device >= kDevices) fail_launch(name, "more devices than wise_ext counts on");
  return device;
}

// Of the current device, for grids that want a few blocks for each.
inline int multiprocessors() {
  static std::array<std::atomic<int>, kDevices> known{};
  const int device = current_device("a kernel");
  std::atomic<int>& count = known[static_cast<std::size_t>(device)];
  if (count.load() == 0) {
    int asked = 0;
    require_success("a kernel",
                    cudaDeviceGetAttribute(&asked, cudaDevAttrMultiProcessorCount, device));
    count.store(asked);
  }
  return count.load();
}

// Waits until the copy is there.
inline void copy_to_host(const char* name, void* to, const void* from, std::size_t bytes,
                         Stream stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  require_success(name, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, queue));
  require_success(name, cudaStreamSynchronize(queue));
}

template <auto kKernel>
void allow_shared(const char* name, std::size_t bytes) {
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  if (bytes <= kWithoutAsking) return;
  static std::array<std::atomic<std::size_t>, kDevices> allowed{};
  static std::mutex asking;
  std::atomic<std::size_t>& here = allowed[static_cast<std::size_t>(current_device(name))];
  if (here.load() >= bytes) return;
  const std::lock_guard<std::mutex> alone(asking);  // a smaller request must not come second
  if (here.load() >= bytes) return;
  require_success(name, cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(bytes)));
  here.store(bytes);
}

template <auto kKernel, typename... Arguments>
void launch(const char* name, Grid grid, int threads, std::size_t shared_bytes, Stream stream,
            const Arguments&... arguments) {
  require_launchable(name, grid, threads);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  allow_shared<kKernel>(name, shared_bytes);
  decltype(parameters_of(kKernel)) parameters(arguments...);
  std::apply(
      [&](auto&... parameter) {
        void* pointers[] = {&parameter...};
        const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                          static_cast<unsigned>(grid.z));
        require_success(name, cudaLaunchKernel(reinterpret_cast<const void*>(kKernel), blocks,
                                               dim3(static_cast<unsigned>(threads)), pointers,
                                               shared_bytes, static_cast<cudaStream_t>(stream)));
      },
      parameters);
}

#endif

}  // namespace wise::cuda
