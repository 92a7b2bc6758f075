// From products <x, y> to token costs, while the tile is in cache. Included once per instruction
// set, like simd.h.
#pragma once
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/simd.h"
#include "token_cost.h"

namespace shear::cpu::SHEAR_ISA {

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

// Writes the transpose of kWidth or more rows of `depth` words as a panel (depth, kColumns). Takes
// whole squares of kWidth, so it may write up to kWidth words beyond the panel.
template <int kColumns>
void pack_panel(const float* rows, int64_t depth, float* panel) {
  for (int64_t k = 0; k < depth; k += kWidth)
    for (int64_t c = 0; c < kColumns; c += kWidth) {
      Vec square[kWidth];
      for (int i = 0; i < kWidth; ++i) square[i] = load(rows + (c + i) * depth + k);
      transpose(square);
      for (int i = 0; i < kWidth; ++i) store(panel + (k + i) * kColumns + c, square[i]);
    }
}

// Columns [begin, end) of t.out: products -> ||x||^2 + ||y||^2 - 2<x, y> -> square root and repair
// of near-duplicates.
template <Dtype kDtype>
void finish_costs(const CostTile& t, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < t.rows; ++i) {
    float* out = t.out + i * t.ld;
    const float x = t.sq_norm[t.row + i];
    for (int64_t j = begin; j < end; j += kWidth) {
      const int64_t lanes = end - j < kWidth ? end - j : kWidth;
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

}  // namespace shear::cpu::SHEAR_ISA
