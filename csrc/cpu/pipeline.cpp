#include "cpu/pipeline.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/tiles.h"
#include "stage.h"

namespace shear::cpu {
namespace {

constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kPairsPerTask = 8;
constexpr int64_t kTileSpans = 8;       // rows and columns of spans whose pairs are solved together
constexpr int64_t kBestFirstShare = 8;  // one pair in so many is solved best first

struct BlockTile {
  const Block* block;
  Tile tile;
};

template <typename Size>
std::vector<BlockTile> tasks_of(const Chunk& chunk, const Size& size) {
  std::vector<BlockTile> out;
  for (const Block& block : chunk.blocks) {
    const auto [rows, cols] = size(block);
    for (const Tile& tile : tiles_of(rows, cols)) out.push_back({&block, tile});
  }
  return out;
}

// The spans of a block's columns, relative to its first column.
std::vector<Window> windows_of(const Problem& problem, const Block& block) {
  std::vector<Window> windows(block.col_spans);
  for (int64_t b = 0; b < block.col_spans; ++b) {
    const Span& span = problem.spans[block.col_span + b];
    windows[b] = {span.begin - block.col_token, span.size()};
  }
  return windows;
}

void lower(uint32_t* best, float distance) {
  uint32_t bits;
  std::memcpy(&bits, &distance, sizeof bits);  // distances are >= 0: their bits have their order
  uint32_t seen = __atomic_load_n(best, __ATOMIC_RELAXED);
  while (bits < seen && !__atomic_compare_exchange_n(best, &seen, bits, true, __ATOMIC_RELAXED,
                                                     __ATOMIC_RELAXED)) {
  }
}

float as_float(const uint32_t* best) {
  const uint32_t bits = __atomic_load_n(best, __ATOMIC_RELAXED);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

struct Pipeline::Pairs {
  std::vector<float>
      value;  // bound, then span distance; a skipped or abandoned pair keeps its bound
  std::vector<float> residual;
  std::vector<int32_t> iterations;

  explicit Pairs(int64_t count) : value(count), residual(count), iterations(count) {}
};

Pipeline::Pipeline(const States& states, const Problem& problem, const Config& config)
    : states_(states),
      problem_(problem),
      config_(config),
      kernels_(kernels()),
      plan_(make_plan(problem, config, states.dim, threads(), kCpuBudget)),
      workers_(plan_.scratch_floats),
      nearest_(problem.spans.size(),
               Nearest{std::numeric_limits<float>::infinity(), 0.f, 0, -1, 0., 0}) {
  measure_norms();
}

void Pipeline::token_costs(const Chunk& chunk, float* costs) const {
  const Stage stage("shear::token_costs");
  const auto tasks = tasks_of(
      chunk, [](const Block& block) { return std::pair(block.row_tokens, block.col_tokens); });
  workers_.run(static_cast<int64_t>(tasks.size()), [&](int64_t task, float* scratch) {
    const Block& block = *tasks[task].block;
    const Tile& tile = tasks[task].tile;
    if (!has_scale(block.group)) return;
    kernels_.token_cost({states_, block.row_token + tile.row, tile.rows, block.col_token + tile.col,
                         tile.cols, center(block.group), sq_norm_.data(),
                         costs + block.cost_offset + tile.row * block.ld + tile.col, block.ld,
                         scratch});
  });
}

// For every row token and column span: the smallest cost, or for mmd the sum of similarities.
void Pipeline::row_windows(const Chunk& chunk, float* costs, float* windows) const {
  const Stage stage("shear::bounds");
  std::vector<std::vector<Window>> spans;
  std::vector<std::pair<int64_t, int64_t>> tasks;  // block, first row
  for (size_t i = 0; i < chunk.blocks.size(); ++i) {
    spans.push_back(windows_of(problem_, chunk.blocks[i]));
    for (int64_t row = 0; row < chunk.blocks[i].row_tokens; row += kRowsPerTask)
      tasks.emplace_back(static_cast<int64_t>(i), row);
  }
  const bool mmd = config_.distance == Distance::kMmd;
  workers_.run(static_cast<int64_t>(tasks.size()), [&](int64_t task, float*) {
    const auto [index, first] = tasks[task];
    const Block& block = chunk.blocks[index];
    if (!has_scale(block.group)) return;
    for (int64_t i = first; i < std::min(block.row_tokens, first + kRowsPerTask); ++i) {
      float* row = costs + block.cost_offset + i * block.ld;
      if (mmd) kernels_.rbf(row, block.col_tokens, static_cast<float>(group_norm_[block.group]));
      (mmd ? kernels_.window_sum : kernels_.window_min)(
          row, spans[index].data(), block.col_spans,
          windows + block.row_offset + i * block.col_spans);
    }
  });
}

// Every pair's bound max(R, Q); for the distances made of the same reductions, the distance itself.
void Pipeline::bounds(const Chunk& chunk, const float* costs, const float* windows,
                      float* values) const {
  const Stage stage("shear::bounds");
  std::vector<std::vector<Window>> spans;
  std::vector<std::pair<int64_t, int64_t>> tasks;  // block, row span within it
  for (size_t i = 0; i < chunk.blocks.size(); ++i) {
    spans.push_back(windows_of(problem_, chunk.blocks[i]));
    for (int64_t a = 0; a < chunk.blocks[i].row_spans; ++a)
      tasks.emplace_back(static_cast<int64_t>(i), a);
  }
  workers_.run(static_cast<int64_t>(tasks.size()), [&](int64_t task, float* scratch) {
    const auto [index, a] = tasks[task];
    const Block& block = chunk.blocks[index];
    float* out = values + block.pair_offset + a * block.col_spans;
    if (!has_scale(block.group)) {
      const bool zero = group_norm_[block.group] == 0;
      std::fill_n(out, block.col_spans, zero ? 0.f : std::numeric_limits<float>::quiet_NaN());
      return;
    }
    const Span& row = problem_.spans[block.row_span + a];
    const int64_t first = row.begin - block.row_token, n = row.size();
    std::fill_n(out, block.col_spans, 0.f);
    for (int64_t i = first; i < first + n; ++i)
      kernels_.add(out, windows + block.row_offset + i * block.col_spans, block.col_spans);
    if (config_.distance == Distance::kMmd) {
      const double sigma = group_norm_[block.group];
      for (int64_t b = 0; b < block.col_spans; ++b) {
        const double cross =
            out[b] / (static_cast<double>(n) * static_cast<double>(spans[index][b].size));
        const double squared = self_[block.row_span + a] + self_[block.col_span + b] - 2 * cross;
        out[b] = static_cast<float>(sigma * std::sqrt(std::max(0., squared)));
      }
      return;
    }
    float* lowest = scratch;
    float* q = scratch + block.col_tokens;
    kernels_.column_min(costs + block.cost_offset + first * block.ld, block.ld, n, block.col_tokens,
                        lowest);
    kernels_.window_sum(lowest, spans[index].data(), block.col_spans, q);
    for (int64_t b = 0; b < block.col_spans; ++b) {
      const float r = out[b] / static_cast<float>(n);
      q[b] /= static_cast<float>(spans[index][b].size);
      out[b] = config_.distance == Distance::kChamfer ? (r + q[b]) / 2 : std::max(r, q[b]);
    }
  });
}

// The pairs to solve, in the order in which the threads take them. The most promising for one of
// their spans come first: what is solved early prunes the most. The rest come tile by tile, since
// the token costs of neighbouring pairs overlap and are still in cache; all of them best first took
// a third longer.
std::vector<uint32_t> Pipeline::queue(const Chunk& chunk, const std::vector<float>& bounds) const {
  std::vector<uint32_t> pairs;
  pairs.reserve(bounds.size());
  std::vector<float> lowest(problem_.spans.size(), std::numeric_limits<float>::infinity());
  for (const Block& block : chunk.blocks) {
    if (!has_scale(block.group)) continue;
    for (int64_t row = 0; row < block.row_spans; row += kTileSpans)
      for (int64_t col = 0; col < block.col_spans; col += kTileSpans)
        for (int64_t a = row; a < std::min(block.row_spans, row + kTileSpans); ++a)
          for (int64_t b = col; b < std::min(block.col_spans, col + kTileSpans); ++b) {
            const auto p = static_cast<uint32_t>(block.pair_offset + a * block.col_spans + b);
            pairs.push_back(p);
            for (const int64_t span : {block.row_span + a, block.col_span + b})
              lowest[span] = std::min(lowest[span], bounds[p]);
          }
  }
  const auto first = static_cast<int64_t>(pairs.size()) / kBestFirstShare;
  if (first == 0) return pairs;
  std::vector<float> excess(bounds.size());  // over the lowest bound of one of its spans
  for (const Block& block : chunk.blocks)
    for (int64_t a = 0; a < block.row_spans; ++a)
      for (int64_t b = 0; b < block.col_spans; ++b) {
        const int64_t p = block.pair_offset + a * block.col_spans + b;
        excess[p] = bounds[p] - std::max(lowest[block.row_span + a], lowest[block.col_span + b]);
      }
  const auto better = [&](uint32_t a, uint32_t b) {
    return excess[a] < excess[b] || (excess[a] == excess[b] && a < b);
  };
  std::vector<uint32_t> ranked = pairs;
  std::nth_element(ranked.begin(), ranked.begin() + first, ranked.end(), better);
  const auto rest =
      std::stable_partition(pairs.begin(), pairs.end(),
                            [&, limit = ranked[first]](uint32_t p) { return better(p, limit); });
  std::sort(pairs.begin(), rest, better);
  return pairs;
}

void Pipeline::solve(const Chunk& chunk, const float* costs, Pairs& pairs) {
  const Stage stage("shear::solve");
  const std::vector<uint32_t> queue = this->queue(chunk, pairs.value);
  std::vector<int64_t> offsets;
  for (const Block& block : chunk.blocks) offsets.push_back(block.pair_offset);

  std::atomic<int64_t> bounded{0}, abandoned{0}, solved{0}, stopped{0};
  const int64_t total = static_cast<int64_t>(queue.size());
  workers_.run((total + kPairsPerTask - 1) / kPairsPerTask, [&](int64_t task, float* scratch) {
    for (int64_t k = task * kPairsPerTask; k < std::min(total, (task + 1) * kPairsPerTask); ++k) {
      const uint32_t p = queue[k];
      const auto after = std::upper_bound(offsets.begin(), offsets.end(), static_cast<int64_t>(p));
      const Block& block = chunk.blocks[after - offsets.begin() - 1];
      const int64_t a = block.row_span + (p - block.pair_offset) / block.col_spans;
      const int64_t b = block.col_span + (p - block.pair_offset) % block.col_spans;
      const Span &row = problem_.spans[a], &col = problem_.spans[b];
      const float bound = pairs.value[p];
      if (config_.prune && bound > as_float(&best_[a]) && bound > as_float(&best_[b])) {
        ++bounded;
        continue;
      }
      const PairOutput out = kernels_.sinkhorn(
          {costs + block.cost_offset + (row.begin - block.row_token) * block.ld +
               (col.begin - block.col_token),
           block.ld, row.size(), col.size(), static_cast<float>(eps(block.group)), config_.n_iters,
           static_cast<float>(config_.tol), bound, config_.prune ? &best_[a] : nullptr,
           config_.prune ? &best_[b] : nullptr},
          scratch);
      pairs.value[p] = out.distance;
      if (out.abandoned) {
        ++abandoned;
        continue;
      }
      ++solved;
      if (out.iterations >= config_.n_iters) ++stopped;
      pairs.residual[p] = out.residual;
      pairs.iterations[p] = out.iterations;
      lower(&best_[a], out.distance);
      lower(&best_[b], out.distance);
    }
  });
  counts_.bounded += bounded + static_cast<int64_t>(pairs.value.size()) - total;
  counts_.abandoned += abandoned;
  counts_.solved += solved;
  counts_.stopped += stopped;
}

// 1 - cos of the span means, as half the squared token cost between the unit means.
void Pipeline::cosine_distances(const Chunk& chunk, float* values) const {
  const auto tasks = tasks_of(
      chunk, [](const Block& block) { return std::pair(block.row_spans, block.col_spans); });
  const std::vector<float> origin(states_.dim);
  workers_.run(static_cast<int64_t>(tasks.size()), [&](int64_t task, float* scratch) {
    const Block& block = *tasks[task].block;
    const Tile& tile = tasks[task].tile;
    const int64_t row = block.row_span + tile.row, col = block.col_span + tile.col;
    const double scale = group_norm_[block.group];
    float* out = values + block.pair_offset + tile.row * block.col_spans + tile.col;
    kernels_.token_cost({{unit_mean_.data(), Dtype::kFloat32, states_.dim},
                         row,
                         tile.rows,
                         col,
                         tile.cols,
                         origin.data(),
                         unit_sq_norm_.data(),
                         out,
                         block.col_spans,
                         scratch});
    for (int64_t a = 0; a < tile.rows; ++a)
      for (int64_t b = 0; b < tile.cols; ++b) {
        float& value = out[a * block.col_spans + b];
        const bool has_direction = unit_sq_norm_[row + a] > 0 && unit_sq_norm_[col + b] > 0;
        value = static_cast<float>(scale * (has_direction ? 0.5 * value * value : 1.));
      }
  });
}

void Pipeline::collect(const Chunk& chunk, const Pairs& pairs) {
  const Stage stage("shear::nearest_spans");
  const bool mean = config_.aggregation == Aggregation::kMean;
  const auto offer = [&](int64_t span, int64_t other, int64_t p) {
    Nearest& best = nearest_[span];
    const float distance = pairs.value[p];
    best.sum += distance;
    ++best.count;
    if (mean) {
      best.residual = std::max(best.residual, pairs.residual[p]);
      best.iterations = std::max(best.iterations, pairs.iterations[p]);
    }
    if (distance < best.distance ||
        (distance == best.distance && (best.span < 0 || other < best.span)) ||
        std::isnan(distance)) {
      best.distance = distance;
      best.span = other;
      if (!mean) {
        best.residual = pairs.residual[p];
        best.iterations = pairs.iterations[p];
      }
    }
  };
  for (const Block& block : chunk.blocks)
    for (int64_t a = 0; a < block.row_spans; ++a)
      for (int64_t b = 0; b < block.col_spans; ++b) {
        const int64_t p = block.pair_offset + a * block.col_spans + b;
        offer(block.row_span + a, block.col_span + b, p);
        offer(block.col_span + b, block.row_span + a, p);
      }
}

void Pipeline::run(float* matrix) {
  counts_ = {plan_.pairs, 0, 0, 0, 0};
  best_.assign(problem_.spans.size(), 0x7f800000u);  // +inf
  int64_t cost_floats = 0, row_floats = 0;
  for (const Chunk& chunk : plan_.chunks) {
    cost_floats = std::max(cost_floats, chunk.cost_floats);
    row_floats = std::max(row_floats, chunk.row_floats);
  }
  const Buffer costs = make_buffer(cost_floats), windows = make_buffer(row_floats);
  if (config_.distance == Distance::kCosine)
    span_means();
  else
    center_groups();
  if (config_.distance == Distance::kMmd) self_similarities();
  for (const Chunk& chunk : plan_.chunks) {
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
    if (matrix) {
      const int64_t rows = problem_.rollouts[0].span_end,
                    cols = problem_.rollouts[1].span_end - rows;
      for (const Block& block : chunk.blocks)
        for (int64_t a = 0; a < block.row_spans; ++a)
          std::copy_n(&pairs.value[block.pair_offset + a * block.col_spans], block.col_spans,
                      matrix + (block.row_span + a) * cols + block.col_span - rows);
    }
  }
  if (config_.aggregation == Aggregation::kMean)
    for (Nearest& best : nearest_)
      if (best.count > 0)
        best.distance = static_cast<float>(best.sum / static_cast<double>(best.count));
}

}  // namespace shear::cpu
