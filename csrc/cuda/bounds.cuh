// Reductions of token costs over spans, and from them every span pair's bound max(R, Q), or its
// chamfer distance: R = mean over rows i of min_j C_ij, Q = mean over columns j of min_i C_ij.
#pragma once
#include "cuda/call.cuh"

namespace shear::cuda {

// A CTA per strip of rows, which reads its costs once from memory. Minima over the strip's rows for
// every column, which overlapping spans share; minima over every column span for each row.
__global__ void __launch_bounds__(kThreads) reduce_costs(const Call call) {
  if (!looks_at_any(call)) return;
  const DeviceBlock block = call.blocks[last_not_after(
      call.n_blocks, blockIdx.x, [&](int i) { return int64_t{call.blocks[i].strip_begin}; })];
  if (!is_computed(call, block.group)) return;
  const int strip = static_cast<int>(blockIdx.x) - block.strip_begin;
  const int64_t first = strip * call.strip;
  const int rows = static_cast<int>(min(call.strip, block.row_tokens - first));
  if (rows <= 0) return;  // of a second look: a span shorter than the longest
  const float* costs = call.costs + block.cost_offset + first * block.ld;
  if (call.column_minima) {
    float* minima = call.minima + block.minima_offset + static_cast<int64_t>(strip) * block.ld;
    for (int j = static_cast<int>(threadIdx.x); j < block.col_tokens; j += kThreads) {
      float lowest = costs[j];
      for (int i = 1; i < rows; ++i)
        lowest = fminf(lowest, costs[static_cast<int64_t>(i) * block.ld + j]);
      minima[j] = lowest;
    }
  }
  for (int i = warp_id(); i < rows; i += kThreads / kWarp) {
    const float* row = costs + static_cast<int64_t>(i) * block.ld;
    float* windows = call.windows + block.window_offset + (first + i) * block.col_spans;
    for (int b0 = 0; b0 < block.col_spans; b0 += kWarp) {
      float kept = 0.f;  // lane l: of span b0 + l
      for (int b = b0; b < min(b0 + kWarp, block.col_spans); ++b) {
        const int64_t begin = begin_of_span(call, block.col_tokens, b);
        const int size = size_of_span(call, block.col_tokens, b);
        float lowest = kInfinity;
        for (int j = lane_id(); j < size; j += kWarp) lowest = fminf(lowest, row[begin + j]);
        // costs are >= 0: their bits have their order
        lowest = __uint_as_float(__reduce_min_sync(kAllLanes, __float_as_uint(lowest)));
        if (lane_id() == b - b0) kept = lowest;
      }
      if (b0 + lane_id() < block.col_spans) windows[b0 + lane_id()] = kept;
    }
  }
}

// Q of one pair, to every lane.
__device__ __forceinline__ float column_bound(const Call& call, const DeviceBlock& block, int a,
                                              int n, int b) {
  const int64_t row = begin_of_span(call, block.row_tokens, a);
  const int64_t col = begin_of_span(call, block.col_tokens, b);
  const int m = size_of_span(call, block.col_tokens, b);
  // whole strips of the row span, which begins with strip a, then its remaining rows
  const int strips = call.column_minima ? static_cast<int>(n / call.strip) : 0;
  const float* minima =
      call.minima + block.minima_offset + static_cast<int64_t>(a) * block.ld + col;
  const float* costs = call.costs + block.cost_offset + row * block.ld + col;
  float sum = 0.f;
  for (int j = lane_id(); j < m; j += kWarp) {
    float lowest = kInfinity;
    for (int s = 0; s < strips; ++s)
      lowest = fminf(lowest, minima[static_cast<int64_t>(s) * block.ld + j]);
    for (int64_t i = strips * call.strip; i < n; ++i)
      lowest = fminf(lowest, costs[i * block.ld + j]);
    sum += lowest;
  }
  return warp_sum(sum) / static_cast<float>(m);
}

__device__ __forceinline__ unsigned long long seed_key(float bound, int64_t p) {
  return static_cast<unsigned long long>(__float_as_uint(bound)) << 32 |
         static_cast<unsigned long long>(p);
}

// A warp per row span and 32 column spans of a block; lane l has the pair with the l-th of them.
// For four CTAs of a multiprocessor it would have to spill.
__global__ void __launch_bounds__(kThreads, 3) bound_pairs(const Call call) {
  const int64_t task = global_thread() / kWarp;
  if (task >= call.bound_rows) return;
  const DeviceBlock block = call.blocks[last_not_after(
      call.n_blocks, task, [&](int i) { return int64_t{call.blocks[i].bound_begin}; })];
  const int tiles = (block.col_spans + kWarp - 1) / kWarp;
  const int at = static_cast<int>(task - block.bound_begin);
  const int a = at / tiles, b0 = at % tiles * kWarp, b = b0 + lane_id();
  const bool present = b < block.col_spans;
  const int64_t p = block.pair_offset + static_cast<int64_t>(a) * block.col_spans + b;
  Counters& counters = *call.counters;
  const int count = min(kWarp, block.col_spans - b0);
  if (!is_computed(call, block.group)) {
    if (present) {
      call.value[p] = call.group_norm[block.group] == 0 ? 0.f : __uint_as_float(0x7fc00000u);
      call.residual[p] = 0.f;
      call.iterations[p] = 0;
    }
    if (lane_id() == 0 && looks_at(call, block.group))
      atomicAdd(counters.counts + (call.chamfer ? kSolved : kBounded),
                static_cast<unsigned long long>(count));
    return;
  }
  const int64_t row = begin_of_span(call, block.row_tokens, a);
  const int n = size_of_span(call, block.row_tokens, a);
  float r = 0.f;
  if (present) {
    const float* windows = call.windows + block.window_offset + row * block.col_spans + b;
    for (int i = 0; i < n; ++i) r += windows[static_cast<int64_t>(i) * block.col_spans];
    r /= static_cast<float>(n);
  }
  float q = 0.f;
  for (int k = 0; k < count; ++k) {
    const float of_pair = column_bound(call, block, a, n, b0 + k);
    if (lane_id() == k) q = of_pair;
  }
  const float bound = call.chamfer ? (r + q) / 2 : fmaxf(r, q);
  if (present) {
    call.value[p] = bound;
    call.residual[p] = 0.f;
    call.iterations[p] = call.chamfer ? 0 : kUntried;
  }
  if (call.chamfer) {
    if (lane_id() == 0)
      atomicAdd(counters.counts + kSolved, static_cast<unsigned long long>(count));
    return;
  }
  unsigned long long key = present ? seed_key(bound, p) : ~0ull;
  if (present) atomicMin(call.seed + block.col_span + b, key);
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) key = min(key, __shfl_xor_sync(kAllLanes, key, d));
  if (lane_id() == 0) atomicMin(call.seed + block.row_span + a, key);
}

}  // namespace shear::cuda
