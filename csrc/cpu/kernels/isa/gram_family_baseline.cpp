#include "cpu/kernels/isa/gram_family_isa.h"

namespace moda_ext {
namespace cpu {
const GramFamilyKernels& gram_family_kernels_baseline(Storage storage) {
  return MODA_EXT_ISA::gram_family_kernels_for(storage);
}
}  // namespace cpu
}  // namespace moda_ext
