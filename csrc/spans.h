// Where the spans of a rollout are (paper Eq. 2), for host and device: the one place that says how
// the last span is cut. Span k covers the tokens [k stride, k stride + span) of its rollout, up to
// the rollout's end. src/shear_ops/reference.py is the specification.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define SHEAR_HOST_DEVICE static __host__ __device__ __forceinline__
#else
// static: the linker must not keep one instruction set's copy for every caller
#define SHEAR_HOST_DEVICE static inline
#endif

namespace shear {

// Spans of a rollout: none without tokens, else as many as it takes to cover every token.
SHEAR_HOST_DEVICE int64_t span_count(int64_t tokens, int64_t span, int64_t stride) {
  if (tokens <= 0) return 0;
  return tokens <= span ? 1 : (tokens - span + stride - 1) / stride + 1;
}

// These are given all that a rule for the last span may depend on. Spans of a block of a rollout
// (csrc/chunks.h) are counted from its first one, its tokens from there to the end of the last.
SHEAR_HOST_DEVICE int64_t span_begin(int64_t k, int64_t /*tokens*/, int64_t /*span*/,
                                     int64_t stride) {
  return k * stride;
}

// The last span ends with the rollout and may be shorter.
SHEAR_HOST_DEVICE int64_t span_size(int64_t k, int64_t tokens, int64_t span, int64_t stride) {
  const int64_t left = tokens - span_begin(k, tokens, span, stride);
  return left < span ? left : span;
}

// No span of a rollout is longer; tokens: of the rollout, or as many as it may have.
SHEAR_HOST_DEVICE int64_t longest_span(int64_t tokens, int64_t span) {
  return tokens < span ? tokens : span;
}

// The spans that cover token t are [first_covering, end_covering).
SHEAR_HOST_DEVICE int64_t first_covering(int64_t t, int64_t /*tokens*/, int64_t span,
                                         int64_t stride) {
  return t < span ? 0 : (t - span) / stride + 1;
}
SHEAR_HOST_DEVICE int64_t end_covering(int64_t t, int64_t tokens, int64_t span, int64_t stride) {
  const int64_t begun = t / stride + 1, count = span_count(tokens, span, stride);
  return begun < count ? begun : count;
}

}  // namespace shear
