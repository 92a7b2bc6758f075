// The steps of one call on the CPU: token costs -> bounds -> sinkhorn -> nearest spans -> token
// weights.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/workers.h"
#include "plan.h"
#include "problem.h"

namespace shear::cpu {

// What one span has found among the spans of its opposing set.
struct Nearest {
  float distance;      // minimum, or mean for Aggregation::kMean
  float residual;      // of the nearest span, or the largest for Aggregation::kMean
  int32_t iterations;  // likewise
  int64_t span;        // -1: no opposing set
  double sum;
  int64_t count;
};

struct PairCounts {
  int64_t total, bounded, abandoned, solved, stopped;
};

class Pipeline {
 public:
  // The arguments must outlive the pipeline. Throws std::invalid_argument on states that are not
  // finite.
  Pipeline(const States& states, const Problem& problem, const Config& config);

  // Fills nearest() and counts(); if matrix is not null, also every span distance of a problem of
  // two rollouts.
  void run(float* matrix);
  void token_weights(float* weights) const;

  const std::vector<Nearest>& nearest() const { return nearest_; }
  const PairCounts& counts() const { return counts_; }

 private:
  struct Pairs;  // of the chunk at hand

  void measure_norms();
  void center_groups();
  void span_means();
  void self_similarities();
  void token_costs(const Chunk& chunk, float* costs) const;
  void cosine_distances(const Chunk& chunk, float* values) const;
  void row_windows(const Chunk& chunk, float* costs, float* windows) const;
  void bounds(const Chunk& chunk, const float* costs, const float* windows, float* values) const;
  std::vector<uint32_t> queue(const Chunk& chunk, const std::vector<float>& bounds) const;
  void solve(const Chunk& chunk, const float* costs, Pairs& pairs);
  void collect(const Chunk& chunk, const Pairs& pairs);

  bool has_scale(int64_t group) const;
  const float* center(int64_t group) const;
  double eps(int64_t group) const;

  const States states_;
  const Problem& problem_;
  const Config& config_;
  const Kernels& kernels_;
  const Plan plan_;
  const Workers workers_;

  std::vector<float> norm_;                        // (tokens)
  std::vector<float> sq_norm_;                     // (tokens) of the states less center()
  std::vector<float> center_;                      // (groups, dim)
  std::vector<char> centered_;                     // (groups)
  std::vector<double> rollout_norm_, group_norm_;  // means
  std::vector<float> unit_mean_, unit_sq_norm_;    // cosine: (spans, dim) and (spans)
  std::vector<double> self_;                       // mmd: (spans) mean of k(x, x')
  std::vector<uint32_t> best_;    // (spans) float bits of the smallest distance so far
  std::vector<Nearest> nearest_;  // (spans)
  PairCounts counts_{};
};

}  // namespace shear::cpu
