// Problems of the Gram family for the CUDA kernels in emulation: those of cuda_problem.h, and what else the operators
// take.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/gram_family_kernels.h"
#include "cuda_problem.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {

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

inline std::vector<float> random_numbers(size_t count, float scale = 1) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(count);
  for (float& x : numbers) x = scale * normal(random);
  return numbers;
}

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

}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
