// Python module _C: host facts and the plan of a call, no tensors. Importing it registers
// torch.ops.shear.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/kernels.h"
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
  return info;
}

py::dict plan(const std::vector<int64_t>& cu_seqlens, const std::vector<int64_t>& group_ids,
              const std::vector<int64_t>& labels, int64_t dim, int64_t span, int64_t stride,
              int64_t distance, int64_t tokens, int64_t threads) {
  const shear::Config config = shear::make_config(span, stride, 1., 1, 0., 0, distance, 0, 0, 0,
                                                  /*check_finite=*/true, /*prune=*/true);
  const shear::Problem problem = shear::make_problem(cu_seqlens, group_ids, labels, tokens, config);
  const shear::Plan plan = shear::make_plan(problem, config, dim, threads);
  py::dict out;
  out["spans"] = problem.spans.size();
  out["mixed_groups"] = problem.groups.size();
  out["pairs"] = plan.pairs;
  out["token_pairs"] = plan.token_pairs;
  out["chunks"] = plan.chunks.size();
  out["workspace_bytes"] = plan.workspace_bytes;
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("cpu_isa", [] { return shear::cpu::kernels().isa; });
  m.def("plan", &plan, py::arg("cu_seqlens"), py::arg("group_ids"), py::arg("labels"),
        py::kw_only(), py::arg("dim"), py::arg("span"), py::arg("stride"), py::arg("distance"),
        py::arg("tokens"), py::arg("threads"));
}
