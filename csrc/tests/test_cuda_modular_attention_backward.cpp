// The CUDA backward kernels, run on the CPU by csrc/cuda/emulation, against plain loops in double.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "cuda/sm80/modular_attention_backward.h"
#include "cuda_problem.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {
namespace {

struct Incoming {
  bool out = true, lse = true, mass = true;
};
struct Wanted {
  bool query = true, key = true, value = true, bias = true, sink = true;
};

template <class T, class U>
Array<T> rounded(const Array<U>& from) {
  Array<T> to;
  to.batch = from.batch;
  to.head = from.head;
  to.row = from.row;
  to.view = from.view;
  for (const U x : from.data) to.data.push_back(from_float<T>(static_cast<float>(x)));
  return to;
}

struct Backward {
  template <class Element, int kHeadDim>
  static void check(const Shape& shape, const Incoming& incoming = {}, Wanted wanted = {}) {
    wanted.bias = wanted.bias && shape.bias;
    wanted.sink = wanted.sink && shape.sink;
    Problem<Element> problem(shape);
    const auto drop = [](auto& array) {
      std::fill(array.data.begin(), array.data.end(), from_float<std::decay_t<decltype(array.data[0])>>(0));
    };
    if (!incoming.out) drop(problem.grad_out);
    if (!incoming.lse) drop(problem.grad_lse);
    if (!incoming.mass) drop(problem.grad_mass);
    const Oracle<Element> oracle(problem);
    Array<Element> out = rounded<Element>(oracle.out);
    Array<float> lse = rounded<float>(oracle.lse), mass = rounded<float>(oracle.mass);
    Array<float> lse_residual = rounded<float>(oracle.lse_residual);
    const auto poisoned = [](auto array) {
      std::fill(array.data.begin(), array.data.end(), from_float<std::decay_t<decltype(array.data[0])>>(NAN));
      return array;
    };
    Array<Element> grad_query = poisoned(problem.query), grad_key = poisoned(problem.key);
    Array<Element> grad_value = grad_key;
    Array<float> grad_bias = poisoned(problem.bias), grad_sink = poisoned(problem.sink);

    ModularAttentionBackwardArgs args;
    problem.fill(args);
    args.saved_out = out.template operand<Input>(1);
    args.saved_lse = lse.operand<Input>(1);
    args.saved_mass = mass.operand<Input>(1);
    args.saved_lse_residual = lse_residual.operand<Input>(1);
    if (incoming.out) args.grad_out = problem.grad_out.template operand<Input>(1);
    if (incoming.lse) args.grad_lse = problem.grad_lse.template operand<Input>(1);
    if (incoming.mass) args.grad_mass = problem.grad_mass.template operand<Input>(1);
    if (wanted.query) args.grad_query = grad_query.template operand<Output>(problem.num_views);
    if (wanted.key) args.grad_key = grad_key.template operand<Output>(1);
    if (wanted.value) args.grad_value = grad_value.template operand<Output>(1);
    if (wanted.bias) args.grad_bias = grad_bias.operand<Output>(1);
    if (wanted.sink) args.grad_sink = grad_sink.operand<Output>(1);
    std::vector<char> workspace(static_cast<size_t>(backward_workspace<Element, kHeadDim>(args)), '\xff');
    backward<Element, kHeadDim>(args, workspace.data(), nullptr);

    const double unit = ElementTraits<Element>::kUnit + 2.4e-7 * oracle.largest;
    if (wanted.query)
      expect_close("grad_query", grad_query.data, oracle.grad_query.data, oracle.grad_query_size.data, unit, 1e-6);
    if (wanted.key)
      expect_close("grad_key", grad_key.data, oracle.grad_key.data, oracle.grad_key_size.data, unit, 1e-6);
    if (wanted.value)
      expect_close("grad_value", grad_value.data, oracle.grad_value.data, oracle.grad_value_size.data, unit, 1e-6);
    if (wanted.bias)
      expect_close("grad_bias", grad_bias.data, oracle.grad_bias.data, oracle.grad_bias_size.data,
                   2e-6 + 2.4e-7 * oracle.largest, 1e-6);
    if (wanted.sink)
      expect_close("grad_sink", grad_sink.data, oracle.grad_sink.data, oracle.grad_sink_size.data, unit, 1e-6);
  }
};

// The keys in two calls, each with the rows of all keys: dk and dv of its keys, and terms of the sums dq and db.
template <class Element, int kHeadDim>
void check_parts(const Shape& shape, int cut) {
  Problem<Element> problem(shape);
  std::fill(problem.grad_lse.data.begin(), problem.grad_lse.data.end(), 0.0f);
  const Oracle<Element> oracle(problem);
  Array<Element> out = rounded<Element>(oracle.out);
  Array<float> lse = rounded<float>(oracle.lse), mass = rounded<float>(oracle.mass);
  Array<float> lse_residual = rounded<float>(oracle.lse_residual);
  Array<Element> grad_key = problem.key, grad_value = problem.value;
  std::vector<double> grad_bias(problem.bias.data.size(), 0.0), grad_query(problem.query.data.size(), 0.0);
  for (const int first : {0, cut}) {
    const int count = first == 0 ? cut : shape.keys[0] - cut;
    Array<Element> part_query = problem.query;
    Array<float> part_bias = problem.bias;
    ModularAttentionBackwardArgs args;
    problem.fill(args);
    args.num_keys = count;
    args.key_modality += first;
    args.key.data = problem.key.at(0, 0, first);
    args.value.data = problem.value.at(0, 0, first);
    args.whole_rows = false;
    args.saved_out = out.template operand<Input>(1);
    args.saved_lse = lse.operand<Input>(1);
    args.saved_mass = mass.operand<Input>(1);
    args.saved_lse_residual = lse_residual.operand<Input>(1);
    args.grad_out = problem.grad_out.template operand<Input>(1);
    args.grad_mass = problem.grad_mass.template operand<Input>(1);
    args.grad_query = part_query.template operand<Output>(problem.num_views);
    args.grad_key = grad_key.template operand<Output>(1);
    args.grad_value = grad_value.template operand<Output>(1);
    args.grad_key.data = grad_key.at(0, 0, first);
    args.grad_value.data = grad_value.at(0, 0, first);
    args.grad_bias = part_bias.operand<Output>(1);
    std::vector<char> workspace(static_cast<size_t>(backward_workspace<Element, kHeadDim>(args)), '\xff');
    backward<Element, kHeadDim>(args, workspace.data(), nullptr);
    for (size_t i = 0; i < grad_bias.size(); ++i) grad_bias[i] += part_bias.data[i];
    for (size_t i = 0; i < grad_query.size(); ++i) grad_query[i] += to_float(part_query.data[i]);
  }
  // db was made with the D of the rounded out, and nothing brings it back: that is for the caller who has all parts.
  const double unit = ElementTraits<Element>::kUnit + 2.4e-7 * oracle.largest;
  const std::vector<float> bias(grad_bias.begin(), grad_bias.end()), query(grad_query.begin(), grad_query.end());
  expect_close("grad_query", query, oracle.grad_query.data, oracle.grad_query_size.data, 2 * unit, 1e-6);
  expect_close("grad_key", grad_key.data, oracle.grad_key.data, oracle.grad_key_size.data, unit, 1e-6);
  expect_close("grad_value", grad_value.data, oracle.grad_value.data, oracle.grad_value_size.data, unit, 1e-6);
  expect_close("grad_bias", bias, oracle.grad_bias.data, oracle.grad_bias_size.data, unit, 1e-6);
}

TEST(CudaModularAttentionBackward, PartsOfTheKeys) {
  Shape shape = dense({70}, {150}, 64);
  shape.modalities = 3;
  check_parts<float, 64>(shape, 64);
  check_parts<BFloat16, 64>(shape, 90);
  shape.views = true;
  shape.sink = false;
  check_parts<float, 64>(shape, 41);
}
TEST(CudaModularAttentionBackward, PlainAttention) {
  Shape shape = dense({100}, {150}, 64);
  shape.bias = shape.sink = false;
  shape.modalities = 1;
  check_under_every_schedule<Backward, BFloat16, 64>(shape);
}
TEST(CudaModularAttentionBackward, BiasSinkAndMass) {
  check_under_every_schedule<Backward, BFloat16, 64>(dense({70, 70}, {100, 100}, 64));
}
TEST(CudaModularAttentionBackward, Causal) {
  Shape shape = dense({150}, {150}, 64);
  shape.causal = true;
  check_under_every_schedule<Backward, BFloat16, 64>(shape);
  shape.queries = {70};
  shape.tokens_first = true;
  Backward::check<Float16, 64>(shape);
  shape.queries = {200};
  shape.keys = {70};
  Backward::check<BFloat16, 64>(shape);
}
TEST(CudaModularAttentionBackward, EveryHeadSize) {
  Shape shape = dense({80}, {90}, 0);
  shape.causal = true;
  check_every_head_size<Backward>(shape);
}
TEST(CudaModularAttentionBackward, HeadSizesBetween) { check_head_sizes_between<Backward>(); }
TEST(CudaModularAttentionBackward, TilesOfSeveralModalities) { check_tiles_of_several_modalities<Backward>(); }
TEST(CudaModularAttentionBackward, Views) {
  Shape shape = dense({90}, {200}, 32);
  shape.views = shape.causal = true;
  shape.modalities = 3;
  check_under_every_schedule<Backward, BFloat16, 32>(shape);
  shape.layout = Layout::kShuffled;
  shape.padding = 0.2;
  shape.hidden = 0.5;
  check_under_every_schedule<Backward, Float16, 32>(shape);
  Backward::check<float, 32>(shape);
  shape.head_dim = 24;  // the lanes that write a view are not those that read the next one
  check_under_every_schedule<Backward, BFloat16, 32>(shape);
}
TEST(CudaModularAttentionBackward, PaddingHoldsAnything) { check_padding<Backward>(); }
TEST(CudaModularAttentionBackward, HiddenModalities) { check_hidden_modalities<Backward>(dense({150}, {150}, 64)); }
TEST(CudaModularAttentionBackward, GroupsOfQueryHeads) {
  Shape shape = dense({70, 70}, {130, 130}, 32);
  shape.causal = true;
  shape.query_heads = 6;
  shape.kv_heads = 2;
  check_under_every_schedule<Backward, BFloat16, 32>(shape);
}
TEST(CudaModularAttentionBackward, PackedSequences) {
  Shape shape = dense({40, 0, 1, 110, 33}, {60, 20, 100, 110, 0}, 64);
  shape.packed = true;
  shape.query_heads = 4;
  shape.kv_heads = 2;
  check_under_every_schedule<Backward, BFloat16, 64>(shape);
  shape.causal = shape.views = true;
  shape.padding = 0.2;
  Backward::check<BFloat16, 64>(shape);
  Backward::check<float, 64>(shape);
}
TEST(CudaModularAttentionBackward, GradientsThatAreNotThere) {
  const Shape shape = dense({40}, {80}, 32);
  Backward::check<BFloat16, 32>(shape, {true, false, false});
  Backward::check<BFloat16, 32>(shape, {false, true, false});
  Backward::check<BFloat16, 32>(shape, {false, false, true});
}
TEST(CudaModularAttentionBackward, GradientsThatNobodyWants) {
  Shape shape = dense({40}, {80}, 32);
  const Wanted alone[] = {{true, false, false, false, false},
                          {false, true, false, false, false},
                          {false, false, true, false, false},
                          {false, false, false, true, false},
                          {false, false, false, false, true}};
  for (const double hidden : {0.0, 4.0}) {  // 4: every row sees nothing
    shape.hidden = hidden;
    for (const Wanted& wanted : alone) check_under_every_schedule<Backward, BFloat16, 32>(shape, Incoming{}, wanted);
  }
}
TEST(CudaModularAttentionBackward, ScalesOfEitherSign) {
  Shape shape = dense({40}, {80}, 32);
  shape.scale = -0.3;
  Backward::check<BFloat16, 32>(shape);
  shape.scale = 0;
  Backward::check<BFloat16, 32>(shape);
}
TEST(CudaModularAttentionBackward, LargeBiasesAndSinks) {
  Shape shape = dense({40}, {100}, 32);
  shape.modalities = 3;
  check_large_numbers<Backward>(shape);
  shape.causal = shape.views = true;
  shape.padding = 0.2;
  check_large_numbers<Backward>(shape);
}
TEST(CudaModularAttentionBackward, NothingToDo) {
  Backward::check<BFloat16, 32>(dense({0}, {10}, 32));
  Backward::check<BFloat16, 32>(dense({10}, {0}, 32));
}

}  // namespace
}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
