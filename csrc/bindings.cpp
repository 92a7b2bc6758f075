// Python module _C: host facts and the plan of a call, no tensors. Importing it registers
// torch.ops.shear.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "device_plan.h"
#include "plan.h"
#include "problem.h"

namespace py = pybind11;

namespace {

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
  shear::make_config(span, stride, reg, n_iters, tol, reg_unit, distance, normalization, pooling,
                     aggregation, /*check_finite=*/true, /*prune=*/true);
}

struct Planned {
  shear::Problem problem;
  shear::Plan plan;
};

Planned plan_of(const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& group_ids,
                const std::vector<int64_t>& labels, int64_t dim, int64_t span, int64_t stride,
                int64_t distance, int64_t tokens, int64_t threads, const shear::Budget& budget) {
  const shear::Config config = shear::make_config(span, stride, 1., 1, 0., 0, distance, 0, 0, 0,
                                                  /*check_finite=*/true, /*prune=*/true);
  shear::Problem problem = shear::make_problem(cu_seqlens, group_ids, labels, tokens, config);
  shear::Plan plan = shear::make_plan(problem, config, dim, threads, budget);
  return {std::move(problem), std::move(plan)};
}

py::dict plan(const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& group_ids,
              const std::vector<int64_t>& labels, int64_t dim, int64_t span, int64_t stride,
              int64_t distance, int64_t tokens, int64_t threads) {
  const auto [problem, plan] = plan_of(cu_seqlens, group_ids, labels, dim, span, stride, distance,
                                       tokens, threads, shear::kCpuBudget);
  py::dict out;
  out["spans"] = problem.spans.size();
  out["mixed_groups"] = problem.groups.size();
  out["pairs"] = plan.pairs;
  out["token_pairs"] = plan.token_pairs;
  out["chunks"] = plan.chunks.size();
  out["workspace_bytes"] = plan.workspace_bytes;
  return out;
}

template <size_t kColumns>
py::array_t<int64_t> table(const std::vector<std::array<int64_t, kColumns>>& rows) {
  py::array_t<int64_t> out(
      {static_cast<py::ssize_t>(rows.size()), static_cast<py::ssize_t>(kColumns)});
  auto cells = out.mutable_unchecked<2>();
  for (size_t i = 0; i < rows.size(); ++i)
    for (size_t k = 0; k < kColumns; ++k)
      cells(static_cast<py::ssize_t>(i), static_cast<py::ssize_t>(k)) = rows[i][k];
  return out;
}

// The plan itself, for a backend that is driven from Python: a row per rollout, span, block, chunk.
py::dict make_plan(const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& group_ids,
                   const std::vector<int64_t>& labels, int64_t dim, int64_t span, int64_t stride,
                   int64_t distance, int64_t tokens, int64_t bytes_per_pair) {
  const auto [problem, plan] =
      plan_of(cu_seqlens, group_ids, labels, dim, span, stride, distance, tokens, /*threads=*/0,
              {shear::kDeviceChunkBytes, bytes_per_pair});
  std::vector<std::array<int64_t, 5>> rollouts;
  for (const shear::Rollout& r : problem.rollouts)
    rollouts.push_back({r.begin, r.end, r.span_begin, r.span_end, r.group});
  std::vector<std::array<int64_t, 3>> spans;
  for (const shear::Span& s : problem.spans) spans.push_back({s.begin, s.end, s.rollout});
  std::vector<std::array<int64_t, 13>> blocks;
  std::vector<std::array<int64_t, 5>> chunks;
  for (const shear::Chunk& chunk : plan.chunks) {
    chunks.push_back({static_cast<int64_t>(blocks.size()),
                      static_cast<int64_t>(blocks.size() + chunk.blocks.size()), chunk.cost_floats,
                      chunk.row_floats, chunk.pairs});
    for (const shear::Block& b : chunk.blocks)
      blocks.push_back({b.group, b.row_span, b.row_spans, b.col_span, b.col_spans, b.row_token,
                        b.row_tokens, b.col_token, b.col_tokens, b.ld, b.cost_offset, b.row_offset,
                        b.pair_offset});
  }
  py::dict out;
  out["rollouts"] = table(rollouts);
  out["spans"] = table(spans);
  out["blocks"] = table(blocks);
  out["chunks"] = table(chunks);
  out["groups"] = problem.groups.size();
  out["pairs"] = plan.pairs;
  return out;
}

py::dict device_plan(const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& group_ids,
                     const std::vector<int64_t>& labels, int64_t dim, int64_t span, int64_t stride,
                     int64_t distance, int64_t tokens, int64_t processors, int64_t shared_bytes) {
  const shear::Config config = shear::make_config(span, stride, 1., 1, 0., 0, distance, 0, 0, 0,
                                                  /*check_finite=*/true, /*prune=*/true);
  const shear::Problem problem = shear::make_problem(cu_seqlens, group_ids, labels, tokens, config);
  const shear::DevicePlan plan =
      shear::make_device_plan(problem, config, dim, {processors, shared_bytes});
  py::list chunks;
  for (const shear::DeviceChunk& chunk : plan.chunks) {
    py::dict entry;
    entry["blocks"] = chunk.blocks;
    entry["cost_tiles"] = chunk.cost_tiles;
    entry["strips"] = chunk.strips;
    entry["bound_rows"] = chunk.bound_rows;
    entry["pairs"] = chunk.pairs;
    chunks.append(entry);
  }
  py::dict out;
  out["chunks"] = chunks;
  out["large_tiles"] = plan.large_tiles;
  out["solver"] = static_cast<int>(plan.solver.solver);
  out["solver_grid"] = plan.solver.grid;
  out["solver_threads"] = plan.solver.threads;
  out["solver_shared_bytes"] = plan.solver.shared_bytes;
  out["scratch_bytes"] = 4 * plan.solver.grid * plan.solver.scratch_floats;
  out["table_bytes"] = plan.workspace.tables;
  out["workspace_bytes"] = plan.workspace.bytes;
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("cpu_isa", [] { return shear::cpu::kernels().isa; });
  m.def("plan", &plan, py::arg("cu_seqlens"), py::arg("group_ids"), py::arg("labels"),
        py::kw_only(), py::arg("dim"), py::arg("span"), py::arg("stride"), py::arg("distance"),
        py::arg("tokens"), py::arg("threads"));
  m.def("check_config", &check_config, py::kw_only(), py::arg("span"), py::arg("stride"),
        py::arg("reg"), py::arg("n_iters"), py::arg("tol"), py::arg("reg_unit"),
        py::arg("distance"), py::arg("normalization"), py::arg("pooling"), py::arg("aggregation"));
  m.def("make_plan", &make_plan, py::arg("cu_seqlens"), py::arg("group_ids"), py::arg("labels"),
        py::kw_only(), py::arg("dim"), py::arg("span"), py::arg("stride"), py::arg("distance"),
        py::arg("tokens"), py::arg("bytes_per_pair"));
  m.def("device_plan", &device_plan, py::arg("cu_seqlens"), py::arg("group_ids"), py::arg("labels"),
        py::kw_only(), py::arg("dim"), py::arg("span"), py::arg("stride"), py::arg("distance"),
        py::arg("tokens"), py::arg("processors"), py::arg("shared_bytes"));
}
