// Hidden states as numbers: one at a time, four, 16 bytes at a time, and sums over the dimensions.
#pragma once
#include "cuda/device.h"
#include "cuda/threads.cuh"
#include "problem.h"

namespace shear::cuda {

// Hidden states in place, row-major (tokens, dim).
struct States {
  const void* data;
  int64_t dim;
  bool vectors;  // every state starts on 16 bytes and is a multiple of them
};

__device__ __forceinline__ float bfloat16_value(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

template <Dtype kDtype>
struct StateWords {
  static constexpr int kPerVector = kDtype == Dtype::kFloat32 ? 4 : 8;  // 16 bytes
  static constexpr int kBytes = 16 / kPerVector;

  static __device__ __forceinline__ float at(const void* data, int64_t index) {
    if constexpr (kDtype == Dtype::kFloat32) return static_cast<const float*>(data)[index];
    return value(static_cast<const uint16_t*>(data)[index]);
  }
  static __device__ __forceinline__ void vector_at(const void* data, int64_t index,
                                                   float (&out)[kPerVector]) {
    const uint4 words = static_cast<const uint4*>(data)[index / kPerVector];
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int k = 0; k < kPerVector; ++k) {
      if constexpr (kDtype == Dtype::kFloat32)
        out[k] = __uint_as_float(word[k]);
      else
        out[k] = value(word[k / 2] >> (16 * (k % 2)));
    }
  }
  // Four dimensions of a token from k on, a multiple of 4; zeros beyond the last.
  static __device__ __forceinline__ void four_at(const States& states, int64_t token, int64_t k,
                                                 float (&out)[4]) {
    const int64_t index = token * states.dim + k;
    if (!states.vectors) {
#pragma unroll
      for (int v = 0; v < 4; ++v) out[v] = k + v < states.dim ? at(states.data, index + v) : 0.f;
    } else if (k >= states.dim) {
      out[0] = out[1] = out[2] = out[3] = 0.f;
    } else if constexpr (kDtype == Dtype::kFloat32) {
      vector_at(states.data, index, out);
    } else {
      const uint2 words = static_cast<const uint2*>(states.data)[index / 4];
      const uint32_t word[2] = {words.x, words.y};
#pragma unroll
      for (int v = 0; v < 4; ++v) out[v] = value(word[v / 2] >> (16 * (v % 2)));
    }
  }

 private:
  static __device__ __forceinline__ float value(uint32_t word) {
    const auto bits = static_cast<uint16_t>(word);
    return kDtype == Dtype::kFloat16 ? half_value(bits) : bfloat16_value(bits);
  }
};

// The lane's part of the sum over dimensions of term(x_k, y_k); a warp takes two tokens.
template <Dtype kDtype, typename Term>
__device__ __forceinline__ float sum_over_dims(const States& states, int64_t x, int64_t y,
                                               const Term& term) {
  using Words = StateWords<kDtype>;
  const int64_t from = x * states.dim, other = y * states.dim;
  float sum = 0.f;
  if (states.vectors) {
    for (int64_t k = lane_id() * Words::kPerVector; k < states.dim;
         k += kWarp * Words::kPerVector) {
      float a[Words::kPerVector], b[Words::kPerVector];
      Words::vector_at(states.data, from + k, a);
      Words::vector_at(states.data, other + k, b);
#pragma unroll
      for (int v = 0; v < Words::kPerVector; ++v) sum += term(a[v], b[v]);
    }
  } else {
    for (int64_t k = lane_id(); k < states.dim; k += kWarp)
      sum += term(Words::at(states.data, from + k), Words::at(states.data, other + k));
  }
  return sum;
}

// ||x - y|| of two tokens, one warp: exact where their norms would cancel.
template <Dtype kDtype>
__device__ float direct_cost(const States& states, int64_t x, int64_t y) {
  return sqrtf(warp_sum(
      sum_over_dims<kDtype>(states, x, y, [](float a, float b) { return (a - b) * (a - b); })));
}

}  // namespace shear::cuda
