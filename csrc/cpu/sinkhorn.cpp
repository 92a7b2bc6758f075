// One span pair: entropic optimal transport between two uniform measures.
//
// The plan is u_i K_ij v_j with K = 2^(F_i + G_j - C_ij) and all of C, F, G in units of eps * ln 2.
// An iteration is multiply-adds over K in one sweep; F and G absorb log2(u) and log2(v) when those
// drift, and only then are exponentials taken again. The plan is scaled so that every row has mass
// 1 and every column n/m.
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "plan.h"

namespace shear::cpu::SHEAR_ISA {
namespace {

constexpr int kGroup = kRowPad;  // rows taken at a time: their sums fill half the registers
typedef float Vec4 __attribute__((vector_size(16)));
typedef float Group __attribute__((vector_size(4 * kGroup)));

constexpr float kFar = 1e30f;  // cost of padding
constexpr float kDriftHigh =
    0x1p20f;  // absorb beyond: one over-relaxed update may stretch a scaling 5-fold in log
constexpr float kDriftLow = 0x1p-20f;
constexpr int64_t kAhead = 16;     // rows of token costs that are fetched in advance
constexpr int64_t kTestEvery = 4;  // iterations from one choice of omega to the next
constexpr float kLog2e = 1.44269504f;

// A scaling is updated by y^-omega, y its marginal over the wanted one, with omega = 2 - 2^-level:
// level 0 is the plain update, and every further level takes one more square root and no logarithm.
constexpr int kTopLevel = 5;

template <typename V>
V root(V a) {
  for (unsigned i = 0; i < sizeof(V) / 4; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}

template <int kLevel, typename V>
V relax(V scaling, V y) {
  V power = y;
  for (int i = 0; i < kLevel; ++i) {
    y = root(y);
    power *= y;
  }
  return scaling / power;
}

inline Vec4 quarter_sums(Vec a) {
#if SHEAR_WIDTH == 4
  return a;
#elif SHEAR_WIDTH == 8
  return __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
#else
  return (__builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7)) +
         (__builtin_shufflevector(a, a, 8, 9, 10, 11) +
          __builtin_shufflevector(a, a, 12, 13, 14, 15));
#endif
}

inline Vec4 row_sums(Vec a, Vec b, Vec c, Vec d) {
  const Vec4 qa = quarter_sums(a), qb = quarter_sums(b), qc = quarter_sums(c), qd = quarter_sums(d);
  const Vec4 ab =
      __builtin_shufflevector(qa, qb, 0, 4, 1, 5) + __builtin_shufflevector(qa, qb, 2, 6, 3, 7);
  const Vec4 cd =
      __builtin_shufflevector(qc, qd, 0, 4, 1, 5) + __builtin_shufflevector(qc, qd, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

inline Vec4 load4(const float* p) {
  Vec4 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Group load_group(const float* p) {
  Group v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store_group(float* p, Group v) { __builtin_memcpy(p, &v, sizeof v); }

class Pair {
 public:
  Pair(const PairInput& in, float* scratch)
      : in_(in), n_(in.n), m_(in.m), rows_(round_up(in.n, kGroup)), ld_(round_up(in.m, kWidth)) {
    auto take = [&scratch](int64_t count) {
      float* p = scratch;
      scratch += count;
      return p;
    };
    cost_ = take(rows_ * ld_);
    k_ = take(rows_ * ld_);
    const int64_t slots = round_up(in.n, kCostPad);  // whole vectors
    f_ = take(slots);
    u_ = take(slots);
    absent_row_ = take(slots);
    potential_ = take(slots);
    g_ = take(ld_);
    v_ = take(ld_);
    w_ = take(ld_);
    absent_col_ = take(ld_);
    // what keeps the scalings of padding at 1: its marginals count as right
    for (int64_t i = 0; i < slots; ++i) {
      f_[i] = 0.f;
      absent_row_[i] = i < n_ ? 0.f : 1.f;
    }
    for (int64_t j = 0; j < ld_; ++j) absent_col_[j] = j < m_ ? 0.f : row_mass();
  }

  PairOutput solve() {
    float bound = max_of(in_.bound, load_costs());
    if (beaten(bound)) return {bound, 0.f, 0, true};
    reset_scalings();
    exponentiate();
    int level = 0;
    float before = __builtin_inff();
    int64_t dual_at = 4, finish_from = 1, test_at = kTestEvery;
    for (int64_t it = 1;; ++it) {
      const float residual = sweep(level);
      const bool last = it >= in_.n_iters;
      if (it == 1) level = 1;  // over-relaxed from the start can diverge
      if (it == test_at) {
        test_at += kTestEvery;
        level = next_level(level, residual / before);
        before = residual;
      }
      if (!(residual < __builtin_inff())) {  // diverged: back to the last absorbed potentials
        level = 0;
        reset_scalings();
        exponentiate();
      } else if (drifted_) {
        absorb();
        exponentiate();
      }
      const bool finish = last || (residual <= in_.tol && it >= finish_from);
      if (!finish && it < dual_at) continue;
      if (it >= dual_at) dual_at *= 2;
      bound = max_of(bound, dual_value());
      if (beaten(bound)) return {bound, 0.f, static_cast<int32_t>(it), true};
      if (!finish) continue;
      const PairOutput out = corrected_value(bound, static_cast<int32_t>(it));
      if (last || out.residual <= tolerance(out.distance)) return out;
      finish_from = it + 4;
    }
  }

 private:
  static int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }
  static float max_of(float a, float b) { return a < b ? b : a; }

  // The value's error is the plan's error times its entropy term, eps * log(n): where that is large
  // against the distance, a residual of tol is not enough. At the default reg and typical distances
  // this is tol itself.
  float tolerance(float distance) const {
    const float most = static_cast<float>(n_ > m_ ? n_ : m_);
    const float entropy = in_.eps * 0.69314718f * log2(broadcast(most))[0];
    const float scale = 0.2f * max_of(distance, in_.eps);
    return scale < entropy ? in_.tol * (scale / entropy) : in_.tol;
  }

  // Strictly above both minima: ties are computed, so that the result never depends on the order of
  // the pairs.
  bool beaten(float bound) const {
    if (!in_.best_row) return false;
    const uint32_t bits[2] = {__atomic_load_n(in_.best_row, __ATOMIC_RELAXED),
                              __atomic_load_n(in_.best_col, __ATOMIC_RELAXED)};
    float best[2];
    __builtin_memcpy(best, bits, sizeof best);
    return bound > best[0] && bound > best[1];
  }

  // Mass that a column gets if every row has mass 1.
  float row_mass() const { return static_cast<float>(n_) / static_cast<float>(m_); }

  // Copies the costs in units of eps * ln 2 and sets the hard potentials F_i = min_j C_ij, G_j =
  // min_i (C_ij - F_i), for which every K_ij <= 1 with a 1 in every row and column. Returns their
  // dual value, a bound.
  float load_costs() {
    const float scale = kLog2e / in_.eps;
    const Vec far = broadcast(kFar);
    const int64_t ld = ld_, whole = m_ / kWidth * kWidth;
    const int rest = static_cast<int>(m_ - whole);
    float* const g = g_;
    for (int64_t j = 0; j < ld; j += kWidth) store(g + j, far);
    for (int64_t i = 0; i < rows_; i += kGroup) {
      float* panel = cost_ + i * ld;
      for (int r = 0; r < kGroup; ++r) {
        if (i + r >= n_) {
          for (int64_t j = 0; j < ld; j += kWidth) store(panel + j * kGroup + r * kWidth, far);
          continue;
        }
        const float* row = in_.cost + (i + r) * in_.ld;
        if (i + r + kAhead < n_)
          for (int64_t j = 0; j < m_; j += kCostPad) __builtin_prefetch(row + kAhead * in_.ld + j);
        Vec lowest = far;
        const auto put = [&](int64_t j, Vec x) {
          store(panel + j * kGroup + r * kWidth, x);
          lowest = min(lowest, x);
        };
        for (int64_t j = 0; j < whole; j += kWidth) put(j, load(row + j) * scale);
        if (rest > 0) put(whole, load_rest(row, m_, rest, kFar / scale) * scale);
        f_[i + r] = min(lowest);
      }
      for (int64_t j = 0; j < ld; j += kWidth) {
        Vec lowest = load(g + j);
#pragma GCC unroll 8
        for (int r = 0; r < kGroup; ++r)
          lowest = min(lowest, load(panel + j * kGroup + r * kWidth) - f_[i + r]);
        store(g + j, lowest);
      }
    }
    for (int64_t j = m_; j < ld_; ++j) g_[j] = 0.f;
    return dual_value(total(f_, rows_), total(g_, ld_));
  }

  static double total(const float* a, int64_t count) {
    VecD sums = {};
    for (int64_t i = 0; i < count; i += kWidth) sums += widen(load(a + i));
    return sum(sums);
  }
  float to_cost(double scaled) const { return static_cast<float>(scaled * in_.eps / kLog2e); }
  float dual_value(double sum_f, double sum_g) const {
    return to_cost(sum_f / static_cast<double>(n_) + sum_g / static_cast<double>(m_));
  }

  void reset_scalings() {
    for (int64_t i = 0; i < rows_; i += kWidth) store(u_ + i, broadcast(1.f));
    for (int64_t j = 0; j < ld_; j += kWidth) store(v_ + j, broadcast(1.f));
  }

  void exponentiate() {
    const int64_t ld = ld_;
    for (int64_t i = 0; i < rows_; i += kGroup) {
      const float *cost = cost_ + i * ld, *g = g_;
      float* k = k_ + i * ld;
      const Group f = load_group(f_ + i);
      for (int64_t j = 0; j < ld; j += kWidth, g += kWidth)
#pragma GCC unroll 8
        for (int r = 0; r < kGroup; ++r, cost += kWidth, k += kWidth)
          store(k, exp2((f[r] - load(cost)) + load(g)));
    }
  }

  void absorb() {
    for (int64_t i = 0; i < rows_; i += kWidth) store(f_ + i, load(f_ + i) + log2(load(u_ + i)));
    for (int64_t j = 0; j < ld_; j += kWidth) store(g_ + j, load(g_ + j) + log2(load(v_ + j)));
    reset_scalings();
  }

  // Young's theory of over-relaxation, valid near the solution: from the rate at which the residual
  // falls with this omega follow the rate of plain updates and the best omega. A residual that grew
  // much asks for a smaller one; a little is the oscillation of over-relaxed updates.
  static int next_level(int level, float ratio) {
    if (!(ratio < 1.5f)) return level > 0 ? level - 1 : 0;
    if (ratio >= 1.f) return level;
    const float over = level == 0 ? 0.f : 1.f - 1.f / static_cast<float>(1 << level);  // omega - 1
    const float fall = __builtin_sqrtf(__builtin_sqrtf(ratio));  // per iteration
    const float rate = fall > over ? fall : over;
    const float plain = (rate + over) * (rate + over) / (rate * (1.f + over) * (1.f + over));
    const float best = 2.f / (1.f + __builtin_sqrtf(plain < 1.f ? 1.f - plain : 0.f));
    int next = 0;
    while (next < kTopLevel && next <= level && 2.f - 1.f / static_cast<float>(2 << next) <= best)
      ++next;
    return next;
  }

  float sweep(int level) {
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

  // One iteration: rows, then columns, in one sweep of K. Returns the L1 error of the row marginal
  // before the update. The scalings of a group of rows take a chain of dependent operations, which
  // runs while the next group is multiplied with v.
  template <int kLevel>
  float sweep() {
    const int64_t rows = rows_, step = kGroup * ld_;
    const float *k = k_, *absent = absent_row_;
    float* const scaling = u_;
    for (int64_t j = 0; j < ld_; j += kWidth) store(w_ + j, load(absent_col_ + j));
    Group error = {}, low = load_group(scaling), high = low, sums = multiply(k);
    for (int64_t i = 0; i < rows; i += kGroup, k += step) {
      const Group old = load_group(scaling + i), y = old * sums + load_group(absent + i);
      const Group off = y - 1.f;
      error += off < 0.f ? -off : off;
      const Group u = relax<kLevel>(old, y);
      store_group(scaling + i, u);
      low = u < low ? u : low;
      high = u > high ? u : high;
      if (i + kGroup < rows) sums = multiply(k + step);
      add(k, scaling + i);
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

  // The products of a group of rows with v.
  Group multiply(const float* k) const {
    const float *v = v_, *end = v + ld_;
    Vec s[kGroup] = {};
    for (; v < end; v += kWidth, k += kGroup * kWidth) {
      const Vec x = load(v);
#pragma GCC unroll 8
      for (int r = 0; r < kGroup; ++r) s[r] += load(k + r * kWidth) * x;
    }
    return __builtin_shufflevector(row_sums(s[0], s[1], s[2], s[3]),
                                   row_sums(s[4], s[5], s[6], s[7]), 0, 1, 2, 3, 4, 5, 6, 7);
  }

  // w += a group of rows, scaled by u.
  void add(const float* k, const float* u) const {
    Vec scale[kGroup];
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r) scale[r] = broadcast(u[r]);
    float *w = w_, *end = w + ld_;
    for (; w < end; w += kWidth, k += kGroup * kWidth) {
      Vec total = load(w);
#pragma GCC unroll 8
      for (int r = 0; r < kGroup; ++r) total += load(k + r * kWidth) * scale[r];
      store(w, total);
    }
  }

  // Potentials f_i = F_i + log2 u_i and g_j = min_i (C_ij - f_i) = G_j - log2 max_i (K_ij u_i) are
  // feasible at any iteration: their mean is a certified lower bound on W1, at the price of one
  // maximum pass.
  float dual_value() {
    for (int64_t j = 0; j < ld_; j += kWidth) store(w_ + j, load(absent_col_ + j));
    for (int64_t i = 0; i < rows_; i += kGroup) {
      const float* k = k_ + i * ld_;
      const Group u = load_group(u_ + i);
      float *w = w_, *end = w + ld_;
      for (; w < end; w += kWidth, k += kGroup * kWidth) {
        Vec most = load(w);
#pragma GCC unroll 8
        for (int r = 0; r < kGroup; ++r) most = max(most, load(k + r * kWidth) * u[r]);
        store(w, most);
      }
    }
    VecD f = {}, g = {};
    for (int64_t i = 0; i < rows_; i += kWidth) f += widen(load(f_ + i) + log2(load(u_ + i)));
    for (int64_t j = 0; j < ld_; j += kWidth) {
      const Vec x = load(g_ + j) - log2(load(w_ + j));
      g += widen(j + kWidth > m_ ? keep_first(x, static_cast<int>(m_ - j), 0.f) : x);
    }
    return dual_value(sum(f), sum(g));
  }

  // One plain column update makes the columns exact; then <P, C> + <f, a - P 1>, never below the
  // bound. The mass is right, so any constant may be taken off f: the first entry, against
  // cancellation.
  PairOutput corrected_value(float bound, int32_t iterations) {
    for (int64_t j = 0; j < ld_; j += kWidth) store(w_ + j, load(absent_col_ + j));
    for (int64_t i = 0; i < rows_; i += kGroup) add(k_ + i * ld_, u_ + i);
    for (int64_t j = 0; j < ld_; j += kWidth) store(v_ + j, row_mass() / load(w_ + j));
    for (int64_t j = m_; j < ld_; ++j) v_[j] = 0.f;  // padding must not be paid for
    for (int64_t i = 0; i < rows_; i += kWidth)
      store(potential_ + i, load(f_ + i) + log2(load(u_ + i)));
    double value = 0, error = 0;
    for (int64_t i = 0; i < rows_; i += 4) {
      const int64_t at = i / kGroup * kGroup * ld_ + i % kGroup * kWidth;
      const float *k = k_ + at, *cost = cost_ + at, *v = v_, *end = v + ld_;
      Vec mass[4] = {}, paid[4] = {};
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
      const Vec4 spent = u * row_sums(paid[0], paid[1], paid[2], paid[3]);
      const Vec4 missing = present - u * row_sums(mass[0], mass[1], mass[2], mass[3]);
      const Vec4 owed = missing * (load4(potential_ + i) - potential_[0]);
      for (int r = 0; r < 4; ++r) {
        value += static_cast<double>(spent[r]) + static_cast<double>(owed[r]);
        error += static_cast<double>(missing[r] < 0.f ? -missing[r] : missing[r]);
      }
    }
    for (int64_t j = m_; j < ld_; ++j) v_[j] = 1.f;
    const auto rows = static_cast<double>(n_);
    return {max_of(bound, to_cost(value / rows)), static_cast<float>(error / rows), iterations,
            false};
  }

  const PairInput& in_;
  const int64_t n_, m_, rows_, ld_;  // rows_ and ld_: padded
  // cost_ and k_ are read as one stream: (rows_ / kGroup, ld_ / kWidth, kGroup, kWidth)
  float *cost_, *k_, *f_, *u_, *absent_row_, *potential_, *g_, *v_, *w_, *absent_col_;
  bool drifted_ = false;
};

}  // namespace

PairOutput sinkhorn(const PairInput& in, float* scratch) { return Pair(in, scratch).solve(); }

}  // namespace shear::cpu::SHEAR_ISA
