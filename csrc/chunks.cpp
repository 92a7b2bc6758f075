#include "chunks.h"

#include <algorithm>
#include <map>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace shear {
namespace {

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

int64_t tokens_of(const Problem& problem, int64_t span, int64_t spans) {
  return problem.spans[span + spans - 1].end - problem.spans[span].begin;
}

// Number of consecutive spans, at least one, that keep a block within so many bytes.
template <typename Bytes>
int64_t fitting_spans(int64_t available, int64_t most, const Bytes& bytes) {
  int64_t low = 1, high = available;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (bytes(middle) <= most)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

class Planner {
 public:
  Planner(const Problem& problem, bool needs_costs, int64_t row_bytes, const Budget& budget)
      : problem_(problem),
        needs_costs_(needs_costs),
        rounded_bytes_(rounded_bytes(row_bytes)),
        budget_(budget) {}

  void add(int64_t group, const Rollout& correct, const Rollout& incorrect) {
    for (int64_t col = incorrect.span_begin; col < incorrect.span_end;) {
      // with one row span, the columns may take a quarter: room is left for many rows
      const int64_t cols =
          fitting_spans(incorrect.span_end - col, budget_.chunk_bytes / 4, [&](int64_t n) {
            return block_bytes(tokens_of(problem_, correct.span_begin, 1),
                               tokens_of(problem_, col, n), 1, n);
          });
      for (int64_t row = correct.span_begin; row < correct.span_end;) {
        const int64_t rows =
            fitting_spans(correct.span_end - row, budget_.chunk_bytes, [&](int64_t n) {
              return block_bytes(tokens_of(problem_, row, n), tokens_of(problem_, col, cols), n,
                                 cols);
            });
        push(group, row, rows, col, cols);
        row += rows;
      }
      col += cols;
    }
  }

  Chunks take() {
    // each part of the workspace is as large as the largest chunk's
    int64_t costs = 0, rows = 0, places = 0, pairs = 0;
    for (const Chunk& chunk : plan_.chunks) {
      costs = std::max(costs, chunk.cost_floats);
      rows = std::max(rows, chunk.row_floats);
      places = std::max(places, chunk.places);
      pairs = std::max(pairs, chunk.pairs);
    }
    plan_.peak_bytes =
        4 * (costs + rows) + rounded_bytes_ * places + budget_.bytes_per_pair * pairs;
    return std::move(plan_);
  }

 private:
  int64_t block_bytes(int64_t row_tokens, int64_t col_tokens, int64_t row_spans,
                      int64_t col_spans) const {
    const int64_t floats =
        needs_costs_ ? row_tokens * (round_up(col_tokens, kCostPad) + col_spans) : 0;
    return 4 * floats + rounded_bytes_ * (row_tokens + col_tokens) +
           budget_.bytes_per_pair * row_spans * col_spans;
  }

  bool has_stretch(int64_t token, int64_t tokens) const {
    return places_.contains({token, tokens});
  }

  // The place of the int8 rows of these tokens in the last chunk.
  int64_t place(int64_t group, int64_t token, int64_t tokens) {
    if (rounded_bytes_ == 0) return 0;
    Chunk& chunk = plan_.chunks.back();
    const auto [found, is_new] = places_.try_emplace({token, tokens}, chunk.places);
    if (is_new) {
      chunk.stretches.push_back(
          {.group = group, .token = token, .tokens = tokens, .place = chunk.places});
      chunk.places += tokens;
    }
    return found->second;
  }

  void push(int64_t group, int64_t row_span, int64_t row_spans, int64_t col_span,
            int64_t col_spans) {
    Block block{};
    block.group = group;
    block.row_span = row_span;
    block.row_spans = row_spans;
    block.col_span = col_span;
    block.col_spans = col_spans;
    block.row_token = problem_.spans[row_span].begin;
    block.row_tokens = tokens_of(problem_, row_span, row_spans);
    block.col_token = problem_.spans[col_span].begin;
    block.col_tokens = tokens_of(problem_, col_span, col_spans);
    block.ld = round_up(block.col_tokens, kCostPad);
    int64_t bytes = block_bytes(block.row_tokens, block.col_tokens, row_spans, col_spans);
    int64_t shared = 0;  // tokens whose rows the chunk has
    if (has_stretch(block.row_token, block.row_tokens)) shared += block.row_tokens;
    if (has_stretch(block.col_token, block.col_tokens)) shared += block.col_tokens;
    const int64_t more = bytes - rounded_bytes_ * shared;
    if (plan_.chunks.empty() || bytes_ + more > budget_.chunk_bytes) {
      plan_.chunks.emplace_back();
      places_.clear();
      bytes_ = 0;
    } else {
      bytes = more;
    }
    Chunk& chunk = plan_.chunks.back();
    block.cost_offset = chunk.cost_floats;
    block.row_offset = chunk.row_floats;
    block.pair_offset = chunk.pairs;
    block.row_place = place(group, block.row_token, block.row_tokens);
    block.col_place = place(group, block.col_token, block.col_tokens);
    if (needs_costs_) {
      chunk.cost_floats += block.row_tokens * block.ld;
      chunk.row_floats += block.row_tokens * col_spans;
    }
    chunk.pairs += block.pairs();
    chunk.blocks.push_back(block);
    bytes_ += bytes;
    plan_.pairs += block.pairs();
    plan_.token_pairs += block.row_tokens * block.col_tokens;
  }

  const Problem& problem_;
  const bool needs_costs_;
  const int64_t rounded_bytes_;  // of a token
  const Budget budget_;
  Chunks plan_;
  // of the last chunk
  int64_t bytes_ = 0;
  std::map<std::pair<int64_t, int64_t>, int64_t> places_;  // of stretches: token, tokens
};

// Throws std::invalid_argument on groups that would be cut into more blocks than a plan lists.
void check_size(const Problem& problem, const Config& config, int64_t row_bytes,
                const Budget& budget) {
  double rollout_pairs = 0, token_pairs = 0, tokens = 0, pairs = 0, span = 0;
  const auto sum = [&](const std::vector<int64_t>& side, int64_t (Rollout::*count)() const) {
    double total = 0;
    for (const int64_t i : side) total += static_cast<double>((problem.rollouts[i].*count)());
    return total;
  };
  for (const Rollout& rollout : problem.rollouts)
    span = std::max(span, static_cast<double>(longest_span(rollout.tokens(), config.span)));
  for (const Group& group : problem.groups) {
    const auto rows = static_cast<double>(group.correct.size()),
               cols = static_cast<double>(group.incorrect.size());
    const double row_tokens = sum(group.correct, &Rollout::tokens),
                 col_tokens = sum(group.incorrect, &Rollout::tokens);
    rollout_pairs += rows * cols;
    token_pairs += row_tokens * col_tokens;
    tokens += row_tokens * cols + col_tokens * rows;
    pairs += sum(group.correct, &Rollout::spans) * sum(group.incorrect, &Rollout::spans);
  }
  const auto chunk = static_cast<double>(budget.chunk_bytes),
             rounded = static_cast<double>(rounded_bytes(row_bytes));
  // int8 rows come again with every block: of columns that take a quarter of a chunk with one span,
  // and of rows that take the rest
  const double again = 16. / 3 * rounded * (rounded + 4 * span) / chunk;
  const double bytes = (config.distance == Distance::kCosine ? 0 : (4 + again) * token_pairs) +
                       rounded * tokens + static_cast<double>(budget.bytes_per_pair) * pairs;
  // blocks end where spans do: up to four times as many as their bytes ask for
  if (rollout_pairs + 4 * bytes / chunk <= kMostBlocks) return;
  std::ostringstream text;
  text << "cu_seqlens must give fewer or shorter rollouts to a call, got " << rollout_pairs
       << " pairs of opposing rollouts with " << token_pairs << " token pairs and " << pairs
       << " span pairs";
  throw std::invalid_argument(text.str());
}

}  // namespace

Chunks make_chunks(const Problem& problem, const Config& config, int64_t row_bytes,
                   const Budget& budget) {
  const bool needs_costs = config.distance != Distance::kCosine;
  check_size(problem, config, row_bytes, budget);
  Planner planner(problem, needs_costs, row_bytes, budget);
  for (size_t g = 0; g < problem.groups.size(); ++g)
    for (const int64_t i : problem.groups[g].correct)
      for (const int64_t j : problem.groups[g].incorrect)
        planner.add(static_cast<int64_t>(g), problem.rollouts[i], problem.rollouts[j]);
  return planner.take();
}

}  // namespace shear
