// Sums over states: their magnitudes, and what means are made of.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/state_words.h"

namespace shear::cpu::SHEAR_ISA {
namespace {

template <Dtype kDtype>
void add_states_of(const States& states, int64_t token, int64_t count, int64_t dim_begin,
                   int64_t dim_end, double* sums) {
  for (int64_t i = token; i < token + count; ++i) {
    const int64_t base = i * states.dim;
    int64_t k = dim_begin;
    for (; k + kWidth <= dim_end; k += kWidth) {
      VecD total;
      __builtin_memcpy(&total, sums + (k - dim_begin), sizeof total);
      total += widen(load_state<kDtype>(states.data, base + k));
      __builtin_memcpy(sums + (k - dim_begin), &total, sizeof total);
    }
    for (; k < dim_end; ++k) sums[k - dim_begin] += state_at<kDtype>(states.data, base + k);
  }
}

template <Dtype kDtype>
Magnitude magnitude_of(const States& states, int64_t token) {
  const int64_t base = token * states.dim;
  double total = 0;
  float largest = 0.f;
  for (int64_t begin = 0; begin < states.dim;
       begin += 32 * kWidth) {  // short float32 runs, summed in double
    const int64_t end = states.dim - begin < 32 * kWidth ? states.dim : begin + 32 * kWidth;
    Vec squares = {}, most = {};
    int64_t k = begin;
    for (; k + kWidth <= end; k += kWidth) {
      const Vec x = load_state<kDtype>(states.data, base + k);
      squares += x * x;
      most = max(most, x < 0.f ? -x : x);
    }
    float rest = 0.f;
    for (; k < end; ++k) {
      const float x = state_at<kDtype>(states.data, base + k), size = x < 0.f ? -x : x;
      rest += x * x;
      largest = size > largest ? size : largest;
    }
    total += static_cast<double>(sum(squares)) + rest;
    const float of_run = -min(-most);
    largest = of_run > largest ? of_run : largest;
  }
  return {static_cast<float>(total), largest};
}

template <Dtype kDtype>
float squared_norm_of(const States& states, int64_t token, const float* center) {
  const int64_t base = token * states.dim;
  double total = 0;
  for (int64_t begin = 0; begin < states.dim; begin += 32 * kWidth) {
    const int64_t end = states.dim - begin < 32 * kWidth ? states.dim : begin + 32 * kWidth;
    Vec squares = {};
    int64_t k = begin;
    for (; k + kWidth <= end; k += kWidth) {
      const Vec x = load_state<kDtype>(states.data, base + k) - load(center + k);
      squares += x * x;
    }
    float rest = 0.f;
    for (; k < end; ++k) {
      const float x = state_at<kDtype>(states.data, base + k) - center[k];
      rest += x * x;
    }
    total += static_cast<double>(sum(squares)) + rest;
  }
  return static_cast<float>(total);
}

template <Dtype kDtype>
void add_rounded_of(const States& states, int64_t token, int64_t dim_begin, int64_t dim_end,
                    float scale, int64_t* sums) {
  typedef int64_t VecL __attribute__((vector_size(8 * SHEAR_WIDTH)));
  const int64_t base = token * states.dim;
  int64_t k = dim_begin;
  for (; k + kWidth <= dim_end; k += kWidth) {
    const VecI entry = nearest_integer(load_state<kDtype>(states.data, base + k) * scale);
    VecL total;
    __builtin_memcpy(&total, sums + (k - dim_begin), sizeof total);
    total += __builtin_convertvector(entry, VecL);
    __builtin_memcpy(sums + (k - dim_begin), &total, sizeof total);
  }
  for (; k < dim_end; ++k)
    sums[k - dim_begin] +=
        nearest_integer(broadcast(state_at<kDtype>(states.data, base + k) * scale))[0];
}

}  // namespace

void add_states(const States& s, int64_t token, int64_t count, int64_t begin, int64_t end,
                double* sums){
    SHEAR_BY_DTYPE(add_states_of, s, s, token, count, begin, end, sums)} Magnitude
    magnitude(const States& s, int64_t token) {
  SHEAR_BY_DTYPE(magnitude_of, s, s, token)
}
float squared_norm(const States& s, int64_t token, const float* center) {
  SHEAR_BY_DTYPE(squared_norm_of, s, s, token, center)
}
void add_rounded(const States& s, int64_t token, int64_t begin, int64_t end, float scale,
                 int64_t* sums) {
  SHEAR_BY_DTYPE(add_rounded_of, s, s, token, begin, end, scale, sums)
}

}  // namespace shear::cpu::SHEAR_ISA
