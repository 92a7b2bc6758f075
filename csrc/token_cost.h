// What the token costs of the backends share: ||x - y|| from ||x||^2 + ||y||^2 - 2<x, y>, where the
// product of hidden states is not to lose more than float32 can spare.
#pragma once

namespace shear {

// Below this share of ||x||^2 + ||y||^2 cancellation eats the result, and these small costs are
// what a minimum picks: such entries are computed again from the differences of the states.
constexpr float kNearDuplicate = 0x1p-7f;
// The same of int8 rows (csrc/rounding.h), which lose more: docs/numerics.md has the measurements.
constexpr float kNearRounded = 0x1p-4f;

// Norms that float32 has room for. Below kMostNorm no sum of squares of centred states overflows:
// 8 kMostNorm^2 = 2^127. From a mean norm of kLeastNorm on, the squared differences of states that
// are 1e-3 of the norm apart are normal numbers, dimension by dimension up to thousands of them.
constexpr float kMostNorm = 0x1p62f;
constexpr double kLeastNorm = 0x1p-46;
// The norm of a state that is not zero, although its squares all are.
constexpr float kFaintNorm = 0x1p-63f;

}  // namespace shear
