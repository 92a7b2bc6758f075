#include "cpu/pipeline.h"

#include <algorithm>
#include <limits>

#include "cpu/tiles.h"
#include "stage.h"
#include "warn.h"

namespace shear::cpu {

Pipeline::Pipeline(const States& states, const Problem& problem, const Config& config)
    : states_(states),
      problem_(problem),
      config_(config),
      kernels_(kernels()),
      plan_(make_plan(problem, config, states.dim, threads())),
      workers_(plan_.scratch_floats),
      nearest_(problem.spans.size(),
               Nearest{.distance = std::numeric_limits<float>::infinity(), .span = -1}) {
  measure_norms();
}

void Pipeline::token_costs(const Chunk& chunk, float* costs) const {
  const Stage stage("shear::token_costs");
  const auto tasks = tiles_of(
      chunk, [](const Block& block) { return std::pair(block.row_tokens, block.col_tokens); });
  workers_.run(static_cast<int64_t>(tasks.size()), [&](int64_t task, float* scratch) {
    const Block& block = *tasks[task].block;
    const Tile& tile = tasks[task].tile;
    if (!has_scale(block.group)) return;
    kernels_.token_cost({.states = states_,
                         .row = block.row_token + tile.row,
                         .rows = tile.rows,
                         .col = block.col_token + tile.col,
                         .cols = tile.cols,
                         .center = center(block.group),
                         .sq_norm = sq_norm_.data(),
                         .out = costs + block.cost_offset + tile.row * block.ld + tile.col,
                         .ld = block.ld,
                         .scratch = scratch});
  });
}

void Pipeline::run(float* matrix) {
  counts_ = {.total = plan_.chunks.pairs};
  best_.assign(problem_.spans.size(), 0x7f800000u);  // +inf
  int64_t cost_floats = 0, row_floats = 0;
  for (const Chunk& chunk : plan_.chunks.chunks) {
    cost_floats = std::max(cost_floats, chunk.cost_floats);
    row_floats = std::max(row_floats, chunk.row_floats);
  }
  const Buffer costs = make_buffer(cost_floats), windows = make_buffer(row_floats);
  if (config_.distance == Distance::kCosine)
    span_means();
  else
    center_groups();
  if (config_.distance == Distance::kMmd) self_similarities();
  for (const Chunk& chunk : plan_.chunks.chunks) {
    Pairs pairs(chunk.pairs);
    if (config_.distance == Distance::kCosine) {
      cosine_distances(chunk, pairs.value.data());
    } else {
      token_costs(chunk, costs.get());
      row_windows(chunk, costs.get(), windows.get());
      bounds(chunk, costs.get(), windows.get(), pairs.value.data());
    }
    if (config_.distance == Distance::kSinkhorn)
      solve(chunk, costs.get(), pairs);
    else
      counts_.solved += chunk.pairs;
    collect(chunk, pairs);
    if (matrix) copy_distances(chunk, pairs, matrix);
  }
  finish_means();
  warn_of_stopped(counts_.stopped, counts_.solved, config_.n_iters);
}

void Pipeline::copy_distances(const Chunk& chunk, const Pairs& pairs, float* matrix) const {
  const int64_t rows = problem_.rollouts[0].span_end, cols = problem_.rollouts[1].spans();
  for (const Block& block : chunk.blocks)
    for (int64_t a = 0; a < block.row_spans; ++a)
      std::copy_n(&pairs.value[block.pair(a, 0)], block.col_spans,
                  matrix + (block.row_span + a) * cols + block.col_span - rows);
}

}  // namespace shear::cpu
