// Steps 2 to 4 of the paper up to the advantage: span distances / mean norm, then the maximum (or
// mean) over the covering spans.
#include <algorithm>

#include "cpu/pipeline.h"

namespace shear::cpu {

void Pipeline::token_weights(float* weights) const {
  workers_.run(static_cast<int64_t>(problem_.rollouts.size()), [&](int64_t i, float*) {
    const Rollout& rollout = problem_.rollouts[i];
    if (rollout.group < 0) {
      std::fill(weights + rollout.begin, weights + rollout.end, 1.f);
      return;
    }
    const double of_group = group_norm_[rollout.group];
    const bool own = config_.normalization == Normalization::kRollout &&
                     !(rollout_norm_[i] < kLeastRolloutNorm * of_group);
    const double scale = own ? rollout_norm_[i] : of_group;
    int64_t first = rollout.span_begin;  // the covering spans of a token are [first, last)
    int64_t last = first;
    for (int64_t t = rollout.begin; t < rollout.end; ++t) {
      while (problem_.spans[first].end <= t) ++first;
      while (last < rollout.span_end && problem_.spans[last].begin <= t) ++last;
      double highest = 0, total = 0;
      for (int64_t s = first; s < last; ++s) {
        const double distance = nearest_[s].distance;
        highest = distance <= highest ? highest : distance;  // keeps NaN
        total += distance;
      }
      const double pooled =
          config_.pooling == Pooling::kMax ? highest : total / static_cast<double>(last - first);
      weights[t] = static_cast<float>(pooled == 0 ? 0. : pooled / scale);
    }
  });
}

}  // namespace shear::cpu
