// Bounds R = mean over rows i of min_j C_ij and Q = mean over columns j of min_i C_ij of all span
// pairs of a chunk, from one pass over its token costs; chamfer and mmd are made of the same
// reductions.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/pipeline.h"
#include "stage.h"

namespace shear::cpu {
namespace {

constexpr int64_t kRowsPerTask = 64;

// The spans of a block's columns, relative to its first column.
std::vector<Window> windows_of(const Problem& problem, const Block& block) {
  std::vector<Window> windows(block.col_spans);
  for (int64_t b = 0; b < block.col_spans; ++b) {
    const Span& span = problem.spans[block.col_span + b];
    windows[b] = {span.begin - block.col_token, span.size()};
  }
  return windows;
}

}  // namespace

float bound_of(const Kernels& kernels, const float* costs, int64_t ld, int64_t n, int64_t m,
               float* scratch) {
  const Window row{0, m};
  double r = 0, q = 0;
  for (int64_t i = 0; i < n; ++i) {
    float lowest;
    kernels.window_min(costs + i * ld, &row, 1, &lowest);
    r += lowest;
  }
  kernels.column_min(costs, ld, n, m, scratch);
  for (int64_t j = 0; j < m; ++j) q += scratch[j];
  return static_cast<float>(std::max(r / static_cast<double>(n), q / static_cast<double>(m)));
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
    if (config_.distance == Distance::kMmd) {
      // a difference of nearly equal numbers: rows are added up in double
      std::vector<double> sums(block.col_spans);
      for (int64_t i = first; i < first + n; ++i)
        for (int64_t b = 0; b < block.col_spans; ++b)
          sums[b] += windows[block.row_offset + i * block.col_spans + b];
      const double sigma = group_norm_[block.group];
      for (int64_t b = 0; b < block.col_spans; ++b) {
        const double cross =
            sums[b] / (static_cast<double>(n) * static_cast<double>(spans[index][b].size));
        const double squared = self_[block.row_span + a] + self_[block.col_span + b] - 2 * cross;
        out[b] = static_cast<float>(sigma * std::sqrt(std::max(0., squared)));
      }
      return;
    }
    std::fill_n(out, block.col_spans, 0.f);
    for (int64_t i = first; i < first + n; ++i)
      kernels_.add(out, windows + block.row_offset + i * block.col_spans, block.col_spans);
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

}  // namespace shear::cpu
