#include "ops/gram_family_checks.h"

namespace moda_ext {

void check_tensor(const ArgumentCheck& check, const GramInputs& in, const char* name, const Tensor& tensor,
                  const std::vector<int64_t>& sizes, Numbers numbers) {
  const ScalarType dtype = in.key.scalar_type();
  check.sizes(name, tensor, sizes);
  check.dtype(name, tensor, numbers == Numbers::kStored ? dtype : compute_dtype(dtype));
  check.device(name, tensor, in.key);
  if (numbers == Numbers::kStored) check.contiguous_last(name, tensor);
  if (numbers == Numbers::kContiguousSums)
    check.require(tensor.is_contiguous(), name, "a contiguous tensor", "strides");
}

GramShape check_gram(const ArgumentCheck& check, const GramInputs& in) {
  check.require(in.key.dim() == 4, in.key_argument, "4 dimensions", in.key);
  check.require(in.num_modalities >= 1 && in.num_modalities <= 16, "num_modalities", "1 to 16", in.num_modalities);
  check.head_size(in.key_argument, in.key);
  check.floating(in.key_argument, in.key);
  check.contiguous_last(in.key_argument, in.key);
  GramShape shape{};
  shape.batch = in.key.size(0);
  shape.kv_heads = in.key.size(1);
  shape.num_keys = in.key.size(2);
  shape.head_dim = in.key.size(3);
  shape.num_modalities = in.num_modalities;
  check.sizes(in.modality_argument, in.modality, {shape.batch, shape.num_keys});
  check.dtype(in.modality_argument, in.modality, ScalarType::Int);
  check.device(in.modality_argument, in.modality, in.key);
  return shape;
}

GramShape check_causal_gram(const ArgumentCheck& check, const CausalGramInputs& in) {
  GramShape shape = check_gram(check, in);
  check.require(in.query.dim() == 4, "query", "4 dimensions", in.query);
  shape.query_heads = in.query.size(1);
  shape.num_queries = in.query.size(2);
  check.require(shape.kv_heads > 0 ? shape.query_heads % shape.kv_heads == 0 : shape.query_heads == 0, in.key_argument,
                "a number of heads that divides query's", in.key);
  check.require(shape.num_queries <= shape.num_keys, in.key_argument, "at least as many tokens as query has", in.key);
  check_tensor(check, in, "query", in.query, shape.query(), Numbers::kStored);
  check_tensor(check, in, "row_scale", in.row_scale, shape.row_scale(), Numbers::kSums);
  if (in.initial) check_tensor(check, in, "initial", *in.initial, shape.gram(), Numbers::kContiguousSums);
  return shape;
}

int64_t check_weights(const ArgumentCheck& check, const GramInputs& in, const DuplexWeights& weights,
                      int64_t head_dim) {
  check.require(weights.a1.dim() == 3, "a1", "3 dimensions", weights.a1);
  GramShape shape{};
  shape.num_modalities = in.num_modalities;
  shape.head_dim = head_dim;
  shape.rank = weights.a1.size(2);
  check.require(shape.rank >= 1 && shape.rank <= kMaxRank, "a1", "a rank of 1 to 128", weights.a1);
  check_tensor(check, in, "a1", weights.a1, shape.down(), Numbers::kContiguousSums);
  check_tensor(check, in, "b1", weights.b1, shape.up(), Numbers::kContiguousSums);
  check_tensor(check, in, "a2", weights.a2, shape.down(), Numbers::kContiguousSums);
  check_tensor(check, in, "b2", weights.b2, shape.up(), Numbers::kContiguousSums);
  return shape.rank;
}

GramShape check_duplex_query_views(const ArgumentCheck& check, const DuplexQueryViewsInputs& in) {
  GramShape shape = check_causal_gram(check, in);
  shape.rank = check_weights(check, in, in, shape.head_dim);
  return shape;
}

GramShape check_duplex_aligned_keys(const ArgumentCheck& check, const DuplexAlignedKeysInputs& in) {
  GramShape shape = check_gram(check, in);
  if (in.include) {
    check.sizes("include", *in.include, {shape.batch, shape.num_keys});
    check.dtype("include", *in.include, ScalarType::Bool);
    check.device("include", *in.include, in.key);
  }
  shape.rank = check_weights(check, in, in, shape.head_dim);
  check.require(in.normalization >= 0 && in.normalization <= 2, "normalization", "0 to 2", in.normalization);
  return shape;
}

}  // namespace moda_ext
