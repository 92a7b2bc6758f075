// Where the operators are registered, and for tensors of which device. tests/emulated has a header
// of this name for the emulated kernels.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#define SHEAR_LIBRARY shear
#define SHEAR_DISPATCH_KEY CUDA

namespace shear::cuda {

inline bool on_device(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }

}  // namespace shear::cuda
