// Hidden states to int8 rows, by the rule of csrc/rounding.h: equal bit by bit on every instruction
// set. Compiled without fused multiply-adds.
#include "rounding.h"

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/state_words.h"

namespace shear::cpu::SHEAR_ISA {
namespace {

typedef int8_t VecB __attribute__((vector_size(SHEAR_WIDTH)));

// The state less the center, with signs, zeros beyond the last dimension.
template <Dtype kDtype>
void center_state(const Rounded& r, int64_t token, float* out) {
  const int64_t dim = r.states.dim, base = token * dim;
  int64_t k = 0;
  for (; k + kWidth <= dim; k += kWidth) {
    const Vec x = load_state<kDtype>(r.states.data, base + k) - load(r.center + k);
    VecU signs;
    __builtin_memcpy(&signs, r.signs + k, sizeof signs);
    store(out + k, (Vec)((VecU)x ^ signs));
  }
  for (; k < dim; ++k) {
    const float x = state_at<kDtype>(r.states.data, base + k) - r.center[k];
    out[k] = r.signs[k] ? -x : x;
  }
  for (; k < r.rows.depth; ++k) out[k] = 0.f;
}

// One step of the transform within vectors: partners are kStep lanes apart.
template <int kStep>
Vec butterfly(Vec a) {
  VecI partner, high;
  for (int i = 0; i < kWidth; ++i) {
    partner[i] = i ^ kStep;
    high[i] = i & kStep ? -1 : 0;
  }
  const Vec other = __builtin_shuffle(a, partner);
  return high ? other - a : a + other;
}

// Hadamard transform of kBlock entries, unscaled, step by step from neighbours on.
template <int kBlock>
void transform(float* entries) {
  constexpr int kVectors = kBlock / kWidth;
  Vec a[kVectors];
#pragma GCC unroll 32
  for (int i = 0; i < kVectors; ++i) {
    a[i] = butterfly<2>(butterfly<1>(load(entries + i * kWidth)));
    if constexpr (kWidth > 4) a[i] = butterfly<4>(a[i]);
    if constexpr (kWidth > 8) a[i] = butterfly<8>(a[i]);
  }
#pragma GCC unroll 8
  for (int step = 1; step < kVectors; step *= 2)
#pragma GCC unroll 32
    for (int i = 0; i < kVectors; ++i) {
      if (i & step) continue;
      const Vec low = a[i], high = a[i + step];
      a[i] = low + high;
      a[i + step] = low - high;
    }
#pragma GCC unroll 32
  for (int i = 0; i < kVectors; ++i) store(entries + i * kWidth, a[i]);
}

void store_bytes(int8_t* to, VecI entries) {
  const VecB bytes = __builtin_convertvector(entries, VecB);
  __builtin_memcpy(to, &bytes, sizeof bytes);
}

template <Dtype kDtype>
void round_states_of(const Rounded& r) {
  const int64_t depth = r.rows.depth, block = rotation_block(depth);
  float* const entries = r.scratch;
  for (int64_t i = 0; i < r.count; ++i) {
    center_state<kDtype>(r, r.token + i, entries);
    for (int64_t k = 0; k < depth; k += block)
      block == kLongBlock ? transform<kLongBlock>(entries + k)
                          : transform<kShortBlock>(entries + k);
    Vec most = {};
    for (int64_t k = 0; k < depth; k += kWidth) {
      const Vec x = load(entries + k);
      most = max(most, x < 0.f ? -x : x);
    }
    const float largest = -min(-most);
    const bool is_center = !(largest >= kLeastEntry);
    r.rows.scale[i] = is_center ? 0.f : step_of_row(largest, block);
    const float to_steps = is_center ? 0.f : static_cast<float>(kMostInt8) / largest;
    for (int64_t k = 0; k < depth; k += kWidth)
      store_bytes(r.rows.row + i * depth + k, nearest_integer(load(entries + k) * to_steps));
  }
}

}  // namespace

void round_states(const Rounded& r) { SHEAR_BY_DTYPE(round_states_of, r.states, r) }

}  // namespace shear::cpu::SHEAR_ISA
