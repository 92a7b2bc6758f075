// A span pair that is too large for registers: K in shared memory, or where it does not fit in
// global memory, costs in place.
#pragma once
#include "cuda/solve.cuh"
#include "cuda/tiles.h"

namespace shear::cuda {

class WideEngine {
 public:
  // `shared` has wide_shared_floats of the largest pair; K follows it, unless `scratch` has it.
  __device__ WideEngine(float* shared, float* scratch)
      : room_(shared), vectors_(shared + kWideRoom), scratch_(scratch) {}

  __device__ float entropy() const {
    return entropy_term(eps(), logf(static_cast<float>(max(n_, m_))));
  }
  __device__ int rows() const { return n_; }
  __device__ int cols() const { return m_; }
  __device__ float eps() const { return kLog2e / scale_; }
  __device__ float range() const { return range_; }
  __device__ float heat() const { return heat_; }
  __device__ void set_heat(float heat) { heat_ = heat; }
  __device__ bool drifted() const { return __syncthreads_or(off_); }

  __device__ float load(const Pair& pair) {
    n_ = pair.n;
    m_ = pair.m;
    cost_ = pair.cost;
    ld_ = pair.ld;
    scale_ = kLog2e / pair.eps;
    f_ = vectors_;
    u_ = f_ + n_;
    g_ = u_ + n_;
    v_ = g_ + m_;
    k_ = scratch_ ? scratch_ : v_ + m_;
    float f = 0.f, g = 0.f, highest = -kInfinity, least = kInfinity;
    for_rows([&](int i) {
      float lowest = kInfinity;
      for (int j = lane_id(); j < m_; j += kWarp) {
        lowest = fminf(lowest, cost_[i * ld_ + j]);
        highest = fmaxf(highest, cost_[i * ld_ + j]);
      }
#pragma unroll
      for (int d = kWarp / 2; d > 0; d /= 2)
        lowest = fminf(lowest, __shfl_xor_sync(kAllLanes, lowest, d));
      least = fminf(least, lowest);
      if (lane_id() > 0) return;
      f_[i] = lowest * scale_;
      f += f_[i];
    });
    __syncthreads();
    for_cols([&](int j) {
      float lowest = kInfinity;
      for (int i = 0; i < n_; ++i) lowest = fminf(lowest, fmaf(cost_[i * ld_ + j], scale_, -f_[i]));
      g_[j] = lowest;
      g += lowest;
    });
    range_ = (block_max(highest, room_) + block_max(-least, room_)) * scale_;
    return dual(f, g);
  }

  __device__ void reset() {
    __syncthreads();
    for (int i = thread(); i < n_; i += kWideThreads) u_[i] = 1.f;
    for (int j = thread(); j < m_; j += kWideThreads) v_[j] = 1.f;
    __syncthreads();
  }

  __device__ void absorb() {
    __syncthreads();
    for (int i = thread(); i < n_; i += kWideThreads) f_[i] += heat() * finite_log2(u_[i]);
    for (int j = thread(); j < m_; j += kWideThreads) g_[j] += heat() * finite_log2(v_[j]);
    reset();
  }

  __device__ void exponentiate() {
    const float cool = 1.f / heat();
    for_rows([&](int i) {
      for (int j = lane_id(); j < m_; j += kWarp)
        k_[static_cast<int64_t>(i) * m_ + j] =
            fast_exp2((fmaf(-cost_[i * ld_ + j], scale_, f_[i]) + g_[j]) * cool);
    });
    __syncthreads();
  }

  __device__ float iterate(int level, unsigned, float, unsigned& it) {
    const float omega = omega_of(level);
    float error = 0.f;
    for_rows([&](int i) {
      const float y = row_product(i) * u_[i];
      __syncwarp();  // every lane has read u
      if (lane_id() > 0) return;
      error += fabsf(y - 1.f);
      u_[i] *= fast_exp2(-omega * fast_log2(y));
    });
    __syncthreads();
    const float column = static_cast<float>(m_) / static_cast<float>(n_);
    off_ = false;
    for_cols([&](int j) {
      const float v = v_[j] * fast_exp2(-omega * fast_log2(column_product(j) * v_[j] * column));
      v_[j] = v;
      off_ |= !(v > kDriftLow && v < kDriftHigh);
    });
    ++it;
    return block_sum(error, room_) / static_cast<float>(n_);
  }

  __device__ float dual_value() {
    float f = 0.f, g = 0.f;
    for (int i = thread(); i < n_; i += kWideThreads) f += f_[i] + heat() * fast_log2(u_[i]);
    for_cols([&](int j) {
      float most = 0.f;
      for (int i = 0; i < n_; ++i) most = fmaxf(most, k_[static_cast<int64_t>(i) * m_ + j] * u_[i]);
      g += g_[j] - heat() * fast_log2(most);
    });
    return dual(f, g);
  }

  __device__ Solution corrected_value() {
    const float mass = static_cast<float>(n_) / static_cast<float>(m_);
    for_cols([&](int j) { v_[j] = mass / column_product(j); });
    __syncthreads();
    const float first = f_[0] + fast_log2(u_[0]);
    float value = 0.f, error = 0.f;
    for_rows([&](int i) {
      float paid = 0.f;
      for (int j = lane_id(); j < m_; j += kWarp)
        paid = fmaf(k_[static_cast<int64_t>(i) * m_ + j] * v_[j], cost_[i * ld_ + j], paid);
      value = fmaf(paid, u_[i], value);
      const float missing = fmaf(-u_[i], row_product(i), 1.f);
      if (lane_id() > 0) return;
      error += fabsf(missing);
      value = fmaf(missing, (f_[i] + fast_log2(u_[i]) - first) / scale_, value);
    });
    value = block_sum(value, room_);
    error = block_sum(error, room_);
    const float rows = static_cast<float>(n_);
    return {value / rows, error / rows, 0, false};
  }

 private:
  static __device__ int thread() { return static_cast<int>(threadIdx.x); }
  // A warp per row, all lanes together.
  template <typename Visit>
  __device__ void for_rows(const Visit& visit) const {
    for (int i = warp_id(); i < n_; i += kWideThreads / kWarp) visit(i);
  }
  // A thread per column.
  template <typename Visit>
  __device__ void for_cols(const Visit& visit) const {
    for (int j = thread(); j < m_; j += kWideThreads) visit(j);
  }
  __device__ float row_product(int i) const {
    float sum = 0.f;
    for (int j = lane_id(); j < m_; j += kWarp)
      sum = fmaf(k_[static_cast<int64_t>(i) * m_ + j], v_[j], sum);
    return warp_sum(sum);
  }
  __device__ float column_product(int j) const {
    float sum = 0.f;
    for (int i = 0; i < n_; ++i) sum = fmaf(k_[static_cast<int64_t>(i) * m_ + j], u_[i], sum);
    return sum;
  }
  __device__ float dual(float f, float g) const {
    return block_sum(f / static_cast<float>(n_) + g / static_cast<float>(m_), room_) / scale_;
  }

  float *const room_, *const vectors_, *const scratch_;
  const float* cost_;
  int64_t ld_;
  int n_, m_;
  float scale_, range_, heat_ = 1.f;
  float *f_, *u_, *g_, *v_, *k_;
  bool off_ = false;
};

__global__ void __launch_bounds__(kWideThreads, 1) sinkhorn_wide(const SolveArgs args) {
  float* scratch =
      args.scratch_floats > 0 ? args.scratch + blockIdx.x * args.scratch_floats : nullptr;
  __shared__ Desk desk;
  WideEngine engine(static_cast<float*>(shared_memory()), scratch);
  solve_queue(engine, args, &desk);
}

}  // namespace shear::cuda
