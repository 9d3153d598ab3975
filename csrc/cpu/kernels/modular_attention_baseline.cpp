#include "modular_attention_tier.h"

namespace moda_ext {
namespace cpu {
const AttentionKernels& attention_kernels_baseline(Storage storage) { return baseline::kernels_for(storage); }
}  // namespace cpu
}  // namespace moda_ext
