// The CPU kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#define WISE_ISA avx2

#include "kernels/cpu/vec_avx2.h"
// After the registers it is written in.
#include "kernels/cpu/kernels_table.h"

namespace wise {

using namespace avx2;

const Table kAvx2Table = WISE_TABLE;

}  // namespace wise
#endif  // __x86_64__
