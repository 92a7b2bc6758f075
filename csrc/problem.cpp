#include "problem.h"

#include <cmath>
#include <stdexcept>
#include <unordered_map>

namespace shear {
namespace {

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

template <typename T>
T to_enum(const char* argument, int64_t value, int64_t count) {
  require(value >= 0 && value < count, std::string(argument) + " must be in [0, " +
                                           std::to_string(count) + "), got " +
                                           std::to_string(value));
  return static_cast<T>(value);
}

void append_spans(const Rollout& rollout, int64_t index, const Config& config,
                  std::vector<Span>* spans) {
  if (rollout.begin == rollout.end) return;
  for (int64_t begin = rollout.begin;; begin += config.stride) {
    // not begin + span: span may be as large as the caller likes
    const bool last = rollout.end - begin <= config.span;
    spans->push_back({begin, last ? rollout.end : begin + config.span, index});
    if (last) return;
  }
}

}  // namespace

Config make_config(int64_t span, int64_t stride, double reg, int64_t n_iters, double tol,
                   int64_t reg_unit, int64_t distance, int64_t normalization, int64_t pooling,
                   int64_t aggregation, bool check_finite, bool prune) {
  require(span >= 1, "span must be at least 1, got " + std::to_string(span));
  require(stride >= 1 && stride <= span, "stride must be in [1, span], got stride " +
                                             std::to_string(stride) + " with span " +
                                             std::to_string(span));
  require(std::isfinite(reg) && reg > 0,
          "reg must be positive and finite, got " + std::to_string(reg));
  require(n_iters >= 1 && n_iters <= INT32_MAX,
          "n_iters must be in [1, 2^31), got " + std::to_string(n_iters));
  require(std::isfinite(tol) && tol >= 0,
          "tol must be non-negative and finite, got " + std::to_string(tol));
  return {
      span,
      stride,
      reg,
      n_iters,
      tol,
      to_enum<RegUnit>("reg_unit", reg_unit, 2),
      to_enum<Distance>("distance", distance, 4),
      to_enum<Normalization>("normalization", normalization, 2),
      to_enum<Pooling>("pooling", pooling, 2),
      to_enum<Aggregation>("aggregation", aggregation, 2),
      check_finite,
      prune && aggregation == static_cast<int64_t>(Aggregation::kMin)};  // a mean needs every pair
}

Problem make_problem(const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& group_ids,
                     const std::vector<int64_t>& labels, int64_t tokens, const Config& config) {
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

  Problem problem;
  problem.tokens = tokens;
  std::unordered_map<int64_t, size_t> index_of_id;
  std::vector<Group> groups;
  for (size_t i = 0; i < batch; ++i) {
    require(cu_seqlens[i] <= cu_seqlens[i + 1],
            "cu_seqlens must not decrease, got " + std::to_string(cu_seqlens[i]) + " before " +
                std::to_string(cu_seqlens[i + 1]) + " at entry " + std::to_string(i + 1));
    require(labels[i] >= -1 && labels[i] <= 1, "labels must be 1, 0 or -1, got " +
                                                   std::to_string(labels[i]) + " at entry " +
                                                   std::to_string(i));
    Rollout rollout{cu_seqlens[i], cu_seqlens[i + 1], static_cast<int64_t>(problem.spans.size()), 0,
                    -1};
    append_spans(rollout, static_cast<int64_t>(i), config, &problem.spans);
    rollout.span_end = static_cast<int64_t>(problem.spans.size());
    problem.rollouts.push_back(rollout);
    if (labels[i] < 0 || rollout.begin == rollout.end) continue;
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

}  // namespace shear
