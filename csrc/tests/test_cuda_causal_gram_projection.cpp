// The CUDA kernels of causal_gram_projection, run on the CPU by csrc/cuda/emulation, against plain loops in double.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/sm80/causal_gram_projection_backward.h"
#include "cuda_gram_problem.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {
namespace {

template <class Element>
struct CausalOracle {
  Sum out, grad_query, grad_key, grad_scale;
  Grams gram, gram_size, grad_initial, grad_initial_size;

  explicit CausalOracle(const CausalProblem<Element>& p)
      : out(p.shape, p.shape.query_heads, p.total_queries, p.shape.head_dim, p.shape.modalities),
        grad_query(p.shape, p.shape.query_heads, p.total_queries, p.shape.head_dim, 1),
        grad_key(p.shape, p.shape.kv_heads, p.total_keys, p.shape.head_dim, 1),
        grad_scale(p.shape, p.shape.kv_heads, p.total_queries, p.shape.modalities, 1),
        gram(p.shape),
        gram_size(p.shape),
        grad_initial(p.shape),
        grad_initial_size(p.shape) {
    const size_t D = static_cast<size_t>(p.shape.head_dim);
    for (size_t b = 0; b < p.shape.keys.size(); ++b)
      for (int kv = 0; kv < p.shape.kv_heads; ++kv) {
        keys.clear();
        for (int j = 0; j < p.shape.keys[b]; ++j) keys.emplace_back(p, p.options.unit_keys, b, kv, j);
        dphi = dphi_size = Matrix(keys.size(), std::vector<double>(D));
        add_grams(p, b, kv);
        for (int head = kv * p.group; head < (kv + 1) * p.group; ++head)
          for (int row = 0; row < p.shape.queries[b]; ++row)
            for (int m = 0; m < p.shape.modalities; ++m) add_row(p, b, kv, head, row, m);
        for (size_t j = 0; j < keys.size(); ++j) differentiate_key(b, kv, j);
        for (int m = 0; m < p.shape.modalities; ++m) {
          symmetrise(D, grad_initial.at(b, kv, m));
          symmetrise(D, grad_initial_size.at(b, kv, m));
        }
      }
  }

 private:
  std::vector<Feature<Element>> keys;
  Matrix dphi, dphi_size;

  static void symmetrise(size_t D, double* matrix) {
    for (size_t i = 0; i < D; ++i)
      for (size_t j = 0; j <= i; ++j)
        matrix[i * D + j] = matrix[j * D + i] = (matrix[i * D + j] + matrix[j * D + i]) / 2;
  }

  void add_grams(const CausalProblem<Element>& p, size_t b, int kv) {
    const int D = p.shape.head_dim;
    for (int m = 0; m < p.shape.modalities; ++m)
      for (int e = 0; e < D * D; ++e) {
        const size_t at = gram.index(b, kv, m) + static_cast<size_t>(e);
        gram.at(b, kv, m)[e] = p.options.initial ? p.initial[at] : 0.0;
        gram_size.at(b, kv, m)[e] = std::abs(gram.at(b, kv, m)[e]);
        grad_initial.at(b, kv, m)[e] = p.grad_gram[at];
        grad_initial_size.at(b, kv, m)[e] = std::abs(p.grad_gram[at]);
      }
    for (size_t j = 0; j < keys.size(); ++j)
      for (int e = 0; keys[j].modality >= 0 && e < D * D; ++e) {
        const size_t row = static_cast<size_t>(e / D), column = static_cast<size_t>(e % D);
        const double product = keys[j].phi[row] * keys[j].phi[column];
        gram.at(b, kv, keys[j].modality)[e] += product;
        gram_size.at(b, kv, keys[j].modality)[e] += std::abs(product);
        const size_t matrix = gram.index(b, kv, keys[j].modality);
        const double grad = double{p.grad_gram[matrix + row * static_cast<size_t>(D) + column]} +
                            p.grad_gram[matrix + column * static_cast<size_t>(D) + row];
        dphi[j][column] += keys[j].phi[row] * grad;
        dphi_size[j][column] += std::abs(keys[j].phi[row] * grad);
      }
  }

  // One row and modality; sizes are the same sums of magnitudes.
  void add_row(const CausalProblem<Element>& p, size_t b, int kv, int head, int row, int m) {
    const size_t D = static_cast<size_t>(p.shape.head_dim);
    const int64_t batch = static_cast<int64_t>(b);
    const double s = p.row_scale.at(batch, kv, row)[m];
    std::vector<double> q, g;
    for (size_t d = 0; d < D; ++d) {
      q.push_back(to_float(p.query.at(batch, head, row)[d]));
      g.push_back(to_float(p.grad_out.at(batch, head, row, m)[d]));
    }
    const auto add = [](double* value, double* size, double amount, double magnitude) {
      *value += amount;
      *size += std::abs(magnitude);
    };
    double* o[2] = {out.value.at(batch, head, row, m), out.size.at(batch, head, row, m)};
    double* dq[2] = {grad_query.value.at(batch, head, row), grad_query.size.at(batch, head, row)};
    double* ds[2] = {grad_scale.value.at(batch, kv, row) + m, grad_scale.size.at(batch, kv, row) + m};
    for (size_t i = 0; i < D; ++i)
      for (size_t j = 0; j < D; ++j) {
        const size_t e = i * D + j;
        add(grad_initial.at(b, kv, m) + e, grad_initial_size.at(b, kv, m) + e, s * q[i] * g[j], s * q[i] * g[j]);
        if (!p.options.initial) continue;
        const double G = p.initial[gram.index(b, kv, m) + e];
        add(o[0] + j, o[1] + j, s * q[i] * G, s * q[i] * G);
        add(dq[0] + j, dq[1] + j, s * g[i] * G, s * g[i] * G);
        add(ds[0], ds[1], q[i] * G * g[j], q[i] * G * g[j]);
      }
    for (size_t j = 0; j <= static_cast<size_t>(row + p.shape.keys[b] - p.shape.queries[b]); ++j) {
      if (keys[j].modality != m) continue;
      const std::vector<double>& phi = keys[j].phi;
      double a = 0, a_size = 0, c = 0, c_size = 0;
      for (size_t d = 0; d < D; ++d) {
        add(&a, &a_size, q[d] * phi[d], q[d] * phi[d]);
        add(&c, &c_size, g[d] * phi[d], g[d] * phi[d]);
      }
      add(ds[0], ds[1], a * c, a_size * c_size);
      for (size_t d = 0; d < D; ++d) {
        add(o[0] + d, o[1] + d, s * a * phi[d], s * a_size * phi[d]);
        add(dq[0] + d, dq[1] + d, s * c * phi[d], s * c_size * phi[d]);
        add(&dphi[j][d], &dphi_size[j][d], s * (c * q[d] + a * g[d]),
            s * (c_size * std::abs(q[d]) + a_size * std::abs(g[d])));
      }
    }
  }

  void differentiate_key(size_t b, int kv, size_t j) {
    const Feature<Element>& key = keys[j];
    double along = 0, along_size = 0;
    for (size_t d = 0; d < key.phi.size(); ++d) {
      along += key.normalised * dphi[j][d] * key.phi[d];
      along_size += key.normalised * dphi_size[j][d] * std::abs(key.phi[d]);
    }
    double* value = grad_key.value.at(static_cast<int64_t>(b), kv, static_cast<int64_t>(j));
    double* size = grad_key.size.at(static_cast<int64_t>(b), kv, static_cast<int64_t>(j));
    for (size_t d = 0; key.modality >= 0 && d < key.phi.size(); ++d) {
      value[d] = key.factor * (dphi[j][d] - along * key.phi[d]);
      size[d] = key.factor * (dphi_size[j][d] + along_size * std::abs(key.phi[d]));
    }
  }
};

struct CausalForward {
  template <class Element, int kHeadDim>
  static std::vector<Element> run(CausalProblem<Element>& problem, std::vector<float>& gram) {
    const Shape& s = problem.shape;
    Array<Element> out(s, s.query_heads, problem.total_queries, s.head_dim, s.modalities, from_float<Element>(NAN));
    CausalGramProjectionForwardArgs args;
    problem.fill(args);
    args.projection = out.template operand<Output>(s.modalities);
    args.gram = gram.data();
    std::vector<char> workspace(static_cast<size_t>(plan_states<Element, kHeadDim>(args, false).bytes), '\xff');
    causal_gram_projection<Element, kHeadDim>(args, workspace.data(), nullptr);
    return out.data;
  }

  template <class Element, int kHeadDim>
  static void check(const Shape& shape, const CausalOptions& options = {}) {
    CausalProblem<Element> problem(shape, options);
    const CausalOracle<Element> oracle(problem);
    std::vector<float> gram(oracle.gram.data.size(), NAN);
    const std::vector<Element> out = run<Element, kHeadDim>(problem, gram);
    // Rounded: the score or the state, and the result.
    expect_close("projection", out, oracle.out.value.data, oracle.out.size.data, ElementTraits<Element>::kUnit, 1e-6);
    expect_close("gram", gram, oracle.gram.data, oracle.gram_size.data, options.unit_keys ? kSumUnit<Element> : 5e-7,
                 1e-7);
  }
};

struct CausalBackward {
  template <class Element, int kHeadDim>
  static void check(const Shape& shape, const CausalOptions& options = {}) {
    CausalProblem<Element> problem(shape, options);
    const CausalOracle<Element> oracle(problem);
    const Element poison = from_float<Element>(NAN);
    Array<Element> grad_query(shape, shape.query_heads, problem.total_queries, shape.head_dim, 1, poison);
    Array<Element> grad_key(shape, shape.kv_heads, problem.total_keys, shape.head_dim, 1, poison);
    Array<float> grad_scale(shape, shape.kv_heads, problem.total_queries, shape.modalities, 1, NAN);
    std::vector<float> grad_initial(problem.grad_gram.size(), NAN);
    CausalGramProjectionBackwardArgs args;
    problem.fill(args);
    args.grad_projection = problem.grad_out.template operand<Input>(shape.modalities);
    args.grad_gram = problem.grad_gram.data();
    args.grad_query = grad_query.template operand<Output>(1);
    args.grad_key = grad_key.template operand<Output>(1);
    args.grad_row_scale = grad_scale.template operand<Output>(1);
    args.grad_initial = grad_initial.data();
    std::vector<char> workspace(static_cast<size_t>(plan_states<Element, kHeadDim>(args, true).bytes), '\xff');
    causal_gram_projection_backward<Element, kHeadDim>(args, workspace.data(), nullptr);
    // Rounded: features, scores, scaled queries, matrices, results: two of them relative to the magnitudes of a sum.
    const double unit = 2 * ElementTraits<Element>::kUnit;
    expect_close("grad_query", grad_query.data, oracle.grad_query.value.data, oracle.grad_query.size.data, unit, 1e-6);
    expect_close("grad_key", grad_key.data, oracle.grad_key.value.data, oracle.grad_key.size.data, unit, 1e-6);
    expect_close("grad_scale", grad_scale.data, oracle.grad_scale.value.data, oracle.grad_scale.size.data,
                 kSumUnit<Element>, 1e-6);
    expect_close("grad_initial", grad_initial, oracle.grad_initial.data, oracle.grad_initial_size.data,
                 kSumUnit<Element>, 1e-6);
  }
};

TEST(CudaCausalGramProjection, SegmentsAndState) {
  Shape shape = dense({600}, {600}, 64);
  check_under_every_schedule<CausalForward, BFloat16, 64>(shape);
  shape.padding = 0.1;
  shape.queries = {330};
  CausalForward::check<Float16, 64>(shape);
  CausalForward::check<float, 64>(shape, {true, false});
  CausalBackward::check<Float16, 64>(shape);
  check_under_every_schedule<CausalBackward, float, 64>(dense({300}, {300}, 64), CausalOptions{true, false});
}
TEST(CudaCausalGramProjection, EveryHeadSize) {
  check_every_head_size<CausalForward>(dense({70}, {330}, 0));
  check_every_head_size<CausalBackward>(dense({70}, {300}, 0));
}
TEST(CudaCausalGramProjection, HeadSizesBetween) {
  check_head_sizes_between<CausalForward>();
  check_head_sizes_between<CausalBackward>();
}
TEST(CudaCausalGramProjection, TilesOfSeveralModalities) {
  check_tiles_of_several_modalities<CausalForward>();
  check_tiles_of_several_modalities<CausalBackward>();
}
TEST(CudaCausalGramProjection, PaddingHoldsAnything) {
  check_padding<CausalForward>();
  check_padding<CausalBackward>();
}
TEST(CudaCausalGramProjection, RawKeysAndGroups) {
  Shape shape = dense({130, 130}, {300, 300}, 40);
  shape.tokens_first = true;
  shape.query_heads = 4;
  shape.kv_heads = 2;
  CausalForward::check<Float16, 64>(shape, {false, true});
  CausalForward::check<float, 64>(shape, {false, false});
  CausalBackward::check<Float16, 64>(shape, {false, true});
  CausalBackward::check<float, 64>(shape, {false, false});
}
TEST(CudaCausalGramProjection, KeysOfLengthZero) {
  CausalForward::check<Float16, 32>(dense({90}, {90}, 32), {true, true, true});
  CausalForward::check<float, 32>(dense({90}, {90}, 32), {true, false, true});
}
TEST(CudaCausalGramProjection, OneToken) {
  CausalForward::check<BFloat16, 32>(dense({1, 1}, {1, 1}, 32));
  CausalForward::check<float, 32>(dense({1}, {1}, 32), {true, false});
  CausalForward::check<BFloat16, 32>(dense({0}, {40}, 32));
  CausalForward::check<BFloat16, 32>(dense({0}, {0}, 32));
  CausalBackward::check<BFloat16, 32>(dense({1, 1}, {1, 1}, 32));
  CausalBackward::check<BFloat16, 32>(dense({0}, {40}, 32));
  CausalBackward::check<BFloat16, 32>(dense({0}, {0}, 32));
}
TEST(CudaCausalGramProjection, LaterTokensChangeNoBit) {
  const Shape shape = dense({300}, {300}, 32);
  CausalProblem<BFloat16> problem(shape, {});
  std::vector<float> gram(Grams(shape).data.size());
  const std::vector<BFloat16> before = CausalForward::run<BFloat16, 32>(problem, gram);
  constexpr int kChanged = 270;
  for (int j = kChanged; j < 300; ++j) {
    problem.modality[static_cast<size_t>(j)] ^= 1;
    for (int d = 0; d < 32; ++d) problem.key.at(0, 0, j)[d] = from_float<BFloat16>(static_cast<float>(d));
  }
  const std::vector<BFloat16> after = CausalForward::run<BFloat16, 32>(problem, gram);
  for (size_t i = 0; i < before.size(); ++i)
    if (i / 32 % 300 < kChanged) {
      ASSERT_EQ(before[i].bits, after[i].bits);
    }
}

}  // namespace
}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
