// Late interaction with stored token keys: max_sim.
#include "csrc/check.h"

namespace wise {

namespace {

Tensor max_sim_op(const Tensor query, const Tensor keys, const Tensor scales, const Tensor places,
                  const Tensor weights, double floor) {
  const char* op = "max_sim";
  require_type({op, "query"}, query, ScalarType::Float);
  require_type({op, "keys"}, keys, ScalarType::Char);
  require_type({op, "scales"}, scales, ScalarType::Float);
  require_type({op, "places"}, places, ScalarType::Int);
  require_type({op, "weights"}, weights, ScalarType::Float);
  require_dims({op, "query"}, query, 3);
  require_dims({op, "keys"}, keys, 2);
  require_dims({op, "scales"}, scales, 1);
  require_dims({op, "places"}, places, 2);
  require_cpu({op, "query"}, query);
  require_cpu({op, "keys"}, keys);
  require_cpu({op, "scales"}, scales);
  require_cpu({op, "places"}, places);
  require_cpu({op, "weights"}, weights);
  require(query.size(2) == keys.size(1), op, ": query has width ", query.size(2), ", keys have ",
          keys.size(1));
  require(scales.size(0) == keys.size(0), op, ": there are ", keys.size(0), " keys, but ",
          scales.size(0), " scales");
  require_shape({op, "weights"}, weights, places.size(0), places.size(1));
  const NoGrad no_grad;
  const Tensor asked = torch::stable::contiguous(query);
  const Tensor held_keys = torch::stable::contiguous(keys);
  const Tensor held_scales = torch::stable::contiguous(scales);
  const Tensor held_places = torch::stable::contiguous(places);
  const Tensor held_weights = torch::stable::contiguous(weights);
  MaxSim stored;
  stored.keys = static_cast<const int8_t*>(held_keys.const_data_ptr());
  stored.scales = static_cast<const float*>(held_scales.const_data_ptr());
  stored.width = keys.size(1);
  stored.places = static_cast<const int32_t*>(held_places.const_data_ptr());
  stored.weights = static_cast<const float*>(held_weights.const_data_ptr());
  stored.entries = places.size(0);
  stored.most = places.size(1);
  stored.floor = static_cast<float>(floor);
  require_in_range({op, "places"}, stored.places, stored.entries * stored.most, -1,
                   keys.size(0) - 1);
  Tensor scores = torch::stable::new_empty(query, {query.size(0), stored.entries});
  max_sim(stored, static_cast<const float*>(asked.const_data_ptr()), query.size(0), query.size(1),
          static_cast<float*>(scores.mutable_data_ptr()), parallel_for);
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wise_ext, CPU, m) { m.impl("max_sim", TORCH_BOX(&max_sim_op)); }

}  // namespace wise
