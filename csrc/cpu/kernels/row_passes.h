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

// The lanes of each of kGroup vectors to one number, by an operation like the sum: halves of two
// vectors become one vector, until one is left.
template <typename Operation>
Group reduce_rows(const Vec (&rows)[kGroup], const Operation& of) {
  Vec four[4], two[2];
#if SHEAR_WIDTH == 4
  for (int k = 0; k < 4; ++k) {
    const Vec a = rows[2 * k], b = rows[2 * k + 1];
    four[k] =
        of(__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7));
  }
  for (int k = 0; k < 2; ++k) {
    const Vec a = four[2 * k], b = four[2 * k + 1];
    two[k] =
        of(__builtin_shufflevector(a, b, 0, 2, 4, 6), __builtin_shufflevector(a, b, 1, 3, 5, 7));
  }
  return __builtin_shufflevector(two[0], two[1], 0, 1, 2, 3, 4, 5, 6, 7);
#elif SHEAR_WIDTH == 8
  for (int k = 0; k < 4; ++k) {
    const Vec a = rows[k], b = rows[k + 4];
    four[k] = of(__builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11),
                 __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15));
  }
  for (int k = 0; k < 2; ++k) {
    const Vec a = four[k], b = four[k + 2];
    two[k] = of(__builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13),
                __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15));
  }
  const Vec all = of(__builtin_shufflevector(two[0], two[1], 0, 2, 8, 10, 4, 6, 12, 14),
                     __builtin_shufflevector(two[0], two[1], 1, 3, 9, 11, 5, 7, 13, 15));
  return __builtin_shufflevector(all, all, 0, 2, 1, 3, 4, 6, 5, 7);
#else
  for (int k = 0; k < 4; ++k) {
    const Vec a = rows[k], b = rows[k + 4];
    four[k] =
        of(__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30,
                                   31));
  }
  for (int k = 0; k < 2; ++k) {
    const Vec a = four[k], b = four[k + 2];
    two[k] = of(
        __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
        __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
  }
  const Vec a = two[0], b = two[1];
  const Vec all =
      of(__builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
         __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
  const Vec each = of(
      all, __builtin_shufflevector(all, all, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return __builtin_shufflevector(each, each, 0, 2, 8, 10, 4, 6, 12, 14);
#endif
}
inline Group row_sums(const Vec (&rows)[kGroup]) {
  return reduce_rows(rows, [](Vec a, Vec b) { return a + b; });
}
inline Group row_minima(const Vec (&rows)[kGroup]) {
  return reduce_rows(rows, [](Vec a, Vec b) { return min(a, b); });
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
  return row_sums(s);
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
