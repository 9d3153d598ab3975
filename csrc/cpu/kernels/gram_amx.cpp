#include "gram_tier.h"

namespace moda_ext {
namespace cpu {
const GramKernels& gram_kernels_amx(Storage storage) { return amx::gram_kernels_for(storage); }
}  // namespace cpu
}  // namespace moda_ext
