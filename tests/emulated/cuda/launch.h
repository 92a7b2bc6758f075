// csrc/cuda/launch.h for the emulation: a launch runs the kernel, copies are at once.
#pragma once
#include <cstdint>
#include <cstring>

#include "cuda/device.h"
#include "cuda/plan.h"
#include "cuda/tiles.h"

namespace shear::cuda {

class Stream {
 public:
  explicit Stream(int32_t) {}
  Device device() const {
    return {.processors = 3, .shared_bytes = emulated::kSharedBytes - kStaticSharedBytes};
  }
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

}  // namespace shear::cuda
