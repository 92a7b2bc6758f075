// One float vector type per instruction set, on the compiler's vector extension: its width follows
// SHEAR_WIDTH (floats per vector), its instructions follow the flags of the translation unit.
// Included only by files that are compiled once per instruction set; everything lives in that set's
// namespace and nothing of the standard library is instantiated, because the linker could keep an
// AVX-512 copy of a shared inline function for every caller.
#pragma once
#include <cstdint>

#if SHEAR_WIDTH == 16 && !defined(SHEAR_EMULATED)
#define SHEAR_AVX512
#include <immintrin.h>
#endif

namespace shear::cpu::SHEAR_ISA {

constexpr int kWidth = SHEAR_WIDTH;
typedef float Vec __attribute__((vector_size(4 * SHEAR_WIDTH)));
typedef int32_t VecI __attribute__((vector_size(4 * SHEAR_WIDTH)));
typedef uint32_t VecU __attribute__((vector_size(4 * SHEAR_WIDTH)));
typedef uint16_t VecH __attribute__((vector_size(2 * SHEAR_WIDTH)));
typedef double VecD __attribute__((vector_size(8 * SHEAR_WIDTH)));

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline Vec broadcast(float x) { return x - Vec{}; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec sqrt(Vec a) {
  for (int i = 0; i < kWidth; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}

inline float sum(Vec a) {
  float half[kWidth];
  store(half, a);
  for (int n = kWidth / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) half[i] += half[i + n];
  return half[0];
}
inline float min(Vec a) {
  float half[kWidth];
  store(half, a);
  for (int n = kWidth / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) half[i] = half[i + n] < half[i] ? half[i + n] : half[i];
  return half[0];
}
inline double sum(VecD a) {
  double total = 0;
  for (int i = 0; i < kWidth; ++i) total += a[i];
  return total;
}
inline VecD widen(Vec a) { return __builtin_convertvector(a, VecD); }

// Lanes from `count` on are replaced by `fill`.
inline Vec keep_first(Vec a, int count, float fill) {
  for (int i = 0; i < kWidth; ++i) a[i] = i < count ? a[i] : fill;
  return a;
}
// The last `rest` < kWidth floats of a row of `count`, then `fill`. Reads nothing outside the row.
inline Vec load_rest(const float* row, int64_t count, int rest, float fill) {
  Vec last;
  VecI lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  if (count >= kWidth) {
    last = __builtin_shuffle(load(row + count - kWidth), (lane + (kWidth - rest)) & (kWidth - 1));
  } else {
    last = Vec{};
    for (int i = 0; i < rest; ++i) last[i] = row[i];
  }
  return lane < rest ? last : broadcast(fill);
}
// Reads `count` floats, never more.
inline Vec load_first(const float* p, int64_t count, float fill) {
  if (__builtin_expect(count >= kWidth, 1)) return load(p);
  float lanes[kWidth];
  for (int i = 0; i < kWidth; ++i) lanes[i] = i < count ? p[i] : fill;
  return load(lanes);
}

// Element i of the first half and element i of the second half side by side, for every i.
inline void interleave(Vec a, Vec b, Vec& low, Vec& high) {
#if SHEAR_WIDTH == 4
  low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#elif SHEAR_WIDTH == 8
  low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high =
      __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#endif
}

// A square of floats, in log2(kWidth) perfect shuffles.
inline void transpose(Vec (&rows)[kWidth]) {
  Vec shuffled[kWidth];
  for (int step = 1; step < kWidth; step *= 2) {
    for (int i = 0; i < kWidth / 2; ++i)
      interleave(rows[i], rows[i + kWidth / 2], shuffled[2 * i], shuffled[2 * i + 1]);
    for (int i = 0; i < kWidth; ++i) rows[i] = shuffled[i];
  }
}

// 2^x to 2e-7 relative for x <= 0; below 2^-96, where nothing is left of a plan, it stays at 2^-96
// and so keeps products clear of slow subnormal numbers.
inline Vec exp2(Vec x) {
  x = max(x, broadcast(-96.f));
#ifdef SHEAR_AVX512
  const Vec f =
      (Vec)_mm512_maskz_reduce_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);  // [-0.5, 0.5]
#else
  const Vec magic = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);  // [-0.5, 0.5]
#endif
  // minimax polynomial of 2^f, degree 5
  Vec p = broadcast(1.327647152e-3f);
  p = p * f + 9.675541331e-3f;
  p = p * f + 5.550713275e-2f;
  p = p * f + 2.402211972e-1f;
  p = p * f + 6.931469671e-1f;
  p = p * f + 1.000000072f;
#ifdef SHEAR_AVX512
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)(x - f));
#else
  return (Vec)((VecI)p + ((VecI)shifted << 23));
#endif
}

// log2(x) to 2e-7 absolute or relative, whichever is larger, for normal x > 0.
inline Vec log2(Vec x) {
  const VecI bits =
      (VecI)x - 0x3f3504f3;  // of sqrt(1/2): the mantissa ends up in [sqrt(1/2), sqrt(2))
  const VecI exponent = bits >> 23;
  const Vec m = (Vec)((bits & 0x7fffff) + 0x3f3504f3);
  const Vec t = (m - 1.f) / (m + 1.f), tt = t * t;  // log2(m) = 2/ln(2) atanh(t)
  const Vec p = ((tt * 0.412198572f + 0.577078016f) * tt + 0.961796694f) * tt + 2.88539008f;
  return __builtin_convertvector(exponent, Vec) + t * p;
}

// The nearest integers, ties to even, of floats below 2^22.
inline VecI nearest_integer(Vec x) {
  const Vec magic = broadcast(12582912.f);  // as in exp2
  return (VecI)(x + magic) - (VecI)magic;
}

// float16 and bfloat16 bits to float32, exactly.
inline Vec from_bfloat16(VecH bits) { return (Vec)(__builtin_convertvector(bits, VecU) << 16); }
inline Vec from_float16(VecH bits) {
  const VecU wide = __builtin_convertvector(bits, VecU);
  const Vec scaled =
      (Vec)((wide & 0x7fffu) << 13) * 0x1p112f;  // rebias the exponent, subnormals included
  const VecU infinite = (VecU)(scaled >= 65536.f) & 0x7f800000u;
  return (Vec)((VecU)scaled | infinite | ((wide & 0x8000u) << 16));
}

}  // namespace shear::cpu::SHEAR_ISA
