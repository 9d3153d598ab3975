// The schemas of every operator, declared once for all devices. Kernels register in csrc/<device>/, fakes and autograd
// in moda_ext/_ops. Only the libtorch stable ABI is used, so that one binary serves torch 2.11 and later.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(moda_ext, m) {
  // lse_residual is what rounding took from lse; only the backward pass wants it.
  m.def(
      "modular_attention(Tensor query, Tensor key, Tensor value, Tensor key_modality, Tensor? modality_bias, "
      "Tensor? sink, int num_modalities, bool is_causal, float scale) "
      "-> (Tensor out, Tensor lse, Tensor mass, Tensor lse_residual)");
  // whole_rows: whether out, lse and mass are of the keys given. False: of rows that see more keys, of which these are a
  // part; the gradients of query, modality_bias and sink are then this part's terms of their sums. sink is of the whole
  // row, and belongs to one part.
  m.def(
      "modular_attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor? grad_mass, Tensor query, Tensor key, "
      "Tensor value, Tensor key_modality, Tensor? modality_bias, Tensor? sink, Tensor out, Tensor lse, Tensor mass, "
      "Tensor lse_residual, int num_modalities, bool is_causal, float scale, bool need_query, bool need_key, "
      "bool need_value, bool need_modality_bias, bool need_sink, bool whole_rows) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_modality_bias, Tensor grad_sink)");
  m.def(
      "modular_attention_varlen(Tensor query, Tensor key, Tensor value, Tensor key_modality, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, Tensor? modality_bias, Tensor? sink, int max_seqlen_q, int max_seqlen_k, "
      "int num_modalities, bool is_causal, float scale) "
      "-> (Tensor out, Tensor lse, Tensor mass, Tensor lse_residual)");
  m.def(
      "modular_attention_varlen_backward(Tensor? grad_out, Tensor? grad_lse, Tensor? grad_mass, Tensor query, "
      "Tensor key, Tensor value, Tensor key_modality, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "Tensor? modality_bias, Tensor? sink, Tensor out, Tensor lse, Tensor mass, Tensor lse_residual, "
      "int max_seqlen_q, int max_seqlen_k, int num_modalities, bool is_causal, float scale, bool need_query, "
      "bool need_key, bool need_value, bool need_modality_bias, bool need_sink) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_modality_bias, Tensor grad_sink)");
  m.def("modality_gram(Tensor key, Tensor modality, int num_modalities, bool unit_keys, float eps) -> (Tensor gram)");
  m.def(
      "modality_gram_backward(Tensor grad_gram, Tensor key, Tensor modality, int num_modalities, bool unit_keys, "
      "float eps) "
      "-> (Tensor grad_key)");
  m.def(
      "causal_gram_projection(Tensor query, Tensor key, Tensor key_modality, Tensor row_scale, Tensor? initial, "
      "int num_modalities, bool unit_keys, float eps) "
      "-> (Tensor projection, Tensor gram)");
  m.def(
      "causal_gram_projection_backward(Tensor grad_projection, Tensor? grad_gram, Tensor query, Tensor key, "
      "Tensor key_modality, Tensor row_scale, Tensor? initial, int num_modalities, bool unit_keys, float eps) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_row_scale, Tensor grad_initial)");
  m.def(
      "duplex_query_views(Tensor query, Tensor key, Tensor key_modality, Tensor row_scale, Tensor a1, Tensor b1, "
      "Tensor a2, Tensor b2, Tensor? initial, int num_modalities, bool unit_keys, float eps, bool with_indicator, "
      "bool with_gram) "
      "-> (Tensor views, Tensor indicator, Tensor gram)");
  m.def(
      "duplex_query_views_backward(Tensor grad_views, Tensor? grad_indicator, Tensor? grad_gram, Tensor query, "
      "Tensor key, Tensor key_modality, Tensor row_scale, Tensor a1, Tensor b1, Tensor a2, Tensor b2, "
      "Tensor? initial, Tensor indicator, int num_modalities, bool unit_keys, float eps) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_row_scale, Tensor grad_a1, Tensor grad_b1, Tensor grad_a2, "
      "Tensor grad_b2, Tensor grad_initial)");
  m.def(
      "duplex_attention(Tensor query, Tensor key, Tensor value, Tensor key_modality, Tensor new_key, "
      "Tensor new_modality, Tensor row_scale, Tensor a1, Tensor b1, Tensor a2, Tensor b2, Tensor? initial, "
      "Tensor? modality_bias, Tensor? condition, Tensor? sink, int num_modalities, bool unit_keys, float eps, "
      "float scale) "
      "-> (Tensor out, Tensor lse, Tensor mass)");
  // normalization: 0 by the trace, 1 by the Frobenius norm, 2 by rows.
  m.def(
      "duplex_aligned_keys(Tensor key, Tensor modality, Tensor? include, Tensor a1, Tensor b1, Tensor a2, Tensor b2, "
      "int num_modalities, bool unit_keys, float eps, int normalization) "
      "-> Tensor");
  m.def(
      "paged_modular_attention(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor query_start_loc, Tensor? modality_bias, Tensor? sink, int num_modalities, float scale) "
      "-> (Tensor out, Tensor lse, Tensor mass)");
  m.def(
      "paged_duplex_attention(Tensor query, Tensor query_modality, Tensor kv_cache, Tensor block_table, "
      "Tensor seq_lens, Tensor query_start_loc, Tensor a1, Tensor b1, Tensor a2, Tensor b2, Tensor? modality_bias, "
      "Tensor? condition, Tensor? sink, int num_modalities, bool unit_keys, bool by_trace, float eps, float scale) "
      "-> (Tensor out, Tensor lse, Tensor mass)");
  m.def(
      "paged_cache_update(Tensor key, Tensor value, Tensor modality, Tensor(a!) kv_cache, Tensor slot_mapping) -> ()");
  // Both in a call, for a layer of a step. modality_bias, condition (M, Hq, M) and sink (positions, Hq) are tables: a row
  // takes what they have for its modality, and its place in its sequence, of which the last stands for all beyond. No
  // weights: no views.
  m.def(
      "paged_attention_step(Tensor query, Tensor key, Tensor value, Tensor modality, Tensor slot_mapping, "
      "Tensor(a!) kv_cache, Tensor block_table, Tensor seq_lens, Tensor query_start_loc, Tensor? a1, Tensor? b1, "
      "Tensor? a2, Tensor? b2, Tensor? modality_bias, Tensor? condition, Tensor? sink, int num_modalities, "
      "bool unit_keys, bool by_trace, float eps, float scale, Tensor(b!) out) "
      "-> Tensor mass");
}
