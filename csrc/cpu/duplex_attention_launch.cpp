// Launches the CPU kernels of duplex_attention: duplex_query_views and modular_attention in one pass, number for number
// the same as both. The views, num_modalities times the query, are by far the largest tensor of the two: writing them
// into fresh memory takes as long as computing them. Here a few key heads have theirs at a time, all in the same
// memory.
#include <torch/csrc/stable/library.h>

#include "cpu/gram_family_launch.h"
#include "cpu/launch.h"
#include "cpu/modular_attention_launch.h"

namespace moda_ext {
namespace cpu {
namespace {

class DuplexQueryViews : public QueryViews {
 public:
  DuplexQueryViews(const DuplexQueryViewsInputs& in, const GramShape& shape, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& condition, const Output& conditioned_bias)
      : kernels_(select_gram_family_kernels(
            in.key, shape.kv_heads > 0 ? shape.num_queries * (shape.query_heads / shape.kv_heads) : 0)),
        element_(static_cast<int64_t>(in.query.element_size())),
        args_(arguments(in, shape)),
        weights_(kernels_, args_),
        bias_(input(bias, false, Last::kPresent)),
        condition_(input(condition, false, Last::kPresent)) {
    args_.nontemporal = true;  // those of a key head are several megabytes; stores through the caches measured slower
    args_.indicator = conditioned_bias;
  }

  int64_t bytes_per_head() const override {
    return element_ * args_.num_modalities * args_.group * args_.num_queries * args_.head_dim;
  }

  int64_t scratch_bytes() const override { return kernels_.duplex_query_views_scratch_bytes(args_); }

  Input place(int64_t first, int64_t count, char* memory) override {
    // As if all key heads of the batch were there, of which only these are: (view, head, row).
    Output& views = args_.views;
    views.row = args_.head_dim;
    views.head = args_.num_queries * args_.head_dim;
    views.batch = views.head * args_.group * args_.kv_heads;
    views.view = views.head * args_.group * count;
    views.data = memory - element_ * views.head * args_.group * first;
    return read_from(views);
  }

  void make(int64_t item, void* scratch) const override {
    const int64_t batch = item / args_.kv_heads, head = item % args_.kv_heads;
    kernels_.duplex_query_views(args_, batch, head, scratch);
    if (args_.indicator.data != nullptr)
      add_condition(kernels_, args_, bias_, condition_, args_.indicator, batch, head);
  }

 private:
  static DuplexQueryViewsForwardArgs arguments(const DuplexQueryViewsInputs& in, const GramShape& shape) {
    DuplexQueryViewsForwardArgs args;
    fill_args(in, shape, args);
    return args;
  }

  const GramFamilyKernels& kernels_;
  const int64_t element_;
  DuplexQueryViewsForwardArgs args_;
  const PackedWeights weights_;
  const Input bias_, condition_;
};

std::tuple<Tensor, Tensor, Tensor> duplex_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_modality, const Tensor& new_key,
    const Tensor& new_modality, const Tensor& row_scale, const Tensor& a1, const Tensor& b1, const Tensor& a2,
    const Tensor& b2, const std::optional<Tensor>& initial, const std::optional<Tensor>& modality_bias,
    const std::optional<Tensor>& condition, const std::optional<Tensor>& sink, int64_t num_modalities, bool unit_keys,
    double eps, double scale) {
  const ArgumentCheck check("duplex_attention");
  const bool same = new_modality.const_data_ptr() == key_modality.const_data_ptr();  // as where nobody gives new ones
  const DuplexQueryViewsInputs in{{{new_key, new_modality, num_modalities, unit_keys, eps, same ? "key" : "new_key",
                                    same ? "key_modality" : "new_modality"},
                                   query,
                                   row_scale,
                                   initial},
                                  {a1, b1, a2, b2}};
  const GramShape shape = check_duplex_query_views(check, in);
  check.require(key.dim() == 4 && key.size(1) == shape.kv_heads, "key", "as many heads as new_key has", key);
  check_ids(check.op(), in.modality_argument, new_modality, num_modalities);
  const auto attend = [&](const std::optional<Tensor>& bias, const Output& conditioned_bias) {
    DuplexQueryViews views(in, shape, modality_bias, condition, conditioned_bias);
    const ModularAttentionOutputs made = forward_with_views(
        {check.op(), query, key, value, key_modality, bias, sink, {}, {}, 0, 0, num_modalities, true, scale}, views);
    return std::tuple{made.out, made.lse, made.mass};
  };
  if (!condition) return attend(modality_bias, {});
  check_tensor(check, in, "condition", *condition, shape.indicator(), Numbers::kSums);
  if (modality_bias) check_tensor(check, in, "modality_bias", *modality_bias, shape.indicator(), Numbers::kSums);
  const Tensor bias = empty_sums(new_key, shape.indicator());
  return attend(bias, output(bias, false, Last::kPresent));
}

}  // namespace
}  // namespace cpu
}  // namespace moda_ext

STABLE_TORCH_LIBRARY_IMPL(moda_ext, CPU, m) { m.impl("duplex_attention", TORCH_BOX(&moda_ext::cpu::duplex_attention)); }
