// What every device does first with the arguments of the paged operators: check what memory safety depends on. A cell of
// a page is [key D | value D | modality | unused], in the dtype of the query, and its modality is a number that this
// dtype holds.
#pragma once

#include <optional>

#include "ops/checks.h"
#include "ops/gram_family_checks.h"
#include "ops/modular_attention_checks.h"

namespace moda_ext {

struct PagedAttentionInputs {
  const char* op;
  Tensor query;            // (T, Hq, D), or (M, T, Hq, D): one view for each key modality
  Tensor kv_cache;         // (blocks, Hkv, block, C), C > 2 D
  Tensor block_table;      // (S, blocks of the longest sequence), int32
  Tensor seq_lens;         // (S,), int32: keys of each sequence, the queries' own among them
  Tensor query_start_loc;  // (S + 1,), int32: offsets into T
  std::optional<Tensor> modality_bias, sink;
  int64_t num_modalities;
  double scale;
  // (T,), int32: with it the sums above are tables, (M, Hq, M) of modalities of rows and (positions, Hq).
  std::optional<Tensor> row_modality{};
};

struct PagedDuplexInputs : PagedAttentionInputs, DuplexWeights {
  Tensor query_modality;  // (T,), int32
  std::optional<Tensor> condition;
  bool unit_keys, by_trace;
  double eps;
};

struct PagedCacheInputs {
  const char* op;
  Tensor key, value;    // (T, Hkv, D)
  Tensor modality;      // (T,), int32
  Tensor kv_cache;      // (blocks, Hkv, block, C), C > 2 D
  Tensor slot_mapping;  // (T,), int64; below 0: a token of no cell
  int64_t num_modalities;
};

// Each throws std::invalid_argument. The shape is that of modular_attention_varlen, with num_keys 0.
ModularAttentionShape check_paged_attention(const PagedAttentionInputs& inputs);
ModularAttentionShape check_paged_duplex_attention(const PagedDuplexInputs& inputs);
void check_paged_cache_update(const PagedCacheInputs& inputs);
// Of both at once, beside those: the tokens that are written are the rows, and the result goes to `out`.
void check_paged_step(const ModularAttentionShape& shape, const PagedCacheInputs& written, const Tensor& out);

// Rows of the cache, counted in strides of a cell: cell `offset` of a block is row block * rows_per_block + offset.
int64_t rows_per_block(const Tensor& kv_cache);

}  // namespace moda_ext
