#include "ops/checks.h"

#include <sstream>
#include <stdexcept>
#include <utility>

namespace moda_ext {

std::string ArgumentCheck::describe(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ")";
  return text.str();
}
std::string ArgumentCheck::describe(const Tensor& tensor) {
  return "shape " + describe(std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end()));
}

void ArgumentCheck::fail(const char* argument, const std::string& expected, const std::string& got) const {
  throw std::invalid_argument(std::string(op_) + ": " + argument + ": expected " + expected + ", got " + got);
}

void ArgumentCheck::sizes(const char* argument, const Tensor& tensor, const std::vector<int64_t>& expected) const {
  bool equal = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; equal && i < expected.size(); ++i) equal = tensor.size(i) == expected[i];
  require(equal, argument, expected, tensor);
}

void ArgumentCheck::dtype(const char* argument, const Tensor& tensor, ScalarType expected) const {
  require(tensor.scalar_type() == expected, argument, expected, tensor.scalar_type());
}

void ArgumentCheck::floating(const char* argument, const Tensor& tensor) const {
  const ScalarType dtype = tensor.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
              dtype == ScalarType::Half,
          argument, "float32, float64, bfloat16 or float16", dtype);
}

void ArgumentCheck::device(const char* argument, const Tensor& tensor, const Tensor& query) const {
  require(tensor.is_cpu() == query.is_cpu() && tensor.get_device_index() == query.get_device_index(), argument,
          "the device of query", "another device");
}

void ArgumentCheck::contiguous_last(const char* argument, const Tensor& tensor) const {
  require(tensor.numel() == 0 || tensor.stride(tensor.dim() - 1) == 1, argument, "a contiguous last dimension",
          "a stride");
}

void ArgumentCheck::head_size(const char* argument, const Tensor& tensor) const {
  const int64_t size = tensor.size(tensor.dim() - 1);
  require(size >= 8 && size <= 256 && size % 8 == 0, argument, "a head size of 8 to 256 in steps of 8", tensor);
}

ScalarType compute_dtype(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
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

Tensor empty_sums(const Tensor& like, const std::vector<int64_t>& sizes, bool wanted) {
  return torch::stable::new_empty(like, wanted ? sizes : std::vector<int64_t>{0}, compute_dtype(like.scalar_type()));
}

}  // namespace moda_ext
