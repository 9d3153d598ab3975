// The keys themselves mapped into the spaces of the other modalities, for scopes in which all rows see the same Grams
// (docs/mathematics.md section 1, fusion "concat"):
//
//   k'_j = k_j + k_j [A1_a | H_a^T] [B1_a ; B2_a]      a = a_j
//   H_a  = sum_{m != a} A2_a^T Ghat^m                  Ghat^m: row d of G^m times a scale s_{m,d}
//
// A work item is one key head: its Grams first, then its keys once more, which by then are near.
#pragma once

#include "cpu/kernels/vector/duplex_query_views_forward.h"
#include "cpu/kernels/vector/modality_gram.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

// s_d of a Gram: what its rows are multiplied with. Nothing, in a modality without tokens, stays nothing.
template <class T>
void gram_scale(Normalization normalization, int head_dim, const T* gram, T* scale) {
  const auto reciprocal = [](T norm) { return norm > (sizeof(T) == 4 ? T(FLT_MIN) : T(DBL_MIN)) ? 1 / norm : T(0); };
  T sum = 0;
  for (int d = 0; d < head_dim; ++d) {
    const T* row = gram + int64_t{d} * head_dim;
    const T square = normalization == Normalization::kTrace ? row[d] : dot(row, row, head_dim);
    sum += square;
    scale[d] = reciprocal(static_cast<T>(sqrt(square)));
  }
  if (normalization == Normalization::kRow) return;
  const T all = reciprocal(normalization == Normalization::kTrace ? sum : static_cast<T>(sqrt(sum)));
  for (int d = 0; d < head_dim; ++d) scale[d] = all;
}

// The Grams (M, D, D) of one item, and H of every modality.
template <class T>
struct GramFactors {
  T *gram, *scale;
  T* product;    // [R] scratch rows
  T* alignment;  // [M][R] scratch rows: H

  GramFactors(const DuplexAlignedKeysArgs& args, Arena<T>& arena) {
    const int R = padded_rank<T>(args);
    gram = arena.take(args.num_modalities * state_elements(args) + kPanel<T>);
    scale = arena.take(args.head_dim);
    product = arena.rows(R);
    alignment = arena.rows(int64_t{args.num_modalities} * R);
  }
  T* of(const DuplexAlignedKeysArgs& args, int a) const {
    return alignment + int64_t{a} * padded_rank<T>(args) * kScratchStride<T>;
  }
  void align(const DuplexAlignedKeysArgs& args) const {
    constexpr int kStride = kScratchStride<T>;
    const int D = args.head_dim, R = padded_rank<T>(args);
    clear_rows(int64_t{args.num_modalities} * R, alignment);
    for (int m = 0; m < args.num_modalities; ++m) {
      const T* own = gram + m * state_elements(args);
      gram_scale(args.normalization, D, own, scale);
      for (int a = 0; a < args.num_modalities; ++a) {
        if (a == m) continue;
        multiply<T, Order::kRowMajor, Accumulate::kStore>(R, D, D, ViewWeights<T>::of(args, a, args.weights).key_down,
                                                          own, D, product, kStride);
        for (int k = 0; k < R; ++k)
          for (int d = 0; d < D; ++d) of(args, a)[k * kStride + d] += product[k * kStride + d] * scale[d];
      }
    }
  }
};

template <class T>
struct DuplexAlignedKeysScratch {
  GramFactors<T> factors;
  T* down;  // [M][D] scratch rows: A1 | H^T
  T *rows, *low_rank, *update;
  void* gram_scratch;

  DuplexAlignedKeysScratch(const DuplexAlignedKeysArgs& args, Arena<T>& arena) : factors(args, arena) {
    down = arena.rows(int64_t{args.num_modalities} * args.head_dim);
    rows = arena.rows(kChunk);
    low_rank = arena.rows(kChunk);
    update = arena.rows(kChunk);
    gram_scratch = arena.template take<char>(modality_gram_scratch_bytes<T>(args));
  }
};

template <class T>
int64_t duplex_aligned_keys_scratch_bytes(const DuplexAlignedKeysArgs& args) {
  return scratch_bytes<DuplexAlignedKeysScratch<T>, T>(args);
}

// Padding is left as it is.
template <class Storage>
void copy_padding(const DuplexAlignedKeysArgs& args, int64_t batch, int64_t kv_head) {
  const int32_t* modality = args.members + batch * args.members_batch;
  for (int64_t j = 0; j < args.num_keys; ++j)
    if (modality[j * args.members_token] < 0)
      memcpy(row_of<Storage>(args.aligned, batch, kv_head, j), row_of<Storage>(args.key, batch, kv_head, j),
             sizeof(Storage) * static_cast<size_t>(args.head_dim));
}

template <class Storage, class T>
void duplex_aligned_keys(const DuplexAlignedKeysArgs& args, const DuplexAlignedKeysItem& item, void* memory) {
  const int64_t batch = item.batch, kv_head = item.kv_head;
  constexpr int kStride = kScratchStride<T>;
  const int D = args.head_dim, R = padded_rank<T>(args);
  Arena<T> arena(memory);
  DuplexAlignedKeysScratch<T> s(args, arena);
  modality_gram<Storage, T>(args, {batch, kv_head, 0, args.num_keys, s.factors.gram}, s.gram_scratch);
  s.factors.align(args);
  for (int a = 0; a < args.num_modalities; ++a) {
    const ViewWeights<T> w = ViewWeights<T>::of(args, a, args.weights);
    T* down = s.down + int64_t{a} * D * kStride;
    copy_rows<T>(D, R, w.up_rows, round_up_to_panel<T>(R), down, kStride);
    transpose(D, R, s.factors.of(args, a), kStride, down + R, kStride);
  }
  GramArgs members = args;
  members.modality = args.members;
  members.modality_batch = args.members_batch;
  members.modality_token = args.members_token;
  Chunk chunk;
  for (int64_t first = 0; first < args.num_keys; first += kChunk) {
    plan_chunk(members, batch, first, args.num_keys, chunk);
    for (int j = 0; j < chunk.count; ++j)
      load_row(row_of<Storage>(args.key, batch, kv_head, first + chunk.position[j]), T(1), s.rows + j * kStride, D);
    for (int p = 0; p < chunk.num_present; ++p) {
      const int a = chunk.present[p], count = chunk.keys_of(a), begin = chunk.begin[a];
      multiply<T, Order::kRowMajor, Accumulate::kStore>(
          count, 2 * R, D, s.rows + begin * kStride, s.down + int64_t{a} * D * kStride, kStride, s.low_rank, kStride);
      multiply<T, Order::kRowMajor, Accumulate::kStore>(
          count, D, 2 * R, s.low_rank, ViewWeights<T>::of(args, a, args.weights).back, kStride, s.update, kStride);
      for (int j = 0; j < count; ++j)
        store_sum(s.rows + (begin + j) * kStride, s.update + j * kStride,
                  row_of<Storage>(args.aligned, batch, kv_head, first + chunk.position[begin + j]), D,
                  args.nontemporal);
    }
  }
  copy_padding<Storage>(args, batch, kv_head);
  nontemporal_fence();
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
