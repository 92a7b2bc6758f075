// Reductions of token costs over spans, from which the bounds R and Q of every span pair, chamfer
// and mmd are made: R = mean over rows i of min_j C_ij, Q = mean over columns j of min_i C_ij.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/simd.h"

namespace shear::cpu::SHEAR_ISA {

void window_min(const float* row, const Window* windows, int64_t count, float* out) {
  for (int64_t w = 0; w < count; ++w) {
    const float* values = row + windows[w].begin;
    const int64_t size = windows[w].size;
    Vec lowest = load_first(values, size, __builtin_inff());
    int64_t j = kWidth;
    for (; j + kWidth <= size; j += kWidth) lowest = min(lowest, load(values + j));
    if (j < size)
      lowest = min(lowest, load(values + size - kWidth));  // overlaps: the minimum does not mind
    out[w] = min(lowest);
  }
}

void window_sum(const float* row, const Window* windows, int64_t count, float* out) {
  for (int64_t w = 0; w < count; ++w) {
    const float* values = row + windows[w].begin;
    const int64_t size = windows[w].size;
    Vec total = {};
    for (int64_t j = 0; j < size; j += kWidth) total += load_first(values + j, size - j, 0.f);
    out[w] = sum(total);
  }
}

void column_min(const float* cost, int64_t ld, int64_t rows, int64_t cols, float* out) {
  for (int64_t j = 0; j < cols; j += kWidth) {
    const int64_t lanes = cols - j < kWidth ? cols - j : kWidth;
    Vec lowest = load_first(cost + j, lanes, 0.f);
    for (int64_t i = 1; i < rows; ++i)
      lowest = min(lowest, load_first(cost + i * ld + j, lanes, 0.f));
    if (lanes == kWidth)
      store(out + j, lowest);
    else
      for (int64_t l = 0; l < lanes; ++l) out[j + l] = lowest[l];
  }
}

void add(float* a, const float* b, int64_t count) {
  for (int64_t k = 0; k < count; ++k) a[k] += b[k];
}

bool below(const float* row, int64_t count, float most) {
  VecI inside = ~VecI{};  // not so for NaN
  for (int64_t j = 0; j < count; j += kWidth) {
    const Vec x = load_first(row + j, count - j, 0.f);
    inside &= (x < most) & (x > -most);
  }
  bool all = true;
  for (int l = 0; l < kWidth; ++l) all &= inside[l] != 0;
  return all;
}

// 2^x - 1 for x <= 0, to 2e-7 of the result: with the integer part n of x, 2^n (2^f - 1) + 2^n - 1.
static Vec exp2_less_one(Vec x) {
  const Vec magic = broadcast(12582912.f);  // as in exp2
  x = max(x, broadcast(-96.f));
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p = broadcast(1.525273380e-5f);  // Taylor: ln(2)^k / k!
  p = p * f + 1.540353039e-4f;
  p = p * f + 1.333355815e-3f;
  p = p * f + 9.618129108e-3f;
  p = p * f + 5.550410866e-2f;
  p = p * f + 2.402265070e-1f;
  p = p * f + 6.931471806e-1f;
  const Vec power = (Vec)((VecI)broadcast(1.f) + ((VecI)shifted << 23));
  return power * (p * f) + (power - 1.f);
}

void rbf(float* cost, int64_t count, float sigma) {
  const float to_exponent = -0.72134752f / (sigma * sigma);  // log2(e) / 2
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) {
    const Vec c = load(cost + k);
    store(cost + k, exp2_less_one(c * c * to_exponent));
  }
  for (; k < count; ++k) cost[k] = exp2_less_one(broadcast(cost[k] * cost[k] * to_exponent))[0];
}

}  // namespace shear::cpu::SHEAR_ISA
