// Int8 rows to token costs: a blocked product, exact in int32, then csrc/cpu/kernels/costs.h. Costs
// do not depend on packing, chunks or threads.
#include "cpu/kernels/costs.h"
#include "cpu/kernels/int8_product.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/panels.h"
#include "cpu/kernels/simd.h"
#include "cpu/plan.h"

namespace shear::cpu::SHEAR_ISA {
namespace {

#ifdef SHEAR_AMX

constexpr int kTile = 16;         // rows and columns of an AMX tile
constexpr int kRows = 2 * kTile;  // of an output block
constexpr int kCols = 2 * kTile;
constexpr int64_t kDepth = 1024;  // entries taken at a time
static_assert(2 * (kCols + kTile) * kDepth / 4 <= kPanelFloats);
static_assert(kDepth % kLongBlock == 0 && kShortBlock % 64 == 0);

// out (kRows, kCols) += a (kRows, depth), row_bytes apart, b: two panels (depth / 4, kTile) words.
void multiply(const int8_t* a, int64_t row_bytes, const float* b, int64_t depth, bool accumulate,
              float* out, int64_t ld) {
  const int64_t words = depth / 4;
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
  for (int64_t w = 0; w < words; w += 16) {
    _tile_loadd(4, a + 4 * w, row_bytes);
    _tile_loadd(5, a + kTile * row_bytes + 4 * w, row_bytes);
    _tile_loadd(6, b + w * kTile, 4 * kTile);
    _tile_loadd(7, b + (words + w) * kTile, 4 * kTile);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
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

// Calls done(first column, end) for the columns that are complete.
template <typename Done>
void multiply_rows(const CostTile& t, const Done& done) {
  const Tiles tiles;
  float* const b = t.scratch;               // two panels (depth / 4, kTile)
  alignas(64) float corner[kRows * kCols];  // a block beyond the last row or column
  const int64_t row_bytes = t.row_rows.depth;
  for (int64_t k0 = 0; k0 < row_bytes; k0 += kDepth) {
    const int64_t depth = row_bytes - k0 < kDepth ? row_bytes - k0 : kDepth;
    const int8_t* const a = t.row_rows.row + k0;
    for (int64_t j = 0; j < t.cols; j += kCols) {
      const int64_t cols = t.cols - j < kCols ? t.cols - j : kCols;
      const int8_t* const columns = t.col_rows.row + j * row_bytes + k0;
      for (int half = 0; half < 2; ++half)
        pack_panel<kTile>(reinterpret_cast<const float*>(columns + half * kTile * row_bytes),
                          row_bytes / 4, depth / 4, b + half * kTile * depth / 4);
      for (int64_t i = 0; i < t.rows; i += kRows) {
        float* out = t.out + i * t.ld + j;
        const int64_t count = t.rows - i < kRows ? t.rows - i : kRows;
        if (count == kRows && cols == kCols) {
          multiply(a + i * row_bytes, row_bytes, b, depth, k0 > 0, out, t.ld);
          continue;
        }
        for (int64_t r = 0; r < count && k0 > 0; ++r)
          __builtin_memcpy(corner + r * kCols, out + r * t.ld, 4 * cols);
        multiply(a + i * row_bytes, row_bytes, b, depth, k0 > 0, corner, kCols);
        for (int64_t r = 0; r < count; ++r)
          __builtin_memcpy(out + r * t.ld, corner + r * kCols, 4 * cols);
      }
      if (k0 + depth == row_bytes) done(j, j + cols);
    }
  }
}

#else

constexpr int kRows = SHEAR_TILE_ROWS;  // register tile: kRows x kCols accumulators
constexpr int kCols = 2 * kWidth;
constexpr int64_t kDepth = 256 * kEntriesPerWord;
constexpr int64_t kRoom = kCols + kWidth;  // tokens, with room for the last whole square
static_assert((2 * kRoom + kTileRows) * kTileDepth + kWidth + kTileRows <= kPanelFloats);
static_assert(kRowSlack >= kRoom);

// `first`: what the sums of every row begin with.
void multiply(const float* a, const float* b, const int32_t* first, int64_t words, bool accumulate,
              float* out, int64_t ld, int64_t rows, int64_t cols) {
  VecI sums[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = VecI{} + first[r];
  for (int64_t k = 0; k < words; ++k) {
    const VecI b0 = (VecI)load(b + k * kCols), b1 = (VecI)load(b + k * kCols + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      int32_t word;
      __builtin_memcpy(&word, a + k * kRows + r, 4);
      const VecI x = VecI{} + word;
      sums[r][0] = add_products(sums[r][0], b0, x);
      sums[r][1] = add_products(sums[r][1], b1, x);
    }
  }
  store_tile(sums, accumulate, out, ld, rows, cols);
}

// Entries as words: four bytes are one as they are, two are widened.
const float* words_of(const int8_t* rows, int64_t row_bytes, int64_t depth, int count, float* room,
                      int64_t* stride) {
#ifdef SHEAR_VNNI
  *stride = row_bytes / 4;
  return reinterpret_cast<const float*>(rows);
#else
  typedef int8_t Bytes __attribute__((vector_size(2 * SHEAR_WIDTH)));
  typedef int16_t Words __attribute__((vector_size(4 * SHEAR_WIDTH)));
  *stride = depth / 2;
  for (int r = 0; r < count; ++r)
    for (int64_t k = 0; k < depth; k += 2 * kWidth) {
      Bytes bytes;
      __builtin_memcpy(&bytes, rows + r * row_bytes + k, sizeof bytes);
      const Words words = __builtin_convertvector(bytes, Words);
      __builtin_memcpy(room + (r * depth + k) / 2, &words, sizeof words);
    }
  return room;
#endif
}

template <int kTokens>
void pack(const int8_t* rows, int64_t row_bytes, int64_t depth, float* room, float* panel) {
  constexpr int kCount = (kTokens + kWidth - 1) / kWidth * kWidth;
  int64_t stride;
  const float* words = words_of(rows, row_bytes, depth, kCount, room, &stride);
  pack_panel<kTokens>(words, stride, depth / kEntriesPerWord, panel);
}

// Columns are unsigned for VNNI: q + 128.
void make_unsigned(float* panel, int64_t words) {
#ifdef SHEAR_VNNI
  for (int64_t k = 0; k < words; k += kWidth)
    store(panel + k, (Vec)((VecU)load(panel + k) ^ 0x80808080u));
#else
  (void)panel, (void)words;
#endif
}
// What makes up for it: -128 times the sum of a row's entries.
void first_sums(const int8_t* rows, int64_t row_bytes, int64_t depth, int64_t count,
                int32_t* first) {
  for (int64_t i = 0; i < count; ++i) {
    first[i] = 0;
#ifdef SHEAR_VNNI
    VecI sums = {};
    const VecI most = (VecI)(VecU{} + 0x80808080u);
    for (int64_t k = 0; k < depth; k += 4 * kWidth) {
      VecI bytes;
      __builtin_memcpy(&bytes, rows + i * row_bytes + k, sizeof bytes);
      sums = add_products(sums, most, bytes);
    }
    for (int l = 0; l < kWidth; ++l) first[i] -= sums[l];
#endif
  }
  (void)rows, (void)row_bytes, (void)depth;
}

// Calls done(first column, end) for the columns that are complete.
template <typename Done>
void multiply_rows(const CostTile& t, const Done& done) {
  float* room = t.scratch;               // (kRoom, words)
  float* b = room + kRoom * kTileDepth;  // (words, kCols), stays in the first-level cache
  float* a = b + kRoom * kTileDepth;     // panels (words, kRows) of all rows
  auto* first = reinterpret_cast<int32_t*>(a + kTileRows * kTileDepth + kWidth);  // (rows)
  const int64_t row_bytes = t.row_rows.depth;
  for (int64_t k0 = 0; k0 < row_bytes; k0 += kDepth) {
    const int64_t depth = row_bytes - k0 < kDepth ? row_bytes - k0 : kDepth;
    const int64_t words = depth / kEntriesPerWord;
    const int8_t *rows = t.row_rows.row + k0, *columns = t.col_rows.row + k0;
    first_sums(rows, row_bytes, depth, t.rows, first);
    for (int64_t i = 0; i < t.rows; i += kRows)
      pack<kRows>(rows + i * row_bytes, row_bytes, depth, room, a + i * words);
    for (int64_t j = 0; j < t.cols; j += kCols) {
      const int64_t cols = t.cols - j < kCols ? t.cols - j : kCols;
      pack<kCols>(columns + j * row_bytes, row_bytes, depth, room, b);
      make_unsigned(b, words * kCols);
      for (int64_t i = 0; i < t.rows; i += kRows)
        multiply(a + i * words, b, first + i, words, k0 > 0, t.out + i * t.ld + j, t.ld,
                 t.rows - i < kRows ? t.rows - i : kRows, cols);
      if (k0 + depth == row_bytes) done(j, j + cols);
    }
  }
}

#endif

}  // namespace

void token_cost_int8(const CostTile& t) {
  Marked marked;
  multiply_rows(t,
                [&](int64_t begin, int64_t end) { finish_costs<int32_t>(t, begin, end, marked); });
  repair(t, marked);
}

}  // namespace shear::cpu::SHEAR_ISA
