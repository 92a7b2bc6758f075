// The arguments of one call as plain data: configuration, rollouts, groups and spans. No torch, no
// kernels.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace shear {

enum class Dtype : int { kFloat32, kFloat16, kBFloat16 };

// Enumerators have the order of the strings in src/shear_ops/config.py.
enum class RegUnit : int { kMeanNorm, kCost };
enum class Distance : int { kSinkhorn, kChamfer, kMmd, kCosine };
enum class Normalization : int { kGroup, kRollout };
enum class Pooling : int { kMax, kMean };
enum class Aggregation : int { kMin, kMean };

struct Config {
  int64_t span;
  int64_t stride;
  double reg;
  int64_t n_iters;
  double tol;
  RegUnit reg_unit;
  Distance distance;
  Normalization normalization;
  Pooling pooling;
  Aggregation aggregation;
  bool check_finite;
  bool prune;
};

// Throws std::invalid_argument naming the argument, the value seen and the value wanted.
Config make_config(int64_t span, int64_t stride, double reg, int64_t n_iters, double tol,
                   int64_t reg_unit, int64_t distance, int64_t normalization, int64_t pooling,
                   int64_t aggregation, bool check_finite, bool prune);

struct Span {
  int64_t begin, end;  // tokens of the packed layout
  int64_t rollout;

  int64_t size() const { return end - begin; }
};

struct Rollout {
  int64_t begin, end;  // tokens of the packed layout
  int64_t span_begin, span_end;
  int64_t group;  // index into Problem::groups; -1 if the opposing set is empty or the label is -1
};

// A group with at least one correct and one incorrect rollout that have tokens.
struct Group {
  std::vector<int64_t> correct, incorrect;  // rollouts
};

struct Problem {
  int64_t tokens = 0;
  std::vector<Rollout> rollouts;
  std::vector<Group> groups;
  std::vector<Span> spans;  // rollout by rollout, in order
};

// cu_seqlens has batch + 1 entries, group_ids and labels have batch entries (labels 1, 0 or -1).
// Throws std::invalid_argument on offsets that decrease or do not end at `tokens`, and on other
// labels.
Problem make_problem(const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& group_ids,
                     const std::vector<int64_t>& labels, int64_t tokens, const Config& config);

}  // namespace shear
