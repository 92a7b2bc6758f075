// One call as the kernels see it: the tables of its plan, its one allocation, and the chunk at
// hand.
#pragma once
#include "cuda/constants.cuh"
#include "cuda/plan.h"
#include "cuda/state_words.cuh"
#include "cuda/tiles.h"
#include "spans.h"

namespace shear::cuda {

struct Counters {
  unsigned long long counts[kCounts];
  unsigned long long bad_token;  // the first that is not finite; all ones: none
  // the first group with a mean norm below kLeastNorm, and its bits; all ones: none
  unsigned long long unfit_group;
  uint32_t seeds, seeds_taken;  // queue of seeds: its length, how far it is
  uint32_t queued, taken;       // and the main queue
  uint32_t bucket[kBuckets], bucket_filled[kBuckets];
};
static_assert(sizeof(Counters) <= kCounterBytes);

// Int8 rows of the chunk's stretches, as csrc/rounding.h makes them.
struct Rows {
  int8_t* row;     // (places, depth)
  float* scale;    // (places): what a step stands for
  float* sq_norm;  // (places): of the state less the center
  int64_t depth;   // 0: states are not rounded
};

struct Call {
  States states;
  int64_t tokens, spans, pairs;  // pairs: of the whole call
  int32_t n_rollouts, n_groups;
  const DeviceRollout* rollouts;
  const DeviceGroup* groups;
  const int32_t* members;
  int64_t span_tokens, stride, strip;
  bool column_minima, chamfer, mean, rollout_norms, mean_pooling;
  NormRange norm_range;

  Counters* counters;
  unsigned long long* stopped;  // where pairs that n_iters stopped are counted
  DeviceSpan* span_table;
  float *norm, *sq_norm;
  uint8_t* exponent;          // (tokens) biased, of the largest entry
  unsigned long long* tally;  // rounding.cuh
  DeviceCenter* centers;
  float* center;          // (groups, depth)
  const uint32_t* signs;  // a bit per dimension
  Rows rows;
  uint32_t* shows;  // (groups + 1) whether rounding shows in the group; the last: in any
  bool exactly;     // a look at these groups alone, from costs that are not rounded
  double *rollout_norm, *group_norm;
  uint32_t* best;
  unsigned long long* seed;  // per span: bound and index of the pair with the least bound
  DeviceNearest* nearest;
  float *costs, *windows, *minima;
  float *value, *residual;
  int32_t* iterations;
  uint32_t* order;

  const DeviceBlock* blocks;  // of the chunk
  int32_t n_blocks;
  const DeviceStretch* stretches;
  int32_t n_stretches;
  int64_t places;
  int64_t chunk_pairs, bound_rows;  // bound_rows: of 32 pairs each
};

// The outputs of span_distances.
struct SpanOutputs {
  float* distance;
  int64_t* nearest;
  float* residual;
  int32_t* iterations;
  int64_t* spans;  // (spans, 3): rollout, begin, end
};

// False: all states are zero, or not finite or too faint with the check off. Such a group is not
// computed.
__device__ __forceinline__ bool has_scale(const Call& call, int group) {
  const double norm = call.group_norm[group];
  return norm > 0 && norm < __builtin_huge_val();
}

// Whether the look at hand is at this group, and whether at any.
__device__ __forceinline__ bool looks_at(const Call& call, int group) {
  return !call.exactly || call.shows[group] != 0;
}
__device__ __forceinline__ bool looks_at_any(const Call& call) {
  return looks_at(call, call.n_groups);
}
__device__ __forceinline__ bool is_computed(const Call& call, int group) {
  return looks_at(call, group) && has_scale(call, group);
}

// The begin of span k of `tokens` tokens, and how many it has.
__device__ __forceinline__ int64_t begin_of_span(const Call& call, int64_t tokens, int64_t k) {
  return span_begin(k, tokens, call.span_tokens, call.stride);
}
__device__ __forceinline__ int size_of_span(const Call& call, int64_t tokens, int64_t k) {
  return static_cast<int>(span_size(k, tokens, call.span_tokens, call.stride));
}

// What a span has found before it looks.
__device__ __forceinline__ DeviceNearest nothing_found() {
  return {
      .distance = kInfinity, .residual = 0.f, .iterations = 0, .span = -1, .sum = 0., .count = 0};
}

}  // namespace shear::cuda
