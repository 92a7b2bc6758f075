// Hidden states to the int8 rows of csrc/rounding.h, equal bit by bit to those of the other
// backends: operations that reach them name their rounding, so that none is fused with the next.
#pragma once
#include "cuda/call.cuh"
#include "rounding.h"

namespace shear::cuda {

constexpr int kTokensPerSum = 64;  // of a CTA of add_states: their sum fits 32 bits
static_assert(kExponents == kThreads);

// Of a group: how many tokens have each exponent, then sums over the tokens of its center.
__device__ __forceinline__ unsigned long long* tally_of(const Call& call, int group) {
  return call.tally + group * (kExponents + call.rows.depth);
}

// A thread per number.
__global__ void __launch_bounds__(kThreads) begin_tally(const Call call) {
  const int64_t k = global_thread();
  if (k < call.n_groups * (kExponents + call.rows.depth)) call.tally[k] = 0;
}

// A CTA per rollout, a thread per exponent.
__global__ void __launch_bounds__(kThreads) count_exponents(const Call call) {
  __shared__ uint32_t found[kExponents];
  const DeviceRollout& rollout = call.rollouts[blockIdx.x];
  if (rollout.group < 0) return;
  const int k = static_cast<int>(threadIdx.x);
  found[k] = 0;
  __syncthreads();
  for (int64_t t = rollout.begin + k; t < rollout.end; t += kThreads)
    atomicAdd(found + call.exponent[t], 1u);
  __syncthreads();
  if (found[k] > 0)
    atomicAdd(tally_of(call, rollout.group) + k, static_cast<unsigned long long>(found[k]));
}

// A CTA per group.
__global__ void __launch_bounds__(kThreads) choose_centers(const Call call) {
  __shared__ int64_t counts[kExponents];
  const int group = static_cast<int>(blockIdx.x);
  counts[threadIdx.x] = static_cast<int64_t>(tally_of(call, group)[threadIdx.x]);
  __syncthreads();
  if (threadIdx.x > 0) return;
  int64_t tokens = 0, counted = 0;
  for (int k = 0; k < kExponents; ++k) tokens += counts[k];
  int median = 0;
  for (int64_t below = counts[0]; 2 * below < tokens; below += counts[++median]) {
  }
  const int limit = center_limit(median);
  for (int k = 0; k < min(limit, kExponents); ++k) counted += counts[k];
  call.centers[group] = {.tokens = counted, .limit = limit};
}

// Sums of integers, exact in any order. A CTA per kTokensPerSum tokens.
template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) add_states(const Call call) {
  __shared__ int group[kTokensPerSum];
  __shared__ float scale[kTokensPerSum];  // 0: not of a center
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokensPerSum;
  const int count = static_cast<int>(min(int64_t{kTokensPerSum}, call.tokens - first));
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < count) {
    const int64_t t = first + thread;
    const int g = call.rollouts[last_not_after(call.n_rollouts, t,
                                               [&](int k) { return call.rollouts[k].begin; })]
                      .group;
    group[thread] = g;
    scale[thread] = 0.f;
    if (g >= 0 && has_scale(call, g) && call.exponent[t] < call.centers[g].limit)
      scale[thread] = ldexpf(1.f, center_scale_exponent(call.centers[g].limit));
  }
  __syncthreads();
  for (int64_t k = 4 * thread; k < call.states.dim; k += 4 * kThreads)
    for (int t = 0; t < count;) {
      const int g = group[t];
      int end = t + 1, sums[4] = {};
      while (end < count && group[end] == g) ++end;
      if (g < 0) {
        t = end;
        continue;
      }
#pragma unroll 8
      for (; t < end; ++t) {
        float x[4];
        StateWords<kDtype>::four_at(call.states, first + t, k, x);
#pragma unroll
        for (int v = 0; v < 4; ++v) sums[v] += __float2int_rn(__fmul_rn(x[v], scale[t]));
      }
      unsigned long long* to = tally_of(call, g) + kExponents + k;
#pragma unroll
      for (int v = 0; v < 4; ++v)
        atomicAdd(to + v, static_cast<unsigned long long>(static_cast<int64_t>(sums[v])));
    }
}

// A thread per dimension of a group.
__global__ void __launch_bounds__(kThreads) divide_sums(const Call call) {
  const int64_t at = global_thread();
  if (at >= call.n_groups * call.rows.depth) return;
  const int group = static_cast<int>(at / call.rows.depth);
  const int64_t k = at % call.rows.depth;
  const DeviceCenter center = call.centers[group];
  const auto sum = static_cast<int64_t>(tally_of(call, group)[kExponents + k]);
  const double mean = static_cast<double>(sum) / static_cast<double>(center.tokens);
  call.center[at] = static_cast<float>(ldexp(mean, -center_scale_exponent(center.limit)));
}

// One token's state on a warp, 512 dimensions at a time: eight lanes have 128 of them, each four
// quarters of 32 with four neighbours in each. Steps of the transform between a lane's own entries
// need no shuffle.
constexpr int kRotated = 512, kQuarters = 4;

template <Dtype kDtype>
class CenteredState {
 public:
  using Entries = float[kQuarters][4];

  __device__ __forceinline__ CenteredState(const Call& call, int group, int64_t token)
      : call_(call),
        token_(token),
        center_(call.center + group * call.rows.depth),
        long_block_(rotation_block(call.rows.depth) == kLongBlock) {}

  // Of the lane's entries in a quarter.
  static __device__ __forceinline__ int64_t dimension(int64_t first, int quarter) {
    return first + lane_id() / 8 * kLongBlock + quarter * 32 + lane_id() % 8 * 4;
  }

  // Less the center, zeros beyond the last dimension.
  __device__ __forceinline__ void take(int64_t first, Entries& a) const {
#pragma unroll
    for (int q = 0; q < kQuarters; ++q) {
      const int64_t k = dimension(first, q);
      StateWords<kDtype>::four_at(call_.states, token_, k, a[q]);
      if (k >= call_.rows.depth) continue;
      const float4 c = *reinterpret_cast<const float4*>(center_ + k);
      a[q][0] = __fsub_rn(a[q][0], c.x);
      a[q][1] = __fsub_rn(a[q][1], c.y);
      a[q][2] = __fsub_rn(a[q][2], c.z);
      a[q][3] = __fsub_rn(a[q][3], c.w);
    }
  }

  // With signs, then the Hadamard transform, unscaled, from neighbours on.
  __device__ __forceinline__ void rotate(int64_t first, Entries& a) const {
#pragma unroll
    for (int q = 0; q < kQuarters; ++q) {
      const int64_t k = dimension(first, q);
      const uint32_t signs = k < call_.rows.depth ? call_.signs[k / 32] >> (k % 32) : 0;
#pragma unroll
      for (int v = 0; v < 4; ++v) a[q][v] = turned(a[q][v], (signs >> v & 1u) << 31);
      step(a[q][0], a[q][1]);
      step(a[q][2], a[q][3]);
      step(a[q][0], a[q][2]);
      step(a[q][1], a[q][3]);
    }
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) {
      const uint32_t sign = (lane_id() & lanes) != 0 ? 0x80000000u : 0u;
#pragma unroll
      for (int q = 0; q < kQuarters; ++q)
#pragma unroll
        for (int v = 0; v < 4; ++v)
          a[q][v] = __fadd_rn(__shfl_xor_sync(kAllLanes, a[q][v], lanes), turned(a[q][v], sign));
    }
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      step(a[0][v], a[1][v]);
      step(a[2][v], a[3][v]);
      if (!long_block_) continue;
      step(a[0][v], a[2][v]);
      step(a[1][v], a[3][v]);
    }
  }

 private:
  static __device__ __forceinline__ float turned(float x, uint32_t sign) {
    return __uint_as_float(__float_as_uint(x) ^ sign);
  }
  static __device__ __forceinline__ void step(float& low, float& high) {
    const float sum = __fadd_rn(low, high);
    high = __fsub_rn(low, high);
    low = sum;
  }

  const Call& call_;
  const int64_t token_;
  const float* const center_;
  const bool long_block_;
};

__device__ __forceinline__ uint32_t bytes_of(const float (&entries)[4], float to_steps) {
  uint32_t word = 0;
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    const int entry = __float2int_rn(__fmul_rn(entries[v], to_steps));
    word |= (static_cast<uint32_t>(entry) & 0xffu) << (8 * v);
  }
  return word;
}

// A warp per token of the chunk's stretches: the largest entry first, then the row, which takes the
// same steps again: the state is still in cache, and of any number of dimensions.
template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) round_states(const Call call) {
  const int64_t place = global_thread() / kWarp;
  if (place >= call.places) return;
  const DeviceStretch stretch = call.stretches[last_not_after(
      call.n_stretches, place, [&](int i) { return int64_t{call.stretches[i].place}; })];
  if (!has_scale(call, stretch.group)) return;
  const int64_t depth = call.rows.depth;
  using State = CenteredState<kDtype>;
  const State state(call, stretch.group, stretch.token + place - stretch.place);
  float squares = 0.f, largest = 0.f;
  for (int64_t first = 0; first < depth; first += kRotated) {
    typename State::Entries a;
    state.take(first, a);
#pragma unroll
    for (int e = 0; e < 4 * kQuarters; ++e) squares += a[e / 4][e % 4] * a[e / 4][e % 4];
    state.rotate(first, a);
#pragma unroll
    for (int e = 0; e < 4 * kQuarters; ++e) largest = fmaxf(largest, fabsf(a[e / 4][e % 4]));
  }
  const double squared = warp_sum(static_cast<double>(squares));
  largest = warp_max(largest);
  const bool is_center = !(largest >= kLeastEntry);
  if (lane_id() == 0) {
    call.rows.scale[place] = is_center ? 0.f : step_of_row(largest, rotation_block(depth));
    call.rows.sq_norm[place] = static_cast<float>(squared);
  }
  const float to_steps = is_center ? 0.f : __fdiv_rn(static_cast<float>(kMostInt8), largest);
  auto* row = reinterpret_cast<uint32_t*>(call.rows.row + place * depth);
  for (int64_t first = 0; first < depth; first += kRotated) {
    typename State::Entries a;
    state.take(first, a);
    state.rotate(first, a);
#pragma unroll
    for (int q = 0; q < kQuarters; ++q) {
      const int64_t k = State::dimension(first, q);
      if (k < depth) row[k / 4] = bytes_of(a[q], to_steps);
    }
  }
}

}  // namespace shear::cuda
