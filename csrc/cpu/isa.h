// Which instruction set tier of the kernels runs on this machine.
#pragma once

namespace moda_ext {
namespace cpu {

enum class Isa { baseline, avx2, avx512, amx };

// The best tier that was compiled, that this processor and its operating system offer, and that ATEN_CPU_CAPABILITY
// (default, avx2 or avx512, PyTorch's own variable; unset allows all) permits. Decided once.
Isa active_isa();

const char* isa_name(Isa isa);

}  // namespace cpu
}  // namespace moda_ext
