// What every device does first with the arguments of the Gram family (modality_gram, causal_gram_projection and the
// duplex operators): check what memory safety depends on, and describe the shapes. As in modular_attention_checks.h,
// user-facing validation is moda_ext/functional/checks.py.
#pragma once

#include <optional>

#include "ops/checks.h"

namespace moda_ext {

struct GramShape {
  int64_t batch, query_heads, kv_heads, num_queries, num_keys, head_dim, num_modalities, rank;

  std::vector<int64_t> gram() const { return {batch, kv_heads, num_modalities, head_dim, head_dim}; }
  std::vector<int64_t> key() const { return {batch, kv_heads, num_keys, head_dim}; }
  std::vector<int64_t> query() const { return {batch, query_heads, num_queries, head_dim}; }
  std::vector<int64_t> views() const { return {num_modalities, batch, query_heads, num_queries, head_dim}; }
  std::vector<int64_t> row_scale() const { return {batch, kv_heads, num_queries, num_modalities}; }
  std::vector<int64_t> indicator() const { return {batch, query_heads, num_queries, num_modalities}; }
  std::vector<int64_t> down() const { return {num_modalities, head_dim, rank}; }  // a1, a2
  std::vector<int64_t> up() const { return {num_modalities, rank, head_dim}; }    // b1, b2
};

struct GramInputs {
  Tensor key, modality;
  int64_t num_modalities;
  bool unit_keys;
  double eps;
  const char* key_argument = "key";  // what the operator calls them, for errors
  const char* modality_argument = "modality";
};

struct CausalGramInputs : GramInputs {
  Tensor query, row_scale;
  std::optional<Tensor> initial;
};

struct DuplexWeights {
  Tensor a1, b1, a2, b2;
};

struct DuplexQueryViewsInputs : CausalGramInputs, DuplexWeights {};

struct DuplexAlignedKeysInputs : GramInputs, DuplexWeights {
  std::optional<Tensor> include;
  int64_t normalization;
};

constexpr int64_t kMaxRank = 128;

// Each throws std::invalid_argument, naming operator and argument.
GramShape check_gram(const ArgumentCheck& check, const GramInputs& inputs);
GramShape check_causal_gram(const ArgumentCheck& check, const CausalGramInputs& inputs);
GramShape check_duplex_query_views(const ArgumentCheck& check, const DuplexQueryViewsInputs& inputs);
GramShape check_duplex_aligned_keys(const ArgumentCheck& check, const DuplexAlignedKeysInputs& inputs);
// The weights of the fuser, of which the first has the rank: that.
int64_t check_weights(const ArgumentCheck& check, const GramInputs& inputs, const DuplexWeights& weights,
                      int64_t head_dim);
// A tensor that comes with the inputs, of this shape: in the dtype of the key, with a contiguous last dimension; or in
// its compute dtype, of any strides or contiguous.
enum class Numbers { kStored, kSums, kContiguousSums };
void check_tensor(const ArgumentCheck& check, const GramInputs& inputs, const char* name, const Tensor& tensor,
                  const std::vector<int64_t>& sizes, Numbers numbers);

}  // namespace moda_ext
