// The operators through PyTorch's dispatcher, as a direct caller of torch.ops meets them: hand-computed cases, and
// refusal of arguments that no kernel may see. The Python tests cover everything else, the messages of errors included
// (the stable ABI returns a status alone).
#include <gtest/gtest.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
Tensor tensor(const std::vector<int64_t>& sizes, const std::vector<T>& values, ScalarType dtype) {
  Tensor result = torch::stable::empty(sizes, dtype);
  std::copy(values.begin(), values.end(), static_cast<T*>(result.mutable_data_ptr()));
  return result;
}

struct Arguments {
  // Two keys of modality 0 and 1 with equal scores; values 1 and 3 in every component.
  Tensor query = tensor<float>({1, 1, 1, 8}, std::vector<float>(8, 0.0f), ScalarType::Float);
  Tensor key = tensor<float>({1, 1, 2, 8}, std::vector<float>(16, 1.0f), ScalarType::Float);
  Tensor value = tensor<float>({1, 1, 2, 8}, {1, 1, 1, 1, 1, 1, 1, 1, 3, 3, 3, 3, 3, 3, 3, 3}, ScalarType::Float);
  Tensor key_modality = tensor<int32_t>({1, 2}, {0, 1}, ScalarType::Int);
  std::optional<Tensor> modality_bias, sink;
  int64_t num_modalities = 2;

  // Status of the call; outputs are filled if it is 0.
  int call(std::vector<Tensor>* outputs) const {
    using torch::stable::detail::from;
    std::vector<StableIValue> stack = {from(query),          from(key),           from(value),
                                       from(key_modality),   from(modality_bias), from(sink),
                                       from(num_modalities), from(false),         from(1.0)};
    const int status = torch_call_dispatcher("moda_ext::modular_attention", "", stack.data(), TORCH_ABI_VERSION);
    for (int i = 0; status == 0 && i < 4; ++i) outputs->push_back(torch::stable::detail::to<Tensor>(stack[i]));
    return status;
  }
  std::vector<Tensor> call() const {
    std::vector<Tensor> outputs;
    EXPECT_EQ(call(&outputs), 0);
    return outputs;
  }
  bool refused() const {
    std::vector<Tensor> outputs;
    return call(&outputs) != 0;
  }
};

float first(const Tensor& tensor) { return *static_cast<const float*>(tensor.const_data_ptr()); }

TEST(ModularAttention, EqualScoresAverageTheValues) {
  const std::vector<Tensor> outputs = Arguments().call();
  EXPECT_FLOAT_EQ(first(outputs[0]), 2.0f);
  EXPECT_FLOAT_EQ(first(outputs[1]), std::log(2.0f));
  EXPECT_FLOAT_EQ(first(outputs[2]), 0.5f);
}

TEST(ModularAttention, BiasAndSinkEnterTheDenominator) {
  Arguments arguments;
  arguments.modality_bias = tensor<float>({1, 1, 1, 2}, {std::log(2.0f), 0.0f}, ScalarType::Float);
  arguments.sink = tensor<float>({1, 1, 1}, {std::log(5.0f)}, ScalarType::Float);
  const std::vector<Tensor> outputs = arguments.call();  // weights 2, 1 and 5 of 8
  EXPECT_FLOAT_EQ(first(outputs[0]), (2.0f * 1 + 1 * 3) / 8);
  EXPECT_FLOAT_EQ(first(outputs[1]), std::log(8.0f));
  EXPECT_FLOAT_EQ(first(outputs[2]), 0.25f);
}

TEST(ModularAttention, RefusesWhatNoKernelMaySee) {
  EXPECT_FALSE(Arguments().refused());
  Arguments arguments;
  arguments.key_modality = tensor<int32_t>({1, 2}, {0, 2}, ScalarType::Int);
  EXPECT_TRUE(arguments.refused()) << "modality id beyond num_modalities";
  arguments = {};
  arguments.key_modality = tensor<int32_t>({1, 1}, {0}, ScalarType::Int);
  EXPECT_TRUE(arguments.refused()) << "one id for two keys";
  arguments = {};
  arguments.value = tensor<float>({1, 1, 1, 8}, std::vector<float>(8, 1.0f), ScalarType::Float);
  EXPECT_TRUE(arguments.refused()) << "fewer values than keys";
  arguments = {};
  arguments.query = tensor<double>({1, 1, 1, 8}, std::vector<double>(8, 1.0), ScalarType::Double);
  EXPECT_TRUE(arguments.refused()) << "query of another dtype";
  arguments = {};
  arguments.sink = tensor<float>({1, 1, 2}, {0, 0}, ScalarType::Float);
  EXPECT_TRUE(arguments.refused()) << "sink for two rows";
  arguments = {};
  arguments.num_modalities = 17;
  EXPECT_TRUE(arguments.refused()) << "more modalities than supported";
}

}  // namespace
