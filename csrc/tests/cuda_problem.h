// Attention problems for the CUDA kernels in emulation, what plain loops in double precision make of them, and the
// cases that both directions are checked on.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "cuda/ptx.h"

namespace moda_ext {
namespace cuda {

constexpr double kInfinite = std::numeric_limits<double>::infinity();

template <class Element>
struct ElementTraits;
template <>
struct ElementTraits<BFloat16> {
  static constexpr double kUnit = 1.0 / 256;  // of one rounding, with room for a second
};
template <>
struct ElementTraits<Float16> {
  static constexpr double kUnit = 1.0 / 2048;
};
template <>
struct ElementTraits<float> {
  static constexpr double kUnit = 5e-7;
};

enum class Layout { kRuns, kShuffled, kOne };  // of modalities over the keys

struct Shape {
  std::vector<int> queries, keys;  // of every sequence
  int query_heads = 2, kv_heads = 1, head_dim = 32, modalities = 2;
  bool packed = false, views = false, causal = false, tokens_first = false;
  bool bias = true, sink = true;
  Layout layout = Layout::kRuns;
  double padding = 0.0;  // share of padded keys, at both ends of a sequence and, shuffled, in between
  double hidden = 0.0;   // share of (row block of 40, modality) pairs with bias -inf, and of single rows
  double scale = 0.25;
  std::vector<float> numbers;  // not empty: what biases and sinks are drawn from
  uint32_t seed = 1;
};

inline Shape dense(std::vector<int> queries, std::vector<int> keys, int head_dim) {
  Shape shape;
  shape.queries = std::move(queries);
  shape.keys = std::move(keys);
  shape.head_dim = head_dim;
  return shape;
}

// A tensor of numbers (sequence or packed tokens, head, token, last), in the memory order that the shape asks for.
template <class T>
struct Array {
  std::vector<T> data;
  int64_t batch = 0, head = 0, row = 0, view = 0;

  Array() = default;
  Array(const Shape& shape, int heads, int64_t tokens, int last, int views, T fill) {
    const int64_t batches = shape.packed ? 1 : static_cast<int64_t>(shape.queries.size());
    const bool rows_first = shape.packed || shape.tokens_first;
    row = rows_first ? static_cast<int64_t>(heads) * last : last;
    head = rows_first ? last : tokens * last;
    batch = heads * tokens * last;
    view = batches * batch;
    data.assign(static_cast<size_t>(views * view), fill);
  }
  T* at(int64_t b, int64_t h, int64_t token, int v = 0) {
    return data.data() + v * view + b * batch + h * head + token * row;
  }
  const T* at(int64_t b, int64_t h, int64_t token, int v = 0) const {
    return const_cast<Array*>(this)->at(b, h, token, v);
  }
  template <class Operand>
  Operand operand(int views) {
    Operand result;
    result.data = data.data();
    result.batch = batch;
    result.head = head;
    result.row = row;
    result.view = views > 1 ? view : 0;
    return result;
  }
};

template <class Element>
struct Problem {
  Shape shape;
  int num_views, group, total_queries, total_keys, max_queries, max_keys;
  std::vector<int32_t> cu_seqlens_q, cu_seqlens_k, modality;
  Array<Element> query, key, value, grad_out;
  Array<float> bias, sink, grad_lse, grad_mass;

  explicit Problem(const Shape& s) : shape(s) {
    std::mt19937 random(s.seed);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<double> uniform;
    num_views = s.views ? s.modalities : 1;
    group = s.query_heads / s.kv_heads;
    cu_seqlens_q = {0};
    cu_seqlens_k = {0};
    max_queries = max_keys = 0;
    for (size_t i = 0; i < s.queries.size(); ++i) {
      cu_seqlens_q.push_back(cu_seqlens_q.back() + s.queries[i]);
      cu_seqlens_k.push_back(cu_seqlens_k.back() + s.keys[i]);
      max_queries = std::max(max_queries, s.queries[i]);
      max_keys = std::max(max_keys, s.keys[i]);
    }
    total_queries = s.packed ? cu_seqlens_q.back() : max_queries;  // rows of the tensors
    total_keys = s.packed ? cu_seqlens_k.back() : max_keys;
    const auto fill = [&](Array<Element>& array) {
      for (Element& x : array.data) x = from_float<Element>(normal(random));
    };
    query = Array<Element>(s, s.query_heads, total_queries, s.head_dim, num_views, Element{});
    key = Array<Element>(s, s.kv_heads, total_keys, s.head_dim, 1, Element{});
    value = key;
    grad_out = Array<Element>(s, s.query_heads, total_queries, s.head_dim, 1, Element{});
    fill(query);
    fill(key);
    fill(value);
    fill(grad_out);
    bias = Array<float>(s, s.query_heads, total_queries, s.modalities, 1, 0.0f);
    grad_mass = bias;
    sink = Array<float>(s, s.query_heads, total_queries, 1, 1, 0.0f);
    grad_lse = sink;
    for (float& x : bias.data) x = normal(random);
    for (float& x : sink.data) x = uniform(random) < 0.1 ? -INFINITY : normal(random);
    for (float& x : grad_lse.data) x = normal(random);
    for (float& x : grad_mass.data) x = normal(random);
    for (std::vector<float>* values : {&bias.data, &sink.data})
      for (float& x : *values)
        if (!s.numbers.empty() && !std::isinf(x)) x = s.numbers[random() % s.numbers.size()];

    modality.assign(s.packed ? static_cast<size_t>(total_keys) : s.keys.size() * static_cast<size_t>(total_keys), 0);
    const float nan = NAN;
    for (size_t i = 0; i < s.keys.size(); ++i) {
      int32_t* ids = modality.data() + first_id(i);
      int current = static_cast<int>(random() % s.modalities);
      for (int j = 0; j < s.keys[i]; ++j) {
        if (s.layout == Layout::kShuffled || (s.layout == Layout::kRuns && uniform(random) < 0.02))
          current = static_cast<int>(random() % s.modalities);
        const double place = (j + 0.5) / s.keys[i];
        const bool edge = place < s.padding / 2 || place > 1 - s.padding / 2;
        const bool inside = s.layout == Layout::kShuffled && uniform(random) < s.padding;
        ids[j] = edge || inside ? (random() % 2 ? -1 : s.modalities + 3) : current;
        if (ids[j] >= 0 && ids[j] < s.modalities) continue;
        for (int h = 0; h < s.kv_heads; ++h)  // padding holds anything
          for (int d = 0; d < s.head_dim; ++d)
            key.at(batch(i), h, first_key(i) + j)[d] = value.at(batch(i), h, first_key(i) + j)[d] =
                from_float<Element>(nan);
      }
      for (int h = 0; h < s.query_heads && s.hidden > 0; ++h) {
        for (int m = 0; m < s.modalities; ++m) {
          bool block_hidden = false;
          for (int row = 0; row < s.queries[i]; ++row) {
            if (row % 40 == 0) block_hidden = uniform(random) < s.hidden;
            if (block_hidden || uniform(random) < s.hidden / 4)
              bias.at(batch(i), h, first_query(i) + row)[m] = -INFINITY;
          }
        }
      }
    }
  }

  int64_t batch(size_t sequence) const { return shape.packed ? 0 : static_cast<int64_t>(sequence); }
  int64_t first_query(size_t sequence) const { return shape.packed ? cu_seqlens_q[sequence] : 0; }
  int64_t first_key(size_t sequence) const { return shape.packed ? cu_seqlens_k[sequence] : 0; }
  size_t first_id(size_t sequence) const {
    return shape.packed ? static_cast<size_t>(cu_seqlens_k[sequence]) : sequence * static_cast<size_t>(total_keys);
  }

  template <class Args>
  void fill(Args& args) {
    args.head_dim = shape.head_dim;
    args.num_modalities = shape.modalities;
    args.num_views = num_views;
    args.query_heads = shape.query_heads;
    args.kv_heads = shape.kv_heads;
    args.causal = shape.causal;
    args.scale = static_cast<float>(shape.scale);
    args.num_sequences = static_cast<int>(shape.queries.size());
    args.num_queries = max_queries;
    args.num_keys = max_keys;
    args.rows_per_batch = total_queries;
    args.total_keys = total_keys;
    if (shape.packed) {
      args.cu_seqlens_q = cu_seqlens_q.data();
      args.cu_seqlens_k = cu_seqlens_k.data();
    }
    args.key_modality = modality.data();
    args.modality_batch = total_keys;
    args.query = query.template operand<Input>(num_views);
    args.key = key.template operand<Input>(1);
    args.value = value.template operand<Input>(1);
    if (shape.bias) args.bias = bias.template operand<Input>(1);
    if (shape.sink) args.sink = sink.template operand<Input>(1);
  }
};

// The equations of docs/mathematics.md sections 2 and 3 in double precision. Beside each result the sum of the magnitudes that went
// into it: what a rounding error is relative to.
template <class Element>
struct Oracle {
  Array<double> out, out_size, lse, lse_residual, lse_size, mass;  // lse is rounded to float; size: beside the base
  Array<double> grad_query, grad_query_size, grad_key, grad_key_size, grad_value, grad_value_size;
  Array<double> grad_bias, grad_bias_size, grad_sink, grad_sink_size;
  double largest = 1;  // sum of magnitudes in a score: its float32 rounding error, relative to this, is one of p

  explicit Oracle(const Problem<Element>& p) {
    const Shape& s = p.shape;
    out = out_size = Array<double>(s, s.query_heads, p.total_queries, s.head_dim, 1, 0.0);
    lse = lse_residual = lse_size = grad_sink = grad_sink_size =
        Array<double>(s, s.query_heads, p.total_queries, 1, 1, 0.0);
    mass = grad_bias = grad_bias_size = Array<double>(s, s.query_heads, p.total_queries, s.modalities, 1, 0.0);
    grad_query = grad_query_size = Array<double>(s, s.query_heads, p.total_queries, s.head_dim, p.num_views, 0.0);
    grad_key = grad_key_size = grad_value = grad_value_size =
        Array<double>(s, s.kv_heads, p.total_keys, s.head_dim, 1, 0.0);
    for (size_t i = 0; i < s.queries.size(); ++i)
      for (int h = 0; h < s.query_heads; ++h)
        for (int row = 0; row < s.queries[i]; ++row) differentiate_row(p, i, h, row);
  }

 private:
  void differentiate_row(const Problem<Element>& p, size_t i, int h, int row) {
    const Shape& s = p.shape;
    const int64_t b = p.batch(i), query = p.first_query(i) + row;
    const int kv = h / p.group, D = s.head_dim;
    const double sink = s.sink ? *p.sink.at(b, h, query) : -kInfinite;
    std::vector<int> seen;
    double base = sink;  // the largest number that is added to a score, or the sink: what all are relative to
    const auto prior_of = [&](int id) { return s.bias ? double{p.bias.at(b, h, query)[id]} : 0.0; };
    for (int j = 0; j < s.keys[i]; ++j) {
      const int id = p.modality[p.first_id(i) + j];
      if (id < 0 || id >= s.modalities || (s.causal && j > row + s.keys[i] - s.queries[i])) continue;
      if (prior_of(id) == -kInfinite) continue;
      seen.push_back(j);
      base = std::max(base, prior_of(id));
    }
    if (base == -kInfinite) base = 0;
    const double c = sink - base;
    double highest = c;
    std::vector<double> scores;
    for (const int j : seen) {
      const int id = p.modality[p.first_id(i) + j];
      const Element* q = p.query.at(b, h, query, p.num_views > 1 ? id : 0);
      const Element* k = p.key.at(b, kv, p.first_key(i) + j);
      double product = 0, magnitude = 0;
      for (int d = 0; d < D; ++d) {
        product += double{to_float(q[d])} * to_float(k[d]);
        magnitude += std::abs(double{to_float(q[d])} * to_float(k[d]));
      }
      largest = std::max(largest, std::abs(s.scale) * magnitude);
      scores.push_back(s.scale * product + (prior_of(id) - base));
      highest = std::max(highest, scores.back());
    }
    double total = c == -kInfinite ? 0 : std::exp(c - highest);
    for (double score : scores) total += std::exp(score - highest);
    const double L = total == 0 ? -kInfinite : highest + std::log(total);
    const double rounded = static_cast<float>(base + L);
    *lse.at(b, h, query) = rounded;
    *lse_residual.at(b, h, query) = total == 0 ? 0 : L - (rounded - base);
    *lse_size.at(b, h, query) = total == 0 ? 0 : std::abs(L);
    double delta = -*p.grad_lse.at(b, h, query), delta_size = std::abs(delta);
    std::vector<double> probability(seen.size()), grad_probability(seen.size());
    for (size_t n = 0; n < seen.size(); ++n) {
      const int id = p.modality[p.first_id(i) + seen[n]];
      const Element* v = p.value.at(b, kv, p.first_key(i) + seen[n]);
      probability[n] = std::exp(scores[n] - L);
      mass.at(b, h, query)[id] += probability[n];
      double size = 0;
      for (int d = 0; d < D; ++d) {
        const double g = to_float(p.grad_out.at(b, h, query)[d]);
        out.at(b, h, query)[d] += probability[n] * to_float(v[d]);
        out_size.at(b, h, query)[d] += probability[n] * std::abs(to_float(v[d]));
        grad_probability[n] += g * to_float(v[d]);
        size += std::abs(g * to_float(v[d]));
      }
      grad_probability[n] += p.grad_mass.at(b, h, query)[id];
      delta += probability[n] * grad_probability[n];
      delta_size += probability[n] * (size + std::abs(p.grad_mass.at(b, h, query)[id]));
    }
    for (size_t n = 0; n < seen.size(); ++n) {
      const int id = p.modality[p.first_id(i) + seen[n]], view = p.num_views > 1 ? id : 0;
      const int64_t key = p.first_key(i) + seen[n];
      const double grad = probability[n] * (grad_probability[n] - delta);
      const double size = probability[n] * (std::abs(grad_probability[n]) + delta_size);
      grad_bias.at(b, h, query)[id] += grad;
      grad_bias_size.at(b, h, query)[id] += size;
      for (int d = 0; d < D; ++d) {
        const double q = to_float(p.query.at(b, h, query, view)[d]), k = to_float(p.key.at(b, kv, key)[d]);
        const double g = to_float(p.grad_out.at(b, h, query)[d]);
        grad_query.at(b, h, query, view)[d] += s.scale * grad * k;
        grad_query_size.at(b, h, query, view)[d] += std::abs(s.scale * k) * size;
        grad_key.at(b, kv, key)[d] += s.scale * grad * q;
        grad_key_size.at(b, kv, key)[d] += std::abs(s.scale * q) * size;
        grad_value.at(b, kv, key)[d] += probability[n] * g;
        grad_value_size.at(b, kv, key)[d] += probability[n] * std::abs(g);
      }
    }
    const double share = c == -kInfinite ? 0 : std::exp(c - L);
    *grad_sink.at(b, h, query) = -share * delta;
    *grad_sink_size.at(b, h, query) = share * delta_size;
  }
};

// Each number within unit * (its own magnitude + that of what was summed into it) + floor.
template <class Element>
void expect_close(const char* name, const std::vector<Element>& got, const std::vector<double>& expected,
                  const std::vector<double>& size, double unit, double floor) {
  ASSERT_EQ(got.size(), expected.size());
  int wrong = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double value = to_float(got[i]), tolerance = unit * (size[i] + std::abs(expected[i])) + floor;
    const bool close = std::isinf(expected[i]) ? value == expected[i] : std::abs(value - expected[i]) <= tolerance;
    if (close) continue;
    if (++wrong <= 5) {
      ADD_FAILURE() << name << "[" << i << "]: expected " << expected[i] << ", got " << value << ", tolerance "
                    << tolerance;
    }
  }
  EXPECT_EQ(wrong, 0) << "of " << got.size() << " numbers of " << name;
}

// Below, a Direction has static check<Element, kHeadDim>(shape, options...), which runs its kernels on the problem and
// compares.
template <class Direction, class Element, int kHeadDim, class... Options>
void check_under_every_schedule(const Shape& shape, const Options&... options) {
  using emulation::Schedule;
  for (const Schedule schedule : {Schedule::kFirstWarp, Schedule::kLastWarp, Schedule::kRandom}) {
    emulation::set_schedule(schedule, shape.seed);
    Direction::template check<Element, kHeadDim>(shape, options...);
    if (testing::Test::HasFailure()) break;
  }
  emulation::set_schedule(Schedule::kFirstWarp);
}

template <class Direction>
void check_every_head_size(Shape shape) {
  const auto of = [&](int head_dim) {
    shape.head_dim = head_dim;
    return shape;
  };
  Direction::template check<BFloat16, 32>(of(32));
  Direction::template check<BFloat16, 96>(of(96));
  Direction::template check<BFloat16, 128>(of(128));
  Direction::template check<BFloat16, 192>(of(192));
  Direction::template check<BFloat16, 256>(of(256));
  Direction::template check<float, 32>(of(32));
  Direction::template check<float, 64>(of(64));
  Direction::template check<float, 96>(of(96));
  Direction::template check<float, 128>(of(128));
  Direction::template check<float, 192>(of(192));
  Direction::template check<float, 256>(of(256));
}
template <class Direction>
void check_head_sizes_between() {
  Direction::template check<BFloat16, 32>(dense({20}, {90}, 8));
  Direction::template check<BFloat16, 96>(dense({20}, {90}, 72));
  Direction::template check<Float16, 256>(dense({20}, {90}, 200));
  Direction::template check<Float16, 192>(dense({20}, {60}, 136));
  Direction::template check<float, 64>(dense({20}, {90}, 40));
}
template <class Direction>
void check_tiles_of_several_modalities() {
  Shape shape = dense({90}, {170}, 32);
  shape.layout = Layout::kShuffled;
  shape.modalities = 4;
  shape.padding = 0.2;
  check_under_every_schedule<Direction, BFloat16, 32>(shape);
  shape.modalities = 16;
  Direction::template check<float, 32>(shape);
}
// Numbers that a whole row has in common, and such of every size.
template <class Direction>
void check_large_numbers(Shape shape) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  for (const float number : {1e3f, -1e6f, 1e9f, -1e9f, -1e10f, 1e30f, -kLargest, kLargest}) {
    SCOPED_TRACE(number);
    const float next = std::nextafter(number, 0.0f), other = std::abs(next - number) < 1 ? number - 1 : next;
    shape.numbers = {number, number, other};
    Direction::template check<float, 32>(shape);
  }
  shape.numbers = {0, 1, -1e3f, 1e3f, -1e9f, 1e9f, -1e10f, 1e30f, -kLargest, kLargest};
  for (const Layout layout : {Layout::kRuns, Layout::kShuffled}) {
    shape.layout = layout;
    Direction::template check<BFloat16, 32>(shape);
    Direction::template check<float, 32>(shape);
  }
}
template <class Direction>
void check_padding() {
  Shape shape = dense({80, 80}, {200, 200}, 64);
  shape.padding = 0.5;
  Direction::template check<BFloat16, 64>(shape);
  shape.padding = 2.0;  // nothing but padding
  Direction::template check<BFloat16, 64>(shape);
  shape.sink = false;
  Direction::template check<float, 64>(shape);
}
template <class Direction>
void check_hidden_modalities(Shape shape) {
  shape.hidden = 0.5;
  shape.sink = false;
  check_under_every_schedule<Direction, BFloat16, 64>(shape);
  shape.hidden = 4;  // every row sees nothing
  Direction::template check<BFloat16, 64>(shape);
  shape.sink = true;
  Direction::template check<float, 64>(shape);
}

}  // namespace cuda
}  // namespace moda_ext
