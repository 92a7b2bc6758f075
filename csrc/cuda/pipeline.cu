#include <algorithm>
#include <bit>
#include <stdexcept>
#include <type_traits>

#include "cuda/batch.cuh"
#include "cuda/bounds.cuh"
#include "cuda/nearest.cuh"
#include "cuda/pipeline.h"
#include "cuda/queue.cuh"
#include "cuda/rounding.cuh"
#include "cuda/second_look.cuh"
#include "cuda/solve.cuh"
#include "cuda/states.cuh"
#include "cuda/token_weights.cuh"
#include "stage.h"
#include "warn.h"

namespace shear::cuda {
namespace {

Grid threads_for(int64_t count) { return {(count + kThreads - 1) / kThreads, kThreads}; }
Grid warps_for(int64_t count) { return threads_for(count * kWarp); }

template <typename T>
T* at(void* workspace, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(workspace) + offset);
}

bool has_vectors(const void* states, Dtype dtype, int64_t dim) {
  const int64_t bytes = dim * (dtype == Dtype::kFloat32 ? 4 : 2);
  return bytes % 16 == 0 && reinterpret_cast<uintptr_t>(states) % 16 == 0;
}

// Calls launch with the type as a constant.
template <typename Launch>
void by_dtype(Dtype dtype, const Launch& launch) {
  switch (dtype) {
    case Dtype::kFloat32:
      return launch(std::integral_constant<Dtype, Dtype::kFloat32>{});
    case Dtype::kFloat16:
      return launch(std::integral_constant<Dtype, Dtype::kFloat16>{});
    case Dtype::kBFloat16:
      return launch(std::integral_constant<Dtype, Dtype::kBFloat16>{});
  }
}

}  // namespace

Pipeline::Pipeline(const Stream& stream, const Problem& problem, const Config& config,
                   const DevicePlan& plan, const void* states, Dtype dtype, int64_t dim,
                   void* workspace)
    : stream_(stream), problem_(problem), config_(config), plan_(plan), dtype_(dtype), call_{} {
  const Workspace& w = plan.workspace;
  Call& c = call_;
  c.states = {.data = states, .dim = dim, .vectors = has_vectors(states, dtype, dim)};
  c.tokens = problem.tokens;
  c.spans = static_cast<int64_t>(problem.spans.size());
  c.pairs = plan.plan.pairs;
  c.n_rollouts = static_cast<int32_t>(plan.rollouts.size());
  c.n_groups = static_cast<int32_t>(plan.groups.size());
  c.rollouts = at<DeviceRollout>(workspace, w.rollouts);
  c.groups = at<DeviceGroup>(workspace, w.groups);
  c.members = at<int32_t>(workspace, w.members);
  c.span_tokens = config.span;
  c.stride = config.stride;
  c.strip = plan.strip;
  c.column_minima = plan.column_minima;
  c.chamfer = config.distance == Distance::kChamfer;
  c.mean = config.aggregation == Aggregation::kMean;
  c.norm_range = norm_range(config);
  c.rollout_norms = config.normalization == Normalization::kRollout;
  c.mean_pooling = config.pooling == Pooling::kMean;
  c.counters = at<Counters>(workspace, w.counters);
  c.stopped = c.counters->counts + kStopped;
  c.span_table = at<DeviceSpan>(workspace, w.spans);
  c.norm = at<float>(workspace, w.norm);
  c.sq_norm = at<float>(workspace, w.sq_norm);
  c.exponent = at<uint8_t>(workspace, w.exponent);
  c.tally = at<unsigned long long>(workspace, w.tally);
  c.centers = at<DeviceCenter>(workspace, w.centers);
  c.center = at<float>(workspace, w.center);
  c.signs = at<uint32_t>(workspace, w.signs);
  c.rows = {.row = at<int8_t>(workspace, w.row),
            .scale = at<float>(workspace, w.scale),
            .sq_norm = at<float>(workspace, w.row_sq_norm),
            .depth = plan.row_bytes};
  c.shows = at<uint32_t>(workspace, w.shows);
  c.rollout_norm = at<double>(workspace, w.rollout_norm);
  c.group_norm = at<double>(workspace, w.group_norm);
  c.best = at<uint32_t>(workspace, w.best);
  c.seed = at<unsigned long long>(workspace, w.seed);
  c.nearest = at<DeviceNearest>(workspace, w.nearest);
  c.costs = at<float>(workspace, w.costs);
  c.windows = at<float>(workspace, w.windows);
  c.minima = at<float>(workspace, w.minima);
  c.value = at<float>(workspace, w.value);
  c.residual = at<float>(workspace, w.residual);
  c.iterations = at<int32_t>(workspace, w.iterations);
  c.order = at<uint32_t>(workspace, w.order);
  blocks_ = at<DeviceBlock>(workspace, w.blocks);
  stretches_ = at<DeviceStretch>(workspace, w.stretches);
  look_counters_ = at<Counters>(workspace, w.look_counters);
  look_blocks_ = at<DeviceBlock>(workspace, w.look_blocks);
  scratch_ = at<float>(workspace, w.scratch);

  const auto upload = [&](int64_t offset, const auto& table) {
    stream.upload(at<char>(workspace, offset), table.data(),
                  static_cast<int64_t>(table.size() * sizeof(table[0])));
  };
  upload(w.rollouts, plan.rollouts);
  upload(w.groups, plan.groups);
  upload(w.members, plan.members);
  upload(w.blocks, plan.blocks);
  upload(w.stretches, plan.stretches);
  upload(w.signs, plan.signs);
}

void Pipeline::measure_states() const {
  const Stage stage("shear::states");
  stream_.launch("begin_call", begin_call, threads_for(std::max<int64_t>(1, call_.spans)), call_);
  by_dtype(dtype_, [&](auto dtype) {
    stream_.launch("measure_norms", measure_norms<decltype(dtype)::value>, warps_for(call_.tokens),
                   call_);
  });
  stream_.launch("mean_rollout_norms", mean_rollout_norms, {call_.n_rollouts, kThreads}, call_);
  stream_.launch("mean_group_norms", mean_group_norms, threads_for(call_.n_groups), call_);
  if (plan_.row_bytes > 0) center_groups();
}

void Pipeline::center_groups() const {
  stream_.launch("begin_tally", begin_tally,
                 threads_for(call_.n_groups * (kExponents + call_.rows.depth)), call_);
  stream_.launch("count_exponents", count_exponents, {call_.n_rollouts, kThreads}, call_);
  stream_.launch("choose_centers", choose_centers, {call_.n_groups, kThreads}, call_);
  by_dtype(dtype_, [&](auto dtype) {
    stream_.launch("add_states", add_states<decltype(dtype)::value>,
                   {(call_.tokens + kTokensPerSum - 1) / kTokensPerSum, kThreads}, call_);
  });
  stream_.launch("divide_sums", divide_sums, threads_for(call_.n_groups * call_.rows.depth), call_);
}

// Of all pairs of the chunk at hand, none pruned.
SolveArgs Pipeline::solve_args(const Call& call) const {
  SolveArgs args{};
  args.table = {.blocks = call.blocks,
                .n_blocks = call.n_blocks,
                .spans = call.span_table,
                .group_norm = call.group_norm,
                .costs = call.costs,
                .reg = config_.reg,
                .reg_is_cost = config_.reg_unit == RegUnit::kCost};
  args.pairs = call.chunk_pairs;
  args.n_iters = static_cast<int32_t>(config_.n_iters);
  args.tol = static_cast<float>(config_.tol);
  args.value = call.value;
  args.residual = call.residual;
  args.iterations = call.iterations;
  args.counts = call.counters->counts;
  args.stopped = call.stopped;
  args.scratch = scratch_;
  args.scratch_floats = plan_.solver.scratch_floats;
  args.next = &call.counters->taken;
  return args;
}

void Pipeline::bounds(const Call& call, int64_t strips) const {
  stream_.launch("reduce_costs", reduce_costs, {strips, kThreads}, call);
  stream_.launch("bound_pairs", bound_pairs, warps_for(call.bound_rows), call);
}

void Pipeline::solve(const Call& call) const {
  const Stage stage("shear::solve");
  SolveArgs args = solve_args(call);
  args.prune = config_.prune;
  args.best = call.best;
  if (config_.prune) {
    args.order = call.order;
    args.queued = &call.counters->seeds;
    args.next = &call.counters->seeds_taken;
    stream_.launch("queue_seeds", queue_seeds, threads_for(call.spans), call);
    launch_solver(stream_, plan_.solver, args);
    stream_.launch("count_survivors", count_survivors, threads_for(call.chunk_pairs), call);
    stream_.launch("queue_survivors", queue_survivors, threads_for(call.chunk_pairs), call);
    args.queued = &call.counters->queued;
    args.next = &call.counters->taken;
  }
  launch_solver(stream_, plan_.solver, args);
}

void Pipeline::run(float* matrix) const {
  measure_states();
  look(call_, matrix);
  if (plan_.row_bytes == 0) return;
  look_again();
  look_exactly();
}

// From int8 rows if there are any, unless exactly.
void Pipeline::look(const Call& of, float* matrix) const {
  const bool rounded = plan_.row_bytes > 0 && !of.exactly;
  for (const DeviceChunk& chunk : plan_.chunks) {
    Call call = of;
    call.blocks = blocks_ + chunk.block_begin;
    call.n_blocks = static_cast<int32_t>(chunk.blocks);
    call.chunk_pairs = chunk.pairs;
    call.bound_rows = chunk.bound_rows;
    call.stretches = stretches_ + chunk.stretch_begin;
    call.n_stretches = static_cast<int32_t>(chunk.stretches);
    call.places = chunk.places;
    stream_.launch("begin_chunk", begin_chunk, threads_for(call.spans), call);
    if (rounded) {
      const Stage stage("shear::states");
      by_dtype(dtype_, [&](auto dtype) {
        stream_.launch("round_states", round_states<decltype(dtype)::value>,
                       warps_for(chunk.places), call);
      });
    }
    {
      const Stage stage("shear::token_costs");
      launch_token_costs(
          stream_, call, dtype_,
          {.rounded = rounded, .large = plan_.large_tiles, .tiles = chunk.cost_tiles});
    }
    {
      const Stage stage("shear::bounds");
      bounds(call, chunk.strips);
    }
    if (config_.distance == Distance::kSinkhorn) solve(call);
    const Stage stage("shear::nearest_spans");
    stream_.launch("find_nearest", find_nearest, {plan_.span_tiles, kThreads}, call);
    if (matrix) {
      const int64_t rows = problem_.rollouts[0].span_end;
      stream_.launch("write_matrix", write_matrix, threads_for(chunk.pairs),
                     MatrixArgs{.call = call,
                                .matrix = matrix,
                                .cols = problem_.rollouts[1].span_end - rows,
                                .first_col = rows});
    }
  }
}

void Pipeline::look_again() const {
  const Stage stage("shear::second_look");
  const SecondLook& look = plan_.look;
  for (int64_t first = 0; first < look.spans; first += look.batch) {
    const int64_t count = std::min(look.batch, look.spans - first);
    Call call = call_;
    call.counters = look_counters_;
    call.stopped = look_counters_->counts + kStopped;
    call.blocks = look_blocks_;
    call.n_blocks = static_cast<int32_t>(count);
    call.chunk_pairs = call.bound_rows = count;
    const SolveArgs solver = solve_args(call);
    const LookArgs args{.call = call,
                        .plan = look,
                        .first = first,
                        .blocks = look_blocks_,
                        .table = solver.table,
                        .n_iters = solver.n_iters,
                        .stopped = call_.stopped};
    stream_.launch("begin_look", begin_look, threads_for(count), args);
    launch_token_costs(stream_, call, dtype_,
                       {.rounded = false, .large = false, .tiles = count * look.cost_tiles});
    bounds(call, count * look.strips);
    launch_solver(stream_, plan_.solver, solver);
    stream_.launch("end_look", end_look, threads_for(count), args);
  }
}

// The groups in which rounding shows, once more from products that are not rounded. Counts of pairs
// stay those of the first look, but for what is stopped.
void Pipeline::look_exactly() const {
  Call call = call_;
  call.exactly = true;
  call.counters = look_counters_;
  stream_.launch("begin_exact_look", begin_exact_look, threads_for(call.spans), call);
  look(call, nullptr);
}

void Pipeline::token_weights(float* weights) const {
  const Stage stage("shear::token_weights");
  stream_.launch("token_weights", cuda::token_weights, threads_for(call_.tokens),
                 WeightsArgs{.call = call_, .weights = weights});
}

void Pipeline::span_distances(const SpanOutputs& out) const {
  stream_.launch("write_distances", write_distances, threads_for(std::max<int64_t>(1, call_.spans)),
                 DistancesArgs{.call = call_, .out = out});
}

void Pipeline::pair_counts(int64_t* counts) const {
  stream_.launch("write_counts", write_counts, threads_for(kCounts),
                 CountsArgs{.call = call_, .counts = counts});
}

void Pipeline::check_finite() const {
  Counters seen;
  stream_.read(&seen, call_.counters, sizeof seen);
  if (seen.bad_token != ~0ull)
    throw std::invalid_argument(
        not_finite(static_cast<int64_t>(seen.bad_token), problem_.cu_seqlens, problem_.group_ids));
  if (seen.unfit_group != ~0ull)
    throw std::invalid_argument(unfit_norm(
        std::bit_cast<float>(static_cast<uint32_t>(seen.unfit_group & 0xffffffffu)),
        id_of_group(problem_, static_cast<int64_t>(seen.unfit_group >> 32)), config_.reg));
  warn_of_stopped(static_cast<int64_t>(seen.counts[kStopped]),
                  static_cast<int64_t>(seen.counts[kSolved]), config_.n_iters);
}

void solve_batch(const Stream& stream, const SinkhornBatch& batch, const SolverPlan& plan) {
  const Stage stage("shear::solve");
  auto* counters = static_cast<Counters*>(batch.counters);
  const PairTable table{.costs = batch.costs,
                        .reg = batch.reg,
                        .n = batch.n,
                        .m = batch.m,
                        .n_rows = batch.n_rows,
                        .n_cols = batch.n_cols};
  const BatchArgs begin{
      .table = table, .counters = counters, .value = batch.value, .iterations = batch.iterations};
  stream.launch("begin_batch", begin_batch, {1, kThreads}, begin);
  stream.launch("bound_problems", bound_problems, {batch.batch, kThreads}, begin);
  SolveArgs args{};
  args.table = table;
  args.pairs = batch.batch;
  args.next = &counters->taken;
  args.n_iters = batch.n_iters;
  args.tol = batch.tol;
  args.value = batch.value;
  args.residual = batch.residual;
  args.iterations = batch.iterations;
  args.counts = counters->counts;
  args.stopped = counters->counts + kStopped;
  args.scratch = batch.scratch;
  args.scratch_floats = plan.scratch_floats;
  launch_solver(stream, plan, args);
  unsigned long long bad = 0;
  stream.read(&bad, &counters->bad_token, sizeof bad);
  if (bad != ~0ull) throw std::invalid_argument(bad_cost());
}

}  // namespace shear::cuda
