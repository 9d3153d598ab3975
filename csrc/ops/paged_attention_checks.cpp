#include "ops/paged_attention_checks.h"

#include <algorithm>
#include <cmath>

namespace moda_ext {

namespace {

// A cache for keys of this size, whose rows lie a whole number of cells apart.
void check_cache(const ArgumentCheck& check, const Tensor& kv_cache, int64_t head_dim, const Tensor& like) {
  check.require(kv_cache.dim() == 4, "kv_cache", "4 dimensions", kv_cache);
  check.dtype("kv_cache", kv_cache, like.scalar_type());
  check.device("kv_cache", kv_cache, like);
  check.contiguous_last("kv_cache", kv_cache);
  check.require(kv_cache.size(3) > 2 * head_dim, "kv_cache", "cells of a key, a value and a modality", kv_cache);
  check.require(kv_cache.stride(2) > 0 && kv_cache.stride(0) % kv_cache.stride(2) == 0, "kv_cache",
                "blocks that begin a whole number of cells after one another", kv_cache.stride(0));
}

// What is added to sums: of every row, or a table of so many rows, 0: any but none.
void check_sums(const ArgumentCheck& check, const PagedAttentionInputs& in, const char* name,
                const std::optional<Tensor>& tensor, std::vector<int64_t> sizes, int64_t of_table) {
  if (!tensor) return;
  if (in.row_modality) {
    if (of_table == 0 && tensor->dim() > 0) of_table = std::max<int64_t>(1, tensor->size(0));
    sizes[0] = of_table;
  }
  check.sizes(name, *tensor, sizes);
  check.dtype(name, *tensor, compute_dtype(in.query.scalar_type()));
  check.device(name, *tensor, in.query);
}

}  // namespace

int64_t rows_per_block(const Tensor& kv_cache) { return kv_cache.stride(0) / std::max<int64_t>(1, kv_cache.stride(2)); }

ModularAttentionShape check_paged_attention(const PagedAttentionInputs& in) {
  const ArgumentCheck check(in.op);
  const int64_t dims = in.query.dim();
  check.require(dims == 3 || dims == 4, "query", "3 or 4 dimensions", in.query);
  check.require(in.num_modalities >= 1 && in.num_modalities <= 16, "num_modalities", "1 to 16", in.num_modalities);
  check.require(std::isfinite(in.scale), "scale", "a finite number", std::isnan(in.scale) ? "nan" : "an infinity");
  check.require(in.kv_cache.dim() == 4, "kv_cache", "4 dimensions", in.kv_cache);  // before its heads are read

  ModularAttentionShape shape;
  shape.packed = true;
  shape.batch = 1;
  shape.num_modalities = in.num_modalities;
  shape.num_views = dims == 4 ? in.query.size(0) : 1;
  shape.num_queries = in.query.size(dims - 3);
  shape.query_heads = in.query.size(dims - 2);
  shape.head_dim = in.query.size(dims - 1);
  shape.kv_heads = in.kv_cache.size(1);
  shape.num_keys = 0;
  check.require(dims == 3 || shape.num_views == in.num_modalities, "query",
                "num_modalities views in its first dimension", in.query);
  check.head_size("query", in.query);
  check.floating("query", in.query);
  check.contiguous_last("query", in.query);
  check_cache(check, in.kv_cache, shape.head_dim, in.query);
  check.require(shape.kv_heads > 0 ? shape.query_heads % shape.kv_heads == 0 : shape.query_heads == 0, "kv_cache",
                "a number of heads that divides query's", in.kv_cache);

  check.require(in.block_table.dim() == 2, "block_table", "2 dimensions", in.block_table);
  const int64_t sequences = in.block_table.size(0);
  check.sizes("seq_lens", in.seq_lens, {sequences});
  check.sizes("query_start_loc", in.query_start_loc, {sequences + 1});
  const auto check_integers = [&](const char* name, const Tensor& tensor) {
    check.dtype(name, tensor, ScalarType::Int);
    check.device(name, tensor, in.query);
  };
  check_integers("block_table", in.block_table);
  check_integers("seq_lens", in.seq_lens);
  check_integers("query_start_loc", in.query_start_loc);

  check_sums(check, in, "modality_bias", in.modality_bias, shape.mass(), in.num_modalities);
  check_sums(check, in, "sink", in.sink, shape.rows(), 0);
  return shape;
}

void check_paged_step(const ModularAttentionShape& shape, const PagedCacheInputs& written, const Tensor& out) {
  const ArgumentCheck check(written.op);
  check.sizes("key", written.key, {shape.num_queries, shape.kv_heads, shape.head_dim});
  check.sizes("out", out, shape.out());
  check.dtype("out", out, written.kv_cache.scalar_type());
  check.device("out", out, written.kv_cache);
  check.contiguous_last("out", out);
}

ModularAttentionShape check_paged_duplex_attention(const PagedDuplexInputs& in) {
  const ArgumentCheck check(in.op);
  check.require(in.query.dim() == 3, "query", "3 dimensions", in.query);
  ModularAttentionShape shape = check_paged_attention(in);
  check.sizes("query_modality", in.query_modality, {shape.num_queries});
  check.dtype("query_modality", in.query_modality, ScalarType::Int);
  check.device("query_modality", in.query_modality, in.query);
  check.require(in.eps > 0 && std::isfinite(in.eps), "eps", "a finite number above 0", "another");
  const GramInputs gram{in.query, in.query_modality, in.num_modalities, in.unit_keys, in.eps, "query"};
  check_weights(check, gram, in, shape.head_dim);
  check_sums(check, in, "condition", in.condition, shape.mass(), in.num_modalities);
  return shape;
}

void check_paged_cache_update(const PagedCacheInputs& in) {
  const ArgumentCheck check(in.op);
  check.require(in.key.dim() == 3, "key", "3 dimensions", in.key);
  check.floating("key", in.key);
  check.contiguous_last("key", in.key);
  const int64_t tokens = in.key.size(0), heads = in.key.size(1), head_dim = in.key.size(2);
  check.sizes("value", in.value, {tokens, heads, head_dim});
  check.dtype("value", in.value, in.key.scalar_type());
  check.device("value", in.value, in.key);
  check.contiguous_last("value", in.value);
  check_cache(check, in.kv_cache, head_dim, in.key);
  check.require(in.kv_cache.size(1) == heads, "kv_cache", "the heads of key", in.kv_cache);
  const auto check_integers = [&](const char* name, const Tensor& tensor, ScalarType dtype) {
    check.sizes(name, tensor, {tokens});
    check.dtype(name, tensor, dtype);
    check.device(name, tensor, in.key);
  };
  check_integers("modality", in.modality, ScalarType::Int);
  check_integers("slot_mapping", in.slot_mapping, ScalarType::Long);
}

}  // namespace moda_ext
