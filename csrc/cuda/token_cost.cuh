// Tokens to token costs, all blocks of a chunk in one launch: products on the tensor cores, then
// ||x||^2 + ||y||^2 - 2<x, y>, square root and repair of near-duplicates while the tile is on the
// chip. Products are of int8 rows (csrc/rounding.h), exact in int32, or of the states where these
// are not rounded and for a second look. Products of bfloat16 and float16 are exact in float32;
// float32 states are split into two TF32 parts each, of whose four products the three that count
// are taken. A product accumulates over the dimensions in one order, whatever the tile around it.
// Int8 rows are of states less their group's center. States as they are go from memory to the
// tensor cores, not centred: where the mean dominates, near-duplicates are most entries, and their
// repair costs time, not accuracy.
#pragma once
#include <type_traits>

#include "cuda/call.cuh"
#include "token_cost.h"

namespace shear::cuda {

// kVectors: rows start on 16 bytes; kRounded: they are int8 rows.
template <Dtype kDtype, typename Shape, bool kVectors, bool kRounded>
class CostTile {
  static_assert(kVectors || !kRounded);
  static constexpr bool kSplit = kDtype == Dtype::kFloat32 && !kRounded;
  using Sum = std::conditional_t<kRounded, int32_t, float>;
  static constexpr int kStages = Shape::kStages, kRowBytes = Shape::kRowBytes;
  // A thread copies 16 bytes of tokens kReach apart: rows, then columns.
  static constexpr int kParts = kRowBytes / 16, kReach = Shape::kThreads / kParts;
  static constexpr int kRowVectors = Shape::kRows / kReach, kColVectors = Shape::kCols / kReach;
  static_assert(kParts == 4 && kReach % 8 == 0);
  static_assert(Shape::kRows % kReach == 0 && Shape::kCols % kReach == 0);

 public:
  __device__ __forceinline__ CostTile(const Call& call, const DeviceBlock& block, int row, int col)
      : call_(call),
        block_(block),
        row_(row),
        col_(col),
        shared_(static_cast<unsigned char*>(shared_memory())),
        bytes_(kRounded ? call.rows.depth : call.states.dim * StateWords<kDtype>::kBytes),
        warp_row_(warp_id() / Shape::kColWarps * 64),
        warp_col_(warp_id() % Shape::kColWarps * 64) {
    const int token = static_cast<int>(threadIdx.x) / kParts;
    part_ = static_cast<int>(threadIdx.x) % kParts;
    to_ = place(token, part_);
    const int64_t first_row = kRounded ? block.row_place : block.row_token;
    const int64_t first_col = kRounded ? block.col_place : block.col_token;
    rows_from_ = tokens() + part_ * 16 + (first_row + row + token) * bytes_;
    cols_from_ = tokens() + part_ * 16 + (first_col + col + token) * bytes_;
    present_ = 0;
#pragma unroll
    for (int v = 0; v < kRowVectors + kColVectors; ++v) {
      const bool is_row = v < kRowVectors;
      const int index = token + (is_row ? row + v * kReach : col + (v - kRowVectors) * kReach);
      if (index < (is_row ? block.row_tokens : block.col_tokens)) present_ |= 1u << v;
    }
    const int lane = lane_id();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a_from_[half] = place(warp_row_ + lane % 16, 2 * half + lane / 16);
      b_from_[half] =
          place(Shape::kRows + warp_col_ + lane / 16 * 8 + lane % 8, 2 * half + lane / 8 % 2);
    }
  }

  __device__ __forceinline__ void multiply() {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) sums_[i][j][k] = 0;
    const int steps = static_cast<int>((bytes_ + kRowBytes - 1) / kRowBytes);
    const bool busy = !Shape::kIdleWarps || (row_ + warp_row_ < block_.row_tokens &&
                                             col_ + warp_col_ < block_.col_tokens);
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) fetch(step);
      commit_copies();
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();  // this step's stage has come, and that of the step before is free
      if (step + kStages - 1 < steps) fetch(step + kStages - 1);
      commit_copies();
      if (busy) multiply_stage(step % kStages * Shape::kStageBytes);
    }
  }

  // Products to costs in the block, in two passes: most tiles have no near-duplicates.
  __device__ __forceinline__ void finish() {
    float* out = call_.costs + block_.cost_offset;
    const float* row_norm =
        kRounded ? call_.rows.sq_norm + block_.row_place : call_.sq_norm + block_.row_token;
    const float* col_norm =
        kRounded ? call_.rows.sq_norm + block_.col_place : call_.sq_norm + block_.col_token;
    bool any = false;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        const int r = row_ + warp_row_ + 16 * i + 8 * high + lane_id() / 4;
        if (r >= block_.row_tokens) continue;
        const float x = row_norm[r];
        const float step = kRounded ? call_.rows.scale[block_.row_place + r] : 1.f;
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int c = col_ + warp_col_ + 8 * j + 2 * (lane_id() % 4) + k;
            if (c >= block_.col_tokens) continue;
            const float norms = x + col_norm[c];
            const float steps = kRounded ? step * call_.rows.scale[block_.col_place + c] : 1.f;
            const auto product = static_cast<float>(sums_[i][j][2 * high + k]);
            const float squared = fmaf(-2.f * steps, product, norms);
            const bool near = squared < (kRounded ? kNearRounded : kNearDuplicate) * norms;
            any |= near;
            out[static_cast<int64_t>(r) * block_.ld + c] = near ? -1.f : sqrtf(squared);
          }
      }
    if (__ballot_sync(kAllLanes, any) != 0) repair(out);
  }

 private:
  // Where the `part`th 16 bytes of a token lie in a stage: 8 tokens' parts are in different banks.
  static __device__ __forceinline__ int place(int token, int part) {
    return token * kRowBytes + ((part ^ (token / 2 % 4)) * 16);
  }

  __device__ __forceinline__ const unsigned char* tokens() const {
    return static_cast<const unsigned char*>(kRounded ? call_.rows.row : call_.states.data);
  }

  // The step's 64 bytes of every token, zeros beyond the last dimension and the last token.
  __device__ __forceinline__ void fetch(int step) const {
    const int64_t first = static_cast<int64_t>(step) * kRowBytes;
    const int64_t left = bytes_ - first - part_ * 16;  // of this part on
    unsigned char* to = shared_ + step % kStages * Shape::kStageBytes + to_;
#pragma unroll
    for (int v = 0; v < kRowVectors + kColVectors; ++v, to += kReach * kRowBytes) {
      const bool present = (present_ >> v & 1) && left > 0;
      const unsigned char* from = v < kRowVectors
                                      ? rows_from_ + v * kReach * bytes_
                                      : cols_from_ + (v - kRowVectors) * kReach * bytes_;
      if constexpr (kVectors) {
        copy_async_16(to, present ? from + first : tokens(), present ? 16 : 0);
      } else {
        using Word = typename std::conditional<kDtype == Dtype::kFloat32, uint32_t, uint16_t>::type;
#pragma unroll
        for (int k = 0; k < static_cast<int>(16 / sizeof(Word)); ++k) {
          const bool inside = present && k * static_cast<int>(sizeof(Word)) < left;
          reinterpret_cast<Word*>(to)[k] =
              inside ? reinterpret_cast<const Word*>(from + first)[k] : Word{0};
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_stage(int stage) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 32 bytes of every token
      Fragment b[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j].load(shared_ + stage + b_from_[half] + 16 * j * kRowBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Fragment a;
        a.load(shared_ + stage + a_from_[half] + 16 * i * kRowBytes);
#pragma unroll
        for (int j = 0; j < 8; ++j) multiply(sums_[i][j], a, b[j / 2], j % 2 * 2);
      }
    }
  }

  // Of float32 states a TF32 part, and the TF32 part of what it leaves.
  struct Fragment {
    uint32_t word[4];
    uint32_t rest[kSplit ? 4 : 1];

    __device__ __forceinline__ void load(const unsigned char* from) {
      load_matrices(from, word);
      if constexpr (kSplit)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float whole = __uint_as_float(word[k]);
          word[k] = round_to_tf32(whole);
          rest[k] = round_to_tf32(whole - __uint_as_float(word[k]));
        }
    }
  };

  static __device__ __forceinline__ void multiply(Sum (&c)[4], const Fragment& a, const Fragment& b,
                                                  int k) {
    if constexpr (kRounded) {
      multiply_int8(c, a.word, b.word[k], b.word[k + 1]);
    } else if constexpr (kDtype == Dtype::kBFloat16) {
      multiply_bfloat16(c, a.word, b.word[k], b.word[k + 1]);
    } else if constexpr (kDtype == Dtype::kFloat16) {
      multiply_float16(c, a.word, b.word[k], b.word[k + 1]);
    } else {
      multiply_tf32(c, a.rest, b.word[k], b.word[k + 1]);
      multiply_tf32(c, a.word, b.rest[k], b.rest[k + 1]);
      multiply_tf32(c, a.word, b.word[k], b.word[k + 1]);
    }
  }

  // The warp's entries that are marked: all lanes take one after the other.
  __device__ __forceinline__ void repair(float* out) const {
    __syncwarp();
    const int rows = min(64, block_.row_tokens - row_ - warp_row_);
    for (int i = 0; i < rows; ++i) {
      const int r = row_ + warp_row_ + i;
      float* costs = out + static_cast<int64_t>(r) * block_.ld;
      for (int first = col_ + warp_col_; first < col_ + warp_col_ + 64; first += kWarp) {
        const int c = first + lane_id();
        unsigned marked = __ballot_sync(kAllLanes, c < block_.col_tokens && costs[c] < 0.f);
        while (marked != 0) {
          const int j = first + __ffs(marked) - 1;
          marked &= marked - 1;
          const float cost =
              direct_cost<kDtype>(call_.states, block_.row_token + r, block_.col_token + j);
          if (lane_id() == 0) costs[j] = cost;
        }
      }
    }
  }

  const Call& call_;
  const DeviceBlock& block_;
  const int row_, col_;
  unsigned char* const shared_;
  const int64_t bytes_;  // of a row
  const int warp_row_, warp_col_;
  const unsigned char *rows_from_, *cols_from_;
  uint32_t present_;  // bit v: the token of vector v is inside the block
  int part_, to_, a_from_[2], b_from_[2];
  Sum sums_[4][8][4];
};

// A CTA per tile. Tiles of eight rows of tiles are taken column by column, so that those under way
// share their states in the second-level cache.
template <Dtype kDtype, typename Shape, bool kVectors, bool kRounded>
__global__ void __launch_bounds__(Shape::kThreads, 256 / Shape::kThreads)
    token_costs(const Call call) {
  if (!looks_at_any(call)) return;
  const int b = last_not_after(call.n_blocks, blockIdx.x,
                               [&](int i) { return int64_t{call.blocks[i].tile_begin}; });
  const DeviceBlock block = call.blocks[b];
  if (!is_computed(call, block.group)) return;
  constexpr int kBand = 8;
  const int tile = static_cast<int>(blockIdx.x) - block.tile_begin;
  const int tile_rows = (block.row_tokens + Shape::kRows - 1) / Shape::kRows;
  const int tile_cols = (block.col_tokens + Shape::kCols - 1) / Shape::kCols;
  if (tile >= tile_rows * tile_cols) return;  // of a second look: spans shorter than the longest
  const int band = tile / (kBand * tile_cols), in_band = tile % (kBand * tile_cols);
  const int band_rows = min(kBand, tile_rows - band * kBand);
  CostTile<kDtype, Shape, kVectors, kRounded> work(
      call, block, (band * kBand + in_band % band_rows) * Shape::kRows,
      in_band / band_rows * Shape::kCols);
  work.multiply();
  work.finish();
}

}  // namespace shear::cuda
