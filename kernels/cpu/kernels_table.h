// Fills one table: included last by kernels_*.cpp, after its Vec.
#pragma once

#include "kernels/cpu/dense_product.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/masked_update.h"
#include "kernels/cpu/max_sim.h"
#include "kernels/cpu/side_product.h"
#include "kernels/cpu/ties_merge.h"

namespace wise::WISE_ISA {

#define WISE_EACH_DTYPE(function) {function<float>, function<BFloat16>, function<Float16>}

#define WISE_TABLE               \
  {kFew,                         \
   WISE_EACH_DTYPE(side_dot),    \
   WISE_EACH_DTYPE(side_dots),   \
   WISE_EACH_DTYPE(side_axpy),   \
   WISE_EACH_DTYPE(dense_dot),   \
   WISE_EACH_DTYPE(dense_dots),  \
   WISE_EACH_DTYPE(dense_axpy),  \
   WISE_EACH_DTYPE(kArrange),    \
   WISE_EACH_DTYPE(widen),       \
   WISE_EACH_DTYPE(add_rounded), \
   WISE_EACH_DTYPE(store_sum),   \
   masked_update,                \
   mask_gradient,                \
   kSimBytes,                    \
   max_sim,                      \
   count_high,                   \
   count_low,                    \
   pick,                         \
   merge}

}  // namespace wise::WISE_ISA
