// Causal Gram projection (docs/mathematics.md section 1) for compute capability 8.0 and later: linear attention whose values are
// its keys.
//
//   o_{i,m} = s_{i,m} q_i G^m_i         G^m_i = G^m_0 + sum_{j <= i, a_j = m} phi_j^T phi_j
//
// The sequence is cut into segments of kSegment tokens, whose bounds depend on positions alone: what a row gets does
// not depend on later tokens, to the bit. GramKernel makes the Gram of every segment, ScanKernel those before every
// segment, and a block of rows meets that matrix as one product and the keys of its own segment through masked scores.
// A token costs 2 kSegment D multiply-adds at most in its segment and D^2 for each modality before it; the matrices are
// 1 / kSegment D^2 numbers for each key, modality and head.
//
// Numbers: 16-bit scores are rounded as probabilities are, so in float16 |q . k| / |k|^2, or with raw keys |q . k|, has
// to fit.
#pragma once

#include "cuda/sm80/gram_family_tiles.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {

constexpr int kSegment = 256;

// The Grams before every segment, as operands.
struct States {
  const uint32_t* tiles;  // words of DescribeTiles
  int tiles_per_sequence, segments;
  const void *before, *rest;  // (batch, kv head, modality, segment, D, D), see ScanKernel; rest may be null
  const float* largest;       // (batch, kv head, modality, segment, D)
};

struct StatesPlan {
  int tiles_per_sequence, segments;
  int64_t tiles_at, parts_at, before_at, rest_at, largest_at, bytes;
};

// `exact`: 16-bit operands in two parts.
template <class Element, int kHeadDim>
StatesPlan plan_states(const CausalGramArgs& args, bool exact) {
  constexpr int kKeys = GramTile<Element, kHeadDim>::kKeys;
  StatesPlan plan;
  plan.tiles_per_sequence = static_cast<int>(divide_up(args.num_keys, kKeys));
  plan.segments = static_cast<int>(divide_up(args.num_keys, kSegment));
  const int64_t rows = args.num_grams() * plan.segments * args.head_dim;
  plan.tiles_at = 0;
  plan.parts_at = round_up(4 * static_cast<int64_t>(args.num_sequences) * plan.tiles_per_sequence);
  plan.before_at = plan.parts_at + round_up(4 * rows * args.head_dim);
  const int64_t operand = round_up(static_cast<int64_t>(sizeof(Element)) * rows * args.head_dim);
  plan.rest_at = plan.before_at + operand;
  plan.largest_at = plan.rest_at + (exact && sizeof(Element) == 2 ? operand : 0);
  plan.bytes = plan.largest_at + round_up(4 * rows);
  return plan;
}

template <int kHeadDim>
int64_t states_bytes(const CausalGramArgs& args, Storage storage, bool exact) {
  return storage == Storage::kFloat32 ? plan_states<float, kHeadDim>(args, exact).bytes
                                      : plan_states<BFloat16, kHeadDim>(args, exact).bytes;
}

// `total`: Grams after the last token; null: not wanted.
template <class Element, int kHeadDim>
States make_states(const CausalGramArgs& args, bool exact, float* total, void* workspace, void* stream) {
  using Kernel = GramKernel<Element, kHeadDim>;
  const StatesPlan plan = plan_states<Element, kHeadDim>(args, exact);
  char* memory = static_cast<char*>(workspace);
  uint32_t* words = reinterpret_cast<uint32_t*>(memory + plan.tiles_at);
  float* parts = reinterpret_cast<float*>(memory + plan.parts_at);
  launch<DescribeTiles>({args, Kernel::kKeys, plan.tiles_per_sequence, words}, stream);
  launch<Kernel>({args, words, plan.tiles_per_sequence, plan.segments, kSegment / Kernel::kKeys, parts}, stream);
  ScanParams scan{};
  scan.matrices = args.num_grams();
  scan.head_dim = args.head_dim;
  scan.pieces = plan.segments;
  scan.initial = args.initial;
  scan.parts = parts;
  scan.before = memory + plan.before_at;
  scan.rest = plan.rest_at < plan.largest_at ? memory + plan.rest_at : nullptr;
  scan.largest = reinterpret_cast<float*>(memory + plan.largest_at);
  scan.total = total;
  scan.factor = 1.0f;
  launch<ScanKernel<Element, kHeadDim>>(scan, stream);
  return {words, plan.tiles_per_sequence, plan.segments, scan.before, scan.rest, scan.largest};
}

// Rows times the Gram of one modality that each sees, for the blocks of rows that more than one kernel has. With phi =
// factor k, scores are weighted by factor^2 and raw keys serve both products, exact as they are. kExact: what rounding
// takes away from 16-bit scores and states is multiplied too, and the result is good to float32.
template <class Element, int kHeadDim, int kRows, bool kExact>
class RowProjection {
  using Tile = GramTile<Element, kHeadDim>;
  using Products = Fragments<Element, kHeadDim>;
  static constexpr int kThreads = 2 * kRows, kKeys = Tile::kKeys;
  static constexpr int kPass = kHeadDim > 192 ? 16 : kKeys;  // keys whose scores fit in registers beside the sums
  static constexpr int kStreamed = kKeys > Tile::kSlice ? kKeys : Tile::kSlice;

 public:
  static constexpr size_t kSharedBytes = static_cast<size_t>(kStreamed) * Products::kStride + sizeof(float) * kKeys;
  using Sums = float[1][kHeadDim / 8][4];

  // out = rows G^m; `stream` is a buffer of kSharedBytes. All threads take part; copies on their way arrive.
  static MODA_EXT_DEVICE void run(const CausalGramArgs& args, const States& states, const Sequence& sequence,
                                  int64_t sequence_index, int kv_head, int modality, int first_position,
                                  const char* block_rows, char* stream, Sums& out) {
    using Product = SymmetricProduct<Element, kHeadDim, kThreads>;
    const char* rows = block_rows + warp_index() * 16 * Products::kStride;
    set_zero(out);
    wait_copies<0>();
    sync_threads();
    const int segment = first_position / kSegment;
    if (segment > 0 || args.initial != nullptr) {
      const int64_t matrix =
          ((sequence_index * args.kv_heads + kv_head) * args.num_modalities + modality) * states.segments + segment;
      const int64_t elements = static_cast<int64_t>(args.head_dim) * args.head_dim;
      const Element* rest = static_cast<const Element*>(states.rest);
      Product::run(static_cast<const Element*>(states.before) + matrix * elements,
                   kExact && rest != nullptr ? rest + matrix * elements : nullptr,
                   states.largest + matrix * args.head_dim, args.head_dim, rows, stream,
                   [&](int first, const float (&c)[1][Product::kSliceFragments][4]) {
#pragma unroll
                     for (int n = 0; n < Product::kSliceFragments; ++n)
#pragma unroll
                       for (int i = 0; i < 4; ++i) out[0][first + n][i] = c[0][n][i];
                   });
    }
    add_segment(args, states, sequence, sequence_index, kv_head, 1u << modality, first_position, block_rows, stream,
                Unweighted{}, out);
  }

  // out += rows times the features and weights of the keys of their own segment that are of a `wanted` modality (one
  // bit each): sum (row . phi_j) weights.of(row of the block, j) phi_j. weights.see(j, key) announces key j of a tile,
  // to one lane.
  template <class Weights>
  static MODA_EXT_DEVICE void add_segment(const CausalGramArgs& args, const States& states, const Sequence& sequence,
                                          int64_t sequence_index, int kv_head, uint32_t wanted, int first_position,
                                          const char* block_rows, char* stream, const Weights& weights, Sums& out) {
    const char* rows = block_rows + warp_index() * 16 * Products::kStride;
    const int segment = first_position / kSegment;
    const uint32_t* words = states.tiles + sequence_index * states.tiles_per_sequence;
    const int last = minimum(first_position + kRows, sequence.num_keys) - 1;
    for (int tile = segment * (kSegment / kKeys); tile <= last / kKeys; ++tile) {
      if (!(words[tile] & wanted)) continue;
      const int first_key = tile * kKeys;
      sync_threads();  // everyone is done with the buffer
      copy_rows<Element, kHeadDim, kKeys, kThreads, 1>(
          stream, thread_index(), row_of<Element>(args.key, sequence.batch, kv_head, first_key), args.key.row,
          args.head_dim,
          [&](int row) { return (modality_bit(modality_of(args, sequence, first_key + row)) & wanted) != 0; });
      commit_copies();
      wait_copies<0>();
      sync_threads();
      float* factors = reinterpret_cast<float*>(stream + kStreamed * Products::kStride);
#pragma unroll 1
      for (int first = warp_index() * 8; first < kKeys; first += kThreads / 4) {
        const int row = first + lane_index() / 4;
        const float factor = measure_key<Element, kHeadDim>(args, stream, row).factor;
        if (lane_index() % 4 != 0) continue;
        factors[row] = factor;
        weights.see(row, first_key + row);
      }
      sync_threads();
#pragma unroll 1
      for (int first = 0; first < kKeys; first += kPass) {
        float scores[1][kPass / 8][4];
        set_zero(scores);
        Products::multiply_rows(scores, rows, stream + first * Products::kStride);
        weigh(first_position + warp_index() * 16 - (first_key + first), factors + first, first, weights, scores);
        Products::multiply_registers(out, scores, stream + first * Products::kStride);
        if (kExact && sizeof(Element) == 2) {
#pragma unroll
          for (int n = 0; n < kPass / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[0][n][i] -= to_float(from_float<Element>(scores[0][n][i]));
          Products::multiply_registers(out, scores, stream + first * Products::kStride);
        }
      }
    }
  }

 private:
  struct Unweighted {
    MODA_EXT_DEVICE void see(int, int) const {}
    MODA_EXT_DEVICE float of(int, int) const { return 1.0f; }
  };

  // Weighs scores and hides later keys. `ahead`: position of the warp's first row, counted from key `first` of the
  // tile. A factor of 1 / eps may have no square in float32.
  template <class Weights>
  static MODA_EXT_DEVICE void weigh(int ahead, const float* factors, int first, const Weights& weights,
                                    float (&scores)[1][kPass / 8][4]) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int n = 0; n < kPass / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = n * 8 + 2 * t + i % 2, row = i / 2 * 8 + g;
        scores[0][n][i] = key > ahead + row ? 0.0f
                                            : scores[0][n][i] * factors[key] * factors[key] *
                                                  weights.of(warp_index() * 16 + row, first + key);
      }
    }
  }
};

struct CausalGramProjectionParams {
  CausalGramProjectionForwardArgs args;
  States states;
  int first_block, row_blocks;  // of kRows positions
};

// The place of a block in a grid over the modalities and row blocks of every query head.
struct ModalityRows {
  int modality, head, kv_head, first_position, first_query;
  int64_t sequence_index;
  Sequence sequence;

  template <class Params>
  MODA_EXT_DEVICE ModalityRows(const Params& p, int rows) {
    int64_t index = block_index();
    modality = static_cast<int>(index % p.args.num_modalities);
    index /= p.args.num_modalities;
    first_position = (p.first_block + static_cast<int>(index % p.row_blocks)) * rows;
    index /= p.row_blocks;
    head = static_cast<int>(index % p.args.query_heads);
    kv_head = head / (p.args.query_heads / p.args.kv_heads);
    sequence_index = index / p.args.query_heads;
    sequence = batch_element(p.args, sequence_index);
    first_query = first_position - (sequence.num_keys - sequence.num_queries);
  }
  MODA_EXT_DEVICE bool has_row(int row) const {
    return first_query + row >= 0 && first_query + row < sequence.num_queries;
  }
};

template <class Element, int kHeadDim>
struct CausalGramProjectionKernel {
  using Params = CausalGramProjectionParams;
  using Products = Fragments<Element, kHeadDim>;
  static constexpr int kRows = GramTile<Element, kHeadDim>::kRows, kThreads = 2 * kRows;
  using Projection = RowProjection<Element, kHeadDim, kRows, false>;

  static int64_t blocks(const Params& p) {
    return static_cast<int64_t>(p.args.num_sequences) * p.args.query_heads * p.row_blocks * p.args.num_modalities;
  }
  static size_t shared_bytes(const Params&) {
    return static_cast<size_t>(kRows) * Products::kStride + Projection::kSharedBytes;
  }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    const CausalGramProjectionForwardArgs& args = p.args;
    const ModalityRows at(p, kRows);
    const auto has_row = [&](int row) { return at.has_row(row); };
    copy_rows<Element, kHeadDim, kRows, kThreads>(
        shared, thread_index(), row_of<Element>(args.query, at.sequence.batch, at.head, at.first_query), args.query.row,
        args.head_dim, has_row);
    commit_copies();
    typename Projection::Sums out;
    Projection::run(args, p.states, at.sequence, at.sequence_index, at.kv_head, at.modality, at.first_position, shared,
                    shared + kRows * Products::kStride, out);

    const int g = lane_index() / 4, t = lane_index() % 4, warp_row = warp_index() * 16;
    char* rows = shared + warp_row * Products::kStride;
    sync_warp();  // every lane has read the queries, whose place the projection takes
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int own = h * 8 + g;
      const float scale = has_row(warp_row + own)
                              ? row_of<float>(args.row_scale, at.sequence.batch, at.kv_head,
                                              at.first_query + warp_row + own)[at.modality * args.row_scale.last]
                              : 0.0f;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
        Products::store_pair(rows + own * Products::kStride, n * 8 + 2 * t, out[0][n][2 * h] * scale,
                             out[0][n][2 * h + 1] * scale);
    }
    sync_warp();
    store_rows<Element, kHeadDim, 16>(rows, 0, args.head_dim, [&](int own) -> Element* {
      if (!has_row(warp_row + own)) return nullptr;
      return row_of<Element>(args.projection, at.sequence.batch, at.head, at.first_query + warp_row + own) +
             at.modality * args.projection.view;
    });
  }
};

template <class Element, int kHeadDim>
void causal_gram_projection(const CausalGramProjectionForwardArgs& args, void* workspace, void* stream) {
  using Kernel = CausalGramProjectionKernel<Element, kHeadDim>;
  const States states = make_states<Element, kHeadDim>(args, false, args.gram, workspace, stream);
  const int first_block = (args.num_keys - args.num_queries) / Kernel::kRows;
  const int row_blocks = static_cast<int>(divide_up(args.num_keys, Kernel::kRows)) - first_block;
  if (args.num_queries > 0) launch<Kernel>({args, states, first_block, row_blocks}, stream);
}

template <int kHeadDim>
int64_t CausalGramProjectionForwardKernels<kHeadDim>::workspace(const CausalGramProjectionForwardArgs& args,
                                                                Storage storage) {
  return states_bytes<kHeadDim>(args, storage, false);
}
template <int kHeadDim>
void CausalGramProjectionForwardKernels<kHeadDim>::run(const CausalGramProjectionForwardArgs& args, Storage storage,
                                                       void* workspace, void* stream) {
  if (storage == Storage::kBFloat16) return causal_gram_projection<BFloat16, kHeadDim>(args, workspace, stream);
  if (storage == Storage::kFloat16) return causal_gram_projection<Float16, kHeadDim>(args, workspace, stream);
  causal_gram_projection<float, kHeadDim>(args, workspace, stream);
}

}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
