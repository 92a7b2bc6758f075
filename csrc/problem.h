// The arguments of one call as plain data: configuration, rollouts, groups and spans. No torch, no
// kernels.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "columns.h"

namespace shear {

enum class Dtype : int { kFloat32, kFloat16, kBFloat16 };

// The names are those of SpanConfig's choices (shear_ops._C.CHOICES), in the order of the
// enumerators.
enum class RegUnit : int { kMeanNorm, kCost };
constexpr const char* kRegUnits[] = {"mean_norm", "cost"};
enum class Distance : int { kSinkhorn, kChamfer, kMmd, kCosine };
constexpr const char* kDistances[] = {"sinkhorn", "chamfer", "mmd", "cosine"};
enum class Normalization : int { kGroup, kRollout };
constexpr const char* kNormalizations[] = {"group", "rollout"};
// Distances of a rollout whose mean norm is below this share of its group's, zero in the group's
// unit, are divided by the group's: no weight is infinite. docs/numerics.md says why.
constexpr double kLeastRolloutNorm = 0x1p-24;
enum class Pooling : int { kMax, kMean };
constexpr const char* kPoolings[] = {"max", "mean"};
enum class Aggregation : int { kMin, kMean };
constexpr const char* kAggregations[] = {"min", "mean"};

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
  bool every_pair;  // its distance is asked for, not only the nearest spans'
};

// The options of an operator as they come, before their check. A default here stands for "plays no
// part"; those of the operators are in csrc/ops.cpp.
struct Options {
  int64_t span = 1, stride = 1;
  double reg = 1;
  int64_t n_iters = 1;
  double tol = 0;
  int64_t reg_unit = 0, distance = 0, normalization = 0, pooling = 0, aggregation = 0;
  bool check_finite = true, prune = true, every_pair = false;
};

// Throws std::invalid_argument naming the argument, the value seen and the value wanted.
Config make_config(const Options& options);

// Whether only the distances of the nearest spans count, so that these alone need be exact.
inline bool takes_second_look(const Config& config) {
  return config.distance == Distance::kSinkhorn && config.aggregation == Aggregation::kMin &&
         !config.every_pair;
}

// begin, end: tokens of the packed layout.
#define SHEAR_SPAN_COLUMNS(X) X(begin) X(end) X(rollout)

struct Span {
  SHEAR_SPAN_COLUMNS(SHEAR_FIELD)

  int64_t size() const { return end - begin; }
};

// group: index into Problem::groups; -1 if the opposing set is empty or the label is -1.
#define SHEAR_ROLLOUT_COLUMNS(X) X(begin) X(end) X(span_begin) X(span_end) X(group)

struct Rollout {
  SHEAR_ROLLOUT_COLUMNS(SHEAR_FIELD)

  int64_t tokens() const { return end - begin; }
  int64_t spans() const { return span_end - span_begin; }
};

// A group with at least one correct and one incorrect rollout that have tokens.
struct Group {
  std::vector<int64_t> correct, incorrect;  // rollouts
};

// More than this is refused by name: the sizes that a plan computes stay below 2^63 bytes, and its
// tables within a few gigabytes.
constexpr int64_t kMostTokens = INT32_MAX;             // of a call
constexpr int64_t kMostSpans = int64_t{1} << 26;       // of a call
constexpr int64_t kMostSpanTokens = int64_t{1} << 20;  // of a span

struct Problem {
  int64_t tokens = 0;
  std::vector<Rollout> rollouts;
  std::vector<Group> groups;
  std::vector<Span> spans;  // rollout by rollout, in order
  // as given, for errors; without group ids the two rollouts are x and y of pair_distances
  std::vector<int64_t> cu_seqlens, group_ids;
};

// cu_seqlens has batch + 1 entries, group_ids and labels have batch entries (labels 1, 0 or -1).
// Throws std::invalid_argument on offsets that decrease or do not end at `tokens`, on more tokens
// than kMostTokens, and on other labels.
void check_batch(const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& group_ids,
                 const std::vector<int64_t>& labels, int64_t tokens);

// Rollouts, groups and spans of a batch; checks it, and throws std::invalid_argument on more or
// longer spans than above.
Problem make_problem(const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& group_ids,
                     const std::vector<int64_t>& labels, int64_t tokens, const Config& config);

// The problem of pair_distances: x of `rows` tokens is correct, y of `cols` incorrect.
Problem make_pair_problem(int64_t rows, int64_t cols, const Config& config);

// The error about a token whose state is not finite, in the words of who gave cu_seqlens and
// group_ids; without group ids that is x and y. src/shear_ops/ops/batch.py reads the place again.
std::string not_finite(int64_t token, const std::vector<int64_t>& cu_seqlens,
                       const std::vector<int64_t>& group_ids);

// What a caller who sees weights only is told of pairs that n_iters stopped.
std::string stopped_warning(int64_t stopped, int64_t solved, int64_t n_iters);
// eps in units of the mean norm: what times any norm, or any norm over it, is a float32.
constexpr double kLeastReg = 1e-20, kMostReg = 1e14;
// The mean norm of a group, unless it is 0.
struct NormRange {
  double least, most;
};
NormRange norm_range(const Config& config);
// The error about another; without a group id that is x and y.
std::string unfit_norm(double norm, std::optional<int64_t> group, double reg);
// The id of a group, none for x and y of pair_distances.
std::optional<int64_t> id_of_group(const Problem& problem, int64_t group);
// The error about a cost beyond most_cost().
std::string bad_cost();

}  // namespace shear
