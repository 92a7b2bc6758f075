// Warnings through torch's handler: Python's warnings where Python calls.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <atomic>

#include "problem.h"

namespace shear {

// Once per process.
inline void warn_of_stopped(int64_t stopped, int64_t solved, int64_t n_iters) {
  static std::atomic<bool> said{false};
  if (stopped > 0 && !said.exchange(true))
    aoti_torch_warn("shear", __FILE__, __LINE__, stopped_warning(stopped, solved, n_iters).c_str());
}

}  // namespace shear
