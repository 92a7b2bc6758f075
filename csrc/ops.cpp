// The schemas of torch.ops.shear. No strings: with torch <= 2.13 headers each string argument leaks
// memory; the integers are the enums of problem.h. Shapes: hidden (N, d); cu_seqlens (B + 1);
// group_ids and labels (B); K spans.
#include <torch/csrc/stable/library.h>

#define SHEAR_OPTIONS                                                                       \
  "*, int span=100, int stride=25, float reg=0.03, int n_iters=5000, float tol=5e-3, "      \
  "int reg_unit=0, int distance=0, int normalization=0, int pooling=0, int aggregation=0, " \
  "bool check_finite=True, bool prune=True)"

STABLE_TORCH_LIBRARY(shear, m) {
  // -> weights (N) float32
  m.def(
      "span_weights(Tensor hidden, Tensor cu_seqlens, Tensor group_ids, Tensor "
      "labels, " SHEAR_OPTIONS " -> Tensor");
  // -> weights (N) float32, pairs (5) int64 as in span_distances
  m.def(
      "span_weights_and_pairs(Tensor hidden, Tensor cu_seqlens, Tensor group_ids, Tensor "
      "labels, " SHEAR_OPTIONS " -> (Tensor, Tensor)");
  // -> distance (K) float32, nearest (K) int64, residual (K) float32, iterations (K) int32,
  //    spans (K, 3) int64 (rollout, begin, end), pairs (5) int64 (total, bounded, abandoned,
  //    solved, stopped)
  m.def(
      "span_distances(Tensor hidden, Tensor cu_seqlens, Tensor group_ids, Tensor "
      "labels, " SHEAR_OPTIONS " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // x (T1, d), y (T2, d) -> (K1, K2) float32; normalization, pooling, aggregation and prune play no
  // part
  m.def("pair_distances(Tensor x, Tensor y, " SHEAR_OPTIONS " -> Tensor");
  // cost (B, n, m) float32, lengths (B) int64 of the rows and columns in use -> value, residual,
  // iterations (B)
  m.def(
      "sinkhorn(Tensor cost, Tensor? n_rows=None, Tensor? n_cols=None, *, float reg, int "
      "n_iters=5000, "
      "float tol=5e-3) -> (Tensor, Tensor, Tensor)");
}
