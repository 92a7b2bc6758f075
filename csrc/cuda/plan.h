// The plan of a call on a GPU: the chunks that all backends share, and what kernels need to find
// their work in them by themselves. Made on the host without a GPU; reachable through
// shear_ops._C.device_plan().
#pragma once
#include <cstdint>
#include <vector>

#include "chunks.h"
#include "problem.h"

namespace shear::cuda {

struct Device {
  int64_t processors;    // streaming multiprocessors
  int64_t shared_bytes;  // dynamic shared memory that a CTA can have
};

// The rows of the tables that a call copies to the GPU.
struct DeviceRollout {
  int64_t begin, end;  // tokens
  int32_t span_begin, spans;
  int32_t group;       // -1: no opposing set
  int32_t correct;     // its spans are rows of blocks
  int32_t tile_begin;  // kSpansPerCta spans each
  int32_t look_begin;  // spans with an opposing set before its own
};
struct DeviceGroup {
  int32_t member_begin, member_end;
};
struct DeviceBlock {
  int64_t row_token, col_token;
  int64_t cost_offset, window_offset, minima_offset;  // floats
  int64_t pair_offset;
  int32_t row_tokens, col_tokens;
  int32_t row_span, row_spans, col_span, col_spans;
  int32_t ld, group;
  int32_t row_place, col_place;  // int8 rows of its first tokens
  // position of its first tile of costs, strip of rows, and row of 32 pairs in the chunk
  int32_t tile_begin, strip_begin, bound_begin;
};
// Consecutive tokens whose int8 rows a chunk has, from `place` on.
struct DeviceStretch {
  int64_t token;
  int32_t place, group;
};
// The tokens that a group's center is the mean of: how many, and what their exponents stay below.
struct DeviceCenter {
  int64_t tokens;
  int32_t limit;
};
struct DeviceSpan {
  int64_t begin;
  int32_t size, rollout;
};
// What a span has found so far.
struct DeviceNearest {
  float distance, residual;
  int32_t iterations, span;
  double sum;
  int64_t count;
};

struct DeviceChunk {
  int64_t block_begin, blocks;
  int64_t cost_tiles, strips, bound_rows, pairs;
  int64_t stretch_begin, stretches, places;
};

// The second look at every span's nearest span: a block per span, all with the room of the longest
// spans, since the host does not know which they are.
struct SecondLook {
  int64_t spans = 0;  // with an opposing set; 0: no second look
  int64_t batch = 0;  // that are taken together
  int64_t ld = 0;     // of a block
  int64_t cost_floats = 0, window_floats = 0, minima_floats = 0;
  int64_t cost_tiles = 0, strips = 0;
};

// Of one launch.
struct Grid {
  int64_t ctas, threads;
  int64_t shared_bytes = 0;  // dynamic
};

// Solvers by the longest span: tiles.h. The choice follows the configuration alone, so that a
// pair's distance does not depend on the other rollouts of the call.
enum class Solver : int { k32, k64, k100, k128, kWide };

// The kernel of the pairs of one call or batch, and its persistent grid.
struct SolverPlan {
  Solver solver;
  Grid grid;
  int64_t scratch_floats = 0;  // of each CTA; 0: K is in shared memory or registers

  int64_t scratch_bytes() const { return 4 * grid.ctas * scratch_floats; }
};

// For pairs of at most (rows, cols) tokens, where spans may have `longest`. Throws
// std::invalid_argument on more than kLongestSpan tokens.
SolverPlan plan_solver(int64_t longest, int64_t rows, int64_t cols, int64_t pairs,
                       const Device& device);

// Byte offsets into the one allocation of a call.
struct Workspace {
  int64_t rollouts, groups, members, blocks;   // tables
  int64_t stretches, signs;                    // tables
  int64_t tables;                              // their bytes, from offset 0 on
  int64_t spans, norm, sq_norm, exponent;      // per span; per token
  int64_t rollout_norm, group_norm;            // means, double
  int64_t best, seed, nearest;                 // per span
  int64_t counters;                            // Counters of call.cuh
  int64_t centers, center;                     // per group; (groups, depth)
  int64_t shows;                               // (groups + 1)
  int64_t row, scale, row_sq_norm;             // int8 rows of the chunk at hand
  int64_t tally;                               // where costs are, before there are any
  int64_t look_counters, look_blocks;          // of the second look
  int64_t costs, windows, minima;              // of the chunk at hand
  int64_t value, residual, iterations, order;  // per pair of it
  int64_t scratch;                             // of the solver
  int64_t bytes;                               // in all
};

struct DevicePlan {
  Chunks plan;
  std::vector<DeviceRollout> rollouts;
  std::vector<DeviceGroup> groups;
  std::vector<int32_t> members;  // rollouts of the groups
  std::vector<DeviceBlock> blocks;
  std::vector<DeviceStretch> stretches;
  std::vector<DeviceChunk> chunks;
  int64_t row_bytes;            // of an int8 row; 0: states are not rounded
  std::vector<uint32_t> signs;  // a bit per dimension of a row
  SecondLook look;
  SolverPlan solver;
  bool large_tiles;
  int64_t strip;  // rows of a strip: the stride, or a number without column minima
  bool column_minima;
  int64_t span_tiles;  // kSpansPerCta spans of one rollout each
  Workspace workspace;
};

constexpr int64_t kCounterBytes = 1024;

DevicePlan make_device_plan(const Problem& problem, const Config& config, int64_t dim,
                            const Device& device);

}  // namespace shear::cuda
