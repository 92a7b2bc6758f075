// What is measured once per call from the hidden states alone: where spans are, norms, their means.
#pragma once
#include "cuda/call.cuh"
#include "rounding.h"
#include "token_cost.h"

namespace shear::cuda {

// A thread per span.
__global__ void __launch_bounds__(kThreads) begin_call(const Call call) {
  const int64_t s = global_thread();
  Counters& counters = *call.counters;
  if (s == 0) {
    for (int k = 0; k < kCounts; ++k) counters.counts[k] = 0;
    counters.counts[kTotal] = call.pairs;
    counters.bad_token = ~0ull;
    counters.unfit_group = ~0ull;
  }
  if (call.rows.depth > 0 && s <= call.n_groups)
    call.shows[s] = 0;  // a group has two spans or more
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

// To every lane: whether all bits of a state but the signs are 0.
template <Dtype kDtype>
__device__ __forceinline__ bool is_zero(const States& states, int64_t token) {
  return warp_sum(sum_over_dims<kDtype>(states, token, token, [](float a, float) {
           return (__float_as_uint(a) << 1) != 0 ? 1.f : 0.f;
         })) == 0.f;
}

// A warp per token.
template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) measure_norms(const Call call) {
  const int64_t token = global_thread() / kWarp;
  if (token >= call.tokens) return;
  float largest = 0.f;
  const double squares = warp_sum(
      static_cast<double>(sum_over_dims<kDtype>(call.states, token, token, [&](float a, float) {
        largest = fmaxf(largest, fabsf(a));
        return a * a;
      })));
  largest = warp_max(largest);
  // a GPU may flush what is below
  const bool faint = squares < 0x1p-126 && !is_zero<kDtype>(call.states, token);
  if (lane_id() > 0) return;
  call.sq_norm[token] = static_cast<float>(squares);
  const float norm = faint ? kFaintNorm : sqrtf(call.sq_norm[token]);
  const bool bad = !(norm < kMostNorm);
  call.norm[token] = bad ? __uint_as_float(0x7fc00000u) : norm;
  if (call.rows.depth > 0)
    call.exponent[token] = static_cast<uint8_t>(exponent_of(__float_as_uint(largest)));
  if (bad) atomicMin(&call.counters->bad_token, static_cast<unsigned long long>(token));
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
  const double norm = sum / tokens;
  const NormRange range = call.norm_range;
  const bool fits = norm >= range.least && norm <= range.most;
  const bool unfit = !fits && norm > 0 && norm < __builtin_huge_val();
  call.group_norm[g] = unfit ? static_cast<double>(__uint_as_float(0x7fc00000u)) : norm;
  if (unfit)
    atomicMin(&call.counters->unfit_group,
              static_cast<unsigned long long>(g) << 32 | __float_as_uint(static_cast<float>(norm)));
}

}  // namespace shear::cuda
