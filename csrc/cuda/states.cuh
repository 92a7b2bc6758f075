// What is measured once per call from the hidden states alone: where spans are, norms, their means.
#pragma once
#include "cuda/call.cuh"

namespace shear::cuda {

// A thread per span.
__global__ void __launch_bounds__(kThreads) begin_call(const Call call) {
  const int64_t s = global_thread();
  Counters& counters = *call.counters;
  if (s == 0) {
    for (int k = 0; k < kCounts; ++k) counters.counts[k] = 0;
    counters.counts[kTotal] = call.pairs;
    counters.bad_token = ~0ull;
  }
  if (s >= call.spans) return;
  const int i = last_not_after(call.n_rollouts, s,
                               [&](int k) { return int64_t{call.rollouts[k].span_begin}; });
  const DeviceRollout& rollout = call.rollouts[i];
  const int64_t k = s - rollout.span_begin, tokens = rollout.end - rollout.begin;
  call.span_table[s] = {.begin = rollout.begin + begin_of_span(call, tokens, k),
                        .size = size_of_span(call, tokens, k),
                        .rollout = i};
  call.best[s] = __float_as_uint(kInfinity);
  call.nearest[s] = nothing_found();
}

// A warp per token.
template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) measure_norms(const Call call) {
  const int64_t token = global_thread() / kWarp;
  if (token >= call.tokens) return;
  const double squares = warp_sum(static_cast<double>(
      sum_over_dims<kDtype>(call.states, token, token, [](float a, float) { return a * a; })));
  if (lane_id() > 0) return;
  call.sq_norm[token] = static_cast<float>(squares);
  call.norm[token] = sqrtf(call.sq_norm[token]);
  if (!(call.norm[token] < kInfinity))
    atomicMin(&call.counters->bad_token, static_cast<unsigned long long>(token));
}

// A CTA per rollout.
__global__ void __launch_bounds__(kThreads) mean_rollout_norms(const Call call) {
  __shared__ double room[kThreads / kWarp];
  const DeviceRollout& rollout = call.rollouts[blockIdx.x];
  double sum = 0;
  for (int64_t t = rollout.begin + threadIdx.x; t < rollout.end; t += kThreads) sum += call.norm[t];
  sum = block_sum(sum, room);
  if (threadIdx.x == 0)
    call.rollout_norm[blockIdx.x] = sum / static_cast<double>(rollout.end - rollout.begin);
}

// A thread per group.
__global__ void __launch_bounds__(kThreads) mean_group_norms(const Call call) {
  const int64_t g = global_thread();
  if (g >= call.n_groups) return;
  double sum = 0, tokens = 0;
  for (int k = call.groups[g].member_begin; k < call.groups[g].member_end; ++k) {
    const DeviceRollout& rollout = call.rollouts[call.members[k]];
    const auto size = static_cast<double>(rollout.end - rollout.begin);
    sum += call.rollout_norm[call.members[k]] * size;
    tokens += size;
  }
  call.group_norm[g] = sum / tokens;
}

}  // namespace shear::cuda
