#include "gram_tier.h"

namespace moda_ext {
namespace cpu {
const GramKernels& gram_kernels_avx512(Storage storage) { return avx512::gram_kernels_for(storage); }
}  // namespace cpu
}  // namespace moda_ext
