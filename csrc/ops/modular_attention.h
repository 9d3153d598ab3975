// What every device does first with the arguments of modular_attention and modular_attention_varlen: check what memory
// safety depends on, and reduce both layouts to one description. User-facing validation, with Python's error types, is
// moda_ext/_ops/checks.py; these checks guard direct callers of torch.ops.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "ops/checks.h"

namespace moda_ext {

struct AttentionInputs {
  const char* op;  // the operator that was called, for errors
  Tensor query, key, value, key_modality;
  std::optional<Tensor> modality_bias, sink;
  // Present: packed layout (tokens, heads, ...), else (batch, heads, tokens, ...).
  std::optional<Tensor> cu_seqlens_q, cu_seqlens_k;
  int64_t num_modalities;
  bool is_causal;
  double scale;

  bool packed() const { return cu_seqlens_q.has_value(); }
};

struct AttentionShape {
  int64_t batch;  // 1 in the packed layout
  int64_t query_heads, kv_heads;
  int64_t num_queries, num_keys;  // rows of the tensors: totals in the packed layout
  int64_t head_dim, num_views;    // num_views 1: one query serves all key modalities
};

// Throws std::invalid_argument, naming operator and argument.
AttentionShape check_attention(const AttentionInputs& inputs);

// What a forward makes. lse is rounded; lse + lse_residual is what it was before. The backward needs both: beside a
// bias of 1e9 a float has no room for the logarithm of a sum.
struct AttentionOutputs {
  Tensor out, lse, mass, lse_residual;
};
AttentionOutputs empty_outputs(const AttentionInputs& inputs, const AttentionShape& shape);

// What a backward receives beside the inputs; which gradients it is to make.
struct SavedAttention {
  std::optional<Tensor> grad_out, grad_lse, grad_mass;
  Tensor out, lse, mass, lse_residual;
};
struct AttentionNeeds {
  bool query, key, value, bias, sink;
};

// check_attention for what a backward receives beside the inputs.
void check_saved(const AttentionInputs& inputs, const AttentionShape& shape, const SavedAttention& saved);

}  // namespace moda_ext
