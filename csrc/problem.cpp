#include "problem.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <unordered_map>

#include "solve.h"
#include "token_cost.h"

namespace shear {
namespace {

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

template <typename T, size_t kCount>
T to_enum(const char* argument, int64_t value, const char* const (&)[kCount]) {
  require(value >= 0 && value < static_cast<int64_t>(kCount),
          std::string(argument) + " must be in [0, " + std::to_string(kCount) + "), got " +
              std::to_string(value));
  return static_cast<T>(value);
}

std::string short_number(double number) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", number);
  return text;
}

// Spans of all rollouts, once it is sure that they are few enough to be listed.
int64_t count_spans(const std::vector<int64_t>& cu_seqlens, const Config& config) {
  int64_t spans = 0;
  for (size_t i = 0; i + 1 < cu_seqlens.size(); ++i) {
    const int64_t tokens = cu_seqlens[i + 1] - cu_seqlens[i];
    const int64_t longest = longest_span(tokens, config.span);
    require(longest <= kMostSpanTokens, "span must be at most " + std::to_string(kMostSpanTokens) +
                                            " for rollouts of so many tokens, got a span of " +
                                            std::to_string(longest));
    spans += span_count(tokens, config.span, config.stride);
  }
  require(spans <= kMostSpans, "cu_seqlens must make at most " + std::to_string(kMostSpans) +
                                   " spans, got " + std::to_string(spans) + " with stride " +
                                   std::to_string(config.stride));
  return spans;
}

void append_spans(const Rollout& rollout, int64_t index, const Config& config,
                  std::vector<Span>* spans) {
  const int64_t tokens = rollout.tokens();
  const int64_t count = span_count(tokens, config.span, config.stride);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t begin = rollout.begin + span_begin(k, tokens, config.span, config.stride);
    spans->push_back({.begin = begin,
                      .end = begin + span_size(k, tokens, config.span, config.stride),
                      .rollout = index});
  }
}

}  // namespace

Config make_config(const Options& given) {
  require(given.span >= 1, "span must be at least 1, got " + std::to_string(given.span));
  require(given.stride >= 1 && given.stride <= given.span,
          "stride must be in [1, span], got stride " + std::to_string(given.stride) +
              " with span " + std::to_string(given.span));
  require(std::isfinite(given.reg) && given.reg > 0,
          "reg must be positive and finite, got " + std::to_string(given.reg));
  const bool of_norm = given.reg_unit == static_cast<int64_t>(RegUnit::kMeanNorm);
  const double least = of_norm ? kLeastReg : 1e-36, most = of_norm ? kMostReg : kMostCost;
  require(given.reg >= least && given.reg <= most,
          "reg must be in [" + short_number(least) + ", " + short_number(most) + "] in units of " +
              (of_norm ? "the mean norm" : "cost") + ", got " + short_number(given.reg));
  require(given.n_iters >= 1 && given.n_iters <= INT32_MAX,
          "n_iters must be in [1, 2^31), got " + std::to_string(given.n_iters));
  require(std::isfinite(given.tol) && given.tol >= 0,
          "tol must be non-negative and finite, got " + std::to_string(given.tol));
  Config config{};
  config.span = given.span;
  config.stride = given.stride;
  config.reg = given.reg;
  config.n_iters = given.n_iters;
  config.tol = given.tol;
  config.reg_unit = to_enum<RegUnit>("reg_unit", given.reg_unit, kRegUnits);
  config.distance = to_enum<Distance>("distance", given.distance, kDistances);
  config.normalization =
      to_enum<Normalization>("normalization", given.normalization, kNormalizations);
  config.pooling = to_enum<Pooling>("pooling", given.pooling, kPoolings);
  config.aggregation = to_enum<Aggregation>("aggregation", given.aggregation, kAggregations);
  config.check_finite = given.check_finite;
  config.prune = given.prune && config.aggregation == Aggregation::kMin;  // a mean needs every pair
  config.every_pair = given.every_pair;
  return config;
}

void check_batch(const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& group_ids,
                 const std::vector<int64_t>& labels, int64_t tokens) {
  const size_t batch = labels.size();
  require(cu_seqlens.size() == batch + 1, "cu_seqlens must have " + std::to_string(batch + 1) +
                                              " entries (one more than labels), got " +
                                              std::to_string(cu_seqlens.size()));
  require(group_ids.size() == batch, "group_ids must have " + std::to_string(batch) +
                                         " entries (as many as labels), got " +
                                         std::to_string(group_ids.size()));
  require(cu_seqlens.front() == 0,
          "cu_seqlens must start at 0, got " + std::to_string(cu_seqlens.front()));
  require(cu_seqlens.back() == tokens, "cu_seqlens must end at the number of tokens, " +
                                           std::to_string(tokens) + ", got " +
                                           std::to_string(cu_seqlens.back()));
  require(tokens <= kMostTokens,
          "cu_seqlens must end below 2^31 tokens, got " + std::to_string(tokens));
  for (size_t i = 0; i < batch; ++i) {
    require(cu_seqlens[i] <= cu_seqlens[i + 1],
            "cu_seqlens must not decrease, got " + std::to_string(cu_seqlens[i]) + " before " +
                std::to_string(cu_seqlens[i + 1]) + " at entry " + std::to_string(i + 1));
    require(labels[i] >= -1 && labels[i] <= 1, "labels must be 1, 0 or -1, got " +
                                                   std::to_string(labels[i]) + " at entry " +
                                                   std::to_string(i));
  }
}

Problem make_problem(const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& group_ids,
                     const std::vector<int64_t>& labels, int64_t tokens, const Config& config) {
  check_batch(cu_seqlens, group_ids, labels, tokens);  // all of it before anything is allocated
  Problem problem;
  problem.tokens = tokens;
  problem.cu_seqlens = cu_seqlens;
  problem.group_ids = group_ids;
  problem.spans.reserve(count_spans(cu_seqlens, config));
  std::unordered_map<int64_t, size_t> index_of_id;
  std::vector<Group> groups;
  for (size_t i = 0; i < labels.size(); ++i) {
    Rollout rollout{.begin = cu_seqlens[i],
                    .end = cu_seqlens[i + 1],
                    .span_begin = static_cast<int64_t>(problem.spans.size()),
                    .span_end = 0,
                    .group = -1};
    append_spans(rollout, static_cast<int64_t>(i), config, &problem.spans);
    rollout.span_end = static_cast<int64_t>(problem.spans.size());
    problem.rollouts.push_back(rollout);
    if (labels[i] < 0 || rollout.tokens() == 0) continue;
    const auto [entry, is_new] = index_of_id.try_emplace(group_ids[i], groups.size());
    if (is_new) groups.emplace_back();
    auto& side = labels[i] == 1 ? groups[entry->second].correct : groups[entry->second].incorrect;
    side.push_back(static_cast<int64_t>(i));
  }
  for (auto& group : groups) {
    if (group.correct.empty() || group.incorrect.empty()) continue;
    for (const auto* side : {&group.correct, &group.incorrect})
      for (const int64_t i : *side)
        problem.rollouts[i].group = static_cast<int64_t>(problem.groups.size());
    problem.groups.push_back(std::move(group));
  }
  return problem;
}

Problem make_pair_problem(int64_t rows, int64_t cols, const Config& config) {
  Problem problem = make_problem({0, rows, rows + cols}, {0, 0}, {1, 0}, rows + cols, config);
  problem.group_ids.clear();
  return problem;
}

std::string not_finite(int64_t token, const std::vector<int64_t>& cu_seqlens,
                       const std::vector<int64_t>& group_ids) {
  const auto after = std::upper_bound(cu_seqlens.begin(), cu_seqlens.end(), token);
  const int64_t rollout = after - cu_seqlens.begin() - 1;
  const std::string at = std::to_string(token - cu_seqlens[rollout]);
  const bool pair = group_ids.empty();
  return std::string(pair ? (rollout == 0 ? "x" : "y") : "hidden") +
         " must be finite with norms below " + short_number(kMostNorm) +
         ", got NaN, Inf or larger at token " + at +
         (pair ? ""
               : " of rollout " + std::to_string(rollout) + " (group " +
                     std::to_string(group_ids[rollout]) + "), hidden[" + std::to_string(token) +
                     "]");
}

std::string stopped_warning(int64_t stopped, int64_t solved, int64_t n_iters) {
  // pairs that get a second look can be stopped in each
  const std::string of = stopped > solved ? "" : " of " + std::to_string(solved) + " solved";
  return "shear_ops: " + std::to_string(stopped) + of +
         " span pairs were stopped at n_iters=" + std::to_string(n_iters) +
         " before they converged, and weights may be off: raise n_iters or reg "
         "(said once per process; span_weights(return_counts=True) counts them)";
}

NormRange norm_range(const Config& config) {
  NormRange range{kLeastNorm, std::numeric_limits<double>::max()};
  if (config.distance == Distance::kSinkhorn && config.reg_unit == RegUnit::kCost)
    range = {std::max(kLeastNorm, config.reg / kMostReg), config.reg / kLeastReg};
  return range;
}

std::string unfit_norm(double norm, std::optional<int64_t> group, double reg) {
  if (norm >= kLeastNorm)
    return "reg must be in [" + short_number(kLeastReg) + ", " + short_number(kMostReg) +
           "] times the mean norm of every group, got " + short_number(reg) +
           " (reg_unit='cost') and a mean norm of " + short_number(norm) +
           (group ? " in group " + std::to_string(*group) : "");
  const std::string least = short_number(kLeastNorm);
  // less is not measured, see kFaintNorm
  const std::string seen = norm < 1e-18 ? "less than 1e-18" : short_number(norm);
  return (group ? "hidden" : "x and y") + std::string(" must have a mean norm of at least ") +
         least + " (or be 0) in " +
         (group ? "every group, got " + seen + " in group " + std::to_string(*group)
                : "all, got " + seen) +
         ": scale the states, float32 loses their squared distances";
}

std::optional<int64_t> id_of_group(const Problem& problem, int64_t group) {
  if (problem.group_ids.empty()) return std::nullopt;
  return problem.group_ids[problem.groups[group].correct.front()];
}

std::string bad_cost() {
  return "cost must be finite, got NaN or Inf or a magnitude from " + short_number(kMostCost) +
         " or " + short_number(kMostCostOverReg) + " times reg on";
}

}  // namespace shear
