// Forward pass of modular attention on the CPU (docs/mathematics.md sections 2 and 3).
//
//   S = tau q^(a_j) . k_j + b_{i, a_j}    p = exp(S - L)    o = sum_j p v_j
//   L = log(sum_j exp(S) + exp(c))        mass_m = sum_{a_j = m} p
//
// Tiling: a block of query rows (kBlockRows) meets key tiles of one modality each. Scores of a tile live in a scratch
// block in L2; the running maximum, the masses and the unnormalised output are rescaled once a tile (online softmax),
// in units of log2. The denominator needs no sum of its own: it is the sum of the masses plus the sink, whose logarithm
// seeds the running maximum. Biases and sinks are taken relative to a number of the row's own (row_base), so that large
// ones cost no precision. Work above the diagonal is skipped in units of (register block rows) x (one vector of
// keys), hidden (row, modality) pairs in units of register block rows. Memory traffic: packed keys and values are
// streamed once for each row block, 8 D bytes for 4 D kBlockRows operations, which caches serve easily; nothing of size
// N x N exists.
#pragma once

#include "cpu/kernels/common/few_rows.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

// Query rows of a work item. Vector kernels: a multiple of kRows (12, 8 or 6), 8, 12 or 16 register blocks. Tiles: whole
// strips of 32, and many, because each item streams all packed keys and values past its rows, at D = 128 and N = 2048
// from the third-level cache (17 GB/s a core: 8 % slower with 128 rows).
#if defined(__AMX_BF16__)
constexpr int kBlockRows = 256;
#else
constexpr int kBlockRows = 96;
#endif

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;
// Running maximum of a row that has seen nothing; finite.
template <class T>
constexpr T kLowest = sizeof(T) == 4 ? T(-3.0e38) : T(-1.0e308);

// State of a row block. Between tiles: output (unnormalised) and mass are relative to exp2(row_max).
template <class T>
struct RowState {
  T output[kBlockRows * kScratchStride<T>];
  T row_max[kBlockRows];
  T mass[kMaxModalities][kBlockRows];
  T base[kBlockRows];  // row_base; what follows and the maximum are relative to it, in log2 units
  T sink[kBlockRows];  // -inf without one
};

// The state that passes between items split over keys: maximum, masses and output of each row, dense.
template <class T>
int64_t partial_bytes(const ModularAttentionArgs& args, int64_t num_rows) {
  return sizeof(T) * num_rows * (1 + args.num_modalities + args.head_dim);
}

// The rows of an item, enumerated head by head. Addresses are kept as offsets so that sweeps over rows divide nothing.
struct ItemRows {
  const ModularAttentionForwardItem& item;
  int count;
  int32_t head[kBlockRows], row[kBlockRows];

  explicit ItemRows(const ModularAttentionForwardItem& item) : item(item), count(0) {
    for (int64_t h = 0; h < item.num_heads; ++h) {
      for (int64_t r = 0; r < item.num_rows; ++r) {
        head[count] = static_cast<int32_t>(item.first_head + h);
        row[count++] = static_cast<int32_t>(item.first_row + r);
      }
    }
  }
  template <class Element, class Operand>
  MODA_EXT_INLINE auto at(const Operand& operand, int i) const {
    return row_of<Element>(operand, item.sequence->batch, head[i], item.sequence->first_query + row[i]);
  }
};

// A number common to a row changes nothing in a softmax, yet beside a large one its scores would be rounded away. So
// biases and sink are taken relative to the largest of them that has a part in the row: of the sink, and of the biases
// of modalities of which the row sees a key. (A larger one that the row does not meet would leave only differences as
// large as it.) Differences of close numbers are exact; of distant ones, up to -inf where they overflow, the lower has
// no weight. All items of a row agree on it, whichever tiles they have.
template <class T>
T row_base(const ModularAttentionArgs& args, const ItemRows& rows, int i, T sink) {
  const Sequence& sequence = *rows.item.sequence;
  const int64_t last = args.causal ? rows.row[i] + sequence.num_keys - sequence.num_queries : sequence.num_keys - 1;
  const T* biases = args.bias.data == nullptr ? nullptr : rows.at<T>(args.bias, i);
  T base = sink;
  for (int m = 0; m < args.num_modalities; ++m) {
    if (sequence.first_position[m] > last) continue;
    const T bias = biases == nullptr ? T(0) : biases[args.bias.last * m];
    base = bias > base ? bias : base;
  }
  return base == T(-INFINITY) ? T(0) : base;
}

// Bias of a modality relative to the row's base, in log2 units; -inf where its keys have no weight. Above the base is
// only what the row does not meet, by any distance.
template <class T>
MODA_EXT_INLINE T relative_bias(const ModularAttentionArgs& args, const ItemRows& rows, int i, int modality, T base) {
  const T bias = args.bias.data == nullptr ? T(0) : rows.at<T>(args.bias, i)[args.bias.last * modality];
  const T relative = (bias - base) * T(kLog2e);
  return relative > T(0) ? T(-INFINITY) : relative;
}

template <class T>
void initialise_rows(const ModularAttentionArgs& args, const ItemRows& rows, RowState<T>& state) {
  for (int i = 0; i < rows.count; ++i) {
    const T sink = args.sink.data == nullptr ? T(-INFINITY) : *rows.at<T>(args.sink, i);
    state.base[i] = row_base(args, rows, i, sink);
    state.sink[i] = (sink - state.base[i]) * T(kLog2e);
    state.row_max[i] = state.sink[i] > kLowest<T> ? state.sink[i] : kLowest<T>;
  }
  memset(state.mass, 0, sizeof(T) * args.num_modalities * kBlockRows);
}

template <class Storage, class T>
void finish_rows(const ModularAttentionForwardArgs& args, const ItemRows& rows, RowState<T>& state) {
  for (int i = 0; i < rows.count; ++i) {
    T* output = state.output + i * kScratchStride<T>;
    T seen = 0;
    for (int m = 0; m < args.num_modalities; ++m) seen += state.mass[m][i];
    const T total = seen + exp2_nonpositive(state.sink[i] - state.row_max[i]);
    const T inverse = total == T(0) ? T(0) : T(1) / total;
    // lse = base + log of the sum, in double. The backward's probabilities inherit its error as a common factor of
    // their row, which beside a large base may be anything: what rounding takes (Knuth's two-sum) goes along.
    const double base = state.base[i];
    const double log_sum = (static_cast<double>(state.row_max[i]) + log2(static_cast<double>(total))) * kLn2;
    const T lse = total == T(0) ? T(-INFINITY) : static_cast<T>(base + log_sum);
    const double rest = static_cast<double>(lse) - base;
    const T residual = static_cast<T>((base - (static_cast<double>(lse) - rest)) + (log_sum - rest));
    store_row(output, inverse, rows.at<Storage>(args.out, i), args.head_dim);
    *rows.at<T>(args.lse, i) = lse;
    *rows.at<T>(args.lse_residual, i) = __builtin_isfinite(lse) ? residual : T(0);
    T* out_mass = rows.at<T>(args.mass, i);
    for (int m = 0; m < args.num_modalities; ++m) out_mass[m] = state.mass[m][i] * inverse;
  }
}

template <class T>
MODA_EXT_INLINE T row_max(const T* scores, int count) {
  constexpr int L = kLanes<T>;
  // Four chains hide the latency.
  Vector<T> best[4] = {splat(kLowest<T>), splat(kLowest<T>), splat(kLowest<T>), splat(kLowest<T>)};
  int j = 0;
  for (; j + 4 * L <= count; j += 4 * L) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) best[c] = maximum(best[c], load(scores + j + c * L));
  }
  for (; j + L <= count; j += L) best[0] = maximum(best[0], load(scores + j));
  if (j < count) best[1] = maximum(best[1], keep_first_or(load(scores + j), count - j, kLowest<T>));
  return reduce_max<T>(maximum(maximum(best[0], best[1]), maximum(best[2], best[3])));
}

// How far above 0 the exponent of a probability may be, and that of a row's largest below it.
constexpr float kSlack = 8;
template <class T>
MODA_EXT_INLINE Vector<T> within_slack(Vector<T> exponent) {
  return maximum(splat(T(-kSlack)), minimum(splat(T(kSlack)), exponent));
}

// scores[j] <- 2^(scores[j] + shift) for j < count, zero up to the end of the last vector; returns the sum.
template <class T>
MODA_EXT_INLINE T exponentiate_row(T* scores, int count, T shift) {
  constexpr int L = kLanes<T>;
  const Vector<T> c = splat(shift);
  Vector<T> sum{};
  int j = 0;
  for (; j + L <= count; j += L) {
    const Vector<T> p = exp2_nonpositive(load(scores + j) + c);
    store(scores + j, p);
    sum += p;
  }
  if (j < count) {
    const Vector<T> p = keep_first<T>(exp2_nonpositive(load(scores + j) + c), count - j);
    store(scores + j, p);
    sum += p;
  }
  return reduce_add<T>(sum);
}

template <class T>
MODA_EXT_INLINE void zero_from(T* row, int begin, int end) {
  if (begin < end) memset(row + begin, 0, sizeof(T) * (end - begin));
}

// The vector engine: products by multiply_panel. An engine is how one item computes: its scratch, the packed form of
// keys and values, the queries, and one tile of attention for all rows. forward() below drives it.
//
// Element is what the operands of its products are made of (gemm.h): the compute type, or pairs for bfloat16 where the
// machine multiplies them. Then queries, keys and values are used as they are, without a rounding of their own, and
// probabilities are rounded to bfloat16 for the second product, not in the masses: half of what dense attention in
// bfloat16 rounds, which rounds the scores too. Few rows, which keys are not packed for, stay in the compute type.
template <class StorageType, class ComputeType, class Element = ComputeType>
class VectorEngine {
 public:
  using Storage = StorageType;
  using T = ComputeType;
  using Packed = Element;
  static constexpr int kTileKeys = 256;  // <= kScratchColumns
  static constexpr int kMostUnpackedRows = kFewRows;

  struct Scratch {
    RowState<T> state;
    T scores[kBlockRows * kScratchStride<T>];
    T bias[kBlockRows];       // relative_bias of the tile's modality
    T tile_max[kBlockRows];   // maximum of the tile's scores, without bias
    T shift[kBlockRows];      // bias - running maximum
    T reference[kBlockRows];  // what is taken off the scores first
    T rescale[kBlockRows];    // 2^(old - new running maximum)
    // followed by: one query block for each view, then room for one packed tile
  };

  static int64_t packed_elements(const ModularAttentionArgs& args, int64_t num_panels) {
    return num_panels * elements_of<Element>(kPanel<T>) * (args.head_dim + round_up_to_panel<T>(args.head_dim));
  }
  static int64_t scratch_bytes(const ModularAttentionArgs& args) {
    return sizeof(Scratch) + sizeof(T) * args.num_views * kBlockRows * kScratchStride<T> +
           sizeof(Element) * packed_elements(args, kTileKeys / kPanel<T>);
  }

  static void pack(const ModularAttentionArgs& args, const Sequence& sequence, int64_t kv_head, const KeyTile& tile,
                   Element* packed) {
    Element rows[kLanes<T> * kScratchColumns];
    pack_transposed<Storage>(args.key, sequence, kv_head, tile, args.head_dim, rows, packed);
    pack_columns<Storage>(args.value, sequence, kv_head, tile, args.head_dim, T(1), rows,
                          packed + packed_value_offset(args, tile));
  }

  VectorEngine(const ModularAttentionForwardArgs& args, void* memory)
      : args_(args),
        scratch_(*static_cast<Scratch*>(memory)),
        queries_(reinterpret_cast<T*>(&scratch_ + 1)),
        own_tile_(reinterpret_cast<Element*>(queries_ + args.num_views * kBlockRows * kScratchStride<T>)) {}

  RowState<T>& state() { return scratch_.state; }
  Element* own_tile() { return own_tile_; }

  void start(const ItemRows& rows) {
    for (int i = 0; i < rows.count; ++i)
      memset(state().output + i * kScratchStride<T>, 0, sizeof(T) * round_up_to_panel<T>(args_.head_dim));
  }

  void load_queries(const ItemRows& rows, int view) {
    if (rows.item.packed == nullptr && rows.count <= kMostUnpackedRows) {
      load_queries(rows, view, queries_of<T>(view));
    } else {
      load_queries(rows, view, queries_of<Element>(view));
    }
  }

  void attend(const ItemRows& rows, const KeyTile& tile, int view, const Element* packed);

  void finish(const ItemRows&) {}  // outputs are in state().output already

 private:
  // Values of a tile follow its transposed keys.
  static int64_t packed_value_offset(const ModularAttentionArgs& args, const KeyTile& tile) {
    return round_up_to_panel<T>(tile.length) * elements_of<Element>(args.head_dim);
  }

  T factor() const { return T(args_.scale * kLog2e); }
  template <class E>
  E* queries_of(int view) {
    return reinterpret_cast<E*>(queries_) + view * kBlockRows * kScratchStride<E>;
  }
  template <class E>
  void load_queries(const ItemRows& rows, int view, E* block) {
    for (int i = 0; i < rows.count; ++i)
      load_elements(rows.at<Storage>(args_.query, i) + args_.query.view * view, factor(), block + i * kScratchStride<E>,
                    args_.head_dim);
  }

  const ModularAttentionForwardArgs& args_;
  Scratch& scratch_;
  T* queries_;
  Element* own_tile_;
};

// One tile for all rows of the item: scores, online softmax, weighted values.
template <class Storage, class T, class Element>
void VectorEngine<Storage, T, Element>::attend(const ItemRows& rows, const KeyTile& tile, int view,
                                               const Element* packed) {
  constexpr int kStride = kScratchStride<T>;
  constexpr bool kPairs = kPerElement<Element> > 1;
  const ModularAttentionForwardArgs& args = args_;
  Scratch& scratch = scratch_;
  const Sequence& sequence = *rows.item.sequence;
  const int64_t last_offset = args.causal ? sequence.num_keys - sequence.num_queries : sequence.num_keys;
  const int count = rows.count;
  RowState<T>& state = scratch.state;

  int visible[kBlockRows];        // keys of the tile that the row sees
  int limit[kBlockRows / kRows];  // the largest of a register block
  T* bias = scratch.bias;
  int tile_limit = 0;
  for (int block = 0; block * kRows < count; ++block) {
    limit[block] = 0;
    for (int i = block * kRows; i < count && i < (block + 1) * kRows; ++i) {
      bias[i] = relative_bias(args, rows, i, tile.modality, state.base[i]);
      const int64_t last = args.causal ? rows.row[i] + last_offset : last_offset;
      visible[i] = bias[i] == T(-INFINITY) ? 0 : visible_keys(sequence.order, tile, last);
      limit[block] = limit[block] > visible[i] ? limit[block] : visible[i];
    }
    tile_limit = tile_limit > limit[block] ? tile_limit : limit[block];
  }
  if (tile_limit == 0) return;

  const int64_t kv_head = rows.item.first_head / args.group;
  const Storage *keys_of_tile[kTileKeys], *values_of_tile[kTileKeys];  // where they are not packed
  if (packed == nullptr) {
    find_rows(args.key, sequence, kv_head, tile, 0, tile_limit, keys_of_tile);
    find_rows(args.value, sequence, kv_head, tile, 0, tile_limit, values_of_tile);
    const auto key = [&](int j) MODA_EXT_ALWAYS_INLINE { return keys_of_tile[j]; };
    const auto ahead = [&](int j) {
      prefetch_rows(values_of_tile[j], 0, 1, args.head_dim);
      if (j + kKeysAhead < tile_limit) prefetch_rows(keys_of_tile[j + kKeysAhead], 0, 1, args.head_dim);
    };
    score_rows(count, tile_limit, args.head_dim, queries_of<T>(view), key, ahead, scratch.scores);
  }
  const int depth = elements_of<Element>(args.head_dim);
  for (int panel = 0; packed != nullptr && panel < tile_limit; panel += kPanel<T>) {
    for (int block = 0; block * kRows < count; ++block) {
      if (limit[block] <= panel) continue;
      const int i = block * kRows;
      multiply_panel<Element, Order::kRowMajor, Accumulate::kStore>(
          count - i < kRows ? count - i : kRows, limit[block] - panel, depth, queries_of<Element>(view) + i * kStride,
          packed + static_cast<int64_t>(panel) * depth, kPanel<T>, scratch.scores + i * kStride + panel, kStride,
          nullptr, factor());
    }
  }

  // Softmax in three sweeps, each free of dependencies between neighbours: maxima of rows, running state of all rows in
  // vectors, exponentials of rows.
  for (int i = 0; i < count; ++i)
    scratch.tile_max[i] = visible[i] > 0 ? row_max(scratch.scores + i * kStride, visible[i]) : kLowest<T>;
  for (int i = 0; i < count; i += kLanes<T>) {
    const Vector<T> before = load(state.row_max + i), b = load(bias + i);
    const Vector<T> now = maximum(load(scratch.tile_max + i) + b, before);
    const Vector<T> rescale = exp2_nonpositive(before - now);
    store(state.row_max + i, now);
    // What rounding leaves of the largest score. Where it is large, because they are, scores are taken relative to the
    // largest, and what is left is bounded.
    const Vector<T> top = load(scratch.tile_max + i), left = top + (b - now);
    const Bits<T> far = (left > splat(T(kSlack))) | ((now > before) & (left < splat(T(-kSlack))));
    store(scratch.reference + i, choose<T>(far, top, Vector<T>{}));
    store(scratch.shift + i, choose<T>(far, within_slack<T>(left), b - now));
    store(scratch.rescale + i, rescale);
    for (int m = 0; m < args.num_modalities; ++m) store(state.mass[m] + i, load(state.mass[m] + i) * rescale);
  }
  T* mass = state.mass[tile.modality];
  for (int i = 0; i < count; ++i) {
    T* scores = scratch.scores + i * kStride;
    if (scratch.reference[i] != T(0))
      for (int j = 0; j < visible[i]; ++j) scores[j] -= scratch.reference[i];
    if (visible[i] > 0) mass[i] += exponentiate_row(scores, visible[i], scratch.shift[i]);
    if (packed == nullptr) {
      zero_from(scores, visible[i], tile_limit);
    } else {
      const int end = elements_of<Element>(limit[i / kRows]) * kPerElement<Element>;
      zero_from(scores, visible[i], end);
      if constexpr (kPairs) make_row_pairs(scores, end);
    }
  }

  if (packed == nullptr) {
    const auto value = [&](int j) MODA_EXT_ALWAYS_INLINE { return values_of_tile[j]; };
    add_weighted_rows(count, tile_limit, args.head_dim, scratch.scores, value, state.output, scratch.rescale);
    return;
  }
  const Element* weights = reinterpret_cast<const Element*>(scratch.scores);
  const Element* values = packed + packed_value_offset(args, tile);
  for (int column = 0; column < args.head_dim; column += kPanel<T>) {
    for (int block = 0; block * kRows < count; ++block) {
      if (limit[block] == 0) continue;
      const int i = block * kRows;
      multiply_panel<Element, Order::kRowMajor, Accumulate::kScaledAdd>(
          count - i < kRows ? count - i : kRows, args.head_dim - column, elements_of<Element>(limit[block]),
          weights + i * kStride, values + static_cast<int64_t>(column) * elements_of<Element>(tile.length), kPanel<T>,
          state.output + i * kStride + column, kStride, scratch.rescale + i);
    }
  }
}

// Where a tile lies in the packed keys and values of its kv head.
template <class Engine>
const typename Engine::Packed* packed_tile(const ModularAttentionArgs& args, const KeyTile& tile, const void* packed) {
  return static_cast<const typename Engine::Packed*>(packed) + Engine::packed_elements(args, tile.panel);
}

template <class Engine>
void pack_tile(const ModularAttentionArgs& args, const Sequence& sequence, int64_t kv_head, int64_t index,
               void* packed) {
  const KeyTile& tile = sequence.tiles[index];
  Engine::pack(args, sequence, kv_head, tile,
               static_cast<typename Engine::Packed*>(packed) + Engine::packed_elements(args, tile.panel));
}

template <class Engine>
void forward(const ModularAttentionForwardArgs& args, const ModularAttentionForwardItem& item,
             const ModularAttentionForwardItem* next, void* memory) {
  using Storage = typename Engine::Storage;
  using T = typename Engine::T;
  Engine engine(args, memory);
  RowState<T>& state = engine.state();
  const Sequence& sequence = *item.sequence;
  const ItemRows rows(item);
  initialise_rows(args, rows, state);
  engine.start(rows);
  // The outputs are written once, at the end, and the next item's queries are read at its start: asking for their lines
  // now hides the cache misses behind this item.
  if (item.partial == nullptr)
    for (int i = 0; i < rows.count; ++i) prefetch_rows(rows.at<Storage>(args.out, i), 0, 1, args.head_dim);
  if (next != nullptr && args.num_views == 1)
    for (int64_t h = 0; h < next->num_heads; ++h)
      prefetch_rows(row_of<Storage>(args.query, next->sequence->batch, next->first_head + h,
                                    next->sequence->first_query + next->first_row),
                    args.query.row, next->num_rows, args.head_dim);
  const int64_t last_position =
      args.causal ? item.first_row + item.num_rows - 1 + sequence.num_keys - sequence.num_queries : sequence.num_keys;

  uint32_t loaded_views = 0;
  for (int64_t index = item.first_tile; index < item.last_tile; ++index) {
    const KeyTile& tile = sequence.tiles[index];
    if (visible_keys(sequence.order, tile, last_position) == 0) continue;
    const int view = args.num_views > 1 ? tile.modality : 0;
    if ((loaded_views >> view & 1) == 0) {
      loaded_views |= 1u << view;
      engine.load_queries(rows, view);
    }
    const typename Engine::Packed* packed = nullptr;
    if (item.packed != nullptr) {
      packed = packed_tile<Engine>(args, tile, item.packed);
    } else if (rows.count > Engine::kMostUnpackedRows) {
      packed = engine.own_tile();
      Engine::pack(args, sequence, item.first_head / args.group, tile, engine.own_tile());
    }
    engine.attend(rows, tile, view, packed);
  }
  engine.finish(rows);

  if (item.partial == nullptr) {
    finish_rows<Storage, T>(args, rows, state);
    return;
  }
  T* partial = static_cast<T*>(item.partial);
  for (int i = 0; i < rows.count; ++i) {
    *partial++ = state.row_max[i];
    for (int m = 0; m < args.num_modalities; ++m) *partial++ = state.mass[m][i];
    memcpy(partial, state.output + i * kScratchStride<T>, sizeof(T) * args.head_dim);
    partial += args.head_dim;
  }
}

template <class Engine>
void merge(const ModularAttentionForwardArgs& args, const ModularAttentionForwardItem& item, void* const* partials,
           int num_splits, void* memory) {
  using T = typename Engine::T;
  Engine engine(args, memory);
  RowState<T>& state = engine.state();
  const ItemRows rows(item);
  initialise_rows(args, rows, state);
  const int64_t width = 1 + args.num_modalities + args.head_dim;
  for (int i = 0; i < rows.count; ++i) {
    for (int s = 0; s < num_splits; ++s) {
      const T maximum = static_cast<const T*>(partials[s])[i * width];
      state.row_max[i] = maximum > state.row_max[i] ? maximum : state.row_max[i];
    }
    T* output = state.output + i * kScratchStride<T>;
    memset(output, 0, sizeof(T) * args.head_dim);
    for (int s = 0; s < num_splits; ++s) {
      const T* partial = static_cast<const T*>(partials[s]) + i * width;
      const T rescale = exp2_nonpositive(partial[0] - state.row_max[i]);
      for (int m = 0; m < args.num_modalities; ++m) state.mass[m][i] += rescale * partial[1 + m];
      for (int d = 0; d < args.head_dim; ++d) output[d] += rescale * partial[1 + args.num_modalities + d];
    }
  }
  finish_rows<typename Engine::Storage, T>(args, rows, state);
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
