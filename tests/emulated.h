// The AMX and AVX512-BF16 instructions that csrc/cpu/token_cost_bf16.cpp uses, in plain C++:
// products of bfloat16 pairs are exact in float32 and added to the sum one after the other.
#pragma once
#include <cstdint>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64)));
typedef float __m512bh __attribute__((vector_size(64)));

namespace emulated {

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// sum + the products of two pairs
inline float dot(float sum, const void* x, const void* y) {
  uint16_t a[2], b[2];
  std::memcpy(a, x, sizeof a);
  std::memcpy(b, y, sizeof b);
  sum += from_bf16(a[1]) * from_bf16(b[1]);
  return sum + from_bf16(a[0]) * from_bf16(b[0]);
}

struct Tile {
  unsigned char row[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local int configured_rows = 0;  // 0: using a tile is an error, as on the hardware

inline Tile& tile(int index) {
  if (configured_rows == 0) __builtin_trap();
  return tiles[index];
}

}  // namespace emulated

inline void _tile_loadconfig(const void* config) {
  const auto* bytes = static_cast<const unsigned char*>(config);
  if (bytes[0] != 1) __builtin_trap();
  for (int t = 0; t < 8; ++t)
    if (bytes[16 + 2 * t] != 64 || bytes[48 + t] != 16) __builtin_trap();
  emulated::configured_rows = 16;
}
inline void _tile_release() { emulated::configured_rows = 0; }
inline void _tile_zero(int t) { std::memset(&emulated::tile(t), 0, sizeof(emulated::Tile)); }
inline void _tile_loadd(int t, const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(emulated::tile(t).row[r], static_cast<const char*>(from) + r * stride, 64);
}
inline void _tile_stored(int t, void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, emulated::tile(t).row[r], 64);
}
inline void _tile_dpbf16ps(int c, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum;
      std::memcpy(&sum, emulated::tile(c).row[m] + 4 * n, sizeof sum);
      for (int k = 0; k < 16; ++k)
        sum =
            emulated::dot(sum, emulated::tile(a).row[m] + 4 * k, emulated::tile(b).row[k] + 4 * n);
      std::memcpy(emulated::tile(c).row[m] + 4 * n, &sum, sizeof sum);
    }
}
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh x, __m512bh y) {
  for (int l = 0; l < 16; ++l) {
    float a, b;
    std::memcpy(&a, reinterpret_cast<const char*>(&x) + 4 * l, sizeof a);
    std::memcpy(&b, reinterpret_cast<const char*>(&y) + 4 * l, sizeof b);
    sum[l] = emulated::dot(sum[l], &a, &b);
  }
  return sum;
}
