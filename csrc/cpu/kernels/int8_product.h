// Products of int8 rows by what the instruction set has for them. Sums are exact in int32, so that
// all of these are equal bit by bit. Included once per instruction set, like simd.h; which one it
// is, the build says:
//
//   SHEAR_VNNI   dot products of four bytes, unsigned times signed; 512 or 256 bits wide
//   otherwise    dot products of two 16-bit words: SSE2, AVX2, AVX-512BW, or plain C++
//
// (AMX has tiles: csrc/cpu/kernels/token_cost_int8.cpp.)
#pragma once
#ifdef SHEAR_EMULATED
#include "emulated.h"  // the same instructions in plain C++, to test this file on any machine
#elif defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/kernels/simd.h"

namespace shear::cpu::SHEAR_ISA {

#ifdef SHEAR_VNNI
constexpr int kEntriesPerWord = 4;

// sum + the products of four unsigned and four signed bytes
inline VecI add_products(VecI sum, VecI unsigned_bytes, VecI signed_bytes) {
#ifdef SHEAR_EMULATED
  return emulated::dot_of_bytes(sum, unsigned_bytes, signed_bytes);
#elif SHEAR_WIDTH == 16
  return (VecI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)unsigned_bytes, (__m512i)signed_bytes);
#else
  return (VecI)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)unsigned_bytes,
                                       (__m256i)signed_bytes);
#endif
}
#else
constexpr int kEntriesPerWord = 2;

// sum + the products of two signed words of 16 bits
inline VecI add_products(VecI sum, VecI x, VecI y) {
#if SHEAR_WIDTH == 16 && !defined(SHEAR_EMULATED)
  return sum + (VecI)_mm512_madd_epi16((__m512i)x, (__m512i)y);
#elif SHEAR_WIDTH == 8 && !defined(SHEAR_EMULATED)
  return sum + (VecI)_mm256_madd_epi16((__m256i)x, (__m256i)y);
#elif defined(__SSE2__) && !defined(SHEAR_EMULATED)
  return sum + (VecI)_mm_madd_epi16((__m128i)x, (__m128i)y);
#else
  return sum + (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}
#endif

}  // namespace shear::cpu::SHEAR_ISA
