// Hidden states to token costs where rounding them to int8 would show: a blocked float32 product of
// the centred states, then csrc/cpu/kernels/costs.h. The product of two tokens accumulates over the
// dimensions in one fixed order whatever the tile around it, so costs do not depend on packing,
// chunks or threads.
#include "cpu/kernels/costs.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/panels.h"
#include "cpu/kernels/simd.h"
#include "cpu/plan.h"

namespace shear::cpu::SHEAR_ISA {
namespace {

constexpr int kRows = SHEAR_TILE_ROWS;  // register tile: kRows x kCols accumulators
constexpr int kCols = 2 * kWidth;

// Writes dimensions [k0, k0 + left) of `count` tokens, centred, as rows of `depth` floats,
// zero-filled.
template <Dtype kDtype>
void center_rows(const States& states, int64_t token, int64_t count, int64_t k0, int64_t left,
                 int64_t depth, const float* center, float* rows) {
  for (int64_t r = 0; r < count; ++r, rows += depth) {
    const int64_t base = (token + r) * states.dim + k0;
    int64_t k = 0;
    for (; k + kWidth <= left; k += kWidth)
      store(rows + k, load_state<kDtype>(states.data, base + k) - load(center + k0 + k));
    for (; k < left; ++k) rows[k] = state_at<kDtype>(states.data, base + k) - center[k0 + k];
    for (; k < depth; ++k) rows[k] = 0.f;
  }
}

// out (rows, cols) = [accumulate ? out : 0] + a (depth, kRows)^T b (depth, kVectors * kWidth)
template <int kVectors>
void multiply(const float* a, const float* b, int64_t depth, bool accumulate, float* out,
              int64_t ld, int64_t rows, int64_t cols) {
  Vec sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec y[kVectors];
    for (int c = 0; c < kVectors; ++c) y[c] = load(b + (k * kVectors + c) * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x = broadcast(a[k * kRows + r]);
#pragma GCC unroll 2
      for (int c = 0; c < kVectors; ++c) sums[r][c] += x * y[c];
    }
  }
  store_tile(sums, accumulate, out, ld, rows, cols);
}

template <Dtype kDtype>
void token_cost_of(const CostTile& t) {
  constexpr int64_t kRoom = kCols + kWidth;  // tokens, with room for the last whole square
  static_assert((2 * kRoom + kTileRows) * kTileDepth + kWidth <= kPanelFloats);
  Marked marked;
  float* rows = t.scratch;               // (kRoom, depth)
  float* b = rows + kRoom * kTileDepth;  // (depth, kCols), stays in the first-level cache
  float* a = b + kRoom * kTileDepth;     // panels (depth, kRows) of all rows
  for (int64_t k0 = 0; k0 < t.states.dim; k0 += kTileDepth) {
    const int64_t left = t.states.dim - k0 < kTileDepth ? t.states.dim - k0 : kTileDepth;
    const int64_t depth = (left + kWidth - 1) / kWidth * kWidth;
    const auto pack = [&]<int kTokens>(int64_t token, int64_t count, float* panel) {
      center_rows<kDtype>(t.states, token, count, k0, left, depth, t.center, rows);
      pack_panel<kTokens>(rows, depth, depth, panel);
    };
    for (int64_t i = 0; i < t.rows; i += kRows)
      pack.template operator()<kRows>(t.row + i, t.rows - i < kRows ? t.rows - i : kRows,
                                      a + i * depth);
    const auto columns = [&]<int kVectors>(int64_t j, int64_t cols) {
      pack.template operator()<kVectors * kWidth>(t.col + j, cols, b);
      for (int64_t i = 0; i < t.rows; i += kRows)
        multiply<kVectors>(a + i * depth, b, depth, k0 > 0, t.out + i * t.ld + j, t.ld,
                           t.rows - i < kRows ? t.rows - i : kRows, cols);
      if (k0 + left == t.states.dim) finish_costs<float>(t, j, j + cols, marked);
    };
    for (int64_t j = 0; j < t.cols; j += kCols) {
      const int64_t cols = t.cols - j < kCols ? t.cols - j : kCols;
      if (cols > kWidth)
        columns.template operator()<2>(j, cols);
      else  // spans are short: a block half empty would show
        columns.template operator()<1>(j, cols);
    }
  }
  repair(t, marked);
}

}  // namespace

void token_cost(const CostTile& t) { SHEAR_BY_DTYPE(token_cost_of, t.states, t) }

}  // namespace shear::cpu::SHEAR_ISA
