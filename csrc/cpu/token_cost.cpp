// Hidden states to token costs: a blocked float32 product of the centred states, then ||x||^2 +
// ||y||^2 - 2<x, y>, square root and repair of near-duplicates. The product of two tokens
// accumulates over the dimensions in one fixed order whatever the tile around it, so costs do not
// depend on packing, chunks or threads.
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "plan.h"

namespace shear::cpu::SHEAR_ISA {
namespace {

constexpr int kRows = SHEAR_TILE_ROWS;  // register tile: kRows x kCols accumulators
constexpr int kCols = 2 * kWidth;

// Below this share of ||x||^2 + ||y||^2 cancellation eats the result, and these small costs are
// what a minimum picks.
constexpr float kNearDuplicate = 0x1p-7f;

template <Dtype kDtype>
Vec load_state(const void* data, int64_t index) {
  if constexpr (kDtype == Dtype::kFloat32) {
    return load(static_cast<const float*>(data) + index);
  } else {
    VecH bits;
    __builtin_memcpy(&bits, static_cast<const uint16_t*>(data) + index, sizeof bits);
    return kDtype == Dtype::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
  }
}

template <Dtype kDtype>
float state_at(const void* data, int64_t index) {
  if constexpr (kDtype == Dtype::kFloat32) {
    return static_cast<const float*>(data)[index];
  } else {
    const VecH bits = VecH{} + static_cast<const uint16_t*>(data)[index];
    return (kDtype == Dtype::kFloat16 ? from_float16(bits) : from_bfloat16(bits))[0];
  }
}

// Writes dimensions [k0, k0 + depth) of `count` <= kGroup tokens as a panel [depth][kGroup],
// centred, zero-filled.
template <Dtype kDtype, int kGroup>
void pack_panel(const States& states, int64_t token, int64_t count, int64_t k0, int64_t depth,
                const float* center, float* row, float* panel) {
  for (int64_t r = 0; r < kGroup; ++r) {
    if (r < count) {
      const int64_t base = (token + r) * states.dim + k0;
      int64_t k = 0;
      for (; k + kWidth <= depth; k += kWidth)
        store(row + k, load_state<kDtype>(states.data, base + k) - load(center + k0 + k));
      for (; k < depth; ++k) row[k] = state_at<kDtype>(states.data, base + k) - center[k0 + k];
      for (k = 0; k < depth; ++k) panel[k * kGroup + r] = row[k];
    } else {
      for (int64_t k = 0; k < depth; ++k) panel[k * kGroup + r] = 0.f;
    }
  }
}

template <Dtype kDtype, int kGroup>
void pack(const States& states, int64_t token, int64_t tokens, int64_t k0, int64_t depth,
          const float* center, float* row, float* panels) {
  for (int64_t t = 0; t < tokens; t += kGroup) {
    const int64_t count = tokens - t < kGroup ? tokens - t : kGroup;
    pack_panel<kDtype, kGroup>(states, token + t, count, k0, depth, center, row,
                               panels + t * depth);
  }
}

// out (rows, cols) = [accumulate ? out : 0] + sum_k a[k][:] b[k][:]
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
  if (rows == kRows && cols == kCols) {
    for (int r = 0; r < kRows; ++r)
      for (int half = 0; half < 2; ++half) {
        float* p = out + r * ld + half * kWidth;
        store(p, accumulate ? load(p) + sums[r][half] : sums[r][half]);
      }
    return;
  }
  float lanes[kCols];
  for (int64_t r = 0; r < rows; ++r) {
    store(lanes, sums[r][0]);
    store(lanes + kWidth, sums[r][1]);
    for (int64_t c = 0; c < cols; ++c)
      out[r * ld + c] = accumulate ? out[r * ld + c] + lanes[c] : lanes[c];
  }
}

template <Dtype kDtype>
float direct_cost(const States& states, int64_t i, int64_t j) {
  const int64_t x = i * states.dim, y = j * states.dim;
  Vec total = {};
  int64_t k = 0;
  for (; k + kWidth <= states.dim; k += kWidth) {
    const Vec difference =
        load_state<kDtype>(states.data, x + k) - load_state<kDtype>(states.data, y + k);
    total += difference * difference;
  }
  float rest = 0.f;
  for (; k < states.dim; ++k) {
    const float difference =
        state_at<kDtype>(states.data, x + k) - state_at<kDtype>(states.data, y + k);
    rest += difference * difference;
  }
  return __builtin_sqrtf(sum(total) + rest);
}

template <Dtype kDtype>
void finish_costs(const CostTile& t) {
  for (int64_t i = 0; i < t.rows; ++i) {
    float* out = t.out + i * t.ld;
    const float x = t.sq_norm[t.row + i];
    for (int64_t j = 0; j < t.cols; j += kWidth) {
      const int64_t lanes = t.cols - j < kWidth ? t.cols - j : kWidth;
      const Vec norms = x + load_first(t.sq_norm + t.col + j, lanes, 0.f);
      const Vec squared = norms - 2.f * load_first(out + j, lanes, 0.f);
      const Vec cost = sqrt(max(squared, Vec{}));
      const VecI near = squared < kNearDuplicate * norms;
      float values[kWidth];
      store(values, cost);
      int any = 0;
      for (int l = 0; l < kWidth; ++l) any |= near[l];
      if (any)
        for (int l = 0; l < lanes; ++l)
          if (near[l]) values[l] = direct_cost<kDtype>(t.states, t.row + i, t.col + j + l);
      if (lanes == kWidth)
        store(out + j, load(values));
      else
        for (int l = 0; l < lanes; ++l) out[j + l] = values[l];
    }
  }
}

template <Dtype kDtype>
void token_cost(const CostTile& t) {
  const int64_t packed_rows = (t.rows + kRows - 1) / kRows * kRows;
  float* row = t.scratch;
  float* a = row + kTileDepth;
  float* b = a + packed_rows * kTileDepth;
  for (int64_t k0 = 0; k0 < t.states.dim; k0 += kTileDepth) {
    const int64_t depth = t.states.dim - k0 < kTileDepth ? t.states.dim - k0 : kTileDepth;
    pack<kDtype, kRows>(t.states, t.row, t.rows, k0, depth, t.center, row, a);
    pack<kDtype, kCols>(t.states, t.col, t.cols, k0, depth, t.center, row, b);
    for (int64_t j = 0; j < t.cols; j += kCols)
      for (int64_t i = 0; i < t.rows; i += kRows)
        multiply(a + i * depth, b + j * depth, depth, k0 > 0, t.out + i * t.ld + j, t.ld,
                 t.rows - i < kRows ? t.rows - i : kRows, t.cols - j < kCols ? t.cols - j : kCols);
  }
  finish_costs<kDtype>(t);
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
