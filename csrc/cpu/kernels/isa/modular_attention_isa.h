// The kernel table of one instruction set; included by modular_attention_<isa>.cpp, which differ in their compiler flags
// (csrc/sources.json) alone.
#pragma once

#include "cpu/kernels/vector/modular_attention_backward.h"
#include "cpu/kernels/vector/modular_attention_forward.h"
#if defined(__AMX_BF16__)
#include "cpu/kernels/amx/modular_attention_backward.h"
#include "cpu/kernels/amx/modular_attention_forward.h"
#endif

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

template <class Engine, class Backward>
const ModularAttentionKernels& kernels() {
  using Storage = typename Engine::Storage;
  using T = typename Engine::T;
  static const ModularAttentionKernels table = {
      kPanel<T>,
      Engine::kTileKeys,
      Backward::kTileKeys,
      kBlockRows,
      Backward::kBlockRows,
      static_cast<int>(sizeof(T)),
      [](const ModularAttentionArgs& args, int64_t num_panels) {
        return static_cast<int64_t>(sizeof(typename Engine::Packed)) * Engine::packed_elements(args, num_panels);
      },
      partial_bytes<T>,
      Engine::scratch_bytes,
      Backward::scratch_bytes,
      pack_tile<Engine>,
      forward<Engine>,
      merge<Engine>,
      Backward::packed_bytes,
      Backward::pack_tile,
      Backward::run,
      reduce_partials<Storage, T>,
  };
  return table;
}

#if defined(MODA_EXT_PAIRS)
// Of bfloat16 alone: pairs cannot hold the others, and a float16 in two bfloat16 parts would take as long as in float32.
inline const ModularAttentionKernels& modular_attention_kernels_for_bfloat16() {
  return kernels<VectorEngine<BFloat16, float, Pair>, VectorBackward<BFloat16, float, Pair>>();
}
#elif !defined(__AMX_BF16__)
inline const ModularAttentionKernels& modular_attention_kernels_for(moda_ext::Storage storage) {
  switch (storage) {
    case moda_ext::Storage::kFloat64:
      return kernels<VectorEngine<double, double>, VectorBackward<double, double>>();
    case moda_ext::Storage::kBFloat16:
      return kernels<VectorEngine<BFloat16, float>, VectorBackward<BFloat16, float>>();
    case moda_ext::Storage::kFloat16:
      return kernels<VectorEngine<Float16, float>, VectorBackward<Float16, float>>();
    default:
      return kernels<VectorEngine<float, float>, VectorBackward<float, float>>();
  }
}
#else
// AMX has no float64: not asked for.
inline const ModularAttentionKernels& modular_attention_kernels_for(moda_ext::Storage storage) {
  switch (storage) {
    case moda_ext::Storage::kBFloat16:
      return kernels<AmxEngine<BFloat16>, AmxBackward<BFloat16>>();
    case moda_ext::Storage::kFloat16:
      return kernels<AmxEngine<Float16>, AmxBackward<Float16>>();
    default:
      return kernels<AmxEngine<float>, AmxBackward<float>>();
  }
}
#endif

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
