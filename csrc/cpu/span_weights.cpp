// torch.ops.shear on the CPU: tensors to plain data, the pipeline, plain data to tensors. The
// checks here keep memory safe for callers of torch.ops; the typed errors of the Python functions
// come from src/shear_ops/ops/batch.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/pipeline.h"
#include "solve.h"
#include "tensors.h"

namespace shear::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

States states_of(const Tensor& hidden, const char* name) {
  STD_TORCH_CHECK(hidden.is_cpu(), name, " must be on the CPU");
  const Dtype dtype = dtype_of_states(hidden, name);
  return {hidden.const_data_ptr(), dtype, hidden.size(1)};
}

Tensor new_tensor(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

// Span pairs: total, bounded, abandoned, solved, stopped.
Tensor counts_of(const Pipeline& pipeline, const Tensor& like) {
  const PairCounts& counts = pipeline.counts();
  const int64_t row[5] = {counts.total, counts.bounded, counts.abandoned, counts.solved,
                          counts.stopped};
  Tensor pairs = new_tensor(like, {5}, ScalarType::Long);
  std::copy_n(row, 5, pairs.mutable_data_ptr<int64_t>());
  return pairs;
}

std::tuple<Tensor, Tensor> span_weights_and_pairs(const Tensor& hidden, const Tensor& cu_seqlens,
                                                  const Tensor& group_ids, const Tensor& labels,
                                                  int64_t span, int64_t stride, double reg,
                                                  int64_t n_iters, double tol, int64_t reg_unit,
                                                  int64_t distance, int64_t normalization,
                                                  int64_t pooling, int64_t aggregation,
                                                  bool check_finite, bool prune) {
  const Config config = make_config({span, stride, reg, n_iters, tol, reg_unit, distance,
                                     normalization, pooling, aggregation, check_finite, prune});
  const Tensor rows = torch::stable::contiguous(hidden);
  const States states = states_of(rows, "hidden");
  const Problem problem =
      make_problem(read_integers(cu_seqlens, "cu_seqlens"), read_integers(group_ids, "group_ids"),
                   read_integers(labels, "labels"), rows.size(0), config);
  Tensor weights = new_tensor(rows, {rows.size(0)}, ScalarType::Float);
  Pipeline pipeline(states, problem, config);
  pipeline.run(nullptr);
  pipeline.token_weights(weights.mutable_data_ptr<float>());
  return {weights, counts_of(pipeline, rows)};
}

Tensor span_weights(const Tensor& hidden, const Tensor& cu_seqlens, const Tensor& group_ids,
                    const Tensor& labels, int64_t span, int64_t stride, double reg, int64_t n_iters,
                    double tol, int64_t reg_unit, int64_t distance, int64_t normalization,
                    int64_t pooling, int64_t aggregation, bool check_finite, bool prune) {
  return std::get<0>(span_weights_and_pairs(hidden, cu_seqlens, group_ids, labels, span, stride,
                                            reg, n_iters, tol, reg_unit, distance, normalization,
                                            pooling, aggregation, check_finite, prune));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> span_distances(
    const Tensor& hidden, const Tensor& cu_seqlens, const Tensor& group_ids, const Tensor& labels,
    int64_t span, int64_t stride, double reg, int64_t n_iters, double tol, int64_t reg_unit,
    int64_t distance, int64_t normalization, int64_t pooling, int64_t aggregation,
    bool check_finite, bool prune) {
  const Config config = make_config({span, stride, reg, n_iters, tol, reg_unit, distance,
                                     normalization, pooling, aggregation, check_finite, prune});
  const Tensor rows = torch::stable::contiguous(hidden);
  const States states = states_of(rows, "hidden");
  const Problem problem =
      make_problem(read_integers(cu_seqlens, "cu_seqlens"), read_integers(group_ids, "group_ids"),
                   read_integers(labels, "labels"), rows.size(0), config);
  Pipeline pipeline(states, problem, config);
  pipeline.run(nullptr);
  const auto spans = static_cast<int64_t>(problem.spans.size());
  Tensor distances = new_tensor(rows, {spans}, ScalarType::Float);
  Tensor nearest = new_tensor(rows, {spans}, ScalarType::Long);
  Tensor residual = new_tensor(rows, {spans}, ScalarType::Float);
  Tensor iterations = new_tensor(rows, {spans}, ScalarType::Int);
  Tensor bounds = new_tensor(rows, {spans, 3}, ScalarType::Long);
  for (int64_t s = 0; s < spans; ++s) {
    const Nearest& best = pipeline.nearest()[s];
    distances.mutable_data_ptr<float>()[s] = best.distance;
    nearest.mutable_data_ptr<int64_t>()[s] = best.span;
    residual.mutable_data_ptr<float>()[s] = best.residual;
    iterations.mutable_data_ptr<int32_t>()[s] = best.iterations;
    const Span& at = problem.spans[s];
    const int64_t row[3] = {at.rollout, at.begin, at.end};
    std::copy_n(row, 3, bounds.mutable_data_ptr<int64_t>() + 3 * s);
  }
  return {distances, nearest, residual, iterations, bounds, counts_of(pipeline, rows)};
}

Tensor pair_distances(const Tensor& x, const Tensor& y, int64_t span, int64_t stride, double reg,
                      int64_t n_iters, double tol, int64_t reg_unit, int64_t distance,
                      int64_t normalization, int64_t pooling, int64_t aggregation,
                      bool check_finite, bool) {
  const Config config =
      make_config({span, stride, reg, n_iters, tol, reg_unit, distance, normalization, pooling,
                   aggregation, check_finite, /*prune=*/false, /*every_pair=*/true});
  const Tensor rows = torch::stable::contiguous(x), cols = torch::stable::contiguous(y);
  const States first = states_of(rows, "x"), second = states_of(cols, "y");
  STD_TORCH_CHECK(first.dtype == second.dtype && first.dim == second.dim,
                  "x and y must have one dtype and dim");
  const int64_t tokens = rows.size(0) + cols.size(0),
                token_bytes = first.dim * (first.dtype == Dtype::kFloat32 ? 4 : 2);
  Tensor both = new_tensor(rows, {tokens, first.dim}, rows.scalar_type());
  auto* bytes = static_cast<char*>(both.mutable_data_ptr());
  if (rows.size(0) > 0) std::memcpy(bytes, first.data, rows.size(0) * token_bytes);
  if (cols.size(0) > 0)
    std::memcpy(bytes + rows.size(0) * token_bytes, second.data, cols.size(0) * token_bytes);
  const Problem problem = make_pair_problem(rows.size(0), cols.size(0), config);
  const int64_t row_spans = problem.rollouts[0].span_end;
  Tensor matrix = new_tensor(
      rows, {row_spans, static_cast<int64_t>(problem.spans.size()) - row_spans}, ScalarType::Float);
  Pipeline pipeline(states_of(both, "x"), problem, config);
  pipeline.run(matrix.mutable_data_ptr<float>());
  return matrix;
}

std::tuple<Tensor, Tensor, Tensor> sinkhorn(const Tensor& cost, const std::optional<Tensor>& n_rows,
                                            const std::optional<Tensor>& n_cols, double reg,
                                            int64_t n_iters, double tol) {
  const Config config = make_config({.reg = reg,
                                     .n_iters = n_iters,
                                     .tol = tol,
                                     .reg_unit = static_cast<int64_t>(RegUnit::kCost)});
  STD_TORCH_CHECK(cost.is_cpu() && cost.dim() == 3 && cost.scalar_type() == ScalarType::Float,
                  "cost must be a (B, n, m) float32 tensor on the CPU");
  const Tensor costs = torch::stable::contiguous(cost);
  const int64_t batch = costs.size(0), n = costs.size(1), m = costs.size(2);
  const auto rows = used_lengths(n_rows, batch, n, "n_rows");
  const auto cols = used_lengths(n_cols, batch, m, "n_cols");

  Tensor value = new_tensor(costs, {batch}, ScalarType::Float);
  Tensor residual = new_tensor(costs, {batch}, ScalarType::Float);
  Tensor iterations = new_tensor(costs, {batch}, ScalarType::Int);
  if (batch == 0) return {value, residual, iterations};
  const float* data = costs.const_data_ptr<float>();
  float* values = value.mutable_data_ptr<float>();
  float* residuals = residual.mutable_data_ptr<float>();
  int32_t* counts = iterations.mutable_data_ptr<int32_t>();
  const float most = most_cost(config.reg);
  std::atomic<bool> finite{true};
  const Workers workers(sinkhorn_scratch(n, m, kWidest).floats);
  workers.run(batch, [&](int64_t b, float* scratch) {
    const float* first = data + b * n * m;
    for (int64_t i = 0; i < rows[b]; ++i)
      if (!kernels().below(first + i * m, cols[b], most)) finite = false;
    const Solution out =
        kernels().sinkhorn({.cost = first,
                            .ld = m,
                            .n = rows[b],
                            .m = cols[b],
                            .eps = static_cast<float>(config.reg),
                            .n_iters = config.n_iters,
                            .tol = static_cast<float>(config.tol),
                            .bound = bound_of(kernels(), first, m, rows[b], cols[b], scratch),
                            .goes_on = &Workers::asked,
                            .asked = &workers},
                           scratch);
    values[b] = out.distance;
    residuals[b] = out.residual;
    counts[b] = out.iterations;
  });
  if (!finite) throw std::invalid_argument(bad_cost());
  return {value, residual, iterations};
}

}  // namespace
}  // namespace shear::cpu

STABLE_TORCH_LIBRARY_IMPL(shear, CPU, m) {
  m.impl("span_weights", TORCH_BOX(&shear::cpu::span_weights));
  m.impl("span_weights_and_pairs", TORCH_BOX(&shear::cpu::span_weights_and_pairs));
  m.impl("span_distances", TORCH_BOX(&shear::cpu::span_distances));
  m.impl("pair_distances", TORCH_BOX(&shear::cpu::pair_distances));
  m.impl("sinkhorn", TORCH_BOX(&shear::cpu::sinkhorn));
}
