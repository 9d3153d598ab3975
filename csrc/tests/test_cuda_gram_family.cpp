// The CUDA Gram kernels, run on the CPU by csrc/cuda/emulation, against plain loops in double.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/sm80/causal_gram_projection_backward.h"
#include "cuda/sm80/duplex_query_views_backward.h"
#include "cuda/sm80/duplex_query_views_forward.h"
#include "cuda/sm80/modality_gram.h"
#include "cuda_problem.h"

namespace moda_ext {
namespace cuda {
namespace {

constexpr double kEps = 1e-6;
// Of float32 results, whatever the inputs are: 16-bit operands come in two parts.
template <class Element>
constexpr double kSumUnit = sizeof(Element) == 2 ? 2e-5 : 5e-7;

template <class Element, class Args>
void fill_gram(Problem<Element>& problem, bool unit_keys, Args& args) {
  problem.fill(args);
  args.unit_keys = unit_keys;
  args.eps = static_cast<float>(kEps);
}

// Features of a key, and the factor that makes them.
template <class Element>
struct Feature {
  std::vector<double> phi;
  double factor = 1, normalised = 0;
  int modality;

  Feature(const Problem<Element>& p, bool unit_keys, size_t batch, int head, int key) {
    const int id = p.modality[p.first_id(batch) + static_cast<size_t>(key)];
    modality = id >= 0 && id < p.shape.modalities ? id : -1;
    const Element* k = p.key.at(static_cast<int64_t>(batch), head, key);
    for (int d = 0; d < p.shape.head_dim; ++d) phi.push_back(modality < 0 ? 0.0 : double{to_float(k[d])});
    if (!unit_keys) return;
    double square = 0;
    for (const double x : phi) square += x * x;
    normalised = std::sqrt(square) > kEps;
    factor = 1 / std::max(std::sqrt(square), kEps);
    for (double& x : phi) x *= factor;
  }
};

// Matrices (batch, kv head, modality, D, D).
struct Grams {
  int heads, modalities, size;
  std::vector<double> data;

  explicit Grams(const Shape& s)
      : heads(s.kv_heads),
        modalities(s.modalities),
        size(s.head_dim),
        data(s.keys.size() * static_cast<size_t>(heads * modalities * size * size)) {}
  size_t index(size_t batch, int head, int m) const {
    return ((batch * static_cast<size_t>(heads) + static_cast<size_t>(head)) * static_cast<size_t>(modalities) +
            static_cast<size_t>(m)) *
           static_cast<size_t>(size * size);
  }
  double* at(size_t batch, int head, int m) { return data.data() + index(batch, head, m); }
};

std::vector<float> random_numbers(size_t count, float scale = 1) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(count);
  for (float& x : numbers) x = scale * normal(random);
  return numbers;
}

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

// ------------------------------------------------------------------------------------------------------------------
// causal_gram_projection

struct CausalOptions {
  bool unit_keys = true, initial = true;
  bool zero_keys = false;  // some keys are zero, and eps has no square in float32
};

// Beside a problem's queries and keys: what else the projection and its gradient take.
template <class Element>
struct CausalProblem : Problem<Element> {
  CausalOptions options;
  Array<float> row_scale;      // (batch, kv head, query, modality)
  std::vector<float> initial;  // symmetric
  Array<Element> grad_out;     // of the projection
  std::vector<float> grad_gram;

  CausalProblem(const Shape& s, const CausalOptions& o)
      : Problem<Element>(s),
        options(o),
        row_scale(s, s.kv_heads, this->total_queries, s.modalities, 1, 0.0f),
        grad_out(s, s.query_heads, this->total_queries, s.head_dim, s.modalities, Element{}) {
    if (o.zero_keys)
      for (size_t i = 0; i < this->key.data.size(); ++i)
        if (i / static_cast<size_t>(s.head_dim) % 3 == 0) this->key.data[i] = from_float<Element>(0.0f);
    row_scale.data = random_numbers(row_scale.data.size());
    const std::vector<float> numbers = random_numbers(grad_out.data.size());
    for (size_t i = 0; i < numbers.size(); ++i) grad_out.data[i] = from_float<Element>(numbers[i]);
    const Grams layout(s);
    grad_gram = random_numbers(layout.data.size());
    if (!o.initial) return;
    const std::vector<float> half = random_numbers(layout.data.size(), 3);
    initial.resize(half.size());
    const size_t D = static_cast<size_t>(s.head_dim);
    for (size_t matrix = 0; matrix < half.size(); matrix += D * D)
      for (size_t i = 0; i < D; ++i)
        for (size_t j = 0; j < D; ++j)
          initial[matrix + i * D + j] = half[matrix + i * D + j] + half[matrix + j * D + i];
  }

  void fill(CausalGramArgs& args) {
    fill_gram(static_cast<Problem<Element>&>(*this), options.unit_keys, args);
    if (options.zero_keys) args.eps = 1e-30f;
    args.row_scale = row_scale.template operand<Input>(1);
    args.initial = options.initial ? initial.data() : nullptr;
  }
};

// What a sum comes to, and the magnitudes that went into it.
struct Sum {
  Array<double> value, size;

  Sum(const Shape& shape, int heads, int64_t tokens, int last, int views)
      : value(shape, heads, tokens, last, views, 0.0), size(value) {}
};

using Matrix = std::vector<std::vector<double>>;

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

// ------------------------------------------------------------------------------------------------------------------
// duplex_query_views

struct ViewsOptions {
  CausalOptions causal = {};
  int rank = 20;
  bool indicator = true, gram = true;
  float state_scale = 1;  // of the initial Grams; row_scale is divided by it
  float grad_views_scale = 1, grad_indicator_scale = 1;
};

template <class Element>
struct ViewsProblem : CausalProblem<Element> {
  ViewsOptions views;
  std::vector<float> a1, b1, a2, b2;
  Array<float> grad_indicator;  // the gradient of the views is grad_out

  ViewsProblem(const Shape& s, const ViewsOptions& o) : CausalProblem<Element>(s, o.causal), views(o) {
    const size_t count = static_cast<size_t>(s.modalities * s.head_dim * o.rank);
    const std::vector<float> all = random_numbers(4 * count, 0.3f);
    const auto part = [&](size_t i) {
      return std::vector<float>(all.data() + i * count, all.data() + (i + 1) * count);
    };
    a1 = part(0);
    b1 = part(1);
    a2 = part(2);
    b2 = part(3);
    for (float& x : this->initial) x *= o.state_scale;
    for (float& x : this->row_scale.data) x /= o.state_scale;
    for (Element& x : this->grad_out.data) x = from_float<Element>(to_float(x) * o.grad_views_scale);
    grad_indicator = Array<float>(s, s.query_heads, this->total_queries, s.modalities, 1, 0.0f);
    grad_indicator.data = random_numbers(grad_indicator.data.size(), o.grad_indicator_scale);
  }

  void fill(DuplexArgs& args) {
    CausalProblem<Element>::fill(args);
    args.rank = views.rank;
    args.a1 = a1.data();
    args.b1 = b1.data();
    args.a2 = a2.data();
    args.b2 = b2.data();
  }
};

// A row of numbers and the magnitudes that went into them.
struct Row {
  std::vector<double> value, size;

  explicit Row(int count) : value(static_cast<size_t>(count)), size(value) {}
  // this += factor from M, M[i, j] at i * from_stride + j * to_stride.
  template <class T>
  void add_product(const Row& from, const T* matrix, const T* matrix_size, size_t from_stride, size_t to_stride,
                   double factor = 1) {
    for (size_t i = 0; i < from.value.size(); ++i)
      for (size_t j = 0; j < value.size(); ++j) {
        const size_t at = i * from_stride + j * to_stride;
        value[j] += factor * from.value[i] * static_cast<double>(matrix[at]);
        size[j] += std::abs(factor) * from.size[i] * std::abs(static_cast<double>(matrix_size[at]));
      }
  }
};

template <class Element>
struct ViewsOracle {
  Sum views, indicator;
  Grams gram, gram_size;

  explicit ViewsOracle(const ViewsProblem<Element>& p)
      : views(p.shape, p.shape.query_heads, p.total_queries, p.shape.head_dim, p.shape.modalities),
        indicator(p.shape, p.shape.query_heads, p.total_queries, p.shape.modalities, 1),
        gram(p.shape),
        gram_size(p.shape) {
    for (size_t at = 0; at < p.initial.size(); ++at) {
      gram.data[at] = p.initial[at];
      gram_size.data[at] = std::abs(p.initial[at]);
    }
    for (size_t b = 0; b < p.shape.keys.size(); ++b)
      for (int kv = 0; kv < p.shape.kv_heads; ++kv)
        for (int j = 0; j < p.shape.keys[b]; ++j) {
          add_key(p, b, kv, j);
          const int row = j - (p.shape.keys[b] - p.shape.queries[b]);
          for (int head = kv * p.group; row >= 0 && head < (kv + 1) * p.group; ++head) add_row(p, b, kv, head, row);
        }
  }

 private:
  void add_key(const ViewsProblem<Element>& p, size_t b, int kv, int j) {
    const Feature<Element> key(p, p.options.unit_keys, b, kv, j);
    const size_t D = key.phi.size();
    for (size_t e = 0; key.modality >= 0 && e < D * D; ++e) {
      gram.at(b, kv, key.modality)[e] += key.phi[e / D] * key.phi[e % D];
      gram_size.at(b, kv, key.modality)[e] += std::abs(key.phi[e / D] * key.phi[e % D]);
    }
  }

  void add_row(const ViewsProblem<Element>& p, size_t b, int kv, int head, int row) {
    const int D = p.shape.head_dim, M = p.shape.modalities, rank = p.views.rank;
    const size_t columns = static_cast<size_t>(D), ranks = static_cast<size_t>(rank);
    const int64_t batch = static_cast<int64_t>(b);
    Row q(D);
    double square = 0;
    for (size_t d = 0; d < columns; ++d) {
      q.value[d] = to_float(p.query.at(batch, head, row)[d]);
      q.size[d] = std::abs(q.value[d]);
      square += q.value[d] * q.value[d];
    }
    const auto scale = [&](int m) { return double{p.row_scale.at(batch, kv, row)[m]}; };
    for (int a = 0; a < M; ++a) {
      const size_t first = static_cast<size_t>(a) * columns * ranks;
      Row x(rank), y(rank), moved(D), view = q;
      x.add_product(q, p.b2.data() + first, p.b2.data() + first, 1, columns);
      y.add_product(q, p.b1.data() + first, p.b1.data() + first, 1, columns);
      moved.add_product(x, p.a2.data() + first, p.a2.data() + first, 1, ranks);
      view.add_product(y, p.a1.data() + first, p.a1.data() + first, 1, ranks);
      for (int m = 0; m < M; ++m)
        if (m != a) view.add_product(moved, gram.at(b, kv, m), gram_size.at(b, kv, m), columns, 1, scale(m));
      for (size_t d = 0; d < columns; ++d) {
        views.value.at(batch, head, row, a)[d] = view.value[d];
        views.size.at(batch, head, row, a)[d] = view.size[d];
      }
    }
    for (int m = 0; m < M && square > 0; ++m) {
      Row projected(D);
      projected.add_product(q, gram.at(b, kv, m), gram_size.at(b, kv, m), columns, 1);
      for (size_t d = 0; d < columns; ++d) {
        indicator.value.at(batch, head, row)[m] += projected.value[d] * q.value[d] / square;
        indicator.size.at(batch, head, row)[m] += projected.size[d] * q.size[d] / square;
      }
    }
  }
};

struct ViewsForward {
  template <class Element>
  struct Results {
    Array<Element> views;
    Array<float> indicator;
    std::vector<float> gram;
  };

  template <class Element, int kHeadDim>
  static Results<Element> run(ViewsProblem<Element>& problem) {
    const Shape& s = problem.shape;
    Results<Element> results{
        Array<Element>(s, s.query_heads, problem.total_queries, s.head_dim, s.modalities, from_float<Element>(NAN)),
        Array<float>(s, s.query_heads, problem.total_queries, s.modalities, 1, NAN),
        std::vector<float>(Grams(s).data.size(), NAN)};
    DuplexQueryViewsForwardArgs args;
    problem.fill(args);
    args.views = results.views.template operand<Output>(s.modalities);
    if (problem.views.indicator) args.indicator = results.indicator.template operand<Output>(1);
    if (problem.views.gram) args.gram = results.gram.data();
    std::vector<char> workspace(static_cast<size_t>(plan_duplex_query_views<Element, kHeadDim>(args).bytes), '\xff');
    duplex_query_views<Element, kHeadDim>(args, workspace.data(), nullptr);
    return results;
  }

  template <class Element, int kHeadDim>
  static void check(const Shape& shape, const ViewsOptions& options = {}) {
    ViewsProblem<Element> problem(shape, options);
    const ViewsOracle<Element> oracle(problem);
    const Results<Element> results = run<Element, kHeadDim>(problem);
    // Rounded: each weight, what it makes of the query, scores and the result.
    expect_close("views", results.views.data, oracle.views.value.data, oracle.views.size.data,
                 2 * ElementTraits<Element>::kUnit, 1e-6);
    if (options.indicator) {
      expect_close("indicator", results.indicator.data, oracle.indicator.value.data, oracle.indicator.size.data,
                   kSumUnit<Element>, 1e-6);
    }
    if (options.gram) {
      expect_close("gram", results.gram, oracle.gram.data, oracle.gram_size.data,
                   options.causal.unit_keys ? kSumUnit<Element> : 5e-7, 1e-7);
    }
  }
};

TEST(CudaDuplexQueryViews, SegmentsAndState) {
  Shape shape = dense({600}, {600}, 64);
  check_under_every_schedule<ViewsForward, BFloat16, 64>(shape);
  shape.padding = 0.1;
  shape.queries = {330};
  ViewsForward::check<Float16, 64>(shape);
  ViewsForward::check<float, 64>(shape, {{true, false}});
  check_under_every_schedule<ViewsForward, float, 64>(dense({300}, {300}, 64), ViewsOptions{{true, false}});
}
TEST(CudaDuplexQueryViews, EveryHeadSize) { check_every_head_size<ViewsForward>(dense({70}, {330}, 0)); }
TEST(CudaDuplexQueryViews, HeadSizesBetween) { check_head_sizes_between<ViewsForward>(); }
TEST(CudaDuplexQueryViews, TilesOfSeveralModalities) { check_tiles_of_several_modalities<ViewsForward>(); }
TEST(CudaDuplexQueryViews, PaddingHoldsAnything) { check_padding<ViewsForward>(); }
TEST(CudaDuplexQueryViews, Ranks) {
  for (const int rank : {1, 32, 33, 128}) {
    ViewsForward::check<BFloat16, 32>(dense({70}, {300}, 32), {{}, rank});
    ViewsForward::check<float, 64>(dense({70}, {300}, 40), {{}, rank});
  }
}
TEST(CudaDuplexQueryViews, OneModality) {
  Shape shape = dense({70}, {300}, 32);
  shape.modalities = 1;
  ViewsForward::check<BFloat16, 32>(shape);
  ViewsForward::check<float, 32>(shape, {{true, false}});
}
TEST(CudaDuplexQueryViews, RawKeysAndGroups) {
  Shape shape = dense({130, 130}, {300, 300}, 40);
  shape.tokens_first = true;
  shape.query_heads = 4;
  shape.kv_heads = 2;
  shape.modalities = 3;
  ViewsForward::check<Float16, 64>(shape, {{false, true}});
  ViewsForward::check<float, 64>(shape, {{false, false}});
}
TEST(CudaDuplexQueryViews, StatesBeyondFloat16) {
  ViewsForward::check<Float16, 32>(dense({90}, {300}, 32), {{}, 20, true, true, 1e6f});
}
TEST(CudaDuplexQueryViews, OnlyTheViews) {
  ViewsForward::check<BFloat16, 32>(dense({90}, {300}, 32), {{}, 20, false, false});
  ViewsForward::check<float, 32>(dense({90}, {300}, 32), {{}, 20, false, false});
}
TEST(CudaDuplexQueryViews, OneToken) {
  ViewsForward::check<BFloat16, 32>(dense({1, 1}, {1, 1}, 32));
  ViewsForward::check<float, 32>(dense({1}, {1}, 32), {{true, false}});
  ViewsForward::check<BFloat16, 32>(dense({0}, {40}, 32));
  ViewsForward::check<BFloat16, 32>(dense({0}, {0}, 32));
}
TEST(CudaDuplexQueryViews, WeightsOfZeroGiveTheQuery) {
  ViewsProblem<BFloat16> problem(dense({300}, {300}, 32), {});
  std::fill(problem.b1.begin(), problem.b1.end(), 0.0f);
  std::fill(problem.b2.begin(), problem.b2.end(), 0.0f);
  const Array<BFloat16> views = ViewsForward::run<BFloat16, 32>(problem).views;
  for (size_t i = 0; i < views.data.size(); ++i)
    ASSERT_EQ(views.data[i].bits, problem.query.data[i % problem.query.data.size()].bits);
}
TEST(CudaDuplexQueryViews, LaterTokensChangeNoBit) {
  ViewsProblem<BFloat16> problem(dense({300}, {300}, 32), {});
  const auto before = ViewsForward::run<BFloat16, 32>(problem);
  constexpr int kChanged = 270;
  for (int j = kChanged; j < 300; ++j) {
    problem.modality[static_cast<size_t>(j)] ^= 1;
    for (int d = 0; d < 32; ++d) problem.key.at(0, 0, j)[d] = from_float<BFloat16>(static_cast<float>(d));
  }
  const auto after = ViewsForward::run<BFloat16, 32>(problem);
  for (size_t i = 0; i < before.views.data.size(); ++i)
    if (i / 32 % 300 < kChanged) {
      ASSERT_EQ(before.views.data[i].bits, after.views.data[i].bits);
    }
  for (size_t i = 0; i < before.indicator.data.size(); ++i)
    if (i / 2 % 300 < kChanged) {
      ASSERT_EQ(before.indicator.data[i], after.indicator.data[i]);
    }
}

// Walks back over a sequence: Grams lose a key after its row, and rows add to what acts on every key before them.
template <class Element>
struct ViewsGradientOracle {
  Sum indicator, grad_query, grad_key, grad_scale;
  Grams grad_initial, grad_initial_size;
  Row grad_a1, grad_b1, grad_a2, grad_b2;

  explicit ViewsGradientOracle(const ViewsProblem<Element>& p)
      : indicator(p.shape, p.shape.query_heads, p.total_queries, p.shape.modalities, 1),
        grad_query(p.shape, p.shape.query_heads, p.total_queries, p.shape.head_dim, 1),
        grad_key(p.shape, p.shape.kv_heads, p.total_keys, p.shape.head_dim, 1),
        grad_scale(p.shape, p.shape.kv_heads, p.total_queries, p.shape.modalities, 1),
        grad_initial(p.shape),
        grad_initial_size(p.shape),
        grad_a1(static_cast<int>(p.a1.size())),
        grad_b1(grad_a1),
        grad_a2(grad_a1),
        grad_b2(grad_a1),
        gram(p.shape),
        gram_size(p.shape) {
    for (size_t at = 0; at < p.initial.size(); ++at) add_to(gram, gram_size, at, p.initial[at], p.initial[at]);
    for (size_t at = 0; p.views.gram && at < p.grad_gram.size(); ++at)
      add_to(grad_initial, grad_initial_size, at, p.grad_gram[at], p.grad_gram[at]);
    for (size_t b = 0; b < p.shape.keys.size(); ++b)
      for (int kv = 0; kv < p.shape.kv_heads; ++kv) {
        for (int j = 0; j < p.shape.keys[b]; ++j) add_key(p, b, kv, j, 1);
        for (int j = p.shape.keys[b] - 1; j >= 0; --j) {
          const int row = j - (p.shape.keys[b] - p.shape.queries[b]);
          for (int head = kv * p.group; row >= 0 && head < (kv + 1) * p.group; ++head) add_row(p, b, kv, head, row);
          differentiate_key(p, b, kv, j);
          add_key(p, b, kv, j, -1);
        }
        for (int m = 0; m < p.shape.modalities; ++m) {
          symmetrise(p.shape.head_dim, grad_initial.at(b, kv, m));
          symmetrise(p.shape.head_dim, grad_initial_size.at(b, kv, m));
        }
      }
  }

 private:
  Grams gram, gram_size;  // those that the row sees

  static void add_to(Grams& value, Grams& size, size_t at, double amount, double magnitude) {
    value.data[at] += amount;
    size.data[at] += std::abs(magnitude);
  }
  static void symmetrise(int D, double* matrix) {
    for (int i = 0; i < D; ++i)
      for (int j = 0; j <= i; ++j) matrix[i * D + j] = matrix[j * D + i] = (matrix[i * D + j] + matrix[j * D + i]) / 2;
  }
  // matrix[i, j] += factor a_i b_j
  static void add_outer(double factor, const Row& a, const Row& b, double* matrix, double* size) {
    for (size_t i = 0; i < a.value.size(); ++i)
      for (size_t j = 0; j < b.value.size(); ++j) {
        matrix[i * b.value.size() + j] += factor * a.value[i] * b.value[j];
        size[i * b.value.size() + j] += std::abs(factor) * a.size[i] * b.size[j];
      }
  }

  void add_key(const ViewsProblem<Element>& p, size_t b, int kv, int j, double sign) {
    const Feature<Element> key(p, p.options.unit_keys, b, kv, j);
    const size_t D = key.phi.size();
    for (size_t e = 0; key.modality >= 0 && e < D * D; ++e) {
      gram.at(b, kv, key.modality)[e] += sign * key.phi[e / D] * key.phi[e % D];
      gram_size.at(b, kv, key.modality)[e] += sign * std::abs(key.phi[e / D] * key.phi[e % D]);
    }
  }

  void add_row(const ViewsProblem<Element>& p, size_t b, int kv, int head, int row) {
    const int D = p.shape.head_dim, M = p.shape.modalities, rank = p.views.rank;
    const size_t columns = static_cast<size_t>(D), ranks = static_cast<size_t>(rank);
    const int64_t batch = static_cast<int64_t>(b);
    const auto read = [&](const Element* numbers) {
      Row result(D);
      for (size_t d = 0; d < columns; ++d) {
        result.value[d] = to_float(numbers[d]);
        result.size[d] = std::abs(result.value[d]);
      }
      return result;
    };
    const Row q = read(p.query.at(batch, head, row));
    double* dq[2] = {grad_query.value.at(batch, head, row), grad_query.size.at(batch, head, row)};
    const auto add_query = [&](const Row& amount, double factor) {
      for (size_t d = 0; d < columns; ++d) {
        dq[0][d] += factor * amount.value[d];
        dq[1][d] += std::abs(factor) * amount.size[d];
      }
    };
    for (int a = 0; a < M; ++a) {
      const size_t first = static_cast<size_t>(a) * columns * ranks;
      const float *a1 = p.a1.data() + first, *b1 = p.b1.data() + first;
      const float *a2 = p.a2.data() + first, *b2 = p.b2.data() + first;
      const Row grad = read(p.grad_out.at(batch, head, row, a));
      Row x(rank), y(rank), moved(D), grad_moved(D), grad_x(rank), grad_y(rank), back(D);
      x.add_product(q, b2, b2, 1, columns);
      y.add_product(q, b1, b1, 1, columns);
      moved.add_product(x, a2, a2, 1, ranks);
      for (int m = 0; m < M; ++m) {
        if (m == a) continue;
        const double scale = p.row_scale.at(batch, kv, row)[m];
        Row product(D);
        product.add_product(grad, gram.at(b, kv, m), gram_size.at(b, kv, m), columns, 1);
        for (size_t d = 0; d < columns; ++d) {
          grad_scale.value.at(batch, kv, row)[m] += moved.value[d] * product.value[d];
          grad_scale.size.at(batch, kv, row)[m] += moved.size[d] * product.size[d];
          grad_moved.value[d] += scale * product.value[d];
          grad_moved.size[d] += std::abs(scale) * product.size[d];
        }
        add_outer(scale, moved, grad, grad_initial.at(b, kv, m), grad_initial_size.at(b, kv, m));
      }
      grad_y.add_product(grad, a1, a1, ranks, 1);
      grad_x.add_product(grad_moved, a2, a2, ranks, 1);
      back.add_product(grad_y, b1, b1, columns, 1);
      back.add_product(grad_x, b2, b2, columns, 1);
      add_query(grad, 1);
      add_query(back, 1);
      add_outer(1, grad, y, grad_a1.value.data() + first, grad_a1.size.data() + first);
      add_outer(1, grad_y, q, grad_b1.value.data() + first, grad_b1.size.data() + first);
      add_outer(1, grad_moved, x, grad_a2.value.data() + first, grad_a2.size.data() + first);
      add_outer(1, grad_x, q, grad_b2.value.data() + first, grad_b2.size.data() + first);
    }
    double square = 0;
    for (const double number : q.value) square += number * number;
    for (int m = 0; m < M && square > 0; ++m) {
      Row projected(D);
      projected.add_product(q, gram.at(b, kv, m), gram_size.at(b, kv, m), columns, 1);
      double* form[2] = {indicator.value.at(batch, head, row) + m, indicator.size.at(batch, head, row) + m};
      for (size_t d = 0; d < columns; ++d) {
        *form[0] += projected.value[d] * q.value[d] / square;
        *form[1] += projected.size[d] * q.size[d] / square;
      }
      if (!p.views.indicator) continue;
      const double scale = p.grad_indicator.at(batch, head, row)[m] / square;
      Row along = q;
      for (size_t d = 0; d < columns; ++d) {
        along.value[d] *= *form[0];
        along.size[d] *= *form[1];
      }
      add_query(projected, 2 * scale);
      add_query(along, -2 * scale);
      add_outer(scale, q, q, grad_initial.at(b, kv, m), grad_initial_size.at(b, kv, m));
    }
  }

  void differentiate_key(const ViewsProblem<Element>& p, size_t b, int kv, int j) {
    const Feature<Element> key(p, p.options.unit_keys, b, kv, j);
    if (key.modality < 0) return;
    const int D = p.shape.head_dim;
    const size_t columns = static_cast<size_t>(D);
    Row phi(D), dphi(D);
    phi.value = phi.size = key.phi;
    for (double& magnitude : phi.size) magnitude = std::abs(magnitude);
    double *later = grad_initial.at(b, kv, key.modality), *later_size = grad_initial_size.at(b, kv, key.modality);
    dphi.add_product(phi, later, later_size, columns, 1);
    dphi.add_product(phi, later, later_size, 1, columns);
    double along = 0, along_size = 0;
    for (size_t d = 0; d < columns; ++d) {
      along += key.normalised * dphi.value[d] * phi.value[d];
      along_size += key.normalised * dphi.size[d] * phi.size[d];
    }
    double* value = grad_key.value.at(static_cast<int64_t>(b), kv, j);
    double* size = grad_key.size.at(static_cast<int64_t>(b), kv, j);
    for (size_t d = 0; d < columns; ++d) {
      value[d] = key.factor * (dphi.value[d] - along * phi.value[d]);
      size[d] = key.factor * (dphi.size[d] + along_size * phi.size[d]);
    }
  }
};

struct ViewsBackward {
  template <class Element>
  struct Results {
    Array<Element> grad_query, grad_key;
    Array<float> grad_scale;
    std::vector<float> grad_a1, grad_b1, grad_a2, grad_b2, grad_initial;
  };

  template <class Element, int kHeadDim>
  static Results<Element> run(ViewsProblem<Element>& problem, Array<float>& indicator) {
    const Shape& s = problem.shape;
    const Element poison = from_float<Element>(NAN);
    const std::vector<float> weights(problem.a1.size(), NAN);
    Results<Element> results{Array<Element>(s, s.query_heads, problem.total_queries, s.head_dim, 1, poison),
                             Array<Element>(s, s.kv_heads, problem.total_keys, s.head_dim, 1, poison),
                             Array<float>(s, s.kv_heads, problem.total_queries, s.modalities, 1, NAN),
                             weights,
                             weights,
                             weights,
                             weights,
                             std::vector<float>(problem.grad_gram.size(), NAN)};
    DuplexQueryViewsBackwardArgs args;
    problem.fill(args);
    args.grad_views = problem.grad_out.template operand<Input>(s.modalities);
    if (problem.views.indicator) {
      args.indicator = indicator.operand<Input>(1);
      args.grad_indicator = problem.grad_indicator.template operand<Input>(1);
    }
    args.grad_gram = problem.views.gram ? problem.grad_gram.data() : nullptr;
    args.grad_query = results.grad_query.template operand<Output>(1);
    args.grad_key = results.grad_key.template operand<Output>(1);
    args.grad_row_scale = results.grad_scale.template operand<Output>(1);
    args.grad_a1 = results.grad_a1.data();
    args.grad_b1 = results.grad_b1.data();
    args.grad_a2 = results.grad_a2.data();
    args.grad_b2 = results.grad_b2.data();
    args.grad_initial = problem.options.initial ? results.grad_initial.data() : nullptr;
    std::vector<char> workspace(static_cast<size_t>(plan_duplex_query_views_backward<Element, kHeadDim>(args).bytes),
                                '\xff');
    duplex_query_views_backward<Element, kHeadDim>(args, workspace.data(), nullptr);
    return results;
  }

  template <class Element, int kHeadDim>
  static void check(const Shape& shape, const ViewsOptions& options = {}) {
    ViewsProblem<Element> problem(shape, options);
    const ViewsGradientOracle<Element> oracle(problem);
    Array<float> indicator = problem.grad_indicator;
    for (size_t i = 0; i < indicator.data.size(); ++i)
      indicator.data[i] = static_cast<float>(oracle.indicator.value.data[i]);
    const Results<Element> results = run<Element, kHeadDim>(problem, indicator);
    // Rounded, of results in the storage type: rows, features, scores, matrices, and the result.
    const double unit = 2 * ElementTraits<Element>::kUnit, sum_unit = 2 * kSumUnit<Element>;
    const auto expect = [](const char* name, const auto& got, const std::vector<double>& value,
                           const std::vector<double>& size,
                           double allowed) { expect_close(name, got, value, size, allowed, 1e-6); };
    expect("grad_query", results.grad_query.data, oracle.grad_query.value.data, oracle.grad_query.size.data, unit);
    expect("grad_key", results.grad_key.data, oracle.grad_key.value.data, oracle.grad_key.size.data, unit);
    expect("grad_scale", results.grad_scale.data, oracle.grad_scale.value.data, oracle.grad_scale.size.data, sum_unit);
    expect("grad_a1", results.grad_a1, oracle.grad_a1.value, oracle.grad_a1.size, sum_unit);
    expect("grad_b1", results.grad_b1, oracle.grad_b1.value, oracle.grad_b1.size, sum_unit);
    expect("grad_a2", results.grad_a2, oracle.grad_a2.value, oracle.grad_a2.size, sum_unit);
    expect("grad_b2", results.grad_b2, oracle.grad_b2.value, oracle.grad_b2.size, sum_unit);
    if (problem.options.initial) {
      expect("grad_initial", results.grad_initial, oracle.grad_initial.data, oracle.grad_initial_size.data, sum_unit);
    }
  }
};

TEST(CudaDuplexQueryViewsBackward, SegmentsAndState) {
  Shape shape = dense({600}, {600}, 64);
  ViewsBackward::check<BFloat16, 64>(shape);
  shape.padding = 0.1;
  shape.queries = {330};
  ViewsBackward::check<Float16, 64>(shape);
  ViewsBackward::check<float, 64>(shape, {{true, false}});
  check_under_every_schedule<ViewsBackward, float, 64>(dense({300}, {300}, 64), ViewsOptions{{true, false}});
}
TEST(CudaDuplexQueryViewsBackward, EveryHeadSize) { check_every_head_size<ViewsBackward>(dense({70}, {300}, 0)); }
TEST(CudaDuplexQueryViewsBackward, HeadSizesBetween) { check_head_sizes_between<ViewsBackward>(); }
TEST(CudaDuplexQueryViewsBackward, TilesOfSeveralModalities) {
  Shape shape = dense({70}, {150}, 32);
  shape.layout = Layout::kShuffled;
  shape.modalities = 4;
  shape.padding = 0.2;
  check_under_every_schedule<ViewsBackward, BFloat16, 32>(shape);
  shape.modalities = 16;
  shape.queries = {20};
  shape.keys = {90};
  ViewsBackward::check<float, 32>(shape);
}
TEST(CudaDuplexQueryViewsBackward, PaddingHoldsAnything) { check_padding<ViewsBackward>(); }
TEST(CudaDuplexQueryViewsBackward, Ranks) {
  for (const int rank : {1, 32, 33, 128}) {
    ViewsBackward::check<BFloat16, 32>(dense({70}, {300}, 32), {{}, rank});
    ViewsBackward::check<float, 64>(dense({70}, {300}, 40), {{}, rank});
  }
}
TEST(CudaDuplexQueryViewsBackward, OneModality) {
  Shape shape = dense({70}, {300}, 32);
  shape.modalities = 1;
  ViewsBackward::check<BFloat16, 32>(shape);
  ViewsBackward::check<float, 32>(shape, {{true, false}});
  ViewsBackward::check<float, 32>(shape, {{true, false}, 20, false, false});
}
TEST(CudaDuplexQueryViewsBackward, RawKeysAndGroups) {
  Shape shape = dense({130, 130}, {300, 300}, 40);
  shape.tokens_first = true;
  shape.query_heads = 4;
  shape.kv_heads = 2;
  shape.modalities = 3;
  ViewsBackward::check<Float16, 64>(shape, {{false, true}});
  ViewsBackward::check<float, 64>(shape, {{false, false}});
}
TEST(CudaDuplexQueryViewsBackward, KeysOfLengthZero) {
  ViewsBackward::check<BFloat16, 32>(dense({90}, {90}, 32), {{true, true, true}, 20, true, false});
}
TEST(CudaDuplexQueryViewsBackward, StatesBeyondFloat16) {
  ViewsBackward::check<Float16, 32>(dense({90}, {300}, 32), {{}, 20, true, true, 1e6f, 1, 1e-6f});
}
TEST(CudaDuplexQueryViewsBackward, ScalesOfTheIndicatorFarBelowTheOthers) {
  const Shape shape = dense({300}, {300}, 32);
  ViewsBackward::check<Float16, 32>(shape, {{}, 20, true, false, 1e-4f, 0, 1e-3f});
  ViewsBackward::check<float, 32>(shape, {{}, 20, true, false, 1e-4f, 0, 1e-3f});
}
TEST(CudaDuplexQueryViewsBackward, EveryChoiceOfGradients) {
  for (const bool indicator : {false, true})
    for (const bool gram : {false, true}) {
      ViewsBackward::check<BFloat16, 32>(dense({90}, {300}, 32), {{}, 20, indicator, gram});
      ViewsBackward::check<float, 32>(dense({90}, {90}, 32), {{true, false}, 20, indicator, gram});
    }
}
TEST(CudaDuplexQueryViewsBackward, WeightGradientsOfManyRows) {
  Shape shape = dense({600}, {600}, 32);
  shape.query_heads = 4;
  shape.modalities = 4;
  ViewsBackward::check<Float16, 32>(shape, {{}, 33});
}
TEST(CudaDuplexQueryViewsBackward, OneToken) {
  ViewsBackward::check<BFloat16, 32>(dense({1, 1}, {1, 1}, 32));
  ViewsBackward::check<float, 32>(dense({1}, {1}, 32), {{true, false}});
  ViewsBackward::check<BFloat16, 32>(dense({0}, {40}, 32));
  ViewsBackward::check<BFloat16, 32>(dense({0}, {0}, 32));
}
TEST(CudaDuplexQueryViewsBackward, EveryScheduleGivesTheSameBits) {
  ViewsProblem<BFloat16> problem(dense({300}, {300}, 32), {});
  Array<float> indicator = problem.grad_indicator;
  const auto first = ViewsBackward::run<BFloat16, 32>(problem, indicator);
  emulation::set_schedule(emulation::Schedule::kRandom, 3);
  const auto other = ViewsBackward::run<BFloat16, 32>(problem, indicator);
  emulation::set_schedule(emulation::Schedule::kFirstWarp);
  const auto expect_same = [](const auto& a, const auto& b) {
    EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])), 0);
  };
  expect_same(first.grad_query.data, other.grad_query.data);
  expect_same(first.grad_key.data, other.grad_key.data);
  expect_same(first.grad_scale.data, other.grad_scale.data);
  expect_same(first.grad_a1, other.grad_a1);
  expect_same(first.grad_b1, other.grad_b1);
  expect_same(first.grad_a2, other.grad_a2);
  expect_same(first.grad_b2, other.grad_b2);
  expect_same(first.grad_initial, other.grad_initial);
}

}  // namespace
}  // namespace cuda
}  // namespace moda_ext
