#include "cpu/kernels/isa/modular_attention_isa.h"

namespace moda_ext {
namespace cpu {
const ModularAttentionKernels& modular_attention_kernels_pairs() {
  return MODA_EXT_ISA::modular_attention_kernels_for_bfloat16();
}
}  // namespace cpu
}  // namespace moda_ext
