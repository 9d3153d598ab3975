// What every device does first with the arguments of modular_attention and modular_attention_varlen: check what memory
// safety depends on, and reduce both layouts to one description. User-facing validation, with Python's error types, is
// moda_ext/functional/checks.py; these checks guard direct callers of torch.ops.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "ops/checks.h"

namespace moda_ext {

struct ModularAttentionInputs {
  const char* op;  // the operator that was called, for errors
  Tensor query, key, value, key_modality;
  std::optional<Tensor> modality_bias, sink;
  // Present: packed layout (tokens, heads, ...), else (batch, heads, tokens, ...).
  std::optional<Tensor> cu_seqlens_q, cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
  int64_t num_modalities;
  bool is_causal;
  double scale;

  bool packed() const { return cu_seqlens_q.has_value(); }
};

struct ModularAttentionShape {
  int64_t batch;  // 1 in the packed layout
  int64_t query_heads, kv_heads;
  int64_t num_queries, num_keys;  // rows of the tensors: totals in the packed layout
  int64_t head_dim, num_views;    // num_views 1: one query serves all key modalities
  int64_t num_modalities;
  bool packed;

  // (batch, heads, queries), or (queries, heads) when packed: one number for each row.
  std::vector<int64_t> rows() const;
  std::vector<int64_t> out() const;
  std::vector<int64_t> mass() const;
};

// Throws std::invalid_argument, naming operator and argument.
ModularAttentionShape check_modular_attention(const ModularAttentionInputs& inputs);

// What a forward makes. lse is rounded; lse + lse_residual is what it was before. The backward needs both: beside a
// bias of 1e9 a float has no room for the logarithm of a sum.
struct ModularAttentionOutputs {
  Tensor out, lse, mass, lse_residual;
};

// What a backward receives beside the inputs.
struct ModularAttentionSaved {
  std::optional<Tensor> grad_out, grad_lse, grad_mass;
  Tensor out, lse, mass, lse_residual;
  bool whole_rows = true;  // false: those of rows that see more keys than the inputs have
};
// What it makes. What is not needed has no elements.
struct ModularAttentionGradients {
  Tensor query, key, value, bias, sink;
};

// check_modular_attention for what a backward receives beside the inputs.
void check_modular_attention_saved(const ModularAttentionInputs& inputs, const ModularAttentionShape& shape,
                                   const ModularAttentionSaved& saved);

}  // namespace moda_ext
