// max_sim: queries are laid out so that a register holds one column of sixteen tokens, then entries
// are shared out among threads.
#include <cmath>
#include <vector>

#include "kernels/cpu/driver.h"
#include "kernels/cpu/table.h"

namespace wise {

namespace {

constexpr int64_t kLanes = 16;
// Added and taken away again, it leaves a small number's nearest whole one.
constexpr float kRounding = 12582912.0f;

// One row of the batch: its tokens, but for zeros, which match nothing, in a panel [width, lanes],
// and rounded to bytes as [width / 4, lanes, 4].
class Laid {
 public:
  Laid(const float* rows, int64_t tokens, int64_t width, bool bytes) {
    std::vector<const float*> kept;
    std::vector<float> largest;
    for (int64_t t = 0; t < tokens; ++t) {
      float most = 0.0f;
      for (int64_t c = 0; c < width; ++c) {
        const float size = std::fabs(rows[t * width + c]);
        if (!std::isfinite(size)) return;
        most = size > most ? size : most;
      }
      if (most == 0.0f) continue;
      kept.push_back(rows + t * width);
      largest.push_back(most);
    }
    const auto count = static_cast<int64_t>(kept.size());
    lanes_ = divide_up(count, kLanes) * kLanes;
    panel_ = buffer<float>(width * lanes_);
    for (int64_t c = 0; c < width; ++c) {
      for (int64_t t = 0; t < lanes_; ++t) {
        panel_[c * lanes_ + t] = t < count ? kept[static_cast<std::size_t>(t)][c] : 0.0f;
      }
    }
    if (!bytes) return;
    bytes_ = buffer<uint8_t>(width * lanes_);
    steps_.assign(static_cast<std::size_t>(lanes_), 0.0f);
    errors_.assign(static_cast<std::size_t>(lanes_), 0.0f);
    for (int64_t t = 0; t < lanes_; ++t) {
      const auto i = static_cast<std::size_t>(t);
      const float step = t < count ? largest[i] / 127.0f : 0.0f;
      const float inverse = t < count ? 127.0f / largest[i] : 0.0f;
      double lost = 0.0;
      for (int64_t c = 0; c < width; ++c) {
        const float value = panel_[c * lanes_ + t];
        const float whole = value * inverse + kRounding - kRounding;
        const double rest = static_cast<double>(value) - static_cast<double>(whole) * step;
        lost += rest * rest;
        bytes_[(c / 4 * lanes_ + t) * 4 + c % 4] = static_cast<uint8_t>(whole + 128.0f);
      }
      steps_[i] = step;
      errors_[i] = static_cast<float>(std::sqrt(lost));
    }
  }

  SimQuery view() const {
    return {panel_.get(), bytes_.get(), steps_.data(), errors_.data(), lanes_};
  }

 private:
  Buffer<float> panel_;
  Buffer<uint8_t> bytes_;
  std::vector<float> steps_;
  std::vector<float> errors_;
  int64_t lanes_ = 0;
};

}  // namespace

void max_sim(const MaxSim& stored, const float* query, int64_t batch, int64_t tokens, float* scores,
             ParallelFor parallel) {
  const Table& kernels = table();
  // Without a floor nothing is left out, and keys are read by whole registers.
  const bool bytes = kernels.sim_bytes && stored.floor > 0.0f && stored.width % 64 == 0;
  std::vector<Laid> rows;
  std::vector<SimQuery> queries;
  int64_t lanes = 0;
  for (int64_t b = 0; b < batch; ++b) {
    rows.emplace_back(query + b * tokens * stored.width, tokens, stored.width, bytes);
    queries.push_back(rows.back().view());
    lanes += queries.back().lanes;
  }
  const int64_t cost = stored.width * (lanes > 0 ? lanes : 1) / 8;
  run(parallel, stored.entries, grain_for(cost), [&](int64_t begin, int64_t end) {
    const Buffer<float> scratch = buffer<float>(kSimKeys / 4 * stored.width);
    kernels.max_sim(stored, queries.data(), batch, begin, end, scratch.get(), scores);
  });
}

}  // namespace wise
