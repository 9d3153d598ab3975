// Interface between the launch (cpu/modular_attention_launch.cpp) and the kernels of one instruction set: plain
// structs and raw pointers, no libtorch and no STL containers, because the kernels are compiled with special flags (see
// simd.h).
#pragma once

#include <stdint.h>

#include "core/operand.h"
#include "core/storage.h"
#include "core/tile.h"

namespace moda_ext {
namespace cpu {

// So few query rows that share a key head, as in a decoding step, take keys and values where they lie.
constexpr int kFewRows = 16;

// One sequence: a batch element of the dense operator or a segment of the packed one, with its planned keys.
struct Sequence {
  int64_t batch = 0;                       // index for the batch strides
  int64_t first_query = 0, first_key = 0;  // row offsets (packed layout)
  int64_t num_queries = 0, num_keys = 0;
  const int32_t* order = nullptr;  // KeyPlan of the sequence
  const int64_t* rows = nullptr;   // of keys in pages: which row of key and value each position is
  const KeyTile* tiles = nullptr;
  const int32_t* first_position = nullptr;
  int32_t num_tiles = 0, num_panels = 0, num_slots = 0;
};

// The row of key and value that a slot of the plan is. Always inline, as row_of.
static MODA_EXT_HOST_DEVICE int64_t key_row(const Sequence& sequence, int64_t slot) {
  const int64_t position = sequence.order[slot];
  return sequence.rows != nullptr ? sequence.rows[position] : sequence.first_key + position;
}

// What both directions share. query, key, value, out and their gradients have the storage type, everything else the
// compute type.
struct ModularAttentionArgs {
  int head_dim = 0, num_modalities = 0, num_views = 1;
  int group = 1;  // query heads for each key/value head
  bool causal = false;
  double scale = 1;
  Input query, key, value, bias, sink;  // bias.data and sink.data may be null
};

struct ModularAttentionForwardArgs : ModularAttentionArgs {
  Output out, lse, mass;
  Output lse_residual;  // what rounding took from lse: lse + lse_residual is the sum, see finish_rows
};

struct ModularAttentionBackwardArgs : ModularAttentionArgs {
  Input saved_out, saved_lse, saved_mass, saved_lse_residual;
  bool whole_rows = true;               // false: saved_* are of rows that see more keys, of which these are a part
  Input grad_out, grad_lse, grad_mass;  // grad_lse.data, grad_mass.data null: zero
  Output grad_query, grad_key, grad_value, grad_bias, grad_sink;  // data null: not wanted
  Output delta;             // workspace, one number for each row: D_i of docs/mathematics.md section 3
  Output probability_sums;  // workspace of the shape of grad_bias, wanted with it: sums of P over each modality
  bool packs_transposed_keys = true;  // is there memory for all packed forms? (of kernels that pack for all items)
};

// Work item of the forward pass: query rows against a range of key tiles. The rows are [first_row, first_row +
// num_rows) of heads [first_head, first_head + num_heads); several heads (of one group) only when each contributes all
// its rows.
struct ModularAttentionForwardItem {
  const Sequence* sequence;
  int64_t first_head, num_heads;
  int64_t first_row, num_rows;
  int64_t first_tile, last_tile;
  const void* packed;  // packed keys and values of the kv head, or null: the item packs each tile for itself
  void* partial;  // null: write the outputs. Else leave the unnormalised state of each row here (partial_bytes for the
                  // item)
};

// Work item of the backward pass: a stretch of row blocks of one kv head, flattened over the heads of its group: block
// b is rows [b % blocks_per_head * block_rows, ...) of head kv_head * group + b / blocks_per_head. The item owns those
// rows, so the gradients of query, bias and sink need no synchronisation.
struct ModularAttentionBackwardItem {
  const Sequence* sequence;
  int64_t kv_head;
  int64_t first_block, last_block;
  void* partial;  // null: the item sees every row, key gradients go to the outputs. Else partial sums, key then value,
                  // each [slots of the plan][head_dim], one buffer for each item of the kv head
  const void* packed;  // keys and values of the kv head as pack_backward_tile makes them; null if the kernels pack for
                       // themselves
};

// The kernels of one instruction set for one storage type.
struct ModularAttentionKernels {
  int panel_keys;  // keys in a packed panel
  int forward_tile_keys, backward_tile_keys;
  int forward_block_rows, backward_block_rows;  // most query rows of a work item, and of a block of one
  int compute_bytes;                            // sizeof of the compute type

  int64_t (*packed_bytes)(const ModularAttentionArgs&, int64_t num_panels);  // keys and values of one kv head
  int64_t (*partial_bytes)(const ModularAttentionArgs&, int64_t num_rows);   // unnormalised state of num_rows rows
  int64_t (*forward_scratch_bytes)(const ModularAttentionArgs&);             // for each thread
  int64_t (*backward_scratch_bytes)(const ModularAttentionBackwardArgs&, int64_t num_blocks);

  void (*pack_tile)(const ModularAttentionArgs&, const Sequence&, int64_t kv_head, int64_t tile, void* packed);
  // `next`: the item this thread will probably run next, or null; its queries are prefetched.
  void (*forward)(const ModularAttentionForwardArgs&, const ModularAttentionForwardItem&,
                  const ModularAttentionForwardItem* next, void* scratch);
  // Merges the states of num_splits items that differ in their tiles only, in order, and writes the outputs.
  void (*merge)(const ModularAttentionForwardArgs&, const ModularAttentionForwardItem&, void* const* partials,
                int num_splits, void* scratch);

  // Keys and values of one kv head in the forms that its items share. 0: every item packs for itself; else an item
  // needs `packed` and `partial`.
  int64_t (*backward_packed_bytes)(const ModularAttentionBackwardArgs&, int64_t num_panels);
  void (*pack_backward_tile)(const ModularAttentionBackwardArgs&, const Sequence&, int64_t kv_head, int64_t tile,
                             void* packed);
  void (*backward)(const ModularAttentionBackwardArgs&, const ModularAttentionBackwardItem&, void* scratch);
  // Adds the partial key and value gradients of the items of one kv head for keys [begin, end) of the plan, in order,
  // to the outputs.
  void (*reduce_partials)(const ModularAttentionBackwardArgs&, const Sequence&, int64_t kv_head, void* const* partials,
                          int num_items, int64_t begin, int64_t end);
};

const ModularAttentionKernels& modular_attention_kernels_baseline(Storage);
const ModularAttentionKernels& modular_attention_kernels_avx2(Storage);
const ModularAttentionKernels& modular_attention_kernels_avx512(Storage);
const ModularAttentionKernels& modular_attention_kernels_pairs();       // of kBFloat16
const ModularAttentionKernels& modular_attention_kernels_amx(Storage);  // no kFloat64

}  // namespace cpu
}  // namespace moda_ext
