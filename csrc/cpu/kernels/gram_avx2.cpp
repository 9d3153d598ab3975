#include "gram_tier.h"

namespace moda_ext {
namespace cpu {
const GramKernels& gram_kernels_avx2(Storage storage) { return avx2::gram_kernels_for(storage); }
}  // namespace cpu
}  // namespace moda_ext
