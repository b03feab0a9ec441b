// Which instruction set the CPU kernels use: the best this processor and its operating system
// offer, unless one is forced.
#include <atomic>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels/cpu/table.h"

namespace wise {

namespace {

#if defined(__x86_64__)
// Whether there are tiles for products of bytes, and the system lets this process use them.
bool has_tiles() {
#if defined(__linux__)
  constexpr unsigned kTile = 1u << 24;
  constexpr unsigned kInt8 = 1u << 25;
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kTile) != 0 && (d & kInt8) != 0 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512 && __builtin_cpu_supports("avx512vbmi2") &&
      __builtin_cpu_supports("avx512vnni")) {
    return has_tiles() ? Isa::kAmx : Isa::kAvx512Vbmi2;
  }
  if (avx2 && avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

Isa force_isa(Isa isa) {
  const Isa best = best_isa();
  chosen().store(isa < best ? isa : best, std::memory_order_relaxed);
  return current_isa();
}

const Table& table() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::kAmx:
      return kAmxTable;
    case Isa::kAvx512Vbmi2:
      return kAvx512Vbmi2Table;
    case Isa::kAvx512:
      return kAvx512Table;
    case Isa::kAvx2:
      return kAvx2Table;
    case Isa::kPortable:
    case Isa::kBest:
      break;
  }
#endif
  return kPortableTable;
}

}  // namespace wise
