// What the kernels of the Gram family share: chunks of keys, their features phi, and products of blocks (docs/mathematics.md
// section 1).
//
// Tokens are taken in chunks of kChunk positions. The keys of a chunk are grouped by modality, so that each modality's
// keys are consecutive rows: G^m grows by one product of those rows with themselves, and one product of a query block
// with all keys of the chunk gives the scores of every modality. Chunk boundaries depend on positions alone, so what a
// row gets does not depend on later tokens, to the bit.
//
// Of a symmetric sum only the upper panels are made: of column panel c (kPanel wide) the rows up to the panel's last
// column, 5/8 of the work at D = 128; mirror() fills in the rest.
#pragma once

#include "cpu/kernels/common/pack.h"
#include "cpu/kernels/gram_family_kernels.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

// Scores within a chunk cost C per row, the states D^2 / C per key and key head: 48 is a whole number of register
// blocks in every instruction set, and 10 % faster than 64 and 96.
constexpr int kChunk = 48;
// Leading dimension of a transposed chunk: a cache line more than kChunk, so that rows fall into different sets.
template <class T>
constexpr int kKeyStride = kChunk + 64 / static_cast<int>(sizeof(T));

// Takes blocks out of a thread's scratch memory; with a null base it only counts.
template <class T>
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class U = T>
  U* take(int64_t elements) {
    char* at = base_ + used_;
    used_ += (elements * static_cast<int64_t>(sizeof(U)) + 63) / 64 * 64;
    return base_ == nullptr ? nullptr : reinterpret_cast<U*>(at);
  }
  T* rows(int64_t count) { return take(count * kScratchStride<T>); }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// What a scratch structure takes, made with these arguments and an arena.
template <class Scratch, class T, class... Args>
int64_t scratch_bytes(const Args&... args) {
  Arena<T> arena(nullptr);
  Scratch scratch(args..., arena);
  return arena.used();
}

MODA_EXT_INLINE int smaller(int a, int b) { return a < b ? a : b; }

template <class T>
MODA_EXT_INLINE T dot(const T* a, const T* b, int count) {
  constexpr int L = kLanes<T>;
  Vector<T> sum{};
  int i = 0;
  for (; i + L <= count; i += L) sum += load(a + i) * load(b + i);
  T total = reduce_add<T>(sum);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}
// y += factor x
template <class T>
MODA_EXT_INLINE void add_scaled(T factor, const T* x, T* y, int count) {
  for (int i = 0; i < count; ++i) y[i] += factor * x[i];
}

// C (rows x columns) from A (scratch block, see gemm.h) and B (rows of any stride). Whole vectors are written, so C has
// room up to a multiple of kLanes columns; what B holds there does not matter.
template <class T, Order order, Accumulate mode>
void multiply(int rows, int columns, int depth, const T* a, const T* b, int64_t b_stride, T* c, int64_t c_stride) {
  constexpr int kRowStep = order == Order::kRowMajor ? kScratchStride<T> : 1;
  for (int column = 0; column < columns; column += kPanel<T>)
    for (int i = 0; i < rows; i += kRows)
      multiply_panel<T, order, mode>(smaller(kRows, rows - i), columns - column, depth, a + i * kRowStep, b + column,
                                     static_cast<int>(b_stride), c + i * c_stride + column, c_stride, nullptr);
}

// Symmetric matrices lie in column panels, [D / kPanel][D][kPanel]: as the second operand of a product a panel is one
// contiguous read.
template <class T>
MODA_EXT_INLINE int64_t symmetric_elements(int head_dim) {
  return round_up_to_panel<T>(head_dim) * head_dim;
}
template <class T>
MODA_EXT_INLINE T* symmetric_at(T* matrix, int head_dim, int row, int column) {
  return matrix + static_cast<int64_t>(column / kPanel<T>) * head_dim * kPanel<T> + row * kPanel<T> +
         column % kPanel<T>;
}

// C (rows x head_dim) from A and a symmetric matrix.
template <class T, Accumulate mode>
void multiply_symmetric(int rows, int head_dim, const T* a, const T* matrix, T* c) {
  for (int column = 0; column < head_dim; column += kPanel<T>)
    for (int i = 0; i < rows; i += kRows)
      multiply_panel<T, Order::kRowMajor, mode>(smaller(kRows, rows - i), head_dim - column, head_dim,
                                                a + i * kScratchStride<T>, matrix + int64_t{column} * head_dim,
                                                kPanel<T>, c + i * kScratchStride<T> + column, kScratchStride<T>,
                                                nullptr);
}

// Upper panels of G += A^T B for rows of A and B, where the sum is symmetric.
template <class T>
void accumulate_upper(int head_dim, int rows, const T* a, const T* b, T* matrix) {
  for (int column = 0; column < head_dim; column += kPanel<T>) {
    const int last = smaller(head_dim, column + kPanel<T>);
    for (int i = 0; i < last; i += kRows)
      multiply_panel<T, Order::kColumnMajor, Accumulate::kAdd>(
          smaller(kRows, head_dim - i), head_dim - column, rows, a + i, b + column, kScratchStride<T>,
          symmetric_at(matrix, head_dim, i, column), kPanel<T>, nullptr);
  }
}

template <class T>
void mirror(int head_dim, T* matrix) {
  for (int i = kPanel<T>; i < head_dim; ++i)
    for (int j = 0; j < i / kPanel<T> * kPanel<T>; ++j)
      *symmetric_at(matrix, head_dim, i, j) = *symmetric_at(matrix, head_dim, j, i);
}

// From and to (D, D), row by row.
template <class T>
void load_symmetric(int head_dim, const T* from, T* matrix) {
  for (int i = 0; i < head_dim; ++i)
    for (int j = 0; j < head_dim; ++j) *symmetric_at(matrix, head_dim, i, j) = from[i * head_dim + j];
}
template <class T>
void store_symmetric(int head_dim, T* matrix, T* to) {
  for (int i = 0; i < head_dim; ++i)
    for (int j = 0; j < head_dim; ++j) to[i * head_dim + j] = *symmetric_at(matrix, head_dim, i, j);
}

template <class T>
void copy_rows(int64_t rows, int64_t columns, const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i)
    memcpy(to + i * to_stride, from + i * from_stride, sizeof(T) * static_cast<size_t>(columns));
}
template <class T>
void clear_rows(int64_t rows, T* block) {
  memset(block, 0, sizeof(T) * static_cast<size_t>(rows * kScratchStride<T>));
}

// (columns x rows) to (rows x columns)
template <class T>
void transpose(int rows, int columns, const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) to[i * to_stride + j] = from[j * from_stride + i];
}

// Which keys a chunk has, and which of them its rows see.
struct Chunk {
  int64_t first;                        // position of the first token
  int tokens;                           // positions [first, first + tokens)
  int count;                            // keys that are not padding
  int num_present;                      // modalities of those keys
  int present[kMaxModalities];          // in ascending order
  int begin[kMaxModalities + 1];        // keys of modality m are rows [begin[m], begin[m + 1])
  int position[kChunk];                 // of each row of keys, relative to first; ascending in a modality
  int visible[kMaxModalities][kChunk];  // of a present modality, keys that the token at a position sees
  int end[kChunk];                      // one past the last row of keys that it sees, of any modality

  int keys_of(int m) const { return begin[m + 1] - begin[m]; }
};

inline void plan_chunk(const GramArgs& args, int64_t batch, int64_t first, int64_t last, Chunk& chunk) {
  const int32_t* modality = args.modality + batch * args.modality_batch + first * args.modality_token;
  chunk.first = first;
  chunk.tokens = static_cast<int>(last - first < kChunk ? last - first : kChunk);
  int counts[kMaxModalities] = {};
  for (int i = 0; i < chunk.tokens; ++i)
    if (modality[i * args.modality_token] >= 0) ++counts[modality[i * args.modality_token]];
  chunk.count = chunk.num_present = 0;
  int next[kMaxModalities];
  for (int m = 0; m < args.num_modalities; ++m) {
    next[m] = chunk.begin[m] = chunk.count;
    chunk.count += counts[m];
    if (counts[m] > 0) chunk.present[chunk.num_present++] = m;
  }
  chunk.begin[args.num_modalities] = chunk.count;
  for (int i = 0; i < chunk.tokens; ++i) {
    const int m = modality[i * args.modality_token];
    if (m >= 0) chunk.position[next[m]++] = i;
    chunk.end[i] = 0;
    for (int p = 0; p < chunk.num_present; ++p) {
      const int other = chunk.present[p];
      chunk.visible[other][i] = next[other] - chunk.begin[other];
      if (chunk.visible[other][i] > 0) chunk.end[i] = next[other];
    }
  }
}

// Number of (chunk, modality present in it) of a sequence: the states that a backward pass keeps.
inline int64_t count_states(const GramArgs& args, int64_t batch) {
  int64_t count = 0;
  for (int64_t first = 0; first < args.num_keys; first += kChunk) {
    Chunk chunk;
    plan_chunk(args, batch, first, args.num_keys, chunk);
    count += chunk.num_present;
  }
  return count;
}

// phi of the keys of a chunk as rows, and what their gradient needs.
template <class T>
struct Features {
  T* rows;                  // [kChunk] scratch rows; rows from `count` up to a whole vector are zero
  T factor[kChunk];         // phi = factor k
  bool normalised[kChunk];  // the factor is 1 / ||k||, not a constant
};

template <class Storage, class T>
MODA_EXT_INLINE void load_feature(const GramArgs& args, const Storage* key, T* row, T* factor, bool* normalised) {
  load_row(key, T(1), row, args.head_dim);
  *factor = 1;
  *normalised = false;
  if (!args.unit_keys) return;
  const T norm = sqrt(dot(row, row, args.head_dim)), eps = static_cast<T>(args.eps);
  *normalised = norm > eps;
  const T scale = *factor = 1 / (norm > eps ? norm : eps);
  for (int d = 0; d < args.head_dim; ++d) row[d] *= scale;
}

template <class Storage, class T>
void load_features(const GramArgs& args, int64_t batch, int64_t kv_head, const Chunk& chunk, Features<T>& features) {
  for (int j = 0; j < chunk.count; ++j) {
    const Storage* key = row_of<Storage>(args.key, batch, kv_head, token_row(args, chunk.first + chunk.position[j]));
    load_feature(args, key, features.rows + j * kScratchStride<T>, &features.factor[j], &features.normalised[j]);
  }
  for (int j = chunk.count; j % kLanes<T> != 0; ++j)
    memset(features.rows + j * kScratchStride<T>, 0, sizeof(T) * kScratchStride<T>);
}

// Asks for the keys of the chunk that begins at `first`. They come in while the chunk before it is computed: else every
// row is waited for.
template <class Storage>
MODA_EXT_INLINE void prefetch_keys(const GramArgs& args, int64_t batch, int64_t kv_head, int64_t first) {
  for (int64_t token = first; token < first + kChunk && token < args.num_keys; ++token)
    prefetch_rows(row_of<Storage>(args.key, batch, kv_head, token_row(args, token)), 0, 1, args.head_dim);
}

// Features with one column for each key: [head_dim][kKeyStride].
template <class T>
void transpose_features(const GramArgs& args, const Chunk& chunk, const T* rows, T* transposed) {
  constexpr int L = kLanes<T>;
  for (int j = 0; j < chunk.count; j += L) {
    int d = 0;
    for (; d + L <= args.head_dim; d += L) {
      Vector<T> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = load(rows + (j + i) * kScratchStride<T> + d);
      transpose_square<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(transposed + (d + i) * kKeyStride<T> + j, square[i]);
    }
    for (; d < args.head_dim; ++d)
      for (int i = 0; i < L; ++i) transposed[d * kKeyStride<T> + j + i] = rows[(j + i) * kScratchStride<T> + d];
  }
}

// dk from dphi: phi = k / ||k|| gives dk = (dphi - (dphi . phi) phi) / ||k||. Padding gets 0. Changes `grads`.
template <class Storage, class T>
void store_key_gradient(const GramArgs& args, const Output& grad_key, int64_t batch, int64_t kv_head,
                        const Chunk& chunk, const Features<T>& features, T* grads) {
  if (chunk.count < chunk.tokens) {
    T zero[kScratchColumns] = {};
    for (int i = 0; i < chunk.tokens; ++i)
      store_row(zero, T(1), row_of<Storage>(grad_key, batch, kv_head, chunk.first + i), args.head_dim);
  }
  for (int j = 0; j < chunk.count; ++j) {
    T* grad = grads + j * kScratchStride<T>;
    const T* row = features.rows + j * kScratchStride<T>;
    if (features.normalised[j]) add_scaled(-dot(grad, row, args.head_dim), row, grad, args.head_dim);
    store_row(grad, features.factor[j], row_of<Storage>(grad_key, batch, kv_head, chunk.first + chunk.position[j]),
              args.head_dim);
  }
}

// The query rows of one head in a chunk.
struct RowBlock {
  int first;                                  // relative position of the first row in the chunk
  int count;                                  // rows
  int64_t row;                                // index of the first row in the query
  int end(const Chunk& chunk, int i) const {  // keys that rows [i, i + kRows) see
    return chunk.end[first + smaller(i + kRows, count) - 1];
  }
};

inline RowBlock rows_of(const CausalGramArgs& args, const Chunk& chunk) {
  const int64_t offset = args.num_keys - args.num_queries;  // position of row 0
  RowBlock block;
  block.first = static_cast<int>(offset <= chunk.first                  ? 0
                                 : offset >= chunk.first + chunk.tokens ? chunk.tokens
                                                                        : offset - chunk.first);
  block.count = chunk.tokens - block.first;
  block.row = chunk.first + block.first - offset;
  return block;
}

// Scores of a block of rows with all keys of the chunk that they may see: A (rows x depth) times B [depth][keys].
template <class T>
void score_block(const Chunk& chunk, const RowBlock& block, int depth, const T* a, const T* keys, int keys_stride,
                 T* scores) {
  for (int panel = 0; panel < chunk.count; panel += kPanel<T>)
    for (int i = 0; i < block.count; i += kRows) {
      const int columns = block.end(chunk, i) - panel;
      if (columns <= 0) continue;
      multiply_panel<T, Order::kRowMajor, Accumulate::kStore>(
          smaller(kRows, block.count - i), columns, depth, a + i * kScratchStride<T>, keys + panel, keys_stride,
          scores + i * kScratchStride<T> + panel, kScratchStride<T>, nullptr);
    }
}

// Scores of keys that a row does not see, and those of modality `skip`, become 0; the others are multiplied with
// scale[row][modality] (null: 1).
template <class T>
void mask_scores(const Chunk& chunk, const RowBlock& block, int skip, const T (*scale)[kMaxModalities], T* scores) {
  for (int i = 0; i < block.count; ++i) {
    for (int p = 0; p < chunk.num_present; ++p) {
      const int m = chunk.present[p], keys = chunk.keys_of(m);
      T* row = scores + i * kScratchStride<T> + chunk.begin[m];
      const int visible = m == skip ? 0 : chunk.visible[m][block.first + i];
      if (scale != nullptr)
        for (int j = 0; j < visible; ++j) row[j] *= scale[i][m];
      for (int j = visible; j < keys; ++j) row[j] = 0;
    }
  }
}

// C (rows x columns) += scores times B [keys][columns], for masked scores.
template <class T>
void add_weighted_keys(const Chunk& chunk, const RowBlock& block, int columns, const T* scores, const T* b, T* c) {
  for (int column = 0; column < columns; column += kPanel<T>)
    for (int i = 0; i < block.count; i += kRows)
      if (block.end(chunk, i) > 0)
        multiply_panel<T, Order::kRowMajor, Accumulate::kAdd>(
            smaller(kRows, block.count - i), columns - column, block.end(chunk, i), scores + i * kScratchStride<T>,
            b + column, kScratchStride<T>, c + i * kScratchStride<T> + column, kScratchStride<T>, nullptr);
}

// C (keys x columns) += scores^T times B [rows][columns], for masked scores: rows before the first that sees a block of
// keys are left out.
template <class T>
void add_weighted_rows(const Chunk& chunk, const RowBlock& block, int columns, const T* scores, const T* b, T* c) {
  for (int key = 0, row = 0; key < chunk.count; key += kRows) {
    while (row < block.count && chunk.end[block.first + row] <= key) ++row;
    if (row == block.count) return;
    for (int column = 0; column < columns; column += kPanel<T>)
      multiply_panel<T, Order::kColumnMajor, Accumulate::kAdd>(
          smaller(kRows, chunk.count - key), columns - column, block.count - row,
          scores + row * kScratchStride<T> + key, b + row * kScratchStride<T> + column, kScratchStride<T>,
          c + key * kScratchStride<T> + column, kScratchStride<T>, nullptr);
  }
}

template <class T>
void load_scale(const CausalGramArgs& args, int64_t batch, int64_t kv_head, const RowBlock& block,
                T (*scale)[kMaxModalities]) {
  for (int i = 0; i < block.count; ++i) {
    const T* row = row_of<T>(args.row_scale, batch, kv_head, block.row + i);
    for (int m = 0; m < args.num_modalities; ++m) scale[i][m] = row[m * args.row_scale.last];
  }
}

// The raw Grams of all modalities, running along the sequence. A Gram of few keys is cheaper through the keys: q G q^T
// with t keys is t D multiply-adds, with the upper panels of G about 5/8 D^2. The keys of each modality are kept until
// there are too many.
template <class T>
struct GramState {
  static constexpr int kMostKeys = kChunk;

  T* gram = nullptr;      // [num_modalities] symmetric matrices, upper panels
  T* keys = nullptr;      // [num_modalities][head_dim][kKeyStride], a column for each key
  T* key_rows = nullptr;  // [num_modalities][kMostKeys] scratch rows
  bool seen[kMaxModalities];
  int num_keys[kMaxModalities];  // -1: too many

  void take(const GramArgs& args, Arena<T>& arena) {
    gram = arena.take(args.num_modalities * symmetric_elements<T>(args.head_dim));
    keys = arena.take(int64_t{args.num_modalities} * args.head_dim * kKeyStride<T>);
    key_rows = arena.rows(args.num_modalities * kMostKeys);
  }
  T* of(const GramArgs& args, int m) const { return gram + m * symmetric_elements<T>(args.head_dim); }
  T* keys_of(const GramArgs& args, int m) const { return keys + int64_t{m} * args.head_dim * kKeyStride<T>; }
  T* key_rows_of(int m) const { return key_rows + m * kMostKeys * kScratchStride<T>; }
  bool has_few_keys(const GramArgs& args, int m) const {
    return num_keys[m] >= 0 && num_keys[m] * 5 <= args.head_dim * 3;
  }
};

inline int64_t state_elements(const GramArgs& args) { return int64_t{args.head_dim} * args.head_dim; }

// The Grams (M, D, D) of one batch element and key head out of (B, Hkv, M, D, D), or null of null.
template <class T>
const T* grams_of(const GramArgs& args, const void* grams, int64_t batch, int64_t kv_head) {
  if (grams == nullptr) return nullptr;
  return static_cast<const T*>(grams) + (batch * args.kv_heads + kv_head) * args.num_modalities * state_elements(args);
}
template <class T>
T* grams_of(const GramArgs& args, void* grams, int64_t batch, int64_t kv_head) {
  return const_cast<T*>(grams_of<T>(args, static_cast<const void*>(grams), batch, kv_head));
}

// Start of the sequence: `initial` (M, D, D) of this batch element and head, or null.
template <class T>
void start_state(const GramArgs& args, const T* initial, GramState<T>& state) {
  for (int m = 0; m < args.num_modalities; ++m) {
    state.seen[m] = initial != nullptr;
    state.num_keys[m] = initial != nullptr ? -1 : 0;
    if (initial != nullptr) {
      load_symmetric(args.head_dim, initial + m * state_elements(args), state.of(args, m));
    } else {
      memset(state.of(args, m), 0, sizeof(T) * static_cast<size_t>(symmetric_elements<T>(args.head_dim)));
    }
  }
}
template <class T>
void add_chunk(const GramArgs& args, const Chunk& chunk, const T* features, GramState<T>& state) {
  for (int p = 0; p < chunk.num_present; ++p) {
    const int m = chunk.present[p], count = chunk.keys_of(m);
    const T* rows = features + chunk.begin[m] * kScratchStride<T>;
    accumulate_upper(args.head_dim, count, rows, rows, state.of(args, m));
    state.seen[m] = true;
    if (state.num_keys[m] < 0) continue;
    if (state.num_keys[m] + count > GramState<T>::kMostKeys) {
      state.num_keys[m] = -1;
      continue;
    }
    transpose(args.head_dim, count, rows, kScratchStride<T>, state.keys_of(args, m) + state.num_keys[m], kKeyStride<T>);
    copy_rows<T>(count, args.head_dim, rows, kScratchStride<T>,
                 state.key_rows_of(m) + state.num_keys[m] * kScratchStride<T>, kScratchStride<T>);
    state.num_keys[m] += count;
  }
}
// Mirrors the state and writes it as (M, D, D).
template <class T>
void store_state(const GramArgs& args, GramState<T>& state, T* out) {
  for (int m = 0; m < args.num_modalities; ++m) {
    mirror(args.head_dim, state.of(args, m));
    store_symmetric(args.head_dim, state.of(args, m), out + m * state_elements(args));
  }
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
