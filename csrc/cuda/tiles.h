// Shapes of the kernels' tiles, known at compile time: host code plans with them, kernels are
// instantiated with them.
#pragma once
#include <cstdint>

namespace shear::cuda {

// A span pair in the registers of a CTA. A warp has 8 x 4 lanes; a lane holds kThreadRows x
// kThreadCols entries of the pair: rows 8 apart and columns 4 apart.
template <int kWarps_, int kThreadRows_, int kThreadCols_, int kCtas_>
struct SolverTile {
  static constexpr int kWarps = kWarps_, kThreadRows = kThreadRows_, kThreadCols = kThreadCols_;
  static constexpr int kCtas = kCtas_;  // of one multiprocessor, which the registers allow for
  static constexpr int kRowLanes = 8, kColLanes = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = kWarps * kRowLanes * kThreadRows;
  static constexpr int kCols = kColLanes * kThreadCols;
  // Rows of costs in shared memory: 8 rows x 4 columns lie in 32 different banks.
  static constexpr int kPitch = kCols + (4 - kCols % 32 + 32) % 32;
  // Sums over the rows of a lane, one line per row lane: kColLanes runs of kSlots, of which one
  // beyond the columns carries the residual. An odd multiple of 4: no bank conflicts.
  static constexpr int kPartials = kWarps * kRowLanes;
  static constexpr int kSlots = (kThreadCols + 4) / 8 * 8 + 4;
  static constexpr int kLine = kColLanes * kSlots;
  static constexpr int kRoom = 8;  // for sums over the CTA and three numbers more
  static constexpr int kSharedFloats =
      kRows * kPitch + kPartials * kLine + 2 * kLine + kRows + kRoom;
  static_assert(kSlots > kThreadCols && kLine <= 2 * kThreads && kRoom > kWarps + 2);
};

// By the longest span: 7 x 25 entries of a lane leave room for two scalings and nothing else, and
// are the paper's span of 100 exactly.
using Solver32 = SolverTile<1, 4, 8, 16>;
using Solver64 = SolverTile<2, 4, 16, 6>;
using Solver100 = SolverTile<2, 7, 25, 4>;
using Solver128 = SolverTile<4, 4, 32, 2>;

constexpr int kWideThreads = 256, kWideRoom = 32;
constexpr int64_t kLongestSpan = 4096;
// Potentials and scalings of a pair that is not in registers.
constexpr int64_t wide_shared_floats(int64_t n, int64_t m) { return 2 * (n + m) + kWideRoom; }

// A tile of token costs: warps of 64 x 64 entries, 64 bytes of every token at a time.
template <int kRowWarps_, int kColWarps_>
struct CostTileShape {
  static constexpr int kRowWarps = kRowWarps_, kColWarps = kColWarps_;
  static constexpr int kThreads = 32 * kRowWarps * kColWarps;
  static constexpr int kRows = 64 * kRowWarps, kCols = 64 * kColWarps;
  static constexpr int kStages = 4, kRowBytes = 64;
  static constexpr int kStageBytes = (kRows + kCols) * kRowBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // Whether warps beyond the block do not multiply: a branch in the loop that only small blocks are
  // worth.
  static constexpr bool kIdleWarps = kRowWarps * kColWarps <= 4;
};
using LargeCostTile = CostTileShape<4, 2>;
using SmallCostTile = CostTileShape<2, 2>;

// At most, of any kernel: a CTA's static and dynamic shared memory share the device's limit.
constexpr int64_t kStaticSharedBytes = 256;

constexpr int kThreads = 256;     // of the kernels without a tile
constexpr int kSpansPerCta = 32;  // whose nearest spans one CTA finds
constexpr int kBuckets = 64;      // of the queue of pairs, best first
// Rows of a strip, over which column minima are stored: the stride, if it is worth it.
constexpr int64_t kLeastStrip = 8;

}  // namespace shear::cuda
