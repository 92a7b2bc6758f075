// How a matrix of token costs is cut into tasks. Costs do not depend on the cut.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/plan.h"

namespace shear::cpu {

struct Tile {
  int64_t row, rows, col, cols;
};

// Equal tiles no larger than a thread's panels.
inline std::vector<Tile> tiles_of(int64_t rows, int64_t cols) {
  const auto cut = [](int64_t total, int64_t most) {
    const int64_t parts = (total + most - 1) / most;
    return std::min(
        most, ((total + parts - 1) / parts + 95) / 96 * 96);  // a multiple of every register tile
  };
  std::vector<Tile> tiles;
  if (rows == 0 || cols == 0) return tiles;
  const int64_t tile_rows = cut(rows, kTileRows), tile_cols = cut(cols, kTileCols);
  for (int64_t col = 0; col < cols; col += tile_cols)
    for (int64_t row = 0; row < rows; row += tile_rows)
      tiles.push_back({row, std::min(tile_rows, rows - row), col, std::min(tile_cols, cols - col)});
  return tiles;
}

struct BlockTile {
  const Block* block;
  Tile tile;
};

// The tiles of all blocks of a chunk; size(block): rows and columns of a block.
template <typename Size>
std::vector<BlockTile> tiles_of(const Chunk& chunk, const Size& size) {
  std::vector<BlockTile> out;
  for (const Block& block : chunk.blocks) {
    const auto [rows, cols] = size(block);
    for (const Tile& tile : tiles_of(rows, cols)) out.push_back({&block, tile});
  }
  return out;
}

}  // namespace shear::cpu
