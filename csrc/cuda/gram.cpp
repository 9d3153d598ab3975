// CUDA adapter of the alignment operators, as cuda/modular_attention.cpp. Ids out of range count as padding: looking at
// them would make the host wait.
#include "cuda/gram.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "cuda/adapter.h"
#include "ops/gram.h"
#include "ops/operands.h"

namespace moda_ext {
namespace cuda {
namespace {

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
  args.eps = static_cast<float>(in.eps);
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
  const Tensor grad_key = empty_in_layout_of(key, {key.sizes().begin(), key.sizes().end()}, false);
  if (grad_key.numel() == 0) return grad_key;
  const int32_t device = key.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor aligned = with_aligned_rows(key);
  ModalityGramBackwardArgs args;
  fill_args(in, shape, aligned, args);
  args.grad_gram = static_cast<const float*>(grad_gram.const_data_ptr());
  args.grad_key = rows_out(grad_key);
  with_kernels<ModalityGramBackwardKernels>(shape.head_dim, [&](auto kernels) {
    const Tensor workspace = new_workspace(key, kernels.workspace(args, storage));
    kernels.run(args, storage, workspace.mutable_data_ptr(), current_stream(device));
  });
  return grad_key;
}

}  // namespace
}  // namespace cuda
}  // namespace moda_ext

STABLE_TORCH_LIBRARY_IMPL(moda_ext, CUDA, m) {
  m.impl("modality_gram", TORCH_BOX(&moda_ext::cuda::modality_gram));
  m.impl("modality_gram_backward", TORCH_BOX(&moda_ext::cuda::modality_gram_backward));
}
