// Numbers that kernels of several files agree on.
#pragma once
#include <cstdint>

namespace shear::cuda {

constexpr float kInfinity = __builtin_huge_valf();

// iterations of a pair: not yet solved, and not yet solved but in the queue of seeds
constexpr int32_t kUntried = -1, kSeed = -2;
// What became of the pairs of a call, in the order of the output `pairs`.
enum Count : int { kTotal, kBounded, kAbandoned, kSolved, kStopped, kCounts };

}  // namespace shear::cuda
