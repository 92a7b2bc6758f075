// Kernel launches and copies on the current stream of a device. Errors are exceptions with the
// kernel's name. tests/emulated has a header of this name for the emulated kernels.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "cuda/device.h"
#include "cuda/plan.h"

namespace shear::cuda {

class Stream {
 public:
  explicit Stream(int32_t device_index);

  Device device() const;
  bool capturing() const;  // a graph
  template <typename Args>
  void launch(const char* kernel_name, void (*kernel)(Args), const Grid& grid,
              const Args& args) const {
    launch(kernel_name, reinterpret_cast<const void*>(kernel), grid, &args);
  }
  // Bytes are a multiple of 4. As arguments of kernels: a copy from pageable memory may wait.
  void upload(void* to, const void* from, int64_t bytes) const;
  // Waits for the stream.
  void read(void* to, const void* from, int64_t bytes) const;

 private:
  void launch(const char* kernel_name, const void* kernel, const Grid& grid,
              const void* args) const;
  template <int kWords>
  void upload_words(uint32_t* to, const char* from, int64_t words) const;

  torch::stable::accelerator::DeviceGuard guard_;
  int32_t index_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace shear::cuda
