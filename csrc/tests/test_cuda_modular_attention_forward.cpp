// The CUDA forward kernels, run on the CPU by csrc/cuda/emulation, against plain loops in double.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "cuda/sm80/modular_attention_forward.h"
#include "cuda_problem.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {
namespace {

struct Forward {
  template <class Element, int kHeadDim>
  static void check(const Shape& shape, int multiprocessors = 1) {
    Problem<Element> problem(shape);
    const Oracle<Element> oracle(problem);
    const Element poison = from_float<Element>(NAN);
    Array<Element> out(shape, shape.query_heads, problem.total_queries, shape.head_dim, 1, poison);
    Array<float> lse(shape, shape.query_heads, problem.total_queries, 1, 1, NAN);
    Array<float> lse_residual = lse;
    Array<float> mass(shape, shape.query_heads, problem.total_queries, shape.modalities, 1, NAN);
    ModularAttentionForwardArgs args;
    problem.fill(args);
    args.out = out.template operand<Output>(1);
    args.lse = lse.operand<Output>(1);
    args.mass = mass.operand<Output>(1);
    args.lse_residual = lse_residual.operand<Output>(1);
    const int64_t bytes = forward_workspace<Element, kHeadDim>(args, multiprocessors);
    std::vector<char> workspace(static_cast<size_t>(bytes), '\xff');
    forward<Element, kHeadDim>(args, multiprocessors, workspace.data(), nullptr);
    const double exponent_error = 1.2e-7 * oracle.largest;
    expect_close("out", out.data, oracle.out.data, oracle.out_size.data, ElementTraits<Element>::kUnit + exponent_error,
                 1e-6);
    expect_close("lse", lse.data, oracle.lse.data, std::vector<double>(oracle.lse.data.size(), 0.0), 2e-7,
                 2e-7 + exponent_error);
    // lse may differ by a unit of it; what rounding took from it makes up for that.
    std::vector<double> residual = oracle.lse_residual.data;
    for (size_t i = 0; i < residual.size(); ++i)
      if (std::isfinite(oracle.lse.data[i])) residual[i] += oracle.lse.data[i] - lse.data[i];
    expect_close("lse_residual", lse_residual.data, residual, oracle.lse_size.data, 5e-7, 5e-7 + exponent_error);
    expect_close("mass", mass.data, oracle.mass.data, std::vector<double>(oracle.mass.data.size(), 0.0),
                 5e-7 + exponent_error, 1e-7);
  }
};

TEST(CudaModularAttentionForward, PlainAttention) {
  Shape shape = dense({150}, {150}, 64);
  shape.bias = shape.sink = false;
  shape.modalities = 1;
  check_under_every_schedule<Forward, BFloat16, 64>(shape);
}
TEST(CudaModularAttentionForward, BiasSinkAndMass) {
  check_under_every_schedule<Forward, BFloat16, 64>(dense({100, 100}, {170, 170}, 64));
}
TEST(CudaModularAttentionForward, Causal) {
  Shape shape = dense({150}, {150}, 64);
  shape.causal = true;
  check_under_every_schedule<Forward, BFloat16, 64>(shape);
}
TEST(CudaModularAttentionForward, CausalWithMoreKeysThanQueries) {
  Shape shape = dense({70}, {200}, 64);
  shape.causal = shape.tokens_first = true;
  Forward::check<Float16, 64>(shape);
}
TEST(CudaModularAttentionForward, CausalWithMoreQueriesThanKeys) {
  Shape shape = dense({200}, {70}, 64);
  shape.causal = true;
  Forward::check<Float16, 64>(shape);
}
TEST(CudaModularAttentionForward, EveryHeadSize) {
  Shape shape = dense({130}, {140}, 0);
  shape.causal = true;
  check_every_head_size<Forward>(shape);
}
TEST(CudaModularAttentionForward, HeadSizesBetween) { check_head_sizes_between<Forward>(); }
TEST(CudaModularAttentionForward, TilesOfSeveralModalities) { check_tiles_of_several_modalities<Forward>(); }
TEST(CudaModularAttentionForward, Views) {
  Shape shape = dense({90}, {300}, 32);
  shape.views = shape.causal = true;
  shape.modalities = 3;
  check_under_every_schedule<Forward, BFloat16, 32>(shape);
  shape.layout = Layout::kShuffled;
  shape.padding = 0.2;
  check_under_every_schedule<Forward, Float16, 32>(shape);
  Forward::check<float, 32>(shape);
}
TEST(CudaModularAttentionForward, PaddingHoldsAnything) { check_padding<Forward>(); }
TEST(CudaModularAttentionForward, HiddenModalities) { check_hidden_modalities<Forward>(dense({200}, {200}, 64)); }
TEST(CudaModularAttentionForward, HiddenModalitiesWithViewsInMixedTiles) {
  Shape shape = dense({100}, {150}, 32);
  shape.hidden = 0.5;
  shape.views = true;
  shape.layout = Layout::kShuffled;
  check_under_every_schedule<Forward, BFloat16, 32>(shape);
}
TEST(CudaModularAttentionForward, GroupsOfQueryHeads) {
  Shape shape = dense({70, 70}, {130, 130}, 32);
  shape.causal = true;
  shape.query_heads = 6;
  shape.kv_heads = 2;
  Forward::check<BFloat16, 32>(shape);  // packed: 210 rows in two blocks instead of three
  shape.query_heads = 8;
  shape.kv_heads = 1;
  shape.queries = {128, 128};
  Forward::check<BFloat16, 32>(shape);  // not packed
}
TEST(CudaModularAttentionForward, DecodingSplitsKeys) {
  Shape shape = dense({1, 1}, {900, 900}, 64);
  shape.query_heads = 8;
  shape.kv_heads = 2;
  shape.causal = true;
  check_under_every_schedule<Forward, BFloat16, 64>(shape, 100);
  shape.views = true;
  Forward::check<Float16, 64>(shape, 100);
  shape.hidden = 2;
  shape.padding = 0.7;
  Forward::check<float, 64>(shape, 7);
}
TEST(CudaModularAttentionForward, ChunkedPrefillSplitsKeys) {
  Shape shape = dense({30}, {1100}, 128);
  shape.query_heads = 3;
  shape.causal = shape.tokens_first = true;
  Forward::check<BFloat16, 128>(shape, 16);
}
TEST(CudaModularAttentionForward, PackedSequences) {
  Shape shape = dense({40, 0, 1, 170, 33}, {60, 20, 300, 170, 0}, 64);
  shape.packed = true;
  shape.query_heads = 4;
  shape.kv_heads = 2;
  check_under_every_schedule<Forward, BFloat16, 64>(shape);
  shape.causal = shape.views = true;
  shape.padding = 0.2;
  Forward::check<BFloat16, 64>(shape);
  Forward::check<float, 64>(shape, 100);
}
TEST(CudaModularAttentionForward, ScalesOfEitherSign) {
  Shape shape = dense({40}, {80}, 32);
  shape.scale = -0.3;
  Forward::check<BFloat16, 32>(shape);
  shape.scale = 0;
  shape.causal = true;
  Forward::check<BFloat16, 32>(shape);
}
TEST(CudaModularAttentionForward, LargeScores) {
  Shape shape = dense({40}, {200}, 32);
  shape.scale = 40;
  Forward::check<float, 32>(shape);
}
TEST(CudaModularAttentionForward, LargeBiasesAndSinks) {
  Shape shape = dense({40}, {150}, 32);
  shape.modalities = 3;
  check_large_numbers<Forward>(shape);
  shape.causal = true;
  shape.padding = 0.2;
  check_large_numbers<Forward>(shape);
  shape.views = true;
  shape.bias = false;
  check_large_numbers<Forward>(shape);
}
TEST(CudaModularAttentionForward, LargeBiasesAndSinksWithSplitKeys) {
  Shape shape = dense({2}, {900}, 64);
  shape.modalities = 3;
  shape.query_heads = 4;
  shape.causal = true;
  shape.numbers = {0, -1e3f, -1e9f, 1e9f, -std::numeric_limits<float>::max(), std::numeric_limits<float>::max()};
  for (uint32_t seed = 1; seed <= 10; ++seed) {
    shape.seed = seed;
    Forward::check<BFloat16, 64>(shape, 100);
  }
}
TEST(CudaModularAttentionForward, NothingToDo) {
  Forward::check<BFloat16, 32>(dense({0}, {10}, 32));
  Forward::check<BFloat16, 32>(dense({10}, {0}, 32));
  Forward::check<BFloat16, 32>(dense({}, {}, 32));
}

}  // namespace
}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
