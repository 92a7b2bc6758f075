// One span pair, or one problem of a batch, as the solver sees it.
#pragma once
#include "cuda/plan.h"
#include "cuda/threads.cuh"

namespace shear::cuda {

// Span pairs of a chunk (blocks not null), or a batch of n x m problems.
struct PairTable {
  const DeviceBlock* blocks;
  int32_t n_blocks;
  const DeviceSpan* spans;
  const double* group_norm;
  const float* costs;
  double reg;
  bool reg_is_cost;
  int64_t n, m;
  const int64_t *n_rows, *n_cols;
};

struct Pair {
  const float* cost;  // (n, m), row stride ld
  int64_t ld;
  int n, m;
  int row_span, col_span;
  float eps;
};

__device__ __forceinline__ const DeviceBlock& block_of_pair(const DeviceBlock* blocks, int count,
                                                            int64_t p) {
  return blocks[last_not_after(count, p, [&](int i) { return blocks[i].pair_offset; })];
}

__device__ __forceinline__ Pair pair_at(const PairTable& table, int64_t p) {
  Pair pair;
  if (!table.blocks) {
    pair.cost = table.costs + p * table.n * table.m;
    pair.ld = table.m;
    pair.n = static_cast<int>(table.n_rows[p]);
    pair.m = static_cast<int>(table.n_cols[p]);
    pair.row_span = pair.col_span = 0;
    pair.eps = static_cast<float>(table.reg);
    return pair;
  }
  const DeviceBlock& block = block_of_pair(table.blocks, table.n_blocks, p);
  const int at = static_cast<int>(p - block.pair_offset);
  pair.row_span = block.row_span + at / block.col_spans;
  pair.col_span = block.col_span + at % block.col_spans;
  const DeviceSpan row = table.spans[pair.row_span], col = table.spans[pair.col_span];
  pair.cost = table.costs + block.cost_offset + (row.begin - block.row_token) * block.ld +
              (col.begin - block.col_token);
  pair.ld = block.ld;
  pair.n = row.size;
  pair.m = col.size;
  pair.eps =
      static_cast<float>(table.reg_is_cost ? table.reg : table.reg * table.group_norm[block.group]);
  return pair;
}

}  // namespace shear::cuda
