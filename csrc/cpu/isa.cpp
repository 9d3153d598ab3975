#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#if defined(MODA_EXT_AMX_ISA)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moda_ext {
namespace cpu {
namespace {

// Whether the processor has tile registers with bfloat16 products and the kernel lets this process use them: their 8 KB
// of state must be asked for (Linux, "Using XSTATE features in user space applications").
bool has_tiles() {
#if defined(MODA_EXT_AMX_ISA)
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  if ((edx & kBFloat16) == 0 || (edx & kTiles) == 0) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  Isa best = Isa::baseline;
#if defined(MODA_EXT_X86_ISAS)
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
  if (cap != nullptr && std::strcmp(cap, "default") == 0) return Isa::baseline;
  if (cap != nullptr && std::strcmp(cap, "avx2") == 0 && best == Isa::avx512) return Isa::avx2;
  if (cap != nullptr && std::strcmp(cap, "avx512") == 0) return best;
  return best == Isa::avx512 && has_tiles() ? Isa::amx : best;
}

}  // namespace

Isa active_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
#if defined(__aarch64__)
      return "neon";
#else
      return "baseline";
#endif
  }
}

}  // namespace cpu
}  // namespace moda_ext
