// How a span pair is solved, on the CPU and on NVIDIA GPUs alike: over-relaxed Sinkhorn updates
// until the marginal error is small enough, or until a dual value shows that the pair is nearest
// to neither of its spans. What holds the numbers is an engine's business. The rules are derived in
// docs/method.md; src/shear_ops/triton has them a second time.
//
// An engine has a pair of n x m costs C and its plan u_i K_ij v_j, with
// K = 2^((F_i + G_j - C_ij) / heat) and C, F, G in units of eps ln 2:
//   reset()            u = v = 1
//   range()            largest cost less the smallest F as the costs were loaded
//   heat(), set_heat() it stays between exponentiate() and absorb()
//   exponentiate()     K of the potentials F and G
//   iterate(level, stop, tol, it)  updates (rows, then columns), counted by `it`, until it == stop
//                      or earlier; returns the L1 error of the row marginal before the last update
//   drifted()          a scaling left [2^-kDriftBits, 2^kDriftBits]
//   absorb()           F += heat log2 u, G += heat log2 v, u = v = 1
//   dual_value()       of feasible potentials: a certified lower bound on W1
//   corrected_value()  at heat 1: <P, C> + <f, a - P 1> of the plan with exact columns, residual
//   rows(), cols()     n and m
//   eps(), entropy()   entropy_term(eps, log(max(n, m)))
#pragma once
#include "spans.h"

namespace shear {

constexpr float kFar = 1e30f;  // cost of padding, in units of eps ln 2
// Of the problems of sinkhorn(): costs further from 0 than that are refused. What is beyond is left
// to padding, to sums over rows, and to costs in units of eps ln 2.
constexpr double kMostCost = 1e33, kMostCostOverReg = 1e28;
SHEAR_HOST_DEVICE float most_cost(double reg) {
  const double most = kMostCostOverReg * reg;
  return static_cast<float>(most < kMostCost ? most : kMostCost);
}
constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;
// A scaling is updated by y^-omega, y its marginal over the wanted one, omega = 2 - 2^-level.
constexpr int kTopLevel = 5;
// The level before the first iteration at a heat: over-relaxed from the start can diverge.
constexpr int kFresh = -1;
constexpr unsigned kTestEvery = 4;     // iterations from one choice of the level to the next
constexpr float kRetreatRatio = 1.5f;  // growth of the residual that asks for a lower level
constexpr unsigned kFirstCheck = 4;    // iterations before the first dual value; then twice as many
static_assert((kFirstCheck & (kFirstCheck - 1)) == 0, "checks are at powers of two");
constexpr unsigned kFinishAgain = 4;     // iterations after a value that was not accurate enough
constexpr float kToleranceShare = 0.2f;  // of the distance that tol's share of the entropy may be
// Potentials travel no further than about eps log(n) in an iteration. Where costs range over more
// than kHotRange (times eps ln 2), the pair is solved at eps times a power of kCooling first.
constexpr float kHotRange = 256.f, kCooling = 4.f;
// Between so few tokens potentials may have several entropy terms to go although next to no mass is
// missing: found by search, see docs/method.md.
constexpr int kFewTokens = 32;
constexpr float kFewTravel = 3.f;        // in entropy terms
constexpr float kLeastResidual = 2e-5f;  // that is asked for there: float32 sums reach it
// Scalings beyond are absorbed. An over-relaxed update may stretch one several-fold in log: what
// leaves float32 all the same counts as diverged.
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

// What the error of a value is, times the residual: how far potentials may be off. log(n) alone is
// too little for pairs of few tokens.
constexpr float kEntropyOffset = 2.f;
SHEAR_HOST_DEVICE float entropy_term(float eps, float log_longest) {
  return eps * (kEntropyOffset + log_longest);
}

// The residual that a value may have: tol, or less where the entropy term is large against the
// distance.
SHEAR_HOST_DEVICE float tolerance(float tol, float entropy, float eps, float distance) {
  const float scale = kToleranceShare * larger(distance, eps);
  return scale < entropy ? tol * (scale / entropy) : tol;
}

// Whether mass that a plan still has to move can be less than a residual of tol shows: groups of
// whole tokens differ in mass by a multiple of 1 / lcm(n, m), half of the L1 error they cause. Then
// potentials may have any way to go, although next to nothing is missing.
SHEAR_HOST_DEVICE bool may_hide(int n, int m, float tol) {
  unsigned a = static_cast<unsigned>(n), b = static_cast<unsigned>(m);
  while (b > 0) {
    const unsigned rest = a % b;
    a = b;
    b = rest;
  }
  return tol * static_cast<float>(n) * (static_cast<float>(m) / static_cast<float>(a)) > 2.f;
}

// The heat at which a pair is begun.
SHEAR_HOST_DEVICE float first_heat(float range) {
  float heat = 1.f;
  while (heat * kHotRange < range) heat *= kCooling;
  return heat;
}

// Whether a pair is nearest to neither of its spans, of which these distances are known. Strictly:
// ties are computed, so that the result does not depend on the order of the pairs.
SHEAR_HOST_DEVICE bool cannot_win(float bound, float best_row, float best_col) {
  return bound > best_row && bound > best_col;
}

struct Solution {
  float distance;  // the bound that exceeded both known minima, if abandoned
  float residual;  // L1 error of the row marginal
  int iterations;
  bool abandoned;
};

// How far the potentials of a plan at heat 1 may be from their limit.
template <typename Engine>
SHEAR_HOST_DEVICE float travel(const Engine& engine, float tol) {
  if (!may_hide(engine.rows(), engine.cols(), tol)) {
    const int more = engine.rows() > engine.cols() ? engine.rows() : engine.cols();
    return more <= kFewTokens ? kFewTravel * engine.entropy() : engine.entropy();
  }
  if (first_heat(engine.range()) > 1.f) return kCooling * engine.entropy();
  return larger(engine.entropy(), engine.range() * kLn2 * engine.eps());
}

// The residual that ends the iterations at the engine's heat: above 1 the plan only has to be good
// enough to begin the next heat. bound stands for the distance.
template <typename Engine>
SHEAR_HOST_DEVICE float residual_at_heat(const Engine& engine, float tol, float bound) {
  if (!(engine.heat() > 1.f)) return tol;
  return larger(kLeastResidual,
                tolerance(tol, engine.heat() / kCooling * engine.entropy(), engine.eps(), bound));
}

// What is seldom looked at: a GPU has it in shared memory, since a tile takes all registers. All
// threads write the same, with a barrier between a write and what was read before it.
struct Progress {
  float bound;   // the largest certified lower bound on W1 known so far
  float travel;  // how far the potentials of a plan at heat 1 may be from their limit
  unsigned finish_from;
};

// progress.bound is given; beaten(bound): whether the pair cannot win any more.
template <typename Engine, typename Beaten>
SHEAR_HOST_DEVICE Solution solve_pair(Engine& engine, unsigned n_iters, float tol,
                                      Progress& progress, const Beaten& beaten) {
  if (beaten(progress.bound)) return {progress.bound, 0.f, 0, true};
  progress.travel = travel(engine, tol);
  progress.finish_from = 1;
  engine.set_heat(first_heat(engine.range()));
  engine.reset();
  int level = kFresh;
  unsigned it = 0;
  float before = __builtin_huge_valf();
  bool rebuild = true, finish = false;
  for (;;) {
    if (rebuild) {
      engine.exponentiate();
      rebuild = false;
    }
    if (finish || (it >= kFirstCheck && (it & (it - 1)) == 0)) {
      // potentials are rounded in units of eps: no bound where costs range over less
      const float dual = engine.dual_value();
      if (engine.range() >= 1.f) progress.bound = larger(progress.bound, dual);
      if (beaten(progress.bound)) return {progress.bound, 0.f, 0, true};
      if (finish) {
        Solution out = engine.corrected_value();
        // Stopped at a heat, nothing may be left of the plan at 1: all mass is missing, and a value
        // that is no number has not converged.
        const bool known =
            out.residual < 2.f && out.distance < __builtin_huge_valf() && !(engine.heat() > 1.f);
        if (!known) out.residual = 2.f;
        out.distance = known ? larger(progress.bound, out.distance) : progress.bound;
        out.iterations = static_cast<int>(it);
        if (it >= n_iters ||
            out.residual <= tolerance(tol, progress.travel, engine.eps(), out.distance))
          return out;
        progress.finish_from = it + kFinishAgain;
      }
    }
    const unsigned next_test = (it / kTestEvery + 1) * kTestEvery;
    const unsigned stop = level == kFresh ? it + 1 : (n_iters < next_test ? n_iters : next_test);
    const float wanted = residual_at_heat(engine, tol, progress.bound);
    const float residual = engine.iterate(level == kFresh ? 0 : level, stop, wanted, it);
    const bool last = it >= n_iters, hot = engine.heat() > 1.f;
    finish = last || (!hot && residual <= tol && it >= progress.finish_from);
    if (level == kFresh) level = 1;
    if (it % kTestEvery == 0) {
      level = next_level(level, residual / before);
      before = residual;
    }
    if (!(residual < __builtin_huge_valf())) {  // diverged: back to the last absorbed potentials
      level = 0;
      engine.reset();
      rebuild = true;
      continue;
    }
    const bool cool = hot && (last || residual <= wanted);
    // read before the barriers of absorb(): a GPU's threads share the engine's heat
    const float next_heat = last ? 1.f : engine.heat() / kCooling;
    if (engine.drifted() || cool) {
      engine.absorb();
      rebuild = true;
    }
    if (cool) {
      engine.set_heat(next_heat);
      level = kFresh;
      before = __builtin_huge_valf();
    }
  }
}

}  // namespace shear
