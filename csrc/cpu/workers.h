// Work shared by torch's threads: tasks are taken in order from one queue, so that the threads
// finish together.
#pragma once
#include <torch/csrc/stable/ops.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <thread>

namespace shear::cpu {

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<float[], AlignedDelete>;

// In Python a MemoryError.
class NoRoom : public std::bad_alloc {
 public:
  explicit NoRoom(int64_t floats)
      : what_("shear_ops: no room for " + std::to_string(floats) +
              " floats of workspace; a shorter span needs less") {}
  const char* what() const noexcept override { return what_.c_str(); }

 private:
  std::string what_;
};

// Uninitialised floats on a cache line. A solver reads a hundred rows of token costs that lie pages
// apart: huge pages, where the system grants them, spare it the misses.
inline Buffer make_buffer(int64_t floats) {
  const auto bytes = static_cast<size_t>(std::max<int64_t>(floats, 1)) * sizeof(float);
  void* p = ::operator new[](bytes, std::align_val_t{64}, std::nothrow);
  if (p == nullptr) throw NoRoom(floats);
#ifdef __linux__
  constexpr uintptr_t kPage = 4096;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(p) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(p) + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return Buffer(static_cast<float*>(p));
}

inline int64_t threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// Asked by the calling thread; throws where the call is to end. There is nothing to ask until
// csrc/bindings.cpp, which has Python, sets it.
inline void (*check_interrupt)() = [] {};

class Workers {
 public:
  explicit Workers(int64_t scratch_floats)
      : threads_(shear::cpu::threads()),
        stride_((scratch_floats + 15) / 16 * 16),
        scratch_(make_buffer(threads_ * stride_)) {}

  // Calls task(index, scratch) once for each index in [0, count). Each thread has its own scratch.
  // An interrupt leaves the tasks that have not begun, and is thrown when the others are done.
  template <typename Task>
  void run(int64_t count, const Task& task) const {
    std::atomic<int64_t> next{0}, done{0};
    caller_ = std::this_thread::get_id();
    torch::stable::parallel_for(0, std::min(threads_, count), 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker)
        for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
          task(i, scratch_.get() + worker * stride_);
          ++done;
          if (!goes_on()) return;
        }
      // only the caller hears of interrupts: it listens until the tasks of other threads are done
      if (std::this_thread::get_id() != caller_) return;
      for (int64_t asked = 0; done < count && goes_on(); ++asked)
        if (asked < kYields)
          std::this_thread::yield();
        else
          std::this_thread::sleep_for(std::chrono::microseconds(200));
    });
    if (interrupt_) std::rethrow_exception(interrupt_);
  }

  // Whether the call was interrupted.
  bool stopped() const { return stopped_; }
  // Looks for an interrupt: a long task asks now and then, on any thread.
  bool goes_on() const {
    if (!stopped_ && std::this_thread::get_id() == caller_) {
      try {
        check_interrupt();
      } catch (...) {  // an exception must not leave a thread of torch
        interrupt_ = std::current_exception();
        stopped_ = true;
      }
    }
    return !stopped_;
  }

  static bool asked(const void* workers) { return static_cast<const Workers*>(workers)->goes_on(); }

 private:
  static constexpr int64_t kYields = 1000;

  int64_t threads_, stride_;
  Buffer scratch_;
  mutable std::thread::id caller_;
  mutable std::exception_ptr interrupt_;  // the caller's
  mutable std::atomic<bool> stopped_{false};
};

}  // namespace shear::cpu
