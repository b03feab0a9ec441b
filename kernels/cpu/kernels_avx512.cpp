// The CPU kernels for AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#define WISE_ISA avx512

#include "kernels/cpu/vec_avx512.h"
// After the registers it is written in.
#include "kernels/cpu/kernels_table.h"

namespace wise {

using namespace avx512;

const Table kAvx512Table = WISE_TABLE;

}  // namespace wise
#endif  // __x86_64__
