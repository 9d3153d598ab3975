#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#if !defined(HWCAP2_BF16)  // headers of before Linux 5.5
#define HWCAP2_BF16 (1 << 14)
#endif
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
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

// Whether the processor multiplies pairs of bfloat16.
bool has_pairs() {
#if !defined(MODA_EXT_PAIRS_ISA)
  return false;
#elif defined(MODA_EXT_X86_ISAS)
  return __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__) && defined(__linux__)
  return (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
  int present = 0;
  size_t bytes = sizeof(present);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &present, &bytes, nullptr, 0) == 0 && present != 0;
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
  const auto capped_to = [&](const char* isa) { return cap != nullptr && std::strcmp(cap, isa) == 0; };
  if (capped_to("default")) return Isa::baseline;
#if defined(__aarch64__)
  if (has_pairs()) return Isa::pairs;
#endif
  if (best != Isa::avx512) return best;
  if (capped_to("avx2")) return Isa::avx2;
  if (capped_to("avx512")) return best;
  if (has_pairs()) best = Isa::pairs;
  return !capped_to("avx512_bf16") && has_tiles() ? Isa::amx : best;
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
    case Isa::pairs:
#if defined(__aarch64__)
      return "neon_bf16";
#else
      return "avx512_bf16";
#endif
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
