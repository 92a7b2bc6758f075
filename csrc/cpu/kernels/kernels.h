// The kernels of the CPU backend. Each is compiled once per instruction set (portable, AVX2,
// AVX-512); a table of entry points is chosen at run time. Plain data in, plain data out: no torch,
// no allocation, no threads.
#pragma once
#include <cstdint>

#include "chunks.h"
#include "problem.h"
#include "rounding.h"
#include "solve.h"

namespace shear::cpu {

// Hidden states in place, row-major (tokens, dim).
struct States {
  const void* data;
  Dtype dtype;
  int64_t dim;
};

// Int8 rows of tokens as csrc/rounding.h makes them. kRowSlack rows more can be read (plan.h).
struct Rows {
  int8_t* row;   // (tokens, depth); null: none
  float* scale;  // (tokens): what a step stands for
  int64_t depth;
};

// The tokens of a group that are to be rounded.
struct Rounded {
  States states;
  int64_t token, count;
  const float* center;    // (dim)
  const uint32_t* signs;  // (depth): sign_of_dimension
  Rows rows;              // where they go
  float* scratch;         // depth
};

// One tile of token costs ||x_i - y_j||: rows and columns are tokens.
struct CostTile {
  States states;
  int64_t row, rows, col, cols;
  const float* center;      // (dim)
  const float* sq_norm;     // (tokens) squared norm of the states less the center
  Rows row_rows, col_rows;  // int8 rows from tokens row and col on
  float* out;               // (rows, ld)
  int64_t ld;
  float* scratch;  // kPanelFloats
};

// Reductions of token costs over the columns of a span: of one row, or of all rows of a span.
struct Window {
  int64_t begin, size;
};

struct PairInput {
  const float* cost;  // (n, m), row stride ld
  int64_t ld;
  int64_t n, m;
  float eps;
  int64_t n_iters;
  float tol;
  float bound;  // largest certified lower bound on W1 known so far
  // Float bits of the smallest span distance known for the two spans, written by other threads;
  // null: never abandon.
  const uint32_t* best_row = nullptr;
  const uint32_t* best_col = nullptr;
  // Asked now and then in a long solution; false: end soon, with any result. null: nobody to ask.
  bool (*goes_on)(const void*) = nullptr;
  const void* asked = nullptr;
};

constexpr int64_t kRowPad = 8;  // rows of a pair are solved in groups

// Where the solver's arrays of a pair of n x m tokens are in its scratch, in floats.
struct SinkhornScratch {
  int64_t rows, columns, slots;         // padded: of matrices, and of vectors over rows
  int64_t cost, k;                      // (rows, columns)
  int64_t f, u, absent_row, potential;  // (slots)
  int64_t g, v, w, absent_col;          // (columns)
  int64_t floats;                       // in all
};

// width: floats of a vector.
static inline SinkhornScratch sinkhorn_scratch(int64_t n, int64_t m, int64_t width) {
  const auto up = [](int64_t a, int64_t to) { return (a + to - 1) / to * to; };
  SinkhornScratch s{};
  s.rows = up(n, kRowPad);
  s.columns = up(m, width);
  s.slots = up(n, kCostPad);  // whole vectors of any width
  const auto take = [&s](int64_t count) {
    const int64_t at = s.floats;
    s.floats += count;
    return at;
  };
  s.cost = take(s.rows * s.columns);
  s.k = take(s.rows * s.columns);
  s.f = take(s.slots);
  s.u = take(s.slots);
  s.absent_row = take(s.slots);
  s.potential = take(s.slots);
  s.g = take(s.columns);
  s.v = take(s.columns);
  s.w = take(s.columns);
  s.absent_col = take(s.columns);
  return s;
}

struct Magnitude {
  float squared, largest;
};

struct Kernels {
  const char* isa;
  // Adds the states of `count` tokens from `token` on to sums (dim_end - dim_begin).
  void (*add_states)(const States&, int64_t token, int64_t count, int64_t dim_begin,
                     int64_t dim_end, double* sums);
  // ||x||^2 and the largest |x_k|; Inf or NaN iff the state has one or its norm overflows float32.
  Magnitude (*magnitude)(const States&, int64_t token);
  float (*squared_norm)(const States&, int64_t token, const float* center);  // ||x - center||^2
  // Adds one state, times a power of two and rounded to integers, to sums (dim_end - dim_begin).
  void (*add_rounded)(const States&, int64_t token, int64_t dim_begin, int64_t dim_end, float scale,
                      int64_t* sums);
  void (*round_states)(const Rounded&);
  void (*token_cost)(const CostTile&);       // from a float32 product
  void (*token_cost_int8)(const CostTile&);  // from int8 rows
  // out[k] = minimum (or sum) of row[w.begin .. w.begin + w.size) for each window
  void (*window_min)(const float* row, const Window* windows, int64_t count, float* out);
  void (*window_sum)(const float* row, const Window* windows, int64_t count, float* out);
  // out[j] = minimum over rows i of cost[i * ld + j]
  void (*column_min)(const float* cost, int64_t ld, int64_t rows, int64_t cols, float* out);
  // a[k] += b[k]
  void (*add)(float* a, const float* b, int64_t count);
  // Whether all are between -most and most; not so for NaN.
  bool (*below)(const float* row, int64_t count, float most);
  // cost -> exp(-cost^2 / (2 sigma^2)) - 1 in place
  void (*rbf)(float* cost, int64_t count, float sigma);
  Solution (*sinkhorn)(const PairInput&, float* scratch);
};

// The table for the best instruction set of this machine, or for the one named by SHEAR_ISA.
// Throws std::runtime_error if that one is unknown or not supported here.
const Kernels& kernels();

}  // namespace shear::cpu
