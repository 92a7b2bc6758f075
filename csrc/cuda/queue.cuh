// Which pairs of a chunk are solved, and in what order: first the pair of least bound of every
// span, which gives the span a distance; then, best first, the pairs whose bound is not above both
// of their spans' distances. The order within a bucket is left to chance: no result depends on it.
#pragma once
#include "cuda/call.cuh"
#include "cuda/pairs.cuh"

namespace shear::cuda {

// A thread per span.
__global__ void __launch_bounds__(kThreads) begin_chunk(const Call call) {
  const int64_t s = global_thread();
  Counters& counters = *call.counters;
  if (s < kBuckets) counters.bucket[s] = counters.bucket_filled[s] = 0;
  if (s == 0) counters.seeds = counters.seeds_taken = counters.queued = counters.taken = 0;
  if (s < call.spans) call.seed[s] = ~0ull;
}

// A thread per span. A pair that is the seed of both its spans is queued once.
__global__ void __launch_bounds__(kThreads) queue_seeds(const Call call) {
  const int64_t s = global_thread();
  if (s >= call.spans || call.seed[s] == ~0ull) return;
  const auto p = static_cast<uint32_t>(call.seed[s]);
  if (atomicExch(call.iterations + p, kSeed) == kUntried)
    call.order[atomicAdd(&call.counters->seeds, 1u)] = p;
}

// The bucket of an untried pair by the share of its bound in the distance to beat; kBuckets:
// beaten.
__device__ __forceinline__ int bucket_of(const Call& call, int64_t p) {
  const DeviceBlock& block = block_of_pair(call.blocks, call.n_blocks, p);
  const int at = static_cast<int>(p - block.pair_offset);
  const float known = fmaxf(__uint_as_float(call.best[block.row_span + at / block.col_spans]),
                            __uint_as_float(call.best[block.col_span + at % block.col_spans]));
  const float bound = call.value[p];
  if (bound > known) return kBuckets;
  const float share = known > 0.f ? bound / known : 0.f;
  return min(kBuckets - 1, static_cast<int>(share * kBuckets));
}

// A thread per pair: how many pairs go into each bucket.
__global__ void __launch_bounds__(kThreads) count_survivors(const Call call) {
  __shared__ uint32_t found[kBuckets + 1];
  for (int k = static_cast<int>(threadIdx.x); k <= kBuckets; k += kThreads) found[k] = 0;
  __syncthreads();
  const int64_t p = global_thread();
  if (p < call.chunk_pairs && call.iterations[p] == kUntried) {
    const int bucket = bucket_of(call, p);
    if (bucket == kBuckets) call.iterations[p] = 0;
    atomicAdd(found + bucket, 1u);
  }
  __syncthreads();
  Counters& counters = *call.counters;
  const int k = static_cast<int>(threadIdx.x);
  if (k < kBuckets && found[k] > 0) atomicAdd(counters.bucket + k, found[k]);
  if (k == kBuckets && found[k] > 0)
    atomicAdd(counters.counts + kBounded, static_cast<unsigned long long>(found[k]));
}

// A thread per pair: to its place in the queue.
__global__ void __launch_bounds__(kThreads) queue_survivors(const Call call) {
  __shared__ uint32_t found[kBuckets], place[kBuckets];
  Counters& counters = *call.counters;
  const int k = static_cast<int>(threadIdx.x);
  if (k < kBuckets) found[k] = 0;
  __syncthreads();
  const int64_t p = global_thread();
  int bucket = -1;
  uint32_t at = 0;
  if (p < call.chunk_pairs && call.iterations[p] == kUntried) {
    bucket = bucket_of(call, p);
    at = atomicAdd(found + bucket, 1u);
  }
  __syncthreads();
  if (k < kBuckets && found[k] > 0) {
    uint32_t before = 0;
    for (int l = 0; l < k; ++l) before += counters.bucket[l];
    place[k] = before + atomicAdd(counters.bucket_filled + k, found[k]);
    atomicAdd(&counters.queued, found[k]);
  }
  __syncthreads();
  if (bucket >= 0) call.order[place[bucket] + at] = static_cast<uint32_t>(p);
}

}  // namespace shear::cuda
