// Checks of tensor arguments and the dtypes and layouts of results, shared by every operator.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace moda_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// float64 for float64, else float32: the dtype of lse, mass, modality_bias, sink and of all sums.
ScalarType compute_dtype(ScalarType storage);

// New tensor of the given sizes (..., heads, tokens, last) in the memory order of `like`: tokens before heads where its
// row stride exceeds its head stride, contiguous otherwise. Packed tensors are contiguous.
Tensor empty_in_layout_of(const Tensor& like, const std::vector<int64_t>& sizes, bool packed);
// New contiguous tensor in the compute dtype of `like`; without elements where it is not wanted.
Tensor empty_sums(const Tensor& like, const std::vector<int64_t>& sizes, bool wanted = true);

// Conditions on the arguments of one operator: each throws std::invalid_argument naming the operator, the argument,
// what was expected and what came. A call checks some thirty of them: text is made only for the one that fails.
class ArgumentCheck {
 public:
  constexpr explicit ArgumentCheck(const char* op) : op_(op) {}
  const char* op() const { return op_; }

  template <class Expected, class Got>
  void require(bool condition, const char* argument, const Expected& expected, const Got& got) const {
    if (!condition) fail(argument, describe(expected), describe(got));
  }
  void sizes(const char* argument, const Tensor& tensor, const std::vector<int64_t>& expected) const;
  void dtype(const char* argument, const Tensor& tensor, ScalarType expected) const;
  void floating(const char* argument, const Tensor& tensor) const;
  void device(const char* argument, const Tensor& tensor, const Tensor& query) const;
  void contiguous_last(const char* argument, const Tensor& tensor) const;
  void head_size(const char* argument, const Tensor& tensor) const;

 private:
  [[noreturn]] void fail(const char* argument, const std::string& expected, const std::string& got) const;
  static std::string describe(const std::vector<int64_t>& sizes);
  static std::string describe(const Tensor& tensor);
  static std::string describe(ScalarType dtype) { return torch::headeronly::toString(dtype); }
  static std::string describe(const char* text) { return text; }
  static std::string describe(int64_t number) { return std::to_string(number); }

  const char* op_;
};

}  // namespace moda_ext
