// What the int8 rows of a call are, for a test that compares them with those of the CPU backend.
#include <algorithm>
#include <vector>

#include "cuda/pipeline.h"

// Rows (tokens, depth), steps (tokens) and center (dim) of one group. Its states are one span pair,
// so that all its rows are those of one chunk.
extern "C" __attribute__((visibility("default"))) void shear_emulated_rows(
    const void* states, int dtype, int64_t tokens, int64_t dim, int8_t* rows, float* scale,
    float* center) {
  using namespace shear;
  const Config config = make_config({.span = tokens, .stride = tokens, .check_finite = false});
  const Problem problem = make_pair_problem(1, tokens - 1, config);
  const cuda::Stream stream(0);
  const cuda::DevicePlan plan = cuda::make_device_plan(problem, config, dim, stream.device());
  std::vector<uint64_t> room(plan.workspace.bytes / 8 + 32, ~uint64_t{0});
  auto* workspace =
      reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(room.data()) + 255) / 256 * 256);
  cuda::Pipeline(stream, problem, config, plan, states, static_cast<Dtype>(dtype), dim, workspace)
      .run(nullptr);
  std::copy_n(reinterpret_cast<const int8_t*>(workspace + plan.workspace.row),
              tokens * plan.row_bytes, rows);
  std::copy_n(reinterpret_cast<const float*>(workspace + plan.workspace.scale), tokens, scale);
  std::copy_n(reinterpret_cast<const float*>(workspace + plan.workspace.center), dim, center);
}
