#include "cuda/plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/tiles.h"
#include "rounding.h"
#include "spans.h"

namespace shear::cuda {
namespace {

// Of a pair: value, residual, iterations, order.
constexpr Budget kBudget{.chunk_bytes = kDeviceChunkBytes, .bytes_per_pair = 16};
// Of the pairs that get a second look together: thousands of the paper's.
constexpr int64_t kLookBytes = std::min(kBudget.chunk_bytes, int64_t{128} << 20);
constexpr int64_t kScratchBytes = int64_t{96} << 20;  // where K of wide pairs is in global memory

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// To a field of the tables.
int32_t narrow(int64_t value) { return static_cast<int32_t>(value); }

// Sets the section's offset and goes on behind it.
template <typename T>
void place(int64_t* section, int64_t count, int64_t* bytes) {
  *section = *bytes;
  *bytes = ceil_div(*bytes + count * static_cast<int64_t>(sizeof(T)), 256) * 256;
}

template <typename Tile>
SolverPlan in_registers(Solver solver, int64_t pairs, const Device& device) {
  return {.solver = solver,
          .grid = {.ctas = std::min(pairs, device.processors * Tile::kCtas),
                   .threads = Tile::kThreads,
                   .shared_bytes = 4 * Tile::kSharedFloats}};
}

template <typename Shape>
int64_t tiles_of_block(const Block& block) {
  return ceil_div(block.row_tokens, Shape::kRows) * ceil_div(block.col_tokens, Shape::kCols);
}

// Large tiles read half as much per product; small ones waste less on small rollouts.
bool prefers_large_tiles(const Chunks& plan) {
  int64_t large = 0, small = 0;
  for (const Chunk& chunk : plan.chunks)
    for (const Block& block : chunk.blocks) {
      large += 2 * tiles_of_block<LargeCostTile>(block);
      small += tiles_of_block<SmallCostTile>(block);
    }
  return 100 * large <= 115 * small;
}

void append_rollouts(const Problem& problem, DevicePlan* out) {
  std::vector<int32_t> correct(problem.rollouts.size());
  for (const Group& group : problem.groups) {
    const int32_t first = narrow(out->members.size());
    for (const int64_t i : group.correct) correct[i] = 1;
    for (const auto* side : {&group.correct, &group.incorrect})
      out->members.insert(out->members.end(), side->begin(), side->end());
    out->groups.push_back({.member_begin = first, .member_end = narrow(out->members.size())});
  }
  int64_t looks = 0;
  for (size_t i = 0; i < problem.rollouts.size(); ++i) {
    const Rollout& rollout = problem.rollouts[i];
    out->rollouts.push_back({.begin = rollout.begin,
                             .end = rollout.end,
                             .span_begin = narrow(rollout.span_begin),
                             .spans = narrow(rollout.spans()),
                             .group = narrow(rollout.group),
                             .correct = correct[i],
                             .tile_begin = narrow(out->span_tiles),
                             .look_begin = narrow(looks)});
    if (rollout.group >= 0) looks += rollout.spans();
    out->span_tiles += ceil_div(rollout.spans(), kSpansPerCta);
  }
}

// Returns the floats of the largest chunk's column minima.
int64_t append_chunks(DevicePlan* out) {
  int64_t most = 0;
  for (const Chunk& chunk : out->plan.chunks) {
    DeviceChunk sizes{.block_begin = static_cast<int64_t>(out->blocks.size()),
                      .blocks = static_cast<int64_t>(chunk.blocks.size()),
                      .cost_tiles = 0,
                      .strips = 0,
                      .bound_rows = 0,
                      .pairs = chunk.pairs,
                      .stretch_begin = static_cast<int64_t>(out->stretches.size()),
                      .stretches = static_cast<int64_t>(chunk.stretches.size()),
                      .places = chunk.places};
    for (const Stretch& stretch : chunk.stretches)
      out->stretches.push_back(
          {.token = stretch.token, .place = narrow(stretch.place), .group = narrow(stretch.group)});
    int64_t minima = 0;
    for (const Block& block : chunk.blocks) {
      const int64_t strips = ceil_div(block.row_tokens, out->strip);
      out->blocks.push_back({.row_token = block.row_token,
                             .col_token = block.col_token,
                             .cost_offset = block.cost_offset,
                             .window_offset = block.row_offset,
                             .minima_offset = minima,
                             .pair_offset = block.pair_offset,
                             .row_tokens = narrow(block.row_tokens),
                             .col_tokens = narrow(block.col_tokens),
                             .row_span = narrow(block.row_span),
                             .row_spans = narrow(block.row_spans),
                             .col_span = narrow(block.col_span),
                             .col_spans = narrow(block.col_spans),
                             .ld = narrow(block.ld),
                             .group = narrow(block.group),
                             .row_place = narrow(block.row_place),
                             .col_place = narrow(block.col_place),
                             .tile_begin = narrow(sizes.cost_tiles),
                             .strip_begin = narrow(sizes.strips),
                             .bound_begin = narrow(sizes.bound_rows)});
      sizes.cost_tiles += out->large_tiles ? tiles_of_block<LargeCostTile>(block)
                                           : tiles_of_block<SmallCostTile>(block);
      sizes.strips += strips;
      sizes.bound_rows += block.row_spans * ceil_div(block.col_spans, 32);
      if (out->column_minima) minima += strips * block.ld;
    }
    most = std::max(most, minima);
    out->chunks.push_back(sizes);
  }
  return most;
}

// For spans of at most (rows, cols) tokens.
SecondLook plan_second_look(int64_t rows, int64_t cols, const DevicePlan& plan) {
  SecondLook out;
  for (const DeviceRollout& rollout : plan.rollouts)
    if (rollout.group >= 0) out.spans += rollout.spans;
  if (out.spans == 0) return out;
  out.ld = ceil_div(cols, kCostPad) * kCostPad;
  out.strips = ceil_div(rows, plan.strip);
  out.cost_floats = rows * out.ld;
  out.window_floats = rows;
  if (plan.column_minima) out.minima_floats = out.strips * out.ld;
  out.cost_tiles = ceil_div(rows, SmallCostTile::kRows) * ceil_div(cols, SmallCostTile::kCols);
  const int64_t bytes = 4 * (out.cost_floats + out.window_floats + out.minima_floats) +
                        kBudget.bytes_per_pair + static_cast<int64_t>(sizeof(DeviceBlock));
  out.batch = std::clamp<int64_t>(kLookBytes / bytes, 1, out.spans);
  return out;
}

// A bit per dimension.
std::vector<uint32_t> signs_of_row(int64_t depth) {
  std::vector<uint32_t> out(depth / 32);
  for (int64_t k = 0; k < depth; ++k)
    out[k / 32] |= sign_of_dimension(static_cast<uint32_t>(k)) >> 31 << k % 32;
  return out;
}

}  // namespace

SolverPlan plan_solver(int64_t longest, int64_t rows, int64_t cols, int64_t pairs,
                       const Device& device) {
  if (std::max(rows, cols) > kLongestSpan)
    throw std::invalid_argument("span must be at most " + std::to_string(kLongestSpan) +
                                " for backend 'cuda', got a pair of " + std::to_string(rows) +
                                " and " + std::to_string(cols) +
                                " tokens: lower span, or use backend 'cpu'");
  if (longest <= Solver32::kCols) return in_registers<Solver32>(Solver::k32, pairs, device);
  if (longest <= Solver64::kCols) return in_registers<Solver64>(Solver::k64, pairs, device);
  if (longest <= Solver100::kCols) return in_registers<Solver100>(Solver::k100, pairs, device);
  if (longest <= Solver128::kCols) return in_registers<Solver128>(Solver::k128, pairs, device);
  SolverPlan out{.solver = Solver::kWide,
                 .grid = {.ctas = std::min(pairs, device.processors),
                          .threads = kWideThreads,
                          .shared_bytes = 4 * wide_shared_floats(rows, cols)}};
  if (out.grid.shared_bytes + 4 * rows * cols <= device.shared_bytes) {
    out.grid.shared_bytes += 4 * rows * cols;
  } else {
    out.scratch_floats = ceil_div(rows * cols, 64) * 64;
    out.grid.ctas =
        std::min(out.grid.ctas, std::max<int64_t>(1, kScratchBytes / (4 * out.scratch_floats)));
  }
  return out;
}

DevicePlan make_device_plan(const Problem& problem, const Config& config, int64_t dim,
                            const Device& device) {
  DevicePlan out{};
  out.row_bytes = row_bytes(config, dim);
  out.plan = make_chunks(problem, config, out.row_bytes, kBudget);
  out.column_minima = config.stride >= kLeastStrip;
  out.strip = std::max(config.stride, kLeastStrip);
  out.large_tiles = prefers_large_tiles(out.plan);
  append_rollouts(problem, &out);
  int64_t minima = append_chunks(&out);

  int64_t costs = 0, windows = 0, pairs = 0, places = 0;
  for (const Chunk& chunk : out.plan.chunks) {
    costs = std::max(costs, chunk.cost_floats);
    windows = std::max(windows, chunk.row_floats);
    pairs = std::max(pairs, chunk.pairs);
    places = std::max(places, chunk.places);
  }
  if (config.distance == Distance::kSinkhorn && pairs > 0) {
    int64_t rows = 0, cols = 0;
    for (const Span& span : problem.spans) {
      const int64_t group = problem.rollouts[span.rollout].group;
      if (group < 0) continue;
      int64_t& most = out.rollouts[span.rollout].correct ? rows : cols;
      most = std::max(most, span.size());
    }
    out.solver = plan_solver(longest_span(INT32_MAX, config.span), rows, cols, pairs, device);
    if (out.row_bytes > 0) out.look = plan_second_look(rows, cols, out);
  }

  Workspace& w = out.workspace;
  const auto spans = static_cast<int64_t>(problem.spans.size());
  const auto batch = static_cast<int64_t>(problem.rollouts.size());
  const auto groups = static_cast<int64_t>(problem.groups.size());
  const bool rounded = out.row_bytes > 0;
  if (rounded) {
    out.signs = signs_of_row(out.row_bytes);
    // 64-bit integers, which are gone when the first costs are written
    costs = std::max(costs, 2 * groups * (kExponents + out.row_bytes));
    costs = std::max(costs, out.look.batch * out.look.cost_floats);
    windows = std::max(windows, out.look.batch * out.look.window_floats);
    minima = std::max(minima, out.look.batch * out.look.minima_floats);
    pairs = std::max(pairs, out.look.batch);
  }
  place<DeviceRollout>(&w.rollouts, batch, &w.bytes);
  place<DeviceGroup>(&w.groups, groups, &w.bytes);
  place<int32_t>(&w.members, static_cast<int64_t>(out.members.size()), &w.bytes);
  place<DeviceBlock>(&w.blocks, static_cast<int64_t>(out.blocks.size()), &w.bytes);
  place<DeviceStretch>(&w.stretches, static_cast<int64_t>(out.stretches.size()), &w.bytes);
  place<uint32_t>(&w.signs, static_cast<int64_t>(out.signs.size()), &w.bytes);
  w.tables = w.bytes;
  place<char>(&w.counters, kCounterBytes, &w.bytes);
  place<DeviceSpan>(&w.spans, spans, &w.bytes);
  place<float>(&w.norm, problem.tokens, &w.bytes);
  place<float>(&w.sq_norm, problem.tokens, &w.bytes);
  place<uint8_t>(&w.exponent, rounded ? problem.tokens : 0, &w.bytes);
  place<double>(&w.rollout_norm, batch, &w.bytes);
  place<double>(&w.group_norm, groups, &w.bytes);
  place<uint32_t>(&w.best, spans, &w.bytes);
  place<uint64_t>(&w.seed, spans, &w.bytes);
  place<DeviceNearest>(&w.nearest, spans, &w.bytes);
  place<DeviceCenter>(&w.centers, rounded ? groups : 0, &w.bytes);
  place<float>(&w.center, groups * out.row_bytes, &w.bytes);
  place<uint32_t>(&w.shows, rounded ? groups + 1 : 0, &w.bytes);
  place<int8_t>(&w.row, places * out.row_bytes, &w.bytes);
  place<float>(&w.scale, places, &w.bytes);
  place<float>(&w.row_sq_norm, places, &w.bytes);
  place<char>(&w.look_counters, rounded ? kCounterBytes : 0, &w.bytes);
  place<DeviceBlock>(&w.look_blocks, out.look.batch, &w.bytes);
  place<float>(&w.costs, costs, &w.bytes);
  w.tally = w.costs;
  place<float>(&w.windows, windows, &w.bytes);
  place<float>(&w.minima, minima, &w.bytes);
  place<float>(&w.value, pairs, &w.bytes);
  place<float>(&w.residual, pairs, &w.bytes);
  place<int32_t>(&w.iterations, pairs, &w.bytes);
  place<uint32_t>(&w.order, pairs, &w.bytes);
  place<char>(&w.scratch, out.solver.scratch_bytes(), &w.bytes);
  return out;
}

}  // namespace shear::cuda
