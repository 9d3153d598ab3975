// The operators of the Gram family as the dispatcher calls them, for every device: arguments are checked and results
// allocated here. A device is a struct of static functions that fill them in; it implements all operators with
// GramFamilyOperators<Device>::implement.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "ops/gram_family_checks.h"

namespace moda_ext {

// What a causal backward pass makes. `initial` has no elements where there was no initial Gram.
struct CausalGramResults {
  Tensor grad_query, grad_key, grad_row_scale, grad_initial;
};
struct DuplexQueryViewsResults : CausalGramResults {
  Tensor grad_a1, grad_b1, grad_a2, grad_b2;
};

template <class Device>
struct GramFamilyOperators {
  static Tensor modality_gram(const Tensor& key, const Tensor& modality, int64_t num_modalities, bool unit_keys,
                              double eps) {
    const ArgumentCheck check("modality_gram");
    const GramInputs in{key, modality, num_modalities, unit_keys, eps};
    const GramShape shape = check_gram(check, in);
    Device::check(check, in);
    const Tensor gram = empty_sums(key, shape.gram());
    Device::modality_gram(in, shape, gram);
    return gram;
  }

  static Tensor modality_gram_backward(const Tensor& grad_gram, const Tensor& key, const Tensor& modality,
                                       int64_t num_modalities, bool unit_keys, double eps) {
    const ArgumentCheck check("modality_gram_backward");
    const GramInputs in{key, modality, num_modalities, unit_keys, eps};
    const GramShape shape = check_gram(check, in);
    Device::check(check, in);
    check_tensor(check, in, "grad_gram", grad_gram, shape.gram(), Numbers::kContiguousSums);
    const Tensor grad_key = Device::result_like(key, shape.key());
    Device::modality_gram_backward(in, shape, grad_gram, grad_key);
    return grad_key;
  }

  static std::tuple<Tensor, Tensor> causal_gram_projection(const Tensor& query, const Tensor& key,
                                                           const Tensor& key_modality, const Tensor& row_scale,
                                                           const std::optional<Tensor>& initial, int64_t num_modalities,
                                                           bool unit_keys, double eps) {
    const ArgumentCheck check("causal_gram_projection");
    const CausalGramInputs in{
        {key, key_modality, num_modalities, unit_keys, eps, "key", "key_modality"}, query, row_scale, initial};
    const GramShape shape = check_causal_gram(check, in);
    Device::check(check, in);
    const Tensor projection = Device::result_like(query, shape.views());
    const Tensor gram = empty_sums(key, shape.gram());
    Device::causal_gram_projection(in, shape, projection, gram);
    return {projection, gram};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> causal_gram_projection_backward(
      const Tensor& grad_projection, const std::optional<Tensor>& grad_gram, const Tensor& query, const Tensor& key,
      const Tensor& key_modality, const Tensor& row_scale, const std::optional<Tensor>& initial, int64_t num_modalities,
      bool unit_keys, double eps) {
    const ArgumentCheck check("causal_gram_projection_backward");
    const CausalGramInputs in{
        {key, key_modality, num_modalities, unit_keys, eps, "key", "key_modality"}, query, row_scale, initial};
    const GramShape shape = check_causal_gram(check, in);
    Device::check(check, in);
    check_gradients(check, in, shape, "grad_projection", grad_projection, grad_gram);
    const CausalGramResults results = gradients(in, shape);
    Device::causal_gram_projection_backward(in, shape, grad_projection, grad_gram, results);
    return {results.grad_query, results.grad_key, results.grad_row_scale, results.grad_initial};
  }

  static std::tuple<Tensor, Tensor, Tensor> duplex_query_views(const Tensor& query, const Tensor& key,
                                                               const Tensor& key_modality, const Tensor& row_scale,
                                                               const Tensor& a1, const Tensor& b1, const Tensor& a2,
                                                               const Tensor& b2, const std::optional<Tensor>& initial,
                                                               int64_t num_modalities, bool unit_keys, double eps,
                                                               bool with_indicator, bool with_gram) {
    const ArgumentCheck check("duplex_query_views");
    const DuplexQueryViewsInputs in{
        {{key, key_modality, num_modalities, unit_keys, eps, "key", "key_modality"}, query, row_scale, initial},
        {a1, b1, a2, b2}};
    const GramShape shape = check_duplex_query_views(check, in);
    Device::check(check, in);
    const Tensor views = Device::result_like(query, shape.views());
    const Tensor indicator = empty_sums(key, shape.indicator(), with_indicator);
    const Tensor gram = empty_sums(key, shape.gram(), with_gram);
    Device::duplex_query_views(in, shape, views, with_indicator ? &indicator : nullptr, with_gram ? &gram : nullptr);
    return {views, indicator, gram};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> duplex_query_views_backward(
      const Tensor& grad_views, const std::optional<Tensor>& grad_indicator, const std::optional<Tensor>& grad_gram,
      const Tensor& query, const Tensor& key, const Tensor& key_modality, const Tensor& row_scale, const Tensor& a1,
      const Tensor& b1, const Tensor& a2, const Tensor& b2, const std::optional<Tensor>& initial,
      const Tensor& indicator, int64_t num_modalities, bool unit_keys, double eps) {
    const ArgumentCheck check("duplex_query_views_backward");
    const DuplexQueryViewsInputs in{
        {{key, key_modality, num_modalities, unit_keys, eps, "key", "key_modality"}, query, row_scale, initial},
        {a1, b1, a2, b2}};
    const GramShape shape = check_duplex_query_views(check, in);
    Device::check(check, in);
    check_gradients(check, in, shape, "grad_views", grad_views, grad_gram);
    if (grad_indicator) {
      check_tensor(check, in, "grad_indicator", *grad_indicator, shape.indicator(), Numbers::kSums);
      check_tensor(check, in, "indicator", indicator, shape.indicator(), Numbers::kSums);
    }
    const DuplexQueryViewsResults results{gradients(in, shape), empty_sums(key, shape.down()),
                                          empty_sums(key, shape.up()), empty_sums(key, shape.down()),
                                          empty_sums(key, shape.up())};
    Device::duplex_query_views_backward(in, shape, grad_views, indicator, grad_indicator, grad_gram, results);
    return {results.grad_query, results.grad_key, results.grad_row_scale, results.grad_a1,
            results.grad_b1,    results.grad_a2,  results.grad_b2,        results.grad_initial};
  }

  // m: of STABLE_TORCH_LIBRARY_IMPL(moda_ext, <DEVICE>, m)
  template <class Library>
  static void implement(Library& m) {
    m.impl("modality_gram", TORCH_BOX(&modality_gram));
    m.impl("modality_gram_backward", TORCH_BOX(&modality_gram_backward));
    m.impl("causal_gram_projection", TORCH_BOX(&causal_gram_projection));
    m.impl("causal_gram_projection_backward", TORCH_BOX(&causal_gram_projection_backward));
    m.impl("duplex_query_views", TORCH_BOX(&duplex_query_views));
    m.impl("duplex_query_views_backward", TORCH_BOX(&duplex_query_views_backward));
  }

 private:
  static void check_gradients(const ArgumentCheck& check, const CausalGramInputs& in, const GramShape& shape,
                              const char* name, const Tensor& grad_views, const std::optional<Tensor>& grad_gram) {
    check_tensor(check, in, name, grad_views, shape.views(), Numbers::kStored);
    if (grad_gram) check_tensor(check, in, "grad_gram", *grad_gram, shape.gram(), Numbers::kContiguousSums);
  }
  static CausalGramResults gradients(const CausalGramInputs& in, const GramShape& shape) {
    return {Device::result_like(in.query, shape.query()), Device::result_like(in.key, shape.key()),
            empty_sums(in.key, shape.row_scale()), empty_sums(in.key, shape.gram(), in.initial.has_value())};
  }
};

}  // namespace moda_ext
