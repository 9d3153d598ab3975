// The CUDA kernels of duplex_query_views_backward, run on the CPU by csrc/cuda/emulation, against plain loops in double.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/sm80/duplex_query_views_backward.h"
#include "cuda_gram_problem.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {
namespace {

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
}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
