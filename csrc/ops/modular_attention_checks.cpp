#include "ops/modular_attention_checks.h"

#include <cmath>
#include <vector>

#include "ops/checks.h"

namespace moda_ext {
namespace {

std::vector<int64_t> with_last(std::vector<int64_t> sizes, int64_t last) {
  sizes.push_back(last);
  return sizes;
}

}  // namespace

std::vector<int64_t> ModularAttentionShape::rows() const {
  if (packed) return {num_queries, query_heads};
  return {batch, query_heads, num_queries};
}
std::vector<int64_t> ModularAttentionShape::out() const { return with_last(rows(), head_dim); }
std::vector<int64_t> ModularAttentionShape::mass() const { return with_last(rows(), num_modalities); }

ModularAttentionShape check_modular_attention(const ModularAttentionInputs& in) {
  const ArgumentCheck check(in.op);
  const int64_t rank = in.packed() ? 3 : 4;
  const int64_t dims = in.query.dim();
  check.require(dims == rank || dims == rank + 1, "query", in.packed() ? "3 or 4 dimensions" : "4 or 5 dimensions",
                in.query);
  check.require(in.key.dim() == rank, "key", in.packed() ? "3 dimensions" : "4 dimensions", in.key);
  check.require(in.num_modalities >= 1 && in.num_modalities <= 16, "num_modalities", "1 to 16", in.num_modalities);
  check.require(std::isfinite(in.scale), "scale", "a finite number", std::isnan(in.scale) ? "nan" : "an infinity");

  ModularAttentionShape shape;
  shape.packed = in.packed();
  shape.num_modalities = in.num_modalities;
  const int64_t token_dim = in.packed() ? 0 : 2, head_dim = 1, first = dims - rank;
  shape.num_views = first == 1 ? in.query.size(0) : 1;
  shape.batch = in.packed() ? 1 : in.query.size(first);
  shape.query_heads = in.query.size(first + head_dim);
  shape.kv_heads = in.key.size(head_dim);
  shape.num_queries = in.query.size(first + token_dim);
  shape.num_keys = in.key.size(token_dim);
  shape.head_dim = in.query.size(dims - 1);

  check.require(first == 0 || shape.num_views == in.num_modalities, "query",
                "num_modalities views in its first dimension", in.query);
  check.head_size("query", in.query);
  check.require(shape.kv_heads > 0 ? shape.query_heads % shape.kv_heads == 0 : shape.query_heads == 0, "key",
                "a number of heads that divides query's", in.key);
  if (in.packed()) {
    check.sizes("key", in.key, {shape.num_keys, shape.kv_heads, shape.head_dim});
    check.sizes("key_modality", in.key_modality, {shape.num_keys});
    check.require(in.cu_seqlens_q->dim() == 1 && in.cu_seqlens_q->size(0) >= 1, "cu_seqlens_q",
                  "one dimension, not empty", *in.cu_seqlens_q);
    check.sizes("cu_seqlens_k", *in.cu_seqlens_k, {in.cu_seqlens_q->size(0)});
    check.dtype("cu_seqlens_q", *in.cu_seqlens_q, ScalarType::Int);
    check.dtype("cu_seqlens_k", *in.cu_seqlens_k, ScalarType::Int);
    check.device("cu_seqlens_q", *in.cu_seqlens_q, in.query);
    check.device("cu_seqlens_k", *in.cu_seqlens_k, in.query);
  } else {
    check.sizes("key", in.key, {shape.batch, shape.kv_heads, shape.num_keys, shape.head_dim});
    check.sizes("key_modality", in.key_modality, {shape.batch, shape.num_keys});
  }
  check.sizes("value", in.value, {in.key.sizes().begin(), in.key.sizes().end()});
  check.dtype("key_modality", in.key_modality, ScalarType::Int);

  const ScalarType dtype = in.query.scalar_type();
  check.floating("query", in.query);
  check.dtype("key", in.key, dtype);
  check.dtype("value", in.value, dtype);
  check.contiguous_last("query", in.query);
  check.contiguous_last("key", in.key);
  check.contiguous_last("value", in.value);
  check.device("key", in.key, in.query);
  check.device("value", in.value, in.query);
  check.device("key_modality", in.key_modality, in.query);

  if (in.sink) {
    check.sizes("sink", *in.sink, shape.rows());
    check.dtype("sink", *in.sink, compute_dtype(dtype));
    check.device("sink", *in.sink, in.query);
  }
  if (in.modality_bias) {
    check.sizes("modality_bias", *in.modality_bias, shape.mass());
    check.dtype("modality_bias", *in.modality_bias, compute_dtype(dtype));
    check.device("modality_bias", *in.modality_bias, in.query);
  }
  return shape;
}

void check_modular_attention_saved(const ModularAttentionInputs& in, const ModularAttentionShape& shape,
                                   const ModularAttentionSaved& saved) {
  const ArgumentCheck check(in.op);
  const ScalarType storage = in.query.scalar_type(), compute = compute_dtype(storage);
  const auto check_tensor = [&](const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes,
                                ScalarType dtype) {
    check.sizes(name, tensor, sizes);
    check.dtype(name, tensor, dtype);
    check.device(name, tensor, in.query);
  };
  check_tensor("out", saved.out, shape.out(), storage);
  check_tensor("lse", saved.lse, shape.rows(), compute);
  check_tensor("mass", saved.mass, shape.mass(), compute);
  check_tensor("lse_residual", saved.lse_residual, shape.rows(), compute);
  check.contiguous_last("out", saved.out);
  if (saved.grad_out) {
    check_tensor("grad_out", *saved.grad_out, shape.out(), storage);
    check.contiguous_last("grad_out", *saved.grad_out);
  }
  if (saved.grad_lse) check_tensor("grad_lse", *saved.grad_lse, shape.rows(), compute);
  if (saved.grad_mass) check_tensor("grad_mass", *saved.grad_mass, shape.mass(), compute);
}

}  // namespace moda_ext
