// Interface between the launch (cuda/gram_family_launch.cpp) and the Gram kernels: plain structs and device pointers,
// no libtorch, as in cuda/modular_attention_kernels.h, whose arguments describe keys and their modalities here too.
#pragma once

#include "cuda/modular_attention_kernels.h"

namespace moda_ext {
namespace cuda {

// Of ModularAttentionArgs: head_dim, num_modalities, heads, num_sequences, numbers of tokens, key and key_modality.
// Gram matrices are float32, contiguous, one (D, D) for each (batch, key head, modality).
struct GramArgs : ModularAttentionArgs {
  bool unit_keys = true;
  float eps = 0;

  int64_t num_grams() const { return static_cast<int64_t>(num_sequences) * kv_heads * num_modalities; }
};

struct ModalityGramArgs : GramArgs {
  float* gram = nullptr;
};

struct ModalityGramBackwardArgs : GramArgs {
  const float* grad_gram = nullptr;
  Output grad_key;
};

// Queries are the last num_queries of the num_keys tokens. Of ModularAttentionArgs also: query.
struct CausalGramArgs : GramArgs {
  Input row_scale;                 // (batch, kv head, query, modality), float32
  const float* initial = nullptr;  // symmetric Grams before the first token; null: 0
};

struct CausalGramProjectionForwardArgs : CausalGramArgs {
  Output projection;      // its views are the modalities
  float* gram = nullptr;  // after the last token
};

// What the backward passes have in common.
struct CausalGramGradients {
  const float* grad_gram = nullptr;  // null: zero
  Output grad_query, grad_key;
  Output grad_row_scale;          // as row_scale
  float* grad_initial = nullptr;  // symmetric; null: not wanted
};

struct CausalGramProjectionBackwardArgs : CausalGramArgs, CausalGramGradients {
  Input grad_projection;
};

struct DuplexArgs : CausalGramArgs {
  int rank = 0;
  const float *a1 = nullptr, *b1 = nullptr;  // contiguous (modality, D, rank) and (modality, rank, D)
  const float *a2 = nullptr, *b2 = nullptr;
};

struct DuplexQueryViewsForwardArgs : DuplexArgs {
  Output views;
  Output indicator;       // (batch, query head, query, modality), float32; data null: not wanted
  float* gram = nullptr;  // after the last token; null: not wanted
};

struct DuplexQueryViewsBackwardArgs : DuplexArgs, CausalGramGradients {
  Input grad_views;
  Input indicator, grad_indicator;  // data null: no gradient
  float *grad_a1 = nullptr, *grad_b1 = nullptr, *grad_a2 = nullptr, *grad_b2 = nullptr;
};

// As ModularAttentionForwardKernels. `multiprocessors` decides how far few keys are split over the sequence.
namespace sm80 {

template <int kHeadDim>
struct ModalityGramForwardKernels {
  static constexpr int kCapability = 80;
  static int64_t workspace(const ModalityGramArgs& args, Storage storage, int multiprocessors);
  static void run(const ModalityGramArgs& args, Storage storage, int multiprocessors, void* workspace, void* stream);
};
template <int kHeadDim>
struct ModalityGramBackwardKernels {
  static constexpr int kCapability = 80;
  static int64_t workspace(const ModalityGramBackwardArgs& args, Storage storage);
  static void run(const ModalityGramBackwardArgs& args, Storage storage, void* workspace, void* stream);
};
template <int kHeadDim>
struct CausalGramProjectionForwardKernels {
  static constexpr int kCapability = 80;
  static int64_t workspace(const CausalGramProjectionForwardArgs& args, Storage storage);
  static void run(const CausalGramProjectionForwardArgs& args, Storage storage, void* workspace, void* stream);
};
template <int kHeadDim>
struct CausalGramProjectionBackwardKernels {
  static constexpr int kCapability = 80;
  static int64_t workspace(const CausalGramProjectionBackwardArgs& args, Storage storage);
  static void run(const CausalGramProjectionBackwardArgs& args, Storage storage, void* workspace, void* stream);
};
template <int kHeadDim>
struct DuplexQueryViewsForwardKernels {
  static constexpr int kCapability = 80;
  static int64_t workspace(const DuplexQueryViewsForwardArgs& args, Storage storage);
  static void run(const DuplexQueryViewsForwardArgs& args, Storage storage, void* workspace, void* stream);
};
template <int kHeadDim>
struct DuplexQueryViewsBackwardKernels {
  static constexpr int kCapability = 80;
  static int64_t workspace(const DuplexQueryViewsBackwardArgs& args, Storage storage);
  static void run(const DuplexQueryViewsBackwardArgs& args, Storage storage, void* workspace, void* stream);
};

}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
