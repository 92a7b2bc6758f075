// The distances that need more than token costs: cosine of span means, and the similarities of a
// span's tokens among themselves for mmd.
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/pipeline.h"
#include "cpu/tiles.h"

namespace shear::cpu {

// cosine: the mean state of every span, scaled to norm 1 (or left at 0).
void Pipeline::span_means() {
  const int64_t dim = states_.dim;
  unit_mean_.resize(problem_.spans.size() * dim);
  unit_sq_norm_.resize(problem_.spans.size());
  const std::vector<float> origin(dim);
  workers_.run(static_cast<int64_t>(problem_.spans.size()), [&](int64_t s, float*) {
    const Span& span = problem_.spans[s];
    if (problem_.rollouts[span.rollout].group < 0) return;
    std::vector<double> mean(dim);
    kernels_.add_states(states_, span.begin, span.size(), 0, dim, mean.data());
    const double norm = std::sqrt(std::inner_product(mean.begin(), mean.end(), mean.begin(), 0.));
    for (int64_t k = 0; k < dim; ++k)
      unit_mean_[s * dim + k] = norm > 0 ? static_cast<float>(mean[k] / norm) : 0.f;
    unit_sq_norm_[s] =
        kernels_.squared_norm({unit_mean_.data(), Dtype::kFloat32, dim}, s, origin.data());
  });
}

// 1 - cos of the span means, as half the squared token cost between the unit means.
void Pipeline::cosine_distances(const Chunk& chunk, float* values) const {
  const auto tasks = tiles_of(
      chunk, [](const Block& block) { return std::pair(block.row_spans, block.col_spans); });
  const std::vector<float> origin(states_.dim);
  workers_.run(static_cast<int64_t>(tasks.size()), [&](int64_t task, float* scratch) {
    const Block& block = *tasks[task].block;
    const Tile& tile = tasks[task].tile;
    const int64_t row = block.row_span + tile.row, col = block.col_span + tile.col;
    const double scale = group_norm_[block.group];
    float* out = values + block.pair_offset + tile.row * block.col_spans + tile.col;
    kernels_.token_cost({.states = {unit_mean_.data(), Dtype::kFloat32, states_.dim},
                         .row = row,
                         .rows = tile.rows,
                         .col = col,
                         .cols = tile.cols,
                         .center = origin.data(),
                         .sq_norm = unit_sq_norm_.data(),
                         .out = out,
                         .ld = block.col_spans,
                         .scratch = scratch});
    for (int64_t a = 0; a < tile.rows; ++a)
      for (int64_t b = 0; b < tile.cols; ++b) {
        float& value = out[a * block.col_spans + b];
        const bool has_direction = unit_sq_norm_[row + a] > 0 && unit_sq_norm_[col + b] > 0;
        value = static_cast<float>(scale * (has_direction ? 0.5 * value * value : 1.));
      }
  });
}

// mmd: the mean of k(x, x') - 1 (what is taken off cancels, and near-duplicates keep their digits)
// over the token pairs of every span.
void Pipeline::self_similarities() {
  self_.resize(problem_.spans.size());
  workers_.run(static_cast<int64_t>(problem_.spans.size()), [&](int64_t s, float* scratch) {
    const Span& span = problem_.spans[s];
    const int64_t group = problem_.rollouts[span.rollout].group, n = span.size();
    if (group < 0 || !has_scale(group)) return;
    float* costs = scratch + kPanelFloats;
    costs_of({.states = states_,
              .row = span.begin,
              .rows = n,
              .col = span.begin,
              .cols = n,
              .center = &center_[group * states_.dim],
              .sq_norm = sq_norm_.data(),
              .out = costs,
              .ld = n,
              .scratch = scratch});
    kernels_.rbf(costs, n * n, static_cast<float>(group_norm_[group]));
    double total = 0;  // summed like those of two spans, so that equal spans cancel exactly
    for (int64_t i = 0; i < n; ++i) {
      const Window row{i * n, n};
      float sum;
      kernels_.window_sum(costs, &row, 1, &sum);
      total += sum;
    }
    self_[s] = total / (static_cast<double>(n) * static_cast<double>(n));
  });
}

}  // namespace shear::cpu
