// Interface between the launch (cpu/gram_family_launch.cpp) and the Gram family's kernels of one instruction set:
// plain structs and raw pointers, as in modular_attention_kernels.h.
#pragma once

#include "cpu/kernels/modular_attention_kernels.h"

namespace moda_ext {
namespace cpu {

// What every Gram operator shares. The key has the storage type; sums, scales, weights and Gram matrices have the
// compute type, and are contiguous unless they come as an operand.
struct GramArgs {
  int head_dim = 0, num_modalities = 0;
  bool unit_keys = true;
  double eps = 0;
  int64_t kv_heads = 0, num_keys = 0;
  Input key;
  const int32_t* modality = nullptr;
  int64_t modality_batch = 0, modality_token = 0;
  const int64_t* key_rows = nullptr;  // of keys in pages: which row of `key` each token is
};

// The row of `key` that a token is. Always inline, as row_of.
static MODA_EXT_HOST_DEVICE int64_t token_row(const GramArgs& args, int64_t token) {
  return args.key_rows != nullptr ? args.key_rows[token] : token;
}

// A stretch of the sequence, whose raw Grams go to `gram` (M, D, D); reduce_grams sums those of several stretches.
struct ModalityGramItem {
  int64_t batch, kv_head, first, last;
  void* gram;
};

struct ModalityGramBackwardArgs : GramArgs {
  const void* grad_gram = nullptr;  // (B, Hkv, M, D, D)
  Output grad_key;
};

// Causal operators: one work item is one (batch, kv head). Queries are the last num_queries of the num_keys tokens.
struct CausalGramArgs : GramArgs {
  int group = 1;  // query heads for each key/value head
  int64_t num_queries = 0;
  Input query;
  Input row_scale;                // (B, Hkv, Nq, M)
  const void* initial = nullptr;  // (B, Hkv, M, D, D) or null: zero
};

struct CausalGramProjectionForwardArgs : CausalGramArgs {
  Output projection;     // view stride: modality
  void* gram = nullptr;  // (B, Hkv, M, D, D)
};

struct CausalGramProjectionBackwardArgs : CausalGramArgs {
  Input grad_projection;
  const void* grad_gram = nullptr;  // or null: zero
  Output grad_query, grad_key, grad_row_scale;
  void* grad_initial = nullptr;  // null: not wanted
};

// The low-rank weights of the fuser, a1 and a2 (M, D, rank), b1 and b2 (M, rank, D).
struct DuplexArgs : CausalGramArgs {
  int rank = 0;
  const void *a1 = nullptr, *b1 = nullptr, *a2 = nullptr, *b2 = nullptr;
  const void* weights = nullptr;  // what pack_weights made of them
};

struct DuplexQueryViewsForwardArgs : DuplexArgs {
  Output views;              // view stride: modality
  bool nontemporal = false;  // the views are too large to be found in a cache later
  Output indicator;          // (B, Hq, Nq, M); data null: not wanted
  void* gram = nullptr;      // (B, Hkv, M, D, D); null: not wanted
};

struct DuplexQueryViewsBackwardArgs : DuplexArgs {
  Input grad_views;
  Input indicator, grad_indicator;  // grad_indicator.data null: zero
  const void* grad_gram = nullptr;  // or null: zero
  Output grad_query, grad_key, grad_row_scale;
  void* grad_initial = nullptr;  // null: not wanted
};

// How a Gram becomes Ghat: divided by its trace, by its Frobenius norm, or each of its rows by its length.
enum class Normalization { kTrace, kFrobenius, kRow };

// One work item is one (batch, kv head). `modality` is that of the tokens in a Gram and -1 for all others; `members`
// that of the keys to be updated, -1 for padding. There is no query.
struct DuplexAlignedKeysArgs : DuplexArgs {
  Normalization normalization = Normalization::kTrace;
  const int32_t* members = nullptr;
  int64_t members_batch = 0, members_token = 0;
  Output aligned;
  bool nontemporal = false;  // as in DuplexQueryViewsForwardArgs
};

// The keys of one (batch, kv head). What the tokens' modalities and the weights give stays in the scratch: batch_before
// is the batch element of the item before on it, -1 for none.
struct DuplexAlignedKeysItem {
  int64_t batch, kv_head, batch_before;
};

// Of the rows of a sequence whose views are made without its Gram, or with one whose scale is yet to be made. Its batch
// index is 0.
struct DecodedViewsArgs {
  const Sequence* sequence = nullptr;
  const int32_t* query_modality = nullptr;  // -1: padding, whose scale is 0
  int64_t query_modality_token = 0;
  bool by_trace = true;  // else the scale is 1
  Output scale;          // (Hkv, Nq, M), what the raw Gram of a row is multiplied with
};

// A stretch of the tiles of a key head; with `partial`, its sums go there (decoded_query_views_partial_bytes).
struct DecodedViewsItem {
  int64_t kv_head;
  int64_t first_tile, last_tile;
  void* partial;
};

struct GramFamilyKernels {
  int chunk;  // tokens whose keys enter a state together
  int compute_bytes;

  int64_t (*modality_gram_scratch_bytes)(const GramArgs&);
  void (*modality_gram)(const GramArgs&, const ModalityGramItem&, void* scratch);
  // Sums the Grams of one (batch, kv head) over its items, in order, into (M, D, D) at `gram`.
  void (*reduce_grams)(const GramArgs&, void* const* partials, int count, void* gram);
  void (*modality_gram_backward)(const ModalityGramBackwardArgs&, int64_t batch, int64_t kv_head, void* scratch);

  int64_t (*causal_gram_projection_scratch_bytes)(const CausalGramProjectionForwardArgs&);
  void (*causal_gram_projection)(const CausalGramProjectionForwardArgs&, int64_t batch, int64_t kv_head, void* scratch);
  int64_t (*causal_gram_projection_backward_scratch_bytes)(const CausalGramProjectionBackwardArgs&, int64_t batch);
  void (*causal_gram_projection_backward)(const CausalGramProjectionBackwardArgs&, int64_t batch, int64_t kv_head,
                                          void* scratch);

  int64_t (*weights_bytes)(const DuplexArgs&);
  void (*pack_weights)(const DuplexArgs&, void* weights);
  int64_t (*duplex_query_views_scratch_bytes)(const DuplexQueryViewsForwardArgs&);
  void (*duplex_query_views)(const DuplexQueryViewsForwardArgs&, int64_t batch, int64_t kv_head, void* scratch);
  int64_t (*duplex_query_views_backward_scratch_bytes)(const DuplexQueryViewsBackwardArgs&, int64_t batch);
  // `partial`: the item's part of the weight gradients, weight_gradient_elements of the compute type.
  void (*duplex_query_views_backward)(const DuplexQueryViewsBackwardArgs&, int64_t batch, int64_t kv_head,
                                      void* partial, void* scratch);
  // Sums the parts of all items, in order, into tensors shaped like the weights.
  void (*reduce_weight_gradients)(const DuplexArgs&, const void* partials, int64_t count, void* grad_a1, void* grad_b1,
                                  void* grad_a2, void* grad_b2);

  // The scale of each row, where it is not given: (args, decoded, kv head).
  void (*causal_scale)(const CausalGramArgs&, const DecodedViewsArgs&, int64_t kv_head);
  // The views of up to kFewRows rows without a Gram, with scale and indicator.
  int64_t (*decoded_query_views_scratch_bytes)(const DuplexQueryViewsForwardArgs&);
  int64_t (*decoded_query_views_partial_bytes)(const DuplexQueryViewsForwardArgs&);
  void (*decoded_query_views)(const DuplexQueryViewsForwardArgs&, const DecodedViewsArgs&, const DecodedViewsItem&,
                              void* scratch);
  void (*merge_decoded_query_views)(const DuplexQueryViewsForwardArgs&, const DecodedViewsArgs&, int64_t kv_head,
                                    void* const* partials, int count, void* scratch);

  int64_t (*duplex_aligned_keys_scratch_bytes)(const DuplexAlignedKeysArgs&);
  void (*duplex_aligned_keys)(const DuplexAlignedKeysArgs&, const DuplexAlignedKeysItem&, void* scratch);
};

// Numbers in one item's part of the weight gradients: a1, b1, a2, b2, each (M, rank, D).
inline int64_t weight_gradient_elements(const DuplexArgs& args) {
  return int64_t{4} * args.num_modalities * args.rank * args.head_dim;
}

const GramFamilyKernels& gram_family_kernels_baseline(Storage);
const GramFamilyKernels& gram_family_kernels_avx2(Storage);
const GramFamilyKernels& gram_family_kernels_avx512(Storage);
const GramFamilyKernels& gram_family_kernels_amx(Storage);  // no kFloat64

}  // namespace cpu
}  // namespace moda_ext
