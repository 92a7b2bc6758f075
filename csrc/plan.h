// What a call will do and allocate, decided on the host before any work: blocks of token costs
// grouped into chunks whose workspace fits a budget. Reachable from Python through
// shear_ops.plan().
#pragma once
#include <cstdint>
#include <vector>

#include "problem.h"

namespace shear {

// Token costs of consecutive spans of a correct rollout (rows) against those of an incorrect one
// (columns).
struct Block {
  int64_t group;
  int64_t row_span, row_spans;  // first span, number of spans
  int64_t col_span, col_spans;
  int64_t row_token, row_tokens;  // first token, number of tokens
  int64_t col_token, col_tokens;
  int64_t ld;           // floats from one row of costs to the next
  int64_t cost_offset;  // floats into the chunk's token costs
  int64_t row_offset;   // floats into the chunk's row windows, (row_tokens, col_spans)
  int64_t pair_offset;  // into the chunk's pairs, (row_spans, col_spans)

  int64_t pairs() const { return row_spans * col_spans; }
};

struct Chunk {
  std::vector<Block> blocks;
  int64_t cost_floats = 0;
  int64_t row_floats = 0;
  int64_t pairs = 0;
};

struct Plan {
  std::vector<Chunk> chunks;
  int64_t pairs = 0;            // span pairs of all chunks
  int64_t token_pairs = 0;      // token costs of all chunks
  int64_t scratch_floats = 0;   // of each thread
  int64_t workspace_bytes = 0;  // peak, beyond the tensors the call returns
};

constexpr int64_t kCostPad = 16;  // floats: rows of costs start on a cache line
constexpr int64_t kRowPad = 8;    // rows of a pair are solved in groups

// What one chunk may take, and what a span pair takes of it.
struct Budget {
  int64_t chunk_bytes, bytes_per_pair;
};
// Small enough that the pages of a chunk are soon used again, large enough for many threads. Of a
// pair: value, residual, iterations, place in the queue and among the best, excess.
constexpr Budget kCpuBudget{int64_t{256} << 20, 24};
// A GPU wants queues long enough that waiting for the last pairs does not count.
#ifndef SHEAR_DEVICE_CHUNK_BYTES  // tests set fewer
#define SHEAR_DEVICE_CHUNK_BYTES (int64_t{768} << 20)
#endif
constexpr int64_t kDeviceChunkBytes = SHEAR_DEVICE_CHUNK_BYTES;

Plan make_plan(const Problem& problem, const Config& config, int64_t dim, int64_t threads,
               const Budget& budget);

// Floats of scratch that solving one pair of an n-token and an m-token span takes.
int64_t sinkhorn_scratch_floats(int64_t n, int64_t m);

// Tokens of one task of token costs, and dimensions taken at a time: a panel of all rows stays in
// the second-level cache. Its scratch, with room for the columns at hand and for the last square of
// a panel, which is written whole: csrc/cpu/token_cost.cpp.
constexpr int64_t kTileRows = 384, kTileCols = 768, kTileDepth = 384;
constexpr int64_t kWidest = 16;  // floats of a vector
constexpr int64_t kPanelFloats = (kTileRows + 6 * kWidest) * kTileDepth + kWidest;

}  // namespace shear
