// A span pair in registers: K as a tile of kThreadRows x kThreadCols entries per lane, costs in
// shared memory. A row's scaling is on the four lanes that share it, a column's in shared memory.
#pragma once
#include "cuda/solve.cuh"
#include "cuda/tiles.h"

namespace shear::cuda {

// Added to every lane's part of a row sum. With it the marginal of a row of padding, whose scaling
// is the inverse of the four lanes' sum, is exactly 1 and stays so: the loop has no case for
// padding.
constexpr float kTiny = 0x1p-120f, kPadding = 0x1p118f;

// Cost of padding, in units of the costs: above all of them, far in units of any eps that is
// accepted, and finite, since it is multiplied by a plan of 0.
constexpr float kFarCost = 1e38f;

template <typename T>
class TileEngine {
 public:
  __device__ __forceinline__ explicit TileEngine(float* shared)
      : cost_(shared),
        partial_(cost_ + T::kRows * T::kPitch),
        v_slots_(partial_ + T::kPartials * T::kLine),
        g_slots_(v_slots_ + T::kLine),
        f_rows_(g_slots_ + T::kLine),
        room_(f_rows_ + T::kRows),
        col_lane_(lane_id() % T::kColLanes),
        first_row_(warp_id() * T::kRowLanes * T::kThreadRows + lane_id() / T::kColLanes),
        slot_(2 * static_cast<int>(threadIdx.x)) {}

  __device__ __forceinline__ float entropy() const {
    return entropy_term(eps(), logf(static_cast<float>(max(n_, m_))));
  }
  __device__ __forceinline__ int rows() const { return n_; }
  __device__ __forceinline__ int cols() const { return m_; }
  __device__ __forceinline__ float eps() const { return kLog2e / scale_; }
  __device__ __forceinline__ float range() const { return room_[kRange]; }
  // In shared memory, since the tile takes all registers. Every thread writes the same number, and
  // has read the last one before the barrier that ends absorb().
  __device__ __forceinline__ float heat() const { return room_[kHeat]; }
  __device__ __forceinline__ void set_heat(float heat) { room_[kHeat] = heat; }
  __device__ __forceinline__ bool drifted() const { return __syncthreads_or(off_); }

  // Takes the costs and sets the hard potentials F_i = min_j C_ij, G_j = min_i (C_ij - F_i), for
  // which every K_ij <= 1 with a 1 in every row and column. Returns their dual value, a bound.
  __device__ __forceinline__ float load(const Pair& pair) {
    n_ = pair.n;
    m_ = pair.m;
    scale_ = kLog2e / pair.eps;
    for (int i = warp_id(); i < T::kRows; i += T::kWarps)
      for (int j = lane_id(); j < T::kCols; j += kWarp) {
        float* to = cost_ + i * T::kPitch + j;
        if (i < n_ && j < m_)
          copy_async_4(to, pair.cost + i * pair.ld + j);
        else
          *to = kFarCost;
      }
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    float f = 0.f;  // sum of the lane's F
    float highest = -kFarCost, least = kFarCost;
#pragma unroll
    for (int r = 0; r < T::kThreadRows; ++r) {
      float lowest = kFarCost;
#pragma unroll
      for (int c = 0; c < T::kThreadCols; ++c) {
        k_[r][c] = cost(r, c);
        lowest = fminf(lowest, k_[r][c]);
        if (k_[r][c] < kFarCost) highest = fmaxf(highest, k_[r][c]);
      }
#pragma unroll
      for (int d = 1; d < T::kColLanes; d *= 2)
        lowest = fminf(lowest, __shfl_xor_sync(kAllLanes, lowest, d));
      if (has_row(r)) least = fminf(least, lowest);
      u_[r] = has_row(r) ? lowest * scale_ : 0.f;
      if (col_lane_ == 0) {
        f_rows_[row(r)] = u_[r];
        f += u_[r];
      }
    }
    reduce_columns(kInfinity, 0.f,
                   [&](float x, int r, int c) { return fminf(x, fmaf(k_[r][c], scale_, -u_[r])); });
    float g = 0.f;
    for_slots(
        [&](int s, float lowest, bool present) {
          g_slots_[s] = present ? lowest : 0.f;
          g += g_slots_[s];
        },
        [](float a, float b) { return fminf(a, b); });
    const float range = (block_max(highest, room_) + block_max(-least, room_)) * scale_;
    if (threadIdx.x == 0) room_[kRange] = range;  // dual() has a barrier
    return dual(f, g);
  }

  __device__ __forceinline__ void reset() {
    __syncthreads();
#pragma unroll
    for (int r = 0; r < T::kThreadRows; ++r) u_[r] = has_row(r) ? 1.f : kPadding;
    reset_columns();
    __syncthreads();
  }

  __device__ __forceinline__ void absorb() {
    __syncthreads();
#pragma unroll
    for (int r = 0; r < T::kThreadRows; ++r)
      if (has_row(r)) {
        if (col_lane_ == r % T::kColLanes) f_rows_[row(r)] += heat() * finite_log2(u_[r]);
        u_[r] = 1.f;
      }
    if (slot_ < T::kLine)
      for (int s = slot_; s < slot_ + 2; ++s)
        if (has_slot(s)) g_slots_[s] += heat() * finite_log2(v_slots_[s]);
    reset_columns();
    __syncthreads();
  }

  __device__ __forceinline__ void exponentiate() {
    const float cool = 1.f / heat();
    float g[T::kThreadCols];
    read_slots(g_slots_, g);
#pragma unroll
    for (int r = 0; r < T::kThreadRows; ++r) {
      const float f = f_rows_[row(r)];
#pragma unroll
      for (int c = 0; c < T::kThreadCols; ++c)
        k_[r][c] = fast_exp2((fmaf(-cost(r, c), scale_, f) + g[c]) * cool);
    }
    read_slots(v_slots_, v_);
  }

  // Iterations (rows, then columns) until `it` is `stop`, a scaling drifted, or the L1 error of the
  // row marginal before the update, which it returns, is no longer above tol. The loop ends by a
  // vote of the CTA, which the compiler knows to be one for all threads.
  __device__ __forceinline__ float iterate(int level, unsigned stop, float tol, unsigned& it) {
    const float omega = omega_of(level);
    const float column = static_cast<float>(m_) / static_cast<float>(n_);
    const float least = tol * static_cast<float>(n_);
    bool leave;
#pragma unroll 1
    do {
      float y[T::kThreadRows];
#pragma unroll
      for (int r = 0; r < T::kThreadRows; ++r) y[r] = fmaf(k_[r][0], v_[0], kTiny);
#pragma unroll
      for (int c = 1; c < T::kThreadCols; ++c)
#pragma unroll
        for (int r = 0; r < T::kThreadRows; ++r) y[r] = fmaf(k_[r][c], v_[c], y[r]);
#pragma unroll
      for (int d = 1; d < T::kColLanes; d *= 2)
#pragma unroll
        for (int r = 0; r < T::kThreadRows; ++r) y[r] += __shfl_xor_sync(kAllLanes, y[r], d);
      float error = 0.f;
#pragma unroll
      for (int r = 0; r < T::kThreadRows; ++r) {
        y[r] *= u_[r];
        error += fabsf(y[r] - 1.f);
        u_[r] *= fast_exp2(-omega * fast_log2(y[r]));
      }
      multiply_columns(error);
      leave = false;
      if (slot_ < T::kLine) {
        const float2 sum = sum_slots();
        const float2 old = *reinterpret_cast<float2*>(v_slots_ + slot_);
        float2 v = {old.x * fast_exp2(-omega * fast_log2(sum.x * old.x * column)),
                    old.y * fast_exp2(-omega * fast_log2(sum.y * old.y * column))};
        if (!has_slot(slot_)) v.x = 1.f;
        if (!has_slot(slot_ + 1)) v.y = 1.f;
        off_ = !(fminf(v.x, v.y) > kDriftLow && fmaxf(v.x, v.y) < kDriftHigh);
        leave = off_;
        if (has_residual()) {
          const float residual = kResidualSlot % 2 == 0 ? sum.x : sum.y;
          (kResidualSlot % 2 == 0 ? v.x : v.y) = residual;
          leave |= !(residual > least);
        }
        *reinterpret_cast<float2*>(v_slots_ + slot_) = v;
      }
      leave = __syncthreads_or(leave);
      read_slots(v_slots_, v_);
      ++it;
    } while (!leave && it < stop);
    return v_slots_[kResidualSlot] / static_cast<float>(n_);
  }

  // Potentials f_i = F_i + heat log2 u_i and g_j = min_i (C_ij - f_i) = G_j - heat log2 max_i (K_ij
  // u_i) are feasible at any iteration: their mean is a certified lower bound on W1, at the price
  // of one maximum pass.
  __device__ __forceinline__ float dual_value() {
    float f = 0.f;
#pragma unroll
    for (int r = 0; r < T::kThreadRows; ++r)
      if (has_row(r) && col_lane_ == 0) f += f_rows_[row(r)] + heat() * fast_log2(u_[r]);
    reduce_columns(0.f, 0.f, [&](float x, int r, int c) { return fmaxf(x, k_[r][c] * u_[r]); });
    float g = 0.f;
    for_slots(
        [&](int s, float most, bool present) {
          if (present) g += g_slots_[s] - heat() * fast_log2(most);
        },
        [](float a, float b) { return fmaxf(a, b); });
    return dual(f, g);
  }

  // One plain column update makes the columns exact; then <P, C> + <f, a - P 1>. The mass is right,
  // so any constant may be taken off f: the first entry, against cancellation.
  __device__ __forceinline__ Solution corrected_value() {
    multiply_columns(0.f);
    if (slot_ < T::kLine) {
      const float2 sum = sum_slots();
      const float mass = static_cast<float>(n_) / static_cast<float>(m_);
      *reinterpret_cast<float2*>(v_slots_ + slot_) = {has_slot(slot_) ? mass / sum.x : 1.f,
                                                      has_slot(slot_ + 1) ? mass / sum.y : 1.f};
    }
    if (threadIdx.x == 0) room_[kFirst] = f_rows_[0] + fast_log2(u_[0]);
    __syncthreads();
    read_slots(v_slots_, v_);
    const float first = room_[kFirst];
    float value = 0.f, error = 0.f;
#pragma unroll
    for (int r = 0; r < T::kThreadRows; ++r) {
      float mass = 0.f, paid = 0.f;
#pragma unroll
      for (int c = 0; c < T::kThreadCols; ++c) {
        const float p = k_[r][c] * v_[c];
        mass += p;
        paid = fmaf(p, cost(r, c), paid);
      }
#pragma unroll
      for (int d = 1; d < T::kColLanes; d *= 2) mass += __shfl_xor_sync(kAllLanes, mass, d);
      value = fmaf(paid, u_[r], value);
      if (has_row(r) && col_lane_ == 0) {
        const float missing = fmaf(-u_[r], mass, 1.f);
        error += fabsf(missing);
        const float potential = f_rows_[row(r)] + fast_log2(u_[r]) - first;
        value = fmaf(missing, potential / scale_, value);
      }
    }
    value = block_sum(value, room_);
    error = block_sum(error, room_);
    const float rows = static_cast<float>(n_);
    return {value / rows, error / rows, 0, false};
  }

 private:
  // Places in room_ behind those of the warps.
  static constexpr int kFirst = T::kWarps, kRange = T::kWarps + 1, kHeat = T::kWarps + 2;
  static_assert(kHeat < T::kRoom);

  // The residual, a sum over rows, takes no reduction of its own: behind its columns every lane has
  // one slot more, where its rows' errors are added up as if they were one more column. Lanes that
  // share rows have the same errors: the slot of the first column lane has the whole residual. It
  // is one of the two slots of one thread, the first or the second by its parity.
  static constexpr int kResidualSlot = T::kThreadCols;
  __device__ __forceinline__ bool has_residual() const { return slot_ == kResidualSlot / 2 * 2; }

  __device__ __forceinline__ int row(int r) const { return first_row_ + r * T::kRowLanes; }
  __device__ __forceinline__ bool has_row(int r) const { return row(r) < n_; }
  __device__ __forceinline__ bool has_slot(int s) const {
    const int lane = s / T::kSlots, c = s % T::kSlots;
    return c < T::kThreadCols && c * T::kColLanes + lane < m_;
  }
  __device__ __forceinline__ float cost(int r, int c) const {
    return cost_[row(r) * T::kPitch + c * T::kColLanes + col_lane_];
  }
  // From sums of potentials to a dual value in units of the costs.
  __device__ __forceinline__ float dual(float f, float g) const {
    return block_sum(f / static_cast<float>(n_) + g / static_cast<float>(m_), room_) / scale_;
  }
  __device__ __forceinline__ void reset_columns() {
    if (slot_ < T::kLine) *reinterpret_cast<float2*>(v_slots_ + slot_) = {1.f, 1.f};
  }

  __device__ __forceinline__ void read_slots(const float* slots, float (&out)[T::kThreadCols]) {
    const float* from = slots + col_lane_ * T::kSlots;
#pragma unroll
    for (int c = 0; c + 4 <= T::kThreadCols; c += 4) {
      const float4 x = *reinterpret_cast<const float4*>(from + c);
      out[c] = x.x;
      out[c + 1] = x.y;
      out[c + 2] = x.z;
      out[c + 3] = x.w;
    }
#pragma unroll
    for (int c = T::kThreadCols / 4 * 4; c < T::kThreadCols; ++c) out[c] = from[c];
  }

  // The lane's part of a reduction over rows, to shared memory, with `extra` behind the columns.
  template <typename Step>
  __device__ __forceinline__ void reduce_columns(float initial, float extra, const Step& step) {
    float* to = partial_ + (warp_id() * T::kRowLanes + lane_id() / T::kColLanes) * T::kLine +
                col_lane_ * T::kSlots;
#pragma unroll
    for (int c = 0; c <= T::kThreadCols; c += 4) {
      float x[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        x[k] = c + k < T::kThreadCols ? initial : extra;
        if (c + k >= T::kThreadCols) continue;
#pragma unroll
        for (int r = 0; r < T::kThreadRows; ++r) x[k] = step(x[k], r, c + k);
      }
      if (c + 3 <= T::kThreadCols)
        *reinterpret_cast<float4*>(to + c) = {x[0], x[1], x[2], x[3]};
      else if (c + 1 <= T::kThreadCols)
        *reinterpret_cast<float2*>(to + c) = {x[0], x[1]};
      else
        to[c] = x[0];
    }
    __syncthreads();
  }
  __device__ __forceinline__ void multiply_columns(float extra) {
    reduce_columns(0.f, extra, [&](float x, int r, int c) { return fmaf(k_[r][c], u_[r], x); });
  }
  // The thread's two slots, summed over the lanes of a column.
  __device__ __forceinline__ float2 sum_slots() const {
    float2 sum = *reinterpret_cast<const float2*>(partial_ + slot_);
#pragma unroll
    for (int p = 1; p < T::kPartials; ++p) {
      const float2 x = *reinterpret_cast<const float2*>(partial_ + p * T::kLine + slot_);
      sum.x += x.x;
      sum.y += x.y;
    }
    return sum;
  }
  template <typename Visit, typename Combine>
  __device__ __forceinline__ void for_slots(const Visit& visit, const Combine& combine) const {
    if (slot_ >= T::kLine) return;
    for (int s = slot_; s < slot_ + 2; ++s) {
      float x = partial_[s];
      for (int p = 1; p < T::kPartials; ++p) x = combine(x, partial_[p * T::kLine + s]);
      visit(s, x, has_slot(s));
    }
  }

  float *const cost_, *const partial_, *const v_slots_, *const g_slots_, *const f_rows_,
                                                                             *const room_;
  const int col_lane_, first_row_, slot_;
  int n_, m_;
  float scale_;
  float k_[T::kThreadRows][T::kThreadCols];
  float u_[T::kThreadRows], v_[T::kThreadCols];
  bool off_ = false;  // one of the thread's column scalings drifted
};

template <typename T>
__global__ void __launch_bounds__(T::kThreads, T::kCtas) sinkhorn(const SolveArgs args) {
  __shared__ Desk desk;
  TileEngine<T> engine(static_cast<float*>(shared_memory()));
  solve_queue(engine, args, &desk);
}

}  // namespace shear::cuda
