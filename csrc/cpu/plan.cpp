#include "cpu/plan.h"

#include <algorithm>

#include "cpu/kernels/kernels.h"
#include "rounding.h"
#include "spans.h"

namespace shear::cpu {

Plan make_plan(const Problem& problem, const Config& config, int64_t dim, int64_t threads) {
  Plan plan;
  plan.row_bytes = row_bytes(config, dim);
  plan.chunks = make_chunks(problem, config, plan.row_bytes, kBudget);

  int64_t n = 0, row = 0;  // longest span; longest row of costs with its windows
  for (const Group& group : problem.groups)
    for (const auto* side : {&group.correct, &group.incorrect})
      for (const int64_t i : *side) {
        const Rollout& rollout = problem.rollouts[i];
        n = std::max(n, longest_span(rollout.tokens(), config.span));
        row = std::max(row, rollout.tokens() + rollout.spans());
      }
  if (n > 0) plan.scratch_floats = std::max({kPanelFloats, row, plan.row_bytes});
  if (config.distance == Distance::kSinkhorn)
    plan.scratch_floats = std::max(plan.scratch_floats, sinkhorn_scratch(n, n, kWidest).floats);
  if (plan.row_bytes > 0) plan.scratch_floats += n * n;  // costs of a second look
  if (config.distance == Distance::kMmd) plan.scratch_floats = kPanelFloats + n * n;

  const auto spans = static_cast<int64_t>(problem.spans.size());
  const auto groups = static_cast<int64_t>(problem.groups.size());
  const int64_t per_token = 3;  // norm, centred squared norm, exponent
  // the span, what it found, its mean or self-similarity
  const int64_t per_span = config.distance == Distance::kCosine ? 20 + dim : 20;
  plan.workspace_bytes = plan.chunks.peak_bytes + kRowSlack * plan.row_bytes +
                         4 * (threads * plan.scratch_floats + per_token * problem.tokens +
                              per_span * spans + (groups + 1) * dim);
  return plan;
}

}  // namespace shear::cpu
