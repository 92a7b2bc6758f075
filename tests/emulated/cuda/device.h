// csrc/cuda/device.h for the emulation: what the kernels take from the hardware, in plain C++.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_words.h"

namespace shear::cuda {

inline float fast_exp2(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;  // .ftz
}
inline float fast_log2(float x) { return log2f(std::fabs(x) < 0x1p-126f ? 0.f : x); }
inline float half_value(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

inline void* shared_memory() { return emulated::shared; }

inline void check_copy(const void* to, const void* from, uintptr_t bytes) {
  const auto* p = static_cast<const unsigned char*>(to);
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    emulated::fail("an asynchronous copy is not aligned");
  if (p < emulated::shared || p + bytes > emulated::shared + emulated::kSharedBytes)
    emulated::fail("an asynchronous copy goes outside shared memory");
}
inline void copy_async_4(float* to, const float* from) {
  check_copy(to, from, 4);
  *to = *from;
}
inline void copy_async_16(void* to, const void* from, int bytes) {
  check_copy(to, from, 16);
  std::memset(to, 0, 16);
  if (bytes > 0) std::memcpy(to, from, bytes);
}
inline void commit_copies() {}
template <int>
void wait_copies() {}

// Fragments of ldmatrix and mma.sync as the PTX manual lays them out: row l / 4, words l % 4 (and
// + 4) of lane l.
inline void load_matrices(const void* row, uint32_t (&out)[4]) {
  const int lane = emulated::current % 32, first = emulated::current / 32 * 32;
  if (reinterpret_cast<uintptr_t>(row) % 16) emulated::fail("a matrix row is not aligned");
  const auto address = reinterpret_cast<uint64_t>(row);
  uint64_t* const place = emulated::exchange[emulated::turn()];
  place[emulated::current] = address;
  emulated::meet(emulated::own_warp());
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto* from = reinterpret_cast<const char*>(place[first + 8 * matrix + lane / 4]);
    std::memcpy(&out[matrix], from + 4 * (lane % 4), 4);
  }
}

// kWords: numbers in a 32-bit word. c += a b, the products added one after the other.
template <int kWords, typename Sum, typename Value>
void multiply_fragments(Sum (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                        const Value& value) {
  const int lane = emulated::current % 32, first = emulated::current / 32 * 32;
  auto* const place = emulated::words[emulated::turn()];
  std::memcpy(place[emulated::current], a, sizeof a);
  place[emulated::current][4] = b0;
  place[emulated::current][5] = b1;
  emulated::meet(emulated::own_warp());
  const int row = lane / 4;
  for (int k = 0; k < 4; ++k) {
    const int high = k / 2, col = 2 * (lane % 4) + k % 2;
    Sum sum = c[k];
    for (int half = 0; half < 2; ++half)
      for (int word = 0; word < 4; ++word) {
        const uint32_t x = place[first + 4 * row + word][2 * half + high];
        const uint32_t y = place[first + 4 * col + word][4 + half];
        for (int w = 0; w < kWords; ++w) sum += value(x, w) * value(y, w);
      }
    c[k] = sum;
  }
}
inline void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_fragments<2>(c, a, b0, b1, [](uint32_t x, int w) {
    return __uint_as_float(w == 0 ? x << 16 : x & 0xffff0000u);
  });
}
inline void multiply_float16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_fragments<2>(c, a, b0, b1, [](uint32_t x, int w) {
    return half_value(static_cast<uint16_t>(x >> (16 * w)));
  });
}
inline void multiply_int8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_fragments<4>(c, a, b0, b1, [](uint32_t x, int w) {
    return static_cast<int32_t>(static_cast<int8_t>(x >> (8 * w)));
  });
}
inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_fragments<1>(c, a, b0, b1,
                        [](uint32_t x, int) { return __uint_as_float(x & ~0x1fffu); });
}

}  // namespace shear::cuda
