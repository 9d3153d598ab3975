// The operators on a cache in pages through PyTorch's dispatcher, on pages in any order: equal to the operators on keys
// in a row, by other ways to the same numbers, at sizes around every edge. Run with the sanitizers it shows that nothing
// outside of the pages is read. Python's tests compare with the reference.
#include <gtest/gtest.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <random>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;

constexpr int64_t kModalities = 2, kRank = 4;

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
Tensor integers(const std::vector<int32_t>& values) {
  Tensor result = torch::stable::empty({static_cast<int64_t>(values.size())}, ScalarType::Int);
  std::copy(values.begin(), values.end(), data<int32_t>(result));
  return result;
}

struct Sequence {
  int64_t length, rows;
};

// Sequences in pages, filled by paged_cache_update.
struct Problem {
  int64_t heads, kv_heads, head_dim, block;
  std::vector<Sequence> sequences;
  std::mt19937 generator{11};
  Tensor key, value, query, cache, table, modality;
  std::vector<int32_t> lengths, starts{0}, row_modality;
  std::vector<int64_t> slots;

  Problem(int64_t heads_, int64_t kv_heads_, int64_t head_dim_, int64_t block_, std::vector<Sequence> sequences_)
      : heads(heads_), kv_heads(kv_heads_), head_dim(head_dim_), block(block_), sequences(std::move(sequences_)) {
    int64_t tokens = 0, pages = 0, longest = 1;
    for (const Sequence& sequence : sequences) {
      tokens += sequence.length;
      pages += (sequence.length + block - 1) / block;
      longest = std::max(longest, (sequence.length + block - 1) / block);
    }
    key = random({tokens, kv_heads, head_dim});
    value = random({tokens, kv_heads, head_dim});
    cache = random({pages + 1, kv_heads, block, 2 * head_dim + 1});
    std::vector<int32_t> order(static_cast<size_t>(pages + 1)), ids;
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    std::shuffle(order.begin(), order.end(), generator);
    table = torch::stable::empty({static_cast<int64_t>(sequences.size()), longest}, ScalarType::Int);
    std::fill_n(data<int32_t>(table), table.numel(), -7);  // what is not read may hold anything
    int64_t page = 0;
    for (size_t s = 0; s < sequences.size(); ++s) {
      for (int64_t j = 0; j < sequences[s].length; ++j) {
        if (j % block == 0) data<int32_t>(table)[static_cast<int64_t>(s) * longest + j / block] = order[page++];
        slots.push_back(order[page - 1] * block + j % block);
        ids.push_back(static_cast<int32_t>(generator() % kModalities));
        if (j >= sequences[s].length - sequences[s].rows) row_modality.push_back(ids.back());
      }
      lengths.push_back(static_cast<int32_t>(sequences[s].length));
      starts.push_back(starts.back() + static_cast<int32_t>(sequences[s].rows));
    }
    modality = integers(ids);
    query = random({starts.back(), heads, head_dim});
    Tensor slot_mapping = torch::stable::empty({tokens}, ScalarType::Long);
    std::copy(slots.begin(), slots.end(), data<int64_t>(slot_mapping));
    std::vector<StableIValue> stack = {from(key), from(value), from(modality), from(cache), from(slot_mapping)};
    EXPECT_EQ(torch_call_dispatcher("moda_ext::paged_cache_update", "", stack.data(), TORCH_ABI_VERSION), 0);
  }

  Tensor random(const std::vector<int64_t>& sizes) {
    std::uniform_real_distribution<float> distribution(-1, 1);
    Tensor result = torch::stable::empty(sizes, ScalarType::Float);
    for (int64_t i = 0; i < result.numel(); ++i) data<float>(result)[i] = distribution(generator);
    return result;
  }

  // Status of the call; `out` is filled if it is 0.
  int attend(Tensor* out) const {
    const std::optional<Tensor> none;
    std::vector<StableIValue> stack = {
        from(query), from(cache),       from(table), from(integers(lengths)), from(integers(starts)), from(none),
        from(none),  from(kModalities), from(0.3)};
    const int status = torch_call_dispatcher("moda_ext::paged_modular_attention", "", stack.data(), TORCH_ABI_VERSION);
    for (int i = 0; status == 0 && i < 3; ++i) {
      const Tensor result = torch::stable::detail::to<Tensor>(stack[i]);
      if (i == 0) *out = result;
    }
    return status;
  }
  // A layer's step: the tokens of the rows, wherever the cache has something of them, and the result in `out`.
  int step(const std::vector<Tensor>& weights, const std::optional<Tensor>& by_modality, const Tensor& new_key,
           const Tensor& new_value, const Tensor& new_slots, const Tensor& out) const {
    const std::optional<Tensor> none;
    const auto weight = [&](size_t i) { return weights.empty() ? none : std::optional<Tensor>(weights[i]); };
    std::vector<StableIValue> stack = {from(query),
                                       from(new_key),
                                       from(new_value),
                                       from(integers(row_modality)),
                                       from(new_slots),
                                       from(cache),
                                       from(table),
                                       from(integers(lengths)),
                                       from(integers(starts)),
                                       from(weight(0)),
                                       from(weight(1)),
                                       from(weight(2)),
                                       from(weight(3)),
                                       from(by_modality),
                                       from(weights.empty() ? none : by_modality),
                                       from(none),
                                       from(kModalities),
                                       from(true),
                                       from(true),
                                       from(1e-6),
                                       from(0.3),
                                       from(out)};
    const int status = torch_call_dispatcher("moda_ext::paged_attention_step", "", stack.data(), TORCH_ABI_VERSION);
    if (status == 0) torch::stable::detail::to<Tensor>(stack[0]);  // the mass, which nobody asks for
    return status;
  }
  int attend_aligned(const std::vector<Tensor>& weights, const Tensor& condition, Tensor* out) const {
    const std::optional<Tensor> none, factor = condition;
    std::vector<StableIValue> stack = {from(query),
                                       from(integers(row_modality)),
                                       from(cache),
                                       from(table),
                                       from(integers(lengths)),
                                       from(integers(starts)),
                                       from(weights[0]),
                                       from(weights[1]),
                                       from(weights[2]),
                                       from(weights[3]),
                                       from(none),
                                       from(factor),
                                       from(none),
                                       from(kModalities),
                                       from(true),
                                       from(true),
                                       from(1e-6),
                                       from(0.3)};
    const int status = torch_call_dispatcher("moda_ext::paged_duplex_attention", "", stack.data(), TORCH_ABI_VERSION);
    for (int i = 0; status == 0 && i < 3; ++i) {
      const Tensor result = torch::stable::detail::to<Tensor>(stack[i]);
      if (i == 0) *out = result;
    }
    return status;
  }
};

// The rows [first, first + count) of a tensor (rows, ...), copied.
Tensor rows_of(const Tensor& tensor, int64_t first, int64_t count) {
  std::vector<int64_t> sizes = {count};
  int64_t width = 1;
  for (int64_t d = 1; d < tensor.dim(); ++d) {
    sizes.push_back(tensor.size(d));
    width *= tensor.size(d);
  }
  Tensor result = torch::stable::empty(sizes, ScalarType::Float);
  if (result.numel() == 0) return result;
  std::memcpy(data<float>(result), data<float>(tensor) + first * width,
              sizeof(float) * static_cast<size_t>(count * width));
  return result;
}

void expect_near(const Tensor& found, const Tensor& expected, const char* what) {
  ASSERT_EQ(found.numel(), expected.numel());
  for (int64_t i = 0; i < found.numel(); ++i)
    ASSERT_NEAR(data<float>(found)[i], data<float>(expected)[i], 2e-5) << what << " at " << i;
}

TEST(PagedAttention, IsThatOfKeysInARow) {
  for (int64_t block : {1, 16, 50})
    for (int64_t head_dim : {8, 40, 128}) {
      Problem problem(4, 2, head_dim, block, {{1, 1}, {0, 0}, {70, 70}, {300, 1}, {90, 30}, {40, 5}});
      Tensor out;
      ASSERT_EQ(problem.attend(&out), 0);
      int64_t first_key = 0;
      for (size_t s = 0; s < problem.sequences.size(); ++s) {
        const auto [length, rows] = problem.sequences[s];
        const std::vector<int32_t> ends = {0, static_cast<int32_t>(length)}, row_ends = {0, static_cast<int32_t>(rows)};
        const std::optional<Tensor> none;
        const int32_t* ids = data<int32_t>(problem.modality) + first_key;
        std::vector<StableIValue> stack = {from(rows_of(problem.query, problem.starts[s], rows)),
                                           from(rows_of(problem.key, first_key, length)),
                                           from(rows_of(problem.value, first_key, length)),
                                           from(integers(std::vector<int32_t>(ids, ids + length))),
                                           from(integers(row_ends)),
                                           from(integers(ends)),
                                           from(none),
                                           from(none),
                                           from(rows),
                                           from(length),
                                           from(kModalities),
                                           from(true),
                                           from(0.3)};
        ASSERT_EQ(torch_call_dispatcher("moda_ext::modular_attention_varlen", "", stack.data(), TORCH_ABI_VERSION), 0);
        for (int i = 0; i < 4; ++i) {
          const Tensor result = torch::stable::detail::to<Tensor>(stack[i]);
          if (i == 0) expect_near(rows_of(out, problem.starts[s], rows), result, "out");
        }
        first_key += length;
      }
    }
}

// A decoded row comes by a linear attention, the last row of a prompt by Grams, and one with many keys before it by
// their Gram first.
TEST(PagedAttention, ADecodedRowIsTheLastOfAPrompt) {
  for (int64_t head_dim : {8, 40, 128})
    for (int64_t length : {1, 40, 300, 700}) {
      Problem prompt(6, 2, head_dim, 16, {{length, length}});
      std::vector<Tensor> weights;
      for (int i = 0; i < 4; ++i)
        weights.push_back(i % 2 == 0 ? prompt.random({kModalities, head_dim, kRank})
                                     : prompt.random({kModalities, kRank, head_dim}));
      const Tensor condition = prompt.random({length, 6, kModalities});
      Tensor whole;
      ASSERT_EQ(prompt.attend_aligned(weights, condition, &whole), 0);
      for (int64_t rows : {int64_t{1}, int64_t{5}, int64_t{30}}) {
        if (rows > length) continue;
        Problem chunk = prompt;
        chunk.query = rows_of(prompt.query, length - rows, rows);
        chunk.row_modality.assign(prompt.row_modality.end() - rows, prompt.row_modality.end());
        chunk.starts = {0, static_cast<int32_t>(rows)};
        Tensor out;
        ASSERT_EQ(chunk.attend_aligned(weights, rows_of(condition, length - rows, rows), &out), 0);
        expect_near(out, rows_of(whole, length - rows, rows), "out");
      }
    }
}

TEST(PagedAttention, AStepIsAnUpdateAndAttention) {
  for (int64_t head_dim : {8, 40, 128}) {
    Problem problem(6, 2, head_dim, 16, {{1, 1}, {70, 70}, {300, 1}, {90, 30}, {0, 0}, {40, 5}});
    std::vector<Tensor> weights;
    for (int i = 0; i < 4; ++i)
      weights.push_back(i % 2 == 0 ? problem.random({kModalities, head_dim, kRank})
                                   : problem.random({kModalities, kRank, head_dim}));
    const int64_t rows = problem.starts.back();
    // No bias and no factor of the indicator, by way of tables.
    const Tensor nothing = torch::stable::empty({kModalities, 6, kModalities}, ScalarType::Float);
    std::fill_n(data<float>(nothing), nothing.numel(), 0.0f);
    const Tensor no_condition = torch::stable::empty({rows, 6, kModalities}, ScalarType::Float);
    std::fill_n(data<float>(no_condition), no_condition.numel(), 0.0f);
    Tensor plain, aligned;
    ASSERT_EQ(problem.attend(&plain), 0);
    ASSERT_EQ(problem.attend_aligned(weights, no_condition, &aligned), 0);
    // The rows' own tokens, which the step has to bring.
    const Tensor key = problem.random({rows, 2, head_dim}), value = problem.random({rows, 2, head_dim});
    const Tensor slots = torch::stable::empty({rows}, ScalarType::Long);
    int64_t token = 0, row = 0;
    const int64_t width = 2 * head_dim;
    for (const Sequence& sequence : problem.sequences) {
      token += sequence.length;
      for (int64_t i = token - sequence.rows; i < token; ++i, ++row) {
        std::copy_n(data<float>(problem.key) + i * width, width, data<float>(key) + row * width);
        std::copy_n(data<float>(problem.value) + i * width, width, data<float>(value) + row * width);
        const int64_t slot = data<int64_t>(slots)[row] = problem.slots[static_cast<size_t>(i)];
        for (int64_t head = 0; head < 2; ++head)
          std::fill_n(data<float>(problem.cache) + ((slot / 16 * 2 + head) * 16 + slot % 16) * (2 * head_dim + 1),
                      2 * head_dim + 1, NAN);
      }
    }
    const Tensor out = torch::stable::empty({rows, 6, head_dim}, ScalarType::Float);
    ASSERT_EQ(problem.step(weights, nothing, key, value, slots, out), 0);
    expect_near(out, aligned, "aligned");
    ASSERT_EQ(problem.step({}, nothing, key, value, slots, out), 0);
    expect_near(out, plain, "plain");
    EXPECT_NE(problem.step({}, problem.random({1, 6, kModalities}), value, key, slots, out), 0)
        << "a table without a row for each modality";
  }
}

TEST(PagedAttention, RefusesWhatWouldLeadOutsideOfThePages) {
  Tensor out;
  const Problem good(2, 1, 8, 4, {{10, 3}, {7, 1}});
  ASSERT_EQ(good.attend(&out), 0);
  Problem bad = good;
  bad.table = torch::stable::empty({2, 3}, ScalarType::Int);
  std::fill_n(data<int32_t>(bad.table), 6, 99);
  EXPECT_NE(bad.attend(&out), 0) << "a block that the cache has not";
  bad = good;
  bad.lengths = {13, 7};
  EXPECT_NE(bad.attend(&out), 0) << "more keys than the table has blocks for";
  bad = good;
  bad.lengths = {2, 7};
  EXPECT_NE(bad.attend(&out), 0) << "fewer keys than rows";
  bad = good;
  bad.starts = {0, 3, 5};
  EXPECT_NE(bad.attend(&out), 0) << "more rows than the query has";
}

}  // namespace
