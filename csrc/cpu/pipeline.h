// The steps of one call on the CPU: token costs -> bounds -> sinkhorn -> nearest spans -> token
// weights.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/kernels/kernels.h"
#include "cpu/plan.h"
#include "cpu/workers.h"
#include "problem.h"

namespace shear::cpu {

// What one span has found among the spans of its opposing set.
struct Nearest {
  float distance = 0;      // minimum, or mean for Aggregation::kMean
  float residual = 0;      // of the nearest span, or the largest for Aggregation::kMean
  int32_t iterations = 0;  // likewise
  int64_t span = -1;       // -1: no opposing set
  double sum = 0;
  int64_t count = 0;
};

struct PairCounts {
  int64_t total = 0, bounded = 0, abandoned = 0, solved = 0, stopped = 0;
};

// Room for the int8 rows of so many tokens, and for kRowSlack more.
class RowBuffer {
 public:
  RowBuffer(int64_t row_bytes, int64_t tokens)
      : bytes_(make_buffer((tokens + kRowSlack) * row_bytes / 4)),
        scale_(make_buffer(tokens)),
        rows_{.row = row_bytes == 0 ? nullptr : reinterpret_cast<int8_t*>(bytes_.get()),
              .scale = scale_.get(),
              .depth = row_bytes} {}
  const Rows& rows() const { return rows_; }

 private:
  Buffer bytes_, scale_;
  Rows rows_;
};

inline Rows rows_from(Rows rows, int64_t first) {
  if (rows.row == nullptr) return {};
  rows.row += first * rows.depth;
  rows.scale += first;
  return rows;
}

// max(R, Q) of one span pair, or of one problem of a batch; scratch: m floats.
float bound_of(const Kernels& kernels, const float* costs, int64_t ld, int64_t n, int64_t m,
               float* scratch);

class Pipeline {
 public:
  // The arguments must outlive the pipeline. Throws std::invalid_argument on states that are not
  // finite.
  Pipeline(const States& states, const Problem& problem, const Config& config);

  // Fills nearest() and counts(); if matrix is not null, also every span distance of a problem of
  // two rollouts.
  void run(float* matrix);
  void token_weights(float* weights) const;

  // The int8 rows (tokens, depth), steps (tokens) and centers (groups, dim) that run() works with,
  // of a problem of two rollouts: for tests, which compare them bit by bit.
  void int8_rows(int8_t* rows, float* scale, float* center);

  const std::vector<Nearest>& nearest() const { return nearest_; }
  const PairCounts& counts() const { return counts_; }

 private:
  struct Pairs {  // of the chunk at hand
    // bound, then span distance; a skipped or abandoned pair keeps its bound
    std::vector<float> value;
    std::vector<float> residual;
    std::vector<int32_t> iterations;

    explicit Pairs(int64_t count) : value(count), residual(count), iterations(count) {}
  };

  // states.cpp
  void measure_norms();
  void refuse_unfit_groups();
  int center_limit_of(const Group& group) const;
  void center_groups();
  void round_states(const std::vector<Stretch>& stretches, const Rows& rows) const;
  bool has_scale(int64_t group) const;
  double eps(int64_t group) const;
  // pipeline.cpp
  void token_costs(const Chunk& chunk, const Rows& rows, float* costs) const;
  void look(const std::vector<char>* groups, float* matrix);
  void look_exactly(const std::vector<char>& groups);
  void costs_of(const CostTile& tile) const;
  void copy_distances(const Chunk& chunk, const Pairs& pairs, float* matrix) const;
  // bounds.cpp
  void row_windows(const Chunk& chunk, float* costs, float* windows) const;
  void bounds(const Chunk& chunk, const float* costs, const float* windows, float* values) const;
  // cosine_mmd.cpp
  void span_means();
  void self_similarities();
  void cosine_distances(const Chunk& chunk, float* values) const;
  // queue.cpp
  std::vector<uint32_t> queue(const Chunk& chunk, const std::vector<float>& bounds) const;
  void solve(const Chunk& chunk, const float* costs, Pairs& pairs);
  // second_look.cpp
  std::vector<char> look_again();
  // nearest.cpp
  void collect(const Chunk& chunk, const Pairs& pairs);
  void finish_means();

  const States states_;
  const Problem& problem_;
  const Config& config_;
  const Kernels& kernels_;
  const Plan plan_;
  const Workers workers_;

  std::vector<float> norm_;                        // (tokens)
  std::vector<uint8_t> exponent_;                  // (tokens) biased, of the largest entry
  std::vector<float> center_;                      // (groups, dim)
  std::vector<float> sq_norm_;                     // (tokens) of the states less the center
  std::vector<uint32_t> signs_;                    // (depth) of the rotation
  std::vector<double> rollout_norm_, group_norm_;  // means
  std::vector<float> unit_mean_, unit_sq_norm_;    // cosine: (spans, dim) and (spans)
  std::vector<double> self_;                       // mmd: (spans) mean of k(x, x') - 1
  std::vector<uint32_t> best_;    // (spans) float bits of the smallest distance so far
  std::vector<Nearest> nearest_;  // (spans)
  PairCounts counts_{};
};

}  // namespace shear::cpu
