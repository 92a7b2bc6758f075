// Hidden states to token costs: a blocked float32 product of the centred states, then ||x||^2 +
// ||y||^2 - 2<x, y>, square root and repair of near-duplicates. The product of two tokens
// accumulates over the dimensions in one fixed order whatever the tile around it, so costs do not
// depend on packing, chunks or threads.
#include "cpu/kernels/cost_tile.h"
#include "cpu/kernels/kernels.h"
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

// out (rows, cols) = [accumulate ? out : 0] + a (depth, kRows)^T b (depth, kCols)
void multiply(const float* a, const float* b, int64_t depth, bool accumulate, float* out,
              int64_t ld, int64_t rows, int64_t cols) {
  Vec sums[kRows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec b0 = load(b + k * kCols), b1 = load(b + k * kCols + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x = broadcast(a[k * kRows + r]);
      sums[r][0] += x * b0;
      sums[r][1] += x * b1;
    }
  }
  float corner[kRows * kCols];  // a tile that reaches beyond the last row or column
  const bool whole = rows == kRows && cols == kCols;
  float* to = whole ? out : corner;
  const int64_t step = whole ? ld : kCols;
  if (!whole && accumulate)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) corner[r * kCols + c] = out[r * ld + c];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* p = to + r * step + half * kWidth;
      store(p, accumulate ? load(p) + sums[r][half] : sums[r][half]);
    }
  if (!whole)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) out[r * ld + c] = corner[r * kCols + c];
}

template <Dtype kDtype>
void token_cost(const CostTile& t) {
  constexpr int64_t kRoom = kCols + kWidth;  // tokens, with room for the last whole square
  static_assert((2 * kRoom + kTileRows) * kTileDepth + kWidth <= kPanelFloats);
  float* rows = t.scratch;               // (kRoom, depth)
  float* b = rows + kRoom * kTileDepth;  // (depth, kCols), stays in the first-level cache
  float* a = b + kRoom * kTileDepth;     // panels (depth, kRows) of all rows
  for (int64_t k0 = 0; k0 < t.states.dim; k0 += kTileDepth) {
    const int64_t left = t.states.dim - k0 < kTileDepth ? t.states.dim - k0 : kTileDepth;
    const int64_t depth = (left + kWidth - 1) / kWidth * kWidth;
    const auto pack = [&]<int kTokens>(int64_t token, int64_t count, float* panel) {
      center_rows<kDtype>(t.states, token, count, k0, left, depth, t.center, rows);
      pack_panel<kTokens>(rows, depth, panel);
    };
    for (int64_t i = 0; i < t.rows; i += kRows)
      pack.template operator()<kRows>(t.row + i, t.rows - i < kRows ? t.rows - i : kRows,
                                      a + i * depth);
    for (int64_t j = 0; j < t.cols; j += kCols) {
      const int64_t cols = t.cols - j < kCols ? t.cols - j : kCols;
      pack.template operator()<kCols>(t.col + j, cols, b);
      for (int64_t i = 0; i < t.rows; i += kRows)
        multiply(a + i * depth, b, depth, k0 > 0, t.out + i * t.ld + j, t.ld,
                 t.rows - i < kRows ? t.rows - i : kRows, cols);
      if (k0 + left == t.states.dim) finish_costs<kDtype>(t, j, j + cols);
    }
  }
}

template <Dtype kDtype>
void add_states(const States& states, int64_t token, int64_t count, int64_t dim_begin,
                int64_t dim_end, double* sums) {
  for (int64_t i = token; i < token + count; ++i) {
    const int64_t base = i * states.dim;
    int64_t k = dim_begin;
    for (; k + kWidth <= dim_end; k += kWidth) {
      VecD total;
      __builtin_memcpy(&total, sums + (k - dim_begin), sizeof total);
      total += widen(load_state<kDtype>(states.data, base + k));
      __builtin_memcpy(sums + (k - dim_begin), &total, sizeof total);
    }
    for (; k < dim_end; ++k) sums[k - dim_begin] += state_at<kDtype>(states.data, base + k);
  }
}

template <Dtype kDtype>
float squared_norm(const States& states, int64_t token, const float* center) {
  const int64_t base = token * states.dim;
  double total = 0;
  for (int64_t begin = 0; begin < states.dim;
       begin += 32 * kWidth) {  // short float32 runs, summed in double
    const int64_t end = states.dim - begin < 32 * kWidth ? states.dim : begin + 32 * kWidth;
    Vec squares = {};
    int64_t k = begin;
    for (; k + kWidth <= end; k += kWidth) {
      Vec x = load_state<kDtype>(states.data, base + k);
      if (center) x -= load(center + k);
      squares += x * x;
    }
    float rest = 0.f;
    for (; k < end; ++k) {
      const float x = state_at<kDtype>(states.data, base + k) - (center ? center[k] : 0.f);
      rest += x * x;
    }
    total += static_cast<double>(sum(squares)) + rest;
  }
  return static_cast<float>(total);
}

#define SHEAR_BY_DTYPE(function, states, ...)         \
  switch ((states).dtype) {                           \
    case Dtype::kFloat32:                             \
      return function<Dtype::kFloat32>(__VA_ARGS__);  \
    case Dtype::kFloat16:                             \
      return function<Dtype::kFloat16>(__VA_ARGS__);  \
    case Dtype::kBFloat16:                            \
      return function<Dtype::kBFloat16>(__VA_ARGS__); \
  }                                                   \
  __builtin_unreachable();

}  // namespace

void add_states_any(const States& s, int64_t token, int64_t count, int64_t begin, int64_t end,
                    double* sums) {
  SHEAR_BY_DTYPE(add_states, s, s, token, count, begin, end, sums)
}
float squared_norm_any(const States& s, int64_t token, const float* center) {
  SHEAR_BY_DTYPE(squared_norm, s, s, token, center)
}
void token_cost_any(const CostTile& tile) { SHEAR_BY_DTYPE(token_cost, tile.states, tile) }

}  // namespace shear::cpu::SHEAR_ISA
