#include "ops/modular_attention.h"

#include <sstream>
#include <stdexcept>
#include <string>

namespace moda_ext {
namespace {

std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ")";
  return text.str();
}

void require(bool condition, const char* argument, const std::string& expected, const std::string& got) {
  if (condition) return;
  throw std::invalid_argument("modular_attention: " + std::string(argument) + ": expected " + expected + ", got " +
                              got);
}

void require_sizes(const char* argument, const Tensor& tensor, const std::vector<int64_t>& sizes) {
  bool equal = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; equal && i < sizes.size(); ++i) equal = tensor.size(i) == sizes[i];
  std::ostringstream expected;
  expected << "shape (";
  for (size_t i = 0; i < sizes.size(); ++i) expected << (i ? ", " : "") << sizes[i];
  expected << ")";
  require(equal, argument, expected.str(), describe(tensor));
}

void require_dtype(const char* argument, const Tensor& tensor, ScalarType dtype) {
  require(tensor.scalar_type() == dtype, argument, torch::headeronly::toString(dtype),
          torch::headeronly::toString(tensor.scalar_type()));
}

void require_device(const char* argument, const Tensor& tensor, const Tensor& query) {
  require(tensor.is_cpu() == query.is_cpu() && tensor.get_device_index() == query.get_device_index(), argument,
          "the device of query", "another device");
}

// (batch, heads, queries), or (queries, heads) when packed: one number for each row.
std::vector<int64_t> row_sizes(const AttentionInputs& in, const AttentionShape& shape) {
  if (in.packed()) return {shape.num_queries, shape.query_heads};
  return {shape.batch, shape.query_heads, shape.num_queries};
}

std::vector<int64_t> with_last(std::vector<int64_t> sizes, int64_t last) {
  sizes.push_back(last);
  return sizes;
}

}  // namespace

ScalarType compute_dtype(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

AttentionShape check_attention(const AttentionInputs& in) {
  const int64_t rank = in.packed() ? 3 : 4;
  const int64_t dims = in.query.dim();
  require(dims == rank || dims == rank + 1, "query",
          std::to_string(rank) + " or " + std::to_string(rank + 1) + " dimensions", describe(in.query));
  require(in.key.dim() == rank, "key", std::to_string(rank) + " dimensions", describe(in.key));
  require(in.num_modalities >= 1 && in.num_modalities <= 16, "num_modalities", "1 to 16",
          std::to_string(in.num_modalities));

  AttentionShape shape;
  const int64_t token_dim = in.packed() ? 0 : 2, head_dim = 1, first = dims - rank;
  shape.num_views = first == 1 ? in.query.size(0) : 1;
  shape.batch = in.packed() ? 1 : in.query.size(first);
  shape.query_heads = in.query.size(first + head_dim);
  shape.kv_heads = in.key.size(head_dim);
  shape.num_queries = in.query.size(first + token_dim);
  shape.num_keys = in.key.size(token_dim);
  shape.head_dim = in.query.size(dims - 1);

  require(first == 0 || shape.num_views == in.num_modalities, "query", "num_modalities views in its first dimension",
          describe(in.query));
  require(shape.head_dim >= 8 && shape.head_dim <= 256 && shape.head_dim % 8 == 0, "query",
          "a head size of 8 to 256 in steps of 8", describe(in.query));
  require(shape.kv_heads > 0 ? shape.query_heads % shape.kv_heads == 0 : shape.query_heads == 0, "key",
          "a number of heads that divides query's", describe(in.key));
  if (in.packed()) {
    require_sizes("key", in.key, {shape.num_keys, shape.kv_heads, shape.head_dim});
    require_sizes("key_modality", in.key_modality, {shape.num_keys});
    require(in.cu_seqlens_q->dim() == 1 && in.cu_seqlens_q->size(0) >= 1, "cu_seqlens_q", "one dimension, not empty",
            describe(*in.cu_seqlens_q));
    require_sizes("cu_seqlens_k", *in.cu_seqlens_k, {in.cu_seqlens_q->size(0)});
    require_dtype("cu_seqlens_q", *in.cu_seqlens_q, ScalarType::Int);
    require_dtype("cu_seqlens_k", *in.cu_seqlens_k, ScalarType::Int);
  } else {
    require_sizes("key", in.key, {shape.batch, shape.kv_heads, shape.num_keys, shape.head_dim});
    require_sizes("key_modality", in.key_modality, {shape.batch, shape.num_keys});
  }
  require_sizes("value", in.value, {in.key.sizes().begin(), in.key.sizes().end()});
  require_dtype("key_modality", in.key_modality, ScalarType::Int);

  const ScalarType dtype = in.query.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
              dtype == ScalarType::Half,
          "query", "float32, float64, bfloat16 or float16", torch::headeronly::toString(dtype));
  require_dtype("key", in.key, dtype);
  require_dtype("value", in.value, dtype);
  const auto contiguous_last = [](const Tensor& t) { return t.numel() == 0 || t.stride(t.dim() - 1) == 1; };
  require(contiguous_last(in.query), "query", "a contiguous last dimension", "a stride");
  require(contiguous_last(in.key), "key", "a contiguous last dimension", "a stride");
  require(contiguous_last(in.value), "value", "a contiguous last dimension", "a stride");
  require_device("key", in.key, in.query);
  require_device("value", in.value, in.query);
  require_device("key_modality", in.key_modality, in.query);

  const std::vector<int64_t> rows = row_sizes(in, shape);
  if (in.sink) {
    require_sizes("sink", *in.sink, rows);
    require_dtype("sink", *in.sink, compute_dtype(dtype));
    require_device("sink", *in.sink, in.query);
  }
  if (in.modality_bias) {
    require_sizes("modality_bias", *in.modality_bias, with_last(rows, in.num_modalities));
    require_dtype("modality_bias", *in.modality_bias, compute_dtype(dtype));
    require_device("modality_bias", *in.modality_bias, in.query);
  }
  return shape;
}

void check_saved(const AttentionInputs& in, const AttentionShape& shape, const Tensor& out, const Tensor& lse,
                 const Tensor& mass, const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_lse,
                 const std::optional<Tensor>& grad_mass) {
  const ScalarType storage = in.query.scalar_type(), compute = compute_dtype(storage);
  const std::vector<int64_t> rows = row_sizes(in, shape);
  const auto check = [&](const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes, ScalarType dtype) {
    require_sizes(name, tensor, sizes);
    require_dtype(name, tensor, dtype);
    require_device(name, tensor, in.query);
  };
  check("out", out, with_last(rows, shape.head_dim), storage);
  check("lse", lse, rows, compute);
  check("mass", mass, with_last(rows, in.num_modalities), compute);
  require(out.numel() == 0 || out.stride(out.dim() - 1) == 1, "out", "a contiguous last dimension", "a stride");
  if (grad_out) {
    check("grad_out", *grad_out, with_last(rows, shape.head_dim), storage);
    require(grad_out->numel() == 0 || grad_out->stride(grad_out->dim() - 1) == 1, "grad_out",
            "a contiguous last dimension", "a stride");
  }
  if (grad_lse) check("grad_lse", *grad_lse, rows, compute);
  if (grad_mass) check("grad_mass", *grad_mass, with_last(rows, in.num_modalities), compute);
}

Tensor empty_in_layout_of(const Tensor& like, const std::vector<int64_t>& sizes, bool packed) {
  const int64_t heads = like.dim() - 3, tokens = like.dim() - 2;
  const bool tokens_first = !packed && like.stride(tokens) > like.stride(heads);
  std::vector<int64_t> memory = sizes;
  const size_t rank = sizes.size();
  if (tokens_first) std::swap(memory[rank - 3], memory[rank - 2]);
  Tensor result = torch::stable::new_empty(like, memory);
  return tokens_first ? torch::stable::transpose(result, -3, -2) : result;
}

AttentionOutputs empty_outputs(const AttentionInputs& in, const AttentionShape& shape) {
  const ScalarType compute = compute_dtype(in.query.scalar_type());
  const std::vector<int64_t> rows = row_sizes(in, shape);
  return {empty_in_layout_of(in.query, with_last(rows, shape.head_dim), in.packed()),
          torch::stable::new_empty(in.query, rows, compute),
          torch::stable::new_empty(in.query, with_last(rows, in.num_modalities), compute)};
}

}  // namespace moda_ext
