// Raw Gram matrices of every modality, and their backward pass:
//
//   G^m = sum_{a_j = m} phi_j^T phi_j        dphi_j = phi_j (dG + dG^T)
//
// One pass over the keys: a chunk of keys is normalised into scratch, grouped by modality, and multiplied with itself,
// upper panels only. The sums stay in L2 (D^2 numbers for each modality); a key is read once.
#pragma once

#include "cpu/kernels/vector/gram_family_chunk.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

template <class T>
struct ModalityGramScratch {
  Features<T> features;
  T* grads;
  T* gram_sums;  // [num_modalities][head_dim] scratch rows: dG + dG^T
  GramState<T> state;

  ModalityGramScratch(const GramArgs& args, Arena<T>& arena) {
    features.rows = arena.rows(kChunk);
    grads = arena.rows(kChunk);
    gram_sums = arena.rows(int64_t{args.num_modalities} * args.head_dim);
    state.take(args, arena);
  }
};

template <class T>
int64_t modality_gram_scratch_bytes(const GramArgs& args) {
  return scratch_bytes<ModalityGramScratch<T>, T>(args);
}

template <class Storage, class T>
void modality_gram(const GramArgs& args, const ModalityGramItem& item, void* memory) {
  Arena<T> arena(memory);
  ModalityGramScratch<T> scratch(args, arena);
  start_state<T>(args, nullptr, scratch.state);
  Chunk chunk;
  for (int64_t first = item.first; first < item.last; first += kChunk) {
    plan_chunk(args, item.batch, first, item.last, chunk);
    load_features<Storage>(args, item.batch, item.kv_head, chunk, scratch.features);
    add_chunk(args, chunk, scratch.features.rows, scratch.state);
  }
  store_state(args, scratch.state, static_cast<T*>(item.gram));
}

template <class T>
void reduce_grams(const GramArgs& args, void* const* partials, int count, void* gram) {
  T* out = static_cast<T*>(gram);
  const int64_t elements = args.num_modalities * state_elements(args);
  memcpy(out, partials[0], sizeof(T) * static_cast<size_t>(elements));
  for (int s = 1; s < count; ++s) {
    const T* partial = static_cast<const T*>(partials[s]);
    for (int64_t i = 0; i < elements; ++i) out[i] += partial[i];
  }
}

template <class Storage, class T>
void modality_gram_backward(const ModalityGramBackwardArgs& args, int64_t batch, int64_t kv_head, void* memory) {
  Arena<T> arena(memory);
  ModalityGramScratch<T> scratch(args, arena);
  const int D = args.head_dim;
  const T* grad = grams_of<T>(args, args.grad_gram, batch, kv_head);
  for (int m = 0; m < args.num_modalities; ++m) {
    T* sum = scratch.gram_sums + int64_t{m} * D * kScratchStride<T>;
    transpose(D, D, grad + m * state_elements(args), D, sum, kScratchStride<T>);
    for (int i = 0; i < D; ++i)
      add_scaled(T(1), grad + m * state_elements(args) + i * D, sum + i * kScratchStride<T>, D);
  }
  Chunk chunk;
  for (int64_t first = 0; first < args.num_keys; first += kChunk) {
    plan_chunk(args, batch, first, args.num_keys, chunk);
    load_features<Storage>(args, batch, kv_head, chunk, scratch.features);
    for (int p = 0; p < chunk.num_present; ++p) {
      const int m = chunk.present[p];
      const int64_t rows = int64_t{chunk.begin[m]} * kScratchStride<T>;
      multiply<T, Order::kRowMajor, Accumulate::kStore>(chunk.keys_of(m), D, D, scratch.features.rows + rows,
                                                        scratch.gram_sums + int64_t{m} * D * kScratchStride<T>,
                                                        kScratchStride<T>, scratch.grads + rows, kScratchStride<T>);
    }
    store_key_gradient<Storage>(args, args.grad_key, batch, kv_head, chunk, scratch.features, scratch.grads);
  }
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
