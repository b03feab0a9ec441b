// The CPU kernels for AVX-512 with VBMI2, which spreads 16-bit values, and VNNI, which multiplies
// bytes; processors have both or neither.
#if defined(__x86_64__)
#define WISE_ISA avx512vbmi2

#include "kernels/cpu/vec_avx512.h"
// After the registers it is written in.
#include "kernels/cpu/kernels_table.h"

namespace wise {

using namespace avx512vbmi2;

const Table kAvx512Vbmi2Table = WISE_TABLE;

}  // namespace wise
#endif  // __x86_64__
