// The CUDA kernels of duplex_query_views, run on the CPU by csrc/cuda/emulation, against plain loops in double.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/sm80/duplex_query_views_forward.h"
#include "cuda_gram_problem.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {
namespace {

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

}  // namespace
}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
