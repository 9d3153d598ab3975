#include "cpu/kernels/isa/gram_family_isa.h"

namespace moda_ext {
namespace cpu {
const GramFamilyKernels& gram_family_kernels_avx512(Storage storage) {
  return avx512::gram_family_kernels_for(storage);
}
}  // namespace cpu
}  // namespace moda_ext
