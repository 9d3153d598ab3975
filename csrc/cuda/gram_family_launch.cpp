// Launches the CUDA kernels of the Gram family, as cuda/modular_attention_launch.cpp. Ids out of range count as
// padding: looking at them would make the host wait.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "cuda/gram_family_kernels.h"
#include "cuda/launch.h"
#include "ops/gram_family_operators.h"
#include "ops/operands.h"

namespace moda_ext {
namespace cuda {
namespace {

const float* numbers(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}
const float* weights(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
Input rows(const Tensor& tensor) { return input(tensor, false, Last::kPresent); }
Output rows_out(const Tensor& tensor) { return output(tensor, false, Last::kPresent); }
float* numbers(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// `key`: the inputs' key with aligned rows.
void fill_args(const GramInputs& in, const GramShape& shape, const Tensor& key, GramArgs& args) {
  args.head_dim = static_cast<int>(shape.head_dim);
  args.num_modalities = static_cast<int>(shape.num_modalities);
  args.kv_heads = static_cast<int>(shape.kv_heads);
  args.num_sequences = static_cast<int>(shape.batch);
  args.num_keys = static_cast<int>(shape.num_keys);
  args.total_keys = shape.num_keys;
  args.key_modality = static_cast<const int32_t*>(in.modality.const_data_ptr());
  args.modality_batch = in.modality.stride(0);
  args.modality_row = in.modality.stride(1);
  args.key = rows(key);
  args.unit_keys = in.unit_keys;
  args.eps = std::max(static_cast<float>(in.eps), std::numeric_limits<float>::min());  // 1 / eps has to be finite
}

void fill_args(const CausalGramInputs& in, const GramShape& shape, const Tensor& key, const Tensor& query,
               CausalGramArgs& args) {
  fill_args(in, shape, key, args);
  args.query_heads = static_cast<int>(shape.query_heads);
  args.num_queries = static_cast<int>(shape.num_queries);
  args.rows_per_batch = shape.num_queries;
  args.query = rows(query);
  args.row_scale = rows(in.row_scale);
  args.initial = numbers(in.initial);
}

void fill_args(const DuplexQueryViewsInputs& in, const GramShape& shape, const Tensor& key, const Tensor& query,
               DuplexArgs& args) {
  fill_args(static_cast<const CausalGramInputs&>(in), shape, key, query, args);
  args.rank = static_cast<int>(shape.rank);
  args.a1 = weights(in.a1);
  args.b1 = weights(in.b1);
  args.a2 = weights(in.a2);
  args.b2 = weights(in.b2);
}

// Launches kernels that need no more than their arguments and a workspace.
template <template <int> class Kernels, class Args>
void run(const Tensor& key, const Args& args) {
  const Storage storage = storage_of(key.scalar_type());
  const int32_t device = key.get_device_index();
  with_kernels<Kernels>(compute_capability(device), args.head_dim, [&](auto kernels) {
    const Tensor workspace = new_workspace(key, kernels.workspace(args, storage));
    kernels.run(args, storage, workspace.mutable_data_ptr(), current_stream(device));
  });
}

void fill_gradients(const CausalGramInputs& in, const std::optional<Tensor>& grad_gram,
                    const CausalGramResults& results, CausalGramGradients& args) {
  args.grad_gram = numbers(grad_gram);
  args.grad_query = rows_out(results.grad_query);
  args.grad_key = rows_out(results.grad_key);
  args.grad_row_scale = rows_out(results.grad_row_scale);
  args.grad_initial = in.initial ? numbers(results.grad_initial) : nullptr;
}

struct CudaGramFamily : CudaResults {
  using DeviceGuard = torch::stable::accelerator::DeviceGuard;

  static void check(const ArgumentCheck& check, const GramInputs& in) { check_dtype(check, "key", in.key); }

  static void modality_gram(const GramInputs& in, const GramShape& shape, const Tensor& gram) {
    if (gram.numel() == 0) return;
    const int32_t device = in.key.get_device_index();
    const DeviceGuard guard(device);
    const Tensor key = with_aligned_rows(in.key);
    ModalityGramArgs args;
    fill_args(in, shape, key, args);
    args.gram = numbers(gram);
    const Storage storage = storage_of(key.scalar_type());
    with_kernels<sm80::ModalityGramForwardKernels>(compute_capability(device), shape.head_dim, [&](auto kernels) {
      const int multiprocessors = multiprocessor_count(device);
      const Tensor workspace = new_workspace(key, kernels.workspace(args, storage, multiprocessors));
      kernels.run(args, storage, multiprocessors, workspace.mutable_data_ptr(), current_stream(device));
    });
  }

  static void modality_gram_backward(const GramInputs& in, const GramShape& shape, const Tensor& grad_gram,
                                     const Tensor& grad_key) {
    if (grad_key.numel() == 0) return;
    const DeviceGuard guard(in.key.get_device_index());
    const Tensor key = with_aligned_rows(in.key);
    ModalityGramBackwardArgs args;
    fill_args(in, shape, key, args);
    args.grad_gram = weights(grad_gram);
    args.grad_key = rows_out(grad_key);
    run<sm80::ModalityGramBackwardKernels>(key, args);
  }

  static void causal_gram_projection(const CausalGramInputs& in, const GramShape& shape, const Tensor& projection,
                                     const Tensor& gram) {
    if (gram.numel() == 0) return;
    const DeviceGuard guard(in.key.get_device_index());
    const Tensor key = with_aligned_rows(in.key), query = with_aligned_rows(in.query);
    CausalGramProjectionForwardArgs args;
    fill_args(in, shape, key, query, args);
    args.projection = rows_out(projection);
    args.gram = numbers(gram);
    run<sm80::CausalGramProjectionForwardKernels>(key, args);
  }

  static void causal_gram_projection_backward(const CausalGramInputs& in, const GramShape& shape,
                                              const Tensor& grad_projection, const std::optional<Tensor>& grad_gram,
                                              const CausalGramResults& results) {
    if (shape.batch * shape.kv_heads == 0) return;
    const DeviceGuard guard(in.key.get_device_index());
    const Tensor key = with_aligned_rows(in.key), query = with_aligned_rows(in.query);
    const Tensor grad = with_aligned_rows(grad_projection);
    CausalGramProjectionBackwardArgs args;
    fill_args(in, shape, key, query, args);
    args.grad_projection = rows(grad);
    fill_gradients(in, grad_gram, results, args);
    run<sm80::CausalGramProjectionBackwardKernels>(key, args);
  }

  static void duplex_query_views(const DuplexQueryViewsInputs& in, const GramShape& shape, const Tensor& views,
                                 const Tensor* indicator, const Tensor* gram) {
    if (shape.batch * shape.kv_heads == 0) return;
    const DeviceGuard guard(in.key.get_device_index());
    const Tensor key = with_aligned_rows(in.key), query = with_aligned_rows(in.query);
    DuplexQueryViewsForwardArgs args;
    fill_args(in, shape, key, query, args);
    args.views = rows_out(views);
    if (indicator != nullptr) args.indicator = rows_out(*indicator);
    if (gram != nullptr) args.gram = numbers(*gram);
    run<sm80::DuplexQueryViewsForwardKernels>(key, args);
  }

  // Also of an empty batch: the weights have a gradient then, zero.
  static void duplex_query_views_backward(const DuplexQueryViewsInputs& in, const GramShape& shape,
                                          const Tensor& grad_views, const Tensor& indicator,
                                          const std::optional<Tensor>& grad_indicator,
                                          const std::optional<Tensor>& grad_gram,
                                          const DuplexQueryViewsResults& results) {
    const DeviceGuard guard(in.key.get_device_index());
    const Tensor key = with_aligned_rows(in.key), query = with_aligned_rows(in.query);
    const Tensor grad = with_aligned_rows(grad_views);
    DuplexQueryViewsBackwardArgs args;
    fill_args(in, shape, key, query, args);
    args.grad_views = rows(grad);
    if (grad_indicator) {
      args.indicator = rows(indicator);
      args.grad_indicator = rows(*grad_indicator);
    }
    fill_gradients(in, grad_gram, results, args);
    args.grad_a1 = numbers(results.grad_a1);
    args.grad_b1 = numbers(results.grad_b1);
    args.grad_a2 = numbers(results.grad_a2);
    args.grad_b2 = numbers(results.grad_b2);
    run<sm80::DuplexQueryViewsBackwardKernels>(key, args);
  }
};

}  // namespace
}  // namespace cuda
}  // namespace moda_ext

STABLE_TORCH_LIBRARY_IMPL(moda_ext, CUDA, m) {
  moda_ext::GramFamilyOperators<moda_ext::cuda::CudaGramFamily>::implement(m);
}
