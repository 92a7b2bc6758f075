// Kernel launches on the current stream of a device, and torch's CUDA functions: the only file that
// knows them. Errors are exceptions with the kernel's name.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/device.h"
#include "device_plan.h"

#ifndef SHEAR_EMULATED
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace shear::cuda {

struct Grid {
  int64_t ctas;
  int64_t threads;
  int64_t shared_bytes = 0;
};

// At most, of any kernel: a CTA's static and dynamic shared memory share the device's limit.
constexpr int64_t kStaticSharedBytes = 256;

#ifdef SHEAR_EMULATED

class Stream {
 public:
  explicit Stream(int32_t) {}
  Device device() const { return {3, emulated::kSharedBytes - kStaticSharedBytes}; }
  bool capturing() const { return false; }
  template <typename Args>
  void launch(const char* kernel_name, void (*kernel)(Args), const Grid& grid,
              const Args& args) const {
    emulated::run(kernel_name, grid.ctas, static_cast<int>(grid.threads), grid.shared_bytes, kernel,
                  args);
  }
  void upload(void* to, const void* from, int64_t bytes) const { std::memcpy(to, from, bytes); }
  void read(void* to, const void* from, int64_t bytes) const { std::memcpy(to, from, bytes); }
};

#else

// A piece of a table as the argument of a kernel: a graph capture keeps it, unlike host memory.
template <int kWords>
struct UploadArgs {
  uint32_t* to;
  int32_t words;
  uint32_t word[kWords];
};

class Stream {
 public:
  explicit Stream(int32_t device_index) : guard_(device_index), index_(device_index) {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(device_index, &stream) != 0)
      throw std::runtime_error("no CUDA stream of device " + std::to_string(device_index));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  Device device() const {
    return {attribute(cudaDevAttrMultiProcessorCount),
            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStaticSharedBytes};
  }
  bool capturing() const {
    cudaStreamCaptureStatus status;
    check(cudaStreamIsCapturing(stream_, &status), "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
  }

  template <typename Args>
  void launch(const char* kernel_name, void (*kernel)(Args), const Grid& grid,
              const Args& args) const {
    if (grid.ctas == 0) return;
    if (grid.ctas > INT32_MAX)
      throw std::runtime_error(std::string(kernel_name) + ": too many CTAs for one launch");
    if (grid.shared_bytes > 48 * 1024)  // the same for all threads of the host: it is the kernel's
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(device().shared_bytes)),
            kernel_name);
    void* pointers[] = {const_cast<Args*>(&args)};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                           dim3(static_cast<unsigned>(grid.ctas)),
                           dim3(static_cast<unsigned>(grid.threads)), pointers,
                           static_cast<size_t>(grid.shared_bytes), stream_),
          kernel_name);
  }

  // Bytes are a multiple of 4. As arguments of kernels: a copy from pageable memory may wait.
  void upload(void* to, const void* from, int64_t bytes) const;
  // Waits for the stream.
  void read(void* to, const void* from, int64_t bytes) const {
    check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream_),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }

 private:
  template <int kWords>
  void upload_words(uint32_t* to, const char* from, int64_t words) const;
  static void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("shear_ops, CUDA backend, ") + what + ": " +
                             cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
  }
  int64_t attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index_), "cudaDeviceGetAttribute");
    return value;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  int32_t index_;
  cudaStream_t stream_ = nullptr;
};

#endif

}  // namespace shear::cuda
