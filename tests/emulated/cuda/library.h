// csrc/cuda/library.h for the emulation: operators of torch.ops.shear_emulated, tensors of the
// host.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#define SHEAR_LIBRARY shear_emulated
#define SHEAR_DISPATCH_KEY CPU

namespace shear::cuda {

inline bool on_device(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }

}  // namespace shear::cuda
