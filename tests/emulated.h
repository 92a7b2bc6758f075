// The VNNI and AMX instructions that csrc/cpu/kernels/int8_product.h and token_cost_int8.cpp use,
// in plain C++.
#pragma once
#include <cstdint>
#include <cstring>

namespace emulated {

// sum + the products of four bytes of either
template <typename X>
int32_t dot(int32_t sum, const void* x, const void* y) {
  X a[4];
  int8_t b[4];
  std::memcpy(a, x, sizeof a);
  std::memcpy(b, y, sizeof b);
  for (int k = 0; k < 4; ++k) sum += a[k] * b[k];
  return sum;
}

// A vector of 32-bit lanes: unsigned times signed bytes.
template <typename V>
V dot_of_bytes(V sum, V x, V y) {
  for (unsigned l = 0; l < sizeof(V) / 4; ++l) {
    const int32_t a = x[l], b = y[l];
    sum[l] = dot<uint8_t>(sum[l], &a, &b);
  }
  return sum;
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
inline void _tile_dpbssd(int c, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      int32_t sum;
      std::memcpy(&sum, emulated::tile(c).row[m] + 4 * n, sizeof sum);
      for (int k = 0; k < 16; ++k)
        sum = emulated::dot<int8_t>(sum, emulated::tile(a).row[m] + 4 * k,
                                    emulated::tile(b).row[k] + 4 * n);
      std::memcpy(emulated::tile(c).row[m] + 4 * n, &sum, sizeof sum);
    }
}
