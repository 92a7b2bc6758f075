// The queue of span pairs on a GPU: a CTA takes one after the other and solves it by csrc/solve.h,
// whose engines are in sinkhorn.cuh and sinkhorn_wide.cuh.
#pragma once
#include "cuda/constants.cuh"
#include "cuda/pairs.cuh"
#include "solve.h"

namespace shear::cuda {

struct SolveArgs {
  PairTable table;
  const uint32_t* order;  // the queue; null: all pairs
  const uint32_t* queued;
  int64_t pairs;
  uint32_t* next;  // how far the queue is
  int32_t n_iters;
  float tol;
  bool prune;
  uint32_t* best;  // per span: float bits of the smallest distance so far
  float* value;  // per pair: bound, then span distance; a skipped or abandoned one keeps its bound
  float* residual;
  int32_t* iterations;
  unsigned long long *counts, *stopped;
  float* scratch;  // scratch_floats per CTA
  int64_t scratch_floats;
};

// What a CTA shares beside its engine's numbers. Kept here, not in registers, of which an engine
// needs all.
struct Desk {
  int pair;  // index; -1: no more
  int row_span, col_span;
  float known;
  Progress progress;
};

// The larger of the distances known for both spans. A pair whose bound is strictly above is nearest
// to neither: ties are computed, so that the result does not depend on the order of the pairs.
__device__ inline float known_distance(const SolveArgs& args, int row_span, int col_span) {
  const volatile uint32_t* best = args.best;
  return fmaxf(__uint_as_float(best[row_span]), __uint_as_float(best[col_span]));
}
// One answer for the whole CTA: other CTAs write meanwhile.
__device__ inline bool beaten(const SolveArgs& args, float bound, Desk* desk) {
  if (!args.prune) return false;
  if (threadIdx.x == 0) desk->known = known_distance(args, desk->row_span, desk->col_span);
  __syncthreads();
  const float known = desk->known;
  __syncthreads();
  return bound > known;
}

// 0 where a scaling has no logarithm: any potentials will do.
__device__ __forceinline__ float finite_log2(float x) {
  const float y = fast_log2(x);
  return fabsf(y) < kInfinity ? y : 0.f;
}

// The next pair of the queue that has to be solved, -1 at its end. One thread asks.
__device__ inline int next_pair(const SolveArgs& args) {
  const int64_t queued = args.order ? static_cast<int64_t>(*args.queued) : args.pairs;
  for (;;) {
    const uint32_t at = atomicAdd(args.next, 1u);
    if (at >= queued) return -1;
    const uint32_t p = args.order ? args.order[at] : at;
    if (args.iterations[p] >= 0) continue;
    if (args.prune) {
      const Pair pair = pair_at(args.table, p);
      if (args.value[p] > known_distance(args, pair.row_span, pair.col_span)) {
        args.iterations[p] = 0;
        atomicAdd(args.counts + kBounded, 1ull);
        continue;
      }
    }
    return static_cast<int>(p);
  }
}

__device__ inline void record(const SolveArgs& args, const Desk& desk, const Solution& out) {
  args.value[desk.pair] = out.distance;
  args.residual[desk.pair] = out.residual;
  args.iterations[desk.pair] = out.iterations;
  atomicAdd(args.counts + (out.abandoned ? kAbandoned : kSolved), 1ull);
  if (out.abandoned) return;
  const bool stopped = out.iterations >= args.n_iters;
  if (stopped) atomicAdd(args.stopped, 1ull);
  if (!args.best || stopped) return;  // what has not converged is no upper bound: it prunes nothing
  // distances are >= 0: their bits have their order
  atomicMin(args.best + desk.row_span, __float_as_uint(out.distance));
  atomicMin(args.best + desk.col_span, __float_as_uint(out.distance));
}

template <typename Engine>
__device__ __forceinline__ void solve_queue(Engine& engine, const SolveArgs& args, Desk* desk) {
  for (;;) {
    if (threadIdx.x == 0) desk->pair = next_pair(args);
    __syncthreads();
    const int p = desk->pair;
    if (p < 0) return;
    const Pair pair = pair_at(args.table, p);
    if (threadIdx.x == 0) {
      desk->row_span = pair.row_span;
      desk->col_span = pair.col_span;
    }
    desk->progress.bound = larger(args.value[p], engine.load(pair));
    const Solution out =
        solve_pair(engine, static_cast<unsigned>(args.n_iters), args.tol, desk->progress,
                   [&](float reached) { return beaten(args, reached, desk); });
    __syncthreads();  // every thread has read what belongs to this pair
    if (threadIdx.x == 0) record(args, *desk, out);
  }
}

}  // namespace shear::cuda
