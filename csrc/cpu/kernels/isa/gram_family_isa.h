// The table of the Gram family's kernels of one instruction set; included by
// gram_family_{baseline,avx2,avx512,amx}.cpp, which differ in their compiler flags (csrc/sources.json) alone.
#pragma once

#include "cpu/kernels/vector/decoded_query_views.h"
#include "cpu/kernels/vector/duplex_query_views_backward.h"
#if defined(__AMX_BF16__)
#include "cpu/kernels/amx/duplex_aligned_keys.h"
#include "cpu/kernels/amx/duplex_query_views_forward.h"
#include "cpu/kernels/amx/modality_gram.h"
#else
#include "cpu/kernels/vector/duplex_aligned_keys.h"
#include "cpu/kernels/vector/modality_gram.h"
#endif

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

template <class Storage, class T>
const GramFamilyKernels& gram_family_kernels() {
  static const GramFamilyKernels table = {
#if defined(__AMX_BF16__)
      kAmxChunk,
      static_cast<int>(sizeof(T)),
      modality_gram_amx_scratch_bytes,
      modality_gram_amx<Storage>,
#else
      kChunk,
      static_cast<int>(sizeof(T)),
      modality_gram_scratch_bytes<T>,
      modality_gram<Storage, T>,
#endif
      reduce_grams<T>,
      modality_gram_backward<Storage, T>,
      causal_gram_projection_scratch_bytes<T>,
      causal_gram_projection<Storage, T>,
      causal_gram_projection_backward_scratch_bytes<T>,
      causal_gram_projection_backward<Storage, T>,
      weights_bytes<T>,
      pack_weights<T>,
#if defined(__AMX_BF16__)
      duplex_query_views_amx_scratch_bytes<Storage>,
      duplex_query_views_amx<Storage>,
#else
      duplex_query_views_scratch_bytes<T>,
      duplex_query_views<Storage, T>,
#endif
      duplex_query_views_backward_scratch_bytes<T>,
      duplex_query_views_backward<Storage, T>,
      reduce_weight_gradients<T>,
      causal_scale<Storage, T>,
      decoded_query_views_scratch_bytes<T>,
      decoded_query_views_partial_bytes<T>,
      decoded_query_views<Storage, T>,
      merge_decoded_query_views<Storage, T>,
#if defined(__AMX_BF16__)
      duplex_aligned_keys_amx_scratch_bytes<Storage>,
      duplex_aligned_keys_amx<Storage>,
#else
      duplex_aligned_keys_scratch_bytes<T>,
      duplex_aligned_keys<Storage, T>,
#endif
  };
  return table;
}

inline const GramFamilyKernels& gram_family_kernels_for(moda_ext::Storage storage) {
  switch (storage) {
#if !defined(__AMX_BF16__)  // AMX has no float64: not asked for
    case moda_ext::Storage::kFloat64:
      return gram_family_kernels<double, double>();
#endif
    case moda_ext::Storage::kBFloat16:
      return gram_family_kernels<BFloat16, float>();
    case moda_ext::Storage::kFloat16:
      return gram_family_kernels<Float16, float>();
    default:
      return gram_family_kernels<float, float>();
  }
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
