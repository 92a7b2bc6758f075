// What is measured once per call from the hidden states alone: norms, the groups' mean states, and
// for the distances that need them the means and self-similarities of spans.
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

#include "cpu/pipeline.h"
#include "cpu/tiles.h"

namespace shear::cpu {
namespace {

constexpr int64_t kDimsPerTask = 256;
constexpr int64_t kTokensPerTask = 64;
constexpr double kMeanShare =
    0.75;  // beyond, products of states lose two bits more than of centred ones

}  // namespace

void Pipeline::measure_norms() {
  norm_.resize(problem_.tokens);
  const int64_t tasks = (problem_.tokens + kTokensPerTask - 1) / kTokensPerTask;
  workers_.run(tasks, [&](int64_t task, float*) {
    const int64_t end = std::min(problem_.tokens, (task + 1) * kTokensPerTask);
    for (int64_t t = task * kTokensPerTask; t < end; ++t)
      norm_[t] = std::sqrt(kernels_.squared_norm(states_, t, nullptr));
  });
  if (config_.check_finite)
    for (int64_t t = 0; t < problem_.tokens; ++t)
      if (!std::isfinite(norm_[t]))
        throw std::invalid_argument(
            "hidden must be finite with norms below 1.8e19, got NaN, Inf or larger at token " +
            std::to_string(t));
  rollout_norm_.assign(problem_.rollouts.size(), 0.);
  std::vector<int64_t> group_tokens(problem_.groups.size());
  group_norm_.assign(problem_.groups.size(), 0.);
  for (size_t i = 0; i < problem_.rollouts.size(); ++i) {
    const Rollout& rollout = problem_.rollouts[i];
    if (rollout.group < 0) continue;
    const double total =
        std::accumulate(norm_.begin() + rollout.begin, norm_.begin() + rollout.end, 0.);
    rollout_norm_[i] = total / static_cast<double>(rollout.end - rollout.begin);
    group_norm_[rollout.group] += total;
    group_tokens[rollout.group] += rollout.end - rollout.begin;
  }
  for (size_t g = 0; g < group_norm_.size(); ++g)
    group_norm_[g] /= static_cast<double>(group_tokens[g]);
}

// False: all states are zero, or not finite with the check off. Such a group is not computed.
bool Pipeline::has_scale(int64_t group) const {
  return std::isfinite(group_norm_[group]) && group_norm_[group] > 0;
}

double Pipeline::eps(int64_t group) const {
  return config_.reg_unit == RegUnit::kCost ? config_.reg : config_.reg * group_norm_[group];
}

// Distances do not change when the group's mean state is taken off, but the product loses less to
// cancellation.
void Pipeline::center_groups() {
  const int64_t slices = (states_.dim + kDimsPerTask - 1) / kDimsPerTask;
  center_.resize(problem_.groups.size() * states_.dim);
  workers_.run(static_cast<int64_t>(problem_.groups.size()) * slices, [&](int64_t task, float*) {
    const int64_t g = task / slices, begin = task % slices * kDimsPerTask;
    const int64_t end = std::min(states_.dim, begin + kDimsPerTask);
    double sums[kDimsPerTask] = {};
    int64_t tokens = 0;
    for (const auto* side : {&problem_.groups[g].correct, &problem_.groups[g].incorrect})
      for (const int64_t i : *side) {
        const Rollout& rollout = problem_.rollouts[i];
        kernels_.add_states(states_, rollout.begin, rollout.end - rollout.begin, begin, end, sums);
        tokens += rollout.end - rollout.begin;
      }
    for (int64_t k = begin; k < end; ++k)
      center_[g * states_.dim + k] =
          static_cast<float>(sums[k - begin] / static_cast<double>(tokens));
  });
  // bfloat16 products take the states as they are, if less than kMeanShare of them is the mean
  centered_.assign(problem_.groups.size(), 1);
  if (kernels_.bf16_products && states_.dtype == Dtype::kBFloat16)
    for (size_t g = 0; g < problem_.groups.size(); ++g) {
      const float* mean = &center_[g * states_.dim];
      const double squares = std::inner_product(mean, mean + states_.dim, mean, 0.);
      centered_[g] = squares > kMeanShare * group_norm_[g] * group_norm_[g];
    }
  sq_norm_.resize(problem_.tokens);
  workers_.run(static_cast<int64_t>(problem_.rollouts.size()), [&](int64_t i, float*) {
    const Rollout& rollout = problem_.rollouts[i];
    if (rollout.group < 0) return;
    for (int64_t t = rollout.begin; t < rollout.end; ++t)
      sq_norm_[t] = kernels_.squared_norm(states_, t, center(rollout.group));
  });
}

const float* Pipeline::center(int64_t group) const {
  return centered_[group] ? &center_[group * states_.dim] : nullptr;
}

// cosine: the mean state of every span, scaled to norm 1 (or left at 0).
void Pipeline::span_means() {
  const int64_t dim = states_.dim;
  unit_mean_.resize(problem_.spans.size() * dim);
  unit_sq_norm_.resize(problem_.spans.size());
  workers_.run(static_cast<int64_t>(problem_.spans.size()), [&](int64_t s, float*) {
    const Span& span = problem_.spans[s];
    if (problem_.rollouts[span.rollout].group < 0) return;
    std::vector<double> mean(dim);
    kernels_.add_states(states_, span.begin, span.size(), 0, dim, mean.data());
    const double norm = std::sqrt(std::inner_product(mean.begin(), mean.end(), mean.begin(), 0.));
    for (int64_t k = 0; k < dim; ++k)
      unit_mean_[s * dim + k] = norm > 0 ? static_cast<float>(mean[k] / norm) : 0.f;
    unit_sq_norm_[s] = kernels_.squared_norm({unit_mean_.data(), Dtype::kFloat32, dim}, s, nullptr);
  });
}

// mmd: the mean of k(x, x') over the token pairs of every span.
void Pipeline::self_similarities() {
  self_.resize(problem_.spans.size());
  workers_.run(static_cast<int64_t>(problem_.spans.size()), [&](int64_t s, float* scratch) {
    const Span& span = problem_.spans[s];
    const int64_t group = problem_.rollouts[span.rollout].group, n = span.size();
    if (group < 0 || !has_scale(group)) return;
    float* costs = scratch + kPanelFloats;
    for (const Tile& tile : tiles_of(n, n))
      kernels_.token_cost({states_, span.begin + tile.row, tile.rows, span.begin + tile.col,
                           tile.cols, center(group), sq_norm_.data(),
                           costs + tile.row * n + tile.col, n, scratch});
    kernels_.rbf(costs, n * n, static_cast<float>(group_norm_[group]));
    float total =
        0.f;  // summed like the similarities of two spans, so that equal spans cancel exactly
    for (int64_t i = 0; i < n; ++i) {
      const Window row{i * n, n};
      float sum;
      kernels_.window_sum(costs, &row, 1, &sum);
      total += sum;
    }
    self_[s] = total / (static_cast<double>(n) * static_cast<double>(n));
  });
}

// Steps 2 to 4 of the paper up to the advantage: / mean norm, then the maximum (or mean) over the
// covering spans.
void Pipeline::token_weights(float* weights) const {
  workers_.run(static_cast<int64_t>(problem_.rollouts.size()), [&](int64_t i, float*) {
    const Rollout& rollout = problem_.rollouts[i];
    if (rollout.group < 0) {
      std::fill(weights + rollout.begin, weights + rollout.end, 1.f);
      return;
    }
    const double scale = config_.normalization == Normalization::kGroup ? group_norm_[rollout.group]
                                                                        : rollout_norm_[i];
    int64_t first = rollout.span_begin;  // the covering spans of a token are [first, last)
    int64_t last = first;
    for (int64_t t = rollout.begin; t < rollout.end; ++t) {
      while (problem_.spans[first].end <= t) ++first;
      while (last < rollout.span_end && problem_.spans[last].begin <= t) ++last;
      double highest = 0, total = 0;
      for (int64_t s = first; s < last; ++s) {
        const double distance = nearest_[s].distance;
        highest = distance <= highest ? highest : distance;  // keeps NaN
        total += distance;
      }
      const double pooled =
          config_.pooling == Pooling::kMax ? highest : total / static_cast<double>(last - first);
      weights[t] = static_cast<float>(pooled == 0 ? 0. : pooled / scale);
    }
  });
}

}  // namespace shear::cpu
