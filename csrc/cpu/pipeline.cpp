#include "cpu/pipeline.h"

#include <algorithm>
#include <limits>

#include "cpu/tiles.h"
#include "stage.h"
#include "warn.h"

namespace shear::cpu {

namespace {

constexpr uint32_t kNothing = 0x7f800000u;  // bits of +inf

Nearest nothing_found() { return {.distance = std::numeric_limits<float>::infinity(), .span = -1}; }

}  // namespace

Pipeline::Pipeline(const States& states, const Problem& problem, const Config& config)
    : states_(states),
      problem_(problem),
      config_(config),
      kernels_(kernels()),
      plan_(make_plan(problem, config, states.dim, threads())),
      workers_(plan_.scratch_floats),
      nearest_(problem.spans.size(), nothing_found()) {
  measure_norms();
}

// From int8 rows if there are any; all in one task.
void Pipeline::costs_of(const CostTile& whole) const {
  for (const Tile& part : tiles_of(whole.rows, whole.cols)) {
    CostTile tile = whole;
    tile.row += part.row;
    tile.rows = part.rows;
    tile.col += part.col;
    tile.cols = part.cols;
    tile.row_rows = rows_from(whole.row_rows, part.row);
    tile.col_rows = rows_from(whole.col_rows, part.col);
    tile.out += part.row * whole.ld + part.col;
    (tile.row_rows.row ? kernels_.token_cost_int8 : kernels_.token_cost)(tile);
  }
}

void Pipeline::token_costs(const Chunk& chunk, const Rows& rows, float* costs) const {
  const Stage stage("shear::token_costs");
  const auto tasks = tiles_of(
      chunk, [](const Block& block) { return std::pair(block.row_tokens, block.col_tokens); });
  workers_.run(static_cast<int64_t>(tasks.size()), [&](int64_t task, float* scratch) {
    const Block& block = *tasks[task].block;
    const Tile& tile = tasks[task].tile;
    if (!has_scale(block.group)) return;
    costs_of({.states = states_,
              .row = block.row_token + tile.row,
              .rows = tile.rows,
              .col = block.col_token + tile.col,
              .cols = tile.cols,
              .center = &center_[block.group * states_.dim],
              .sq_norm = sq_norm_.data(),
              .row_rows = rows_from(rows, block.row_place + tile.row),
              .col_rows = rows_from(rows, block.col_place + tile.col),
              .out = costs + block.cost_offset + tile.row * block.ld + tile.col,
              .ld = block.ld,
              .scratch = scratch});
  });
}

void Pipeline::run(float* matrix) {
  counts_ = {.total = plan_.chunks.pairs};
  best_.assign(problem_.spans.size(), kNothing);
  if (config_.distance == Distance::kCosine)
    span_means();
  else
    center_groups();
  if (config_.distance == Distance::kMmd) self_similarities();
  look(nullptr, matrix);
  if (plan_.row_bytes > 0) look_exactly(look_again());
  finish_means();
  warn_of_stopped(counts_.stopped, counts_.solved, config_.n_iters);
}

// The groups whose rounding showed, once more from float32 products. Counts of pairs stay those of
// the first look, but for what is stopped.
void Pipeline::look_exactly(const std::vector<char>& groups) {
  if (std::find(groups.begin(), groups.end(), 1) == groups.end()) return;
  for (size_t s = 0; s < problem_.spans.size(); ++s) {
    const int64_t group = problem_.rollouts[problem_.spans[s].rollout].group;
    if (group < 0 || !groups[group]) continue;
    best_[s] = kNothing;
    nearest_[s] = nothing_found();
  }
  PairCounts counts = counts_;
  look(&groups, nullptr);
  counts.stopped = counts_.stopped;
  counts_ = counts;
}

void Pipeline::int8_rows(int8_t* rows, float* scale, float* center) {
  center_groups();
  const RowBuffer rounded(plan_.row_bytes, problem_.tokens);
  round_states({{.group = 0, .token = 0, .tokens = problem_.tokens, .place = 0}}, rounded.rows());
  std::copy_n(rounded.rows().row, problem_.tokens * plan_.row_bytes, rows);
  std::copy_n(rounded.rows().scale, problem_.tokens, scale);
  std::copy(center_.begin(), center_.end(), center);
}

// groups: which are looked at, from float32 products; null: all, from int8 rows if there are any.
void Pipeline::look(const std::vector<char>* groups, float* matrix) {
  int64_t cost_floats = 0, row_floats = 0, places = 0;
  for (const Chunk& chunk : plan_.chunks.chunks) {
    cost_floats = std::max(cost_floats, chunk.cost_floats);
    row_floats = std::max(row_floats, chunk.row_floats);
    places = std::max(places, chunk.places);
  }
  const RowBuffer rounded(groups ? 0 : plan_.row_bytes, places);
  const Buffer costs = make_buffer(cost_floats), windows = make_buffer(row_floats);
  Chunk some;
  for (const Chunk& planned : plan_.chunks.chunks) {
    if (groups) {
      some = planned;
      some.stretches.clear();
      std::erase_if(some.blocks, [&](const Block& block) { return !(*groups)[block.group]; });
      if (some.blocks.empty()) continue;
    }
    const Chunk& chunk = groups ? some : planned;
    Pairs pairs(chunk.pairs);
    if (config_.distance == Distance::kCosine) {
      cosine_distances(chunk, pairs.value.data());
    } else {
      round_states(chunk.stretches, rounded.rows());
      token_costs(chunk, rounded.rows(), costs.get());
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
}

void Pipeline::copy_distances(const Chunk& chunk, const Pairs& pairs, float* matrix) const {
  const int64_t rows = problem_.rollouts[0].span_end, cols = problem_.rollouts[1].spans();
  for (const Block& block : chunk.blocks)
    for (int64_t a = 0; a < block.row_spans; ++a)
      std::copy_n(&pairs.value[block.pair(a, 0)], block.col_spans,
                  matrix + (block.row_span + a) * cols + block.col_span - rows);
}

}  // namespace shear::cpu
