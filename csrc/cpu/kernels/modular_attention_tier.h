// The kernel table of one instruction set tier; included by modular_attention_{baseline,avx2,avx512}.cpp, which differ
// in their compiler flags (csrc/sources.json) alone.
#pragma once

#include "modular_attention_backward.h"
#include "modular_attention_forward.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_TIER {

template <class Storage, class T>
const AttentionKernels& kernels() {
  static const AttentionKernels table = {
      kPanel<T>,
      kForwardTileKeys,
      kBackwardTileKeys,
      kBlockRows,
      static_cast<int>(sizeof(T)),
      [](const AttentionArgs& args, int64_t num_panels) {
        return static_cast<int64_t>(sizeof(T)) * packed_elements<T>(args, num_panels);
      },
      partial_bytes<T>,
      forward_scratch_bytes<T>,
      backward_scratch_bytes<Storage, T>,
      pack_tile<Storage, T>,
      forward<Storage, T>,
      merge<Storage, T>,
      backward<Storage, T>,
      reduce_partials<Storage, T>,
  };
  return table;
}

inline const AttentionKernels& kernels_for(cpu::Storage storage) {
  switch (storage) {
    case cpu::Storage::kFloat64:
      return kernels<double, double>();
    case cpu::Storage::kBFloat16:
      return kernels<BFloat16, float>();
    case cpu::Storage::kFloat16:
      return kernels<Float16, float>();
    default:
      return kernels<float, float>();
  }
}

}  // namespace MODA_EXT_TIER
}  // namespace cpu
}  // namespace moda_ext
