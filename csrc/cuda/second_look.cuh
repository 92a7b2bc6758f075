// The second look at every span's nearest span: token costs from a product of the states as they
// are, solved again, so that the distances that leave a call carry no rounding to int8. The blocks,
// one per span, are made on the device, where the nearest spans are. Two spans that are nearest to
// each other make two equal blocks. Where this look finds that rounding shows in a group, a last
// one is at all of the group, as the first but without rounding. The host does not know whether
// there is such a group, so it launches all the same: where there is none, ten kernels per chunk
// whose CTAs leave after one read, or after a few words per pair.
#pragma once
#include "cuda/call.cuh"
#include "cuda/pairs.cuh"
#include "rounding.h"

namespace shear::cuda {

struct LookArgs {
  Call call;  // its pairs are spans: the `first`th with an opposing set, and those after it
  SecondLook plan;
  int64_t first;
  DeviceBlock* blocks;
  PairTable table;  // of the same pairs
  int32_t n_iters;
  unsigned long long* stopped;  // of the call
};

// The span that pair p belongs to.
__device__ __forceinline__ int span_of_look(const LookArgs& args, int64_t p, bool* correct) {
  const Call& call = args.call;
  const int64_t at = args.first + p;
  const DeviceRollout& rollout = call.rollouts[last_not_after(
      call.n_rollouts, at, [&](int i) { return int64_t{call.rollouts[i].look_begin}; })];
  *correct = rollout.correct != 0;
  return rollout.span_begin + static_cast<int>(at - rollout.look_begin);
}

// A thread per pair.
__global__ void __launch_bounds__(kThreads) begin_look(const LookArgs args) {
  const Call& call = args.call;
  const SecondLook& plan = args.plan;
  const int64_t p = global_thread();
  if (p == 0) {  // counters of its own: a call counts its first look, but for what is stopped
    for (int k = 0; k < kCounts; ++k) call.counters->counts[k] = 0;
    call.counters->taken = 0;
  }
  if (p >= call.chunk_pairs) return;
  bool correct;
  const int span = span_of_look(args, p, &correct), other = call.nearest[span].span;
  const int row_span = correct ? span : other, col_span = correct ? other : span;
  const DeviceSpan row = call.span_table[row_span], col = call.span_table[col_span];
  const auto i = static_cast<int32_t>(p);
  args.blocks[p] = {.row_token = row.begin,
                    .col_token = col.begin,
                    .cost_offset = p * plan.cost_floats,
                    .window_offset = p * plan.window_floats,
                    .minima_offset = p * plan.minima_floats,
                    .pair_offset = p,
                    .row_tokens = row.size,
                    .col_tokens = col.size,
                    .row_span = row_span,
                    .row_spans = 1,
                    .col_span = col_span,
                    .col_spans = 1,
                    .ld = static_cast<int32_t>(plan.ld),
                    .group = call.rollouts[row.rollout].group,
                    .row_place = 0,
                    .col_place = 0,
                    .tile_begin = i * static_cast<int32_t>(plan.cost_tiles),
                    .strip_begin = i * static_cast<int32_t>(plan.strips),
                    .bound_begin = i};
}

// A thread per pair.
__global__ void __launch_bounds__(kThreads) end_look(const LookArgs args) {
  const Call& call = args.call;
  const int64_t p = global_thread();
  if (p >= call.chunk_pairs) return;
  bool correct;
  const int span = span_of_look(args, p, &correct);
  const Pair pair = pair_at(args.table, p);
  DeviceNearest& found = call.nearest[span];
  const int group = args.blocks[p].group;
  if (rounding_shows(found.distance, call.value[p], pair.eps))
    call.shows[group] = call.shows[call.n_groups] = 1;
  // of two equal blocks, one counts
  const bool counts = correct || call.nearest[pair.row_span].span != span;
  if (counts && call.iterations[p] >= args.n_iters && found.iterations < args.n_iters)
    atomicAdd(args.stopped, 1ull);
  found.distance = call.value[p];
  found.residual = call.residual[p];
  found.iterations = call.iterations[p];
}

// A thread per span: those of groups in which rounding shows start again.
__global__ void __launch_bounds__(kThreads) begin_exact_look(const Call call) {
  const int64_t s = global_thread();
  if (s >= call.spans || !looks_at_any(call)) return;
  const int group = call.rollouts[call.span_table[s].rollout].group;
  if (group < 0 || !looks_at(call, group)) return;
  call.best[s] = __float_as_uint(kInfinity);
  call.nearest[s] = nothing_found();
}

}  // namespace shear::cuda
