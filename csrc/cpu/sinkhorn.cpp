// One span pair: entropic optimal transport between two uniform measures.
//
// The plan is u_i K_ij v_j with K = 2^(F_i + G_j - C_ij) and all of C, F, G in units of eps * ln 2.
// An iteration is multiply-adds over K in one sweep; F and G absorb log2(u) and log2(v) when those
// drift, and only then are exponentials taken again. The plan is scaled so that every row has mass
// 1 and every column n/m.
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "plan.h"

extern "C" float log2f(float);

namespace shear::cpu::SHEAR_ISA {
namespace {

typedef float Vec4 __attribute__((vector_size(16)));

constexpr float kFar = 1e30f;  // cost of the padding columns
constexpr float kDriftHigh =
    0x1p20f;  // absorb beyond: one over-relaxed update may stretch a scaling 5-fold in log
constexpr float kDriftLow = 0x1p-20f;
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

Vec4 quarter_sums(Vec a) {
  float lanes[kWidth];
  store(lanes, a);
  Vec4 total = {};
  for (int q = 0; q < kWidth; q += 4) {
    Vec4 part;
    __builtin_memcpy(&part, lanes + q, sizeof part);
    total += part;
  }
  return total;
}

Vec4 row_sums(Vec a, Vec b, Vec c, Vec d) {
  const Vec4 qa = quarter_sums(a), qb = quarter_sums(b), qc = quarter_sums(c), qd = quarter_sums(d);
  const Vec4 ab =
      __builtin_shufflevector(qa, qb, 0, 4, 1, 5) + __builtin_shufflevector(qa, qb, 2, 6, 3, 7);
  const Vec4 cd =
      __builtin_shufflevector(qc, qd, 0, 4, 1, 5) + __builtin_shufflevector(qc, qd, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

Vec4 load4(const float* p) {
  Vec4 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
void store4(float* p, Vec4 v) { __builtin_memcpy(p, &v, sizeof v); }

class Pair {
 public:
  Pair(const PairInput& in, float* scratch)
      : in_(in),
        n_(in.n),
        m_(in.m),
        rows_((in.n + 3) / 4 * 4),
        ld_((in.m + kCostPad - 1) / kCostPad * kCostPad) {
    auto take = [&scratch](int64_t count) {
      float* p = scratch;
      scratch += count;
      return p;
    };
    cost_ = take(rows_ * ld_);
    k_ = take(rows_ * ld_);
    f_ = take(rows_);
    u_ = take(rows_);
    empty_ = take(rows_);
    g_ = take(ld_);
    v_ = take(ld_);
    w_ = take(ld_);
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
      dual_at *= 3;
      bound = max_of(bound, dual_value());
      if (beaten(bound)) return {bound, 0.f, static_cast<int32_t>(it), true};
      if (!finish) continue;
      const PairOutput out = corrected_value(bound, static_cast<int32_t>(it));
      if (last || out.residual <= tolerance(out.distance)) return out;
      finish_from = it + 4;
    }
  }

 private:
  static float max_of(float a, float b) { return a < b ? b : a; }

  // The value's error is the plan's error times its entropy term, eps * log(n): where that is large
  // against the distance, a residual of tol is not enough. At the default reg and typical distances
  // this is tol itself.
  float tolerance(float distance) const {
    const float entropy = in_.eps * 0.69314718f * log2f(static_cast<float>(n_ > m_ ? n_ : m_));
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

  // Copies the costs in units of eps * ln 2 and sets the hard potentials F_i = min_j C_ij, G_j =
  // min_i (C_ij - F_i), for which every K_ij <= 1 with a 1 in every row and column. Returns their
  // dual value, a bound.
  float load_costs() {
    const float scale = kLog2e / in_.eps;
    const Vec inf = broadcast(__builtin_inff());
    for (int64_t j = 0; j < ld_; j += kWidth) store(g_ + j, inf);
    double sum_f = 0, sum_g = 0;
    for (int64_t i = 0; i < rows_; ++i) {
      float* c = cost_ + i * ld_;
      empty_[i] = i < n_ ? 0.f : 1.f;
      if (i >= n_) {
        f_[i] = 0.f;
        for (int64_t j = 0; j < ld_; ++j) c[j] = kFar;
        continue;
      }
      Vec lowest = inf;
      for (int64_t j = 0; j < ld_; j += kWidth) {
        Vec x = load_first(in_.cost + i * in_.ld + j, m_ - j, kFar) * scale;
        if (m_ - j < kWidth) x = keep_first(x, static_cast<int>(m_ - j), kFar);
        store(c + j, x);
        lowest = min(lowest, x);
      }
      f_[i] = min(lowest);
      sum_f += f_[i];
      for (int64_t j = 0; j < ld_; j += kWidth)
        store(g_ + j, min(load(g_ + j), load(c + j) - f_[i]));
    }
    for (int64_t j = 0; j < m_; ++j) sum_g += g_[j];
    for (int64_t j = m_; j < ld_; ++j) g_[j] = 0.f;
    return to_cost(sum_f / n_ + sum_g / m_);
  }

  float to_cost(double scaled) const { return static_cast<float>(scaled * in_.eps / kLog2e); }

  void reset_scalings() {
    for (int64_t i = 0; i < rows_; ++i) u_[i] = 1.f;
    for (int64_t j = 0; j < ld_; ++j) v_[j] = j < m_ ? 1.f : 0.f;
  }

  void exponentiate() {
    for (int64_t i = 0; i < rows_; ++i) {
      const float f = f_[i];
      const float* c = cost_ + i * ld_;
      float* k = k_ + i * ld_;
      if (i < n_)
        for (int64_t j = 0; j < ld_; j += kWidth)
          store(k + j, exp2((f - load(c + j)) + load(g_ + j)));
      else
        for (int64_t j = 0; j < ld_; ++j) k[j] = 0.f;
    }
  }

  void absorb() {
    for (int64_t i = 0; i < n_; ++i) f_[i] += log2f(u_[i]);
    for (int64_t j = 0; j < m_; ++j) g_[j] += log2f(v_[j]);
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

  // One iteration: rows, then columns, K read once. Returns the L1 error of the row marginal before
  // the update.
  template <int kLevel>
  float sweep() {
    for (int64_t j = 0; j < ld_; j += kWidth) store(w_ + j, Vec{});
    Vec4 error = {}, low = load4(u_), high = low;
    for (int64_t i = 0; i < rows_; i += 4) {
      const float* k = k_ + i * ld_;
      Vec s0 = {}, s1 = {}, s2 = {}, s3 = {};
      for (int64_t j = 0; j < ld_; j += kWidth) {
        const Vec x = load(v_ + j);
        s0 += load(k + j) * x;
        s1 += load(k + ld_ + j) * x;
        s2 += load(k + 2 * ld_ + j) * x;
        s3 += load(k + 3 * ld_ + j) * x;
      }
      const Vec4 old = load4(u_ + i);
      const Vec4 y = old * (row_sums(s0, s1, s2, s3) + load4(empty_ + i));
      const Vec4 off = y - 1.f;
      error += off < 0.f ? -off : off;
      const Vec4 u = relax<kLevel>(old, y);
      store4(u_ + i, u);
      low = u < low ? u : low;
      high = u > high ? u : high;
      for (int64_t j = 0; j < ld_; j += kWidth) {
        Vec x = load(w_ + j);
        x += load(k + j) * u[0];
        x += load(k + ld_ + j) * u[1];
        x += load(k + 2 * ld_ + j) * u[2];
        x += load(k + 3 * ld_ + j) * u[3];
        store(w_ + j, x);
      }
    }
    const float ratio = static_cast<float>(m_) / static_cast<float>(n_);
    for (int64_t j = 0; j < ld_; j += kWidth) {
      const Vec old = load(v_ + j);
      store(v_ + j, relax<kLevel>(old, load(w_ + j) * old * ratio));
    }
    for (int64_t j = m_; j < ld_; ++j) v_[j] = 0.f;
    note_drift(low, high);
    return (error[0] + error[1] + error[2] + error[3]) / static_cast<float>(n_);
  }

  void note_drift(Vec4 low, Vec4 high) {
    float lowest = low[0], highest = high[0];
    for (int l = 1; l < 4; ++l) {
      lowest = low[l] < lowest ? low[l] : lowest;
      highest = high[l] > highest ? high[l] : highest;
    }
    for (int64_t j = 0; j < m_; ++j) {
      lowest = v_[j] < lowest ? v_[j] : lowest;
      highest = v_[j] > highest ? v_[j] : highest;
    }
    drifted_ = !(lowest > kDriftLow && highest < kDriftHigh);
  }

  // Potentials f_i = F_i + log2 u_i and g_j = min_i (C_ij - f_i) = G_j - log2 max_i (K_ij u_i) are
  // feasible at any iteration: their mean is a certified lower bound on W1, at the price of one
  // maximum pass.
  float dual_value() {
    for (int64_t j = 0; j < ld_; j += kWidth) store(w_ + j, Vec{});
    double total = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const float* k = k_ + i * ld_;
      for (int64_t j = 0; j < ld_; j += kWidth)
        store(w_ + j, max(load(w_ + j), load(k + j) * u_[i]));
      total += (f_[i] + log2f(u_[i])) / static_cast<double>(n_);
    }
    for (int64_t j = 0; j < m_; ++j) total += (g_[j] - log2f(w_[j])) / static_cast<double>(m_);
    return to_cost(total);
  }

  // One plain column update makes the columns exact; then <P, C> + <f, a - P 1>, never below the
  // bound. The mass is right, so any constant may be taken off f: the first entry, against
  // cancellation.
  PairOutput corrected_value(float bound, int32_t iterations) {
    for (int64_t j = 0; j < ld_; j += kWidth) {
      Vec total = {};
      for (int64_t i = 0; i < n_; ++i) total += load(k_ + i * ld_ + j) * u_[i];
      store(v_ + j, (static_cast<float>(n_) / static_cast<float>(m_)) / total);
    }
    for (int64_t j = m_; j < ld_; ++j) v_[j] = 0.f;
    const float reference = f_[0] + log2f(u_[0]);
    double transport = 0, correction = 0, error = 0;
    for (int64_t i = 0; i < n_; ++i) {
      Vec mass = {}, paid = {};
      for (int64_t j = 0; j < ld_; j += kWidth) {
        const Vec p = load(k_ + i * ld_ + j) * load(v_ + j);
        mass += p;
        paid += p * load(cost_ + i * ld_ + j);
      }
      const double missing = 1. - static_cast<double>(u_[i]) * sum(mass);
      transport += static_cast<double>(u_[i]) * sum(paid);
      correction += (f_[i] + log2f(u_[i]) - reference) * missing;
      error += missing < 0 ? -missing : missing;
    }
    const float value = to_cost((transport + correction) / n_);
    return {max_of(bound, value), static_cast<float>(error / n_), iterations, false};
  }

  const PairInput& in_;
  const int64_t n_, m_, rows_, ld_;
  float *cost_, *k_, *f_, *u_, *empty_, *g_, *v_, *w_;
  bool drifted_ = false;
};

}  // namespace

PairOutput sinkhorn(const PairInput& in, float* scratch) { return Pair(in, scratch).solve(); }

}  // namespace shear::cpu::SHEAR_ISA
