// How a span pair is solved, on the CPU and on NVIDIA GPUs alike: over-relaxed Sinkhorn updates
// until the marginal error is small enough, or until a dual value shows that the pair is nearest
// to neither of its spans. What holds the numbers is an engine's business. The rules are derived in
// docs/method.md; src/shear_ops/triton has them a second time.
//
// An engine has a pair of n x m costs C and its plan u_i K_ij v_j, with K = 2^(F_i + G_j - C_ij):
//   reset()            u = v = 1
//   exponentiate()     K of the potentials F and G
//   iterate(level, stop, tol, it)  updates (rows, then columns), counted by `it`, until it == stop
//                      or earlier; returns the L1 error of the row marginal before the last update
//   drifted()          a scaling left [2^-kDriftBits, 2^kDriftBits]
//   absorb()           F += log2 u, G += log2 v, u = v = 1
//   dual_value()       of feasible potentials: a certified lower bound on W1
//   corrected_value()  <P, C> + <f, a - P 1> of the plan with exact columns, and its residual
//   entropy()          eps log(max(n, m));  eps()
#pragma once
#include "spans.h"

namespace shear {

constexpr float kFar = 1e30f;  // cost of padding
constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;
// A scaling is updated by y^-omega, y its marginal over the wanted one, omega = 2 - 2^-level.
constexpr int kTopLevel = 5;
constexpr unsigned kTestEvery = 4;     // iterations from one choice of the level to the next
constexpr float kRetreatRatio = 1.5f;  // growth of the residual that asks for a lower level
constexpr unsigned kFirstCheck = 4;    // iterations before the first dual value; then twice as many
static_assert((kFirstCheck & (kFirstCheck - 1)) == 0, "checks are at powers of two");
constexpr unsigned kFinishAgain = 4;     // iterations after a value that was not accurate enough
constexpr float kToleranceShare = 0.2f;  // of the distance that tol's share of the entropy may be
// One over-relaxed update may stretch a scaling 5-fold in log: 2^100 is still a float.
constexpr int kDriftBits = 20;
constexpr float kDriftHigh = 1 << kDriftBits, kDriftLow = 1 / kDriftHigh;

#ifdef __CUDACC__
SHEAR_HOST_DEVICE float square_root(float a) { return sqrtf(a); }
// A NaN b leaves a: no bound is lost to a value that overflowed.
SHEAR_HOST_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
#else
SHEAR_HOST_DEVICE float square_root(float a) { return __builtin_sqrtf(a); }
SHEAR_HOST_DEVICE float larger(float a, float b) { return a < b ? b : a; }
#endif

SHEAR_HOST_DEVICE float omega_of(int level) { return 2.f - 1.f / static_cast<float>(1 << level); }

// Young's theory of over-relaxation, valid near the solution: from the ratio by which the residual
// fell over kTestEvery iterations follow the rate of plain updates and the best omega. A residual
// that grew much asks for a smaller one; a little is the oscillation of over-relaxed updates.
SHEAR_HOST_DEVICE int next_level(int level, float ratio) {
  static_assert(kTestEvery == 4, "the fourth root below");
  if (!(ratio < kRetreatRatio)) return level > 0 ? level - 1 : 0;
  if (ratio >= 1.f) return level;
  const float over = omega_of(level) - 1.f;
  const float rate = larger(square_root(square_root(ratio)), over);  // per iteration
  const float plain = (rate + over) * (rate + over) / (rate * (1.f + over) * (1.f + over));
  const float best = 2.f / (1.f + square_root(plain < 1.f ? 1.f - plain : 0.f));
  int next = 0;
  while (next < kTopLevel && next <= level && omega_of(next + 1) <= best) ++next;
  return next;
}

// The residual that a value may have. Its error is the plan's error times the entropy term
// eps log(n): where that is large against the distance, a residual of tol is not enough.
SHEAR_HOST_DEVICE float tolerance(float tol, float entropy, float eps, float distance) {
  const float scale = kToleranceShare * larger(distance, eps);
  return scale < entropy ? tol * (scale / entropy) : tol;
}

struct Solution {
  float distance;  // the bound that exceeded both known minima, if abandoned
  float residual;  // L1 error of the row marginal
  int iterations;
  bool abandoned;
};

// bound: the largest certified lower bound on W1 known so far; beaten(bound): whether the pair
// cannot win any more.
template <typename Engine, typename Beaten>
SHEAR_HOST_DEVICE Solution solve_pair(Engine& engine, unsigned n_iters, float tol, float bound,
                                      const Beaten& beaten) {
  if (beaten(bound)) return {bound, 0.f, 0, true};
  engine.reset();
  int level = 0;  // over-relaxed from the start can diverge
  unsigned it = 0, finish_from = 1;
  float before = __builtin_huge_valf();
  bool rebuild = true, finish = false;
  for (;;) {
    if (rebuild) {
      engine.exponentiate();
      rebuild = false;
    }
    if (finish || (it >= kFirstCheck && (it & (it - 1)) == 0)) {
      bound = larger(bound, engine.dual_value());
      if (beaten(bound)) return {bound, 0.f, 0, true};
      if (finish) {
        Solution out = engine.corrected_value();
        out.distance = larger(bound, out.distance);
        out.iterations = static_cast<int>(it);
        if (it >= n_iters ||
            out.residual <= tolerance(tol, engine.entropy(), engine.eps(), out.distance))
          return out;
        finish_from = it + kFinishAgain;
      }
    }
    const unsigned next_test = (it / kTestEvery + 1) * kTestEvery;
    const unsigned stop = it == 0 ? 1 : (n_iters < next_test ? n_iters : next_test);
    const float residual = engine.iterate(level, stop, tol, it);
    finish = it >= n_iters || (residual <= tol && it >= finish_from);
    if (it == 1) level = 1;
    if (it % kTestEvery == 0) {
      level = next_level(level, residual / before);
      before = residual;
    }
    if (!(residual < __builtin_huge_valf())) {  // diverged: back to the last absorbed potentials
      level = 0;
      engine.reset();
      rebuild = true;
    } else if (engine.drifted()) {
      engine.absorb();
      rebuild = true;
    }
  }
}

}  // namespace shear
