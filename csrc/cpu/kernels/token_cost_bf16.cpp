// Token costs of bfloat16 states by the instructions that multiply them: products of two bfloat16
// are exact in float32, so nothing is rounded but the sums, and no float32 copy is made. Compiled
// for two instruction sets: AMX tiles (SHEAR_AMX), and AVX-512 dot products of pairs.
//
// States are not centred here, since centring and rounding to bfloat16 again would cost accuracy;
// the caller uses this only where the mean state does not dominate.
#ifdef SHEAR_EMULATED
#include "emulated.h"  // the same instructions in plain C++, to test this file on any machine
#else
#include <immintrin.h>
#endif

#include "cpu/kernels/cost_tile.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/simd.h"
#include "cpu/plan.h"

namespace shear::cpu::SHEAR_ISA {
namespace {

static_assert(kWidth == 16);
constexpr int64_t kDepth = 512;   // dimensions taken at a time
constexpr int64_t kStep = 32;     // dimensions of an AMX tile: depths are padded to it
constexpr int kTile = 16;         // rows and columns of an AMX tile
constexpr int kRows = 2 * kTile;  // of an output block
constexpr int kCols = 2 * kTile;
constexpr int64_t kRowWords = kDepth / 2;  // a word is two dimensions of one token
static_assert((kTileRows + 2 * kCols + kTile) * kRowWords <= kPanelFloats);
static_assert(kTileRows % kRows == 0);

// Copies dimensions [k0, k0 + left) of `count` tokens as `tokens` rows of `depth`, zero-filled.
void copy_rows(const States& states, int64_t token, int64_t count, int64_t tokens, int64_t k0,
               int64_t left, int64_t depth, float* rows) {
  auto* out = reinterpret_cast<char*>(rows);
  const auto* from = static_cast<const char*>(states.data) + 2 * (token * states.dim + k0);
  for (int64_t r = 0; r < tokens; ++r, out += 2 * depth, from += 2 * states.dim) {
    const int64_t bytes = r < count ? 2 * left : 0;
    if (bytes > 0) __builtin_memcpy(out, from, bytes);
    __builtin_memset(out + bytes, 0, 2 * depth - bytes);
  }
}

#ifdef SHEAR_AMX

// out (kRows, kCols) += a (kRows, depth) b; b: two panels (depth / 2, kTile) of pairs.
void multiply(const float* a, const float* b, int64_t depth, bool accumulate, float* out,
              int64_t ld) {
  const int64_t words = depth / 2;
  float *const right = out + kTile, *const low = out + kTile * ld, *const low_right = low + kTile;
  if (accumulate) {
    _tile_loadd(0, out, 4 * ld);
    _tile_loadd(1, right, 4 * ld);
    _tile_loadd(2, low, 4 * ld);
    _tile_loadd(3, low_right, 4 * ld);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t w = 0; w < words; w += kStep / 2) {
    _tile_loadd(4, a + w, 4 * words);
    _tile_loadd(5, a + kTile * words + w, 4 * words);
    _tile_loadd(6, b + w * kTile, 4 * kTile);
    _tile_loadd(7, b + (words + w) * kTile, 4 * kTile);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, 4 * ld);
  _tile_stored(1, right, 4 * ld);
  _tile_stored(2, low, 4 * ld);
  _tile_stored(3, low_right, 4 * ld);
}

// All eight tiles: 16 rows of 64 bytes.
class Tiles {
 public:
  Tiles() {
    alignas(64) unsigned char config[64] = {1};  // palette
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 64;
      config[48 + t] = kTile;
    }
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
};

#else

// Both dimensions of a token's word, to every lane.
Vec broadcast_word(const float* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return (Vec)(VecU{} + word);
}

// As above, in blocks of rows whose sums fit the registers.
void multiply(const float* a, const float* b, int64_t depth, bool accumulate, float* out,
              int64_t ld) {
  constexpr int kBlock = 8;
  const int64_t words = depth / 2;
  for (int first = 0; first < kRows; first += kBlock, a += kBlock * words, out += kBlock * ld) {
    Vec sums[kBlock][2] = {};
    for (int64_t w = 0; w < words; ++w) {
      const Vec b0 = load(b + w * kTile), b1 = load(b + (words + w) * kTile);
#pragma GCC unroll 8
      for (int r = 0; r < kBlock; ++r) {
        const Vec x = broadcast_word(a + r * words + w);
        sums[r][0] = (Vec)_mm512_dpbf16_ps((__m512)sums[r][0], (__m512bh)x, (__m512bh)b0);
        sums[r][1] = (Vec)_mm512_dpbf16_ps((__m512)sums[r][1], (__m512bh)x, (__m512bh)b1);
      }
    }
    for (int r = 0; r < kBlock; ++r)
      for (int half = 0; half < 2; ++half) {
        float* p = out + r * ld + half * kTile;
        store(p, accumulate ? load(p) + sums[r][half] : sums[r][half]);
      }
  }
}

#endif

}  // namespace

void token_cost_bf16(const CostTile& t) {
#ifdef SHEAR_AMX
  const Tiles tiles;
#endif
  float* rows = t.scratch;                     // (kCols, depth / 2) words
  float* b = rows + kCols * kRowWords;         // two panels (depth / 2, kTile)
  float* a = b + (kCols + kTile) * kRowWords;  // (tokens, depth / 2)
  alignas(64) float corner[kRows * kCols];     // a block beyond the last row or column
  for (int64_t k0 = 0; k0 < t.states.dim; k0 += kDepth) {
    const int64_t left = t.states.dim - k0 < kDepth ? t.states.dim - k0 : kDepth;
    const int64_t depth = (left + kStep - 1) / kStep * kStep, words = depth / 2;
    copy_rows(t.states, t.row, t.rows, (t.rows + kRows - 1) / kRows * kRows, k0, left, depth, a);
    for (int64_t j = 0; j < t.cols; j += kCols) {
      const int64_t cols = t.cols - j < kCols ? t.cols - j : kCols;
      copy_rows(t.states, t.col + j, cols, kCols, k0, left, depth, rows);
      pack_panel<kTile>(rows, words, b);
      pack_panel<kTile>(rows + kTile * words, words, b + words * kTile);
      for (int64_t i = 0; i < t.rows; i += kRows) {
        float* out = t.out + i * t.ld + j;
        const int64_t count = t.rows - i < kRows ? t.rows - i : kRows;
        if (count == kRows && cols == kCols) {
          multiply(a + i * words, b, depth, k0 > 0, out, t.ld);
          continue;
        }
        for (int64_t r = 0; r < count && k0 > 0; ++r)
          __builtin_memcpy(corner + r * kCols, out + r * t.ld, 4 * cols);
        multiply(a + i * words, b, depth, k0 > 0, corner, kCols);
        for (int64_t r = 0; r < count; ++r)
          __builtin_memcpy(out + r * t.ld, corner + r * kCols, 4 * cols);
      }
      if (k0 + left == t.states.dim) finish_costs<Dtype::kBFloat16>(t, j, j + cols);
    }
  }
}

}  // namespace shear::cpu::SHEAR_ISA
