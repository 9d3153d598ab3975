// Launches the CUDA kernels of modular_attention: tensors to device pointers, workspace from torch's allocator,
// launches on the current stream of the query's device. Nothing here reads device memory or waits for the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>

#include "cuda/launch.h"
#include "cuda/modular_attention_kernels.h"
#include "ops/modular_attention_operators.h"
#include "ops/operands.h"

namespace moda_ext {
namespace cuda {
namespace {

// The inputs as kernels read them.
ModularAttentionInputs aligned(const ModularAttentionInputs& inputs) {
  ModularAttentionInputs in = inputs;
  for (Tensor* tensor : {&in.query, &in.key, &in.value}) *tensor = with_aligned_rows(*tensor);
  for (std::optional<Tensor>* offsets : {&in.cu_seqlens_q, &in.cu_seqlens_k})
    if (*offsets) *offsets = torch::stable::contiguous(**offsets);
  return in;
}

void fill_args(const ModularAttentionInputs& in, const ModularAttentionShape& shape, ModularAttentionArgs& args) {
  set_inputs(in, shape, args);
  args.query_heads = static_cast<int>(shape.query_heads);
  args.kv_heads = static_cast<int>(shape.kv_heads);
  args.num_sequences = static_cast<int>(shape.batch);
  args.num_queries = static_cast<int>(shape.num_queries);
  args.num_keys = static_cast<int>(shape.num_keys);
  args.rows_per_batch = shape.num_queries;
  args.total_keys = shape.num_keys;
  args.key_modality = static_cast<const int32_t*>(in.key_modality.const_data_ptr());
  args.modality_batch = shape.packed ? 0 : in.key_modality.stride(0);
  args.modality_row = in.key_modality.stride(in.key_modality.dim() - 1);
  if (!shape.packed) return;
  args.num_sequences = static_cast<int>(in.cu_seqlens_q->size(0) - 1);
  args.num_queries = static_cast<int>(in.max_seqlen_q);
  args.num_keys = static_cast<int>(in.max_seqlen_k);
  args.cu_seqlens_q = static_cast<const int32_t*>(in.cu_seqlens_q->const_data_ptr());
  args.cu_seqlens_k = static_cast<const int32_t*>(in.cu_seqlens_k->const_data_ptr());
}

struct CudaModularAttention : CudaResults {
  static void check(const ArgumentCheck& check, const ModularAttentionInputs& in, const ModularAttentionShape&) {
    check_dtype(check, "query", in.query);
  }

  static void modular_attention(const ModularAttentionInputs& inputs, const ModularAttentionShape& shape,
                                const ModularAttentionOutputs& outputs) {
    if (outputs.lse.numel() == 0) return;
    const int32_t device = inputs.query.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const ModularAttentionInputs in = aligned(inputs);
    ModularAttentionForwardArgs args;
    fill_args(in, shape, args);
    set_outputs(outputs, shape, args);
    const Storage storage = storage_of(in.query.scalar_type());
    with_kernels<sm80::ModularAttentionForwardKernels>(compute_capability(device), shape.head_dim, [&](auto kernels) {
      const int multiprocessors = multiprocessor_count(device);
      const Tensor workspace = new_workspace(in.query, kernels.workspace(args, storage, multiprocessors));
      kernels.run(args, storage, multiprocessors, workspace.mutable_data_ptr(), current_stream(device));
    });
  }

  static void modular_attention_backward(const ModularAttentionInputs& inputs, const ModularAttentionShape& shape,
                                         const ModularAttentionSaved& saved,
                                         const ModularAttentionGradients& gradients) {
    const int32_t device = inputs.query.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const ModularAttentionInputs in = aligned(inputs);
    ModularAttentionBackwardArgs args;
    fill_args(in, shape, args);
    if (args.query_heads == 0 || args.num_sequences == 0) return;
    ModularAttentionSaved read = saved;
    read.out = with_aligned_rows(saved.out);
    if (saved.grad_out) read.grad_out = with_aligned_rows(*saved.grad_out);
    set_gradients(read, gradients, shape, args);
    const Storage storage = storage_of(in.query.scalar_type());
    with_kernels<sm80::ModularAttentionBackwardKernels>(compute_capability(device), shape.head_dim, [&](auto kernels) {
      const Tensor workspace = new_workspace(in.query, kernels.workspace(args, storage));
      kernels.run(args, storage, workspace.mutable_data_ptr(), current_stream(device));
    });
  }
};

}  // namespace
}  // namespace cuda
}  // namespace moda_ext

STABLE_TORCH_LIBRARY_IMPL(moda_ext, CUDA, m) {
  moda_ext::ModularAttentionOperators<moda_ext::cuda::CudaModularAttention>::implement(m);
}
