// Backward pass of duplex_query_views_forward.h. With d = dview_a, and sums over the views a and the other modalities
// m:
//
//   u_{a,m} = d_i H_{a,m,i}^T        dx = sum_m s_m u_{a,m}     ds_m = sum_a x . u_{a,m}     dy = d A1
//   dq_i   = sum_a d + dy B1 + dx B2                    dA1 = sum d^T y    dB1 = sum dy^T q    dB2 = sum dx^T q
//   dz_j   = sum_{i >= j} (s d_i . phi_j) x_i           dphi_j = sum_{i >= j} (s x_i . z_j) d_i + dz_j A2^T
//   dA2    = sum_j phi_j^T dz_j
//
// and for the indicator, with h_im = de_im / |q_i|^2:
//
//   dq_i  += sum_m 2 h_im (q_i G^m_i - e_im q_i)        dphi_j += sum_{i >= j} 2 h_{i,a_j} (q_i . phi_j) q_i
//
// A work item is one key head. It first walks forward over the keys alone and logs, before each chunk, the states of
// the modalities that the chunk changes; then it walks back over keys and queries, undoes the changes from the log, and
// carries the sums over later rows as states of their own:
//
//   L_{a,m} = sum s x^T d  (rank x D)        dphi_j = z_j L        dz_j = phi_j L^T
//
// and, for the indicator, sum 2 h q^T q (upper panels). Everything of a query row is read once. The log is one rank x D
// state for each chunk and view (and one D x D with the indicator): O(N) memory.
#pragma once

#include "cpu/kernels/vector/causal_gram_projection.h"
#include "cpu/kernels/vector/duplex_query_views_forward.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

template <class T>
struct DuplexQueryViewsBackwardScratch {
  Features<T> features;
  T *transposed, *query, *grad_view, *grad_query, *low_rank, *grad_low_rank, *terms, *products, *scores, *grad_scores;
  T* grad_key;          // of phi
  T* latent;            // [M][R] scratch rows: z^T
  T* latent_rows;       // [M][kChunk] scratch rows: z
  T* grad_latent;       // [M][kChunk] scratch rows: dz
  T* states;            // [M][D][M terms][R], stride state_stride: A1, then H^T
  T* later;             // [M][M terms][R] scratch rows: dA1^T, then L
  T* transposed_later;  // [D][R]
  T* grad_back;         // [M][2 R] scratch rows: dB1, dB2
  T* grad_key_down;     // [M][R] scratch rows: dA2^T
  T* block;             // [D] scratch rows
  T (*scale)[kMaxModalities];
  T (*grad_scale)[kMaxModalities];
  GramState<T> state;  // with the indicator
  T* later_gram;       // [M][D] scratch rows, upper panels; with the indicator or a gradient of the final Gram
  T *log, *log_gram;
  bool* log_seen;
  int* log_num_keys;
  int64_t state_stride;

  DuplexQueryViewsBackwardScratch(const DuplexQueryViewsBackwardArgs& args, int64_t entries, Arena<T>& arena) {
    const int64_t M = args.num_modalities, R = padded_rank<T>(args), D = args.head_dim;
    state_stride = round_up_to_panel<T>(M * R);
    features.rows = arena.rows(kChunk);
    transposed = arena.take(int64_t{kScratchColumns} * kKeyStride<T>);
    T** const blocks[] = {&query, &grad_view, &grad_query, &low_rank,    &grad_low_rank,
                          &terms, &products,  &scores,     &grad_scores, &grad_key};
    for (T** block_of_rows : blocks) *block_of_rows = arena.rows(kChunk);
    latent = arena.rows(M * R);
    latent_rows = arena.rows(M * kChunk);
    grad_latent = arena.rows(M * kChunk);
    states = arena.take(M * D * state_stride);
    later = arena.rows(M * M * R);
    transposed_later = arena.take(D * round_up_to_panel<T>(R));
    grad_back = arena.rows(M * 2 * R);
    grad_key_down = arena.rows(M * R);
    block = arena.rows(D);
    scale = arena.template take<T[kMaxModalities]>(kChunk);
    grad_scale = arena.template take<T[kMaxModalities]>(kChunk);
    if (with_indicator(args)) state.take(args, arena);
    later_gram = with_later_gram(args) ? arena.take(M * symmetric_elements<T>(args.head_dim)) : nullptr;
    log = arena.take(entries * (M - 1) * D * R);
    log_gram = with_indicator(args) ? arena.take(entries * symmetric_elements<T>(args.head_dim)) : nullptr;
    log_seen = arena.template take<bool>(entries);
    log_num_keys = arena.template take<int>(entries);
  }
  static bool with_indicator(const DuplexQueryViewsBackwardArgs& args) { return args.grad_indicator.data != nullptr; }
  static bool with_later_gram(const DuplexQueryViewsBackwardArgs& args) {
    return with_indicator(args) || args.grad_gram != nullptr;
  }
  // H^T of view a: all its terms, or the one of a modality.
  T* state_of(const DuplexArgs& args, int a) const { return states + int64_t{a} * args.head_dim * state_stride; }
  T* state_of(const DuplexArgs& args, int a, int m) const {
    return state_of(args, a) + term_of_modality(a, m) * padded_rank<T>(args);
  }
  T* later_of(const DuplexArgs& args, int a, int term) const {
    return later + (int64_t{a} * args.num_modalities + term) * padded_rank<T>(args) * kScratchStride<T>;
  }
  T* later_gram_of(const DuplexArgs& args, int m) const {
    return later_gram + m * symmetric_elements<T>(args.head_dim);
  }
};

template <class T>
int64_t duplex_query_views_backward_scratch_bytes(const DuplexQueryViewsBackwardArgs& args, int64_t batch) {
  return scratch_bytes<DuplexQueryViewsBackwardScratch<T>, T>(args, count_states(args, batch));
}

// The states before the first token.
template <class T>
void start_states(const DuplexQueryViewsBackwardArgs& args, const T* initial, bool* seen,
                  DuplexQueryViewsBackwardScratch<T>& s) {
  constexpr int kStride = kScratchStride<T>;
  const int D = args.head_dim, M = args.num_modalities, R = padded_rank<T>(args);
  const int64_t rows_stride = round_up_to_panel<T>(R);
  memset(s.states, 0, sizeof(T) * static_cast<size_t>(M * D * s.state_stride));
  for (int a = 0; a < M; ++a)
    copy_rows<T>(D, R, ViewWeights<T>::of(args, a, args.weights).up_rows, rows_stride, s.state_of(args, a),
                 s.state_stride);
  for (int m = 0; m < M; ++m) {
    seen[m] = initial != nullptr;
    if (initial == nullptr) continue;
    copy_rows<T>(D, D, initial + m * state_elements(args), D, s.block, kStride);
    for (int a = 0; a < M; ++a)
      if (a != m)
        multiply<T, Order::kRowMajor, Accumulate::kStore>(D, R, D, s.block,
                                                          ViewWeights<T>::of(args, a, args.weights).key_rows,
                                                          rows_stride, s.state_of(args, a, m), s.state_stride);
  }
  if (DuplexQueryViewsBackwardScratch<T>::with_indicator(args)) start_state(args, initial, s.state);
}

// z of all keys of the chunk as rows, for each view.
template <class T>
void latent_key_rows(const DuplexArgs& args, const Chunk& chunk, const T* features, T* latent_rows) {
  const int R = padded_rank<T>(args);
  for (int a = 0; a < args.num_modalities; ++a)
    multiply<T, Order::kRowMajor, Accumulate::kStore>(
        chunk.count, R, args.head_dim, features, ViewWeights<T>::of(args, a, args.weights).key_rows,
        round_up_to_panel<T>(R), latent_rows + int64_t{a} * kChunk * kScratchStride<T>, kScratchStride<T>);
}

// Forward over the keys: the states after the last token, and in the log what undo_states needs.
template <class Storage, class T>
int64_t walk_forward(const DuplexQueryViewsBackwardArgs& args, int64_t batch, int64_t kv_head, bool* seen,
                     DuplexQueryViewsBackwardScratch<T>& s) {
  constexpr int kStride = kScratchStride<T>;
  const int D = args.head_dim, M = args.num_modalities, R = padded_rank<T>(args);
  const bool with_indicator = DuplexQueryViewsBackwardScratch<T>::with_indicator(args);
  const int64_t elements = symmetric_elements<T>(D);
  Chunk chunk;
  int64_t entry = 0;
  for (int64_t first = 0; first < args.num_keys; first += kChunk) {
    plan_chunk(args, batch, first, args.num_keys, chunk);
    load_features<Storage>(args, batch, kv_head, chunk, s.features);
    prefetch_keys<Storage>(args, batch, kv_head, first + kChunk);
    latent_key_rows(args, chunk, s.features.rows, s.latent_rows);
    for (int p = 0; p < chunk.num_present; ++p, ++entry) {
      const int m = chunk.present[p], begin = chunk.begin[m];
      s.log_seen[entry] = seen[m];
      seen[m] = true;
      T* log = s.log + entry * (M - 1) * D * R;
      for (int a = 0; a < M; ++a) {
        if (a == m) continue;
        copy_rows<T>(D, R, s.state_of(args, a, m), s.state_stride, log, R);
        log += D * R;
        multiply<T, Order::kColumnMajor, Accumulate::kAdd>(D, R, chunk.keys_of(m), s.features.rows + begin * kStride,
                                                           s.latent_rows + (int64_t{a} * kChunk + begin) * kStride,
                                                           kStride, s.state_of(args, a, m), s.state_stride);
      }
      if (!with_indicator) continue;
      memcpy(s.log_gram + entry * elements, s.state.of(args, m), sizeof(T) * static_cast<size_t>(elements));
      s.log_num_keys[entry] = s.state.num_keys[m];
    }
    if (with_indicator) add_chunk(args, chunk, s.features.rows, s.state);
  }
  for (int m = 0; with_indicator && m < M; ++m) mirror(D, s.state.of(args, m));
  return entry;
}

// Puts the states back to what they were before the chunk.
template <class T>
void undo_states(const DuplexQueryViewsBackwardArgs& args, const Chunk& chunk, int64_t& entry, bool* seen,
                 DuplexQueryViewsBackwardScratch<T>& s) {
  const int D = args.head_dim, M = args.num_modalities, R = padded_rank<T>(args);
  for (int p = chunk.num_present; p-- > 0;) {
    const int m = chunk.present[p];
    --entry;
    const T* log = s.log + entry * (M - 1) * D * R;
    for (int a = 0; a < M; ++a) {
      if (a == m) continue;
      copy_rows<T>(D, R, log, R, s.state_of(args, a, m), s.state_stride);
      log += D * R;
    }
    seen[m] = s.log_seen[entry];
    if (!DuplexQueryViewsBackwardScratch<T>::with_indicator(args)) continue;
    const int64_t elements = symmetric_elements<T>(D);
    memcpy(s.state.of(args, m), s.log_gram + entry * elements, sizeof(T) * static_cast<size_t>(elements));
    mirror(D, s.state.of(args, m));
    s.state.seen[m] = seen[m];
    s.state.num_keys[m] = s.log_num_keys[entry];  // the keys themselves are still there
  }
}

// What the rows of later chunks pass to the keys of this one: dphi, dz.
template <class T>
void gradient_from_later_rows(const DuplexQueryViewsBackwardArgs& args, const Chunk& chunk,
                              DuplexQueryViewsBackwardScratch<T>& s) {
  constexpr int kStride = kScratchStride<T>;
  const int D = args.head_dim, M = args.num_modalities, R = padded_rank<T>(args);
  const int64_t rows_stride = round_up_to_panel<T>(R);
  clear_rows(chunk.count, s.grad_key);
  for (int a = 0; a < M; ++a) clear_rows(chunk.count, s.grad_latent + int64_t{a} * kChunk * kStride);
  for (int p = 0; p < chunk.num_present; ++p) {
    const int m = chunk.present[p];
    const int64_t keys = chunk.keys_of(m), begin = int64_t{chunk.begin[m]} * kStride;
    for (int a = 0; a < M; ++a) {
      if (a == m) continue;
      const int64_t rows = int64_t{a} * kChunk * kStride + begin;
      const T* later = s.later_of(args, a, term_of_modality(a, m));
      multiply<T, Order::kRowMajor, Accumulate::kAdd>(keys, D, R, s.latent_rows + rows, later, kStride,
                                                      s.grad_key + begin, kStride);
      transpose(D, R, later, kStride, s.transposed_later, rows_stride);
      multiply<T, Order::kRowMajor, Accumulate::kStore>(keys, R, D, s.features.rows + begin, s.transposed_later,
                                                        rows_stride, s.grad_latent + rows, kStride);
    }
    if (s.later_gram == nullptr) continue;
    mirror(D, s.later_gram_of(args, m));
    multiply_symmetric<T, Accumulate::kAdd>(keys, D, s.features.rows + begin, s.later_gram_of(args, m),
                                            s.grad_key + begin);
  }
}

// One view of one head's rows.
template <class T>
void differentiate_view(const DuplexQueryViewsBackwardArgs& args, const Chunk& chunk, const RowBlock& block, int a,
                        const bool* seen, DuplexQueryViewsBackwardScratch<T>& s) {
  constexpr int kStride = kScratchStride<T>;
  const int D = args.head_dim, M = args.num_modalities, R = padded_rank<T>(args);
  const ViewWeights<T> w = ViewWeights<T>::of(args, a, args.weights);
  const bool meets_keys = chunk.count > chunk.keys_of(a);  // of other modalities in the chunk
  bool reached[kMaxModalities];
  for (int m = 0; m < M; ++m) reached[m] = seen[m] || chunk.keys_of(m) > 0;

  multiply<T, Order::kRowMajor, Accumulate::kStore>(block.count, 2 * R, D, s.query, w.down, w.down_stride, s.low_rank,
                                                    kStride);
  const T* x = s.low_rank + R;
  if (meets_keys) {
    score_block(chunk, block, D, s.grad_view, s.transposed, kKeyStride<T>, s.grad_scores);
    mask_scores<T>(chunk, block, a, nullptr, s.grad_scores);
  }
  T* grad_x = s.grad_low_rank + R;
  for (int i = 0; i < block.count; ++i) memset(grad_x + i * kStride, 0, sizeof(T) * static_cast<size_t>(R));
  const int terms = count_terms(args, a, reached), per_block = terms_per_block<T>(args);
  for (int first = 0; first < terms; first += per_block) {
    const int count = smaller(per_block, terms - first);
    multiply<T, Order::kRowMajor, Accumulate::kStore>(
        block.count, count * R, D, s.grad_view, s.state_of(args, a) + first * R, s.state_stride, s.products, kStride);
    for (int t = first; t < first + count; ++t) {
      T* product = s.products + (t - first) * R;
      T* columns = s.terms + (t - first) * R;
      if (t == 0) {
        copy_rows<T>(block.count, R, product, kStride, s.grad_low_rank, kStride);
        copy_rows<T>(block.count, R, s.low_rank, kStride, columns, kStride);
        continue;
      }
      const int m = modality_of_term(a, t);
      if (chunk.keys_of(m) > 0)
        multiply<T, Order::kRowMajor, Accumulate::kAdd>(
            block.count, R, chunk.keys_of(m), s.grad_scores + chunk.begin[m],
            s.latent_rows + (int64_t{a} * kChunk + chunk.begin[m]) * kStride, kStride, product, kStride);
      for (int i = 0; i < block.count; ++i) {
        s.grad_scale[i][m] += dot(x + i * kStride, product + i * kStride, R);
        add_scaled(s.scale[i][m], product + i * kStride, grad_x + i * kStride, R);
      }
      scale_rows(block, R, x, s.scale, m, columns);
    }
    multiply<T, Order::kColumnMajor, Accumulate::kAdd>(count * R, D, block.count, s.terms, s.grad_view, kStride,
                                                       s.later_of(args, a, first), kStride);
  }
  if (meets_keys) {
    score_block(chunk, block, R, x, s.latent + int64_t{a} * R * kStride, kStride, s.scores);
    mask_scores<T>(chunk, block, a, s.scale, s.scores);
    add_weighted_rows(chunk, block, D, s.scores, s.grad_view, s.grad_key);
    mask_scores<T>(chunk, block, a, s.scale, s.grad_scores);
    add_weighted_rows(chunk, block, R, s.grad_scores, x, s.grad_latent + int64_t{a} * kChunk * kStride);
  }
  multiply<T, Order::kRowMajor, Accumulate::kAdd>(block.count, D, 2 * R, s.grad_low_rank, w.back, kStride, s.grad_query,
                                                  kStride);
  multiply<T, Order::kColumnMajor, Accumulate::kAdd>(2 * R, D, block.count, s.grad_low_rank, s.query, kStride,
                                                     s.grad_back + int64_t{a} * 2 * R * kStride, kStride);
}

// The indicator of one head's rows.
template <class T>
void differentiate_indicator(const DuplexQueryViewsBackwardArgs& args, int64_t batch, int64_t head, const Chunk& chunk,
                             const RowBlock& block, const bool* seen, DuplexQueryViewsBackwardScratch<T>& s) {
  constexpr int kStride = kScratchStride<T>;
  const int D = args.head_dim, M = args.num_modalities;
  T factor[kChunk][kMaxModalities];  // 2 h
  for (int i = 0; i < block.count; ++i) {
    const T* query = s.query + i * kStride;
    const T norm = dot(query, query, D), inverse = norm > 0 ? 1 / norm : T(0);
    const T* indicator = row_of<T>(args.indicator, batch, head, block.row + i);
    const T* grad = row_of<T>(args.grad_indicator, batch, head, block.row + i);
    T sum = 0;
    for (int m = 0; m < M; ++m) {
      factor[i][m] = 2 * inverse * grad[m * args.grad_indicator.last];
      sum += factor[i][m] * indicator[m * args.indicator.last];
    }
    add_scaled(-sum, query, s.grad_query + i * kStride, D);
  }
  score_block(chunk, block, D, s.query, s.transposed, kKeyStride<T>, s.scores);
  mask_scores<T>(chunk, block, -1, factor, s.scores);
  add_weighted_keys(chunk, block, D, s.scores, s.features.rows, s.grad_query);
  add_weighted_rows(chunk, block, D, s.scores, s.query, s.grad_key);
  for (int m = 0; m < M; ++m) {
    if (!seen[m]) continue;
    scale_rows(block, D, s.query, factor, m, s.terms);
    if (s.state.has_few_keys(args, m)) {
      const int keys = s.state.num_keys[m];
      multiply<T, Order::kRowMajor, Accumulate::kStore>(block.count, keys, D, s.terms, s.state.keys_of(args, m),
                                                        kKeyStride<T>, s.products, kStride);
      multiply<T, Order::kRowMajor, Accumulate::kAdd>(block.count, D, keys, s.products, s.state.key_rows_of(m), kStride,
                                                      s.grad_query, kStride);
    } else {
      multiply_symmetric<T, Accumulate::kAdd>(block.count, D, s.terms, s.state.of(args, m), s.grad_query);
    }
    accumulate_upper(D, block.count, s.terms, s.query, s.later_gram_of(args, m));
  }
}

// What the states before the first token pass on: to A2 through H_0 = A2^T G_0, and to G_0 (`grad`; null: not wanted).
template <class T>
void differentiate_initial(const DuplexQueryViewsBackwardArgs& args, const T* initial, T* grad,
                           DuplexQueryViewsBackwardScratch<T>& s) {
  constexpr int kStride = kScratchStride<T>;
  const int D = args.head_dim, M = args.num_modalities, R = padded_rank<T>(args);
  for (int m = 0; initial != nullptr && m < M; ++m) {
    copy_rows<T>(D, D, initial + m * state_elements(args), D, s.block, kStride);
    for (int a = 0; a < M; ++a)
      if (a != m)
        multiply<T, Order::kRowMajor, Accumulate::kAdd>(R, D, D, s.later_of(args, a, term_of_modality(a, m)), s.block,
                                                        kStride, s.grad_key_down + int64_t{a} * R * kStride, kStride);
  }
  if (grad == nullptr) return;
  for (int m = 0; m < M; ++m, grad += state_elements(args)) {
    clear_rows(D, s.block);
    for (int a = 0; a < M; ++a)
      if (a != m)
        multiply<T, Order::kColumnMajor, Accumulate::kAdd>(D, D, R, ViewWeights<T>::of(args, a, args.weights).key_down,
                                                           s.later_of(args, a, term_of_modality(a, m)), kStride,
                                                           s.block, kStride);
    if (s.later_gram != nullptr) mirror(D, s.later_gram_of(args, m));
    for (int i = 0; i < D; ++i)
      for (int j = 0; j < D; ++j) {
        const T own = s.later_gram != nullptr ? *symmetric_at(s.later_gram_of(args, m), D, i, j) : T(0);
        grad[i * D + j] = (s.block[i * kStride + j] + s.block[j * kStride + i] + own) / 2;
      }
  }
}

template <class Storage, class T>
void duplex_query_views_backward(const DuplexQueryViewsBackwardArgs& args, int64_t batch, int64_t kv_head,
                                 void* partial, void* memory) {
  constexpr int kStride = kScratchStride<T>;
  const int D = args.head_dim, M = args.num_modalities, R = padded_rank<T>(args);
  Arena<T> arena(memory);
  DuplexQueryViewsBackwardScratch<T> s(args, count_states(args, batch), arena);
  const T* initial = grams_of<T>(args, args.initial, batch, kv_head);
  bool seen[kMaxModalities];
  start_states(args, initial, seen, s);
  int64_t entry = walk_forward<Storage>(args, batch, kv_head, seen, s);

  clear_rows(int64_t{M} * M * R, s.later);
  clear_rows(int64_t{M} * 2 * R, s.grad_back);
  clear_rows(int64_t{M} * R, s.grad_key_down);
  const T* grad_gram = grams_of<T>(args, args.grad_gram, batch, kv_head);
  for (int m = 0; s.later_gram != nullptr && m < M; ++m) {
    // The final Gram's gradient dG acts on every key as later rows would: dphi = phi (dG + dG^T).
    T* later = s.later_gram_of(args, m);
    const T* grad = grad_gram == nullptr ? nullptr : grad_gram + m * state_elements(args);
    for (int i = 0; i < D; ++i)
      for (int j = 0; j < D; ++j)
        *symmetric_at(later, D, i, j) = grad == nullptr ? T(0) : grad[i * D + j] + grad[j * D + i];
  }

  Chunk chunk;
  const int64_t last_chunk = (args.num_keys - 1) / kChunk * kChunk;
  for (int64_t first = last_chunk; args.num_keys > 0 && first >= 0; first -= kChunk) {
    plan_chunk(args, batch, first, args.num_keys, chunk);
    load_features<Storage>(args, batch, kv_head, chunk, s.features);
    if (first > 0) prefetch_keys<Storage>(args, batch, kv_head, first - kChunk);
    transpose_features(args, chunk, s.features.rows, s.transposed);
    latent_keys(args, chunk, s.transposed, s.latent);
    latent_key_rows(args, chunk, s.features.rows, s.latent_rows);
    undo_states(args, chunk, entry, seen, s);
    gradient_from_later_rows(args, chunk, s);

    const RowBlock block = rows_of(args, chunk);
    load_scale(args, batch, kv_head, block, s.scale);
    memset(s.grad_scale, 0, sizeof(T) * kMaxModalities * static_cast<size_t>(block.count));
    for (int64_t head = kv_head * args.group; block.count > 0 && head < (kv_head + 1) * args.group; ++head) {
      load_block(row_of<Storage>(args.query, batch, head, block.row), args.query.row, block.count, D, T(1), s.query);
      if (head + 1 < (kv_head + 1) * args.group)
        prefetch_rows(row_of<Storage>(args.query, batch, head + 1, block.row), args.query.row, block.count, D);
      for (int a = 0; a < M; ++a) {
        // The next view's rows come in from memory while this one's are computed with.
        const bool last = a + 1 == M;
        if (!last || head + 1 < (kv_head + 1) * args.group)
          prefetch_rows(row_of<Storage>(args.grad_views, batch, last ? head + 1 : head, block.row) +
                            args.grad_views.view * (last ? 0 : a + 1),
                        args.grad_views.row, block.count, D);
        load_block(row_of<Storage>(args.grad_views, batch, head, block.row) + args.grad_views.view * a,
                   args.grad_views.row, block.count, D, T(1), s.grad_view);
        if (a == 0) clear_rows(block.count, s.grad_query);
        for (int i = 0; i < block.count; ++i)
          add_scaled(T(1), s.grad_view + i * kStride, s.grad_query + i * kStride, D);
        differentiate_view(args, chunk, block, a, seen, s);
      }
      if (DuplexQueryViewsBackwardScratch<T>::with_indicator(args))
        differentiate_indicator(args, batch, head, chunk, block, seen, s);
      Storage* grad_query = row_of<Storage>(args.grad_query, batch, head, block.row);
      for (int i = 0; i < block.count; ++i)
        store_row(s.grad_query + i * kStride, T(1), grad_query + i * args.grad_query.row, D);
    }
    for (int i = 0; i < block.count; ++i)
      for (int m = 0; m < M; ++m)
        row_of<T>(args.grad_row_scale, batch, kv_head, block.row + i)[m * args.grad_row_scale.last] =
            s.grad_scale[i][m];

    for (int a = 0; a < M; ++a) {
      const T* grad_latent = s.grad_latent + int64_t{a} * kChunk * kStride;
      multiply<T, Order::kRowMajor, Accumulate::kAdd>(chunk.count, D, R, grad_latent,
                                                      ViewWeights<T>::of(args, a, args.weights).key_down, kStride,
                                                      s.grad_key, kStride);
      multiply<T, Order::kColumnMajor, Accumulate::kAdd>(R, D, chunk.count, grad_latent, s.features.rows, kStride,
                                                         s.grad_key_down + int64_t{a} * R * kStride, kStride);
    }
    store_key_gradient<Storage>(args, args.grad_key, batch, kv_head, chunk, s.features, s.grad_key);
  }

  differentiate_initial(args, initial, grams_of<T>(args, args.grad_initial, batch, kv_head), s);
  const int64_t elements = int64_t{args.rank} * D;
  T* out = static_cast<T*>(partial);
  for (int a = 0; a < M; ++a, out += elements) {
    copy_rows<T>(args.rank, D, s.later_of(args, a, 0), kStride, out, D);
    copy_rows<T>(args.rank, D, s.grad_back + int64_t{a} * 2 * R * kStride, kStride, out + M * elements, D);
    copy_rows<T>(args.rank, D, s.grad_key_down + int64_t{a} * R * kStride, kStride, out + 2 * M * elements, D);
    copy_rows<T>(args.rank, D, s.grad_back + (int64_t{a} * 2 + 1) * R * kStride, kStride, out + 3 * M * elements, D);
  }
}

template <class T>
void reduce_weight_gradients(const DuplexArgs& args, const void* partials, int64_t count, void* grad_a1, void* grad_b1,
                             void* grad_a2, void* grad_b2) {
  const int64_t D = args.head_dim, rank = args.rank, M = args.num_modalities, part = M * rank * D;
  T* out[4] = {static_cast<T*>(grad_a1), static_cast<T*>(grad_b1), static_cast<T*>(grad_a2), static_cast<T*>(grad_b2)};
  for (int weight = 0; weight < 4; ++weight)
    for (int64_t m = 0; m < M; ++m)
      for (int64_t k = 0; k < rank; ++k)
        for (int64_t d = 0; d < D; ++d) {
          const T* from = static_cast<const T*>(partials) + weight * part + (m * rank + k) * D + d;
          T sum = 0;
          for (int64_t i = 0; i < count; ++i) sum += from[i * 4 * part];
          out[weight][m * rank * D + (weight % 2 == 0 ? d * rank + k : k * D + d)] = sum;
        }
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
