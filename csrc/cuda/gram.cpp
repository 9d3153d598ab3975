// CUDA adapter of the alignment operators, as cuda/modular_attention.cpp. Ids out of range count as padding: looking at
// them would make the host wait.
#include "cuda/gram.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/adapter.h"
#include "ops/gram.h"
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

void fill_args(const CausalInputs& in, const GramShape& shape, const Tensor& key, const Tensor& query,
               CausalArgs& args) {
  fill_args(in, shape, key, args);
  args.query_heads = static_cast<int>(shape.query_heads);
  args.num_queries = static_cast<int>(shape.num_queries);
  args.rows_per_batch = shape.num_queries;
  args.query = rows(query);
  args.row_scale = rows(in.row_scale);
  args.initial = numbers(in.initial);
}

void fill_args(const DuplexInputs& in, const GramShape& shape, const Tensor& key, const Tensor& query,
               DuplexArgs& args) {
  fill_args(static_cast<const CausalInputs&>(in), shape, key, query, args);
  args.rank = static_cast<int>(shape.rank);
  args.a1 = weights(in.a1);
  args.b1 = weights(in.b1);
  args.a2 = weights(in.a2);
  args.b2 = weights(in.b2);
}

Tensor like(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  return empty_in_layout_of(tensor, sizes, false);
}
Tensor gradient_like(const Tensor& tensor) { return like(tensor, {tensor.sizes().begin(), tensor.sizes().end()}); }

// Launches kernels that need no more than their arguments and a workspace.
template <template <int> class Kernels, class Args>
void run(const Tensor& key, const Args& args, Storage storage) {
  with_kernels<Kernels>(args.head_dim, [&](auto kernels) {
    const Tensor workspace = new_workspace(key, kernels.workspace(args, storage));
    kernels.run(args, storage, workspace.mutable_data_ptr(), current_stream(key.get_device_index()));
  });
}

Tensor modality_gram(const Tensor& key, const Tensor& modality, int64_t num_modalities, bool unit_keys, double eps) {
  const ArgumentCheck check("modality_gram");
  const GramInputs in{key, modality, num_modalities, unit_keys, eps};
  const GramShape shape = check_gram(check, in);
  const Storage storage = storage_of(check, "key", key);
  const Tensor gram = empty_sums(key, shape.gram());
  if (gram.numel() == 0) return gram;
  const int32_t device = key.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor aligned = with_aligned_rows(key);
  ModalityGramArgs args;
  fill_args(in, shape, aligned, args);
  args.gram = numbers(gram);
  with_kernels<ModalityGramKernels>(shape.head_dim, [&](auto kernels) {
    const int multiprocessors = multiprocessor_count(device);
    const Tensor workspace = new_workspace(key, kernels.workspace(args, storage, multiprocessors));
    kernels.run(args, storage, multiprocessors, workspace.mutable_data_ptr(), current_stream(device));
  });
  return gram;
}

Tensor modality_gram_backward(const Tensor& grad_gram, const Tensor& key, const Tensor& modality,
                              int64_t num_modalities, bool unit_keys, double eps) {
  const ArgumentCheck check("modality_gram_backward");
  const GramInputs in{key, modality, num_modalities, unit_keys, eps};
  const GramShape shape = check_gram(check, in);
  const Storage storage = storage_of(check, "key", key);
  check_tensor(check, in, "grad_gram", grad_gram, shape.gram(), Numbers::kContiguousSums);
  const Tensor grad_key = gradient_like(key);
  if (grad_key.numel() == 0) return grad_key;
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  const Tensor aligned = with_aligned_rows(key);
  ModalityGramBackwardArgs args;
  fill_args(in, shape, aligned, args);
  args.grad_gram = static_cast<const float*>(grad_gram.const_data_ptr());
  args.grad_key = rows_out(grad_key);
  run<ModalityGramBackwardKernels>(key, args, storage);
  return grad_key;
}

std::tuple<Tensor, Tensor> causal_gram_projection(const Tensor& query, const Tensor& key, const Tensor& key_modality,
                                                  const Tensor& row_scale, const std::optional<Tensor>& initial,
                                                  int64_t num_modalities, bool unit_keys, double eps) {
  const ArgumentCheck check("causal_gram_projection");
  const CausalInputs in{{key, key_modality, num_modalities, unit_keys, eps}, query, row_scale, initial};
  const GramShape shape = check_causal(check, in);
  const Storage storage = storage_of(check, "key", key);
  const Tensor projection = like(query, shape.views());
  const Tensor gram = empty_sums(key, shape.gram());
  if (gram.numel() == 0) return {projection, gram};
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  const Tensor aligned_key = with_aligned_rows(key), aligned_query = with_aligned_rows(query);
  ProjectionArgs args;
  fill_args(in, shape, aligned_key, aligned_query, args);
  args.projection = rows_out(projection);
  args.gram = numbers(gram);
  run<ProjectionKernels>(key, args, storage);
  return {projection, gram};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_gram_projection_backward(
    const Tensor& grad_projection, const std::optional<Tensor>& grad_gram, const Tensor& query, const Tensor& key,
    const Tensor& key_modality, const Tensor& row_scale, const std::optional<Tensor>& initial, int64_t num_modalities,
    bool unit_keys, double eps) {
  const ArgumentCheck check("causal_gram_projection_backward");
  const CausalInputs in{{key, key_modality, num_modalities, unit_keys, eps}, query, row_scale, initial};
  const GramShape shape = check_causal(check, in);
  const Storage storage = storage_of(check, "key", key);
  check_tensor(check, in, "grad_projection", grad_projection, shape.views(), Numbers::kStored);
  if (grad_gram) check_tensor(check, in, "grad_gram", *grad_gram, shape.gram(), Numbers::kContiguousSums);
  const Tensor grad_query = gradient_like(query), grad_key = gradient_like(key);
  const Tensor grad_scale = empty_sums(key, shape.row_scale());
  const Tensor grad_initial = empty_sums(key, shape.gram(), initial.has_value());
  if (shape.batch * shape.kv_heads == 0) return {grad_query, grad_key, grad_scale, grad_initial};
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  const Tensor aligned_key = with_aligned_rows(key), aligned_query = with_aligned_rows(query);
  const Tensor aligned_grad = with_aligned_rows(grad_projection);
  ProjectionBackwardArgs args;
  fill_args(in, shape, aligned_key, aligned_query, args);
  args.grad_projection = rows(aligned_grad);
  args.grad_gram = numbers(grad_gram);
  args.grad_query = rows_out(grad_query);
  args.grad_key = rows_out(grad_key);
  args.grad_row_scale = rows_out(grad_scale);
  args.grad_initial = initial ? numbers(grad_initial) : nullptr;
  run<ProjectionBackwardKernels>(key, args, storage);
  return {grad_query, grad_key, grad_scale, grad_initial};
}

std::tuple<Tensor, Tensor, Tensor> duplex_query_views(const Tensor& query, const Tensor& key,
                                                      const Tensor& key_modality, const Tensor& row_scale,
                                                      const Tensor& a1, const Tensor& b1, const Tensor& a2,
                                                      const Tensor& b2, const std::optional<Tensor>& initial,
                                                      int64_t num_modalities, bool unit_keys, double eps,
                                                      bool with_indicator, bool with_gram) {
  const ArgumentCheck check("duplex_query_views");
  const DuplexInputs in{
      {{key, key_modality, num_modalities, unit_keys, eps}, query, row_scale, initial}, a1, b1, a2, b2};
  const GramShape shape = check_duplex(check, in);
  const Storage storage = storage_of(check, "key", key);
  const Tensor views = like(query, shape.views());
  const Tensor indicator = empty_sums(key, shape.indicator(), with_indicator);
  const Tensor gram = empty_sums(key, shape.gram(), with_gram);
  if (shape.batch * shape.kv_heads == 0) return {views, indicator, gram};
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  const Tensor aligned_key = with_aligned_rows(key), aligned_query = with_aligned_rows(query);
  DuplexForwardArgs args;
  fill_args(in, shape, aligned_key, aligned_query, args);
  args.views = rows_out(views);
  if (with_indicator) args.indicator = rows_out(indicator);
  if (with_gram) args.gram = numbers(gram);
  run<DuplexKernels>(key, args, storage);
  return {views, indicator, gram};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> duplex_query_views_backward(
    const Tensor& grad_views, const std::optional<Tensor>& grad_indicator, const std::optional<Tensor>& grad_gram,
    const Tensor& query, const Tensor& key, const Tensor& key_modality, const Tensor& row_scale, const Tensor& a1,
    const Tensor& b1, const Tensor& a2, const Tensor& b2, const std::optional<Tensor>& initial, const Tensor& indicator,
    int64_t num_modalities, bool unit_keys, double eps) {
  const ArgumentCheck check("duplex_query_views_backward");
  const DuplexInputs in{
      {{key, key_modality, num_modalities, unit_keys, eps}, query, row_scale, initial}, a1, b1, a2, b2};
  const GramShape shape = check_duplex(check, in);
  const Storage storage = storage_of(check, "key", key);
  check_tensor(check, in, "grad_views", grad_views, shape.views(), Numbers::kStored);
  if (grad_indicator) {
    check_tensor(check, in, "grad_indicator", *grad_indicator, shape.indicator(), Numbers::kSums);
    check_tensor(check, in, "indicator", indicator, shape.indicator(), Numbers::kSums);
  }
  if (grad_gram) check_tensor(check, in, "grad_gram", *grad_gram, shape.gram(), Numbers::kContiguousSums);
  const Tensor grad_query = gradient_like(query), grad_key = gradient_like(key);
  const Tensor grad_scale = empty_sums(key, shape.row_scale());
  const Tensor grad_a1 = empty_sums(key, shape.down()), grad_b1 = empty_sums(key, shape.up());
  const Tensor grad_a2 = empty_sums(key, shape.down()), grad_b2 = empty_sums(key, shape.up());
  const Tensor grad_initial = empty_sums(key, shape.gram(), initial.has_value());
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  const Tensor aligned_key = with_aligned_rows(key), aligned_query = with_aligned_rows(query);
  const Tensor aligned_grad = with_aligned_rows(grad_views);
  DuplexBackwardArgs args;
  fill_args(in, shape, aligned_key, aligned_query, args);
  args.grad_views = rows(aligned_grad);
  if (grad_indicator) {
    args.indicator = rows(indicator);
    args.grad_indicator = rows(*grad_indicator);
  }
  args.grad_gram = numbers(grad_gram);
  args.grad_query = rows_out(grad_query);
  args.grad_key = rows_out(grad_key);
  args.grad_row_scale = rows_out(grad_scale);
  args.grad_a1 = numbers(grad_a1);
  args.grad_b1 = numbers(grad_b1);
  args.grad_a2 = numbers(grad_a2);
  args.grad_b2 = numbers(grad_b2);
  args.grad_initial = initial ? numbers(grad_initial) : nullptr;
  run<DuplexBackwardKernels>(key, args, storage);  // the weights have a gradient, zero, also where nothing else does
  return {grad_query, grad_key, grad_scale, grad_a1, grad_b1, grad_a2, grad_b2, grad_initial};
}

}  // namespace
}  // namespace cuda
}  // namespace moda_ext

STABLE_TORCH_LIBRARY_IMPL(moda_ext, CUDA, m) {
  m.impl("modality_gram", TORCH_BOX(&moda_ext::cuda::modality_gram));
  m.impl("modality_gram_backward", TORCH_BOX(&moda_ext::cuda::modality_gram_backward));
  m.impl("causal_gram_projection", TORCH_BOX(&moda_ext::cuda::causal_gram_projection));
  m.impl("causal_gram_projection_backward", TORCH_BOX(&moda_ext::cuda::causal_gram_projection_backward));
  m.impl("duplex_query_views", TORCH_BOX(&moda_ext::cuda::duplex_query_views));
  m.impl("duplex_query_views_backward", TORCH_BOX(&moda_ext::cuda::duplex_query_views_backward));
}
