// Who a thread is, sums over its warp and CTA, and the search by which it finds its work in a
// table.
#pragma once
#include "cuda/device.h"

namespace shear::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ __forceinline__ int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, d));
  return x;
}

// The sum over the CTA, to every thread, in one fixed order. `room` has a place per warp.
template <typename T>
__device__ __forceinline__ T block_sum(T x, T* room) {
  x = warp_sum(x);
  if (lane_id() == 0) room[warp_id()] = x;
  __syncthreads();
  T total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) total += room[w];
  __syncthreads();
  return total;
}

// The largest x of the CTA, to every thread.
__device__ __forceinline__ float block_max(float x, float* room) {
  x = warp_max(x);
  if (lane_id() == 0) room[warp_id()] = x;
  __syncthreads();
  float most = room[0];
  for (int w = 1; w < static_cast<int>(blockDim.x) / kWarp; ++w) most = fmaxf(most, room[w]);
  __syncthreads();
  return most;
}

// The last index i in [0, count) with begin(i) <= value; begin does not decrease and begin(0) <=
// value.
template <typename Begin>
__device__ __forceinline__ int last_not_after(int count, int64_t value, const Begin& begin) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (begin(middle) <= value)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

}  // namespace shear::cuda
