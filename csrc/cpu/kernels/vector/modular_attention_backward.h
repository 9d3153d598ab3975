// Backward pass of modular attention on the CPU (docs/mathematics.md section 3).
//
//   D_i = dO_i . o_i + sum_m g_im mass_im - dL_i                   dS_ij = p_ij (dO_i . v_j + g_{i,a_j} - D_i)
//   dq^(m)_i = tau sum_{a_j = m} dS_ij k_j    dk_j = tau sum_i dS_ij q_i^(a_j)    dv_j = sum_i p_ij dO_i
//   db_im = sum_{a_j = m} dS_ij               dc_i = -exp(c_i - L_i) D_i
//
// Tiling: a work item owns a stretch of query rows of one kv head (all heads of the group when the item owns the head),
// so query, bias and sink gradients are written by one thread in a fixed order. The outer loop runs over key tiles,
// which are packed once in the three forms the products need (K^T for S, V^T for dP, K by columns for dQ); the inner
// loop over row blocks recomputes P from lse and runs the five products. Key gradients of the tile stay in scratch over
// the whole inner loop. Packing three forms of a tile costs 3 D per key for 10 D rows operations. The sum order depends
// on shapes and on the number of items alone: results are deterministic.
#pragma once

#include "cpu/kernels/vector/modular_attention_forward.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

constexpr int kBackwardTileKeys = 128;  // 5 blocks of 128 x D and 4 of 96 x D floats stay in 1 MB of L2 at D = 128

// Query-side rows of a block as operands: `rows` of products over columns, over_rows() of products over rows.
template <class E>
struct RowOperand {
  E rows[kBlockRows * kScratchStride<E>];

  template <class Storage>
  void load(const Storage* from, int64_t row_stride, int count, int head_dim, Sum<E> factor) {
    load_block(from, row_stride, count, head_dim, factor, rows);
  }
  const E* over_rows() const { return rows; }
};
template <>
struct RowOperand<Pair> {
  Pair rows[kBlockRows * kScratchStride<Pair>];
  Pair pairs[kBlockRows / 2 * kScratchStride<Pair>];

  template <class Storage>
  void load(const Storage* from, int64_t row_stride, int count, int head_dim, float factor) {
    load_block(from, row_stride, count, head_dim, factor, rows);
    for (int i = 0; i < count; i += 2)
      interleave_rows(from + i * row_stride, i + 1 < count ? from + (i + 1) * row_stride : nullptr, head_dim,
                      pairs + i / 2 * kScratchStride<Pair>);
  }
  const Pair* over_rows() const { return pairs; }
};

// P and dS of a block and a tile, one above the other: products over keys read the rows of dS, products over rows the
// columns of both. Of numbers, rows and columns are the same block; of pairs, they are in different ones.
template <class T, class E>
struct ScoreBlocks {
  T probability[kBlockRows * kScratchStride<T>];  // S, then P
  T grad_score[kBlockRows * kScratchStride<T>];   // dP, then dS

  void finish_rows(int, int, int) {}
  const T* probability_columns() const { return probability; }
  const T* grad_score_columns() const { return grad_score; }
  const T* grad_score_rows() const { return grad_score; }
};
#if defined(MODA_EXT_PAIRS)
template <class T>
struct ScoreBlocks<T, Pair> {
  T probability[kBlockRows * kScratchStride<T>];
  T grad_score[kBlockRows * kScratchStride<T>];
  Pair columns[kBlockRows / 2 * kScratchStride<Pair>];

  // Rows i and i + 1, of which the block has `count`, become pairs: P over rows in the place of row i / 2, which has
  // been read; dS in both forms.
  void finish_rows(int i, int count, int keys) {
    constexpr int kStride = kScratchStride<T>;
    T *p = probability + i * kStride, *ds = grad_score + i * kStride;
    if (i + 1 == count) {
      memset(p + kStride, 0, sizeof(T) * keys);
      memset(ds + kStride, 0, sizeof(T) * keys);
    }
    make_pairs_of_rows(p, p + kStride, keys, reinterpret_cast<Pair*>(probability + i / 2 * kStride));
    make_pairs_of_rows(ds, ds + kStride, keys, columns + i / 2 * kStride);
    make_row_pairs(ds, keys);
    make_row_pairs(ds + kStride, keys);
  }
  const Pair* probability_columns() const { return reinterpret_cast<const Pair*>(probability); }
  const Pair* grad_score_columns() const { return columns; }
  const Pair* grad_score_rows() const { return reinterpret_cast<const Pair*>(grad_score); }
};
#endif

template <class T, class E>
struct BackwardScratch {
  RowOperand<E> query, grad_out;
  ScoreBlocks<T, E> scores;
  T grad_key[kBackwardTileKeys * kScratchStride<T>];
  T grad_value[kBackwardTileKeys * kScratchStride<T>];
  E rows[kLanes<T> * kScratchColumns];
  // followed by: packed K^T, V^T and K, then the query gradient of the item's rows unless it is accumulated in place
};

// The query gradient can be accumulated in the output itself if that has the compute type and rows of whole vectors.
template <class Storage, class T>
bool accumulates_in_place(const ModularAttentionBackwardArgs& args) {
  return sizeof(Storage) == sizeof(T) && args.head_dim % kLanes<T> == 0;
}

// Packed K^T, V^T and K of a tile: each.
template <class E>
int64_t packed_form_elements(int64_t width) {
  return kBackwardTileKeys / kPerElement<E> * width;
}

template <class Storage, class T, class E>
int64_t backward_scratch_bytes(const ModularAttentionBackwardArgs& args, int64_t num_blocks) {
  const int64_t width = round_up_to_panel<T>(args.head_dim);
  int64_t gradients = 0;
  if (args.grad_query.data != nullptr && !accumulates_in_place<Storage, T>(args))
    gradients = args.num_views * num_blocks * kBlockRows * width;
  return sizeof(BackwardScratch<T, E>) + sizeof(E) * 3 * packed_form_elements<E>(width) + sizeof(T) * gradients;
}

// A block of rows of one head, and what a tile shows it.
template <class T>
struct BlockView {
  int64_t head, first_row;
  int count;
  int visible[kBlockRows];        // keys of the tile that the row sees
  int limit[kBlockRows / kRows];  // the largest of a register block
  int tile_limit;
};

// number - L of a row, for its sink and its biases: of ordinary size wherever the number has a part in the row, however
// large both are, since lse is taken off first and then what rounding took from lse.
template <class T>
MODA_EXT_INLINE double natural_exponent(const ModularAttentionBackwardArgs& args, const Sequence& sequence,
                                        int64_t head, int64_t row, T number) {
  const T lse = *row_of<T>(args.saved_lse, sequence.batch, head, sequence.first_query + row);
  const T residual = *row_of<T>(args.saved_lse_residual, sequence.batch, head, sequence.first_query + row);
  return (static_cast<double>(number) - static_cast<double>(lse)) - static_cast<double>(residual);
}

// exp(c - L): the part of a row that its sink has.
template <class T>
T sink_probability(const ModularAttentionBackwardArgs& args, const Sequence& sequence, int64_t head, int64_t row) {
  if (args.sink.data == nullptr) return 0;
  const T sink = *row_of<T>(args.sink, sequence.batch, head, sequence.first_query + row);
  if (sink == T(-INFINITY)) return 0;
  // Above 0 only where scores are so large that their rounding decides about the sink.
  const double exponent = natural_exponent(args, sequence, head, row, sink);
  return static_cast<T>(exp(exponent > 0 ? 0 : exponent));
}

template <class T>
void prepare_row(const ModularAttentionBackwardArgs& args, const Sequence& sequence, int64_t head, int64_t row,
                 const T* out, const T* grad_out) {
  T delta = 0;
  {
    constexpr int L = kLanes<T>;
    Vector<T> sum{};
    int d = 0;
    for (; d + L <= args.head_dim; d += L) sum += load(out + d) * load(grad_out + d);
    delta = reduce_add<T>(sum);
    for (; d < args.head_dim; ++d) delta += out[d] * grad_out[d];
  }
  if (args.grad_mass.data != nullptr) {
    const T* grad_mass = row_of<T>(args.grad_mass, sequence.batch, head, sequence.first_query + row);
    const T* mass = row_of<T>(args.saved_mass, sequence.batch, head, sequence.first_query + row);
    for (int m = 0; m < args.num_modalities; ++m)
      delta += grad_mass[m * args.grad_mass.last] * mass[m * args.saved_mass.last];
  }
  if (args.grad_lse.data != nullptr)
    delta -= *row_of<T>(args.grad_lse, sequence.batch, head, sequence.first_query + row);
  *row_of<T>(args.delta, sequence.batch, head, sequence.first_query + row) = delta;
  if (args.grad_bias.data != nullptr) {
    memset(row_of<T>(args.grad_bias, sequence.batch, head, sequence.first_query + row), 0,
           sizeof(T) * args.num_modalities);
    memset(row_of<T>(args.probability_sums, sequence.batch, head, sequence.first_query + row), 0,
           sizeof(T) * args.num_modalities);
  }
  if (args.grad_sink.data != nullptr)
    *row_of<T>(args.grad_sink, sequence.batch, head, sequence.first_query + row) =
        -sink_probability<T>(args, sequence, head, row) * delta;
}

// db_m = sum dS over the keys of modality m is a small difference of large numbers (zero for one modality without a
// sink), and the D_i that went into dS was made from the rounded output. Here it is replaced by the D that the row's
// own probabilities imply, and the common factor that the rounding of lse gives to them is divided out, known from what
// they should sum to:
//   k = sum_m mass_m / sum_m Q_m    with Q_m = sum P; 1 where the scores are so large that it is far from it
//   D = k sum_m (db_m + Q_m D_i) - dL
//   db_m <- k (db_m + Q_m (D_i - D))    where D_i - D = s D_i - k sum_m db_m + dL, with s the sink's part of the row:
// 1 - sum_m mass_m would be one more difference of large numbers.
// The keys of a part of a row do not say what its probabilities sum to: their db_m stays as it is.
template <class T>
void finish_bias_gradient(const ModularAttentionBackwardArgs& args, const Sequence& sequence, int64_t head,
                          int64_t row) {
  if (!args.whole_rows) return;
  T* grad = row_of<T>(args.grad_bias, sequence.batch, head, sequence.first_query + row);
  const T* sums = row_of<T>(args.probability_sums, sequence.batch, head, sequence.first_query + row);
  const T* mass = row_of<T>(args.saved_mass, sequence.batch, head, sequence.first_query + row);
  T seen = 0, expected = 0, grads = 0;
  for (int m = 0; m < args.num_modalities; ++m) {
    seen += sums[m];
    grads += grad[m];
    expected += mass[m * args.saved_mass.last];
  }
  if (seen == T(0)) return;
  const T of_sink = sink_probability<T>(args, sequence, head, row);
  if (of_sink == T(0)) expected = 1;
  const T ratio = expected / seen, correction = ratio > T(0.5) && ratio < T(2) ? ratio : T(1);
  T difference =
      *row_of<T>(args.delta, sequence.batch, head, sequence.first_query + row) * of_sink - correction * grads;
  if (args.grad_lse.data != nullptr)
    difference += *row_of<T>(args.grad_lse, sequence.batch, head, sequence.first_query + row);
  for (int m = 0; m < args.num_modalities; ++m) grad[m] = (grad[m] + sums[m] * difference) * correction;
}

template <class T>
bool view_block(const ModularAttentionBackwardArgs& args, const Sequence& sequence, const KeyTile& tile,
                BlockView<T>& block) {
  block.tile_limit = 0;
  const int64_t offset = args.causal ? sequence.num_keys - sequence.num_queries : sequence.num_keys;
  if (visible_keys(sequence.order, tile, args.causal ? block.first_row + block.count - 1 + offset : offset) == 0)
    return false;
  for (int first = 0; first < block.count; first += kRows) {
    int limit = 0;
    for (int i = first; i < block.count && i < first + kRows; ++i) {
      const int64_t row = block.first_row + i;
      const bool hidden = args.bias.data != nullptr &&
                          row_of<T>(args.bias, sequence.batch, block.head,
                                    sequence.first_query + row)[args.bias.last * tile.modality] == T(-INFINITY);
      block.visible[i] = hidden ? 0 : visible_keys(sequence.order, tile, args.causal ? row + offset : offset);
      limit = limit > block.visible[i] ? limit : block.visible[i];
    }
    block.limit[first / kRows] = limit;
    block.tile_limit = block.tile_limit > limit ? block.tile_limit : limit;
  }
  return block.tile_limit > 0;
}

// What turns a score in log2 units into a probability: P = 2^(s + shift) factor. The query, or the product of pairs, is
// scaled exactly as in the forward pass, so that the scores are the same numbers that went into lse (but those of few
// rows, few_rows.h, whose sums have another order: off by a rounding of the score). The shift, (bias - L) log2(e), is large where rows are long; its rounding error would be common to the row and survive sums over keys (the
// bias gradient), so the factor 2^error takes it back. The error is above 0.1 only where scores themselves are so large
// that their rounding decides about P; nonpositive_exponent() keeps it a probability.
template <class T>
struct RowExponent {
  T shift, factor;

  explicit RowExponent(double natural) {
    const double exact = natural * kLog2e;
    shift = static_cast<T>(exact);
    const double error = exact - static_cast<double>(shift);
    factor = static_cast<T>(error > -0.1 && error < 0.1 ? 1 + kLn2 * error : 1);
  }
};
template <class T>
MODA_EXT_INLINE Vector<T> nonpositive_exponent(Vector<T> x) {
  return minimum(Vector<T>{}, x);
}

// Sums over the visible keys of one modality: of P, and of dS.
template <class T>
struct RowSums {
  T probability, grad_score;
};

// scores <- P, grads <- dS for one row.
template <class T>
MODA_EXT_INLINE RowSums<T> score_gradient_row(T* scores, T* grads, int count, const RowExponent<T>& exponent, T delta) {
  constexpr int L = kLanes<T>;
  const Vector<T> c = splat(exponent.shift), f = splat(exponent.factor), d = splat(delta);
  Vector<T> probability{}, grad_score{};
  int j = 0;
  for (; j + L <= count; j += L) {
    const Vector<T> p = exp2_nonpositive(nonpositive_exponent<T>(load(scores + j) + c)) * f;
    const Vector<T> ds = p * (load(grads + j) - d);
    store(scores + j, p);
    store(grads + j, ds);
    probability += p;
    grad_score += ds;
  }
  if (j < count) {
    const Vector<T> p = keep_first<T>(exp2_nonpositive(nonpositive_exponent<T>(load(scores + j) + c)) * f, count - j);
    const Vector<T> ds = keep_first<T>(p * (load(grads + j) - d), count - j);
    store(scores + j, p);
    store(grads + j, ds);
    probability += p;
    grad_score += ds;
  }
  return {reduce_add<T>(probability), reduce_add<T>(grad_score)};
}

// C[i] += sum_rows A[row][i] B[row] for the keys i of a tile: rows before the first that sees a register block of keys
// are left out.
template <class T, class E>
void accumulate_key_gradient(const BlockView<T>& block, const E* a, const E* b, int head_dim, T* c) {
  constexpr int kStride = kScratchStride<T>;
  int first_row[kBackwardTileKeys / kRows + 1];
  for (int key = 0, row = 0; key < block.tile_limit; key += kRows) {
    while (block.visible[row] <= key) ++row;  // ends: some row sees tile_limit keys
    first_row[key / kRows] = row;
  }
  for (int column = 0; column < head_dim; column += kPanel<T>) {
    for (int key = 0; key < block.tile_limit; key += kRows) {
      const int row = first_row[key / kRows] / kPerElement<E>;
      multiply_panel<E, Order::kColumnMajor, Accumulate::kAdd>(
          block.tile_limit - key < kRows ? block.tile_limit - key : kRows, head_dim - column,
          elements_of<E>(block.count) - row, a + row * kStride + key, b + row * kStride + column, kStride,
          c + key * kStride + column, kStride, nullptr);
    }
  }
}

// The five products of one key tile and one row block. query_grad: rows of the query gradient, or null.
template <class T, class E>
void differentiate_block(const ModularAttentionBackwardArgs& args, const Sequence& sequence, const KeyTile& tile,
                         const BlockView<T>& block, const E* keys_transposed, const E* values_transposed, const E* keys,
                         T* query_grad, int64_t query_grad_stride, BackwardScratch<T, E>& scratch) {
  constexpr int kStride = kScratchStride<T>;
  const int depth = elements_of<E>(args.head_dim);
  ScoreBlocks<T, E>& scores = scratch.scores;
  for (int panel = 0; panel < block.tile_limit; panel += kPanel<T>) {
    for (int i = 0; i < block.count; i += kRows) {
      const int columns = block.limit[i / kRows] - panel;
      if (columns <= 0) continue;
      const int rows = block.count - i < kRows ? block.count - i : kRows;
      const int64_t offset = static_cast<int64_t>(panel) * depth;
      multiply_panel<E, Order::kRowMajor, Accumulate::kStore>(
          rows, columns, depth, scratch.query.rows + i * kStride, keys_transposed + offset, kPanel<T>,
          scores.probability + i * kStride + panel, kStride, nullptr, T(args.scale * kLog2e));
      multiply_panel<E, Order::kRowMajor, Accumulate::kStore, kShortChain<E>>(
          rows, columns, depth, scratch.grad_out.rows + i * kStride, values_transposed + offset, kPanel<T>,
          scores.grad_score + i * kStride + panel, kStride, nullptr);
    }
  }

  const int end = elements_of<E>(block.tile_limit) * kPerElement<E>;
  for (int i = 0; i < block.count; ++i) {
    T* probability = scores.probability + i * kStride;
    T* grad_score = scores.grad_score + i * kStride;
    if (block.visible[i] > 0) {
      const int64_t row = block.first_row + i;
      T bias = 0;
      if (args.bias.data != nullptr)
        bias = row_of<T>(args.bias, sequence.batch, block.head,
                         sequence.first_query + row)[args.bias.last * tile.modality];
      T delta = *row_of<T>(args.delta, sequence.batch, block.head, sequence.first_query + row);
      if (args.grad_mass.data != nullptr)
        delta -= row_of<T>(args.grad_mass, sequence.batch, block.head,
                           sequence.first_query + row)[args.grad_mass.last * tile.modality];
      const RowExponent<T> exponent(natural_exponent(args, sequence, block.head, row, bias));
      const RowSums<T> sums = score_gradient_row(probability, grad_score, block.visible[i], exponent, delta);
      if (args.grad_bias.data != nullptr) {
        row_of<T>(args.probability_sums, sequence.batch, block.head, sequence.first_query + row)[tile.modality] +=
            sums.probability;
        row_of<T>(args.grad_bias, sequence.batch, block.head, sequence.first_query + row)[tile.modality] +=
            sums.grad_score;
      }
    }
    zero_from(probability, block.visible[i], end);
    zero_from(grad_score, block.visible[i], end);
    if (i % 2 == 1 || i + 1 == block.count) scores.finish_rows(i / 2 * 2, block.count, end);
  }

  if (args.grad_value.data != nullptr)
    accumulate_key_gradient(block, scores.probability_columns(), scratch.grad_out.over_rows(), args.head_dim,
                            scratch.grad_value);
  if (args.grad_key.data != nullptr)
    accumulate_key_gradient(block, scores.grad_score_columns(), scratch.query.over_rows(), args.head_dim,
                            scratch.grad_key);
  if (query_grad != nullptr) {
    for (int column = 0; column < args.head_dim; column += kPanel<T>) {
      for (int i = 0; i < block.count; i += kRows) {
        if (block.limit[i / kRows] == 0) continue;
        multiply_panel<E, Order::kRowMajor, Accumulate::kAdd>(
            block.count - i < kRows ? block.count - i : kRows, args.head_dim - column,
            elements_of<E>(block.limit[i / kRows]), scores.grad_score_rows() + i * kStride,
            keys + static_cast<int64_t>(column) * elements_of<E>(tile.length), kPanel<T>,
            query_grad + i * query_grad_stride + column, query_grad_stride, nullptr, T(args.scale));
      }
    }
  }
}

template <class Storage, class T, class E>
void write_key_gradients(const ModularAttentionBackwardArgs& args, const ModularAttentionBackwardItem& item,
                         const KeyTile& tile, BackwardScratch<T, E>& scratch) {
  // dk = tau sum dS q; numbers of the query came in as tau log2(e) q, see RowExponent, pairs as q.
  const T key_factor = kPerElement<E> > 1 ? T(args.scale) : T(kLn2);
  const Sequence& sequence = *item.sequence;
  T* partial = static_cast<T*>(item.partial);
  for (int j = 0; j < tile.length; ++j) {
    T* key = scratch.grad_key + j * kScratchStride<T>;
    T* value = scratch.grad_value + j * kScratchStride<T>;
    if (partial != nullptr) {
      const int64_t slot = tile.start + j;
      store_row(key, key_factor, partial + slot * args.head_dim, args.head_dim);
      store_row(value, T(1), partial + (sequence.num_slots + slot) * args.head_dim, args.head_dim);
      continue;
    }
    const int64_t position = sequence.order[tile.start + j];
    if (args.grad_key.data != nullptr)
      store_row(key, key_factor,
                row_of<Storage>(args.grad_key, sequence.batch, item.kv_head, sequence.first_key + position),
                args.head_dim);
    if (args.grad_value.data != nullptr)
      store_row(value, T(1),
                row_of<Storage>(args.grad_value, sequence.batch, item.kv_head, sequence.first_key + position),
                args.head_dim);
  }
}

template <class Storage, class T, class E>
void backward(const ModularAttentionBackwardArgs& args, const ModularAttentionBackwardItem& item, void* memory) {
  BackwardScratch<T, E>& scratch = *static_cast<BackwardScratch<T, E>*>(memory);
  const Sequence& sequence = *item.sequence;
  const int D = args.head_dim;
  const int64_t width = round_up_to_panel<T>(D);
  E* keys_transposed = reinterpret_cast<E*>(&scratch + 1);
  E* values_transposed = keys_transposed + packed_form_elements<E>(width);
  E* keys = values_transposed + packed_form_elements<E>(width);
  T* query_grads = reinterpret_cast<T*>(keys + packed_form_elements<E>(width));

  const int64_t blocks_per_head = (sequence.num_queries + kBlockRows - 1) / kBlockRows;
  const int64_t num_blocks = item.last_block - item.first_block;
  const bool wants_query = args.grad_query.data != nullptr;
  const bool in_place = accumulates_in_place<Storage, T>(args);
  const auto locate = [&](int64_t index, BlockView<T>& block) {
    block.head = item.kv_head * args.group + index / blocks_per_head;
    block.first_row = index % blocks_per_head * kBlockRows;
    const int64_t left = sequence.num_queries - block.first_row;
    block.count = static_cast<int>(left < kBlockRows ? left : kBlockRows);
  };
  const int64_t grad_stride = in_place ? args.grad_query.row : width;
  const auto query_grad_of = [&](int64_t index, const BlockView<T>& block, int view) {
    if (in_place)
      return row_of<T>(args.grad_query, sequence.batch, block.head, sequence.first_query + block.first_row) +
             args.grad_query.view * view;
    return query_grads + (view * num_blocks + index - item.first_block) * kBlockRows * width;
  };

  BlockView<T> block;
  for (int64_t index = item.first_block; index < item.last_block; ++index) {
    locate(index, block);
    for (int i = 0; i < block.count; ++i) {
      const int64_t row = block.first_row + i;
      load_row(row_of<Storage>(args.saved_out, sequence.batch, block.head, sequence.first_query + row), T(1),
               scratch.scores.probability, D);
      load_row(row_of<Storage>(args.grad_out, sequence.batch, block.head, sequence.first_query + row), T(1),
               scratch.scores.grad_score, D);
      prepare_row(args, sequence, block.head, row, scratch.scores.probability, scratch.scores.grad_score);
    }
    for (int view = 0; wants_query && view < args.num_views; ++view) {
      T* grads = query_grad_of(index, block, view);
      for (int i = 0; i < block.count; ++i) memset(grads + i * grad_stride, 0, sizeof(T) * (in_place ? D : width));
    }
  }

  for (int64_t t = 0; t < sequence.num_tiles; ++t) {
    const KeyTile& tile = sequence.tiles[t];
    const int view = args.num_views > 1 ? tile.modality : 0;
    memset(scratch.grad_key, 0, sizeof(T) * tile.length * kScratchStride<T>);
    memset(scratch.grad_value, 0, sizeof(T) * tile.length * kScratchStride<T>);
    bool packed = false;
    for (int64_t index = item.first_block; index < item.last_block; ++index) {
      locate(index, block);
      if (!view_block(args, sequence, tile, block)) continue;
      if (!packed) {
        packed = true;
        pack_transposed<Storage>(args.key, sequence, item.kv_head, tile, D, scratch.rows, keys_transposed);
        pack_transposed<Storage>(args.value, sequence, item.kv_head, tile, D, scratch.rows, values_transposed);
        if (wants_query)
          pack_columns<Storage>(args.key, sequence, item.kv_head, tile, D, T(args.scale), scratch.rows, keys);
      }
      scratch.query.load(
          row_of<Storage>(args.query, sequence.batch, block.head, sequence.first_query + block.first_row) +
              args.query.view * view,
          args.query.row, block.count, D, T(args.scale * kLog2e));
      scratch.grad_out.load(
          row_of<Storage>(args.grad_out, sequence.batch, block.head, sequence.first_query + block.first_row),
          args.grad_out.row, block.count, D, T(1));
      if (index + 1 < item.last_block) {  // the next block's rows come in from memory while this one is computed
        BlockView<T> next;
        locate(index + 1, next);
        prefetch_rows(row_of<Storage>(args.query, sequence.batch, next.head, sequence.first_query + next.first_row) +
                          args.query.view * view,
                      args.query.row, next.count, D);
        prefetch_rows(row_of<Storage>(args.grad_out, sequence.batch, next.head, sequence.first_query + next.first_row),
                      args.grad_out.row, next.count, D);
        if (wants_query) prefetch_rows(query_grad_of(index + 1, next, view), grad_stride, next.count, D);
      }
      differentiate_block(args, sequence, tile, block, keys_transposed, values_transposed, keys,
                          wants_query ? query_grad_of(index, block, view) : nullptr, grad_stride, scratch);
    }
    write_key_gradients<Storage>(args, item, tile, scratch);
  }

  for (int64_t index = item.first_block; args.grad_bias.data != nullptr && index < item.last_block; ++index) {
    locate(index, block);
    for (int i = 0; i < block.count; ++i) finish_bias_gradient<T>(args, sequence, block.head, block.first_row + i);
  }
  if (!wants_query || in_place) return;
  for (int64_t index = item.first_block; index < item.last_block; ++index) {
    locate(index, block);
    for (int view = 0; view < args.num_views; ++view) {
      const T* grads = query_grad_of(index, block, view);
      for (int i = 0; i < block.count; ++i)
        store_row(
            grads + i * width, T(1),
            row_of<Storage>(args.grad_query, sequence.batch, block.head, sequence.first_query + block.first_row + i) +
                args.grad_query.view * view,
            D);
    }
  }
}

// The table entries of the vector kernels.
template <class StorageType, class ComputeType, class Element = ComputeType>
struct VectorBackward {
  static constexpr int kTileKeys = kBackwardTileKeys;
  static constexpr int kBlockRows = MODA_EXT_ISA::kBlockRows;
  static int64_t packed_bytes(const ModularAttentionBackwardArgs&, int64_t) { return 0; }
  static void pack_tile(const ModularAttentionBackwardArgs&, const Sequence&, int64_t, int64_t, void*) {}
  static int64_t scratch_bytes(const ModularAttentionBackwardArgs& args, int64_t num_blocks) {
    return backward_scratch_bytes<StorageType, ComputeType, Element>(args, num_blocks);
  }
  static void run(const ModularAttentionBackwardArgs& args, const ModularAttentionBackwardItem& item, void* scratch) {
    backward<StorageType, ComputeType, Element>(args, item, scratch);
  }
};

template <class Storage, class T>
void reduce_partials(const ModularAttentionBackwardArgs& args, const Sequence& sequence, int64_t kv_head,
                     void* const* partials, int num_items, int64_t begin, int64_t end) {
  T sum[kScratchColumns];
  for (int64_t slot = begin; slot < end; ++slot) {
    for (int part = 0; part < 2; ++part) {
      const Output& output = part == 0 ? args.grad_key : args.grad_value;
      if (output.data == nullptr) continue;
      memset(sum, 0, sizeof(sum));
      for (int s = 0; s < num_items; ++s) {
        const T* partial = static_cast<const T*>(partials[s]) + (part * sequence.num_slots + slot) * args.head_dim;
        for (int d = 0; d < args.head_dim; ++d) sum[d] += partial[d];
      }
      store_row(sum, T(1), row_of<Storage>(output, sequence.batch, kv_head, sequence.first_key + sequence.order[slot]),
                args.head_dim);
    }
  }
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
