// The operators of modular_attention as the dispatcher calls them, for every device: arguments are checked and results
// allocated here. A device is a struct of static functions that fill them in, as in gram_family_operators.h.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/modular_attention_checks.h"
#include "ops/operands.h"

namespace moda_ext {

template <class Device>
ModularAttentionOutputs empty_outputs(const ModularAttentionInputs& in, const ModularAttentionShape& shape) {
  return {Device::result_like(in.query, shape.out(), shape.packed), empty_sums(in.query, shape.rows()),
          empty_sums(in.query, shape.mass()), empty_sums(in.query, shape.rows())};
}

// What the argument structs of all devices have in common.
template <class Args>
void set_inputs(const ModularAttentionInputs& in, const ModularAttentionShape& shape, Args& args) {
  args.head_dim = static_cast<int>(shape.head_dim);
  args.num_modalities = static_cast<int>(shape.num_modalities);
  args.num_views = static_cast<int>(shape.num_views);
  args.causal = in.is_causal;
  args.scale = static_cast<decltype(args.scale)>(in.scale);
  args.query = input(in.query, shape.packed, Last::kPresent);
  args.key = input(in.key, shape.packed, Last::kPresent);
  args.value = input(in.value, shape.packed, Last::kPresent);
  args.bias = input(in.modality_bias, shape.packed, Last::kPresent);
  args.sink = input(in.sink, shape.packed, Last::kNone);
}
template <class Args>
void set_outputs(const ModularAttentionOutputs& outputs, const ModularAttentionShape& shape, Args& args) {
  args.out = output(outputs.out, shape.packed, Last::kPresent);
  args.lse = output(outputs.lse, shape.packed, Last::kNone);
  args.mass = output(outputs.mass, shape.packed, Last::kPresent);
  args.lse_residual = output(outputs.lse_residual, shape.packed, Last::kNone);
}
template <class Args>
void set_gradients(const ModularAttentionSaved& saved, const ModularAttentionGradients& gradients,
                   const ModularAttentionShape& shape, Args& args) {
  args.whole_rows = saved.whole_rows;
  args.saved_out = input(saved.out, shape.packed, Last::kPresent);
  args.saved_lse = input(saved.lse, shape.packed, Last::kNone);
  args.saved_mass = input(saved.mass, shape.packed, Last::kPresent);
  args.saved_lse_residual = input(saved.lse_residual, shape.packed, Last::kNone);
  args.grad_out = input(saved.grad_out, shape.packed, Last::kPresent);
  args.grad_lse = input(saved.grad_lse, shape.packed, Last::kNone);
  args.grad_mass = input(saved.grad_mass, shape.packed, Last::kPresent);
  args.grad_query = wanted_output(gradients.query, shape.packed, Last::kPresent);
  args.grad_key = wanted_output(gradients.key, shape.packed, Last::kPresent);
  args.grad_value = wanted_output(gradients.value, shape.packed, Last::kPresent);
  args.grad_bias = wanted_output(gradients.bias, shape.packed, Last::kPresent);
  args.grad_sink = wanted_output(gradients.sink, shape.packed, Last::kNone);
}

template <class Device>
struct ModularAttentionOperators {
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  static Results modular_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const Tensor& key_modality, const std::optional<Tensor>& modality_bias,
                                   const std::optional<Tensor>& sink, int64_t num_modalities, bool is_causal,
                                   double scale) {
    return forward({"modular_attention",
                    query,
                    key,
                    value,
                    key_modality,
                    modality_bias,
                    sink,
                    {},
                    {},
                    0,
                    0,
                    num_modalities,
                    is_causal,
                    scale});
  }

  static Gradients modular_attention_backward(
      const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_lse,
      const std::optional<Tensor>& grad_mass, const Tensor& query, const Tensor& key, const Tensor& value,
      const Tensor& key_modality, const std::optional<Tensor>& modality_bias, const std::optional<Tensor>& sink,
      const Tensor& out, const Tensor& lse, const Tensor& mass, const Tensor& lse_residual, int64_t num_modalities,
      bool is_causal, double scale, bool need_query, bool need_key, bool need_value, bool need_modality_bias,
      bool need_sink, bool whole_rows) {
    return backward({"modular_attention_backward",
                     query,
                     key,
                     value,
                     key_modality,
                     modality_bias,
                     sink,
                     {},
                     {},
                     0,
                     0,
                     num_modalities,
                     is_causal,
                     scale},
                    {grad_out, grad_lse, grad_mass, out, lse, mass, lse_residual, whole_rows},
                    {need_query, need_key, need_value, need_modality_bias, need_sink});
  }

  static Results modular_attention_varlen(const Tensor& query, const Tensor& key, const Tensor& value,
                                          const Tensor& key_modality, const Tensor& cu_seqlens_q,
                                          const Tensor& cu_seqlens_k, const std::optional<Tensor>& modality_bias,
                                          const std::optional<Tensor>& sink, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                          int64_t num_modalities, bool is_causal, double scale) {
    return forward({"modular_attention_varlen", query, key, value, key_modality, modality_bias, sink, cu_seqlens_q,
                    cu_seqlens_k, max_seqlen_q, max_seqlen_k, num_modalities, is_causal, scale});
  }

  static Gradients modular_attention_varlen_backward(
      const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_lse,
      const std::optional<Tensor>& grad_mass, const Tensor& query, const Tensor& key, const Tensor& value,
      const Tensor& key_modality, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
      const std::optional<Tensor>& modality_bias, const std::optional<Tensor>& sink, const Tensor& out,
      const Tensor& lse, const Tensor& mass, const Tensor& lse_residual, int64_t max_seqlen_q, int64_t max_seqlen_k,
      int64_t num_modalities, bool is_causal, double scale, bool need_query, bool need_key, bool need_value,
      bool need_modality_bias, bool need_sink) {
    return backward({"modular_attention_varlen_backward", query, key, value, key_modality, modality_bias, sink,
                     cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, num_modalities, is_causal, scale},
                    {grad_out, grad_lse, grad_mass, out, lse, mass, lse_residual},
                    {need_query, need_key, need_value, need_modality_bias, need_sink});
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
  struct Needs {
    bool query, key, value, bias, sink;
  };

  static Results forward(const ModularAttentionInputs& in) {
    const ModularAttentionShape shape = check_modular_attention(in);
    Device::check(ArgumentCheck(in.op), in, shape);
    const ModularAttentionOutputs made = empty_outputs<Device>(in, shape);
    Device::modular_attention(in, shape, made);
    return {made.out, made.lse, made.mass, made.lse_residual};
  }

  static Gradients backward(const ModularAttentionInputs& in, const ModularAttentionSaved& saved, const Needs& needs) {
    const ModularAttentionShape shape = check_modular_attention(in);
    Device::check(ArgumentCheck(in.op), in, shape);
    check_modular_attention_saved(in, shape, saved);
    const auto like = [&](const Tensor& tensor, bool needed) {
      if (!needed) return torch::stable::new_empty(tensor, {0});
      return Device::result_like(tensor, {tensor.sizes().begin(), tensor.sizes().end()}, shape.packed);
    };
    const ModularAttentionGradients made{like(in.query, needs.query), like(in.key, needs.key),
                                         like(in.value, needs.value),
                                         empty_sums(in.query, shape.mass(), needs.bias && in.modality_bias),
                                         empty_sums(in.query, shape.rows(), needs.sink && in.sink)};
    Device::modular_attention_backward(in, shape, saved, made);
    return {made.query, made.key, made.value, made.bias, made.sink};
  }
};

}  // namespace moda_ext
