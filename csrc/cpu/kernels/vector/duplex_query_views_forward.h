// Query views of the duplex aligner in causal scope, one fused step (docs/mathematics.md section 1, fusion "concat"):
//
//   view_{a,i} = q_i + y A1_a^T + sum_{m != a} s_{i,m} x H_{a,m,i}     y = q_i B1_a^T, x = q_i B2_a^T
//   H_{a,m,i}  = A2_a^T G^m_i = sum_{j <= i, a_j = m} z_{a,j}^T phi_j  z_{a,j} = phi_j A2_a
//   e_{i,m}    = q_i G^m_i q_i^T / |q_i|^2
//
// The rank is what makes it cheap: the state that rows meet is rank x D, 2 D rank multiply-adds instead of D^2. Only e
// needs the Gram itself, and only as a quadratic form: products with its upper panels.
//
// A work item is one key head and walks along its chunks; the query heads of the group share keys and states. For each
// head and chunk the query block is read once and stays in L1/L2 through all products, each view is written once.
#pragma once

#include "cpu/kernels/vector/gram_family_chunk.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

// Ranks are padded with zeros to whole vectors, so that blocks side by side never share one.
template <class T>
MODA_EXT_INLINE int padded_rank(const DuplexArgs& args) {
  return (args.rank + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}
// Blocks of one rank that fit side by side in a scratch block.
template <class T>
MODA_EXT_INLINE int terms_per_block(const DuplexArgs& args) {
  return kScratchColumns / padded_rank<T>(args);
}
// Modality of term t of view a: term 0 is the view's own (A1), the others are the other modalities in ascending order.
MODA_EXT_INLINE int modality_of_term(int view, int term) { return term - 1 < view ? term - 1 : term; }
MODA_EXT_INLINE int term_of_modality(int view, int m) { return m < view ? m + 1 : m; }

// The weights of one view as the products want them, R = padded rank.
template <class T>
struct ViewWeights {
  T* down;      // [D][2 R], stride down_stride: B1^T, B2^T
  T* up;        // [R] scratch rows: A1^T
  T* key_down;  // [R] scratch rows: A2^T
  T* back;      // [2 R] scratch rows: B1, B2
  T* up_rows;   // [D][R]: A1
  T* key_rows;  // [D][R]: A2
  int64_t down_stride;

  static ViewWeights of(const DuplexArgs& args, int view, const void* memory, int64_t* bytes = nullptr) {
    const int R = padded_rank<T>(args);
    ViewWeights weights;
    weights.down_stride = round_up_to_panel<T>(2 * R);
    Arena<T> arena(const_cast<void*>(memory));
    for (int v = 0; v <= view; ++v) {
      weights.down = arena.take(args.head_dim * weights.down_stride);
      weights.up = arena.rows(R);
      weights.key_down = arena.rows(R);
      weights.back = arena.rows(2 * R);
      weights.up_rows = arena.take(int64_t{args.head_dim} * round_up_to_panel<T>(R));
      weights.key_rows = arena.take(int64_t{args.head_dim} * round_up_to_panel<T>(R));
    }
    if (bytes != nullptr) *bytes = arena.used();
    return weights;
  }
};

template <class T>
int64_t weights_bytes(const DuplexArgs& args) {
  int64_t bytes = 0;
  ViewWeights<T>::of(args, args.num_modalities - 1, nullptr, &bytes);
  return bytes;
}

template <class T>
void pack_weights(const DuplexArgs& args, void* memory) {
  constexpr int kStride = kScratchStride<T>;
  const int D = args.head_dim, r = args.rank, R = padded_rank<T>(args);
  const int64_t rows_stride = round_up_to_panel<T>(R);
  memset(memory, 0, static_cast<size_t>(weights_bytes<T>(args)));
  for (int a = 0; a < args.num_modalities; ++a) {
    const ViewWeights<T> w = ViewWeights<T>::of(args, a, memory);
    const int64_t from = int64_t{a} * D * r;
    const T *a1 = static_cast<const T*>(args.a1) + from, *b1 = static_cast<const T*>(args.b1) + from;
    const T *a2 = static_cast<const T*>(args.a2) + from, *b2 = static_cast<const T*>(args.b2) + from;
    transpose(D, r, b1, D, w.down, w.down_stride);
    transpose(D, r, b2, D, w.down + R, w.down_stride);
    transpose(r, D, a1, r, w.up, kStride);
    transpose(r, D, a2, r, w.key_down, kStride);
    copy_rows<T>(r, D, b1, D, w.back, kStride);
    copy_rows<T>(r, D, b2, D, w.back + R * kStride, kStride);
    copy_rows<T>(D, r, a1, r, w.up_rows, rows_stride);
    copy_rows<T>(D, r, a2, r, w.key_rows, rows_stride);
  }
}

template <class T>
struct DuplexQueryViewsScratch {
  Features<T> features;
  T *transposed, *query, *low_rank, *terms, *scores, *view;
  T* latent;   // [num_modalities][R] scratch rows, one column for each key of the chunk: z^T
  T* stack;    // [num_modalities][num_modalities terms][R] scratch rows: A1^T, then H of the other modalities
  T* initial;  // the initial Gram of one modality as scratch rows
  T (*scale)[kMaxModalities];
  T (*square)[kMaxModalities];
  GramState<T> state;

  DuplexQueryViewsScratch(const DuplexQueryViewsForwardArgs& args, Arena<T>& arena) {
    const int64_t M = args.num_modalities, R = padded_rank<T>(args);
    features.rows = arena.rows(kChunk);
    transposed = arena.take(int64_t{kScratchColumns} * kKeyStride<T>);
    query = arena.rows(kChunk);
    low_rank = arena.rows(kChunk);
    terms = arena.rows(kChunk);
    scores = arena.rows(kChunk);
    view = arena.rows(kChunk);
    latent = arena.rows(M * R);
    stack = arena.rows(M * M * R);
    initial = args.initial != nullptr ? arena.rows(args.head_dim) : nullptr;
    scale = arena.template take<T[kMaxModalities]>(kChunk);
    square = arena.template take<T[kMaxModalities]>(kChunk);
    if (needs_gram(args)) state.take(args, arena);
  }
  static bool needs_gram(const DuplexQueryViewsForwardArgs& args) {
    return args.indicator.data != nullptr || args.gram != nullptr;
  }
};

template <class T>
int64_t duplex_query_views_scratch_bytes(const DuplexQueryViewsForwardArgs& args) {
  return scratch_bytes<DuplexQueryViewsScratch<T>, T>(args);
}

// A row q + view as the output's row.
template <class Storage, class T>
MODA_EXT_INLINE void store_sum(const T* query, const T* view, Storage* out, int count, bool nontemporal) {
  constexpr int L = kLanes<T>;
  if (nontemporal && sizeof(Storage) == sizeof(T) && count % L == 0 &&
      reinterpret_cast<uintptr_t>(out) % MODA_EXT_VECTOR_BYTES == 0) {
    for (int d = 0; d < count; d += L)
      store_nontemporal(reinterpret_cast<T*>(out) + d, load(query + d) + load(view + d));
    return;
  }
  T sum[kScratchColumns];
  for (int d = 0; d < count; ++d) sum[d] = query[d] + view[d];
  store_row(sum, T(1), out, count);
}

// Column block `term` of a block of terms <- s_{i,m} x.
template <class T>
void scale_rows(const RowBlock& block, int columns, const T* x, const T (*scale)[kMaxModalities], int m, T* out) {
  for (int i = 0; i < block.count; ++i)
    for (int k = 0; k < columns; ++k) out[i * kScratchStride<T> + k] = scale[i][m] * x[i * kScratchStride<T> + k];
}

// One past the last term of the view that contributes: terms of modalities not seen yet are zero.
inline int count_terms(const DuplexArgs& args, int view, const bool* seen) {
  int count = 1;
  for (int m = 0; m < args.num_modalities; ++m)
    if (m != view && seen[m]) count = term_of_modality(view, m) + 1;
  return count;
}

template <class T>
void make_view(const DuplexArgs& args, const Chunk& chunk, const RowBlock& block, int a, const bool* seen,
               DuplexQueryViewsScratch<T>& s) {
  constexpr int kStride = kScratchStride<T>;
  const int D = args.head_dim, R = padded_rank<T>(args);
  const ViewWeights<T> w = ViewWeights<T>::of(args, a, args.weights);
  multiply<T, Order::kRowMajor, Accumulate::kStore>(block.count, 2 * R, D, s.query, w.down, w.down_stride, s.low_rank,
                                                    kStride);
  const int terms = count_terms(args, a, seen), per_block = terms_per_block<T>(args);
  const T* stack = s.stack + int64_t{a} * args.num_modalities * R * kStride;
  for (int first = 0; first < terms; first += per_block) {
    const int count = smaller(per_block, terms - first);
    for (int t = first; t < first + count; ++t) {
      T* columns = s.terms + (t - first) * R;
      if (t == 0) {
        copy_rows<T>(block.count, R, s.low_rank, kStride, columns, kStride);
      } else {
        scale_rows(block, R, s.low_rank + R, s.scale, modality_of_term(a, t), columns);
      }
    }
    const T* rows = stack + int64_t{first} * R * kStride;
    if (first == 0) {
      multiply<T, Order::kRowMajor, Accumulate::kStore>(block.count, D, count * R, s.terms, rows, kStride, s.view,
                                                        kStride);
    } else {
      multiply<T, Order::kRowMajor, Accumulate::kAdd>(block.count, D, count * R, s.terms, rows, kStride, s.view,
                                                      kStride);
    }
  }
  if (chunk.count == chunk.keys_of(a)) return;
  score_block(chunk, block, R, s.low_rank + R, s.latent + int64_t{a} * R * kStride, kStride, s.scores);
  mask_scores<T>(chunk, block, a, s.scale, s.scores);
  add_weighted_keys(chunk, block, D, s.scores, s.features.rows, s.view);
}

// square[i][m] = q_i G^m_i q_i^T. `product` is scratch.
template <class T>
void quadratic_form(const CausalGramArgs& args, const Chunk& chunk, const RowBlock& block, const GramState<T>& state,
                    const T* query, const T* transposed, T* product, T (*square)[kMaxModalities]) {
  constexpr int kStride = kScratchStride<T>;
  const int D = args.head_dim;
  T twos[kRows];
  for (T& two : twos) two = 2;
  score_block(chunk, block, D, query, transposed, kKeyStride<T>, product);
  for (int i = 0; i < block.count; ++i) {
    for (int m = 0; m < args.num_modalities; ++m) square[i][m] = 0;
    for (int p = 0; p < chunk.num_present; ++p) {
      const int m = chunk.present[p];
      const T* row = product + i * kStride + chunk.begin[m];
      square[i][m] = dot(row, row, chunk.visible[m][block.first + i]);
    }
  }
  for (int m = 0; m < args.num_modalities; ++m) {
    if (!state.seen[m]) continue;
    if (state.has_few_keys(args, m)) {
      const int keys = state.num_keys[m];
      multiply<T, Order::kRowMajor, Accumulate::kStore>(block.count, keys, D, query, state.keys_of(args, m),
                                                        kKeyStride<T>, product, kStride);
      for (int i = 0; i < block.count; ++i) square[i][m] += dot(product + i * kStride, product + i * kStride, keys);
      continue;
    }
    const T* gram = state.of(args, m);
    for (int column = 0; column < D; column += kPanel<T>) {
      // Elements above the diagonal count twice: those above the panel's square, as 2 C + AB.
      const int width = smaller(kPanel<T>, D - column);
      for (int i = 0; i < block.count; i += kRows) {
        const int rows = smaller(kRows, block.count - i);
        const T* a = query + i * kStride;
        T* c = product + i * kStride + column;
        const T* panel = gram + int64_t{column} * D;
        if (column == 0) {
          multiply_panel<T, Order::kRowMajor, Accumulate::kStore>(rows, width, width, a, panel, kPanel<T>, c, kStride,
                                                                  nullptr);
          continue;
        }
        multiply_panel<T, Order::kRowMajor, Accumulate::kStore>(rows, width, column, a, panel, kPanel<T>, c, kStride,
                                                                nullptr);
        multiply_panel<T, Order::kRowMajor, Accumulate::kScaledAdd>(
            rows, width, width, a + column, panel + column * kPanel<T>, kPanel<T>, c, kStride, twos);
      }
    }
    for (int i = 0; i < block.count; ++i) square[i][m] += dot(product + i * kStride, query + i * kStride, D);
  }
}

// z^T of all keys of the chunk, for each view.
template <class T>
void latent_keys(const DuplexArgs& args, const Chunk& chunk, const T* transposed, T* latent) {
  const int R = padded_rank<T>(args);
  for (int a = 0; a < args.num_modalities; ++a)
    multiply<T, Order::kRowMajor, Accumulate::kStore>(
        R, chunk.count, args.head_dim, ViewWeights<T>::of(args, a, args.weights).key_down, transposed, kKeyStride<T>,
        latent + int64_t{a} * R * kScratchStride<T>, kScratchStride<T>);
}

template <class Storage, class T>
void duplex_query_views(const DuplexQueryViewsForwardArgs& args, int64_t batch, int64_t kv_head, void* memory) {
  constexpr int kStride = kScratchStride<T>;
  const int D = args.head_dim, M = args.num_modalities, R = padded_rank<T>(args);
  Arena<T> arena(memory);
  DuplexQueryViewsScratch<T> s(args, arena);
  const bool needs_gram = DuplexQueryViewsScratch<T>::needs_gram(args);
  const T* initial = grams_of<T>(args, args.initial, batch, kv_head);
  if (needs_gram) start_state(args, initial, s.state);
  bool seen[kMaxModalities];
  for (int m = 0; m < M; ++m) seen[m] = initial != nullptr;
  for (int a = 0; a < M; ++a) {
    const ViewWeights<T> w = ViewWeights<T>::of(args, a, args.weights);
    T* stack = s.stack + int64_t{a} * M * R * kStride;
    clear_rows(int64_t{M} * R, stack);
    copy_rows<T>(R, D, w.up, kStride, stack, kStride);
    for (int m = 0; initial != nullptr && m < M; ++m) {
      if (m == a) continue;
      copy_rows<T>(D, D, initial + m * state_elements(args), D, s.initial, kStride);
      multiply<T, Order::kRowMajor, Accumulate::kStore>(R, D, D, w.key_down, s.initial, kStride,
                                                        stack + int64_t{term_of_modality(a, m)} * R * kStride, kStride);
    }
  }

  Chunk chunk;
  for (int64_t first = 0; first < args.num_keys; first += kChunk) {
    plan_chunk(args, batch, first, args.num_keys, chunk);
    load_features<Storage>(args, batch, kv_head, chunk, s.features);
    transpose_features(args, chunk, s.features.rows, s.transposed);
    latent_keys(args, chunk, s.transposed, s.latent);
    const RowBlock block = rows_of(args, chunk);
    load_scale(args, batch, kv_head, block, s.scale);
    for (int64_t head = kv_head * args.group; block.count > 0 && head < (kv_head + 1) * args.group; ++head) {
      load_block(row_of<Storage>(args.query, batch, head, block.row), args.query.row, block.count, D, T(1), s.query);
      if (head + 1 < (kv_head + 1) * args.group) {
        prefetch_rows(row_of<Storage>(args.query, batch, head + 1, block.row), args.query.row, block.count, D);
      } else {
        const int64_t next = block.row + block.count, left = args.num_queries - next;
        prefetch_keys<Storage>(args, batch, kv_head, first + kChunk);
        prefetch_rows(row_of<Storage>(args.query, batch, kv_head * args.group, next), args.query.row,
                      left < kChunk ? left : kChunk, D);
      }
      for (int a = 0; a < M; ++a) {
        make_view(args, chunk, block, a, seen, s);
        Storage* out = row_of<Storage>(args.views, batch, head, block.row) + args.views.view * a;
        for (int i = 0; i < block.count; ++i)
          store_sum(s.query + i * kStride, s.view + i * kStride, out + i * args.views.row, D, args.nontemporal);
      }
      if (args.indicator.data == nullptr) continue;
      quadratic_form(args, chunk, block, s.state, s.query, s.transposed, s.view, s.square);
      for (int i = 0; i < block.count; ++i) {
        const T norm = dot(s.query + i * kStride, s.query + i * kStride, D);
        T* out = row_of<T>(args.indicator, batch, head, block.row + i);
        for (int m = 0; m < M; ++m) out[m * args.indicator.last] = norm > 0 ? s.square[i][m] / norm : T(0);
      }
    }

    if (needs_gram) add_chunk(args, chunk, s.features.rows, s.state);
    for (int p = 0; p < chunk.num_present; ++p) {
      const int m = chunk.present[p], begin = chunk.begin[m];
      seen[m] = true;
      for (int a = 0; a < M; ++a)
        if (a != m)
          multiply<T, Order::kRowMajor, Accumulate::kAdd>(
              R, D, chunk.keys_of(m), s.latent + int64_t{a} * R * kStride + begin, s.features.rows + begin * kStride,
              kStride, s.stack + (int64_t{a} * M + term_of_modality(a, m)) * R * kStride, kStride);
    }
  }
  nontemporal_fence();
  if (args.gram != nullptr) store_state(args, s.state, grams_of<T>(args, args.gram, batch, kv_head));
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
