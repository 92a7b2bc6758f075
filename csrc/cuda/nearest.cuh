// Every span's nearest span among the pairs of a chunk, and of the chunks before. All pairs are
// looked at in one order: results do not depend on which were solved first.
#pragma once
#include "cuda/call.cuh"
#include "cuda/pairs.cuh"

namespace shear::cuda {

struct Found {
  DeviceNearest nearest = nothing_found();

  // The smaller distance, of equal ones the first span; NaN is kept.
  __device__ __forceinline__ bool is_better(float distance, int span) const {
    if (nearest.span < 0) return span >= 0;
    if (distance != distance || nearest.distance != nearest.distance)
      return distance != distance && (nearest.distance == nearest.distance || span < nearest.span);
    return distance < nearest.distance || (distance == nearest.distance && span < nearest.span);
  }

  __device__ __forceinline__ void take(const Call& call, int64_t p, int span) {
    const float distance = call.value[p];
    const bool better = is_better(distance, span);
    nearest.sum += distance;
    ++nearest.count;
    if (better) {
      nearest.distance = distance;
      nearest.span = span;
    }
    if (call.mean) {
      nearest.residual = fmaxf(nearest.residual, call.residual[p]);
      nearest.iterations = max(nearest.iterations, call.iterations[p]);
    } else if (better) {
      nearest.residual = call.residual[p];
      nearest.iterations = call.iterations[p];
    }
  }

  __device__ __forceinline__ void take(const Call& call, const DeviceNearest& other) {
    const bool better = is_better(other.distance, other.span) && other.span >= 0;
    nearest.sum += other.sum;
    nearest.count += other.count;
    if (better) {
      nearest.distance = other.distance;
      nearest.span = other.span;
    }
    if (call.mean) {
      nearest.residual = fmaxf(nearest.residual, other.residual);
      nearest.iterations = max(nearest.iterations, other.iterations);
    } else if (better) {
      nearest.residual = other.residual;
      nearest.iterations = other.iterations;
    }
  }
};

// Calls visit(block) for the group's blocks in the chunk, in order.
template <typename Visit>
__device__ __forceinline__ void for_blocks(const Call& call, int group, const Visit& visit) {
  int low = 0, high = call.n_blocks;  // blocks are sorted by group
  while (low < high) {
    const int middle = (low + high) / 2;
    if (call.blocks[middle].group < group)
      low = middle + 1;
    else
      high = middle;
  }
  for (; low < call.n_blocks && call.blocks[low].group == group; ++low) visit(call.blocks[low]);
}

// A CTA per 32 spans of a rollout. Spans of correct rollouts are rows of pairs: a warp takes one
// after the other. Those of incorrect ones are columns: a lane has one, and warps share the rows.
__global__ void __launch_bounds__(kThreads) find_nearest(const Call call) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ DeviceNearest room[kThreads];
  const DeviceRollout rollout = call.rollouts[last_not_after(
      call.n_rollouts, blockIdx.x, [&](int i) { return int64_t{call.rollouts[i].tile_begin}; })];
  if (rollout.group < 0 || !looks_at(call, rollout.group)) return;
  const int offset = (static_cast<int>(blockIdx.x) - rollout.tile_begin) * kSpansPerCta;
  const int first = rollout.span_begin + offset,
            last = min(first + kSpansPerCta, rollout.span_begin + rollout.spans);
  if (rollout.correct) {
    for (int s = first + warp_id(); s < last; s += kWarps) {
      Found found;
      for_blocks(call, rollout.group, [&](const DeviceBlock& block) {
        const int a = s - block.row_span;
        if (a < 0 || a >= block.row_spans) return;
        const int64_t p = block.pair_offset + static_cast<int64_t>(a) * block.col_spans;
        for (int b = lane_id(); b < block.col_spans; b += kWarp)
          found.take(call, p + b, block.col_span + b);
      });
      room[threadIdx.x] = found.nearest;
      __syncwarp();
      if (lane_id() == 0) {
        Found all;
        all.take(call, call.nearest[s]);
        for (int l = 0; l < kWarp; ++l) all.take(call, room[threadIdx.x + l]);
        call.nearest[s] = all.nearest;
      }
      __syncwarp();
    }
    return;
  }
  const int s = first + lane_id();
  Found found;
  for_blocks(call, rollout.group, [&](const DeviceBlock& block) {
    const int b = s - block.col_span;
    if (s >= last || b < 0 || b >= block.col_spans) return;
    for (int a = warp_id(); a < block.row_spans; a += kWarps)
      found.take(call, block.pair_offset + static_cast<int64_t>(a) * block.col_spans + b,
                 block.row_span + a);
  });
  room[threadIdx.x] = found.nearest;
  __syncthreads();
  if (warp_id() == 0 && s < last) {
    Found all;
    all.take(call, call.nearest[s]);
    for (int w = 0; w < kWarps; ++w) all.take(call, room[w * kWarp + lane_id()]);
    call.nearest[s] = all.nearest;
  }
}

__device__ __forceinline__ float final_distance(const Call& call, const DeviceNearest& nearest) {
  return call.mean && nearest.count > 0
             ? static_cast<float>(nearest.sum / static_cast<double>(nearest.count))
             : nearest.distance;
}

struct DistancesArgs {
  Call call;
  SpanOutputs out;
};

struct CountsArgs {
  Call call;
  int64_t* counts;  // (kCounts)
};

// A thread per count.
__global__ void __launch_bounds__(kThreads) write_counts(const CountsArgs args) {
  const int64_t k = global_thread();
  if (k < kCounts) args.counts[k] = static_cast<int64_t>(args.call.counters->counts[k]);
}

// A thread per span.
__global__ void __launch_bounds__(kThreads) write_distances(const DistancesArgs args) {
  const Call& call = args.call;
  const SpanOutputs& out = args.out;
  const int64_t s = global_thread();
  if (s >= call.spans) return;
  const DeviceNearest found = call.nearest[s];
  out.distance[s] = final_distance(call, found);
  out.nearest[s] = found.span;
  out.residual[s] = found.residual;
  out.iterations[s] = found.iterations;
  const DeviceSpan span = call.span_table[s];
  out.spans[3 * s] = span.rollout;
  out.spans[3 * s + 1] = span.begin;
  out.spans[3 * s + 2] = span.begin + span.size;
}

struct MatrixArgs {
  Call call;
  float* matrix;  // spans of the first rollout by those of the second
  int64_t cols, first_col;
};

// A thread per pair of the chunk.
__global__ void __launch_bounds__(kThreads) write_matrix(const MatrixArgs args) {
  const Call& call = args.call;
  const int64_t p = global_thread();
  if (p >= call.chunk_pairs) return;
  const DeviceBlock& block = block_of_pair(call.blocks, call.n_blocks, p);
  const int64_t at = p - block.pair_offset;
  args.matrix[(block.row_span + at / block.col_spans) * args.cols + block.col_span +
              at % block.col_spans - args.first_col] = call.value[p];
}

}  // namespace shear::cuda
