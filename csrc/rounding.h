// How hidden states are rounded to int8 before they are multiplied: one rule for all backends, so
// that their int8 rows are equal bit by bit, and with them the products, which int32 holds exactly
// in any order. src/shear_ops/triton/rounding.py has it a second time; docs/numerics.md says what
// the rounding costs.
//
// A state less its group's center is multiplied by a sign per dimension, rotated by a Hadamard
// transform in blocks of dimensions, which spreads an outlier over its block, and divided by its
// largest entry over kMostInt8. Sums and differences are taken in one order, products are not fused
// with them, and the center is a sum of integers.
//
// Rounded costs decide which spans are nearest. The distances that leave a call are of costs from a
// float32 product: those of the nearest spans get a second look.
#pragma once
#include <cstdint>

#include "problem.h"
#include "spans.h"

namespace shear {

// Dimensions of a row are padded to a multiple of the shorter block.
constexpr int64_t kShortBlock = 64, kLongBlock = 128;
// States of fewer dimensions are not rounded: their products are cheap, and rounding would show.
constexpr int64_t kLeastRoundedDim = 65;
// Nor are states of more: an int32 holds kMostInt8^2 times as many.
constexpr int64_t kMostRoundedDim = int64_t{1} << 17;
// Between spans of fewer tokens nothing averages the error of a cost.
constexpr int64_t kLeastRoundedSpan = 16;
// A second look that finds the distance of a nearest pair off by more, relative to the larger of it
// and eps, does not trust the first: all of the group is computed again from a float32 product.
constexpr float kMostRoundingError = 7e-4f;
SHEAR_HOST_DEVICE bool rounding_shows(float first_look, float second_look, float eps) {
  const float off = second_look > first_look ? second_look - first_look : first_look - second_look;
  return off / (second_look > eps ? second_look : eps) > kMostRoundingError;
}
constexpr int kMostInt8 = 127;
// A state whose rotated entries are all smaller is at the center: its row and its scale are 0.
constexpr float kLeastEntry = 0x1p-63f;

SHEAR_HOST_DEVICE int64_t rounded_depth(int64_t dim) {
  return (dim + kShortBlock - 1) / kShortBlock * kShortBlock;
}
SHEAR_HOST_DEVICE int64_t rotation_block(int64_t depth) {
  return depth % kLongBlock == 0 ? kLongBlock : kShortBlock;
}

// Bytes of a row, 0 where states are not rounded: only the nearest spans get a second look, so that
// where every distance counts there is none.
inline int64_t row_bytes(const Config& config, int64_t dim) {
  const bool rounded =
      dim >= kLeastRoundedDim && dim <= kMostRoundedDim && config.span >= kLeastRoundedSpan;
  return takes_second_look(config) && rounded ? rounded_depth(dim) : 0;
}

// Of a token: its row and scale.
inline int64_t rounded_bytes(int64_t row_bytes) { return row_bytes == 0 ? 0 : row_bytes + 4; }

// 0 or the sign bit of a float: signs without a pattern (the finalizer of MurmurHash3).
SHEAR_HOST_DEVICE uint32_t sign_of_dimension(uint32_t k) {
  k = (k ^ k >> 16) * 0x85ebca6bu;
  k = (k ^ k >> 13) * 0xc2b2ae35u;
  return (k ^ k >> 16) & 0x80000000u;
}

// What the largest entry of a row of q stands for, over kMostInt8: the length of a step.
SHEAR_HOST_DEVICE float step_of_row(float largest, int64_t block) {
  // 1 / (kMostInt8 sqrt(block))
  return largest * (block == kLongBlock ? 6.9597124e-4f : 9.8425197e-4f);
}

// The center of a group is the mean of the tokens without outliers (attention sinks have norms a
// hundred times the others'). What they are is read from the exponents of the tokens' largest
// entries: those beyond kCenterSpread binades above the median's are left out. Entries are counted
// in units of 2^(limit - kCenterBits), so that the sum is one of integers.
constexpr int kExponents = 256;  // biased, as in the bits of a float
constexpr int kCenterSpread = 3, kCenterBits = 20;
constexpr int kLeastLimit = 64;  // below, 2^-63, entries may count as 0

SHEAR_HOST_DEVICE int exponent_of(uint32_t bits) { return static_cast<int>(bits >> 23 & 0xffu); }
// The biased exponent that tokens of the mean stay below, from that of the median.
SHEAR_HOST_DEVICE int center_limit(int median) {
  const int limit = median + kCenterSpread;
  return limit < kLeastLimit ? kLeastLimit : limit;
}
// 2^(127 + kCenterBits - limit) and its inverse: entries to integers and back.
SHEAR_HOST_DEVICE int center_scale_exponent(int limit) { return 127 + kCenterBits - limit; }

}  // namespace shear
