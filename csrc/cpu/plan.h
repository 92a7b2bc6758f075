// What a call on the CPU will do and allocate. Reachable from Python through shear_ops.plan().
#pragma once
#include <cstdint>

#include "chunks.h"
#include "problem.h"

namespace shear::cpu {

struct Plan {
  int64_t row_bytes = 0;  // of an int8 row; 0: states are not rounded
  Chunks chunks;
  int64_t scratch_floats = 0;   // of each thread
  int64_t workspace_bytes = 0;  // peak, beyond the tensors the call returns
};

// Chunks small enough that their pages are soon used again, large enough for many threads. Of a
// pair: value, residual, iterations, place in the queue and among the best, excess.
constexpr Budget kBudget{int64_t{256} << 20, 24};

// Rows that a tile may read beyond those it has.
constexpr int64_t kRowSlack = 64;

Plan make_plan(const Problem& problem, const Config& config, int64_t dim, int64_t threads);

// Tokens of one task of token costs, and dimensions taken at a time: a panel of all rows stays in
// the second-level cache. Its scratch, with room for the columns at hand and for the last square of
// a panel, which is written whole: csrc/cpu/kernels/token_cost.cpp and token_cost_int8.cpp.
constexpr int64_t kTileRows = 384, kTileCols = 768, kTileDepth = 384;
constexpr int64_t kWidest = 16;  // floats of a vector
constexpr int64_t kPanelFloats = (kTileRows + 6 * kWidest) * kTileDepth + kWidest + kTileRows;

}  // namespace shear::cpu
