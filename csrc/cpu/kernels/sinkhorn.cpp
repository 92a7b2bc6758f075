// One span pair: entropic optimal transport between two uniform measures. The engine of
// csrc/solve.h on a CPU.
//
// The plan is u_i K_ij v_j with K = 2^(F_i + G_j - C_ij) and all of C, F, G in units of eps * ln 2.
// An iteration is multiply-adds over K in one sweep; F and G absorb log2(u) and log2(v) when those
// drift, and only then are exponentials taken again. The plan is scaled so that every row has mass
// 1 and every column n/m.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/row_passes.h"
#include "cpu/kernels/simd.h"
#include "solve.h"

namespace shear::cpu::SHEAR_ISA {
namespace {

constexpr int64_t kAhead = 16;                    // rows of token costs that are fetched in advance
constexpr int64_t kEntriesPerQuestion = 1 << 20;  // of K, some 0.1 ms of iterations

class Engine {
 public:
  Engine(const PairInput& in, float* scratch)
      : in_(in),
        n_(in.n),
        m_(in.m),
        at_(sinkhorn_scratch(n_, m_, kWidth)),
        rows_(at_.rows),
        ld_(at_.columns),
        cost_(scratch + at_.cost),
        k_(scratch + at_.k),
        f_(scratch + at_.f),
        u_(scratch + at_.u),
        absent_row_(scratch + at_.absent_row),
        potential_(scratch + at_.potential),
        g_(scratch + at_.g),
        v_(scratch + at_.v),
        w_(scratch + at_.w),
        absent_col_(scratch + at_.absent_col) {
    // what keeps the scalings of padding at 1: its marginals count as right
    for (int64_t i = 0; i < at_.slots; ++i) {
      f_[i] = 0.f;
      absent_row_[i] = i < n_ ? 0.f : 1.f;
    }
    for (int64_t j = 0; j < ld_; ++j) absent_col_[j] = j < m_ ? 0.f : row_mass();
  }

  int rows() const { return static_cast<int>(n_); }
  int cols() const { return static_cast<int>(m_); }
  float eps() const { return in_.eps; }
  float entropy() const {
    const auto longest = static_cast<float>(n_ > m_ ? n_ : m_);
    return entropy_term(in_.eps, kLn2 * log2(broadcast(longest))[0]);
  }
  float range() const { return range_; }
  float heat() const { return heat_; }
  void set_heat(float heat) { heat_ = heat; }
  bool drifted() const { return drifted_; }

  // Copies the costs in units of eps * ln 2 and sets the hard potentials F_i = min_j C_ij, G_j =
  // min_i (C_ij - F_i), for which every K_ij <= 1 with a 1 in every row and column. Returns their
  // dual value, a bound.
  float load_costs() {
    const float scale = kLog2e / in_.eps;
    const Vec far = broadcast(kFar);
    const int64_t ld = ld_, whole = m_ / kWidth * kWidth;
    const int rest = static_cast<int>(m_ - whole);
    float* const g = g_;
    Vec highest = -far;
    float least = kFar;  // F
    for (int64_t j = 0; j < ld; j += kWidth) store(g + j, far);
    VecI lane;
    for (int l = 0; l < kWidth; ++l) lane[l] = l;
    const VecI present = lane < rest;
    for (int64_t i = 0; i < rows_; i += kGroup) {
      float* panel = cost_ + i * ld;
      const int count = n_ - i < kGroup ? static_cast<int>(n_ - i) : kGroup;
      const float* row[kGroup];  // one that is not there stands for itself below
      Vec lowest[kGroup];
      for (int r = 0; r < kGroup; ++r) {
        row[r] = in_.cost + (i + (r < count ? r : 0)) * in_.ld;
        lowest[r] = far;
        if (i + r + kAhead < n_)
          for (int64_t j = 0; j < m_; j += kCostPad)
            __builtin_prefetch(row[r] + kAhead * in_.ld + j);
      }
      float* to = panel;
      for (int64_t j = 0; j < whole; j += kWidth)
#pragma GCC unroll 8
        for (int r = 0; r < kGroup; ++r, to += kWidth) {
          const Vec x = load(row[r] + j) * scale;
          store(to, x);
          lowest[r] = min(lowest[r], x);
          highest = max(highest, x);
        }
      for (int r = 0; rest > 0 && r < kGroup; ++r, to += kWidth) {
        const Vec y = load_rest(row[r], m_, rest, 0.f) * scale, x = present ? y : far;
        store(to, x);
        lowest[r] = min(lowest[r], x);
        highest = max(highest, present ? y : -far);
      }
      Group f = row_minima(lowest);
      for (int r = 0; r < kGroup; ++r) {
        if (r < count) {
          least = f[r] < least ? f[r] : least;
          continue;
        }
        f[r] = 0.f;
        for (int64_t j = 0; j < ld; j += kWidth) store(panel + j * kGroup + r * kWidth, far);
      }
      store_group(f_ + i, f);
      for (int64_t j = 0; j < ld; j += kWidth) {
        Vec lowest = load(g + j);
#pragma GCC unroll 8
        for (int r = 0; r < kGroup; ++r)
          lowest = min(lowest, load(panel + j * kGroup + r * kWidth) - f_[i + r]);
        store(g + j, lowest);
      }
    }
    for (int64_t j = m_; j < ld_; ++j) g_[j] = 0.f;
    range_ = -min(-highest) - least;
    return dual_value(total(f_, rows_), total(g_, ld_));
  }

  void reset() {
    for (int64_t i = 0; i < rows_; i += kWidth) store(u_ + i, broadcast(1.f));
    for (int64_t j = 0; j < ld_; j += kWidth) store(v_ + j, broadcast(1.f));
  }

  void exponentiate() {
    heat_ == 1.f ? exponentiate_at<false>(1.f) : exponentiate_at<true>(1.f / heat_);
  }

  void absorb() {
    for (int64_t i = 0; i < rows_; i += kWidth)
      store(f_ + i, load(f_ + i) + heat_ * log2(load(u_ + i)));
    for (int64_t j = 0; j < ld_; j += kWidth)
      store(g_ + j, load(g_ + j) + heat_ * log2(load(v_ + j)));
    reset();
  }

  // One iteration.
  float iterate(int level, unsigned, float, unsigned& it) {
    static_assert(kTopLevel == 5, "a case per level");
    ++it;
    unasked_ += rows_ * ld_;
    if (unasked_ >= kEntriesPerQuestion && in_.goes_on) {
      unasked_ = 0;
      if (!in_.goes_on(in_.asked)) it = ~0u;  // beyond any n_iters
    }
    switch (level) {
      case 0:
        return sweep<0>();
      case 1:
        return sweep<1>();
      case 2:
        return sweep<2>();
      case 3:
        return sweep<3>();
      case 4:
        return sweep<4>();
      default:
        return sweep<kTopLevel>();
    }
  }

  // Potentials f_i = F_i + heat log2 u_i and g_j = min_i (C_ij - f_i) = G_j - heat log2 max_i (K_ij
  // u_i) are feasible at any iteration: their mean is a certified lower bound on W1, at the price
  // of one maximum pass.
  float dual_value() {
    for (int64_t j = 0; j < ld_; j += kWidth) store(w_ + j, load(absent_col_ + j));
    for (int64_t i = 0; i < rows_; i += kGroup) max_scaled(k_ + i * ld_, u_ + i, w_, ld_);
    VecD f = {}, g = {};
    for (int64_t i = 0; i < rows_; i += kWidth)
      f += widen(load(f_ + i) + heat_ * log2(load(u_ + i)));
    for (int64_t j = 0; j < ld_; j += kWidth) {
      const Vec x = load(g_ + j) - heat_ * log2(load(w_ + j));
      g += widen(j + kWidth > m_ ? keep_first(x, static_cast<int>(m_ - j), 0.f) : x);
    }
    return dual_value(sum(f), sum(g));
  }

  // One plain column update makes the columns exact; then <P, C> + <f, a - P 1>. The mass is right,
  // so any constant may be taken off f: the first entry, against cancellation.
  Solution corrected_value() {
    for (int64_t j = 0; j < ld_; j += kWidth) store(w_ + j, load(absent_col_ + j));
    for (int64_t i = 0; i < rows_; i += kGroup) add_scaled(k_ + i * ld_, u_ + i, w_, ld_);
    for (int64_t j = 0; j < ld_; j += kWidth) store(v_ + j, row_mass() / load(w_ + j));
    for (int64_t j = m_; j < ld_; ++j) v_[j] = 0.f;  // padding must not be paid for
    for (int64_t i = 0; i < rows_; i += kWidth)
      store(potential_ + i, load(f_ + i) + log2(load(u_ + i)));
    double value = 0, error = 0;
    for (int64_t i = 0; i < rows_; i += 4) {
      const int64_t at = i / kGroup * kGroup * ld_ + i % kGroup * kWidth;
      const float *k = k_ + at, *cost = cost_ + at, *v = v_, *end = v + ld_;
      Vec sums[kGroup] = {}, *const mass = sums, *const paid = sums + 4;
      for (; v < end; v += kWidth, k += kGroup * kWidth, cost += kGroup * kWidth) {
        const Vec x = load(v);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const Vec p = load(k + r * kWidth) * x;
          mass[r] += p;
          paid[r] += p * load(cost + r * kWidth);
        }
      }
      const Vec4 present = 1.f - load4(absent_row_ + i), u = present * load4(u_ + i);
      const Group all = row_sums(sums);
      const Vec4 spent = u * __builtin_shufflevector(all, all, 4, 5, 6, 7);
      const Vec4 missing = present - u * __builtin_shufflevector(all, all, 0, 1, 2, 3);
      const Vec4 owed = missing * (load4(potential_ + i) - potential_[0]);
      for (int r = 0; r < 4; ++r) {
        value += static_cast<double>(spent[r]) + static_cast<double>(owed[r]);
        error += static_cast<double>(missing[r] < 0.f ? -missing[r] : missing[r]);
      }
    }
    for (int64_t j = m_; j < ld_; ++j) v_[j] = 1.f;
    const auto rows = static_cast<double>(n_);
    return {to_cost(value / rows), static_cast<float>(error / rows), 0, false};
  }

 private:
  // Mass that a column gets if every row has mass 1.
  float row_mass() const { return static_cast<float>(n_) / static_cast<float>(m_); }
  float to_cost(double scaled) const { return static_cast<float>(scaled * in_.eps / kLog2e); }
  float dual_value(double sum_f, double sum_g) const {
    return to_cost(sum_f / static_cast<double>(n_) + sum_g / static_cast<double>(m_));
  }

  template <bool kHot>
  void exponentiate_at(float cool) {
    const int64_t ld = ld_;
    for (int64_t i = 0; i < rows_; i += kGroup) {
      const float *cost = cost_ + i * ld, *g = g_;
      float* k = k_ + i * ld;
      const Group f = load_group(f_ + i);
      for (int64_t j = 0; j < ld; j += kWidth, g += kWidth)
#pragma GCC unroll 8
        for (int r = 0; r < kGroup; ++r, cost += kWidth, k += kWidth) {
          const Vec x = (f[r] - load(cost)) + load(g);
          store(k, exp2(kHot ? x * cool : x));
        }
    }
  }

  // One iteration: rows, then columns, in one sweep of K. Returns the L1 error of the row marginal
  // before the update. The scalings of a group of rows take a chain of dependent operations, which
  // runs while the next group is multiplied with v.
  template <int kLevel>
  float sweep() {
    const int64_t rows = rows_, step = kGroup * ld_;
    const float *k = k_, *absent = absent_row_;
    float* const scaling = u_;
    for (int64_t j = 0; j < ld_; j += kWidth) store(w_ + j, load(absent_col_ + j));
    Group error = {}, low = load_group(scaling), high = low, sums = multiply(k, v_, ld_);
    for (int64_t i = 0; i < rows; i += kGroup, k += step) {
      const Group old = load_group(scaling + i), y = old * sums + load_group(absent + i);
      const Group off = y - 1.f;
      error += off < 0.f ? -off : off;
      const Group u = relax<kLevel>(old, y);
      store_group(scaling + i, u);
      low = u < low ? u : low;
      high = u > high ? u : high;
      if (i + kGroup < rows) sums = multiply(k + step, v_, ld_);
      add_scaled(k, scaling + i, w_, ld_);
    }

    const float column = 1.f / row_mass();
    Vec least = broadcast(1.f), most = least;
    for (int64_t j = 0; j < ld_; j += kWidth) {
      const Vec old = load(v_ + j), v = relax<kLevel>(old, load(w_ + j) * old * column);
      store(v_ + j, v);
      least = min(least, v);
      most = max(most, v);
    }
    float lowest = min(least), highest = -min(-most), total = 0.f;
    for (int r = 0; r < kGroup; ++r) {
      lowest = low[r] < lowest ? low[r] : lowest;
      highest = high[r] > highest ? high[r] : highest;
      total += error[r];
    }
    drifted_ = !(lowest > kDriftLow && highest < kDriftHigh);
    return total / static_cast<float>(n_);
  }

  const PairInput& in_;
  const int64_t n_, m_;
  const SinkhornScratch at_;
  const int64_t rows_, ld_;  // padded
  float *const cost_,
      *const k_, *const f_, *const u_, *const absent_row_,
                                           *const potential_,
                                               *const g_, *const v_, *const w_, *const absent_col_;
  float range_ = 0.f, heat_ = 1.f;
  int64_t unasked_ = 0;  // entries of K since goes_on was asked
  bool drifted_ = false;
};

bool beaten(const PairInput& in, float bound) {
  if (!in.best_row) return false;
  const uint32_t bits[2] = {__atomic_load_n(in.best_row, __ATOMIC_RELAXED),
                            __atomic_load_n(in.best_col, __ATOMIC_RELAXED)};
  float best[2];
  __builtin_memcpy(best, bits, sizeof best);
  return cannot_win(bound, best[0], best[1]);
}

}  // namespace

Solution sinkhorn(const PairInput& in, float* scratch) {
  Engine engine(in, scratch);
  Progress progress{.bound = larger(in.bound, engine.load_costs())};
  return solve_pair(engine, static_cast<unsigned>(in.n_iters), in.tol, progress,
                    [&](float reached) { return beaten(in, reached); });
}

}  // namespace shear::cpu::SHEAR_ISA
