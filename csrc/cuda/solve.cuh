// What every solver does with a span pair, whatever holds its numbers: csrc/cpu/sinkhorn.cpp on a
// GPU. An engine has the pair's costs C, the plan u_i K_ij v_j with K = 2^(F_i + G_j - C_ij), and
// the CTA's threads to work on them.
#pragma once
#include "cuda/pairs.cuh"

namespace shear::cuda {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kFar = 1e30f;  // cost of padding
constexpr float kLog2e = 1.44269504f;
constexpr int kTestEvery = 4;  // iterations from one choice of omega to the next
constexpr int kTopLevel = 5;
// Absorb a scaling beyond: one over-relaxed update may stretch it 5-fold in log. The rows' scalings
// follow from the columns': K has a 1 in every row.
constexpr float kDriftHigh = 0x1p20f, kDriftLow = 0x1p-20f;

// iterations of a pair: not yet solved, and not yet solved but in the queue of seeds
constexpr int32_t kUntried = -1, kSeed = -2;
enum Count : int { kTotal, kBounded, kAbandoned, kSolved, kStopped, kCounts };

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
  unsigned long long* counts;
  float* scratch;  // scratch_floats per CTA
  int64_t scratch_floats;
};

struct Outcome {
  float distance;
  float residual;  // L1 error of the row marginal
  int iterations;
  bool abandoned;
};

// A scaling is updated by y^-omega, y its marginal over the wanted one.
__device__ __forceinline__ float omega_of(int level) {
  return 2.f - 1.f / static_cast<float>(1 << level);
}

// Young's theory of over-relaxation, valid near the solution: from the rate at which the residual
// falls with this omega follow the rate of plain updates and the best omega. A residual that grew
// much asks for a smaller one; a little is the oscillation of over-relaxed updates.
__device__ inline int next_level(int level, float ratio) {
  if (!(ratio < 1.5f)) return level > 0 ? level - 1 : 0;
  if (ratio >= 1.f) return level;
  const float over = omega_of(level) - 1.f;
  const float rate = fmaxf(sqrtf(sqrtf(ratio)), over);  // per iteration
  const float plain = (rate + over) * (rate + over) / (rate * (1.f + over) * (1.f + over));
  const float best = 2.f / (1.f + sqrtf(plain < 1.f ? 1.f - plain : 0.f));
  int next = 0;
  while (next < kTopLevel && next <= level && omega_of(next + 1) <= best) ++next;
  return next;
}

// The value's error is the plan's error times its entropy term, eps * log(n): where that is large
// against the distance, a residual of tol is not enough.
__device__ inline float tolerance(int longest, float eps, float tol, float distance) {
  const float entropy = eps * logf(static_cast<float>(longest));
  const float scale = 0.2f * fmaxf(distance, eps);
  return scale < entropy ? tol * (scale / entropy) : tol;
}

// What a CTA shares beside its engine's numbers. Kept here, not in registers, of which an engine
// needs all.
struct Desk {
  int pair;  // index; -1: no more
  int row_span, col_span;
  float known;
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

template <typename Engine>
__device__ __forceinline__ Outcome solve_pair(Engine& engine, const SolveArgs& args, float bound,
                                              Desk* desk) {
  const auto n_iters = static_cast<unsigned>(args.n_iters);
  if (beaten(args, bound, desk)) return {bound, 0.f, 0, true};
  engine.reset();
  int level = 0;
  unsigned it = 0, finish_from = 1;
  float before = kInfinity;
  bool rebuild = true, finish = false;
  for (;;) {
    if (rebuild) {
      engine.exponentiate();
      rebuild = false;
    }
    if (finish || (it >= 4 && (it & (it - 1)) == 0)) {  // dual checks at 4, 8, 16, ...
      bound = fmaxf(bound, engine.dual_value());
      if (beaten(args, bound, desk)) return {bound, 0.f, 0, true};
      if (finish) {
        Outcome out = engine.corrected_value();
        out.distance = fmaxf(bound, out.distance);
        out.iterations = static_cast<int>(it);
        if (it >= n_iters ||
            out.residual <= tolerance(engine.longest(), engine.eps(), args.tol, out.distance))
          return out;
        finish_from = it + 4;
      }
    }
    const unsigned stop = it == 0 ? 1 : min(n_iters, (it / kTestEvery + 1) * kTestEvery);
    const float residual = engine.iterate(omega_of(level), stop, args.tol, it);
    finish = it >= n_iters || (residual <= args.tol && it >= finish_from);
    if (it == 1) level = 1;  // over-relaxed from the start can diverge
    if (it % kTestEvery == 0) {
      level = next_level(level, residual / before);
      before = residual;
    }
    if (!(residual < kInfinity)) {  // diverged: back to the last absorbed potentials
      level = 0;
      engine.reset();
      rebuild = true;
    } else if (engine.drifted()) {
      engine.absorb();
      rebuild = true;
    }
  }
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

__device__ inline void record(const SolveArgs& args, const Desk& desk, const Outcome& out) {
  args.value[desk.pair] = out.distance;
  args.residual[desk.pair] = out.residual;
  args.iterations[desk.pair] = out.iterations;
  atomicAdd(args.counts + (out.abandoned ? kAbandoned : kSolved), 1ull);
  if (out.abandoned) return;
  if (out.iterations >= args.n_iters) atomicAdd(args.counts + kStopped, 1ull);
  if (!args.best) return;
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
    const float bound = fmaxf(args.value[p], engine.load(pair));
    const Outcome out = solve_pair(engine, args, bound, desk);
    __syncthreads();  // every thread has read what belongs to this pair
    if (threadIdx.x == 0) record(args, *desk, out);
  }
}

}  // namespace shear::cuda
