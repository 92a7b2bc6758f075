// Python module _C: host facts and the plan of a call, no tensors. Importing it registers
// torch.ops.shear.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "chunks.h"
#include "cpu/kernels/isa.h"
#include "cpu/kernels/kernels.h"
#include "cpu/pipeline.h"
#include "cpu/plan.h"
#include "cpu/workers.h"
#include "cuda/plan.h"
#include "cuda/tiles.h"
#include "problem.h"
#include "rounding.h"
#include "solve.h"
#include "token_cost.h"

namespace py = pybind11;

namespace {

// What a Python signal handler raised, on its way through torch's dispatcher to the caller. Of
// pybind11's exceptions this is the one that its base class carries from one module to another by a
// virtual function alone, so that torch's version of pybind11 does not matter.
class Raised : public py::builtin_exception {
 public:
  Raised() : builtin_exception("interrupted"), error_(std::make_shared<py::error_already_set>()) {}
  void set_error() const override { error_->restore(); }

 private:
  std::shared_ptr<py::error_already_set> error_;
};

unsigned long main_thread;  // NOLINT: as in Python's C API

// Runs the handlers of signals that have arrived, Ctrl-C among them; throws what they raise.
// Operators run without the GIL, and Python handles signals in its main thread only.
void check_signals() {
  using Clock = std::chrono::steady_clock;
  static Clock::time_point last;  // of the main thread
  if (PyThread_get_thread_ident() != main_thread) return;
  const Clock::time_point now = Clock::now();
  if (now - last < std::chrono::milliseconds(50)) return;
  last = now;
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw Raised();
}

py::dict build_info() {
  py::dict sets;
  for (const auto& [name, supported] : shear::cpu::instruction_sets())
    sets[py::str(name)] = supported;
  py::dict info;
  info["version"] = SHEAR_VERSION;
  info["compiler"] = SHEAR_COMPILER;
  info["torch_headers"] = SHEAR_TORCH_HEADERS;
  info["torch_abi"] = SHEAR_TORCH_ABI;
  info["instruction_sets"] = sets;
#ifdef SHEAR_CUDA_TOOLKIT
  info["cuda_toolkit"] = SHEAR_CUDA_TOOLKIT;
  info["cuda_architectures"] = SHEAR_CUDA_ARCHITECTURES;
#else
  info["cuda_toolkit"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

void check_config(int64_t span, int64_t stride, double reg, int64_t n_iters, double tol,
                  int64_t reg_unit, int64_t distance, int64_t normalization, int64_t pooling,
                  int64_t aggregation) {
  shear::make_config(
      {span, stride, reg, n_iters, tol, reg_unit, distance, normalization, pooling, aggregation});
}

py::dict plan(const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& group_ids,
              const std::vector<int64_t>& labels, int64_t dim, int64_t span, int64_t stride,
              int64_t distance, int64_t tokens, int64_t threads) {
  if (threads < 1 || threads > 65'536)
    throw std::invalid_argument("threads must be in [1, 65536], got " + std::to_string(threads));
  const shear::Config config =
      shear::make_config({.span = span, .stride = stride, .distance = distance});
  const shear::Problem problem = shear::make_problem(cu_seqlens, group_ids, labels, tokens, config);
  const shear::cpu::Plan plan = shear::cpu::make_plan(problem, config, dim, threads);
  py::dict out;
  out["spans"] = problem.spans.size();
  out["mixed_groups"] = problem.groups.size();
  out["pairs"] = plan.chunks.pairs;
  out["token_pairs"] = plan.chunks.token_pairs;
  out["chunks"] = plan.chunks.chunks.size();
  out["workspace_bytes"] = plan.workspace_bytes;
  return out;
}

// The columns of make_plan's tables, in their order.
// clang-format off
#define SHEAR_CHUNK_COLUMNS(X)                                                           \
  X(block_begin) X(block_end) X(stretch_begin) X(stretch_end) X(cost_floats) X(row_floats) \
  X(pairs) X(places)
// clang-format on
struct ChunkRow {
  SHEAR_CHUNK_COLUMNS(SHEAR_FIELD)
};

template <size_t kCount>
py::tuple names(const char* const (&list)[kCount]) {
  py::tuple out(kCount);
  for (size_t i = 0; i < kCount; ++i) out[i] = py::str(list[i]);
  return out;
}

py::dict columns() {
  constexpr const char* rollout[] = {SHEAR_ROLLOUT_COLUMNS(SHEAR_NAME)};
  constexpr const char* span[] = {SHEAR_SPAN_COLUMNS(SHEAR_NAME)};
  constexpr const char* block[] = {SHEAR_BLOCK_COLUMNS(SHEAR_NAME)};
  constexpr const char* stretch[] = {SHEAR_STRETCH_COLUMNS(SHEAR_NAME)};
  constexpr const char* chunk[] = {SHEAR_CHUNK_COLUMNS(SHEAR_NAME)};
  py::dict out;
  out["rollout"] = names(rollout);
  out["span"] = names(span);
  out["block"] = names(block);
  out["stretch"] = names(stretch);
  out["chunk"] = names(chunk);
  return out;
}

py::dict choices() {
  py::dict out;
  out["reg_unit"] = names(shear::kRegUnits);
  out["distance"] = names(shear::kDistances);
  out["normalization"] = names(shear::kNormalizations);
  out["pooling"] = names(shear::kPoolings);
  out["aggregation"] = names(shear::kAggregations);
  return out;
}

// What shear::travel asks of an engine.
struct Pair {
  int n, m;
  float entropy_term, eps_of_pair, range_of_costs;
  int rows() const { return n; }
  int cols() const { return m; }
  float entropy() const { return entropy_term; }
  float eps() const { return eps_of_pair; }
  float range() const { return range_of_costs; }
};

float travel(int n, int m, float tol, float entropy, float eps, float range) {
  return shear::travel(Pair{n, m, entropy, eps, range}, tol);
}

// The constants of csrc/solve.h, for Triton and the tests.
py::dict solver() {
  py::dict out;
  out["far"] = shear::kFar;
  out["log2e"] = shear::kLog2e;
  out["top_level"] = shear::kTopLevel;
  out["test_every"] = shear::kTestEvery;
  out["retreat_ratio"] = shear::kRetreatRatio;
  out["first_check"] = shear::kFirstCheck;
  out["finish_again"] = shear::kFinishAgain;
  out["tolerance_share"] = shear::kToleranceShare;
  out["drift_bits"] = shear::kDriftBits;
  out["entropy_offset"] = shear::kEntropyOffset;
  out["hot_range"] = shear::kHotRange;
  out["cooling"] = shear::kCooling;
  out["few_tokens"] = shear::kFewTokens;
  out["few_travel"] = shear::kFewTravel;
  out["least_residual"] = shear::kLeastResidual;
  out["fresh"] = shear::kFresh;
  return out;
}

// The constants of csrc/rounding.h, for Triton.
py::dict rounding() {
  py::dict out;
  out["most_int8"] = shear::kMostInt8;
  out["least_entry"] = shear::kLeastEntry;
  py::dict steps;
  for (const int64_t block : {shear::kShortBlock, shear::kLongBlock})
    steps[py::int_(block)] = shear::step_of_row(1.f, block);
  out["step"] = steps;
  out["exponents"] = shear::kExponents;
  out["center_spread"] = shear::kCenterSpread;
  out["center_bits"] = shear::kCenterBits;
  out["least_limit"] = shear::kLeastLimit;
  out["most_error"] = shear::kMostRoundingError;
  return out;
}

template <typename Row>
py::array_t<int64_t> table(const std::vector<Row>& rows) {
  constexpr size_t kColumns = sizeof(Row) / sizeof(int64_t);
  py::array_t<int64_t> out(
      {static_cast<py::ssize_t>(rows.size()), static_cast<py::ssize_t>(kColumns)});
  if (!rows.empty()) std::memcpy(out.mutable_data(), rows.data(), rows.size() * sizeof(Row));
  return out;
}

// The chunks themselves, for a backend that is driven from Python: a row per rollout, span, block,
// stretch, chunk.
py::dict make_plan(const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& group_ids,
                   const std::vector<int64_t>& labels, int64_t dim, int64_t span, int64_t stride,
                   int64_t distance, int64_t aggregation, bool every_pair, int64_t tokens,
                   int64_t bytes_per_pair) {
  const shear::Config config = shear::make_config({.span = span,
                                                   .stride = stride,
                                                   .distance = distance,
                                                   .aggregation = aggregation,
                                                   .every_pair = every_pair});
  const shear::Problem problem = shear::make_problem(cu_seqlens, group_ids, labels, tokens, config);
  const int64_t row_bytes = shear::row_bytes(config, dim);
  const shear::Chunks plan =
      shear::make_chunks(problem, config, row_bytes, {shear::kDeviceChunkBytes, bytes_per_pair});
  std::vector<shear::Block> blocks;
  std::vector<shear::Stretch> stretches;
  std::vector<ChunkRow> chunks;
  for (const shear::Chunk& chunk : plan.chunks) {
    const auto begin = static_cast<int64_t>(blocks.size());
    const auto stretch_begin = static_cast<int64_t>(stretches.size());
    blocks.insert(blocks.end(), chunk.blocks.begin(), chunk.blocks.end());
    stretches.insert(stretches.end(), chunk.stretches.begin(), chunk.stretches.end());
    chunks.push_back({.block_begin = begin,
                      .block_end = static_cast<int64_t>(blocks.size()),
                      .stretch_begin = stretch_begin,
                      .stretch_end = static_cast<int64_t>(stretches.size()),
                      .cost_floats = chunk.cost_floats,
                      .row_floats = chunk.row_floats,
                      .pairs = chunk.pairs,
                      .places = chunk.places});
  }
  py::dict out;
  out["rollouts"] = table(problem.rollouts);
  out["spans"] = table(problem.spans);
  out["blocks"] = table(blocks);
  out["stretches"] = table(stretches);
  out["chunks"] = table(chunks);
  out["groups"] = problem.groups.size();
  out["pairs"] = plan.pairs;
  out["row_bytes"] = row_bytes;
  return out;
}

py::dict device_plan(const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& group_ids,
                     const std::vector<int64_t>& labels, int64_t dim, int64_t span, int64_t stride,
                     int64_t distance, int64_t tokens, int64_t processors, int64_t shared_bytes) {
  const shear::Config config =
      shear::make_config({.span = span, .stride = stride, .distance = distance});
  const shear::Problem problem = shear::make_problem(cu_seqlens, group_ids, labels, tokens, config);
  const shear::cuda::DevicePlan plan = shear::cuda::make_device_plan(
      problem, config, dim, {.processors = processors, .shared_bytes = shared_bytes});
  py::list chunks;
  for (const shear::cuda::DeviceChunk& chunk : plan.chunks) {
    py::dict entry;
    entry["blocks"] = chunk.blocks;
    entry["cost_tiles"] = chunk.cost_tiles;
    entry["strips"] = chunk.strips;
    entry["bound_rows"] = chunk.bound_rows;
    entry["pairs"] = chunk.pairs;
    entry["places"] = chunk.places;
    chunks.append(entry);
  }
  py::dict out;
  out["chunks"] = chunks;
  out["second_look"] = plan.look.spans;
  out["second_look_batch"] = plan.look.batch;
  out["large_tiles"] = plan.large_tiles;
  out["solver"] = static_cast<int>(plan.solver.solver);
  out["solver_grid"] = plan.solver.grid.ctas;
  out["solver_threads"] = plan.solver.grid.threads;
  out["solver_shared_bytes"] = plan.solver.grid.shared_bytes;
  out["scratch_bytes"] = plan.solver.scratch_bytes();
  out["table_bytes"] = plan.workspace.tables;
  out["workspace_bytes"] = plan.workspace.bytes;
  return out;
}

// Int8 rows, steps and center of the states of one group (tokens, dim), by csrc/rounding.h.
py::tuple int8_rows(const py::array_t<float, py::array::c_style | py::array::forcecast>& states) {
  if (states.ndim() != 2 || states.shape(0) < 2 || states.shape(1) < shear::kLeastRoundedDim ||
      states.shape(1) > shear::kMostRoundedDim)
    throw std::invalid_argument("states must be (tokens, dim), two tokens or more, dim in [" +
                                std::to_string(shear::kLeastRoundedDim) + ", " +
                                std::to_string(shear::kMostRoundedDim) + "]");
  const int64_t tokens = states.shape(0), dim = states.shape(1);
  const shear::Config config = shear::make_config({.span = shear::kLeastRoundedSpan});
  const shear::Problem problem = shear::make_pair_problem(1, tokens - 1, config);
  py::array_t<int8_t> rows({tokens, shear::rounded_depth(dim)});
  py::array_t<float> scale(tokens), center(dim);
  shear::cpu::Pipeline pipeline({states.data(), shear::Dtype::kFloat32, dim}, problem, config);
  pipeline.int8_rows(rows.mutable_data(), scale.mutable_data(), center.mutable_data());
  return py::make_tuple(rows, scale, center);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  main_thread =
      py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  shear::cpu::check_interrupt = &check_signals;
  m.def("build_info", &build_info);
  m.def("cpu_isa", [] { return shear::cpu::kernels().isa; });
  m.attr("COLUMNS") = columns();
  m.attr("CHOICES") = choices();
  m.attr("SOLVER") = solver();
  m.attr("ROUNDING") = rounding();
  m.attr("STATIC_SHARED_BYTES") = shear::cuda::kStaticSharedBytes;
  m.attr("NEAR_DUPLICATE") = shear::kNearDuplicate;
  m.attr("NEAR_ROUNDED") = shear::kNearRounded;
  m.def("int8_rows", &int8_rows, py::arg("states"));
  m.attr("LEAST_ROLLOUT_NORM") = shear::kLeastRolloutNorm;
  m.attr("MOST_NORM") = shear::kMostNorm;
  m.attr("LEAST_NORM") = shear::kLeastNorm;
  m.attr("FAINT_NORM") = shear::kFaintNorm;
  m.def("omega_of", &shear::omega_of, py::arg("level"));
  m.def("next_level", &shear::next_level, py::arg("level"), py::arg("ratio"));
  m.def("tolerance", &shear::tolerance, py::arg("tol"), py::arg("entropy"), py::arg("eps"),
        py::arg("distance"));
  m.def("entropy_term", &shear::entropy_term, py::arg("eps"), py::arg("log_longest"));
  m.def("may_hide", &shear::may_hide, py::arg("n"), py::arg("m"), py::arg("tol"));
  m.def("travel", &travel, py::arg("n"), py::arg("m"), py::arg("tol"), py::arg("entropy"),
        py::arg("eps"), py::arg("range"));
  m.def("first_heat", &shear::first_heat, py::arg("range"));
  m.def("stopped_warning", &shear::stopped_warning, py::arg("stopped"), py::arg("solved"),
        py::arg("n_iters"));
  m.def("check_batch", &shear::check_batch, py::arg("cu_seqlens"), py::arg("group_ids"),
        py::arg("labels"), py::kw_only(), py::arg("tokens"));
  m.def("not_finite", &shear::not_finite, py::arg("token"), py::arg("cu_seqlens"),
        py::arg("group_ids"));
  m.def(
      "norm_range",
      [](int64_t distance, int64_t reg_unit, double reg) {
        const shear::NormRange range = shear::norm_range(
            shear::make_config({.reg = reg, .reg_unit = reg_unit, .distance = distance}));
        return std::pair(range.least, range.most);
      },
      py::arg("distance"), py::arg("reg_unit"), py::arg("reg"));
  m.def("unfit_norm", &shear::unfit_norm, py::arg("norm"), py::arg("group"), py::arg("reg"));
  m.def("bad_cost", &shear::bad_cost);
  m.def("most_cost", &shear::most_cost, py::arg("reg"));
  m.def("plan", &plan, py::arg("cu_seqlens"), py::arg("group_ids"), py::arg("labels"),
        py::kw_only(), py::arg("dim"), py::arg("span"), py::arg("stride"), py::arg("distance"),
        py::arg("tokens"), py::arg("threads"));
  m.def("check_config", &check_config, py::kw_only(), py::arg("span"), py::arg("stride"),
        py::arg("reg"), py::arg("n_iters"), py::arg("tol"), py::arg("reg_unit"),
        py::arg("distance"), py::arg("normalization"), py::arg("pooling"), py::arg("aggregation"));
  m.def("make_plan", &make_plan, py::arg("cu_seqlens"), py::arg("group_ids"), py::arg("labels"),
        py::kw_only(), py::arg("dim"), py::arg("span"), py::arg("stride"), py::arg("distance"),
        py::arg("aggregation"), py::arg("every_pair"), py::arg("tokens"),
        py::arg("bytes_per_pair"));
  m.def("device_plan", &device_plan, py::arg("cu_seqlens"), py::arg("group_ids"), py::arg("labels"),
        py::kw_only(), py::arg("dim"), py::arg("span"), py::arg("stride"), py::arg("distance"),
        py::arg("tokens"), py::arg("processors"), py::arg("shared_bytes"));
}
