// Tensors as the operands of kernels (core/operand.h), for the launches of every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "core/operand.h"
#include "core/storage.h"

namespace moda_ext {

inline Storage storage_of(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == ScalarType::Double     ? Storage::kFloat64
         : dtype == ScalarType::BFloat16 ? Storage::kBFloat16
         : dtype == ScalarType::Half     ? Storage::kFloat16
                                         : Storage::kFloat32;
}

enum class Last { kNone, kPresent };  // does the operand have a dimension after (batch, heads, tokens)?

template <class Operand, class Pointer>
Operand make_operand(const torch::stable::Tensor& tensor, Pointer data, bool packed, Last last) {
  Operand operand;
  operand.data = data;
  int64_t d = tensor.dim() - 1;
  if (last == Last::kPresent) operand.last = tensor.stride(d--);
  if (packed) {
    operand.head = tensor.stride(d--);
    operand.row = tensor.stride(d--);
  } else {
    operand.row = tensor.stride(d--);
    operand.head = tensor.stride(d--);
    operand.batch = tensor.stride(d--);
  }
  if (d == 0) operand.view = tensor.stride(0);
  return operand;
}
inline Input input(const torch::stable::Tensor& tensor, bool packed, Last last) {
  return make_operand<Input>(tensor, tensor.const_data_ptr(), packed, last);
}
inline Input input(const std::optional<torch::stable::Tensor>& tensor, bool packed, Last last) {
  return tensor ? input(*tensor, packed, last) : Input{};
}
inline Output output(const torch::stable::Tensor& tensor, bool packed, Last last) {
  return make_operand<Output>(tensor, tensor.mutable_data_ptr(), packed, last);
}
// Of a result that may not be wanted: then it has no elements, and perhaps not its dimensions.
inline Output wanted_output(const torch::stable::Tensor& tensor, bool packed, Last last) {
  return tensor.numel() > 0 ? output(tensor, packed, last) : Output{};
}

}  // namespace moda_ext
