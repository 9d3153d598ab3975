#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace moda_ext {
namespace cpu {
namespace {

Isa detect() {
  Isa best = Isa::baseline;
#if defined(MODA_EXT_X86_TIERS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      best = Isa::avx512;
    }
  }
#endif
  const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
  if (cap == nullptr) return best;
  if (std::strcmp(cap, "default") == 0) return Isa::baseline;
  if (std::strcmp(cap, "avx2") == 0 && best == Isa::avx512) return Isa::avx2;
  return best;
}

}  // namespace

Isa active_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace cpu
}  // namespace moda_ext
