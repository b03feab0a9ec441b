// What tests/cuda calls by way of ctypes: the arithmetic that kernels share, and kernels that show
// what the emulator does, right ones and wrong ones.
#include <stdexcept>
#include <string>

#include "kernels/cuda/bits.cuh"
#include "kernels/cuda/half.cuh"
#include "kernels/cuda/launch.cuh"

#define WISE_PROBE extern "C" __attribute__((visibility("default")))

namespace wise::cuda {

namespace {

constexpr int kThreads = 64;

// out = in, reversed, through shared memory; wrong where the barrier is left out.
template <bool kBarrier>
__global__ void reverse_kernel(const float* in, float* out) {
  WISE_SHARED(float, all, [kThreads]);
  const int thread = static_cast<int>(threadIdx.x);
  all[thread] = in[blockIdx.x * kThreads + thread];
  if constexpr (kBarrier) __syncthreads();
  out[blockIdx.x * kThreads + thread] = all[kThreads - 1 - thread];
}

// Sums over neighbours in dynamic shared memory, step by step; the barrier between reading and
// overwriting may be left out too.
template <bool kBarrier>
__global__ void steps_kernel(const float* in, float* out) {
  float* all = dynamic_shared<float>();
  const int thread = static_cast<int>(threadIdx.x);
  all[thread] = in[thread];
  for (int step = 0; step < 3; ++step) {
    __syncthreads();
    const float sum = all[thread] + all[(thread + 1) % kThreads];
    if constexpr (kBarrier) __syncthreads();
    all[thread] = sum;
  }
  out[thread] = all[thread];
}

__global__ void divergent_shuffle_kernel(const float* in, float* out) {
  float value = in[threadIdx.x];
  if (threadIdx.x % 2 == 0) value += __shfl_xor_sync(kAllLanes, value, 1);
  out[threadIdx.x] = value;
}

__global__ void two_shuffles_kernel(const float* in, float* out) {
  float value = in[threadIdx.x];
  if (threadIdx.x % 2 == 0) {
    value += __shfl_xor_sync(kAllLanes, value, 2);
  } else {
    value -= __shfl_xor_sync(kAllLanes, value, 2);
  }
  out[threadIdx.x] = value;
}

// Sixteen lanes wait for their warp, and everybody else for them.
__global__ void deadlock_kernel(const float* in, float* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_sync(kAllLanes, in[threadIdx.x], 0);
  } else {
    __syncthreads();
  }
}

__global__ void foreign_mask_kernel(const float* in, float* out) {
  out[threadIdx.x] = __shfl_sync(0xffffu, in[threadIdx.x], 0);
}

__global__ void two_barriers_kernel(const float* in, float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
  } else {
    __syncthreads();
    out[threadIdx.x] = -in[threadIdx.x];
  }
}

__global__ void ended_lane_kernel(const float* in, float* out) {
  if (threadIdx.x % 32 == 31) return;
  out[threadIdx.x] = __shfl_down_sync(kAllLanes, in[threadIdx.x], 1);
}

__global__ void stranger_kernel(const float* in, float* out) {
  // Lane 15 of the lower half reads lane 16, which is not asked.
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_down_sync(0xffffu, in[threadIdx.x], 1);
}

__global__ void misaligned_kernel(const float* in, float* out) {
  const float4 four = load_as<float4>(in + (threadIdx.x == 5 ? 1 : 0));
  out[threadIdx.x] = four.x;
}

__global__ void poison_kernel(const float*, float* out) {
  WISE_SHARED(float, fixed, [kThreads]);
  const float* dynamic = dynamic_shared<float>();
  out[threadIdx.x] = threadIdx.x < 32 ? fixed[threadIdx.x] : dynamic[threadIdx.x];
}

// Every collective once: lane by lane into out, `kCollectives` numbers each.
constexpr int kCollectives = 17;

__global__ void collectives_kernel(const float* in, float* out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const float value = in[threadIdx.x];
  const int whole = static_cast<int>(value);
  const auto natural = static_cast<unsigned>(whole + 1000);
  float* mine = out + threadIdx.x * kCollectives;
  mine[0] = __shfl_sync(kAllLanes, value, lane * 7 + 3);
  mine[1] = __shfl_sync(kAllLanes, value, lane + 5, 8);
  mine[2] = __shfl_up_sync(kAllLanes, value, 3);
  mine[3] = __shfl_up_sync(kAllLanes, value, 3, 8);
  mine[4] = __shfl_down_sync(kAllLanes, value, 3);
  mine[5] = __shfl_down_sync(kAllLanes, value, 3, 8);
  mine[6] = __shfl_xor_sync(kAllLanes, value, 13);
  mine[7] = __shfl_xor_sync(kAllLanes, value, 13, 8);
  mine[8] = static_cast<float>(__popc(__ballot_sync(kAllLanes, whole > 0) & low_bits(lane)));
  mine[9] = static_cast<float>(__any_sync(kAllLanes, whole == 7));
  mine[10] = static_cast<float>(__all_sync(kAllLanes, whole < 100));
  mine[11] = static_cast<float>(__popc(__match_any_sync(kAllLanes, whole)));
  mine[12] = static_cast<float>(__reduce_add_sync(kAllLanes, whole));
  mine[13] = static_cast<float>(__reduce_min_sync(kAllLanes, whole));
  mine[14] = static_cast<float>(__reduce_max_sync(kAllLanes, natural));
  mine[15] = static_cast<float>(__syncthreads_count(whole > 0));
  // Halves of a warp may meet by themselves.
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  mine[16] = __shfl_sync(half, value, lane / 16 * 16);
}

__global__ void empty_kernel() {}

template <auto kKernel>
void run(const float* in, float* out, int blocks) {
  launch<kKernel>("probe", {blocks}, kThreads, kThreads * sizeof(float), nullptr, in, out);
}

using Run = void (*)(const float* in, float* out, int blocks);

struct Probe {
  const char* name;
  Run run;
};

constexpr Probe kProbes[] = {
    {"reverse", run<reverse_kernel<true>>},
    {"reverse without barrier", run<reverse_kernel<false>>},
    {"steps", run<steps_kernel<true>>},
    {"steps without barrier", run<steps_kernel<false>>},
    {"divergent shuffle", run<divergent_shuffle_kernel>},
    {"two shuffles", run<two_shuffles_kernel>},
    {"deadlock", run<deadlock_kernel>},
    {"foreign mask", run<foreign_mask_kernel>},
    {"two barriers", run<two_barriers_kernel>},
    {"ended lane", run<ended_lane_kernel>},
    {"stranger", run<stranger_kernel>},
    {"misaligned", run<misaligned_kernel>},
    {"poison", run<poison_kernel>},
    {"collectives", run<collectives_kernel>},
};

// What `f` throws, as text that lives until the next call; null where it throws nothing.
template <typename F>
const char* failure_of(const F& f) {
  static std::string failure;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
}

}  // namespace

// Runs a kernel of 64 threads a block; returns null, or why it failed.
WISE_PROBE const char* wise_probe(const char* name, const float* in, float* out, int blocks) {
  for (const Probe& probe : kProbes) {
    if (std::string(probe.name) == name) return failure_of([&] { probe.run(in, out, blocks); });
  }
  return "no such probe";
}

// Runs an empty kernel of this grid and block; returns null, or why it failed.
WISE_PROBE const char* wise_probe_launch(int64_t blocks, int64_t layers, int threads,
                                         int64_t shared_bytes) {
  return failure_of([=] {
    launch<empty_kernel>("probe", {blocks, layers}, threads, static_cast<std::size_t>(shared_bytes),
                         nullptr);
  });
}

WISE_PROBE uint32_t wise_low_bits(int count) { return low_bits(count); }
WISE_PROBE uint32_t wise_valid_bits(int64_t word, int64_t columns) {
  return valid_bits(word, columns);
}
WISE_PROBE int64_t wise_words_of(int64_t columns) { return words_of(columns); }
WISE_PROBE int wise_popcount(uint32_t bits) { return popcount(bits); }
WISE_PROBE int wise_rank_of(uint32_t bits, int bit) { return rank_of(bits, bit); }
WISE_PROBE int wise_select_bit(uint32_t bits, int n) { return select_bit(bits, n); }
WISE_PROBE uint32_t wise_bit_field(uint32_t bits, int bit, int count) {
  return bit_field(bits, bit, count);
}
WISE_PROBE int wise_row_fits(int64_t first, int64_t last, int64_t set, int64_t values) {
  return row_fits(first, last, set, values);
}

// `count` numbers at once, for tests that try very many.
WISE_PROBE void wise_round(const float* from, uint16_t* bfloat16, uint16_t* float16,
                           int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    bfloat16[i] = rounded<BFloat16>(from[i]).bits;
    float16[i] = rounded<Float16>(from[i]).bits;
  }
}
WISE_PROBE void wise_widen(const uint16_t* bits, float* bfloat16, float* float16, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    bfloat16[i] = to_float(BFloat16{bits[i]});
    float16[i] = to_float(Float16{bits[i]});
  }
}
// Sixteen bytes as floats: eight of each of the narrow types.
WISE_PROBE void wise_widen_vector(const uint32_t* words, float* bfloat16, float* float16) {
  const uint4 vector = make_uint4(words[0], words[1], words[2], words[3]);
  float eight[8];
  to_floats<BFloat16>(vector, eight);
  std::copy(eight, eight + 8, bfloat16);
  to_floats<Float16>(vector, eight);
  std::copy(eight, eight + 8, float16);
}

}  // namespace wise::cuda
