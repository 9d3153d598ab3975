#include "modular_attention_tier.h"

namespace moda_ext {
namespace cpu {
const AttentionKernels& attention_kernels_amx(Storage storage) { return amx::kernels_for(storage); }
}  // namespace cpu
}  // namespace moda_ext
