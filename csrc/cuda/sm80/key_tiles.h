// What the attention kernels share: sequences, modalities of keys, tiles in shared memory.
//
// There is no host planner: key_modality lives on the device, and reading it would make the host wait. Key tiles have a
// fixed size, and one word says what is in each: which modalities occur, and whether anything else (padding, the end of
// the sequence) does. Multimodal sequences are long runs, so nearly every tile is *pure*, one modality and nothing
// else, and takes the path of plain attention with one number added per row.
#pragma once

#include "cuda/launch_kernel.h"
#include "cuda/modular_attention_kernels.h"
#include "cuda/sm80/fragments.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// Running maximum of a row that has seen nothing. Finite, so that no difference of two of them is NaN; 2^(kLowest - x)
// is 0 for every score x that occurs.
constexpr float kLowest = -1e30f;

constexpr uint32_t kAllModalities = (1u << kMaxModalities) - 1;
constexpr uint32_t kOther = 1u << kMaxModalities;  // in a tile's word: it holds padding or reaches beyond the end

MODA_EXT_DEVICE int minimum(int a, int b) { return a < b ? a : b; }
MODA_EXT_DEVICE int maximum(int a, int b) { return a > b ? a : b; }
MODA_EXT_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }

// For the host's plans of grids and workspaces, whose parts start at multiples of 16 bytes.
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t bytes) { return divide_up(bytes, 16) * 16; }

// One sequence: a batch element, or a stretch of the packed tokens.
struct Sequence {
  int64_t batch;
  int64_t first_query, first_key;
  int num_queries, num_keys;

  // Last key that a query sees.
  MODA_EXT_DEVICE int last_visible(const ModularAttentionArgs& args, int query) const {
    return args.causal ? query + num_keys - num_queries : num_keys - 1;
  }
};

// Offsets that do not partition the tokens give wrong results, never an access outside the tensors.
MODA_EXT_DEVICE Sequence locate_sequence(const ModularAttentionArgs& args, int64_t index) {
  if (args.cu_seqlens_q == nullptr) return {index, 0, 0, args.num_queries, args.num_keys};
  const auto clamp = [](int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
  };
  Sequence sequence;
  sequence.batch = 0;
  sequence.first_query = clamp(args.cu_seqlens_q[index], 0, args.rows_per_batch);
  sequence.first_key = clamp(args.cu_seqlens_k[index], 0, args.total_keys);
  const int64_t end_query = clamp(args.cu_seqlens_q[index + 1], sequence.first_query, args.rows_per_batch);
  const int64_t end_key = clamp(args.cu_seqlens_k[index + 1], sequence.first_key, args.total_keys);
  sequence.num_queries = static_cast<int>(clamp(end_query - sequence.first_query, 0, args.num_queries));
  sequence.num_keys = static_cast<int>(clamp(end_key - sequence.first_key, 0, args.num_keys));
  return sequence;
}

// Position of a query row in workspace arrays of one number for each row.
MODA_EXT_DEVICE int64_t row_index(const ModularAttentionArgs& args, const Sequence& sequence, int head, int query) {
  return (sequence.batch * args.query_heads + head) * args.rows_per_batch + sequence.first_query + query;
}

// Modality of a key of the sequence; -1 for padding, ids out of range and keys beyond the end.
MODA_EXT_DEVICE int modality_of(const ModularAttentionArgs& args, const Sequence& sequence, int key) {
  if (key >= sequence.num_keys) return -1;
  const int id =
      args.key_modality[sequence.batch * args.modality_batch + (sequence.first_key + key) * args.modality_row];
  return id >= 0 && id < args.num_modalities ? id : -1;
}

// Bit of a modality in a tile's word.
MODA_EXT_DEVICE uint32_t modality_bit(int modality) { return modality < 0 ? kOther : 1u << modality; }

// Copies kRows rows of kHeadDim elements into shared memory, without waiting. Rows for which valid(row) is false, and
// what lies beyond head_dim, become zeros: what such rows hold in memory, NaN included, must not reach a product.
// Unrolled further, the addresses of all chunks are kept across the main loop, in registers that it needs; kUnroll = 1
// where those are full.
template <class Element, int kHeadDim, int kRows, int kThreads, int kUnroll = 4, class Valid>
MODA_EXT_DEVICE void copy_rows(char* shared, int thread, const Element* first, int64_t row_stride, int head_dim,
                               const Valid& valid) {
  constexpr int kPerChunk = 16 / static_cast<int>(sizeof(Element));
  constexpr int kChunks = kHeadDim / kPerChunk;
#pragma unroll kUnroll
  for (int i = 0; i < (kRows * kChunks + kThreads - 1) / kThreads; ++i) {
    const int index = i * kThreads + thread;
    const int row = index / kChunks, element = index % kChunks * kPerChunk;
    if (kRows * kChunks % kThreads != 0 && row >= kRows) break;
    const bool read = element < head_dim && valid(row);
    copy_async_16(shared + row * kRowStride<Element, kHeadDim> + element * static_cast<int>(sizeof(Element)),
                  read ? first + row * row_stride + element : first, read);
  }
}

// Copies rows that one warp left in shared memory to where pointer_of(row) says (null: nowhere), elements [begin, end)
// of each, a multiple of 16 bytes.
template <class Element, int kHeadDim, int kRows, class PointerOf>
MODA_EXT_DEVICE void store_rows(const char* shared, int begin, int end, const PointerOf& pointer_of) {
  constexpr int kPerChunk = 16 / static_cast<int>(sizeof(Element));
  const int chunks = (end - begin) / kPerChunk;
  for (int i = lane_index(); i < kRows * chunks; i += 32) {
    const int row = i / chunks, element = begin + i % chunks * kPerChunk;
    Element* target = pointer_of(row);
    if (target == nullptr) continue;
    *reinterpret_cast<Word4*>(target + element) = *reinterpret_cast<const Word4*>(
        shared + row * kRowStride<Element, kHeadDim> + element * static_cast<int>(sizeof(Element)));
  }
}

MODA_EXT_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}
MODA_EXT_DEVICE float warp_maximum(float x) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) x = maximum(x, shuffle_xor(x, mask));
  return x;
}
// Sum and maximum over the four lanes that share a row of a C fragment.
MODA_EXT_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
MODA_EXT_DEVICE float quad_maximum(float x) {
  x = maximum(x, shuffle_xor(x, 1));
  return maximum(x, shuffle_xor(x, 2));
}

// A pass over a tile takes the keys of one modality, or of all.
constexpr int kMixed = -1;

// Modalities of this thread's columns in C fragments over a key tile, 4 bits each, and which columns the pass takes,
// one bit each. The loop is not unrolled: its loads, all in flight at once, would need the registers that hold the
// sums.
struct Columns {
  uint64_t ids;
  uint32_t taken;

  MODA_EXT_DEVICE int id(int column) const { return static_cast<int>(ids >> 4 * column) & 15; }
  MODA_EXT_DEVICE bool takes(int column) const { return taken >> column & 1; }
};
template <int kKeyFragments>
MODA_EXT_DEVICE Columns find_columns(const ModularAttentionArgs& args, const Sequence& sequence, int first_key,
                                     int modality) {
  static_assert(kKeyFragments <= 8, "16 columns of 4 bits fill the word");
  Columns columns{0, 0};
#pragma unroll 1
  for (int i = 0; i < 2 * kKeyFragments; ++i) {
    const int id = modality_of(args, sequence, first_key + i / 2 * 8 + 2 * (lane_index() % 4) + i % 2);
    const bool taken = modality == kMixed ? id >= 0 : id == modality;
    if (!taken) continue;
    columns.taken |= 1u << i;
    columns.ids |= static_cast<uint64_t>(id) << 4 * i;
  }
  return columns;
}

// Writes what is in every key tile: words[sequence * tiles_per_sequence + tile]. One warp for each tile.
struct DescribeTiles {
  struct Params {
    ModularAttentionArgs args;
    int tile_keys, tiles_per_sequence;
    uint32_t* words;
  };
  static constexpr int kThreads = 128;
  static int64_t blocks(const Params& p) {
    return divide_up(static_cast<int64_t>(p.args.num_sequences) * p.tiles_per_sequence * 32, kThreads);
  }
  static size_t shared_bytes(const Params&) { return 0; }

  static MODA_EXT_DEVICE void run(const Params& p, char*) {
    const int64_t index = block_index() * (kThreads / 32) + warp_index();
    if (index >= static_cast<int64_t>(p.args.num_sequences) * p.tiles_per_sequence) return;
    const Sequence sequence = locate_sequence(p.args, index / p.tiles_per_sequence);
    const int first = static_cast<int>(index % p.tiles_per_sequence) * p.tile_keys;
    uint32_t word = 0;
    for (int key = first + lane_index(); key < first + p.tile_keys; key += 32)
      word |= modality_bit(modality_of(p.args, sequence, key));
    word = warp_or(word);
    if (lane_index() == 0) p.words[index] = word;
  }
};

}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
