// The CPU kernels for any processor.
#define WISE_ISA portable

#include "kernels/cpu/vec_portable.h"
// After the registers it is written in.
#include "kernels/cpu/kernels_table.h"

namespace wise {

using namespace portable;

const Table kPortableTable = WISE_TABLE;

}  // namespace wise
