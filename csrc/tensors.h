// Tensor arguments to plain data, with the checks that keep memory safe for direct callers of
// torch.ops.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "problem.h"

namespace shear {

// The entries of a 1-d tensor of integers on the CPU.
inline std::vector<int64_t> read_integers(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 1, name, " must be a 1-d tensor on the CPU");
  const torch::stable::Tensor values = torch::stable::contiguous(tensor);
  const void* data = values.const_data_ptr();
  std::vector<int64_t> out(values.numel());
  const auto copy = [&](const auto* typed) { std::copy_n(typed, out.size(), out.begin()); };
  switch (values.scalar_type()) {
    case ScalarType::Long:
      copy(static_cast<const int64_t*>(data));
      break;
    case ScalarType::Int:
      copy(static_cast<const int32_t*>(data));
      break;
    case ScalarType::Char:
      copy(static_cast<const int8_t*>(data));
      break;
    case ScalarType::Bool:
      copy(static_cast<const uint8_t*>(data));
      break;
    default:
      STD_TORCH_CHECK(false, name, " must be int64, int32, int8 or bool");
  }
  return out;
}

// Of contiguous states (tokens, dim), whatever their device.
inline Dtype dtype_of_states(const torch::stable::Tensor& states, const char* name) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(states.dim() == 2 && states.size(1) >= 1 && states.is_contiguous(), name,
                  " must be a contiguous (tokens, dim) tensor with dim >= 1");
  switch (states.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
  return {};
}

// The used rows (or columns) of every problem of a batch: as given, or `size`.
inline std::vector<int64_t> used_lengths(const std::optional<torch::stable::Tensor>& given,
                                         int64_t batch, int64_t size, const char* name) {
  const auto out = given ? read_integers(*given, name) : std::vector<int64_t>(batch, size);
  STD_TORCH_CHECK(static_cast<int64_t>(out.size()) == batch, name,
                  " must have one entry per problem");
  for (const int64_t length : out)
    STD_TORCH_CHECK(length >= 1 && length <= size, name, " must be in [1, ", size, "], got ",
                    length);
  return out;
}

}  // namespace shear
