// The problems of shear::sinkhorn: bounds max(R, Q) of cost matrices that are given.
#pragma once
#include "cuda/call.cuh"
#include "cuda/pairs.cuh"
#include "solve.h"

namespace shear::cuda {

struct BatchArgs {
  PairTable table;
  Counters* counters;
  float* value;
  int32_t* iterations;
};

__global__ void __launch_bounds__(kThreads) begin_batch(const BatchArgs args) {
  const int k = static_cast<int>(threadIdx.x);
  if (k < kCounts) args.counters->counts[k] = 0;
  if (k > 0) return;
  args.counters->taken = 0;
  args.counters->bad_token = ~0ull;
}

// A CTA per problem.
__global__ void __launch_bounds__(kThreads) bound_problems(const BatchArgs args) {
  __shared__ double room[kThreads / kWarp];
  const Pair pair = pair_at(args.table, blockIdx.x);
  double r = 0, q = 0;
  const float most = most_cost(args.table.reg);
  bool finite = true;
  for (int i = warp_id(); i < pair.n; i += kThreads / kWarp) {
    float lowest = kInfinity;
    for (int j = lane_id(); j < pair.m; j += kWarp) {
      const float cost = pair.cost[i * pair.ld + j];
      finite &= fabsf(cost) < most;
      lowest = fminf(lowest, cost);
    }
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2)
      lowest = fminf(lowest, __shfl_xor_sync(kAllLanes, lowest, d));
    if (lane_id() == 0) r += lowest;
  }
  for (int j = static_cast<int>(threadIdx.x); j < pair.m; j += kThreads) {
    float lowest = pair.cost[j];
    for (int i = 1; i < pair.n; ++i) lowest = fminf(lowest, pair.cost[i * pair.ld + j]);
    q += lowest;
  }
  r = block_sum(r, room) / pair.n;
  q = block_sum(q, room) / pair.m;
  if (!finite) atomicMin(&args.counters->bad_token, 0ull);
  if (threadIdx.x > 0) return;
  args.value[blockIdx.x] = static_cast<float>(r > q ? r : q);
  args.iterations[blockIdx.x] = kUntried;
}

}  // namespace shear::cuda
