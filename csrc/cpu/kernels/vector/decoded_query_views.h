// Query views of few rows, as those of a decoding step, without the Gram of the keys before them: a linear attention,
//
//   view_{a,i} = q_i + y_{a,i} + sum_{m != a} s_{i,m} P_{a,m,i}     x_{a,i} = q_i W2_a^T    y_{a,i} = q_i (W1_a - I)^T
//   P_{a,m,i}  = sum_{j <= i, a_j = m} (x_{a,i} . phi_j) phi_j     e_{i,m} = s_{i,m} sum_j (q_i . phi_j)^2 / |q_i|^2
//   s_{i,m}    = 1 / sum_j |phi_j|^2, the trace
//
// (docs/mathematics.md section 1). A Gram of N keys takes N D^2 multiply-adds, this 2 N D for each row and view: at four
// rows that share a key head, D = 128 and M = 2 an eighth. Keys are read once, kNearKeys of them at a time, and stay in
// the first-level cache for the scores, the norms and the sums. The keys' plan is that of attention, so a tile has one
// modality, and an item may be a stretch of tiles, whose sums are merged.
#pragma once

#include "cpu/kernels/common/few_rows.h"
#include "cpu/kernels/vector/duplex_query_views_forward.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

// The smallest normal number: a trace below it is none.
template <class T>
constexpr T kSmallest = sizeof(T) == 4 ? T(1.17549435e-38) : T(2.2250738585072014e-308);

// The rows of an item, head by head, and what is summed for them over keys.
template <class T>
struct DecodedRows {
  T* query;
  T* low_rank;  // [M][rows] scratch rows
  T* x;         // [M + 1][rows] scratch rows: x of every view, then the query itself
  T* scores;    // [M + 1][rows] scratch rows, a column for each of kNearKeys keys
  T* sums;      // [M views][M modalities][rows] scratch rows
  T* square;    // [M][rows]: sum_j (q . phi_j)^2
  T* trace;     // [M][rows]
  int count;    // rows

  DecodedRows(const DuplexQueryViewsForwardArgs& args, Arena<T>& arena)
      : count(args.group * static_cast<int>(args.num_queries)) {
    const int64_t M = args.num_modalities;
    query = arena.rows(count);
    low_rank = arena.rows(M * count);
    x = arena.rows((M + 1) * count);
    scores = arena.rows((M + 1) * count);
    sums = arena.rows(M * M * count);
    square = arena.take(M * count);
    trace = arena.take(M * count);
  }
  T* low_rank_of(int view) const { return low_rank + int64_t{view} * count * kScratchStride<T>; }
  T* sums_of(int num_modalities, int view, int m) const {
    return sums + (int64_t{view} * num_modalities + m) * count * kScratchStride<T>;
  }
};

template <class T>
int64_t decoded_query_views_scratch_bytes(const DuplexQueryViewsForwardArgs& args) {
  return scratch_bytes<DecodedRows<T>, T>(args);
}

// Sums of an item, dense.
template <class T>
int64_t decoded_query_views_partial_bytes(const DuplexQueryViewsForwardArgs& args) {
  const int64_t M = args.num_modalities, rows = args.group * args.num_queries;
  return static_cast<int64_t>(sizeof(T)) * rows * (M * M * args.head_dim + 2 * M);
}

template <class Storage, class T>
void start_decoded_rows(const DuplexQueryViewsForwardArgs& args, int64_t kv_head, DecodedRows<T>& rows) {
  constexpr int kStride = kScratchStride<T>;
  const int D = args.head_dim, M = args.num_modalities, R = padded_rank<T>(args);
  for (int h = 0; h < args.group; ++h)
    load_block(row_of<Storage>(args.query, 0, kv_head * args.group + h, 0), args.query.row, args.num_queries, D, T(1),
               rows.query + h * args.num_queries * kStride);
  for (int a = 0; a < M; ++a) {
    const ViewWeights<T> w = ViewWeights<T>::of(args, a, args.weights);
    T* low_rank = rows.low_rank_of(a);  // [q B1_a^T, q B2_a^T], R columns each
    multiply<T, Order::kRowMajor, Accumulate::kStore>(rows.count, 2 * R, D, rows.query, w.down, w.down_stride, low_rank,
                                                      kStride);
    multiply<T, Order::kRowMajor, Accumulate::kStore>(rows.count, D, R, low_rank + R, w.key_down, kStride,
                                                      rows.x + int64_t{a} * rows.count * kStride, kStride);
  }
  copy_rows<T>(rows.count, D, rows.query, kStride, rows.x + int64_t{M} * rows.count * kStride, kStride);
  for (int64_t i = 0; i < int64_t{M} * M * rows.count; ++i)
    memset(rows.sums + i * kStride, 0, sizeof(T) * static_cast<size_t>(D));
  memset(rows.square, 0, sizeof(T) * static_cast<size_t>(M * rows.count));
  memset(rows.trace, 0, sizeof(T) * static_cast<size_t>(M * rows.count));
}

// |key|^2 of `count` keys.
template <class T, class KeyAt>
MODA_EXT_INLINE void square_keys(int count, int depth, const KeyAt& key, T* squares) {
  constexpr int L = kLanes<T>;
  for (int first = 0; first < count; first += L) {
    Vector<T> sum[L];
#pragma GCC unroll 16
    for (int k = 0; k < L; ++k) {
      const auto* row = key(first + k < count ? first + k : count - 1);
      sum[k] = Vector<T>{};
      int d = 0;
      for (; d + L <= depth; d += L) {
        const Vector<T> x = load_as<T>(row + d);
        sum[k] += x * x;
      }
      if (d < depth) {
        const Vector<T> x = load_as<T>(row + d, depth - d);
        sum[k] += x * x;
      }
    }
    store(squares + first, sums_of_lanes<T>(sum));
  }
}

// The sum of the first `count` lanes of at(0), at(kLanes), ...
template <class T, class At>
MODA_EXT_INLINE T sum_first(int count, const At& at) {
  constexpr int L = kLanes<T>;
  Vector<T> sum{};
  int j = 0;
  for (; j + L <= count; j += L) sum += at(j);
  if (j < count) sum += keep_first<T>(at(j), count - j);
  return reduce_add<T>(sum);
}

// squares <- the key's part of the trace, |phi|^2; factors <- what x . k times k is multiplied with. Of whole vectors.
template <class T>
MODA_EXT_INLINE void features_of_squares(const GramArgs& args, int count, T* squares, T* factors) {
  const T square = static_cast<T>(args.eps) * static_cast<T>(args.eps);
  const Vector<T> least = splat(square > kSmallest<T> ? square : kSmallest<T>), one = splat(T(1));
  for (int j = 0; j < count; j += kLanes<T>) {
    if (!args.unit_keys) {
      store(factors + j, one);
      continue;
    }
    const Vector<T> length = load(squares + j);
    store(factors + j, one / maximum(least, length));
    store(squares + j, minimum(least, length) / least);
  }
}

// Adds `count` keys of modality m, of which row i sees visible[i]; `found` of them and the next are where keys says.
template <class Storage, class T>
void add_keys(const DuplexQueryViewsForwardArgs& args, int m, const Storage* const* keys, int found, int count,
              const int* visible, DecodedRows<T>& rows) {
  constexpr int kStride = kScratchStride<T>;
  const int D = args.head_dim, M = args.num_modalities, n = rows.count;
  const bool indicator = args.indicator.data != nullptr;
  const auto key = [&](int j) MODA_EXT_ALWAYS_INLINE { return keys[j]; };
  const auto ahead = [&](int j) {
    if (j + kKeysAhead < found) prefetch_rows(keys[j + kKeysAhead], 0, 1, D);
  };
  const auto nothing = [](int) {};
  // Views before m, and those after it with the query at their end.
  const auto rows_of_view = [&](T* block, int view) { return block + int64_t{view} * n * kStride; };
  if (m > 0) score_rows(m * n, count, D, rows.x, key, ahead, rows.scores);
  const int rest = (M - 1 - m + indicator) * n;
  T* after = rows_of_view(rows.scores, m + 1);
  if (m > 0) {
    score_rows(rest, count, D, rows_of_view(rows.x, m + 1), key, nothing, after);
  } else {
    score_rows(rest, count, D, rows_of_view(rows.x, m + 1), key, ahead, after);
  }
  T squares[kNearKeys], factors[kNearKeys];
  square_keys(count, D, key, squares);
  features_of_squares(args, count, squares, factors);
  for (int i = 0; i < n; ++i)
    rows.trace[m * n + i] += sum_first<T>(visible[i], [&](int j) { return load(squares + j); });
  for (int i = 0; indicator && i < n; ++i) {
    const T* score = rows_of_view(rows.scores, M) + i * kStride;
    rows.square[m * n + i] += sum_first<T>(visible[i], [&](int j) {
      const Vector<T> s = load(score + j);
      return s * s * load(factors + j);
    });
  }
  for (int a = 0; a < M; ++a) {
    if (a == m) continue;
    T* scores = rows_of_view(rows.scores, a);
    for (int i = 0; i < n; ++i) {
      T* score = scores + i * kStride;
      for (int j = 0; j < count; j += kLanes<T>)
        store(score + j, keep_first<T>(load(score + j) * load(factors + j), visible[i] - j));
    }
    add_weighted_rows(n, count, D, scores, key, rows.sums_of(M, a, m), static_cast<const T*>(nullptr));
  }
}

// The views and q G q^T / |q|^2 from the sums. Writes the scale too: what the raw Gram of a row is multiplied with.
template <class Storage, class T>
void finish_decoded_rows(const DuplexQueryViewsForwardArgs& args, const DecodedViewsArgs& decoded, int64_t kv_head,
                         DecodedRows<T>& rows) {
  constexpr int kStride = kScratchStride<T>;
  const int D = args.head_dim, M = args.num_modalities, R = padded_rank<T>(args), n = rows.count;
  const auto scale = [&](int i, int m) {
    if (decoded.query_modality[i % args.num_queries * decoded.query_modality_token] < 0) return T(0);
    if (!decoded.by_trace) return T(1);
    const T trace = rows.trace[m * n + i];
    return trace > kSmallest<T> ? 1 / trace : T(0);
  };
  for (int a = 0; a < M; ++a) {
    T* view = rows.sums_of(M, a, a);  // which has no sum
    multiply<T, Order::kRowMajor, Accumulate::kStore>(
        n, D, R, rows.low_rank_of(a), ViewWeights<T>::of(args, a, args.weights).up, kStride, view, kStride);
    for (int i = 0; i < n; ++i) {
      T* row = view + i * kStride;
      for (int m = 0; m < M; ++m)
        if (m != a) add_scaled(scale(i, m), rows.sums_of(M, a, m) + i * kStride, row, D);
      Storage* out = row_of<Storage>(args.views, 0, kv_head * args.group + i / args.num_queries, i % args.num_queries);
      store_sum(rows.query + i * kStride, row, out + args.views.view * a, D, false);
    }
  }
  for (int i = 0; i < n; ++i) {
    const int64_t head = kv_head * args.group + i / args.num_queries, row = i % args.num_queries;
    T* scales = row_of<T>(decoded.scale, 0, kv_head, row);
    for (int m = 0; m < M; ++m) scales[m] = scale(i, m);
    if (args.indicator.data == nullptr) continue;
    const T norm = dot(rows.query + i * kStride, rows.query + i * kStride, D);
    T* out = row_of<T>(args.indicator, 0, head, row);
    for (int m = 0; m < M; ++m) out[m * args.indicator.last] = norm > 0 ? rows.square[m * n + i] / norm : T(0);
  }
}

// From and to the dense sums of an item: visit(sum, number in the partial state).
template <class T, class Visit>
void each_sum(const DuplexQueryViewsForwardArgs& args, const DecodedRows<T>& rows, const Visit& visit) {
  const int64_t M = args.num_modalities;
  int64_t at = 0;
  for (int64_t block = 0; block < M * M; ++block) {
    if (block / M == block % M) continue;
    for (int i = 0; i < rows.count; ++i)
      for (int d = 0; d < args.head_dim; ++d) visit(rows.sums[(block * rows.count + i) * kScratchStride<T> + d], at++);
  }
  for (int64_t i = 0; i < M * rows.count; ++i) visit(rows.square[i], at++);
  for (int64_t i = 0; i < M * rows.count; ++i) visit(rows.trace[i], at++);
}

template <class Storage, class T>
void decoded_query_views(const DuplexQueryViewsForwardArgs& args, const DecodedViewsArgs& decoded,
                         const DecodedViewsItem& item, void* memory) {
  Arena<T> arena(memory);
  DecodedRows<T> rows(args, arena);
  start_decoded_rows<Storage>(args, item.kv_head, rows);
  const Sequence& sequence = *decoded.sequence;
  for (int64_t index = item.first_tile; index < item.last_tile; ++index) {
    const KeyTile& tile = sequence.tiles[index];
    int seen[kFewRows], most = 0;
    for (int i = 0; i < rows.count; ++i) {
      seen[i] = visible_keys(sequence.order, tile, i % args.num_queries + args.num_keys - args.num_queries);
      most = most > seen[i] ? most : seen[i];
    }
    for (int first = 0; first < most; first += kNearKeys) {
      const int count = smaller(kNearKeys, most - first), found = smaller(kNearKeys + kKeysAhead, tile.length - first);
      const Storage* keys[kNearKeys + kKeysAhead];
      find_rows(args.key, sequence, item.kv_head, tile, first, found, keys);
      int visible[kFewRows];
      for (int i = 0; i < rows.count; ++i)
        visible[i] = seen[i] < first ? 0 : seen[i] - first < count ? seen[i] - first : count;
      add_keys(args, tile.modality, keys, found, count, visible, rows);
    }
  }
  if (item.partial == nullptr) {
    finish_decoded_rows<Storage>(args, decoded, item.kv_head, rows);
  } else {
    T* partial = static_cast<T*>(item.partial);
    each_sum(args, rows, [&](T sum, int64_t at) { partial[at] = sum; });
  }
}

// Adds the sums of items that differ in their tiles only, in order, and writes the views.
template <class Storage, class T>
void merge_decoded_query_views(const DuplexQueryViewsForwardArgs& args, const DecodedViewsArgs& decoded,
                               int64_t kv_head, void* const* partials, int count, void* memory) {
  Arena<T> arena(memory);
  DecodedRows<T> rows(args, arena);
  start_decoded_rows<Storage>(args, kv_head, rows);
  for (int p = 0; p < count; ++p) {
    const T* partial = static_cast<const T*>(partials[p]);
    each_sum(args, rows, [&](T& sum, int64_t at) { sum += partial[at]; });
  }
  finish_decoded_rows<Storage>(args, decoded, kv_head, rows);
}

// (rows, M) at `scale`: what the raw Gram of each row is multiplied with. Rows are the last of the tokens. What the keys
// before these have of the trace is on the diagonal of the initial Gram.
template <class Storage, class T>
void causal_scale(const CausalGramArgs& args, const DecodedViewsArgs& decoded, int64_t kv_head) {
  T trace[kMaxModalities] = {};
  const int64_t D = args.head_dim;
  if (const T* initial = grams_of<T>(args, args.initial, 0, kv_head))
    for (int m = 0; m < args.num_modalities; ++m)
      for (int64_t d = 0; d < D; ++d) trace[m] += initial[(m * D + d) * D + d];
  const int64_t before = args.num_keys - args.num_queries;
  for (int64_t first = 0; first < args.num_keys; first += kNearKeys) {
    const int count = args.num_keys - first < kNearKeys ? static_cast<int>(args.num_keys - first) : kNearKeys;
    const auto key = [&](int j) MODA_EXT_ALWAYS_INLINE {
      return row_of<Storage>(args.key, 0, kv_head, token_row(args, first + j));
    };
    T squares[kNearKeys], factors[kNearKeys];
    square_keys(count, args.head_dim, key, squares);
    features_of_squares(args, count, squares, factors);
    for (int j = 0; j < count; ++j) {
      const int32_t modality = args.modality[(first + j) * args.modality_token];
      if (modality >= 0) trace[modality] += squares[j];
      const int64_t row = first + j - before;
      if (row < 0) continue;
      const bool padding = decoded.query_modality[row * decoded.query_modality_token] < 0;
      T* scales = row_of<T>(decoded.scale, 0, kv_head, row);
      for (int m = 0; m < args.num_modalities; ++m)
        scales[m] = padding ? T(0) : !decoded.by_trace ? T(1) : trace[m] > kSmallest<T> ? 1 / trace[m] : T(0);
    }
  }
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
