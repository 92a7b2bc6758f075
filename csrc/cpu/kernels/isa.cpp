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

#define SHEAR_DECLARE(set)                                                                         \
  namespace set {                                                                                  \
  void add_states(const States&, int64_t, int64_t, int64_t, int64_t, double*);                     \
  Magnitude magnitude(const States&, int64_t);                                                     \
  float squared_norm(const States&, int64_t, const float*);                                        \
  void add_rounded(const States&, int64_t, int64_t, int64_t, float, int64_t*);                     \
  void round_states(const Rounded&);                                                               \
  void token_cost(const CostTile&);                                                                \
  void token_cost_int8(const CostTile&);                                                           \
  void window_min(const float*, const Window*, int64_t, float*);                                   \
  void window_sum(const float*, const Window*, int64_t, float*);                                   \
  void column_min(const float*, int64_t, int64_t, int64_t, float*);                                \
  void add(float*, const float*, int64_t);                                                         \
  bool below(const float*, int64_t, float);                                                        \
  void rbf(float*, int64_t, float);                                                                \
  Solution sinkhorn(const PairInput&, float*);                                                     \
  constexpr Kernels kKernels{#set,         add_states, magnitude,       squared_norm, add_rounded, \
                             round_states, token_cost, token_cost_int8, window_min,   window_sum,  \
                             column_min,   add,        below,           rbf,          sinkhorn};   \
  }

// Another set's kernels but for the product of int8 rows.
#define SHEAR_DECLARE_PRODUCT(set, others)   \
  namespace set {                            \
  void token_cost_int8(const CostTile&);     \
  constexpr Kernels kKernels = [] {          \
    Kernels table = others::kKernels;        \
    table.isa = #set;                        \
    table.token_cost_int8 = token_cost_int8; \
    return table;                            \
  }();                                       \
  }

SHEAR_DECLARE(portable)
#ifdef SHEAR_X86
SHEAR_DECLARE(avx2)
SHEAR_DECLARE(avx512)
SHEAR_DECLARE_PRODUCT(avx_vnni, avx2)
SHEAR_DECLARE_PRODUCT(avx512_vnni, avx512)
SHEAR_DECLARE_PRODUCT(amx, avx512)
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
  const bool avx512 = avx2, avx_vnni = avx2, avx512_vnni = avx2, amx = avx2;
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const Cpuid7 features(0);
  const bool avx_vnni = avx2 && (Cpuid7(1).eax >> 4 & 1);
  const bool avx512_vnni = avx512 && (features.ecx >> 11 & 1);
  const bool amx =
      avx512 && (features.edx >> 24 & 1) && (features.edx >> 25 & 1) && may_use_tiles();
#endif
  return {{&amx::kKernels, amx},       {&avx512_vnni::kKernels, avx512_vnni},
          {&avx512::kKernels, avx512}, {&avx_vnni::kKernels, avx_vnni},
          {&avx2::kKernels, avx2},     {&portable::kKernels, true}};
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
