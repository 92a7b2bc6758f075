#include "cpu/kernels/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels/kernels.h"

#ifdef SHEAR_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
  bool below(const float*, int64_t, float);                                        \
  void rbf(float*, int64_t, float);                                                \
  Solution sinkhorn(const PairInput&, float*);                                     \
  constexpr Kernels kKernels{#set,                                                 \
                             add_states_any,                                       \
                             squared_norm_any,                                     \
                             token_cost_any,                                       \
                             /*bf16_products=*/false,                              \
                             window_min,                                           \
                             window_sum,                                           \
                             column_min,                                           \
                             add,                                                  \
                             below,                                                \
                             rbf,                                                  \
                             sinkhorn};                                            \
  }

// AVX-512 with other token costs for bfloat16.
#define SHEAR_DECLARE_BF16(set)                                                    \
  namespace set {                                                                  \
  void token_cost_bf16(const CostTile&);                                           \
  void token_cost_any(const CostTile& tile) {                                      \
    tile.center == nullptr ? token_cost_bf16(tile) : avx512::token_cost_any(tile); \
  }                                                                                \
  constexpr Kernels kKernels = [] {                                                \
    Kernels table = avx512::kKernels;                                              \
    table.isa = #set;                                                              \
    table.token_cost = token_cost_any;                                             \
    table.bf16_products = true;                                                    \
    return table;                                                                  \
  }();                                                                             \
  }

SHEAR_DECLARE(portable)
#ifdef SHEAR_X86
SHEAR_DECLARE(avx2)
SHEAR_DECLARE(avx512)
SHEAR_DECLARE_BF16(avx512_bf16)
SHEAR_DECLARE_BF16(amx)
#endif

namespace {

struct Candidate {
  const Kernels* table;
  bool supported;
};

#if defined(SHEAR_X86) && !defined(SHEAR_EMULATED)
struct Cpuid7 {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit Cpuid7(unsigned subleaf) { __get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx); }
};

// Linux gives a process the tile registers when it asks for them, or refuses.
bool may_use_tiles() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Best first.
std::vector<Candidate> candidates() {
#ifdef SHEAR_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef SHEAR_EMULATED
  const bool avx512 = avx2, bf16 = avx2, amx = avx2;
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && (Cpuid7(1).eax >> 5 & 1);
  const unsigned features = Cpuid7(0).edx;
  const bool amx = avx512 && (features >> 22 & 1) && (features >> 24 & 1) && may_use_tiles();
#endif
  return {{&amx::kKernels, amx},
          {&avx512_bf16::kKernels, bf16},
          {&avx512::kKernels, avx512},
          {&avx2::kKernels, avx2},
          {&portable::kKernels, true}};
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
