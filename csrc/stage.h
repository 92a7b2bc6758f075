// Names a step of a call in the traces of torch's profiler: shear::token_costs, shear::solve, ...
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace shear {

class Stage {
 public:
  explicit Stage(const char* name) {
    aoti_record_function_start(name, nullptr, nullptr, 0, &guard_);
  }
  ~Stage() { aoti_record_function_end(guard_); }
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

 private:
  AtenRecordFunctionHandle guard_ = nullptr;
};

}  // namespace shear
