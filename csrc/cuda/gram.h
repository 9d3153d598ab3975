// Interface between the adapter (cuda/gram.cpp) and the Gram kernels: plain structs and device pointers, no libtorch,
// as in cuda/modular_attention.h, whose arguments describe keys and their modalities here too.
#pragma once

#include "cuda/modular_attention.h"

namespace moda_ext {
namespace cuda {

// Of AttentionArgs: head_dim, num_modalities, heads, num_sequences, numbers of tokens, key and key_modality. Gram
// matrices are float32, contiguous, one (D, D) for each (batch, key head, modality).
struct GramArgs : AttentionArgs {
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

// Queries are the last num_queries of the num_keys tokens. Of AttentionArgs also: query.
struct CausalArgs : GramArgs {
  Input row_scale;                 // (batch, kv head, query, modality), float32
  const float* initial = nullptr;  // symmetric Grams before the first token; null: 0
};

struct ProjectionArgs : CausalArgs {
  Output projection;      // its views are the modalities
  float* gram = nullptr;  // after the last token
};

// What the backward passes have in common.
struct CausalGradients {
  const float* grad_gram = nullptr;  // null: zero
  Output grad_query, grad_key;
  Output grad_row_scale;          // as row_scale
  float* grad_initial = nullptr;  // symmetric; null: not wanted
};

struct ProjectionBackwardArgs : CausalArgs, CausalGradients {
  Input grad_projection;
};

struct DuplexArgs : CausalArgs {
  int rank = 0;
  const float *a1 = nullptr, *b1 = nullptr;  // contiguous (modality, D, rank) and (modality, rank, D)
  const float *a2 = nullptr, *b2 = nullptr;
};

struct DuplexForwardArgs : DuplexArgs {
  Output views;
  Output indicator;       // (batch, query head, query, modality), float32; data null: not wanted
  float* gram = nullptr;  // after the last token; null: not wanted
};

struct DuplexBackwardArgs : DuplexArgs, CausalGradients {
  Input grad_views;
  Input indicator, grad_indicator;  // data null: no gradient
  float *grad_a1 = nullptr, *grad_b1 = nullptr, *grad_a2 = nullptr, *grad_b2 = nullptr;
};

// As ForwardKernels. `multiprocessors` decides how far few keys are split over the sequence.
template <int kHeadDim>
struct ModalityGramKernels {
  static int64_t workspace(const ModalityGramArgs& args, Storage storage, int multiprocessors);
  static void run(const ModalityGramArgs& args, Storage storage, int multiprocessors, void* workspace, void* stream);
};
template <int kHeadDim>
struct ModalityGramBackwardKernels {
  static int64_t workspace(const ModalityGramBackwardArgs& args, Storage storage);
  static void run(const ModalityGramBackwardArgs& args, Storage storage, void* workspace, void* stream);
};
template <int kHeadDim>
struct ProjectionKernels {
  static int64_t workspace(const ProjectionArgs& args, Storage storage);
  static void run(const ProjectionArgs& args, Storage storage, void* workspace, void* stream);
};
template <int kHeadDim>
struct ProjectionBackwardKernels {
  static int64_t workspace(const ProjectionBackwardArgs& args, Storage storage);
  static void run(const ProjectionBackwardArgs& args, Storage storage, void* workspace, void* stream);
};
template <int kHeadDim>
struct DuplexKernels {
  static int64_t workspace(const DuplexForwardArgs& args, Storage storage);
  static void run(const DuplexForwardArgs& args, Storage storage, void* workspace, void* stream);
};
template <int kHeadDim>
struct DuplexBackwardKernels {
  static int64_t workspace(const DuplexBackwardArgs& args, Storage storage);
  static void run(const DuplexBackwardArgs& args, Storage storage, void* workspace, void* stream);
};

}  // namespace cuda
}  // namespace moda_ext
