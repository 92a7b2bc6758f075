// The steps of one call on a GPU: token costs -> bounds -> sinkhorn -> nearest spans, a second look
// at these -> token weights. Every count stays on the device: from the first kernel to the last the
// host only launches.
#pragma once
#include "cuda/call.cuh"
#include "cuda/launch.h"

namespace shear::cuda {

struct SolveArgs;  // solve.cuh

struct CostLaunch {
  bool rounded;  // products of int8 rows
  bool large;    // tiles
  int64_t tiles;
};
// Kernels in files of their own.
void launch_token_costs(const Stream& stream, const Call& call, Dtype dtype, const CostLaunch& how);
void launch_solver(const Stream& stream, const SolverPlan& plan, const SolveArgs& args);

class Pipeline {
 public:
  // `states` is contiguous (tokens, dim); `workspace` has plan.workspace.bytes. Queues the copies
  // of the plan's tables.
  Pipeline(const Stream& stream, const Problem& problem, const Config& config,
           const DevicePlan& plan, const void* states, Dtype dtype, int64_t dim, void* workspace);

  // Finds every span's nearest span; if matrix is not null, also every span distance of a problem
  // of two rollouts.
  void run(float* matrix) const;
  void token_weights(float* weights) const;
  void span_distances(const SpanOutputs& out) const;
  void pair_counts(int64_t* counts) const;  // (kCounts), on the device
  // Waits for the stream. Throws std::invalid_argument on states that are not finite; warns of
  // pairs that n_iters stopped.
  void check_finite() const;

 private:
  void measure_states() const;
  void center_groups() const;
  SolveArgs solve_args(const Call& call) const;
  void bounds(const Call& call, int64_t strips) const;
  void solve(const Call& call) const;
  void look(const Call& of, float* matrix) const;
  void look_again() const;
  void look_exactly() const;

  const Stream& stream_;
  const Problem& problem_;
  const Config& config_;
  const DevicePlan& plan_;
  const Dtype dtype_;
  Call call_;
  const DeviceBlock* blocks_;       // of all chunks
  const DeviceStretch* stretches_;  // likewise
  Counters* look_counters_;
  DeviceBlock* look_blocks_;
  float* scratch_;
};

struct SinkhornBatch {
  const float* costs;  // (batch, n, m)
  int64_t batch, n, m;
  const int64_t *n_rows, *n_cols;  // (batch), on the device
  double reg;
  float tol;
  int32_t n_iters;
  float *value, *residual;
  int32_t* iterations;
  void* counters;  // kCounterBytes
  float* scratch;  // plan.scratch_bytes()
};

// Waits for the stream. Throws std::invalid_argument on costs that are not finite.
void solve_batch(const Stream& stream, const SinkhornBatch& batch, const SolverPlan& plan);

}  // namespace shear::cuda
