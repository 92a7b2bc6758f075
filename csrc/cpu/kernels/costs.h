// From products <x, y> to token costs ||x||^2 + ||y||^2 - 2<x, y>, square root and repair of
// near-duplicates, while the tile is in cache. Included once per instruction set, like simd.h.
#pragma once
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/state_words.h"
#include "cpu/plan.h"
#include "token_cost.h"

namespace shear::cpu::SHEAR_ISA {

// Entries that are near-duplicates, until they are computed again.
constexpr int kMostMarked = 1 << 14;
// Dimensions taken at a time: the part of the tile's states stays in cache.
constexpr int64_t kRepairDepth = 256;

struct Marked {
  int count = 0;
  uint32_t place[kMostMarked];  // row << 16 | column of the tile
  float squared[kMostMarked];
};
static_assert(kTileRows <= 1 << 16 && kTileCols <= 1 << 16);

// The part of ||x - y||^2 that dimensions [begin, end) have.
template <Dtype kDtype>
float squared_distance(const States& states, int64_t i, int64_t j, int64_t begin, int64_t end) {
  const int64_t x = i * states.dim, y = j * states.dim;
  Vec total = {};
  int64_t k = begin;
  for (; k + kWidth <= end; k += kWidth) {
    const Vec difference =
        load_state<kDtype>(states.data, x + k) - load_state<kDtype>(states.data, y + k);
    total += difference * difference;
  }
  float rest = 0.f;
  for (; k < end; ++k) {
    const float difference =
        state_at<kDtype>(states.data, x + k) - state_at<kDtype>(states.data, y + k);
    rest += difference * difference;
  }
  return sum(total) + rest;
}

template <Dtype kDtype>
void repair_marked(const CostTile& t, Marked& marked) {
  for (int e = 0; e < marked.count; ++e) marked.squared[e] = 0.f;
  for (int64_t k = 0; k < t.states.dim; k += kRepairDepth) {
    const int64_t end = t.states.dim - k < kRepairDepth ? t.states.dim : k + kRepairDepth;
    for (int e = 0; e < marked.count; ++e)
      marked.squared[e] += squared_distance<kDtype>(t.states, t.row + (marked.place[e] >> 16),
                                                    t.col + (marked.place[e] & 0xffff), k, end);
  }
  for (int e = 0; e < marked.count; ++e)
    t.out[(marked.place[e] >> 16) * t.ld + (marked.place[e] & 0xffff)] =
        __builtin_sqrtf(marked.squared[e]);
  marked.count = 0;
}

inline void repair(const CostTile& t, Marked& marked) {
  SHEAR_BY_DTYPE(repair_marked, t.states, t, marked)
}

// Columns [begin, end) of t.out: products, of int8 rows or of centred states, to costs but for the
// near-duplicates, which are marked.
template <typename Product>
void finish_costs(const CostTile& t, int64_t begin, int64_t end, Marked& marked) {
  constexpr bool kRounded = Product{1} / 2 == 0;  // integers
  for (int64_t i = 0; i < t.rows; ++i) {
    float* out = t.out + i * t.ld;
    const float x = t.sq_norm[t.row + i], step = kRounded ? 2.f * t.row_rows.scale[i] : 2.f;
    for (int64_t j = begin; j < end; j += kWidth) {
      const int64_t lanes = end - j < kWidth ? end - j : kWidth;
      const Vec norms = x + load_first(t.sq_norm + t.col + j, lanes, 0.f);
      Vec product = load_first(out + j, lanes, 0.f), twice = broadcast(step);
      if constexpr (kRounded) {
        product = __builtin_convertvector((VecI)product, Vec);
        twice *= load_first(t.col_rows.scale + j, lanes, 0.f);
      }
      const Vec squared = norms - twice * product;
      const Vec cost = sqrt(max(squared, Vec{}));
      if (lanes == kWidth)
        store(out + j, cost);
      else
        for (int l = 0; l < lanes; ++l) out[j + l] = cost[l];
      const VecI near = squared < (kRounded ? kNearRounded : kNearDuplicate) * norms;
      int any = 0;
      for (int l = 0; l < kWidth; ++l) any |= near[l];
      if (!any) continue;
      if (marked.count > kMostMarked - kWidth) repair(t, marked);
      for (int l = 0; l < lanes; ++l)
        if (near[l])
          marked.place[marked.count++] =
              static_cast<uint32_t>(i) << 16 | static_cast<uint32_t>(j + l);
    }
  }
}

}  // namespace shear::cpu::SHEAR_ISA
