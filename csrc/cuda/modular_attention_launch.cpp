// Launches the CUDA kernels of modular_attention: tensors to device pointers, workspace from torch's allocator,
// launches on the current stream of the query's device. Nothing here reads device memory or waits for the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/launch.h"
#include "cuda/modular_attention_kernels.h"
#include "ops/modular_attention_operators.h"
#include "ops/operands.h"

namespace moda_ext {
namespace cuda {
namespace {

// The tensors that kernels read, kept alive for as long as the arguments point into them.
struct Operands {
  Tensor query, key, value;
  std::optional<Tensor> cu_seqlens_q, cu_seqlens_k;

  explicit Operands(const ModularAttentionInputs& in)
      : query(with_aligned_rows(in.query)), key(with_aligned_rows(in.key)), value(with_aligned_rows(in.value)) {
    if (!in.packed()) return;
    cu_seqlens_q = torch::stable::contiguous(*in.cu_seqlens_q);
    cu_seqlens_k = torch::stable::contiguous(*in.cu_seqlens_k);
  }

  void fill(const ModularAttentionInputs& in, const ModularAttentionShape& shape, int64_t max_seqlen_q,
            int64_t max_seqlen_k, ModularAttentionArgs& args) const {
    const bool packed = in.packed();
    args.head_dim = static_cast<int>(shape.head_dim);
    args.num_modalities = static_cast<int>(in.num_modalities);
    args.num_views = static_cast<int>(shape.num_views);
    args.query_heads = static_cast<int>(shape.query_heads);
    args.kv_heads = static_cast<int>(shape.kv_heads);
    args.causal = in.is_causal;
    args.scale = static_cast<float>(in.scale);
    args.num_sequences = static_cast<int>(packed ? cu_seqlens_q->size(0) - 1 : shape.batch);
    args.num_queries = static_cast<int>(packed ? max_seqlen_q : shape.num_queries);
    args.num_keys = static_cast<int>(packed ? max_seqlen_k : shape.num_keys);
    args.rows_per_batch = shape.num_queries;
    args.total_keys = shape.num_keys;
    if (packed) {
      args.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q->const_data_ptr());
      args.cu_seqlens_k = static_cast<const int32_t*>(cu_seqlens_k->const_data_ptr());
    }
    args.key_modality = static_cast<const int32_t*>(in.key_modality.const_data_ptr());
    args.modality_batch = packed ? 0 : in.key_modality.stride(0);
    args.modality_row = in.key_modality.stride(in.key_modality.dim() - 1);
    args.query = input(query, packed, Last::kPresent);
    args.key = input(key, packed, Last::kPresent);
    args.value = input(value, packed, Last::kPresent);
    args.bias = input(in.modality_bias, packed, Last::kPresent);
    args.sink = input(in.sink, packed, Last::kNone);
  }
};

ModularAttentionOutputs forward(const ModularAttentionInputs& in, int64_t max_seqlen_q, int64_t max_seqlen_k) {
  const ModularAttentionShape shape = check_modular_attention(in);
  check_dtype(ArgumentCheck(in.op), "query", in.query);
  const Storage storage = storage_of(in.query.scalar_type());
  const ModularAttentionOutputs outputs = empty_outputs(in, shape);
  if (outputs.lse.numel() == 0) return outputs;

  const int32_t device = in.query.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Operands operands(in);
  ModularAttentionForwardArgs args;
  operands.fill(in, shape, max_seqlen_q, max_seqlen_k, args);
  args.out = output(outputs.out, in.packed(), Last::kPresent);
  args.lse = output(outputs.lse, in.packed(), Last::kNone);
  args.mass = output(outputs.mass, in.packed(), Last::kPresent);
  args.lse_residual = output(outputs.lse_residual, in.packed(), Last::kNone);
  with_kernels<ModularAttentionForwardKernels>(shape.head_dim, [&](auto kernels) {
    const int multiprocessors = multiprocessor_count(device);
    const Tensor workspace = new_workspace(in.query, kernels.workspace(args, storage, multiprocessors));
    kernels.run(args, storage, multiprocessors, workspace.mutable_data_ptr(), current_stream(device));
  });
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const ModularAttentionInputs& in,
                                                            const ModularAttentionSaved& saved,
                                                            const ModularAttentionNeeds& needs, int64_t max_seqlen_q,
                                                            int64_t max_seqlen_k) {
  const ModularAttentionShape shape = check_modular_attention(in);
  check_dtype(ArgumentCheck(in.op), "query", in.query);
  const Storage storage = storage_of(in.query.scalar_type());
  check_modular_attention_saved(in, shape, saved);
  const bool packed = in.packed();
  const int32_t device = in.query.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);

  const Operands operands(in);
  ModularAttentionBackwardArgs args;
  operands.fill(in, shape, max_seqlen_q, max_seqlen_k, args);
  const Tensor out = with_aligned_rows(saved.out);
  args.saved_out = input(out, packed, Last::kPresent);
  args.saved_lse = input(saved.lse, packed, Last::kNone);
  args.saved_mass = input(saved.mass, packed, Last::kPresent);
  args.saved_lse_residual = input(saved.lse_residual, packed, Last::kNone);
  std::optional<Tensor> grad_out;
  if (saved.grad_out) grad_out = with_aligned_rows(*saved.grad_out);
  args.grad_out = input(grad_out, packed, Last::kPresent);
  args.grad_lse = input(saved.grad_lse, packed, Last::kNone);
  args.grad_mass = input(saved.grad_mass, packed, Last::kPresent);

  const auto gradient_like = [&](const Tensor& tensor, bool needed, Output& target) {
    if (!needed) return torch::stable::new_empty(tensor, {0});
    Tensor gradient = empty_in_layout_of(tensor, {tensor.sizes().begin(), tensor.sizes().end()}, packed);
    target = output(gradient, packed, Last::kPresent);
    return gradient;
  };
  const Tensor grad_query = gradient_like(in.query, needs.query, args.grad_query);
  const Tensor grad_key = gradient_like(in.key, needs.key, args.grad_key);
  const Tensor grad_value = gradient_like(in.value, needs.value, args.grad_value);
  const auto row_gradient = [&](const Tensor& like, bool needed, Last last, Output& target) {
    if (!needed) return torch::stable::new_empty(like, {0});
    Tensor gradient = torch::stable::new_empty(like, {like.sizes().begin(), like.sizes().end()});
    target = output(gradient, packed, last);
    return gradient;
  };
  const Tensor grad_bias = row_gradient(saved.mass, needs.bias && in.modality_bias, Last::kPresent, args.grad_bias);
  const Tensor grad_sink = row_gradient(saved.lse, needs.sink && in.sink, Last::kNone, args.grad_sink);

  if (shape.query_heads > 0 && args.num_sequences > 0) {
    with_kernels<ModularAttentionBackwardKernels>(shape.head_dim, [&](auto kernels) {
      const Tensor workspace = new_workspace(in.query, kernels.workspace(args, storage));
      kernels.run(args, storage, workspace.mutable_data_ptr(), current_stream(device));
    });
  }
  return {grad_query, grad_key, grad_value, grad_bias, grad_sink};
}

}  // namespace
}  // namespace cuda
}  // namespace moda_ext

STABLE_TORCH_LIBRARY_IMPL(moda_ext, CUDA, m) {
  moda_ext::ModularAttentionOperators<&moda_ext::cuda::forward, &moda_ext::cuda::backward>::implement(m);
}
