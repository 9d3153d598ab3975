// Launches the CPU kernels of the Gram family: modality_gram, causal_gram_projection and duplex_query_views.
//
// A causal operator has one work item for each (batch, key head), which walks along its sequence; modality_gram also
// cuts the sequence. How many pieces there are depends on shapes alone, and pieces are summed in order: results do not
// depend on threads.
#include "cpu/gram_family_launch.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/launch.h"
#include "ops/gram_family_operators.h"

namespace moda_ext {
namespace cpu {
namespace {

// Pieces of modality_gram that are wanted at least, and the fewest keys that are worth a Gram matrix of their own.
constexpr int64_t kGramItems = 16;
constexpr int64_t kGramKeys = 512;
// Results beyond this do not stay in a second-level cache until they are read.
constexpr int64_t kCachedBytes = int64_t{8} << 20;

// Tile instructions work on 32 rows at a time: for fewer rows per key head (decoding) most of that would be padding.
constexpr int64_t kTileRowsWanted = 64;

const void* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
Input rows(const Tensor& tensor) { return input(tensor, false, Last::kPresent); }
Output rows_out(const Tensor& tensor) { return output(tensor, false, Last::kPresent); }

template <class T>
void add_condition_of(const CausalGramArgs& args, const Input& bias, const Input& condition, const Output& sum,
                      int64_t batch, int64_t kv_head) {
  for (int64_t head = kv_head * args.group; head < (kv_head + 1) * args.group; ++head)
    for (int64_t i = 0; i < args.num_queries; ++i) {
      const auto row = [&](const auto& operand, int64_t h) {
        return operand.batch * batch + operand.head * h + operand.row * i;
      };
      T* out = static_cast<T*>(sum.data) + row(sum, head);
      const T* factor = static_cast<const T*>(condition.data) + row(condition, head);
      const T* scale = static_cast<const T*>(args.row_scale.data) + row(args.row_scale, kv_head);
      const T* added = bias.data == nullptr ? nullptr : static_cast<const T*>(bias.data) + row(bias, head);
      for (int m = 0; m < args.num_modalities; ++m) {
        const T indicator = out[m * sum.last] * scale[m * args.row_scale.last];
        const T conditioned = factor[m * condition.last] * indicator;
        out[m * sum.last] = added == nullptr ? conditioned : added[m * bias.last] + conditioned;
      }
    }
}

}  // namespace

void add_condition(const GramFamilyKernels& kernels, const CausalGramArgs& args, const Input& bias,
                   const Input& condition, const Output& sum, int64_t batch, int64_t kv_head) {
  const auto add = kernels.compute_bytes == sizeof(double) ? add_condition_of<double> : add_condition_of<float>;
  add(args, bias, condition, sum, batch, kv_head);
}

const GramFamilyKernels& select_gram_family_kernels(const Tensor& key, [[maybe_unused]] int64_t rows_per_key_head) {
  const Storage storage = storage_of(key.scalar_type());
#if defined(MODA_EXT_AMX_ISA)
  if (active_isa() == Isa::amx && storage != Storage::kFloat64 && rows_per_key_head >= kTileRowsWanted)
    return gram_family_kernels_amx(storage);
#endif
  return MODA_EXT_VECTOR_ISA(gram_family_kernels)(storage);
}

void check_ids(const char* op, const char* argument, const Tensor& modality, int64_t num_modalities) {
  const int32_t* ids = static_cast<const int32_t*>(modality.const_data_ptr());
  for (int64_t b = 0; b < modality.size(0); ++b)
    for (int64_t j = 0; j < modality.size(1); ++j) {
      const int32_t id = ids[b * modality.stride(0) + j * modality.stride(1)];
      if (id < -1 || id >= num_modalities)
        throw std::invalid_argument(std::string(op) + ": " + argument + " holds " + std::to_string(id) + " at key " +
                                    std::to_string(j) + "; expected ids in [0, " + std::to_string(num_modalities) +
                                    "), or -1 for padding");
    }
}

void fill_args(const GramInputs& in, const GramShape& shape, GramArgs& args) {
  args.head_dim = static_cast<int>(shape.head_dim);
  args.num_modalities = static_cast<int>(shape.num_modalities);
  args.unit_keys = in.unit_keys;
  args.eps = in.eps;
  args.kv_heads = shape.kv_heads;
  args.num_keys = shape.num_keys;
  args.key = rows(in.key);
  args.modality = static_cast<const int32_t*>(in.modality.const_data_ptr());
  args.modality_batch = in.modality.stride(0);
  args.modality_token = in.modality.stride(1);
}

void fill_args(const CausalGramInputs& in, const GramShape& shape, CausalGramArgs& args) {
  fill_args(static_cast<const GramInputs&>(in), shape, args);
  args.group = static_cast<int>(shape.kv_heads > 0 ? shape.query_heads / shape.kv_heads : 1);
  args.num_queries = shape.num_queries;
  args.query = rows(in.query);
  args.row_scale = rows(in.row_scale);
  args.initial = data(in.initial);
}

void fill_args(const DuplexWeights& weights, const GramShape& shape, DuplexArgs& args) {
  args.rank = static_cast<int>(shape.rank);
  args.a1 = weights.a1.const_data_ptr();
  args.b1 = weights.b1.const_data_ptr();
  args.a2 = weights.a2.const_data_ptr();
  args.b2 = weights.b2.const_data_ptr();
}

void fill_args(const DuplexQueryViewsInputs& in, const GramShape& shape, DuplexArgs& args) {
  fill_args(static_cast<const CausalGramInputs&>(in), shape, args);
  fill_args(static_cast<const DuplexWeights&>(in), shape, args);
}

namespace {

// work(batch, kv_head, scratch) for every key head.
template <class Work>
void run_heads(const GramShape& shape, int64_t scratch_bytes, const Work& work) {
  const int64_t heads = shape.batch * shape.kv_heads;
  const Scratch scratch(scratch_bytes, threads_for(heads));
  run_items(heads, [&](int64_t item, int64_t thread) {
    work(item / shape.kv_heads, item % shape.kv_heads, scratch.of(thread));
  });
}

// The largest scratch that any batch element needs: what is logged for it depends on its modalities.
template <class Bytes>
int64_t largest(int64_t batch, const Bytes& bytes) {
  int64_t most = 0;
  for (int64_t b = 0; b < batch; ++b) most = std::max(most, bytes(b));
  return most;
}

bool nontemporal(const Tensor& result) {
  return result.numel() * static_cast<int64_t>(result.element_size()) > kCachedBytes;
}

struct CpuGramFamily : CpuResults {
  static void check(const ArgumentCheck& check, const GramInputs& in) {
    check_ids(check.op(), in.modality_argument, in.modality, in.num_modalities);
  }

  static void modality_gram(const GramInputs& in, const GramShape& shape, const Tensor& gram) {
    const int64_t heads = shape.batch * shape.kv_heads;
    if (heads == 0) return;
    GramArgs args;
    fill_args(in, shape, args);
    const GramFamilyKernels& kernels = select_gram_family_kernels(in.key, shape.num_keys);

    const int64_t wanted = std::max(kGramItems, 2 * num_threads());
    const int64_t pieces = std::max<int64_t>(1, std::min((wanted + heads - 1) / heads, shape.num_keys / kGramKeys));
    const int64_t chunks = (shape.num_keys + kernels.chunk - 1) / kernels.chunk;
    const int64_t gram_bytes = shape.num_modalities * shape.head_dim * shape.head_dim * kernels.compute_bytes;
    const Workspace partials(pieces > 1 ? heads * pieces * gram_bytes : 0);
    const auto destination = [&](int64_t head, int64_t piece) -> void* {
      if (pieces > 1) return partials.at((head * pieces + piece) * gram_bytes);
      return static_cast<char*>(gram.mutable_data_ptr()) + head * gram_bytes;
    };
    const int64_t threads = threads_for(heads * pieces);
    const Scratch scratch(kernels.modality_gram_scratch_bytes(args), threads);
    const auto sum_piece = [&](int64_t index, int64_t thread) {
      const int64_t head = index / pieces, piece = index % pieces;
      const auto bound = [&](int64_t p) { return std::min(shape.num_keys, chunks * p / pieces * kernels.chunk); };
      const ModalityGramItem item{head / shape.kv_heads, head % shape.kv_heads, bound(piece), bound(piece + 1),
                                  destination(head, piece)};
      kernels.modality_gram(args, item, scratch.of(thread));
    };
    const auto add_pieces = [&](int64_t head, int64_t) {
      std::vector<void*> parts;
      for (int64_t piece = 0; piece < pieces; ++piece) parts.push_back(destination(head, piece));
      kernels.reduce_grams(args, parts.data(), static_cast<int>(pieces),
                           static_cast<char*>(gram.mutable_data_ptr()) + head * gram_bytes);
    };
    run_phases(threads, {{heads * pieces, sum_piece}, {pieces > 1 ? heads : 0, add_pieces}});
  }

  static void modality_gram_backward(const GramInputs& in, const GramShape& shape, const Tensor& grad_gram,
                                     const Tensor& grad_key) {
    ModalityGramBackwardArgs args;
    fill_args(in, shape, args);
    args.grad_gram = grad_gram.const_data_ptr();
    args.grad_key = rows_out(grad_key);
    const GramFamilyKernels& kernels = select_gram_family_kernels(in.key, 0);
    run_heads(shape, kernels.modality_gram_scratch_bytes(args), [&](int64_t batch, int64_t head, void* scratch) {
      kernels.modality_gram_backward(args, batch, head, scratch);
    });
  }

  static void causal_gram_projection(const CausalGramInputs& in, const GramShape& shape, const Tensor& projection,
                                     const Tensor& gram) {
    CausalGramProjectionForwardArgs args;
    fill_args(in, shape, args);
    args.projection = rows_out(projection);
    args.gram = gram.mutable_data_ptr();
    const GramFamilyKernels& kernels = select_gram_family_kernels(in.key, 0);
    run_heads(shape, kernels.causal_gram_projection_scratch_bytes(args),
              [&](int64_t batch, int64_t head, void* scratch) {
                kernels.causal_gram_projection(args, batch, head, scratch);
              });
  }

  static void causal_gram_projection_backward(const CausalGramInputs& in, const GramShape& shape,
                                              const Tensor& grad_projection, const std::optional<Tensor>& grad_gram,
                                              const CausalGramResults& results) {
    CausalGramProjectionBackwardArgs args;
    fill_args(in, shape, args);
    args.grad_projection = rows(grad_projection);
    fill_gradients(in, grad_gram, results, args);
    const GramFamilyKernels& kernels = select_gram_family_kernels(in.key, 0);
    const int64_t scratch_bytes =
        largest(shape.batch, [&](int64_t b) { return kernels.causal_gram_projection_backward_scratch_bytes(args, b); });
    run_heads(shape, scratch_bytes, [&](int64_t batch, int64_t head, void* scratch) {
      kernels.causal_gram_projection_backward(args, batch, head, scratch);
    });
  }

  static void duplex_query_views(const DuplexQueryViewsInputs& in, const GramShape& shape, const Tensor& views,
                                 const Tensor* indicator, const Tensor* gram) {
    DuplexQueryViewsForwardArgs args;
    fill_args(in, shape, args);
    args.views = rows_out(views);
    args.nontemporal = nontemporal(views);
    if (indicator != nullptr) args.indicator = rows_out(*indicator);
    if (gram != nullptr) args.gram = gram->mutable_data_ptr();
    const GramFamilyKernels& kernels = select_gram_family_kernels(in.key, args.num_queries * args.group);
    const PackedWeights weights(kernels, args);
    run_heads(shape, kernels.duplex_query_views_scratch_bytes(args), [&](int64_t batch, int64_t head, void* scratch) {
      kernels.duplex_query_views(args, batch, head, scratch);
    });
  }

  static void duplex_query_views_backward(const DuplexQueryViewsInputs& in, const GramShape& shape,
                                          const Tensor& grad_views, const Tensor& indicator,
                                          const std::optional<Tensor>& grad_indicator,
                                          const std::optional<Tensor>& grad_gram,
                                          const DuplexQueryViewsResults& results) {
    DuplexQueryViewsBackwardArgs args;
    fill_args(in, shape, args);
    args.grad_views = rows(grad_views);
    if (grad_indicator) {
      args.indicator = rows(indicator);
      args.grad_indicator = rows(*grad_indicator);
    }
    fill_gradients(in, grad_gram, results, args);
    const GramFamilyKernels& kernels = select_gram_family_kernels(in.key, args.num_queries * args.group);
    const PackedWeights weights(kernels, args);
    const int64_t heads = shape.batch * shape.kv_heads;
    const int64_t partial_bytes = weight_gradient_elements(args) * kernels.compute_bytes;
    const Workspace partials(heads * partial_bytes);
    const int64_t scratch_bytes =
        largest(shape.batch, [&](int64_t b) { return kernels.duplex_query_views_backward_scratch_bytes(args, b); });
    run_heads(shape, scratch_bytes, [&](int64_t batch, int64_t head, void* scratch) {
      kernels.duplex_query_views_backward(args, batch, head,
                                          partials.at((batch * shape.kv_heads + head) * partial_bytes), scratch);
    });
    kernels.reduce_weight_gradients(args, partials.at(), heads, results.grad_a1.mutable_data_ptr(),
                                    results.grad_b1.mutable_data_ptr(), results.grad_a2.mutable_data_ptr(),
                                    results.grad_b2.mutable_data_ptr());
  }

 private:
  template <class Args>
  static void fill_gradients(const CausalGramInputs& in, const std::optional<Tensor>& grad_gram,
                             const CausalGramResults& results, Args& args) {
    args.grad_gram = data(grad_gram);
    args.grad_query = rows_out(results.grad_query);
    args.grad_key = rows_out(results.grad_key);
    args.grad_row_scale = rows_out(results.grad_row_scale);
    args.grad_initial = in.initial ? results.grad_initial.mutable_data_ptr() : nullptr;
  }
};

// ------------------------------------------------------------------------------------------------------------------
// duplex_aligned_keys

Tensor duplex_aligned_keys(const Tensor& key, const Tensor& modality, const std::optional<Tensor>& include,
                           const Tensor& a1, const Tensor& b1, const Tensor& a2, const Tensor& b2,
                           int64_t num_modalities, bool unit_keys, double eps, int64_t normalization) {
  const ArgumentCheck check("duplex_aligned_keys");
  const DuplexAlignedKeysInputs in{
      {key, modality, num_modalities, unit_keys, eps}, {a1, b1, a2, b2}, include, normalization};
  const GramShape shape = check_duplex_aligned_keys(check, in);
  CpuGramFamily::check(check, in);
  const Tensor aligned = CpuGramFamily::result_like(key, shape.key());
  DuplexAlignedKeysArgs args;
  fill_args(static_cast<const GramInputs&>(in), shape, args);
  fill_args(static_cast<const DuplexWeights&>(in), shape, args);
  args.normalization = static_cast<Normalization>(normalization);
  args.aligned = rows_out(aligned);
  args.nontemporal = nontemporal(aligned);
  args.members = args.modality;
  args.members_batch = args.modality_batch;
  args.members_token = args.modality_token;
  const Workspace counted(include ? shape.batch * shape.num_keys * static_cast<int64_t>(sizeof(int32_t)) : 0);
  if (include) {
    int32_t* ids = reinterpret_cast<int32_t*>(counted.at());
    const bool* counts = static_cast<const bool*>(include->const_data_ptr());
    for (int64_t b = 0; b < shape.batch; ++b)
      for (int64_t j = 0; j < shape.num_keys; ++j)
        ids[b * shape.num_keys + j] = counts[b * include->stride(0) + j * include->stride(1)]
                                          ? args.members[b * args.members_batch + j * args.members_token]
                                          : -1;
    args.modality = ids;
    args.modality_batch = shape.num_keys;
    args.modality_token = 1;
  }
  const GramFamilyKernels& kernels = select_gram_family_kernels(key, shape.num_keys);
  const PackedWeights weights(kernels, args);
  const int64_t heads = shape.batch * shape.kv_heads;
  const Scratch scratch(kernels.duplex_aligned_keys_scratch_bytes(args), threads_for(heads));
  std::vector<int64_t> batch_before(num_threads(), -1);
  run_items(heads, [&](int64_t item, int64_t thread) {
    const int64_t batch = item / shape.kv_heads;
    kernels.duplex_aligned_keys(args, {batch, item % shape.kv_heads, batch_before[thread]}, scratch.of(thread));
    batch_before[thread] = batch;
  });
  return aligned;
}

}  // namespace
}  // namespace cpu
}  // namespace moda_ext

STABLE_TORCH_LIBRARY_IMPL(moda_ext, CPU, m) {
  moda_ext::GramFamilyOperators<moda_ext::cpu::CpuGramFamily>::implement(m);
  m.impl("duplex_aligned_keys", TORCH_BOX(&moda_ext::cpu::duplex_aligned_keys));
}
