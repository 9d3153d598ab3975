// The building blocks and the whole kernels of the instruction set in use, against plain loops in double. ctest
// runs this program once for each instruction set of the machine (ATEN_CPU_CAPABILITY).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "aligned_memory.h"
#include "core/runs.h"
#include "cpu/isa.h"
#include "cpu/kernels/modular_attention_kernels.h"
#include "primitives.h"

namespace moda_ext {
namespace cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class T>
const Primitives<T>& primitives();
template <>
const Primitives<float>& primitives<float>() {
  return MODA_EXT_VECTOR_ISA(primitives32)();
}
template <>
const Primitives<double>& primitives<double>() {
  return MODA_EXT_VECTOR_ISA(primitives64)();
}
const Conversions& conversions() { return MODA_EXT_VECTOR_ISA(conversions)(); }
const ModularAttentionKernels& kernels(Storage storage) {
#if defined(MODA_EXT_AMX_ISA)
  if (active_isa() == Isa::amx && storage != Storage::kFloat64) return modular_attention_kernels_amx(storage);
#endif
#if defined(MODA_EXT_PAIRS_ISA)
  if (active_isa() == Isa::pairs && storage == Storage::kBFloat16) return modular_attention_kernels_pairs();
#endif
  return MODA_EXT_VECTOR_ISA(modular_attention_kernels)(storage);
}

TEST(Isa, IsTheOneAskedFor) {
  const char* asked = std::getenv("MODA_EXT_TEST_ISA");
  if (asked == nullptr) GTEST_SKIP() << "MODA_EXT_TEST_ISA is not set; testing " << isa_name(active_isa());
  EXPECT_STREQ(isa_name(active_isa()), asked);
}

std::mt19937 generator(7);
template <class T>
std::vector<T> random_values(size_t count, double low = -1, double high = 1) {
  std::uniform_real_distribution<double> distribution(low, high);
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(distribution(generator));
  return values;
}

template <class T>
class Block : public testing::Test {
 protected:
  const Primitives<T>& p = primitives<T>();
  static constexpr double kTolerance = sizeof(T) == 4 ? 2e-6 : 4e-15;  // for each term of a sum

  void check_multiply(Product mode, bool transposed, int rows, int columns, int depth) {
    const int stride = p.scratch_stride;
    const std::vector<T> a = random_values<T>(static_cast<size_t>(transposed ? depth : rows) * stride);
    const std::vector<T> b = random_values<T>(static_cast<size_t>(depth) * p.panel);
    const std::vector<T> scale = random_values<T>(rows);
    const std::vector<T> before = random_values<T>(static_cast<size_t>(rows) * stride);
    std::vector<T> c = before;
    p.multiply(mode, transposed, rows, columns, depth, a.data(), b.data(), c.data(), scale.data());
    const int written = columns > p.lanes ? p.panel : p.lanes;
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < stride; ++j) {
        const T got = c[i * stride + j];
        if (j >= written) {
          ASSERT_EQ(got, before[i * stride + j]) << "wrote beyond its columns: " << i << ", " << j;
          continue;
        }
        double expected = mode == Product::kStore
                              ? 0
                              : before[i * stride + j] * (mode == Product::kScaledAdd ? double{scale[i]} : 1.0);
        for (int k = 0; k < depth; ++k)
          expected += static_cast<double>(transposed ? a[k * stride + i] : a[i * stride + k]) * b[k * p.panel + j];
        ASSERT_NEAR(got, expected, kTolerance * (depth + 1))
            << "row " << i << " column " << j << " of " << rows << " x " << columns;
      }
    }
  }
};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(Block, Types);

TYPED_TEST(Block, MultiplyEveryHeightBothWidths) {
  for (int rows = 1; rows <= this->p.rows; ++rows)
    for (int columns : {1, this->p.lanes, this->p.lanes + 1, this->p.panel})
      this->check_multiply(Product::kStore, false, rows, columns, 19);
}
TYPED_TEST(Block, MultiplyTransposed) {
  for (int rows = 1; rows <= this->p.rows; ++rows)
    for (int columns : {this->p.lanes, this->p.panel}) this->check_multiply(Product::kAdd, true, rows, columns, 23);
}
TYPED_TEST(Block, MultiplyScaledAdd) {
  for (int rows : {1, 4, 5, this->p.rows}) this->check_multiply(Product::kScaledAdd, false, rows, this->p.panel, 64);
}
TYPED_TEST(Block, MultiplyDepths) {
  for (int depth : {0, 1, 2, 8, 255, 256})
    this->check_multiply(Product::kAdd, false, this->p.rows, this->p.panel, depth);
}
TYPED_TEST(Block, MultiplyDepthsOfSeveralChains) {
  for (Product mode : {Product::kStore, Product::kAdd, Product::kScaledAdd})
    for (int depth : {64, 65, 128, 200, 256})
      for (int columns : {this->p.lanes, this->p.panel}) {
        this->check_multiply(mode, false, this->p.rows, columns, depth);
        this->check_multiply(mode, true, this->p.rows - 1, columns, depth);
      }
}
// A number to which adding 1 changes nothing swallows those of its own chain of 64 and no others.
TYPED_TEST(Block, MultiplyLosesNoMoreThanOneChain) {
  using T = TypeParam;
  constexpr int kDepth = 256;
  const T large = std::ldexp(T(1), std::numeric_limits<T>::digits);
  const int stride = this->p.scratch_stride;
  for (bool transposed : {false, true}) {
    std::vector<T> a(static_cast<size_t>(transposed ? kDepth : this->p.rows) * stride, T(1));
    for (int i = 0; i < this->p.rows; ++i) a[transposed ? i : i * stride] = large;
    const std::vector<T> b(static_cast<size_t>(kDepth) * this->p.panel, T(1));
    std::vector<T> c(static_cast<size_t>(this->p.rows) * stride);
    this->p.multiply(Product::kStore, transposed, this->p.rows, this->p.panel, kDepth, a.data(), b.data(), c.data(),
                     nullptr);
    for (int i = 0; i < this->p.rows; ++i)
      for (int j = 0; j < this->p.panel; ++j) ASSERT_EQ(c[i * stride + j] - large, kDepth - 64) << i << ", " << j;
  }
}

TYPED_TEST(Block, ExponentialIsAccurate) {
  using T = TypeParam;
  const std::vector<T> x = random_values<T>(1 << 16, sizeof(T) == 4 ? -125 : -1021, 0.5);
  std::vector<T> y(x.size());
  this->p.exp2(x.data(), y.data(), static_cast<int>(x.size()));
  for (size_t i = 0; i < x.size(); ++i) {
    const long double expected = std::exp2(static_cast<long double>(x[i]));
    ASSERT_NEAR(static_cast<double>(y[i] / expected), 1.0, sizeof(T) == 4 ? 2e-7 : 5e-16) << "x = " << x[i];
  }
}
TYPED_TEST(Block, ExponentialAtTheEdges) {
  using T = TypeParam;
  const T edge = sizeof(T) == 4 ? -127 : -1023;
  std::vector<T> x(this->p.panel, T(0)), y(this->p.panel);
  x[0] = 0;
  x[1] = -static_cast<T>(kInfinity);
  x[2] = edge;
  x[3] = T(-3e30);
  this->p.exp2(x.data(), y.data(), this->p.panel);
  EXPECT_EQ(y[0], T(1));
  EXPECT_EQ(y[1], T(0));
  EXPECT_EQ(y[2], T(0));
  EXPECT_EQ(y[3], T(0));
  for (int n = 1; n < 120; ++n) {
    std::fill(x.begin(), x.end(), static_cast<T>(-n));
    this->p.exp2(x.data(), y.data(), this->p.panel);
    EXPECT_EQ(y[0], static_cast<T>(std::ldexp(1.0, -n)));
  }
}
TYPED_TEST(Block, ExponentialKeepsNaN) {
  using T = TypeParam;
  std::vector<T> x(this->p.panel, std::numeric_limits<T>::quiet_NaN()), y(this->p.panel);
  this->p.exp2(x.data(), y.data(), this->p.panel);
  for (T value : y) EXPECT_TRUE(std::isnan(value));
}
TYPED_TEST(Block, Reductions) {
  using T = TypeParam;
  for (int trial = 0; trial < 50; ++trial) {
    const std::vector<T> x = random_values<T>(this->p.lanes);
    double sum = 0;
    for (T value : x) sum += value;
    EXPECT_NEAR(this->p.sum(x.data()), sum, this->kTolerance * this->p.lanes);
    EXPECT_EQ(this->p.largest(x.data()), *std::max_element(x.begin(), x.end()));
  }
}
TYPED_TEST(Block, BoundsAreTheSecondNumberWhereEitherIsNaN) {
  using T = TypeParam;
  const T nan = std::numeric_limits<T>::quiet_NaN(), infinity = static_cast<T>(kInfinity);
  for (T a : {T(-1), T(2), infinity, nan}) {
    for (T b : {T(-3), T(2), -infinity, nan}) {
      const std::vector<T> all_a(this->p.lanes, a), all_b(this->p.lanes, b);
      std::vector<T> maxima(this->p.lanes), minima(this->p.lanes);
      this->p.bounds(all_a.data(), all_b.data(), maxima.data(), minima.data());
      for (int lane = 0; lane < this->p.lanes; ++lane) {
        if (std::isnan(b)) {
          EXPECT_TRUE(std::isnan(maxima[lane]) && std::isnan(minima[lane])) << a;
        } else {
          EXPECT_EQ(maxima[lane], std::isnan(a) ? b : std::max(a, b));
          EXPECT_EQ(minima[lane], std::isnan(a) ? b : std::min(a, b));
        }
      }
    }
  }
}
TYPED_TEST(Block, RowMaximumOfEveryLength) {
  using T = TypeParam;
  for (int count = 1; count <= 256; ++count) {
    std::vector<T> x = random_values<T>(256 + this->p.panel);
    for (size_t j = count; j < x.size(); ++j) x[j] = T(1e6);  // must not count
    EXPECT_EQ(this->p.row_max(x.data(), count), *std::max_element(x.begin(), x.begin() + count));
  }
}
TYPED_TEST(Block, ExponentiateRowOfEveryLength) {
  using T = TypeParam;
  for (int count = 1; count <= 100; ++count) {
    const std::vector<T> before = random_values<T>(128, -20, 0);
    std::vector<T> x = before;
    const T shift = T(-0.375);
    const T sum = this->p.exponentiate_row(x.data(), count, shift);
    double expected = 0;
    for (int j = 0; j < count; ++j) {
      const double value = std::exp2(static_cast<double>(before[j]) + shift);
      EXPECT_NEAR(x[j], value, 1e-6 * value);
      expected += value;
    }
    EXPECT_NEAR(sum, expected, 1e-6 * expected);
    const int vector_end = (count + this->p.lanes - 1) / this->p.lanes * this->p.lanes;
    for (int j = count; j < vector_end; ++j) EXPECT_EQ(x[j], T(0));
    for (int j = vector_end; j < 128; ++j) EXPECT_EQ(x[j], before[j]);
  }
}
TYPED_TEST(Block, Transpose) {
  using T = TypeParam;
  const int n = this->p.lanes;
  const std::vector<T> before = random_values<T>(static_cast<size_t>(n) * n);
  std::vector<T> after = before;
  this->p.transpose(after.data());
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) ASSERT_EQ(after[j * n + i], before[i * n + j]);
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

TEST(Conversion, EveryBFloat16RoundTrips) {
  std::vector<uint16_t> bits(1 << 16), back(1 << 16);
  std::vector<float> values(1 << 16);
  for (int i = 0; i < 1 << 16; ++i) bits[i] = static_cast<uint16_t>(i);
  conversions().from_bfloat16(bits.data(), values.data(), 1 << 16);
  conversions().to_bfloat16(values.data(), back.data(), 1 << 16);
  for (int i = 0; i < 1 << 16; ++i) {
    if (std::isnan(values[i])) {
      EXPECT_GT(back[i] & 0x7fff, 0x7f80);
    } else {
      ASSERT_EQ(values[i], float_of(static_cast<uint32_t>(i) << 16));
      ASSERT_EQ(back[i], bits[i]);
    }
  }
}
TEST(Conversion, BFloat16RoundsToNearestEven) {
  const std::vector<float> from = {float_of(0x3f808000),
                                   float_of(0x3f818000),
                                   float_of(0x3f808001),
                                   float_of(0x3f807fff),
                                   float_of(0x7f7fffff),
                                   -float_of(0x3f808000),
                                   0.0f,
                                   -0.0f};
  std::vector<uint16_t> to(8);
  conversions().to_bfloat16(from.data(), to.data(), 8);
  EXPECT_EQ(to, (std::vector<uint16_t>{0x3f80, 0x3f82, 0x3f81, 0x3f80, 0x7f80, 0xbf80, 0x0000, 0x8000}));
}
TEST(Conversion, EveryFloat16RoundTrips) {
  std::vector<uint16_t> bits(1 << 16), back(1 << 16);
  std::vector<float> values(1 << 16);
  for (int i = 0; i < 1 << 16; ++i) bits[i] = static_cast<uint16_t>(i);
  conversions().from_float16(bits.data(), values.data(), 1 << 16);
  conversions().to_float16(values.data(), back.data(), 1 << 16);
  for (int i = 0; i < 1 << 16; ++i) {
    const int exponent = i >> 10 & 31, mantissa = i & 1023;
    if (exponent == 31 && mantissa != 0) {
      EXPECT_TRUE(std::isnan(values[i]));
      continue;
    }
    const double magnitude = exponent == 31  ? kInfinity
                             : exponent == 0 ? std::ldexp(mantissa, -24)
                                             : std::ldexp(1024 + mantissa, exponent - 25);
    ASSERT_EQ(values[i], (i & 0x8000) ? -magnitude : magnitude) << i;
    ASSERT_EQ(back[i], bits[i]);
  }
}
// As few rows load keys. Head sizes are multiples of 8, so a vector of 16 may be half full.
TEST(Conversion, VectorsAreConvertedAsRowsAre) {
  const Conversions& c = conversions();
  const int lanes = primitives<float>().lanes;
  std::vector<uint16_t> bits(1 << 16);
  std::vector<float> row(1 << 16), vector(lanes);
  for (int i = 0; i < 1 << 16; ++i) bits[i] = static_cast<uint16_t>(i);
  const auto check = [&](auto convert_row, auto convert_vector, int count) {
    convert_row(bits.data(), row.data(), 1 << 16);
    for (int first = 0; first + count <= 1 << 16; first += count) {
      convert_vector(&bits[first], vector.data(), count);
      ASSERT_EQ(std::memcmp(vector.data(), &row[first], sizeof(float) * count), 0) << first;
      for (int i = count; i < lanes; ++i) ASSERT_EQ(vector[i], 0) << first;
    }
  };
  for (int count : {lanes, std::min(lanes, 8)}) {
    ASSERT_NO_FATAL_FAILURE(check(c.from_bfloat16, c.vector_from_bfloat16, count));
    ASSERT_NO_FATAL_FAILURE(check(c.from_float16, c.vector_from_float16, count));
  }
}
TEST(Conversion, Float16RoundsToNearestEven) {
  const std::vector<float> from = {1.0f + 0x1p-11f, 1.0f + 3 * 0x1p-11f, 65519.0f, 65520.0f,
                                   0x1p-25f,        3 * 0x1p-25f,        1e30f,    -65520.0f};
  std::vector<uint16_t> to(8);
  conversions().to_float16(from.data(), to.data(), 8);
  EXPECT_EQ(to, (std::vector<uint16_t>{0x3c00, 0x3c02, 0x7bff, 0x7c00, 0x0000, 0x0002, 0x7c00, 0xfc00}));
}

#if defined(MODA_EXT_AMX_ISA)  // ctest runs these with AMX alone (cmake/Tests.cmake)
class Amx : public testing::Test {
 protected:
  void SetUp() override { ASSERT_EQ(active_isa(), Isa::amx); }  // which also asks for the right to use tiles
  // Of kDepth terms, `step` elements apart.
  static void expect_product(const float* a, const float* b, int step, float got) {
    double expected = 0, magnitude = 0;
    for (int k = 0; k < TileProducts::kDepth; ++k) {
      const double term = double{a[k * step]} * b[k * step];
      expected += term;
      magnitude += std::fabs(term);
    }
    ASSERT_NEAR(got, expected, 6e-8 * magnitude);
  }
  // Random numbers that `parts` bfloat16 numbers hold exactly.
  static std::vector<float> random_matrix(int parts, int rows) {
    std::vector<float> values = random_values<float>(static_cast<size_t>(rows) * tile_products().stride);
    for (float& x : values) {
      float part[3] = {};
      tile_products().split(x, parts, part);
      x = part[0] + part[1] + part[2];
    }
    return values;
  }
};

TEST_F(Amx, PartsAddUpExactly) {
  for (float x : random_values<float>(10000, -1e3, 1e3)) {
    float part[3];
    tile_products().split(x, 3, part);
    ASSERT_EQ(double{part[0]} + part[1] + part[2], x);
    ASSERT_LE(std::fabs(part[1]), std::ldexp(std::fabs(x), -8));
    ASSERT_LE(std::fabs(part[2]), std::ldexp(std::fabs(x), -16));
    for (float p : part) {
      uint32_t bits;
      std::memcpy(&bits, &p, 4);
      ASSERT_EQ(bits & 0xffffu, 0u) << "not a bfloat16 number";
    }
    tile_products().split(x, 2, part);
    ASSERT_NEAR(double{part[0]} + part[1], x, std::ldexp(std::fabs(x), -16));
  }
}
TEST_F(Amx, PartsKeepInfinityAndNaN) {
  float part[3];
  tile_products().split(std::numeric_limits<float>::infinity(), 1, part);
  EXPECT_EQ(part[0], std::numeric_limits<float>::infinity());
  for (int parts : {1, 2, 3}) {
    tile_products().split(std::numeric_limits<float>::quiet_NaN(), parts, part);
    EXPECT_TRUE(std::isnan(part[0])) << parts;
  }
}
// What is below the bits of a subnormal part must not reach its neighbour in the word.
TEST_F(Amx, TinyNumbersStayTiny) {
  const int stride = tile_products().stride;
  for (double size : {1e-30, 1e-36, 1e-38, 1e-40, 1e-44}) {
    const std::vector<float> a = random_values<float>(32 * stride, -size, size), b(32 * stride, 1.0f);
    std::vector<float> c(32 * stride);
    tile_products().by_columns[2](a.data(), b.data(), c.data());
    for (int i = 0; i < 32; ++i) {
      double expected = 0;
      for (int k = 0; k < TileProducts::kDepth; ++k) expected += double{a[i * stride + k]};
      ASSERT_NEAR(c[i * stride], expected, TileProducts::kDepth * (6e-8 * size + 3 * 1.2e-38)) << size;
    }
  }
}
// As accurate as a float product: half a unit in the last place of the sum of magnitudes, and a little.
TEST_F(Amx, ProductOverColumns) {
  const int stride = tile_products().stride;
  for (int parts : {1, 2, 3}) {
    const std::vector<float> a = random_matrix(parts, 32), b = random_matrix(parts, 32);
    std::vector<float> c(32 * stride, 7);
    tile_products().by_columns[parts - 1](a.data(), b.data(), c.data());
    for (int i = 0; i < 32; ++i) {
      for (int j = 0; j < 32; ++j) {
        ASSERT_NO_FATAL_FAILURE(expect_product(&a[i * stride], &b[j * stride], 1, c[i * stride + j]))
            << i << ", " << j << ", parts " << parts;
      }
    }
  }
}
TEST_F(Amx, ProductOverRowsOfEveryBlockShape) {
  const int stride = tile_products().stride, depth = TileProducts::kDepth;
  for (int parts : {1, 2, 3}) {
    const std::vector<float> a = random_matrix(parts, depth), b = random_matrix(parts, depth);
    for (int shape = 0; shape < 4; ++shape) {
      const int rows = shape / 2 + 1, columns = shape % 2 + 1;
      std::vector<float> c(32 * stride, 7);
      tile_products().by_rows[parts - 1](a.data(), b.data(), rows, columns, c.data());
      for (int i = 0; i < 32; ++i) {
        for (int j = 0; j < 32; ++j) {
          if (i >= 16 * rows || j >= 16 * columns) {
            ASSERT_EQ(c[i * stride + j], 7) << "wrote beyond its block";
            continue;
          }
          ASSERT_NO_FATAL_FAILURE(expect_product(&a[i], &b[j], stride, c[i * stride + j]))
              << i << ", " << j << ", parts " << parts;
        }
      }
    }
  }
}
#endif

// Whole kernels on one kv head: a forward in one piece, the same split over keys and merged, and gradients of one item
// against those of several.
template <class T>
struct Problem {
  static constexpr Storage kStorage = sizeof(T) == 4 ? Storage::kFloat32 : Storage::kFloat64;
  Storage storage =
      kStorage;  // of query, key, value, out and their gradients: what they are rounded to for the kernels
  const ModularAttentionKernels& kernel = kernels(storage);
  int group, queries, keys, head_dim, modalities;
  std::vector<int32_t> modality;
  std::vector<T> query, key, value, bias, sink;
  KeyPlan plan;
  Sequence sequence;

  Problem(int group, int queries, int keys, int head_dim, int modalities, bool alternating, int tile_keys,
          Storage storage = kStorage)
      : storage(storage), group(group), queries(queries), keys(keys), head_dim(head_dim), modalities(modalities) {
    for (int j = 0; j < keys; ++j) modality.push_back(alternating ? j % (modalities + 1) - 1 : j * modalities / keys);
    query = random_values<T>(static_cast<size_t>(group) * queries * head_dim, -2, 2);
    key = random_values<T>(static_cast<size_t>(keys) * head_dim, -2, 2);
    value = random_values<T>(static_cast<size_t>(keys) * head_dim);
    bias = random_values<T>(static_cast<size_t>(group) * queries * modalities, -3, 3);
    sink = random_values<T>(static_cast<size_t>(group) * queries);
    for (size_t i = 0; i < bias.size(); i += 7) bias[i] = -static_cast<T>(kInfinity);
    for (size_t i = 0; i < sink.size(); i += 5) sink[i] = -static_cast<T>(kInfinity);
    plan = plan_keys(modality.data(), 1, keys, modalities, tile_keys, kernel.panel_keys);
    sequence.num_queries = queries;
    sequence.num_keys = keys;
    sequence.order = plan.order.data();
    sequence.tiles = plan.tiles.data();
    sequence.first_position = plan.first_position.data();
    sequence.num_tiles = static_cast<int32_t>(plan.tiles.size());
    sequence.num_panels = plan.num_panels;
    sequence.num_slots = static_cast<int32_t>(plan.order.size());
  }

  size_t row(int head, int query) const { return static_cast<size_t>(head) * queries + query; }
  bool sees(int query, int key) const { return key <= query + keys - queries && modality[key] >= 0; }
  // The largest of the row's sink and of what is added to its scores.
  double base_of(int head, int query) const {
    double base = sink[row(head, query)];
    for (int j = 0; j < keys; ++j)
      if (sees(query, j)) base = std::max(base, double{bias[row(head, query) * modalities + modality[j]]});
    return base == -kInfinity ? 0 : base;
  }

  Input input(const std::vector<T>& data, int64_t width, int64_t rows) const {
    Input operand;
    operand.data = data.data();
    operand.row = width;
    operand.head = width * rows;
    return operand;
  }
  Output output(std::vector<T>& data, int64_t width, int64_t rows) const {
    Output operand;
    operand.data = data.data();
    operand.row = width;
    operand.head = width * rows;
    return operand;
  }
  void fill(ModularAttentionArgs& args) const {
    args.head_dim = head_dim;
    args.num_modalities = modalities;
    args.group = group;
    args.causal = true;
    args.scale = 1 / std::sqrt(head_dim);
    args.query = input(query, head_dim, queries);
    args.key = input(key, head_dim, keys);
    args.value = input(value, head_dim, keys);
    args.bias = input(bias, modalities, queries);
    args.sink = input(sink, 1, queries);
  }
};

template <class T>
struct Result {
  std::vector<T> out, lse, mass, lse_residual;
};

// Numbers as a kernel reads and writes them. Rounded to bfloat16 they are in memory of their own.
template <class T>
class Tokens {
 public:
  Tokens(const std::vector<T>& numbers, Storage storage) : numbers_(numbers) {
    if (storage != Storage::kBFloat16) return;
    bits_.resize(numbers.size());
    const std::vector<float> rounded(numbers.begin(), numbers.end());
    conversions().to_bfloat16(rounded.data(), bits_.data(), static_cast<int>(bits_.size()));
  }
  void* data() { return bits_.empty() ? static_cast<void*>(numbers_.data()) : bits_.data(); }
  std::vector<T> numbers() const {
    if (bits_.empty()) return numbers_;
    std::vector<float> read(bits_.size());
    conversions().from_bfloat16(bits_.data(), read.data(), static_cast<int>(bits_.size()));
    return std::vector<T>(read.begin(), read.end());
  }

 private:
  std::vector<T> numbers_;
  std::vector<uint16_t> bits_;
};

// Rows in one item for each head block; `pieces` > 1 splits each over its key tiles.
template <class T>
Result<T> run_forward(const Problem<T>& problem, bool packed, int pieces) {
  const ModularAttentionKernels& kernel = problem.kernel;
  ModularAttentionForwardArgs args;
  problem.fill(args);
  const size_t rows = static_cast<size_t>(problem.group) * problem.queries;
  const T poison = std::numeric_limits<T>::quiet_NaN();
  Result<T> result = {std::vector<T>(rows * problem.head_dim, poison), std::vector<T>(rows, poison),
                      std::vector<T>(rows * problem.modalities, poison), std::vector<T>(rows, poison)};
  Tokens<T> query(problem.query, problem.storage), key(problem.key, problem.storage),
      value(problem.value, problem.storage), out(result.out, problem.storage);
  args.query.data = query.data();
  args.key.data = key.data();
  args.value.data = value.data();
  args.out = problem.output(result.out, problem.head_dim, problem.queries);
  args.out.data = out.data();
  args.lse = problem.output(result.lse, 1, problem.queries);
  args.mass = problem.output(result.mass, problem.modalities, problem.queries);
  args.lse_residual = problem.output(result.lse_residual, 1, problem.queries);
  std::vector<char> storage = bytes(kernel.packed_bytes(args, problem.plan.num_panels)),
                    scratch = bytes(kernel.forward_scratch_bytes(args));
  for (int t = 0; packed && t < problem.sequence.num_tiles; ++t)
    kernel.pack_tile(args, problem.sequence, 0, t, aligned(storage));
  for (int head = 0; head < problem.group; ++head) {
    for (int row = 0; row < problem.queries; row += kernel.forward_block_rows) {
      ModularAttentionForwardItem item{};
      item.sequence = &problem.sequence;
      item.first_head = head;
      item.num_heads = 1;
      item.first_row = row;
      item.num_rows = std::min(kernel.forward_block_rows, problem.queries - row);
      item.last_tile = problem.sequence.num_tiles;
      item.packed = packed ? aligned(storage) : nullptr;
      if (pieces == 1) {
        kernel.forward(args, item, nullptr, aligned(scratch));
        continue;
      }
      std::vector<std::vector<char>> memory(pieces);
      std::vector<void*> partials;
      for (int p = 0; p < pieces; ++p) {
        memory[p] = bytes(kernel.partial_bytes(args, item.num_rows));
        partials.push_back(aligned(memory[p]));
        ModularAttentionForwardItem piece = item;
        piece.first_tile = item.last_tile * p / pieces;
        piece.last_tile = item.last_tile * (p + 1) / pieces;
        piece.partial = partials.back();
        kernel.forward(args, piece, &item, aligned(scratch));
      }
      kernel.merge(args, item, partials.data(), pieces, aligned(scratch));
    }
  }
  result.out = out.numbers();
  return result;
}

template <class T>
Result<T> plain_forward(const Problem<T>& p) {
  Result<T> result;
  for (int h = 0; h < p.group; ++h) {
    for (int i = 0; i < p.queries; ++i) {
      const size_t row = static_cast<size_t>(h) * p.queries + i;
      std::vector<double> scores(p.keys, -kInfinity), out(p.head_dim, 0), mass(p.modalities, 0);
      const double base = p.base_of(h, i);
      double top = p.sink[row] - base;
      for (int j = 0; j < p.keys; ++j) {
        if (!p.sees(i, j)) continue;
        double dot = 0;
        for (int d = 0; d < p.head_dim; ++d)
          dot += static_cast<double>(p.query[row * p.head_dim + d]) * p.key[j * p.head_dim + d];
        scores[j] = dot / std::sqrt(p.head_dim) + (p.bias[row * p.modalities + p.modality[j]] - base);
        top = std::max(top, scores[j]);
      }
      double total = top == -kInfinity ? 0 : std::exp(p.sink[row] - base - top);
      for (int j = 0; j < p.keys && top != -kInfinity; ++j) total += std::exp(scores[j] - top);
      for (int j = 0; j < p.keys; ++j) {
        if (scores[j] == -kInfinity) continue;
        const double weight = std::exp(scores[j] - top) / total;
        mass[p.modality[j]] += weight;
        for (int d = 0; d < p.head_dim; ++d) out[d] += weight * p.value[j * p.head_dim + d];
      }
      for (double value : out) result.out.push_back(static_cast<T>(value));
      for (double value : mass) result.mass.push_back(static_cast<T>(value));
      const double log_sum = top + std::log(total), lse = static_cast<T>(base + log_sum);
      result.lse.push_back(static_cast<T>(total == 0 ? -kInfinity : lse));
      result.lse_residual.push_back(static_cast<T>(total == 0 ? 0 : log_sum - (lse - base)));
    }
  }
  return result;
}

template <class T>
void expect_near(const std::vector<T>& got, const std::vector<T>& expected, double tolerance) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isinf(expected[i])) {
      ASSERT_EQ(got[i], expected[i]) << i;
    } else {
      ASSERT_NEAR(got[i], expected[i], tolerance) << i;
    }
  }
}

template <class T>
class ModularAttentionKernel : public testing::Test {
 protected:
  static constexpr double kTolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;

  void check_forward(const Problem<T>& problem, bool packed, int pieces) {
    const Result<T> got = run_forward(problem, packed, pieces), expected = plain_forward(problem);
    expect_near(got.out, expected.out, kTolerance);
    expect_near(got.lse, expected.lse, kTolerance);
    expect_near(got.mass, expected.mass, kTolerance);
  }
  static int tile() { return kernels(Problem<T>::kStorage).forward_tile_keys; }
  static int common_tile() {  // of both directions
    return std::min(tile(), kernels(Problem<T>::kStorage).backward_tile_keys);
  }
};
TYPED_TEST_SUITE(ModularAttentionKernel, Types);

TYPED_TEST(ModularAttentionKernel, ForwardOfLongRuns) {
  this->check_forward(Problem<TypeParam>(2, 150, 700, 64, 2, false, this->tile()), true, 1);
}
TYPED_TEST(ModularAttentionKernel, ForwardOfAlternatingKeysAndPadding) {
  this->check_forward(Problem<TypeParam>(1, 97, 131, 40, 3, true, this->tile()), true, 1);
}
TYPED_TEST(ModularAttentionKernel, ForwardWithMoreQueriesThanKeys) {
  this->check_forward(Problem<TypeParam>(1, 120, 50, 8, 2, false, this->tile()), true, 1);
}
TYPED_TEST(ModularAttentionKernel, ForwardPacksForItself) {
  this->check_forward(Problem<TypeParam>(3, 5, 600, 72, 2, false, this->tile()), false, 1);
}
TYPED_TEST(ModularAttentionKernel, ForwardSplitOverKeysAndMerged) {
  for (int pieces : {2, 3, 5})
    this->check_forward(Problem<TypeParam>(1, 100, 900, 32, 2, false, this->tile()), false, pieces);
}
TYPED_TEST(ModularAttentionKernel, ForwardWithTheLargestHead) {
  this->check_forward(Problem<TypeParam>(1, 30, 300, 256, 4, false, this->tile()), true, 1);
}

// The gradients of query, key, value, bias and sink that `items` items make of the upstream gradients of out, lse and
// mass.
template <class T>
std::vector<std::vector<T>> run_backward(const Problem<T>& problem, const Result<T>& saved, const Result<T>& upstream,
                                         int items, bool packs_transposed_keys) {
  const ModularAttentionKernels& kernel = problem.kernel;
  const size_t rows = static_cast<size_t>(problem.group) * problem.queries;
  ModularAttentionBackwardArgs args;
  problem.fill(args);
  args.packs_transposed_keys = packs_transposed_keys;
  args.saved_out = problem.input(saved.out, problem.head_dim, problem.queries);
  args.saved_lse = problem.input(saved.lse, 1, problem.queries);
  args.saved_mass = problem.input(saved.mass, problem.modalities, problem.queries);
  args.saved_lse_residual = problem.input(saved.lse_residual, 1, problem.queries);
  args.grad_out = problem.input(upstream.out, problem.head_dim, problem.queries);
  const Storage storage = problem.storage;
  Tokens<T> query(problem.query, storage), key(problem.key, storage), value(problem.value, storage),
      saved_out(saved.out, storage), grad_out(upstream.out, storage);
  args.query.data = query.data();
  args.key.data = key.data();
  args.value.data = value.data();
  args.saved_out.data = saved_out.data();
  args.grad_out.data = grad_out.data();
  args.grad_lse = problem.input(upstream.lse, 1, problem.queries);
  args.grad_mass = problem.input(upstream.mass, problem.modalities, problem.queries);
  const auto zeros = [](const std::vector<T>& like) { return std::vector<T>(like.size()); };
  std::vector<T> delta(rows), dq = zeros(problem.query), dk = zeros(problem.key), dv = zeros(problem.value),
                              db = zeros(problem.bias), dc = zeros(problem.sink), sums = zeros(problem.bias);
  Tokens<T> grad_query(dq, storage), grad_key(dk, storage), grad_value(dv, storage);
  args.delta = problem.output(delta, 1, problem.queries);
  args.grad_query = problem.output(dq, problem.head_dim, problem.queries);
  args.grad_key = problem.output(dk, problem.head_dim, problem.keys);
  args.grad_value = problem.output(dv, problem.head_dim, problem.keys);
  args.grad_query.data = grad_query.data();
  args.grad_key.data = grad_key.data();
  args.grad_value.data = grad_value.data();
  args.grad_bias = problem.output(db, problem.modalities, problem.queries);
  args.probability_sums = problem.output(sums, problem.modalities, problem.queries);
  args.grad_sink = problem.output(dc, 1, problem.queries);
  const int64_t blocks =
      problem.group * ((problem.queries + kernel.backward_block_rows - 1) / kernel.backward_block_rows);
  std::vector<char> scratch = bytes(kernel.backward_scratch_bytes(args, blocks));
  const int64_t packed_bytes = kernel.backward_packed_bytes(args, problem.plan.num_panels);
  std::vector<char> packed = bytes(packed_bytes);
  for (int t = 0; packed_bytes > 0 && t < problem.sequence.num_tiles; ++t)
    kernel.pack_backward_tile(args, problem.sequence, 0, t, aligned(packed));
  const bool partial = items > 1 || packed_bytes > 0;
  std::vector<std::vector<char>> memory(items);
  std::vector<void*> partials;
  for (int p = 0; p < items; ++p) {
    memory[p] = bytes(2 * int64_t{problem.sequence.num_slots} * problem.head_dim * static_cast<int64_t>(sizeof(T)));
    partials.push_back(aligned(memory[p]));
    kernel.backward(args,
                    {&problem.sequence, 0, blocks * p / items, blocks * (p + 1) / items,
                     partial ? partials[p] : nullptr, packed_bytes > 0 ? aligned(packed) : nullptr},
                    aligned(scratch));
  }
  if (partial) kernel.reduce_partials(args, problem.sequence, 0, partials.data(), items, 0, problem.sequence.num_slots);
  return {grad_query.numbers(), grad_key.numbers(), grad_value.numbers(), db, dc};
}

template <class T>
Result<T> random_upstream(const Problem<T>& problem) {
  const size_t rows = static_cast<size_t>(problem.group) * problem.queries;
  return {random_values<T>(rows * problem.head_dim),
          random_values<T>(rows),
          random_values<T>(rows * problem.modalities),
          {}};
}

// The loss sum(out * a + lse * b + mass * c), so that the three upstream gradients are a, b and c.
TYPED_TEST(ModularAttentionKernel, BackwardAgreesWithFiniteDifferencesAndWithPartialItems) {
  using T = TypeParam;
  Problem<T> problem(2, 110, 260, 16, 2, false, kernels(Problem<T>::kStorage).backward_tile_keys);
  for (T& sink : problem.sink) sink = std::max(sink, T(-5));  // finite lse everywhere
  const Result<T> upstream = random_upstream(problem);
  const auto loss = [&] {
    const Result<T> r = plain_forward(problem);
    double sum = 0;
    for (size_t i = 0; i < r.out.size(); ++i) sum += static_cast<double>(upstream.out[i]) * r.out[i];
    for (size_t i = 0; i < r.lse.size(); ++i) sum += static_cast<double>(upstream.lse[i]) * r.lse[i];
    for (size_t i = 0; i < r.mass.size(); ++i) sum += static_cast<double>(upstream.mass[i]) * r.mass[i];
    return sum;
  };
  const Result<T> saved = plain_forward(problem);

  std::vector<std::vector<T>> first;
  for (int items : {1, 2, 4}) {
    const std::vector<std::vector<T>> gradients = run_backward(problem, saved, upstream, items, items < 4);
    if (first.empty()) {
      first = gradients;
    } else {
      for (size_t g = 0; g < gradients.size(); ++g) expect_near(gradients[g], first[g], this->kTolerance * 10);
    }
  }
  if (sizeof(T) == 4) return;  // finite differences need double
  std::vector<T>* const variables[] = {&problem.query, &problem.key, &problem.value, &problem.bias, &problem.sink};
  for (size_t g = 0; g < 5; ++g) {
    for (int trial = 0; trial < 3; ++trial) {
      const size_t i = generator() % variables[g]->size();
      T& x = (*variables[g])[i];
      if (std::isinf(x)) {
        EXPECT_EQ(first[g][i], T(0));
        continue;
      }
      const T kept = x, step = T(1e-5);
      x = kept + step;
      const double above = loss();
      x = kept - step;
      const double below = loss();
      x = kept;
      EXPECT_NEAR(first[g][i], (above - below) / (2 * step), 1e-6) << "gradient " << g << " element " << i;
    }
  }
}

// Biases and sinks of any size count relative to each other alone: the results are those of ordinary ones, in which
// what a row does not meet is 0 and what has no weight beside the largest is -500.
template <class T>
void check_large_numbers(const Problem<T>& problem, double tolerance) {
  Problem<T> ordinary = problem;
  for (int h = 0; h < problem.group; ++h) {
    for (int i = 0; i < problem.queries; ++i) {
      const double base = problem.base_of(h, i);
      const auto reduce = [&](T& x) {
        if (!std::isinf(x)) x = static_cast<T>(std::max(-500.0, x - base));
      };
      reduce(ordinary.sink[ordinary.row(h, i)]);
      for (int m = 0; m < problem.modalities; ++m) {
        T& bias = ordinary.bias[ordinary.row(h, i) * problem.modalities + m];
        reduce(bias);
        bias = std::min(bias, T(0));
      }
    }
  }
  const Result<T> upstream = random_upstream(problem), exact = plain_forward(problem);
  const Result<T> saved = run_forward(ordinary, true, 1);
  const std::vector<std::vector<T>> expected = run_backward(ordinary, saved, upstream, 1, true);
  for (int pieces : {1, 3}) {
    const Result<T> got = run_forward(problem, pieces == 1, pieces);
    expect_near(got.out, saved.out, tolerance);
    expect_near(got.mass, saved.mass, tolerance);
    for (size_t i = 0; i < got.lse.size(); ++i) {
      ASSERT_TRUE(std::isfinite(got.lse_residual[i])) << i;
      if (got.lse[i] == exact.lse[i]) continue;
      ASSERT_NEAR(got.lse[i] / exact.lse[i], 1, tolerance / 10) << i;  // not the same number, so not infinite
    }
    const std::vector<std::vector<T>> gradients = run_backward(problem, got, upstream, 1, true);
    for (size_t g = 0; g < gradients.size(); ++g) expect_near(gradients[g], expected[g], tolerance * 10);
  }
}

TYPED_TEST(ModularAttentionKernel, ANumberCommonToARowChangesNothing) {
  using T = TypeParam;
  constexpr T kLargest = std::numeric_limits<T>::max();
  for (const T number : {T(1000), T(-1e6), T(1e9), T(-1e9), T(1e30), -kLargest, kLargest}) {
    SCOPED_TRACE(number);
    Problem<T> problem(2, 130, 400, 16, 3, false, this->common_tile());
    // Towards zero from the number, in steps that it can be told apart by.
    const T step = std::max(std::fabs(std::nextafter(number, T(0)) - number), T(0.25)) * (number < 0 ? 1 : -1);
    for (std::vector<T>* values : {&problem.bias, &problem.sink})
      for (T& x : *values)
        if (!std::isinf(x)) x = number + step * static_cast<T>(generator() % 4);
    ASSERT_NO_FATAL_FAILURE(check_large_numbers(problem, this->kTolerance));
  }
}
TYPED_TEST(ModularAttentionKernel, LargeNumbersOfEverySizeInOneRow) {
  using T = TypeParam;
  constexpr T kLargest = std::numeric_limits<T>::max();
  const T numbers[] = {0, 1, T(-1000), T(1000), T(-1e9), T(1e9), T(-1e10), T(1e30), -kLargest, kLargest};
  for (const bool alternating : {false, true}) {
    Problem<T> problem(2, 130, 700, 16, 4, alternating, this->common_tile());
    for (std::vector<T>* values : {&problem.bias, &problem.sink})
      for (T& x : *values)
        if (!std::isinf(x)) x = numbers[generator() % std::size(numbers)];
    ASSERT_NO_FATAL_FAILURE(check_large_numbers(problem, this->kTolerance));
  }
}

// In bfloat16, against the kernels of float32 on the same rounded numbers. What sums are made of must be right, so that
// lse and masses agree as float32 does; out and gradients as far as rounded weights and results allow.
class BFloat16Kernel : public testing::Test {
 protected:
  static void round(std::vector<float>& numbers) { numbers = Tokens<float>(numbers, Storage::kBFloat16).numbers(); }

  static void expect_close(const std::vector<float>& got, const std::vector<float>& expected) {
    float largest = 0;
    for (float x : expected) largest = std::max(largest, std::fabs(x));
    expect_near(got, expected, largest / 128);
  }

  static void check(int group, int queries, int keys, int head_dim, int modalities, bool alternating) {
    SCOPED_TRACE(testing::Message() << queries << " x " << keys << " x " << head_dim);
    const ModularAttentionKernels &rounded = kernels(Storage::kBFloat16), &plain = kernels(Storage::kFloat32);
    const int tile = std::min(
        {rounded.forward_tile_keys, rounded.backward_tile_keys, plain.forward_tile_keys, plain.backward_tile_keys});
    Problem<float> problem(group, queries, keys, head_dim, modalities, alternating, tile, Storage::kBFloat16);
    for (float& sink : problem.sink) sink = std::max(sink, -5.0f);  // finite lse everywhere
    round(problem.query);
    round(problem.key);
    round(problem.value);
    Problem<float> exact(group, queries, keys, head_dim, modalities, alternating, tile);
    exact.query = problem.query;
    exact.key = problem.key;
    exact.value = problem.value;
    exact.bias = problem.bias;
    exact.sink = problem.sink;

    const Result<float> expected = run_forward(exact, true, 1);
    for (const bool packed : {true, false}) {
      for (const int pieces : {1, 2}) {
        const Result<float> got = run_forward(problem, packed, pieces);
        expect_close(got.out, expected.out);
        expect_near(got.lse, expected.lse, 2e-5);
        expect_near(got.mass, expected.mass, 2e-5);
      }
    }
    Result<float> upstream = random_upstream(problem);
    round(upstream.out);
    const std::vector<std::vector<float>> gradients = run_backward(exact, expected, upstream, 1, true);
    for (const int items : {1, 2}) {
      const std::vector<std::vector<float>> got = run_backward(problem, expected, upstream, items, true);
      for (size_t g = 0; g < got.size(); ++g) expect_close(got[g], gradients[g]);
    }
  }
};

TEST_F(BFloat16Kernel, AgreesWithFloat32) {
  check(1, 97, 131, 40, 3, true);  // odd numbers of rows and keys, and padding
  check(2, 150, 301, 64, 2, false);
  check(1, 200, 150, 128, 2, true);  // rows that see nothing
  check(3, 5, 77, 72, 2, false);
  check(1, 33, 259, 256, 4, false);
  check(1, 1, 1, 8, 1, false);
}

}  // namespace
}  // namespace cpu
}  // namespace moda_ext
