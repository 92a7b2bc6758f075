// Hidden states as floats. Included once per instruction set, like simd.h.
#pragma once
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/simd.h"

namespace shear::cpu::SHEAR_ISA {

template <Dtype kDtype>
Vec load_state(const void* data, int64_t index) {
  if constexpr (kDtype == Dtype::kFloat32) {
    return load(static_cast<const float*>(data) + index);
  } else {
    VecH bits;
    __builtin_memcpy(&bits, static_cast<const uint16_t*>(data) + index, sizeof bits);
    return kDtype == Dtype::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
  }
}

template <Dtype kDtype>
float state_at(const void* data, int64_t index) {
  if constexpr (kDtype == Dtype::kFloat32) {
    return static_cast<const float*>(data)[index];
  } else {
    const VecH bits = VecH{} + static_cast<const uint16_t*>(data)[index];
    return (kDtype == Dtype::kFloat16 ? from_float16(bits) : from_bfloat16(bits))[0];
  }
}

#define SHEAR_BY_DTYPE(function, states, ...)         \
  switch ((states).dtype) {                           \
    case Dtype::kFloat32:                             \
      return function<Dtype::kFloat32>(__VA_ARGS__);  \
    case Dtype::kFloat16:                             \
      return function<Dtype::kFloat16>(__VA_ARGS__);  \
    case Dtype::kBFloat16:                            \
      return function<Dtype::kBFloat16>(__VA_ARGS__); \
  }                                                   \
  __builtin_unreachable();

}  // namespace shear::cpu::SHEAR_ISA
