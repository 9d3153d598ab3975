#include "cpu/kernels/isa/modular_attention_isa.h"

namespace moda_ext {
namespace cpu {
const ModularAttentionKernels& modular_attention_kernels_amx(Storage storage) {
  return amx::modular_attention_kernels_for(storage);
}
}  // namespace cpu
}  // namespace moda_ext
