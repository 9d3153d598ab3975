// Causal Gram projection, forward and backward: linear attention whose values are its keys (docs/mathematics.md section 1).
//
//   o_{i,m} = s_{i,m} q_i G^m_i         G^m_i = G^m_0 + sum_{j <= i, a_j = m} phi_j^T phi_j
//   u_{i,m} = do_{i,m} G^m_i            dq_i = sum_m s_{i,m} u_{i,m}      ds_{i,m} = q_i . u_{i,m}
//   dphi_j  = sum_{i >= j} s_{i,m} ((do_i . phi_j) q_i + (q_i . phi_j) do_i)                            m = a_j
//
// A work item is one key head and walks along its chunks: rows meet the state before the chunk as one D x D product,
// and the chunk's own keys through masked scores. The backward pass first walks forward and keeps the state before each
// chunk, of the modalities that the chunk changes; then it walks back, undoes those changes one chunk at a time, and
// carries the sums over later rows, sum s q^T do, as a state of its own.
#pragma once

#include "cpu/kernels/vector/gram_family_chunk.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

template <class T>
struct CausalGramProjectionScratch {
  Features<T> features;
  T *transposed, *query, *scores, *out;
  T (*scale)[kMaxModalities];
  GramState<T> state;

  CausalGramProjectionScratch(const CausalGramArgs& args, Arena<T>& arena) {
    features.rows = arena.rows(kChunk);
    transposed = arena.take(int64_t{kScratchColumns} * kKeyStride<T>);
    query = arena.rows(kChunk);
    scores = arena.rows(kChunk);
    out = arena.rows(kChunk);
    scale = arena.template take<T[kMaxModalities]>(kChunk);
    state.take(args, arena);
  }
};

template <class T>
int64_t causal_gram_projection_scratch_bytes(const CausalGramProjectionForwardArgs& args) {
  return scratch_bytes<CausalGramProjectionScratch<T>, T>(args);
}

// out = q G^m before the chunk, plus the chunk's own keys of modality m; scores are masked.
template <class T>
void project_rows(const CausalGramArgs& args, const Chunk& chunk, const RowBlock& block, int m,
                  const GramState<T>& state, const T* features, const T* query, const T* scores, T* out) {
  constexpr int kStride = kScratchStride<T>;
  if (state.seen[m]) {
    multiply_symmetric<T, Accumulate::kStore>(block.count, args.head_dim, query, state.of(args, m), out);
  } else {
    clear_rows(block.count, out);
  }
  if (chunk.keys_of(m) > 0)
    multiply<T, Order::kRowMajor, Accumulate::kAdd>(block.count, args.head_dim, chunk.keys_of(m),
                                                    scores + chunk.begin[m], features + chunk.begin[m] * kStride,
                                                    kStride, out, kStride);
}

template <class T>
void mirror_changed(const GramArgs& args, const Chunk& chunk, GramState<T>& state) {
  for (int p = 0; p < chunk.num_present; ++p) mirror(args.head_dim, state.of(args, chunk.present[p]));
}

template <class Storage, class T>
void causal_gram_projection(const CausalGramProjectionForwardArgs& args, int64_t batch, int64_t kv_head, void* memory) {
  constexpr int kStride = kScratchStride<T>;
  Arena<T> arena(memory);
  CausalGramProjectionScratch<T> s(args, arena);
  start_state(args, grams_of<T>(args, args.initial, batch, kv_head), s.state);
  Chunk chunk;
  for (int64_t first = 0; first < args.num_keys; first += kChunk) {
    plan_chunk(args, batch, first, args.num_keys, chunk);
    load_features<Storage>(args, batch, kv_head, chunk, s.features);
    transpose_features(args, chunk, s.features.rows, s.transposed);
    const RowBlock block = rows_of(args, chunk);
    load_scale(args, batch, kv_head, block, s.scale);
    for (int64_t head = kv_head * args.group; block.count > 0 && head < (kv_head + 1) * args.group; ++head) {
      load_block(row_of<Storage>(args.query, batch, head, block.row), args.query.row, block.count, args.head_dim, T(1),
                 s.query);
      score_block(chunk, block, args.head_dim, s.query, s.transposed, kKeyStride<T>, s.scores);
      mask_scores<T>(chunk, block, -1, nullptr, s.scores);
      for (int m = 0; m < args.num_modalities; ++m) {
        project_rows(args, chunk, block, m, s.state, s.features.rows, s.query, s.scores, s.out);
        Storage* out = row_of<Storage>(args.projection, batch, head, block.row) + args.projection.view * m;
        for (int i = 0; i < block.count; ++i)
          store_row(s.out + i * kStride, s.scale[i][m], out + i * args.projection.row, args.head_dim);
      }
    }
    add_chunk(args, chunk, s.features.rows, s.state);
    mirror_changed(args, chunk, s.state);
  }
  store_state(args, s.state, grams_of<T>(args, args.gram, batch, kv_head));
}

template <class T>
struct CausalGramProjectionBackwardScratch : CausalGramProjectionScratch<T> {
  T *grad_out, *grad_query, *grad_key, *grad_scores;
  T* symmetric;  // later + later^T of one modality
  T* later;  // [num_modalities][head_dim] scratch rows: sum over later rows of s q^T do, and the final Gram's gradient
  T* log;    // states before the chunks, one symmetric matrix for each entry
  bool* log_seen;

  CausalGramProjectionBackwardScratch(const CausalGramArgs& args, int64_t entries, Arena<T>& arena)
      : CausalGramProjectionScratch<T>(args, arena) {
    grad_out = arena.rows(kChunk);
    grad_query = arena.rows(kChunk);
    grad_key = arena.rows(kChunk);
    grad_scores = arena.rows(kChunk);
    symmetric = arena.rows(args.head_dim);
    later = arena.rows(int64_t{args.num_modalities} * args.head_dim);
    log = arena.take(entries * symmetric_elements<T>(args.head_dim));
    log_seen = arena.template take<bool>(entries);
  }
};

template <class T>
int64_t causal_gram_projection_backward_scratch_bytes(const CausalGramProjectionBackwardArgs& args, int64_t batch) {
  return scratch_bytes<CausalGramProjectionBackwardScratch<T>, T>(args, count_states(args, batch));
}

template <class T>
void log_states(const GramArgs& args, const Chunk& chunk, const GramState<T>& state, int64_t& entry, T* log,
                bool* log_seen) {
  for (int p = 0; p < chunk.num_present; ++p, ++entry) {
    const int m = chunk.present[p];
    const int64_t elements = symmetric_elements<T>(args.head_dim);
    memcpy(log + entry * elements, state.of(args, m), sizeof(T) * static_cast<size_t>(elements));
    log_seen[entry] = state.seen[m];
  }
}
template <class T>
void undo_chunk(const GramArgs& args, const Chunk& chunk, GramState<T>& state, int64_t& entry, const T* log,
                const bool* log_seen) {
  for (int p = chunk.num_present; p-- > 0;) {
    const int m = chunk.present[p];
    --entry;
    const int64_t elements = symmetric_elements<T>(args.head_dim);
    memcpy(state.of(args, m), log + entry * elements, sizeof(T) * static_cast<size_t>(elements));
    state.seen[m] = log_seen[entry];
  }
}

template <class Storage, class T>
void causal_gram_projection_backward(const CausalGramProjectionBackwardArgs& args, int64_t batch, int64_t kv_head,
                                     void* memory) {
  constexpr int kStride = kScratchStride<T>;
  const int D = args.head_dim;
  Arena<T> arena(memory);
  CausalGramProjectionBackwardScratch<T> s(args, count_states(args, batch), arena);
  start_state(args, grams_of<T>(args, args.initial, batch, kv_head), s.state);
  Chunk chunk;
  int64_t entry = 0;
  for (int64_t first = 0; first < args.num_keys; first += kChunk) {
    plan_chunk(args, batch, first, args.num_keys, chunk);
    load_features<Storage>(args, batch, kv_head, chunk, s.features);
    log_states(args, chunk, s.state, entry, s.log, s.log_seen);
    add_chunk(args, chunk, s.features.rows, s.state);
    mirror_changed(args, chunk, s.state);
  }

  // The final Gram's gradient dG acts on every key as a later row would: dphi = phi (dG + dG^T).
  const auto later_of = [&](int m) { return s.later + int64_t{m} * D * kStride; };
  const T* grad_gram = grams_of<T>(args, args.grad_gram, batch, kv_head);
  clear_rows(int64_t{args.num_modalities} * D, s.later);
  for (int m = 0; grad_gram != nullptr && m < args.num_modalities; ++m)
    copy_rows<T>(D, D, grad_gram + m * state_elements(args), D, later_of(m), kStride);

  const int64_t last_chunk = (args.num_keys - 1) / kChunk * kChunk;
  for (int64_t first = last_chunk; args.num_keys > 0 && first >= 0; first -= kChunk) {
    plan_chunk(args, batch, first, args.num_keys, chunk);
    load_features<Storage>(args, batch, kv_head, chunk, s.features);
    transpose_features(args, chunk, s.features.rows, s.transposed);
    undo_chunk(args, chunk, s.state, entry, s.log, s.log_seen);
    for (int p = 0; p < chunk.num_present; ++p) {
      const int m = chunk.present[p], begin = chunk.begin[m];
      transpose(D, D, later_of(m), kStride, s.symmetric, kStride);
      for (int i = 0; i < D; ++i) add_scaled(T(1), later_of(m) + i * kStride, s.symmetric + i * kStride, D);
      multiply<T, Order::kRowMajor, Accumulate::kStore>(chunk.keys_of(m), D, D, s.features.rows + begin * kStride,
                                                        s.symmetric, kStride, s.grad_key + begin * kStride, kStride);
    }

    const RowBlock block = rows_of(args, chunk);
    load_scale(args, batch, kv_head, block, s.scale);
    for (int64_t head = kv_head * args.group; block.count > 0 && head < (kv_head + 1) * args.group; ++head) {
      load_block(row_of<Storage>(args.query, batch, head, block.row), args.query.row, block.count, D, T(1), s.query);
      score_block(chunk, block, D, s.query, s.transposed, kKeyStride<T>, s.scores);
      mask_scores<T>(chunk, block, -1, s.scale, s.scores);
      clear_rows(block.count, s.grad_query);
      for (int m = 0; m < args.num_modalities; ++m) {
        load_block(row_of<Storage>(args.grad_projection, batch, head, block.row) + args.grad_projection.view * m,
                   args.grad_projection.row, block.count, D, T(1), s.grad_out);
        if (chunk.keys_of(m) > 0) {
          score_block(chunk, block, D, s.grad_out, s.transposed, kKeyStride<T>, s.grad_scores);
          mask_scores<T>(chunk, block, -1, nullptr, s.grad_scores);
        }
        project_rows(args, chunk, block, m, s.state, s.features.rows, s.grad_out, s.grad_scores, s.out);
        for (int i = 0; i < block.count; ++i) {
          add_scaled(s.scale[i][m], s.out + i * kStride, s.grad_query + i * kStride, D);
          T* grad_scale = row_of<T>(args.grad_row_scale, batch, kv_head, block.row + i) + m * args.grad_row_scale.last;
          *grad_scale =
              (head == kv_head * args.group ? T(0) : *grad_scale) + dot(s.query + i * kStride, s.out + i * kStride, D);
        }
        if (chunk.keys_of(m) > 0) {
          const int64_t begin = chunk.begin[m];
          mask_scores<T>(chunk, block, -1, s.scale, s.grad_scores);
          multiply<T, Order::kColumnMajor, Accumulate::kAdd>(chunk.keys_of(m), D, block.count, s.grad_scores + begin,
                                                             s.query, kStride, s.grad_key + begin * kStride, kStride);
          multiply<T, Order::kColumnMajor, Accumulate::kAdd>(chunk.keys_of(m), D, block.count, s.scores + begin,
                                                             s.grad_out, kStride, s.grad_key + begin * kStride,
                                                             kStride);
        }
        for (int i = 0; i < block.count; ++i)
          for (int d = 0; d < D; ++d) s.out[i * kStride + d] = s.scale[i][m] * s.query[i * kStride + d];
        multiply<T, Order::kColumnMajor, Accumulate::kAdd>(D, D, block.count, s.out, s.grad_out, kStride, later_of(m),
                                                           kStride);
      }
      Storage* grad_query = row_of<Storage>(args.grad_query, batch, head, block.row);
      for (int i = 0; i < block.count; ++i)
        store_row(s.grad_query + i * kStride, T(1), grad_query + i * args.grad_query.row, D);
    }
    store_key_gradient<Storage>(args, args.grad_key, batch, kv_head, chunk, s.features, s.grad_key);
  }

  if (args.grad_initial == nullptr) return;
  // The initial Gram is symmetric, and so is its gradient.
  T* grad_initial = grams_of<T>(args, args.grad_initial, batch, kv_head);
  for (int m = 0; m < args.num_modalities; ++m)
    for (int i = 0; i < D; ++i)
      for (int j = 0; j < D; ++j)
        grad_initial[m * state_elements(args) + i * D + j] =
            (later_of(m)[i * kStride + j] + later_of(m)[j * kStride + i]) / 2;
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
