// The second look at every span's nearest span: its token costs are taken from a float32 product
// and its distance is solved again, so that the values that leave a call carry no rounding to int8
// and only the choice among nearly equal spans does.
#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "cpu/pipeline.h"
#include "stage.h"

namespace shear::cpu {

// Returns for every group whether rounding showed in one of the distances.
std::vector<char> Pipeline::look_again() {
  const Stage stage("shear::second_look");
  std::vector<std::pair<int64_t, int64_t>> pairs;  // row span, column span
  for (size_t g = 0; g < problem_.groups.size(); ++g) {
    if (!has_scale(static_cast<int64_t>(g))) continue;
    const Group& group = problem_.groups[g];
    for (const auto* side : {&group.correct, &group.incorrect})
      for (const int64_t i : *side)
        for (int64_t s = problem_.rollouts[i].span_begin; s < problem_.rollouts[i].span_end; ++s)
          pairs.push_back(side == &group.correct ? std::pair(s, nearest_[s].span)
                                                 : std::pair(nearest_[s].span, s));
  }
  std::sort(pairs.begin(), pairs.end());  // neighbours share states
  pairs.erase(std::unique(pairs.begin(), pairs.end()), pairs.end());
  std::atomic<int64_t> stopped{0};
  std::vector<char> shows_in(pairs.size());
  workers_.run(static_cast<int64_t>(pairs.size()), [&](int64_t p, float* scratch) {
    const auto [a, b] = pairs[p];
    const Span &row = problem_.spans[a], &col = problem_.spans[b];
    const int64_t n = row.size(), m = col.size(), group = problem_.rollouts[row.rollout].group;
    float* const costs = scratch + plan_.scratch_floats - n * m;
    costs_of({.states = states_,
              .row = row.begin,
              .rows = n,
              .col = col.begin,
              .cols = m,
              .center = &center_[group * states_.dim],
              .sq_norm = sq_norm_.data(),
              .out = costs,
              .ld = m,
              .scratch = scratch});
    const Solution out = kernels_.sinkhorn({.cost = costs,
                                            .ld = m,
                                            .n = n,
                                            .m = m,
                                            .eps = static_cast<float>(eps(group)),
                                            .n_iters = config_.n_iters,
                                            .tol = static_cast<float>(config_.tol),
                                            .bound = bound_of(kernels_, costs, m, n, m, scratch),
                                            .goes_on = &Workers::asked,
                                            .asked = &workers_},
                                           scratch);
    const Nearest& first_look = nearest_[nearest_[a].span == b ? a : b];
    if (out.iterations >= config_.n_iters && first_look.iterations < config_.n_iters) ++stopped;
    shows_in[p] = rounding_shows(first_look.distance, out.distance, static_cast<float>(eps(group)));
    for (const auto& [span, other] : {pairs[p], std::pair(b, a)}) {
      Nearest& found = nearest_[span];
      if (found.span != other) continue;
      found.distance = out.distance;
      found.residual = out.residual;
      found.iterations = out.iterations;
    }
  });
  counts_.stopped += stopped;
  std::vector<char> shows(problem_.groups.size());
  for (size_t p = 0; p < pairs.size(); ++p)
    if (shows_in[p]) shows[problem_.rollouts[problem_.spans[pairs[p].first].rollout].group] = 1;
  return shows;
}

}  // namespace shear::cpu
