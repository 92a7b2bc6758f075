// Passes of the solver over groups of rows: what a matrix of kGroup rows and a vector of column
// scalings need of SIMD. Included once per instruction set, like simd.h.
#pragma once
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/simd.h"

namespace shear::cpu::SHEAR_ISA {

constexpr int kGroup = kRowPad;  // rows taken at a time: their sums fill half the registers
typedef float Vec4 __attribute__((vector_size(16)));
typedef float Group __attribute__((vector_size(4 * kGroup)));

template <typename V>
V root(V a) {
  for (unsigned i = 0; i < sizeof(V) / 4; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}

// y^-omega times the scaling, omega = 2 - 2^-kLevel: level 0 is the plain update, and every
// further level takes one more square root and no logarithm.
template <int kLevel, typename V>
V relax(V scaling, V y) {
  V power = y;
  for (int i = 0; i < kLevel; ++i) {
    y = root(y);
    power *= y;
  }
  return scaling / power;
}

inline Vec4 quarter_sums(Vec a) {
#if SHEAR_WIDTH == 4
  return a;
#elif SHEAR_WIDTH == 8
  return __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
#else
  return (__builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7)) +
         (__builtin_shufflevector(a, a, 8, 9, 10, 11) +
          __builtin_shufflevector(a, a, 12, 13, 14, 15));
#endif
}

inline Vec4 row_sums(Vec a, Vec b, Vec c, Vec d) {
  const Vec4 qa = quarter_sums(a), qb = quarter_sums(b), qc = quarter_sums(c), qd = quarter_sums(d);
  const Vec4 ab =
      __builtin_shufflevector(qa, qb, 0, 4, 1, 5) + __builtin_shufflevector(qa, qb, 2, 6, 3, 7);
  const Vec4 cd =
      __builtin_shufflevector(qc, qd, 0, 4, 1, 5) + __builtin_shufflevector(qc, qd, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

inline Vec4 smaller(Vec4 a, Vec4 b) { return a < b ? a : b; }
inline Vec4 quarter_minima(Vec a) {
#if SHEAR_WIDTH == 4
  return a;
#elif SHEAR_WIDTH == 8
  return smaller(__builtin_shufflevector(a, a, 0, 1, 2, 3),
                 __builtin_shufflevector(a, a, 4, 5, 6, 7));
#else
  return smaller(
      smaller(__builtin_shufflevector(a, a, 0, 1, 2, 3), __builtin_shufflevector(a, a, 4, 5, 6, 7)),
      smaller(__builtin_shufflevector(a, a, 8, 9, 10, 11),
              __builtin_shufflevector(a, a, 12, 13, 14, 15)));
#endif
}

inline Vec4 row_minima(Vec a, Vec b, Vec c, Vec d) {
  const Vec4 qa = quarter_minima(a), qb = quarter_minima(b), qc = quarter_minima(c),
             qd = quarter_minima(d);
  const Vec4 ab = smaller(__builtin_shufflevector(qa, qb, 0, 4, 1, 5),
                          __builtin_shufflevector(qa, qb, 2, 6, 3, 7));
  const Vec4 cd = smaller(__builtin_shufflevector(qc, qd, 0, 4, 1, 5),
                          __builtin_shufflevector(qc, qd, 2, 6, 3, 7));
  return smaller(__builtin_shufflevector(ab, cd, 0, 1, 4, 5),
                 __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
}
inline Group row_minima(const Vec (&rows)[kGroup]) {
  return __builtin_shufflevector(row_minima(rows[0], rows[1], rows[2], rows[3]),
                                 row_minima(rows[4], rows[5], rows[6], rows[7]), 0, 1, 2, 3, 4, 5,
                                 6, 7);
}

inline Vec4 load4(const float* p) {
  Vec4 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Group load_group(const float* p) {
  Group v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store_group(float* p, Group v) { __builtin_memcpy(p, &v, sizeof v); }

// Matrices are read as one stream: (rows / kGroup, columns / kWidth, kGroup, kWidth) floats.

// The products of a group of rows with v.
inline Group multiply(const float* k, const float* v, int64_t columns) {
  const float* end = v + columns;
  Vec s[kGroup] = {};
  for (; v < end; v += kWidth, k += kGroup * kWidth) {
    const Vec x = load(v);
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r) s[r] += load(k + r * kWidth) * x;
  }
  return __builtin_shufflevector(row_sums(s[0], s[1], s[2], s[3]), row_sums(s[4], s[5], s[6], s[7]),
                                 0, 1, 2, 3, 4, 5, 6, 7);
}

// w += a group of rows, scaled by u.
inline void add_scaled(const float* k, const float* u, float* w, int64_t columns) {
  Vec scale[kGroup];
#pragma GCC unroll 8
  for (int r = 0; r < kGroup; ++r) scale[r] = broadcast(u[r]);
  for (const float* end = w + columns; w < end; w += kWidth, k += kGroup * kWidth) {
    Vec total = load(w);
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r) total += load(k + r * kWidth) * scale[r];
    store(w, total);
  }
}

// w = maximum of w and a group of rows, scaled by u.
inline void max_scaled(const float* k, const float* u, float* w, int64_t columns) {
  const Group scale = load_group(u);
  for (const float* end = w + columns; w < end; w += kWidth, k += kGroup * kWidth) {
    Vec most = load(w);
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r) most = max(most, load(k + r * kWidth) * scale[r]);
    store(w, most);
  }
}

inline double total(const float* a, int64_t count) {
  VecD sums = {};
  for (int64_t i = 0; i < count; i += kWidth) sums += widen(load(a + i));
  return sum(sums);
}

}  // namespace shear::cpu::SHEAR_ISA
