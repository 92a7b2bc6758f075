// The queue of span pairs: which are solved in which order, and which their bounds say cannot win.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "cpu/pipeline.h"
#include "stage.h"

namespace shear::cpu {
namespace {

constexpr int64_t kPairsPerTask = 8;
constexpr int64_t kTileSpans = 8;       // rows and columns of spans whose pairs are solved together
constexpr int64_t kBestFirstShare = 8;  // one pair in so many is solved best first

void lower(uint32_t* best, float distance) {
  uint32_t bits;
  std::memcpy(&bits, &distance, sizeof bits);  // distances are >= 0: their bits have their order
  uint32_t seen = __atomic_load_n(best, __ATOMIC_RELAXED);
  while (bits < seen && !__atomic_compare_exchange_n(best, &seen, bits, true, __ATOMIC_RELAXED,
                                                     __ATOMIC_RELAXED)) {
  }
}

float as_float(const uint32_t* best) {
  const uint32_t bits = __atomic_load_n(best, __ATOMIC_RELAXED);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

// The pairs to solve, in the order in which the threads take them. The most promising for one of
// their spans come first: what is solved early prunes the most. The rest come tile by tile, since
// the token costs of neighbouring pairs overlap and are still in cache; all of them best first took
// a third longer.
std::vector<uint32_t> Pipeline::queue(const Chunk& chunk, const std::vector<float>& bounds) const {
  std::vector<uint32_t> pairs;
  pairs.reserve(bounds.size());
  std::vector<float> lowest(problem_.spans.size(), std::numeric_limits<float>::infinity());
  for (const Block& block : chunk.blocks) {
    if (!has_scale(block.group)) continue;
    for (int64_t row = 0; row < block.row_spans; row += kTileSpans)
      for (int64_t col = 0; col < block.col_spans; col += kTileSpans)
        for (int64_t a = row; a < std::min(block.row_spans, row + kTileSpans); ++a)
          for (int64_t b = col; b < std::min(block.col_spans, col + kTileSpans); ++b) {
            const auto p = static_cast<uint32_t>(block.pair(a, b));
            pairs.push_back(p);
            for (const int64_t span : {block.row_span + a, block.col_span + b})
              lowest[span] = std::min(lowest[span], bounds[p]);
          }
  }
  const auto first = static_cast<int64_t>(pairs.size()) / kBestFirstShare;
  if (first == 0) return pairs;
  std::vector<float> excess(bounds.size());  // over the lowest bound of one of its spans
  for (const Block& block : chunk.blocks)
    for (int64_t a = 0; a < block.row_spans; ++a)
      for (int64_t b = 0; b < block.col_spans; ++b) {
        const int64_t p = block.pair(a, b);
        excess[p] = bounds[p] - std::max(lowest[block.row_span + a], lowest[block.col_span + b]);
      }
  const auto better = [&](uint32_t a, uint32_t b) {
    return excess[a] < excess[b] || (excess[a] == excess[b] && a < b);
  };
  std::vector<uint32_t> ranked = pairs;
  std::nth_element(ranked.begin(), ranked.begin() + first, ranked.end(), better);
  const auto rest =
      std::stable_partition(pairs.begin(), pairs.end(),
                            [&, limit = ranked[first]](uint32_t p) { return better(p, limit); });
  std::sort(pairs.begin(), rest, better);
  return pairs;
}

void Pipeline::solve(const Chunk& chunk, const float* costs, Pairs& pairs) {
  const Stage stage("shear::solve");
  const std::vector<uint32_t> queue = this->queue(chunk, pairs.value);
  std::vector<int64_t> offsets;
  for (const Block& block : chunk.blocks) offsets.push_back(block.pair_offset);

  std::atomic<int64_t> bounded{0}, abandoned{0}, solved{0}, stopped{0};
  const int64_t total = static_cast<int64_t>(queue.size());
  workers_.run((total + kPairsPerTask - 1) / kPairsPerTask, [&](int64_t task, float* scratch) {
    const int64_t end = std::min(total, (task + 1) * kPairsPerTask);
    for (int64_t k = task * kPairsPerTask; k < end && !workers_.stopped(); ++k) {
      const uint32_t p = queue[k];
      const auto after = std::upper_bound(offsets.begin(), offsets.end(), static_cast<int64_t>(p));
      const Block& block = chunk.blocks[after - offsets.begin() - 1];
      const int64_t a = block.row_span + (p - block.pair_offset) / block.col_spans;
      const int64_t b = block.col_span + (p - block.pair_offset) % block.col_spans;
      const Span &row = problem_.spans[a], &col = problem_.spans[b];
      const float bound = pairs.value[p];
      if (config_.prune && cannot_win(bound, as_float(&best_[a]), as_float(&best_[b]))) {
        ++bounded;
        continue;
      }
      const Solution out = kernels_.sinkhorn(
          {.cost = costs + block.cost_offset + (row.begin - block.row_token) * block.ld +
                   (col.begin - block.col_token),
           .ld = block.ld,
           .n = row.size(),
           .m = col.size(),
           .eps = static_cast<float>(eps(block.group)),
           .n_iters = config_.n_iters,
           .tol = static_cast<float>(config_.tol),
           .bound = bound,
           .best_row = config_.prune ? &best_[a] : nullptr,
           .best_col = config_.prune ? &best_[b] : nullptr,
           .goes_on = &Workers::asked,
           .asked = &workers_},
          scratch);
      pairs.value[p] = out.distance;
      if (out.abandoned) {
        ++abandoned;
        continue;
      }
      ++solved;
      pairs.residual[p] = out.residual;
      pairs.iterations[p] = out.iterations;
      if (out.iterations >= config_.n_iters) {
        ++stopped;  // what has not converged is no upper bound: it prunes nothing
        continue;
      }
      lower(&best_[a], out.distance);
      lower(&best_[b], out.distance);
    }
  });
  counts_.bounded += bounded + static_cast<int64_t>(pairs.value.size()) - total;
  counts_.abandoned += abandoned;
  counts_.solved += solved;
  counts_.stopped += stopped;
}

}  // namespace shear::cpu
