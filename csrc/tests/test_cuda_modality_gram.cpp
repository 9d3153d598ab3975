// The CUDA kernels of modality_gram, run on the CPU by csrc/cuda/emulation, against plain loops in double.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/sm80/modality_gram.h"
#include "cuda_gram_problem.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {
namespace {

struct GramForward {
  template <class Element, int kHeadDim>
  static void check(const Shape& shape, bool unit_keys = true, int multiprocessors = 1) {
    Problem<Element> problem(shape);
    Grams expected(shape), size(shape);
    const int D = shape.head_dim;
    for (size_t b = 0; b < shape.keys.size(); ++b)
      for (int h = 0; h < shape.kv_heads; ++h)
        for (int j = 0; j < shape.keys[b]; ++j) {
          const Feature<Element> key(problem, unit_keys, b, h, j);
          for (int e = 0; key.modality >= 0 && e < D * D; ++e) {
            const double product = key.phi[static_cast<size_t>(e / D)] * key.phi[static_cast<size_t>(e % D)];
            expected.at(b, h, key.modality)[e] += product;
            size.at(b, h, key.modality)[e] += std::abs(product);
          }
        }
    std::vector<float> gram(expected.data.size(), NAN);
    ModalityGramArgs args;
    fill_gram(problem, unit_keys, args);
    args.gram = gram.data();
    std::vector<char> workspace(static_cast<size_t>(modality_gram_workspace<Element, kHeadDim>(args, multiprocessors)),
                                '\xff');
    modality_gram<Element, kHeadDim>(args, multiprocessors, workspace.data(), nullptr);
    expect_close("gram", gram, expected.data, size.data, unit_keys ? kSumUnit<Element> : 5e-7, 1e-7);
    for (size_t matrix = 0; matrix < gram.size(); matrix += static_cast<size_t>(D * D))
      for (int i = 0; i < D; ++i)
        for (int j = 0; j < i; ++j)
          ASSERT_NEAR(gram[matrix + static_cast<size_t>(i * D + j)], gram[matrix + static_cast<size_t>(j * D + i)],
                      1e-6 * (1 + std::abs(gram[matrix + static_cast<size_t>(i * D + j)])));
  }
};

struct GramBackward {
  template <class Element, int kHeadDim>
  static void check(const Shape& shape, bool unit_keys = true, float magnitude = 1) {
    Problem<Element> problem(shape);
    const int D = shape.head_dim;
    const Grams layout(shape);
    const std::vector<float> grad_gram = random_numbers(layout.data.size(), magnitude);
    Array<double> expected(shape, shape.kv_heads, problem.total_keys, D, 1, 0.0), size = expected;
    for (size_t b = 0; b < shape.keys.size(); ++b)
      for (int h = 0; h < shape.kv_heads; ++h)
        for (int j = 0; j < shape.keys[b]; ++j) {
          const Feature<Element> key(problem, unit_keys, b, h, j);
          if (key.modality < 0) continue;
          const float* grad = grad_gram.data() + layout.index(b, h, key.modality);
          std::vector<double> dphi(static_cast<size_t>(D)), magnitudes(dphi);
          double along = 0, along_size = 0;
          for (int d = 0; d < D; ++d) {
            const size_t at = static_cast<size_t>(d);
            for (int e = 0; e < D; ++e) {
              const double product = key.phi[static_cast<size_t>(e)] * (double{grad[d * D + e]} + grad[e * D + d]);
              dphi[at] += product;
              magnitudes[at] += std::abs(product);
            }
            along += key.normalised * dphi[at] * key.phi[at];
            along_size += key.normalised * magnitudes[at] * std::abs(key.phi[at]);
          }
          for (int d = 0; d < D; ++d) {
            const size_t at = static_cast<size_t>(d);
            expected.at(static_cast<int64_t>(b), h, j)[d] = key.factor * (dphi[at] - along * key.phi[at]);
            size.at(static_cast<int64_t>(b), h, j)[d] =
                key.factor * (magnitudes[at] + along_size * std::abs(key.phi[at]));
          }
        }
    Array<Element> grad_key(shape, shape.kv_heads, problem.total_keys, D, 1, from_float<Element>(NAN));
    ModalityGramBackwardArgs args;
    fill_gram(problem, unit_keys, args);
    args.grad_gram = grad_gram.data();
    args.grad_key = grad_key.template operand<Output>(1);
    std::vector<char> workspace(
        static_cast<size_t>(plan_modality_gram_backward(args, static_cast<int>(sizeof(Element))).bytes), '\xff');
    modality_gram_backward<Element, kHeadDim>(args, workspace.data(), nullptr);
    expect_close("grad_key", grad_key.data, expected.data, size.data, 2 * ElementTraits<Element>::kUnit, 1e-7);
  }
};

Shape keys_only(std::vector<int> keys, int head_dim) { return dense(keys, keys, head_dim); }

TEST(CudaModalityGram, RunsOfModalities) {
  Shape shape = keys_only({150, 150}, 64);
  shape.kv_heads = 2;
  check_under_every_schedule<GramForward, BFloat16, 64>(shape);
  check_under_every_schedule<GramBackward, BFloat16, 64>(shape);
}
TEST(CudaModalityGram, EveryHeadSize) {
  check_every_head_size<GramForward>(keys_only({100}, 0));
  check_every_head_size<GramBackward>(keys_only({100}, 0));
}
TEST(CudaModalityGram, HeadSizesBetween) {
  check_head_sizes_between<GramForward>();
  check_head_sizes_between<GramBackward>();
}
TEST(CudaModalityGram, TilesOfSeveralModalities) {
  check_tiles_of_several_modalities<GramForward>();
  check_tiles_of_several_modalities<GramBackward>();
}
TEST(CudaModalityGram, PaddingHoldsAnything) {
  check_padding<GramForward>();
  check_padding<GramBackward>();
}
TEST(CudaModalityGram, RawKeys) {
  Shape shape = keys_only({130}, 40);
  shape.tokens_first = true;
  shape.kv_heads = 2;
  GramForward::check<Float16, 64>(shape, false);
  GramForward::check<float, 64>(shape, false);
  GramBackward::check<Float16, 64>(shape, false);
  GramBackward::check<float, 64>(shape, false);
}
TEST(CudaModalityGram, PiecesOfTheSequence) {
  Shape shape = keys_only({1700}, 32);
  shape.padding = 0.1;
  check_under_every_schedule<GramForward, BFloat16, 32>(shape, true, 100);
  GramForward::check<float, 32>(shape, true, 2);
}
TEST(CudaModalityGram, GradientsBeyondFloat16) { GramBackward::check<Float16, 32>(keys_only({70}, 32), true, 5e4f); }
TEST(CudaModalityGram, NoKeys) {
  GramForward::check<BFloat16, 32>(keys_only({0}, 32));
  GramBackward::check<BFloat16, 32>(keys_only({0}, 32));
}

}  // namespace
}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
