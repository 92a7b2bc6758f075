// Every span's nearest span among the pairs of a chunk, and of the chunks before.
#include <algorithm>
#include <cmath>

#include "cpu/pipeline.h"
#include "stage.h"

namespace shear::cpu {

void Pipeline::collect(const Chunk& chunk, const Pairs& pairs) {
  const Stage stage("shear::nearest_spans");
  const bool mean = config_.aggregation == Aggregation::kMean;
  const auto offer = [&](int64_t span, int64_t other, int64_t p) {
    Nearest& best = nearest_[span];
    const float distance = pairs.value[p];
    best.sum += distance;
    ++best.count;
    if (mean) {
      best.residual = std::max(best.residual, pairs.residual[p]);
      best.iterations = std::max(best.iterations, pairs.iterations[p]);
    }
    if (distance < best.distance ||
        (distance == best.distance && (best.span < 0 || other < best.span)) ||
        std::isnan(distance)) {
      best.distance = distance;
      best.span = other;
      if (!mean) {
        best.residual = pairs.residual[p];
        best.iterations = pairs.iterations[p];
      }
    }
  };
  for (const Block& block : chunk.blocks)
    for (int64_t a = 0; a < block.row_spans; ++a)
      for (int64_t b = 0; b < block.col_spans; ++b) {
        const int64_t p = block.pair(a, b);
        offer(block.row_span + a, block.col_span + b, p);
        offer(block.col_span + b, block.row_span + a, p);
      }
}

void Pipeline::finish_means() {
  if (config_.aggregation != Aggregation::kMean) return;
  for (Nearest& best : nearest_)
    if (best.count > 0)
      best.distance = static_cast<float>(best.sum / static_cast<double>(best.count));
}

}  // namespace shear::cpu
