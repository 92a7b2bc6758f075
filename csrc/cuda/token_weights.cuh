// Steps 2 to 4 of the paper up to the advantage: span distances / mean norm, then the maximum (or
// mean) over the covering spans.
#pragma once
#include "cuda/nearest.cuh"

namespace shear::cuda {

struct WeightsArgs {
  Call call;
  float* weights;
};

// A thread per token.
__global__ void __launch_bounds__(kThreads) token_weights(const WeightsArgs args) {
  const Call& call = args.call;
  const int64_t t = global_thread();
  if (t >= call.tokens) return;
  const int i = last_not_after(call.n_rollouts, t, [&](int k) { return call.rollouts[k].begin; });
  const DeviceRollout rollout = call.rollouts[i];
  if (rollout.group < 0) {
    args.weights[t] = 1.f;
    return;
  }
  const int64_t at = t - rollout.begin, tokens = rollout.end - rollout.begin;
  const int64_t first = first_covering(at, tokens, call.span_tokens, call.stride);
  const int64_t end = end_covering(at, tokens, call.span_tokens, call.stride);
  double highest = 0, total = 0;
  for (int64_t k = first; k < end; ++k) {
    const double distance = final_distance(call, call.nearest[rollout.span_begin + k]);
    highest = distance <= highest ? highest : distance;  // keeps NaN
    total += distance;
  }
  const double pooled = call.mean_pooling ? total / static_cast<double>(end - first) : highest;
  const double of_group = call.group_norm[rollout.group];
  const bool own = call.rollout_norms && !(call.rollout_norm[i] < kLeastRolloutNorm * of_group);
  const double norm = own ? call.rollout_norm[i] : of_group;
  args.weights[t] = static_cast<float>(pooled == 0 ? 0. : pooled / norm);
}

}  // namespace shear::cuda
