// The part of a plan that all backends share, decided on the host before any work: blocks of token
// costs, grouped into chunks whose workspace fits a budget. csrc/cpu/plan.h and csrc/cuda/plan.h
// plan the rest; Triton takes the tables of shear_ops._C.make_plan().
#pragma once
#include <cstdint>
#include <vector>

#include "columns.h"
#include "problem.h"
#include "rounding.h"

namespace shear {

// Token costs of consecutive spans of a correct rollout (rows) against those of an incorrect one
// (columns): first span and number of spans, first token and number of tokens of either; floats
// from one row of costs to the next (ld); where the block's token costs, its row windows
// (row_tokens, col_spans) and its pairs (row_spans, col_spans) begin among those of the chunk, and
// the int8 rows of its first tokens.
// clang-format off
#define SHEAR_BLOCK_COLUMNS(X)                                   \
  X(group)                                                       \
  X(row_span) X(row_spans) X(col_span) X(col_spans)              \
  X(row_token) X(row_tokens) X(col_token) X(col_tokens) X(ld)    \
  X(cost_offset) X(row_offset) X(pair_offset) X(row_place) X(col_place)
// clang-format on

struct Block {
  SHEAR_BLOCK_COLUMNS(SHEAR_FIELD)

  int64_t pairs() const { return row_spans * col_spans; }
  // Of the spans row_span + a and col_span + b, among the chunk's pairs.
  int64_t pair(int64_t a, int64_t b) const { return pair_offset + a * col_spans + b; }
};

// Consecutive tokens of one group whose int8 rows (csrc/rounding.h) a chunk has, from `place` on.
#define SHEAR_STRETCH_COLUMNS(X) X(group) X(token) X(tokens) X(place)

struct Stretch {
  SHEAR_STRETCH_COLUMNS(SHEAR_FIELD)
};

// Blocks whose token costs are in memory at the same time, and the sizes of that memory.
struct Chunk {
  std::vector<Block> blocks;
  std::vector<Stretch> stretches;  // of the blocks' rows and columns
  int64_t places = 0;              // rows of the stretches
  int64_t cost_floats = 0;
  int64_t row_floats = 0;
  int64_t pairs = 0;
};

struct Chunks {
  std::vector<Chunk> chunks;
  int64_t pairs = 0;        // span pairs of all chunks
  int64_t token_pairs = 0;  // token costs of all chunks
  int64_t peak_bytes = 0;   // of room for any chunk
};

// What one chunk may take, and what a span pair takes of it.
struct Budget {
  int64_t chunk_bytes, bytes_per_pair;
};
// A GPU wants queues long enough that waiting for the last pairs does not count.
#ifndef SHEAR_DEVICE_CHUNK_BYTES  // tests set fewer
#define SHEAR_DEVICE_CHUNK_BYTES (int64_t{768} << 20)
#endif
constexpr int64_t kDeviceChunkBytes = SHEAR_DEVICE_CHUNK_BYTES;

constexpr int64_t kMostBlocks = int64_t{1} << 23;  // of a plan, about

constexpr int64_t kCostPad = 16;  // floats: rows of costs start on a cache line

// row_bytes: of an int8 row, 0 for none. Throws std::invalid_argument on more blocks than
// kMostBlocks.
Chunks make_chunks(const Problem& problem, const Config& config, int64_t row_bytes,
                   const Budget& budget);

}  // namespace shear
