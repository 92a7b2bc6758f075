#include "cuda/pipeline.h"
#include "cuda/token_cost.cuh"

namespace shear::cuda {
namespace {

template <Dtype kDtype, typename Shape, bool kVectors>
void launch(const Stream& stream, const Call& call, int64_t tiles) {
  stream.launch("token_costs", token_costs<kDtype, Shape, kVectors>,
                {tiles, Shape::kThreads, Shape::kSharedBytes}, call);
}

template <Dtype kDtype>
void launch(const Stream& stream, const Call& call, bool large, int64_t tiles) {
  if (large && call.states.vectors)
    launch<kDtype, LargeCostTile, true>(stream, call, tiles);
  else if (large)
    launch<kDtype, LargeCostTile, false>(stream, call, tiles);
  else if (call.states.vectors)
    launch<kDtype, SmallCostTile, true>(stream, call, tiles);
  else
    launch<kDtype, SmallCostTile, false>(stream, call, tiles);
}

}  // namespace

void launch_token_costs(const Stream& stream, const Call& call, Dtype dtype, bool large,
                        int64_t tiles) {
  switch (dtype) {
    case Dtype::kFloat32:
      return launch<Dtype::kFloat32>(stream, call, large, tiles);
    case Dtype::kFloat16:
      return launch<Dtype::kFloat16>(stream, call, large, tiles);
    case Dtype::kBFloat16:
      return launch<Dtype::kBFloat16>(stream, call, large, tiles);
  }
}

}  // namespace shear::cuda
