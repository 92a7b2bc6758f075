#include "cuda/pipeline.h"
#include "cuda/sinkhorn.cuh"
#include "cuda/sinkhorn_wide.cuh"

namespace shear::cuda {

void launch_solver(const Stream& stream, const SolverPlan& plan, const SolveArgs& args) {
  switch (plan.solver) {
    case Solver::k32:
      return stream.launch("sinkhorn<Solver32>", sinkhorn<Solver32>, plan.grid, args);
    case Solver::k64:
      return stream.launch("sinkhorn<Solver64>", sinkhorn<Solver64>, plan.grid, args);
    case Solver::k100:
      return stream.launch("sinkhorn<Solver100>", sinkhorn<Solver100>, plan.grid, args);
    case Solver::k128:
      return stream.launch("sinkhorn<Solver128>", sinkhorn<Solver128>, plan.grid, args);
    case Solver::kWide:
      return stream.launch("sinkhorn_wide", sinkhorn_wide, plan.grid, args);
  }
}

}  // namespace shear::cuda
