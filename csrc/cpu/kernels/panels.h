// Panels of a blocked product in 32-bit words: packed transposes of rows, and the tile of sums that
// is in registers. Included once per instruction set, like simd.h.
#pragma once
#include "cpu/kernels/simd.h"

namespace shear::cpu::SHEAR_ISA {

// Writes the transpose of kWidth or more rows of `depth` words, `stride` apart, as a panel (depth,
// kColumns). Takes whole squares of kWidth, so it may write up to kWidth words beyond the panel.
template <int kColumns>
void pack_panel(const float* rows, int64_t stride, int64_t depth, float* panel) {
  for (int64_t k = 0; k < depth; k += kWidth)
    for (int64_t c = 0; c < kColumns; c += kWidth) {
      Vec square[kWidth];
      for (int i = 0; i < kWidth; ++i) square[i] = load(rows + (c + i) * stride + k);
      transpose(square);
      for (int i = 0; i < kWidth; ++i) store(panel + (k + i) * kColumns + c, square[i]);
    }
}

// out (rows, cols) = sums, added to what is there if asked. V: Vec or VecI; both are words.
template <int kRows, int kVectors, typename V>
void store_tile(const V (&sums)[kRows][kVectors], bool accumulate, float* out, int64_t ld,
                int64_t rows, int64_t cols) {
  constexpr int kCols = kVectors * kWidth;
  float corner[kRows * kCols];  // a tile that reaches beyond the last row or column
  const bool whole = rows == kRows && cols == kCols;
  float* to = whole ? out : corner;
  const int64_t step = whole ? ld : kCols;
  if (!whole && accumulate)
    for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(corner + r * kCols, out + r * ld, 4 * cols);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < kVectors; ++c) {
      float* p = to + r * step + c * kWidth;
      store(p, accumulate ? (Vec)((V)load(p) + sums[r][c]) : (Vec)sums[r][c]);
    }
  if (!whole)
    for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(out + r * ld, corner + r * kCols, 4 * cols);
}

}  // namespace shear::cpu::SHEAR_ISA
