#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/tiles.h"

namespace shear::cuda {
namespace {

constexpr int64_t kSharedBytesWithoutAsking = 48 * 1024;
constexpr int kFew = 960, kMany = 8184;  // the arguments of a kernel take 4 KiB, or just below 32

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("shear_ops, CUDA backend, ") + what + ": " +
                           cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

int64_t attribute(int32_t device_index, cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device_index), "cudaDeviceGetAttribute");
  return value;
}

// A piece of a table as the argument of a kernel: a graph capture keeps it, unlike host memory.
template <int kWords>
struct UploadArgs {
  uint32_t* to;
  int32_t words;
  uint32_t word[kWords];
};

template <int kWords>
__global__ void write_words(const UploadArgs<kWords> args) {
  for (int k = static_cast<int>(threadIdx.x); k < args.words; k += kThreads)
    args.to[k] = args.word[k];
}

}  // namespace

Stream::Stream(int32_t device_index) : guard_(device_index), index_(device_index) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device_index, &stream) != 0)
    throw std::runtime_error("no CUDA stream of device " + std::to_string(device_index));
  stream_ = static_cast<cudaStream_t>(stream);
}

Device Stream::device() const {
  return {.processors = attribute(index_, cudaDevAttrMultiProcessorCount),
          .shared_bytes =
              attribute(index_, cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStaticSharedBytes};
}

bool Stream::capturing() const {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(stream_, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void Stream::launch(const char* kernel_name, const void* kernel, const Grid& grid,
                    const void* args) const {
  if (grid.ctas == 0) return;
  if (grid.ctas > INT32_MAX)
    throw std::runtime_error(std::string(kernel_name) + ": too many CTAs for one launch");
  if (grid.shared_bytes > kSharedBytesWithoutAsking)
    // the most, not this launch's: the limit is the kernel's, for all threads of the host
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(device().shared_bytes)),
          kernel_name);
  void* pointers[] = {const_cast<void*>(args)};
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(grid.ctas)),
                         dim3(static_cast<unsigned>(grid.threads)), pointers,
                         static_cast<size_t>(grid.shared_bytes), stream_),
        kernel_name);
}

template <int kWords>
void Stream::upload_words(uint32_t* to, const char* from, int64_t words) const {
  UploadArgs<kWords> args;
  args.to = to;
  args.words = static_cast<int32_t>(words);
  std::memcpy(args.word, from, 4 * static_cast<size_t>(words));
  launch("write_words", write_words<kWords>, {1, kThreads}, args);
}

void Stream::upload(void* to, const void* from, int64_t bytes) const {
  for (int64_t done = 0, words = bytes / 4; done < words;) {
    auto* const at = static_cast<uint32_t*>(to) + done;
    const char* const piece = static_cast<const char*>(from) + 4 * done;
    const int64_t count = std::min<int64_t>(words - done, kMany);
    if (count <= kFew)
      upload_words<kFew>(at, piece, count);
    else
      upload_words<kMany>(at, piece, count);
    done += count;
  }
}

void Stream::read(void* to, const void* from, int64_t bytes) const {
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream_),
        "cudaMemcpyAsync");
  check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
}

}  // namespace shear::cuda
