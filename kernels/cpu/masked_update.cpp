// The optimizer step over rows: the table's kernel, shared out among threads.
#include <atomic>

#include "kernels/cpu/driver.h"
#include "kernels/cpu/table.h"

namespace wise {

bool masked_update(const Update& update, ParallelFor parallel) {
  const auto step = table().masked_update;
  std::atomic<bool> good{true};
  run(parallel, update.rows, grain_for(update.columns), [&](int64_t begin, int64_t end) {
    if (!step(update, begin, end)) good = false;
  });
  return good;
}

}  // namespace wise
