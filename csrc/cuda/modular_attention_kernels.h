// Interface between the launch (cuda/modular_attention_launch.cpp) and the kernels: plain structs and device pointers,
// no libtorch. Everything a kernel needs to know of the call is in its arguments, by value.
#pragma once

#include <stdint.h>

#include "core/operand.h"
#include "core/storage.h"

namespace moda_ext {
namespace cuda {

// Pointers and strides of query, key, value, out and their gradients are multiples of 16 bytes, save those of the last
// dimension, which is contiguous. bias, sink, lse, mass and their gradients are float32.
struct ModularAttentionArgs {
  int head_dim = 0, num_modalities = 0, num_views = 1;
  int query_heads = 0, kv_heads = 0;
  bool causal = false;
  float scale = 1;
  int num_sequences = 0;
  int num_queries = 0, num_keys = 0;      // of every sequence; packed: of the longest
  int64_t rows_per_batch = 0;             // num_queries; packed: queries of all sequences
  int64_t total_keys = 0;                 // packed: keys of all sequences
  const int32_t* cu_seqlens_q = nullptr;  // packed layout: offsets of the sequences, else null
  const int32_t* cu_seqlens_k = nullptr;
  const int32_t* key_modality = nullptr;         // an id outside [0, num_modalities) is padding
  int64_t modality_batch = 0, modality_row = 1;  // its strides
  Input query, key, value, bias, sink;           // bias.data and sink.data may be null

  bool packed() const { return cu_seqlens_q != nullptr; }
  int64_t num_rows() const { return (packed() ? 1 : num_sequences) * rows_per_batch * query_heads; }
};

struct ModularAttentionForwardArgs : ModularAttentionArgs {
  Output out, lse, mass;
  Output lse_residual;  // what rounding took from lse: lse + lse_residual is the sum, see write_lse
};

struct ModularAttentionBackwardArgs : ModularAttentionArgs {
  Input saved_out, saved_lse, saved_mass, saved_lse_residual;
  bool whole_rows = true;               // false: saved_* are of rows that see more keys, of which these are a part
  Input grad_out, grad_lse, grad_mass;  // data null: zero
  Output grad_query, grad_key, grad_value, grad_bias, grad_sink;  // data null: not wanted
};

// Kernels of an architecture (its namespace, its folder) for head sizes up to kHeadDim, one of kHeadSizes
// (cuda/dispatch.h; csrc/sources.json has a translation unit for each of them and direction). GPUs of kCapability and
// later run them.
// workspace(): device memory, in bytes, that a call needs. `multiprocessors` decides how far few rows are split over
// the keys. Launches go to `stream` (a cudaStream_t); nothing waits.
namespace sm80 {

template <int kHeadDim>
struct ModularAttentionForwardKernels {
  static constexpr int kCapability = 80;
  static int64_t workspace(const ModularAttentionForwardArgs& args, Storage storage, int multiprocessors);
  static void run(const ModularAttentionForwardArgs& args, Storage storage, int multiprocessors, void* workspace,
                  void* stream);
};
template <int kHeadDim>
struct ModularAttentionBackwardKernels {
  static constexpr int kCapability = 80;
  static int64_t workspace(const ModularAttentionBackwardArgs& args, Storage storage);
  static void run(const ModularAttentionBackwardArgs& args, Storage storage, void* workspace, void* stream);
};

}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
