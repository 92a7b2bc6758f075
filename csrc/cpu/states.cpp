// What is measured once per call from the hidden states alone: norms, the groups'
// centers, int8 rows.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "cpu/pipeline.h"
#include "rounding.h"
#include "stage.h"
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
  exponent_.resize(problem_.tokens);
  const int64_t tasks = (problem_.tokens + kTokensPerTask - 1) / kTokensPerTask;
  workers_.run(tasks, [&](int64_t task, float*) {
    const int64_t end = std::min(problem_.tokens, (task + 1) * kTokensPerTask);
    for (int64_t t = task * kTokensPerTask; t < end; ++t) {
      const Magnitude of_state = kernels_.magnitude(states_, t);
      const float norm = std::sqrt(of_state.squared);
      norm_[t] = norm > 0 || is_zero(states_, t) ? norm : kFaintNorm;
      if (!(norm < kMostNorm)) norm_[t] = std::numeric_limits<float>::quiet_NaN();
      exponent_[t] = static_cast<uint8_t>(exponent_of(std::bit_cast<uint32_t>(of_state.largest)));
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

// The biased exponent that the largest entries of tokens of the group's mean stay below.
int Pipeline::center_limit_of(const Group& group) const {
  int64_t counts[kExponents] = {}, tokens = 0;
  for (const auto* side : {&group.correct, &group.incorrect})
    for (const int64_t i : *side) {
      const Rollout& rollout = problem_.rollouts[i];
      for (int64_t t = rollout.begin; t < rollout.end; ++t) ++counts[exponent_[t]];
      tokens += rollout.tokens();
    }
  int median = 0;
  for (int64_t below = counts[0]; 2 * below < tokens; below += counts[++median]) {
  }
  return center_limit(median);
}

// Distances do not change when a center is taken off, but rounding and cancellation cost less.
void Pipeline::center_groups() {
  const auto groups = static_cast<int64_t>(problem_.groups.size());
  const int64_t slices = (states_.dim + kDimsPerTask - 1) / kDimsPerTask;
  std::vector<int> limits(groups);
  workers_.run(groups, [&](int64_t g, float*) { limits[g] = center_limit_of(problem_.groups[g]); });
  center_.resize(groups * states_.dim);
  workers_.run(groups * slices, [&](int64_t task, float*) {
    const int64_t g = task / slices, begin = task % slices * kDimsPerTask;
    const int64_t end = std::min(states_.dim, begin + kDimsPerTask);
    const int scale = center_scale_exponent(limits[g]);
    int64_t sums[kDimsPerTask] = {}, tokens = 0;
    for (const auto* side : {&problem_.groups[g].correct, &problem_.groups[g].incorrect})
      for (const int64_t i : *side)
        for (int64_t t = problem_.rollouts[i].begin; t < problem_.rollouts[i].end; ++t) {
          if (exponent_[t] >= limits[g]) continue;
          kernels_.add_rounded(states_, t, begin, end, std::ldexp(1.f, scale), sums);
          ++tokens;
        }
    for (int64_t k = begin; k < end; ++k)
      center_[g * states_.dim + k] = static_cast<float>(
          std::ldexp(static_cast<double>(sums[k - begin]) / static_cast<double>(tokens), -scale));
  });
  sq_norm_.resize(problem_.tokens);
  workers_.run(static_cast<int64_t>(problem_.rollouts.size()), [&](int64_t i, float*) {
    const Rollout& rollout = problem_.rollouts[i];
    if (rollout.group < 0) return;
    for (int64_t t = rollout.begin; t < rollout.end; ++t)
      sq_norm_[t] = kernels_.squared_norm(states_, t, &center_[rollout.group * states_.dim]);
  });
  signs_.resize(plan_.row_bytes);
  for (size_t k = 0; k < signs_.size(); ++k)
    signs_[k] = sign_of_dimension(static_cast<uint32_t>(k));
}

// The int8 rows of stretches, to `rows`.
void Pipeline::round_states(const std::vector<Stretch>& stretches, const Rows& rows) const {
  const Stage stage("shear::states");
  std::vector<std::pair<const Stretch*, int64_t>> tasks;  // first token
  for (const Stretch& stretch : stretches)
    for (int64_t first = 0; first < stretch.tokens; first += kTokensPerTask)
      tasks.emplace_back(&stretch, first);
  workers_.run(static_cast<int64_t>(tasks.size()), [&](int64_t task, float* scratch) {
    const auto [stretch, first] = tasks[task];
    if (!has_scale(stretch->group)) return;
    kernels_.round_states({.states = states_,
                           .token = stretch->token + first,
                           .count = std::min(kTokensPerTask, stretch->tokens - first),
                           .center = &center_[stretch->group * states_.dim],
                           .signs = signs_.data(),
                           .rows = rows_from(rows, stretch->place + first),
                           .scratch = scratch});
  });
}

}  // namespace shear::cpu
