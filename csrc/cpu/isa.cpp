#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace shear::cpu {

#define SHEAR_DECLARE(set)                                                         \
  namespace set {                                                                  \
  void add_states_any(const States&, int64_t, int64_t, int64_t, int64_t, double*); \
  float squared_norm_any(const States&, int64_t, const float*);                    \
  void token_cost_any(const CostTile&);                                            \
  void window_min(const float*, const Window*, int64_t, float*);                   \
  void window_sum(const float*, const Window*, int64_t, float*);                   \
  void column_min(const float*, int64_t, int64_t, int64_t, float*);                \
  void add(float*, const float*, int64_t);                                         \
  bool finite(const float*, int64_t);                                              \
  void rbf(float*, int64_t, float);                                                \
  PairOutput sinkhorn(const PairInput&, float*);                                   \
  constexpr Kernels kKernels{#set,                                                 \
                             add_states_any,                                       \
                             squared_norm_any,                                     \
                             token_cost_any,                                       \
                             window_min,                                           \
                             window_sum,                                           \
                             column_min,                                           \
                             add,                                                  \
                             finite,                                               \
                             rbf,                                                  \
                             sinkhorn};                                            \
  }

SHEAR_DECLARE(portable)
#ifdef SHEAR_X86
SHEAR_DECLARE(avx2)
SHEAR_DECLARE(avx512)
#endif

namespace {

struct Candidate {
  const Kernels* table;
  bool supported;
};

// Best first.
std::vector<Candidate> candidates() {
#ifdef SHEAR_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return {{&avx512::kKernels, avx512}, {&avx2::kKernels, avx2}, {&portable::kKernels, true}};
#else
  return {{&portable::kKernels, true}};
#endif
}

const Kernels* choose() {
  const char* forced = std::getenv("SHEAR_ISA");
  for (const Candidate& c : candidates()) {
    if (forced == nullptr || *forced == '\0') {
      if (c.supported) return c.table;
    } else if (std::string(forced) == c.table->isa) {
      if (c.supported) return c.table;
      throw std::runtime_error(std::string("SHEAR_ISA=") + forced +
                               ": this machine does not support it");
    }
  }
  throw std::runtime_error(
      std::string("SHEAR_ISA must be one of the compiled instruction sets, got ") + forced);
}

}  // namespace

std::vector<std::pair<std::string, bool>> instruction_sets() {
  std::vector<std::pair<std::string, bool>> out;
  for (const Candidate& c : candidates()) out.emplace_back(c.table->isa, c.supported);
  return out;
}

const Kernels& kernels() {
  static const Kernels* table = choose();
  return *table;
}

}  // namespace shear::cpu
