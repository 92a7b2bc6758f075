#include "cuda/pipeline.h"
#include "cuda/token_cost.cuh"

namespace shear::cuda {
namespace {

template <Dtype kDtype, typename Shape, bool kVectors, bool kRounded>
void launch(const Stream& stream, const Call& call, int64_t tiles) {
  stream.launch("token_costs", token_costs<kDtype, Shape, kVectors, kRounded>,
                {tiles, Shape::kThreads, Shape::kSharedBytes}, call);
}

template <Dtype kDtype, typename Shape>
void launch(const Stream& stream, const Call& call, bool rounded, int64_t tiles) {
  if (rounded)
    launch<kDtype, Shape, true, true>(stream, call, tiles);
  else if (call.states.vectors)
    launch<kDtype, Shape, true, false>(stream, call, tiles);
  else
    launch<kDtype, Shape, false, false>(stream, call, tiles);
}

template <Dtype kDtype>
void launch(const Stream& stream, const Call& call, const CostLaunch& how) {
  if (how.large)
    launch<kDtype, LargeCostTile>(stream, call, how.rounded, how.tiles);
  else
    launch<kDtype, SmallCostTile>(stream, call, how.rounded, how.tiles);
}

}  // namespace

void launch_token_costs(const Stream& stream, const Call& call, Dtype dtype,
                        const CostLaunch& how) {
  switch (dtype) {
    case Dtype::kFloat32:
      return launch<Dtype::kFloat32>(stream, call, how);
    case Dtype::kFloat16:
      return launch<Dtype::kFloat16>(stream, call, how);
    case Dtype::kBFloat16:
      return launch<Dtype::kBFloat16>(stream, call, how);
  }
}

}  // namespace shear::cuda
