#include "ops/modular_attention.h"

#include <sstream>
#include <stdexcept>
#include <string>

namespace moda_ext {
namespace {

std::string describe(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ")";
  return text.str();
}
std::string describe(const Tensor& tensor) {
  return "shape " + describe(std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end()));
}
std::string describe(ScalarType dtype) { return torch::headeronly::toString(dtype); }
std::string describe(const char* text) { return text; }
std::string describe(int64_t number) { return std::to_string(number); }

// Every call checks some thirty conditions: text is made only for the one that fails.
template <class Expected, class Got>
void require(bool condition, const char* argument, const Expected& expected, const Got& got) {
  if (condition) return;
  throw std::invalid_argument("modular_attention: " + std::string(argument) + ": expected " + describe(expected) +
                              ", got " + describe(got));
}

void require_sizes(const char* argument, const Tensor& tensor, const std::vector<int64_t>& sizes) {
  bool equal = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; equal && i < sizes.size(); ++i) equal = tensor.size(i) == sizes[i];
  require(equal, argument, sizes, tensor);
}

void require_dtype(const char* argument, const Tensor& tensor, ScalarType dtype) {
  require(tensor.scalar_type() == dtype, argument, dtype, tensor.scalar_type());
}

void require_device(const char* argument, const Tensor& tensor, const Tensor& query) {
  require(tensor.is_cpu() == query.is_cpu() && tensor.get_device_index() == query.get_device_index(), argument,
          "the device of query", "another device");
}

void require_contiguous_last(const char* argument, const Tensor& tensor) {
  require(tensor.numel() == 0 || tensor.stride(tensor.dim() - 1) == 1, argument, "a contiguous last dimension",
          "a stride");
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
  require(dims == rank || dims == rank + 1, "query", in.packed() ? "3 or 4 dimensions" : "4 or 5 dimensions", in.query);
  require(in.key.dim() == rank, "key", in.packed() ? "3 dimensions" : "4 dimensions", in.key);
  require(in.num_modalities >= 1 && in.num_modalities <= 16, "num_modalities", "1 to 16", in.num_modalities);

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
          in.query);
  require(shape.head_dim >= 8 && shape.head_dim <= 256 && shape.head_dim % 8 == 0, "query",
          "a head size of 8 to 256 in steps of 8", in.query);
  require(shape.kv_heads > 0 ? shape.query_heads % shape.kv_heads == 0 : shape.query_heads == 0, "key",
          "a number of heads that divides query's", in.key);
  if (in.packed()) {
    require_sizes("key", in.key, {shape.num_keys, shape.kv_heads, shape.head_dim});
    require_sizes("key_modality", in.key_modality, {shape.num_keys});
    require(in.cu_seqlens_q->dim() == 1 && in.cu_seqlens_q->size(0) >= 1, "cu_seqlens_q", "one dimension, not empty",
            *in.cu_seqlens_q);
    require_sizes("cu_seqlens_k", *in.cu_seqlens_k, {in.cu_seqlens_q->size(0)});
    require_dtype("cu_seqlens_q", *in.cu_seqlens_q, ScalarType::Int);
    require_dtype("cu_seqlens_k", *in.cu_seqlens_k, ScalarType::Int);
    require_device("cu_seqlens_q", *in.cu_seqlens_q, in.query);
    require_device("cu_seqlens_k", *in.cu_seqlens_k, in.query);
  } else {
    require_sizes("key", in.key, {shape.batch, shape.kv_heads, shape.num_keys, shape.head_dim});
    require_sizes("key_modality", in.key_modality, {shape.batch, shape.num_keys});
  }
  require_sizes("value", in.value, {in.key.sizes().begin(), in.key.sizes().end()});
  require_dtype("key_modality", in.key_modality, ScalarType::Int);

  const ScalarType dtype = in.query.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
              dtype == ScalarType::Half,
          "query", "float32, float64, bfloat16 or float16", dtype);
  require_dtype("key", in.key, dtype);
  require_dtype("value", in.value, dtype);
  require_contiguous_last("query", in.query);
  require_contiguous_last("key", in.key);
  require_contiguous_last("value", in.value);
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
  require_contiguous_last("out", out);
  if (grad_out) {
    check("grad_out", *grad_out, with_last(rows, shape.head_dim), storage);
    require_contiguous_last("grad_out", *grad_out);
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
