// The operators of modular_attention as the dispatcher calls them, for every device: a device gives `forward` and
// `backward` on ModularAttentionInputs, and implements all four with them.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/modular_attention_checks.h"

namespace moda_ext {

template <auto forward, auto backward>
struct ModularAttentionOperators {
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  static Results modular_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const Tensor& key_modality, const std::optional<Tensor>& modality_bias,
                                   const std::optional<Tensor>& sink, int64_t num_modalities, bool is_causal,
                                   double scale) {
    return results(forward({"modular_attention",
                            query,
                            key,
                            value,
                            key_modality,
                            modality_bias,
                            sink,
                            {},
                            {},
                            num_modalities,
                            is_causal,
                            scale},
                           0, 0));
  }

  static Gradients modular_attention_backward(
      const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_lse,
      const std::optional<Tensor>& grad_mass, const Tensor& query, const Tensor& key, const Tensor& value,
      const Tensor& key_modality, const std::optional<Tensor>& modality_bias, const std::optional<Tensor>& sink,
      const Tensor& out, const Tensor& lse, const Tensor& mass, const Tensor& lse_residual, int64_t num_modalities,
      bool is_causal, double scale, bool need_query, bool need_key, bool need_value, bool need_bias, bool need_sink) {
    return backward({"modular_attention_backward",
                     query,
                     key,
                     value,
                     key_modality,
                     modality_bias,
                     sink,
                     {},
                     {},
                     num_modalities,
                     is_causal,
                     scale},
                    {grad_out, grad_lse, grad_mass, out, lse, mass, lse_residual},
                    {need_query, need_key, need_value, need_bias, need_sink}, 0, 0);
  }

  static Results modular_attention_varlen(const Tensor& query, const Tensor& key, const Tensor& value,
                                          const Tensor& key_modality, const Tensor& cu_seqlens_q,
                                          const Tensor& cu_seqlens_k, const std::optional<Tensor>& modality_bias,
                                          const std::optional<Tensor>& sink, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                          int64_t num_modalities, bool is_causal, double scale) {
    return results(forward({"modular_attention_varlen", query, key, value, key_modality, modality_bias, sink,
                            cu_seqlens_q, cu_seqlens_k, num_modalities, is_causal, scale},
                           max_seqlen_q, max_seqlen_k));
  }

  static Gradients modular_attention_varlen_backward(
      const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_lse,
      const std::optional<Tensor>& grad_mass, const Tensor& query, const Tensor& key, const Tensor& value,
      const Tensor& key_modality, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
      const std::optional<Tensor>& modality_bias, const std::optional<Tensor>& sink, const Tensor& out,
      const Tensor& lse, const Tensor& mass, const Tensor& lse_residual, int64_t max_seqlen_q, int64_t max_seqlen_k,
      int64_t num_modalities, bool is_causal, double scale, bool need_query, bool need_key, bool need_value,
      bool need_bias, bool need_sink) {
    return backward({"modular_attention_varlen_backward", query, key, value, key_modality, modality_bias, sink,
                     cu_seqlens_q, cu_seqlens_k, num_modalities, is_causal, scale},
                    {grad_out, grad_lse, grad_mass, out, lse, mass, lse_residual},
                    {need_query, need_key, need_value, need_bias, need_sink}, max_seqlen_q, max_seqlen_k);
  }

  // m: of STABLE_TORCH_LIBRARY_IMPL(moda_ext, <DEVICE>, m)
  template <class Library>
  static void implement(Library& m) {
    m.impl("modular_attention", TORCH_BOX(&modular_attention));
    m.impl("modular_attention_backward", TORCH_BOX(&modular_attention_backward));
    m.impl("modular_attention_varlen", TORCH_BOX(&modular_attention_varlen));
    m.impl("modular_attention_varlen_backward", TORCH_BOX(&modular_attention_varlen_backward));
  }

 private:
  static Results results(const ModularAttentionOutputs& made) {
    return {made.out, made.lse, made.mass, made.lse_residual};
  }
};

}  // namespace moda_ext
