// torch.ops.shear on a GPU: tensors to plain data and back. Offsets, groups and labels are read on
// the host, where the plan is made. The checks here keep memory safe for direct callers of
// torch.ops; the typed errors of the Python functions come from src/shear_ops/ops/batch.py.
#include <algorithm>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/library.h"
#include "cuda/pipeline.h"
#include "tensors.h"

namespace shear::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor new_tensor(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

Tensor new_workspace(const Tensor& like, int64_t bytes) {
  try {
    return new_tensor(like, {bytes}, ScalarType::Byte);
  } catch (const std::exception& error) {
    throw std::runtime_error(
        "shear_ops, CUDA backend: no room for the workspace of this call, " +
        std::to_string(bytes) +
        " bytes; fewer groups in a call, or a larger stride, need less: " + error.what());
  }
}

// On the host; from the device that is a copy which waits.
std::vector<int64_t> read_anywhere(const Stream& stream, const Tensor& tensor, const char* name) {
  if (!on_device(tensor)) return read_integers(tensor, name);
  if (stream.capturing())
    throw std::runtime_error(std::string(name) + " must be on the CPU while a graph is captured");
  return read_integers(
      torch::stable::to(tensor, torch::stable::Device(torch::headeronly::DeviceType::CPU)), name);
}

std::optional<Tensor> on_host(const std::optional<Tensor>& tensor) {
  if (!tensor || !on_device(*tensor)) return tensor;
  return torch::stable::to(*tensor, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// One call, up to its outputs.
class Operator {
 public:
  Operator(const Tensor& hidden, const Tensor& cu_seqlens, const Tensor& group_ids,
           const Tensor& labels, const Config& config)
      : config_(config),
        hidden_(checked(hidden, "hidden")),
        stream_(hidden_.get_device_index()),
        problem_(make_problem(read_anywhere(stream_, cu_seqlens, "cu_seqlens"),
                              read_anywhere(stream_, group_ids, "group_ids"),
                              read_anywhere(stream_, labels, "labels"), hidden_.size(0), config_)),
        plan_(make_device_plan(problem_, config_, hidden_.size(1), stream_.device())),
        workspace_(new_workspace(hidden_, plan_.workspace.bytes)),
        pipeline_(make_pipeline()) {}

  // Two rollouts, the first of `rows` tokens.
  Operator(const Tensor& both, int64_t rows, const Config& config)
      : config_(config),
        hidden_(checked(both, "x")),
        stream_(hidden_.get_device_index()),
        problem_(make_pair_problem(rows, hidden_.size(0) - rows, config_)),
        plan_(make_device_plan(problem_, config_, hidden_.size(1), stream_.device())),
        workspace_(new_workspace(hidden_, plan_.workspace.bytes)),
        pipeline_(make_pipeline()) {}

  const Tensor& hidden() const { return hidden_; }
  const Problem& problem() const { return problem_; }
  const Pipeline& pipeline() const { return pipeline_; }
  // The only wait of a call, at its end.
  void check_finite() const {
    if (config_.check_finite) pipeline_.check_finite();
  }

 private:
  static Tensor checked(const Tensor& states, const char* name) {
    STD_TORCH_CHECK(on_device(states), name, " must be on the GPU");
    return torch::stable::contiguous(states);
  }
  Pipeline make_pipeline() {
    const Dtype dtype = dtype_of_states(hidden_, "hidden");
    if (config_.distance != Distance::kSinkhorn && config_.distance != Distance::kChamfer)
      throw std::invalid_argument("distance must be sinkhorn or chamfer for backend 'cuda'");
    if (config_.check_finite && stream_.capturing())
      throw std::runtime_error(
          "check_finite must be False while a graph is captured, got True: it reads back a flag");
    return {stream_,
            problem_,
            config_,
            plan_,
            hidden_.const_data_ptr(),
            dtype,
            hidden_.size(1),
            workspace_.mutable_data_ptr()};
  }

  const Config config_;
  const Tensor hidden_;
  const Stream stream_;
  const Problem problem_;
  const DevicePlan plan_;
  Tensor workspace_;
  const Pipeline pipeline_;
};

std::tuple<Tensor, Tensor> span_weights_and_pairs(const Tensor& hidden, const Tensor& cu_seqlens,
                                                  const Tensor& group_ids, const Tensor& labels,
                                                  int64_t span, int64_t stride, double reg,
                                                  int64_t n_iters, double tol, int64_t reg_unit,
                                                  int64_t distance, int64_t normalization,
                                                  int64_t pooling, int64_t aggregation,
                                                  bool check_finite, bool prune) {
  const Operator op(hidden, cu_seqlens, group_ids, labels,
                    make_config({span, stride, reg, n_iters, tol, reg_unit, distance, normalization,
                                 pooling, aggregation, check_finite, prune}));
  Tensor weights = new_tensor(op.hidden(), {op.hidden().size(0)}, ScalarType::Float);
  op.pipeline().run(nullptr);
  Tensor counts = new_tensor(op.hidden(), {kCounts}, ScalarType::Long);
  op.pipeline().token_weights(weights.mutable_data_ptr<float>());
  op.pipeline().pair_counts(counts.mutable_data_ptr<int64_t>());
  op.check_finite();
  return {weights, counts};
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
  const Operator op(hidden, cu_seqlens, group_ids, labels,
                    make_config({span, stride, reg, n_iters, tol, reg_unit, distance, normalization,
                                 pooling, aggregation, check_finite, prune}));
  const auto spans = static_cast<int64_t>(op.problem().spans.size());
  Tensor distances = new_tensor(op.hidden(), {spans}, ScalarType::Float);
  Tensor nearest = new_tensor(op.hidden(), {spans}, ScalarType::Long);
  Tensor residual = new_tensor(op.hidden(), {spans}, ScalarType::Float);
  Tensor iterations = new_tensor(op.hidden(), {spans}, ScalarType::Int);
  Tensor bounds = new_tensor(op.hidden(), {spans, 3}, ScalarType::Long);
  Tensor counts = new_tensor(op.hidden(), {kCounts}, ScalarType::Long);
  op.pipeline().run(nullptr);
  op.pipeline().span_distances({.distance = distances.mutable_data_ptr<float>(),
                                .nearest = nearest.mutable_data_ptr<int64_t>(),
                                .residual = residual.mutable_data_ptr<float>(),
                                .iterations = iterations.mutable_data_ptr<int32_t>(),
                                .spans = bounds.mutable_data_ptr<int64_t>()});
  op.pipeline().pair_counts(counts.mutable_data_ptr<int64_t>());
  op.check_finite();
  return {distances, nearest, residual, iterations, bounds, counts};
}

// Rows of y below those of x.
Tensor stacked(const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.scalar_type() == y.scalar_type() &&
                      x.size(1) == y.size(1) && x.get_device_index() == y.get_device_index(),
                  "x and y must have one dtype and dim, and be on one device");
  Tensor both = new_tensor(x, {x.size(0) + y.size(0), x.size(1)}, x.scalar_type());
  Tensor top = torch::stable::narrow(both, 0, 0, x.size(0));
  Tensor bottom = torch::stable::narrow(both, 0, x.size(0), y.size(0));
  torch::stable::copy_(top, x);
  torch::stable::copy_(bottom, y);
  return both;
}

Tensor pair_distances(const Tensor& x, const Tensor& y, int64_t span, int64_t stride, double reg,
                      int64_t n_iters, double tol, int64_t reg_unit, int64_t distance,
                      int64_t normalization, int64_t pooling, int64_t aggregation,
                      bool check_finite, bool) {
  const Operator op(stacked(x, y), x.size(0),
                    make_config({span, stride, reg, n_iters, tol, reg_unit, distance, normalization,
                                 pooling, aggregation, check_finite, /*prune=*/false,
                                 /*every_pair=*/true}));
  const int64_t rows = op.problem().rollouts[0].span_end;
  const auto spans = static_cast<int64_t>(op.problem().spans.size());
  Tensor matrix = new_tensor(op.hidden(), {rows, spans - rows}, ScalarType::Float);
  op.pipeline().run(matrix.mutable_data_ptr<float>());
  op.check_finite();
  return matrix;
}

std::tuple<Tensor, Tensor, Tensor> sinkhorn(const Tensor& cost, const std::optional<Tensor>& n_rows,
                                            const std::optional<Tensor>& n_cols, double reg,
                                            int64_t n_iters, double tol) {
  const Config config = make_config({.reg = reg,
                                     .n_iters = n_iters,
                                     .tol = tol,
                                     .reg_unit = static_cast<int64_t>(RegUnit::kCost)});
  STD_TORCH_CHECK(on_device(cost) && cost.dim() == 3 && cost.scalar_type() == ScalarType::Float,
                  "cost must be a (B, n, m) float32 tensor on the GPU");
  const Tensor costs = torch::stable::contiguous(cost);
  const int64_t batch = costs.size(0), n = costs.size(1), m = costs.size(2);
  const Stream stream(costs.get_device_index());
  if (stream.capturing())
    throw std::runtime_error(
        "sinkhorn cannot be captured in a graph: it reads back a check of cost");
  auto lengths = used_lengths(on_host(n_rows), batch, n, "n_rows");
  const auto cols = used_lengths(on_host(n_cols), batch, m, "n_cols");
  lengths.insert(lengths.end(), cols.begin(), cols.end());
  STD_TORCH_CHECK(batch <= INT32_MAX, "cost must have fewer than 2^31 problems, got ", batch);

  Tensor value = new_tensor(costs, {batch}, ScalarType::Float);
  Tensor residual = new_tensor(costs, {batch}, ScalarType::Float);
  Tensor iterations = new_tensor(costs, {batch}, ScalarType::Int);
  if (batch == 0) return {value, residual, iterations};
  const SolverPlan plan = plan_solver(std::max(n, m), n, m, batch, stream.device());
  const int64_t length_bytes = (16 * batch + 255) / 256 * 256;
  Tensor workspace = new_workspace(costs, kCounterBytes + length_bytes + plan.scratch_bytes());
  char* bytes = static_cast<char*>(workspace.mutable_data_ptr());
  auto* on_gpu = reinterpret_cast<int64_t*>(bytes + kCounterBytes);
  stream.upload(on_gpu, lengths.data(), 16 * batch);
  solve_batch(stream,
              {.costs = costs.const_data_ptr<float>(),
               .batch = batch,
               .n = n,
               .m = m,
               .n_rows = on_gpu,
               .n_cols = on_gpu + batch,
               .reg = config.reg,
               .tol = static_cast<float>(config.tol),
               .n_iters = static_cast<int32_t>(config.n_iters),
               .value = value.mutable_data_ptr<float>(),
               .residual = residual.mutable_data_ptr<float>(),
               .iterations = iterations.mutable_data_ptr<int32_t>(),
               .counters = bytes,
               .scratch = reinterpret_cast<float*>(bytes + kCounterBytes + length_bytes)},
              plan);
  return {value, residual, iterations};
}

}  // namespace
}  // namespace shear::cuda

STABLE_TORCH_LIBRARY_IMPL(SHEAR_LIBRARY, SHEAR_DISPATCH_KEY, m) {
  m.impl("span_weights", TORCH_BOX(&shear::cuda::span_weights));
  m.impl("span_weights_and_pairs", TORCH_BOX(&shear::cuda::span_weights_and_pairs));
  m.impl("span_distances", TORCH_BOX(&shear::cuda::span_distances));
  m.impl("pair_distances", TORCH_BOX(&shear::cuda::pair_distances));
  m.impl("sinkhorn", TORCH_BOX(&shear::cuda::sinkhorn));
}
