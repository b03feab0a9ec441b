// The CPU kernels for AVX-512 with VBMI2 and VNNI, and AMX's tiles for products of bytes.
#if defined(__x86_64__)
#define WISE_ISA amx

#include "kernels/cpu/vec_avx512.h"
// After the registers it is written in.
#include "kernels/cpu/kernels_table.h"

namespace wise {

using namespace amx;

const Table kAmxTable = WISE_TABLE;

}  // namespace wise
#endif  // __x86_64__
