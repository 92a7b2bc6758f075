// What is measured once per call from the hidden states alone: norms and the groups' mean states.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "cpu/pipeline.h"
#include "token_cost.h"

namespace shear::cpu {
namespace {

constexpr int64_t kDimsPerTask = 256;
constexpr int64_t kTokensPerTask = 64;

template <typename Word>
bool is_zero(const void* data, int64_t begin, int64_t count) {
  Word seen = 0;
  for (int64_t k = begin; k < begin + count; ++k) seen |= static_cast<const Word*>(data)[k];
  return static_cast<Word>(seen << 1) == 0;  // but for the sign
}

bool is_zero(const States& states, int64_t token) {
  const int64_t begin = token * states.dim;
  return states.dtype == Dtype::kFloat32 ? is_zero<uint32_t>(states.data, begin, states.dim)
                                         : is_zero<uint16_t>(states.data, begin, states.dim);
}

}  // namespace

void Pipeline::measure_norms() {
  norm_.resize(problem_.tokens);
  const int64_t tasks = (problem_.tokens + kTokensPerTask - 1) / kTokensPerTask;
  workers_.run(tasks, [&](int64_t task, float*) {
    const int64_t end = std::min(problem_.tokens, (task + 1) * kTokensPerTask);
    for (int64_t t = task * kTokensPerTask; t < end; ++t) {
      const float norm = std::sqrt(kernels_.squared_norm(states_, t, nullptr));
      norm_[t] = norm > 0 || is_zero(states_, t) ? norm : kFaintNorm;
      if (!(norm < kMostNorm)) norm_[t] = std::numeric_limits<float>::quiet_NaN();
    }
  });
  if (config_.check_finite)
    for (int64_t t = 0; t < problem_.tokens; ++t)
      if (!std::isfinite(norm_[t]))
        throw std::invalid_argument(not_finite(t, problem_.cu_seqlens, problem_.group_ids));
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
  refuse_unfit_groups();
}

// The first is named; with the check off, such a group has no norm.
void Pipeline::refuse_unfit_groups() {
  const NormRange range = norm_range(config_);
  for (size_t g = 0; g < group_norm_.size(); ++g) {
    double& norm = group_norm_[g];
    const bool fits = norm >= range.least && norm <= range.most;
    if (fits || norm == 0 || !std::isfinite(norm)) continue;
    if (config_.check_finite)
      throw std::invalid_argument(
          unfit_norm(norm, id_of_group(problem_, static_cast<int64_t>(g)), config_.reg));
    norm = std::numeric_limits<double>::quiet_NaN();
  }
}

// False: all states are zero, or not finite or too faint with the check off. Such a group is not
// computed.
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
  // products of bfloat16 take the states as they are unless the mean dominates
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

}  // namespace shear::cpu
