// Which instruction set of the kernels runs on this machine.
#pragma once

namespace moda_ext {
namespace cpu {

// baseline: what every processor of its kind has; NEON on AArch64. pairs: with products of bfloat16 pairs, AVX512_BF16
// there, BF16 on AArch64.
enum class Isa { baseline, avx2, avx512, pairs, amx };

// The best instruction set that was compiled, that this processor and its operating system offer, and that
// ATEN_CPU_CAPABILITY (default, avx2 or avx512, PyTorch's own variable; here avx512_bf16, too; unset allows all) permits.
// Decided once.
Isa active_isa();

const char* isa_name(Isa isa);

// The function name_<isa> of the best vector instruction set in use; AMX is an AVX-512 machine to kernels without
// tiles, and so is AVX512_BF16 to those without pairs.
#if defined(MODA_EXT_X86_ISAS)
#define MODA_EXT_VECTOR_ISA(name)                                                \
  (::moda_ext::cpu::active_isa() >= ::moda_ext::cpu::Isa::avx512 ? name##_avx512 \
   : ::moda_ext::cpu::active_isa() == ::moda_ext::cpu::Isa::avx2 ? name##_avx2   \
                                                                 : name##_baseline)
#else
#define MODA_EXT_VECTOR_ISA(name) name##_baseline
#endif

}  // namespace cpu
}  // namespace moda_ext
