// The table of alignment kernels of one instruction set tier; included by gram_{baseline,avx2,avx512,amx}.cpp, which
// differ in their compiler flags (csrc/sources.json) alone.
#pragma once

#include "duplex_views_backward.h"
#if defined(__AMX_BF16__)
#include "aligned_keys_tiles.h"
#include "duplex_tiles_forward.h"
#include "modality_gram_tiles.h"
#else
#include "aligned_keys.h"
#include "modality_gram.h"
#endif

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_TIER {

template <class Storage, class T>
const GramKernels& gram_kernels() {
  static const GramKernels table = {
#if defined(__AMX_BF16__)
      kTileChunk,
      static_cast<int>(sizeof(T)),
      modality_gram_tile_bytes,
      modality_gram_tiles<Storage>,
#else
      kChunk,
      static_cast<int>(sizeof(T)),
      modality_gram_scratch_bytes<T>,
      modality_gram<Storage, T>,
#endif
      reduce_grams<T>,
      modality_gram_backward<Storage, T>,
      projection_scratch_bytes<T>,
      projection<Storage, T>,
      projection_backward_scratch_bytes<T>,
      projection_backward<Storage, T>,
      weights_bytes<T>,
      pack_weights<T>,
#if defined(__AMX_BF16__)
      duplex_tile_bytes<Storage>,
      duplex_tiles<Storage>,
#else
      duplex_scratch_bytes<T>,
      duplex<Storage, T>,
#endif
      duplex_backward_scratch_bytes<T>,
      duplex_backward<Storage, T>,
      reduce_weight_gradients<T>,
#if defined(__AMX_BF16__)
      aligned_keys_tile_bytes<Storage>,
      aligned_keys_tiles<Storage>,
#else
      aligned_keys_scratch_bytes<T>,
      aligned_keys<Storage, T>,
#endif
  };
  return table;
}

inline const GramKernels& gram_kernels_for(cpu::Storage storage) {
  switch (storage) {
#if !defined(__AMX_BF16__)  // the tile unit has no float64: not asked for
    case cpu::Storage::kFloat64:
      return gram_kernels<double, double>();
#endif
    case cpu::Storage::kBFloat16:
      return gram_kernels<BFloat16, float>();
    case cpu::Storage::kFloat16:
      return gram_kernels<Float16, float>();
    default:
      return gram_kernels<float, float>();
  }
}

}  // namespace MODA_EXT_TIER
}  // namespace cpu
}  // namespace moda_ext
