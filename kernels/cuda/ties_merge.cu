// TIES without a sort. Three passes count each delta's magnitudes by their bits, all deltas in one
// launch, which finds the least magnitude to keep exactly; one pass then elects signs and takes the
// disjoint mean. Each entry is read once a pass and written once in all.
#include <algorithm>

#include "kernels/cuda/bits.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/radix.cuh"

namespace wise::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kMaxDeltas = 256;
constexpr int kFlight = 4;  // loads of 16 bytes a thread has under way
// Blocks a multiprocessor has at once: eight of 256 threads fill it.
constexpr int kBlocksEach = 8;

using Count = unsigned long long;

// A kernel argument, and with it in constant memory: no copy to the device is needed.
struct Deltas {
  const float* of[kMaxDeltas];
};
struct Weights {
  float of[kMaxDeltas];
};

struct Workspace {
  Count* counts;  // [deltas, kAllBins]
  Selection* selections;
};

Workspace workspace_at(void* memory, int64_t deltas_count) {
  auto* counts = static_cast<Count*>(memory);
  return {counts, reinterpret_cast<Selection*>(counts + deltas_count * kAllBins)};
}

__global__ void __launch_bounds__(kThreads) clear_kernel(Count* counts) {
  counts[static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x] = 0;
}

// Calls f(bits) for every float of an array, sixteen bytes at a time from the first such address
// on.
template <typename F>
__device__ __forceinline__ void for_each_float(const float* values, int64_t size, const F& f) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const auto beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(values) / 4 % 4);
  const int64_t head = min((4 - beyond) % 4, size);
  const int64_t vectors = (size - head) / 4;
  const float* body = values + head;
  for (int64_t i = thread; i < vectors; i += kFlight * threads) {
    uint4 four[kFlight];
#pragma unroll
    for (int j = 0; j < kFlight; ++j) {
      const int64_t at = i + j * threads;
      four[j] = at < vectors ? load_once<uint4>(body + 4 * at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int j = 0; j < kFlight; ++j) {
      f(four[j].x);
      f(four[j].y);
      f(four[j].z);
      f(four[j].w);
    }
  }
  // Fewer than four before and behind.
  if (thread < head) f(bits_of(values[thread]));
  const int64_t tail = head + 4 * vectors + thread;
  if (tail < size) f(bits_of(values[tail]));
}

template <int kPass>
__global__ void __launch_bounds__(kThreads)
    count_kernel(Deltas deltas, int64_t size, Workspace workspace) {
  constexpr Digit kDigit = digit_of(kPass);
  WISE_SHARED(unsigned, bins, [kDigit.bins()]);
  const int64_t delta = blockIdx.y;
  for (int b = threadIdx.x; b < kDigit.bins(); b += kThreads) bins[b] = 0;
  __syncthreads();
  const uint32_t prefix = kPass == 0 ? 0 : workspace.selections[delta].prefix;
  for_each_float(deltas.of[delta], size, [&](uint32_t bits) {
    const int bin = bin_of(bits, kDigit, prefix);
    if (bin >= 0) atomicAdd(&bins[bin], 1u);
  });
  __syncthreads();
  Count* all = workspace.counts + delta * kAllBins + bins_before(kPass);
  for (int b = threadIdx.x; b < kDigit.bins(); b += kThreads) {
    if (bins[b] != 0) atomicAdd(&all[b], Count{bins[b]});
  }
}

// Finds the bin of the threshold in a pass's counts; a block a delta. Each thread takes
// neighbouring bins, the first thread the largest ones.
template <int kPass>
__global__ void __launch_bounds__(kThreads) select_kernel(double density, Workspace workspace) {
  constexpr Digit kDigit = digit_of(kPass);
  constexpr int kEach = kDigit.bins() / kThreads;
  WISE_SHARED(int64_t, totals, [kThreads]);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t delta = blockIdx.x;
  const Count* bins = workspace.counts + delta * kAllBins + bins_before(kPass);
  Selection* selection = workspace.selections + delta;
  const int top = kDigit.bins() - 1 - thread * kEach;
  int64_t mine = 0;
  for (int i = 0; i < kEach; ++i) mine += static_cast<int64_t>(bins[top - i]);
  totals[thread] = mine;
  __syncthreads();
  for (int by = 1; by < kThreads; by *= 2) {
    const int64_t before = thread >= by ? totals[thread - by] : 0;
    __syncthreads();
    totals[thread] += before;
    __syncthreads();
  }
  Selection now = {0, 0.0f, 0};
  if constexpr (kPass == 0) {
    now.rank = rank_to_keep(density, totals[kThreads - 1]);
    // Of nothing but zeros everything stays.
    if (totals[kThreads - 1] == 0 && thread == 0) *selection = now;
  } else {
    now = *selection;
  }
  __syncthreads();  // all have read the selection; one writes it
  int64_t above = totals[thread] - mine;
  for (int i = 0; i < kEach; ++i) {
    const auto count = static_cast<int64_t>(bins[top - i]);
    if (bin_holds(now.rank, above, count)) *selection = narrowed(now, kDigit, top - i, above);
    above += count;
  }
}

// out, kEach entries of a thread at a time.
template <int kEach>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(Deltas deltas, Weights weights, int deltas_count, int64_t size, bool trimmed,
                 const Selection* selections, float* out) {
  WISE_SHARED(float, thresholds, [kMaxDeltas]);
  for (int d = threadIdx.x; d < deltas_count; d += kThreads) {
    thresholds[d] = trimmed ? selections[d].threshold : 0.0f;
  }
  __syncthreads();
  const int64_t count = size / kEach;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += threads) {
    Merging merging[kEach];
    const auto add = [&](int d, const float (&entries)[kEach]) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        merge_entry(merging[j], entries[j], weights.of[d], thresholds[d]);
      }
    };
    const auto load = [&](int d, float (&entries)[kEach]) {
      if constexpr (kEach == 4) {
        to_floats<float>(load_once<uint4>(deltas.of[d] + 4 * i), entries);
      } else {
        entries[0] = load_once<float>(deltas.of[d] + i);
      }
    };
    int d = 0;
    for (; d + kFlight <= deltas_count; d += kFlight) {
      float entries[kFlight][kEach];
#pragma unroll
      for (int j = 0; j < kFlight; ++j) load(d + j, entries[j]);
#pragma unroll
      for (int j = 0; j < kFlight; ++j) add(d + j, entries[j]);
    }
    for (; d < deltas_count; ++d) {
      float entries[kEach];
      load(d, entries);
      add(d, entries);
    }
    if constexpr (kEach == 4) {
      store_as<float4>(out + 4 * i, make_float4(merged(merging[0]), merged(merging[1]),
                                                merged(merging[2]), merged(merging[3])));
    } else {
      out[i] = merged(merging[0]);
    }
  }
}

template <int kPass>
void find_digit(const Deltas& deltas, int64_t deltas_count, int64_t size, double density,
                const Workspace& workspace, Stream stream) {
  // Enough blocks for the whole card, however many deltas share it; a block has at least 16 loads
  // a thread, so that its counters cost little beside.
  const int64_t most = divide_up(size, int64_t{4} * kThreads * kFlight * 4);
  const int64_t share = divide_up(kBlocksEach * multiprocessors(), deltas_count);
  launch<count_kernel<kPass>>("ties_merge", {std::min(most, share), deltas_count}, kThreads, 0,
                              stream, deltas, size, workspace);
  launch<select_kernel<kPass>>("ties_merge", {deltas_count}, kThreads, 0, stream, density,
                               workspace);
}

template <int kEach>
void merge(const Deltas& deltas, const Weights& weights, int64_t deltas_count, int64_t size,
           bool trimmed, const Workspace& workspace, float* out, Stream stream) {
  const int64_t blocks =
      std::min<int64_t>(divide_up(size / kEach, kThreads), kBlocksEach * multiprocessors());
  launch<merge_kernel<kEach>>("ties_merge", {blocks}, kThreads, 0, stream, deltas, weights,
                              static_cast<int>(deltas_count), size, trimmed, workspace.selections,
                              out);
}

}  // namespace

int64_t ties_merge_workspace(int64_t deltas_count) {
  return deltas_count * static_cast<int64_t>(kAllBins * sizeof(Count) + sizeof(Selection));
}

void ties_merge(const float* const* deltas, const float* weights, int64_t deltas_count,
                int64_t size, double density, float* out, void* memory, Stream stream) {
  if (deltas_count > kMaxDeltas) {
    throw std::runtime_error("wise_ext: ties_merge takes at most " + std::to_string(kMaxDeltas) +
                             " deltas on a GPU, got " + std::to_string(deltas_count));
  }
  if (size == 0 || deltas_count == 0) return;
  Deltas arrays = {};
  Weights factors = {};
  bool aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0;
  for (int64_t d = 0; d < deltas_count; ++d) {
    arrays.of[d] = deltas[d];
    factors.of[d] = weights[d];
    aligned = aligned && reinterpret_cast<uintptr_t>(deltas[d]) % 16 == 0;
  }
  const Workspace workspace = workspace_at(memory, deltas_count);
  const bool trimmed = density < 1.0;
  if (trimmed) {
    launch<clear_kernel>("ties_merge", {deltas_count * kAllBins / kThreads}, kThreads, 0, stream,
                         workspace.counts);
    find_digit<0>(arrays, deltas_count, size, density, workspace, stream);
    find_digit<1>(arrays, deltas_count, size, density, workspace, stream);
    find_digit<2>(arrays, deltas_count, size, density, workspace, stream);
  }
  const int64_t whole = aligned ? size / 4 * 4 : 0;
  merge<4>(arrays, factors, deltas_count, whole, trimmed, workspace, out, stream);
  for (int64_t d = 0; d < deltas_count; ++d) arrays.of[d] += whole;
  merge<1>(arrays, factors, deltas_count, size - whole, trimmed, workspace, out + whole, stream);
}

}  // namespace wise::cuda
