// CUDA C++ as the kernels of csrc/cuda use it, on a CPU: one CTA at a time, its threads as fibers
// that run until they wait for each other. What it checks: arithmetic, indices, that every thread
// reaches every barrier and shuffle (else it stops with a message), and, by running the threads in
// another order (emulated::order), that no result hangs on who comes first. What it does not:
// speed, the rounding of the hardware's fast functions, races that no order of whole threads shows.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Dim3 {
  unsigned x;
};
using std::max;
using std::min;

namespace emulated {

#if !defined(__x86_64__)
#error "the emulation switches fibers in x86-64 assembly"
#endif
// Saves the registers that a call preserves and the stack, and goes on with the stack of another.
__attribute__((naked, noinline)) inline void switch_fiber(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}

struct Fiber {
  void* stack_pointer;
  std::vector<char> stack;
  bool done;
};

// Threads that wait until all of them that are still running have come.
struct Meeting {
  int expected, arrived, generation;
  int vote, outcome;  // __syncthreads_or
};

constexpr int kStackBytes = 96 << 10;
constexpr int kMostThreads = 1024;
constexpr size_t kSharedBytes = 232448;  // of an H100's CTA

inline std::vector<Fiber> fibers;
inline Meeting block, warps[kMostThreads / 32];
inline int current, alive;
inline void* scheduler;
// What lanes give each other, in turns: of the last, some may still take.
inline uint64_t exchange[2][kMostThreads];
inline uint32_t words[2][kMostThreads][6];
inline void (*entry)(const void*);
inline const void* arguments;
inline const char* kernel_name;
alignas(128) inline unsigned char shared[kSharedBytes];

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel %s: %s\n", kernel_name, what);
  std::abort();
}

inline void pause() { switch_fiber(&fibers[current].stack_pointer, scheduler); }

inline void release(Meeting& m) {
  if (m.arrived < m.expected) return;
  m.arrived = 0;
  m.outcome = m.vote;
  m.vote = 0;
  ++m.generation;
}

inline void meet(Meeting& m) {
  const int generation = m.generation;
  ++m.arrived;
  release(m);
  while (m.generation == generation) pause();
}

inline Meeting& own_warp() { return warps[current / 32]; }
inline int turn() { return own_warp().generation % 2; }

inline void run_fiber() {
  entry(arguments);
  fibers[current].done = true;
  --alive;
  --block.expected;
  --own_warp().expected;
  if (block.arrived > 0) release(block);
  if (own_warp().arrived > 0) release(own_warp());
  pause();
  fail("a finished thread went on");
}

// In which order the threads of a CTA run: 0 as they come, 1 reversed, 2 mixed.
inline int order = 0;
inline int thread_at(int turn, int threads) {
  return order == 0 ? turn : order == 1 ? threads - 1 - turn : turn * 37 % threads;
}

}  // namespace emulated

inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

inline void run_block(int threads) {
  if (threads > static_cast<int>(fibers.size())) fibers.resize(threads);
  alive = threads;
  block = {threads, 0, 0, 0, 0};
  for (int w = 0; w < (threads + 31) / 32; ++w)
    warps[w] = {std::min(32, threads - 32 * w), 0, 0, 0, 0};
  std::memset(shared, 0xff, sizeof shared);  // NaN
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.stack.resize(kStackBytes);
    fiber.done = false;
    auto top = reinterpret_cast<uintptr_t>(fiber.stack.data() + kStackBytes) & ~uintptr_t{15};
    auto* frame = reinterpret_cast<void**>(top) - 8;  // six registers, the entry, alignment
    std::memset(frame, 0, 64);
    frame[6] = reinterpret_cast<void*>(&run_fiber);
    fiber.stack_pointer = frame;
  }
  while (alive > 0) {
    const int before = alive;
    int generations = block.generation;
    for (int w = 0; w < (threads + 31) / 32; ++w) generations += warps[w].generation;
    for (int turn = 0; turn < threads; ++turn) {
      current = thread_at(turn, threads);
      if (fibers[current].done) continue;
      threadIdx.x = current;
      switch_fiber(&scheduler, fibers[current].stack_pointer);
    }
    int after = block.generation;
    for (int w = 0; w < (threads + 31) / 32; ++w) after += warps[w].generation;
    if (alive == before && after == generations)
      fail("threads wait for each other: a barrier or shuffle is not reached by all of them");
  }
}

template <typename Args>
void run(const char* name, int64_t grid, int threads, int64_t shared_bytes, void (*kernel)(Args),
         const Args& args) {
  kernel_name = name;
  if (threads > kMostThreads || threads % 32 || shared_bytes > static_cast<int64_t>(kSharedBytes))
    fail("more threads or shared memory than a CTA can have");
  struct Call {
    void (*kernel)(Args);
    Args args;
  };
  static std::vector<Call> calls;  // of one kernel at a time
  calls.assign(1, {kernel, args});
  arguments = calls.data();
  entry = [](const void* p) {
    const auto* c = static_cast<const Call*>(p);
    c->kernel(c->args);
  };
  gridDim.x = static_cast<unsigned>(grid);
  blockDim.x = threads;
  for (int64_t b = 0; b < grid; ++b) {
    blockIdx.x = static_cast<unsigned>(b);
    run_block(threads);
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::meet(emulated::block); }
inline int __syncthreads_or(int vote) {
  emulated::block.vote |= vote != 0;
  emulated::meet(emulated::block);
  const int outcome = emulated::block.outcome;
  emulated::meet(emulated::block);
  return outcome;
}
inline void __syncwarp() { emulated::meet(emulated::own_warp()); }

// Every lane gives a value and takes one.
template <typename T, typename Take>
T exchange_in_warp(T value, const Take& take) {
  static_assert(sizeof(T) <= 8);
  uint64_t* const place = emulated::exchange[emulated::turn()];
  std::memcpy(&place[emulated::current], &value, sizeof value);
  emulated::meet(emulated::own_warp());
  return take([&](int lane) {
    T other;
    std::memcpy(&other, &place[emulated::current / 32 * 32 + lane], sizeof other);
    return other;
  });
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return exchange_in_warp(value,
                          [&](const auto& at) { return at((emulated::current % 32) ^ mask); });
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  return exchange_in_warp<unsigned>(vote, [](const auto& at) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= at(lane) << lane;
    return bits;
  });
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  return exchange_in_warp(value, [](const auto& at) {
    unsigned least = at(0);
    for (int lane = 1; lane < 32; ++lane) least = std::min(least, at(lane));
    return least;
  });
}

template <typename T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}
template <typename T>
T atomicMin(T* p, T value) {
  const T old = *p;
  *p = std::min(old, value);
  return old;
}
template <typename T>
T atomicExch(T* p, T value) {
  const T old = *p;
  *p = value;
  return old;
}
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  return x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : static_cast<int>(std::nearbyint(x));
}
