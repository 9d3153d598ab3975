// The kernels of the Gram family of the instruction set in use, against plain loops in double. ctest runs this program
// once for each instruction set of the machine (ATEN_CPU_CAPABILITY).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "aligned_memory.h"
#include "core/runs.h"
#include "cpu/isa.h"
#include "cpu/kernels/gram_family_kernels.h"

namespace moda_ext {
namespace cpu {
namespace {

const GramFamilyKernels& kernels(Storage storage) {
#if defined(MODA_EXT_AMX_ISA)
  if (active_isa() == Isa::amx && storage != Storage::kFloat64) return gram_family_kernels_amx(storage);
#endif
  return MODA_EXT_VECTOR_ISA(gram_family_kernels)(storage);
}

template <class T>
class GramFamily : public testing::Test {
 protected:
  static constexpr Storage kStorage = sizeof(T) == 4 ? Storage::kFloat32 : Storage::kFloat64;
  static constexpr double kTolerance = sizeof(T) == 4 ? 1e-5 : 1e-13;
  static constexpr int kModalities = 3, kRank = 5;
  const GramFamilyKernels& k = kernels(kStorage);
  std::mt19937 generator{7};

  std::vector<T> random_values(size_t count) {
    std::uniform_real_distribution<double> distribution(-1, 1);
    std::vector<T> values(count);
    for (T& value : values) value = static_cast<T>(distribution(generator));
    return values;
  }
  std::vector<int32_t> random_modalities(int tokens) {
    std::uniform_int_distribution<int> distribution(-1, kModalities - 1);
    std::vector<int32_t> modalities(static_cast<size_t>(tokens));
    for (int32_t& modality : modalities) modality = distribution(generator);
    return modalities;
  }
  std::vector<double> features(const std::vector<T>& key, int tokens, int head_dim) {
    std::vector<double> phi(key.begin(), key.end());
    for (int j = 0; j < tokens; ++j) {
      double square = 0;
      for (int d = 0; d < head_dim; ++d) square += phi[j * head_dim + d] * phi[j * head_dim + d];
      for (int d = 0; d < head_dim; ++d) phi[j * head_dim + d] /= std::sqrt(square);
    }
    return phi;
  }
  template <class Args>
  void fill(Args& args, const std::vector<T>& key, const std::vector<int32_t>& modality, int head_dim) {
    args.head_dim = head_dim;
    args.num_modalities = kModalities;
    args.eps = 1e-6;
    args.kv_heads = 1;
    args.num_keys = static_cast<int64_t>(modality.size());
    args.key.data = key.data();
    args.key.row = head_dim;
    args.modality = modality.data();
    args.modality_token = 1;
  }
};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(GramFamily, Types);

TYPED_TEST(GramFamily, EqualsTheSumOfOuterProductsAtEveryLength) {
  using T = TypeParam;
  for (int head_dim : {8, 24, 128, 256}) {
    for (int tokens : {0, 1, 7, this->k.chunk, this->k.chunk + 1, 150, 700}) {
      const std::vector<T> key = this->random_values(static_cast<size_t>(tokens) * head_dim);
      const std::vector<int32_t> modality = this->random_modalities(tokens);
      GramArgs args;
      this->fill(args, key, modality, head_dim);
      std::vector<T> gram(static_cast<size_t>(this->kModalities) * head_dim * head_dim, T(99));
      std::vector<char> scratch = bytes(this->k.modality_gram_scratch_bytes(args));
      this->k.modality_gram(args, {0, 0, 0, tokens, gram.data()}, aligned(scratch));
      const std::vector<double> phi = this->features(key, tokens, head_dim);
      for (int m = 0; m < this->kModalities; ++m)
        for (int a = 0; a < head_dim; ++a)
          for (int b = 0; b < head_dim; ++b) {
            double expected = 0;
            for (int j = 0; j < tokens; ++j)
              if (modality[j] == m) expected += phi[j * head_dim + a] * phi[j * head_dim + b];
            ASSERT_NEAR(gram[(m * head_dim + a) * head_dim + b], expected, this->kTolerance)
                << head_dim << " wide, " << tokens << " tokens, modality " << m << " at " << a << ", " << b;
          }
    }
  }
}

TYPED_TEST(GramFamily, SumOfPiecesIsTheWhole) {
  using T = TypeParam;
  GramArgs args;
  args.head_dim = 8;
  args.num_modalities = 2;
  const std::vector<T> first = this->random_values(128), second = this->random_values(128);
  std::vector<T> sum(128);
  void* const parts[] = {const_cast<T*>(first.data()), const_cast<T*>(second.data())};
  this->k.reduce_grams(args, parts, 2, sum.data());
  for (size_t i = 0; i < sum.size(); ++i) ASSERT_EQ(sum[i], first[i] + second[i]);
}

TYPED_TEST(GramFamily, ViewsAndIndicatorEqualPlainLoops) {
  using T = TypeParam;
  const int D = 40, tokens = 2 * this->k.chunk + 5, queries = this->k.chunk + 9, M = this->kModalities, r = this->kRank;
  const std::vector<T> key = this->random_values(static_cast<size_t>(tokens) * D);
  const std::vector<T> query = this->random_values(static_cast<size_t>(queries) * D);
  const std::vector<T> scale = this->random_values(static_cast<size_t>(queries) * M);
  const std::vector<int32_t> modality = this->random_modalities(tokens);
  std::vector<T> weights[4];
  for (std::vector<T>& weight : weights) weight = this->random_values(static_cast<size_t>(M) * D * r);

  DuplexQueryViewsForwardArgs args;
  this->fill(args, key, modality, D);
  args.num_queries = queries;
  args.query.data = query.data();
  args.query.row = D;
  args.row_scale.data = scale.data();
  args.row_scale.row = M;
  args.rank = r;
  args.a1 = weights[0].data();
  args.b1 = weights[1].data();
  args.a2 = weights[2].data();
  args.b2 = weights[3].data();
  std::vector<T> views(static_cast<size_t>(M) * queries * D), indicator(static_cast<size_t>(queries) * M);
  args.views.data = views.data();
  args.views.row = D;
  args.views.view = int64_t{queries} * D;
  args.indicator.data = indicator.data();
  args.indicator.row = M;
  std::vector<char> packed(static_cast<size_t>(this->k.weights_bytes(args)));
  this->k.pack_weights(args, packed.data());
  args.weights = packed.data();
  std::vector<char> scratch(static_cast<size_t>(this->k.duplex_query_views_scratch_bytes(args)), char(-1));
  this->k.duplex_query_views(args, 0, 0, scratch.data());

  const std::vector<double> phi = this->features(key, tokens, D);
  const auto weight = [&](int which, int m, int row, int column, int columns) {
    return static_cast<double>(weights[which][(m * D * r) + row * columns + column]);
  };
  for (int i = 0; i < queries; ++i) {
    const std::vector<double> q(query.begin() + i * D, query.begin() + (i + 1) * D);
    double norm = 0;
    for (int d = 0; d < D; ++d) norm += q[d] * q[d];
    std::vector<double> forms(M, 0.0);
    for (int a = 0; a < M; ++a) {
      std::vector<double> y(r, 0.0), x(r, 0.0), aligned(D, 0.0), view(q);
      for (int k = 0; k < r; ++k)
        for (int d = 0; d < D; ++d) {
          y[k] += q[d] * weight(1, a, k, d, D);
          x[k] += q[d] * weight(3, a, k, d, D);
        }
      for (int d = 0; d < D; ++d)
        for (int k = 0; k < r; ++k) {
          view[d] += y[k] * weight(0, a, d, k, r);
          aligned[d] += x[k] * weight(2, a, d, k, r);
        }
      for (int j = 0; j <= i + tokens - queries; ++j) {
        const int m = modality[j];
        if (m < 0) continue;
        double product = 0, own = 0;
        for (int d = 0; d < D; ++d) {
          product += aligned[d] * phi[j * D + d];
          own += q[d] * phi[j * D + d];
        }
        if (a == 0) forms[m] += own * own / norm;
        if (m == a) continue;
        for (int d = 0; d < D; ++d) view[d] += scale[i * M + m] * product * phi[j * D + d];
      }
      for (int d = 0; d < D; ++d)
        ASSERT_NEAR(views[(a * queries + i) * D + d], view[d], 100 * this->kTolerance) << "view " << a << " row " << i;
    }
    for (int m = 0; m < M; ++m) ASSERT_NEAR(indicator[i * M + m], forms[m], 10 * this->kTolerance) << "row " << i;
  }
}

// Keys in any order of rows, as in pages; the rows' sums of one item, and of three that are merged.
TYPED_TEST(GramFamily, DecodedViewsAreThoseOfTheGram) {
  using T = TypeParam;
  const int M = this->kModalities, r = this->kRank, tokens = 600;
  for (int D : {8, 40, 128})
    for (int queries : {1, 3})
      for (int group : {1, 2, 5})
        for (bool unit_keys : {true, false}) {
          const std::vector<T> key = this->random_values(static_cast<size_t>(tokens) * D);
          const std::vector<T> query = this->random_values(static_cast<size_t>(group) * queries * D);
          const std::vector<int32_t> modality = this->random_modalities(tokens);
          std::vector<int64_t> rows(tokens);
          for (int j = 0; j < tokens; ++j) rows[j] = j;
          std::shuffle(rows.begin(), rows.end(), this->generator);
          std::vector<T> weights[4];
          for (std::vector<T>& weight : weights) weight = this->random_values(static_cast<size_t>(M) * D * r);
          DuplexQueryViewsForwardArgs args;
          this->fill(args, key, modality, D);
          args.key_rows = rows.data();
          args.unit_keys = unit_keys;
          args.group = group;
          args.num_queries = queries;
          args.query.data = query.data();
          args.query.head = int64_t{queries} * D;
          args.query.row = D;
          args.rank = r;
          args.a1 = weights[0].data();
          args.b1 = weights[1].data();
          args.a2 = weights[2].data();
          args.b2 = weights[3].data();
          const size_t rows_of_all = static_cast<size_t>(group) * queries;
          std::vector<T> views(M * rows_of_all * D), indicator(rows_of_all * M),
              scale(static_cast<size_t>(queries) * M);
          args.views.row = D;
          args.views.head = int64_t{queries} * D;
          args.views.view = static_cast<int64_t>(rows_of_all) * D;
          args.indicator.row = M;
          args.indicator.head = int64_t{queries} * M;
          std::vector<char> packed(static_cast<size_t>(this->k.weights_bytes(args)));
          this->k.pack_weights(args, packed.data());
          args.weights = packed.data();

          const KeyPlan plan = plan_keys(modality.data(), 1, tokens, M, 64, 32);
          Sequence sequence;
          sequence.order = plan.order.data();
          sequence.rows = rows.data();
          sequence.tiles = plan.tiles.data();
          std::vector<int32_t> query_modality(static_cast<size_t>(queries), 0);
          query_modality[0] = queries > 1 ? -1 : 0;
          DecodedViewsArgs decoded;
          decoded.sequence = &sequence;
          decoded.query_modality = query_modality.data();
          decoded.query_modality_token = 1;
          decoded.scale.data = scale.data();
          decoded.scale.row = M;
          args.row_scale.data = scale.data();
          args.row_scale.row = M;

          // By the Gram.
          args.views.data = views.data();
          args.indicator.data = indicator.data();
          this->k.causal_scale(args, decoded, 0);
          std::vector<char> scratch(static_cast<size_t>(this->k.duplex_query_views_scratch_bytes(args)), char(-1));
          this->k.duplex_query_views(args, 0, 0, scratch.data());
          const std::vector<T> expected_scale = scale;
          for (int pieces : {1, 3}) {
            std::vector<T> found(views.size(), T(99)), squares(indicator.size(), T(99));
            std::fill(scale.begin(), scale.end(), T(99));
            args.views.data = found.data();
            args.indicator.data = squares.data();
            std::vector<char> memory(static_cast<size_t>(this->k.decoded_query_views_scratch_bytes(args)), char(-1));
            const size_t partial = static_cast<size_t>(this->k.decoded_query_views_partial_bytes(args));
            std::vector<std::vector<char>> partials(static_cast<size_t>(pieces), std::vector<char>(partial, char(-1)));
            std::vector<void*> at;
            for (std::vector<char>& one : partials) at.push_back(one.data());
            const int64_t tiles = static_cast<int64_t>(plan.tiles.size());
            for (int p = 0; p < pieces; ++p)
              this->k.decoded_query_views(
                  args, decoded, {0, tiles * p / pieces, tiles * (p + 1) / pieces, pieces > 1 ? at[p] : nullptr},
                  memory.data());
            if (pieces > 1) this->k.merge_decoded_query_views(args, decoded, 0, at.data(), pieces, memory.data());
            for (size_t i = 0; i < scale.size(); ++i)
              ASSERT_NEAR(scale[i], expected_scale[i], 100 * this->kTolerance * std::abs(expected_scale[i]));
            for (size_t i = 0; i < views.size(); ++i)
              ASSERT_NEAR(found[i], views[i], 100 * this->kTolerance)
                  << D << " wide, group of " << group << ", at " << i;
            for (size_t i = 0; i < indicator.size(); ++i)
              ASSERT_NEAR(squares[i], indicator[i], 100 * this->kTolerance * (1 + std::abs(indicator[i])));
          }
        }
}

// What a kernel left there must not serve the next one.
__attribute__((noinline)) void overwrite_stack() {
  volatile char bytes[1 << 15];
  for (volatile char& byte : bytes) byte = -1;
}

// Keys inside and outside the Grams, and padding; the rank decides which way A2^T G is made. Then the same as another
// head of the batch element, for which the scratch holds all it needs, and past the caches.
TYPED_TEST(GramFamily, AlignedKeysEqualPlainLoops) {
  using T = TypeParam;
  for (int D : {40, 72, 128})
    for (int r : {5, 20, 70})
      for (Normalization normalization : {Normalization::kTrace, Normalization::kFrobenius, Normalization::kRow}) {
        const int tokens = 2 * this->k.chunk + 5, M = this->kModalities;
        const std::vector<T> key = this->random_values(static_cast<size_t>(tokens) * D);
        const std::vector<int32_t> members = this->random_modalities(tokens);
        std::vector<int32_t> modality = members;
        for (int j = 0; j < tokens; j += 5) modality[j] = -1;
        std::vector<T> weights[4];
        for (std::vector<T>& weight : weights) weight = this->random_values(static_cast<size_t>(M) * D * r);
        DuplexAlignedKeysArgs args;
        this->fill(args, key, modality, D);
        args.rank = r;
        args.a1 = weights[0].data();
        args.b1 = weights[1].data();
        args.a2 = weights[2].data();
        args.b2 = weights[3].data();
        args.normalization = normalization;
        args.members = members.data();
        args.members_token = 1;
        std::vector<char> memory = bytes(static_cast<int64_t>(sizeof(T)) * tokens * D);
        T* const result = static_cast<T*>(aligned(memory));
        std::fill_n(result, tokens * D, T(99));
        args.aligned.data = result;
        args.aligned.row = D;
        std::vector<char> packed(static_cast<size_t>(this->k.weights_bytes(args)));
        this->k.pack_weights(args, packed.data());
        args.weights = packed.data();
        std::vector<char> scratch(static_cast<size_t>(this->k.duplex_aligned_keys_scratch_bytes(args)), char(-1));
        this->k.duplex_aligned_keys(args, {0, 0, -1}, scratch.data());
        const std::vector<T> first(result, result + tokens * D);
        std::fill_n(result, tokens * D, T(99));
        overwrite_stack();
        args.nontemporal = true;
        this->k.duplex_aligned_keys(args, {0, 0, 0}, scratch.data());
        ASSERT_EQ(std::vector<T>(result, result + tokens * D), first) << D << " wide, rank " << r;

        const std::vector<double> phi = this->features(key, tokens, D);
        std::vector<double> gram(static_cast<size_t>(M) * D * D);
        for (int m = 0; m < M; ++m) {
          double* own = gram.data() + m * D * D;
          double trace = 0, square = 0;
          for (int a = 0; a < D; ++a)
            for (int b = 0; b < D; ++b) {
              for (int j = 0; j < tokens; ++j)
                if (modality[j] == m) own[a * D + b] += phi[j * D + a] * phi[j * D + b];
              if (a == b) trace += own[a * D + b];
              square += own[a * D + b] * own[a * D + b];
            }
          for (int a = 0; a < D; ++a) {
            double row = 0;
            for (int b = 0; b < D; ++b) row += own[a * D + b] * own[a * D + b];
            const double norm = normalization == Normalization::kTrace       ? trace
                                : normalization == Normalization::kFrobenius ? std::sqrt(square)
                                                                             : std::sqrt(row);
            for (int b = 0; b < D; ++b) own[a * D + b] /= norm;
          }
        }
        for (int j = 0; j < tokens; ++j) {
          const int a = members[j];
          std::vector<double> expected(key.begin() + j * D, key.begin() + (j + 1) * D), others(D, 0.0);
          for (int m = 0; a >= 0 && m < M; ++m)
            for (int d = 0; m != a && d < D; ++d)
              for (int e = 0; e < D; ++e) others[e] += key[j * D + d] * gram[(m * D + d) * D + e];
          for (int k = 0; a >= 0 && k < r; ++k) {
            double own = 0, moved = 0;
            for (int d = 0; d < D; ++d) {
              own += key[j * D + d] * weights[0][(a * D + d) * r + k];
              moved += others[d] * weights[2][(a * D + d) * r + k];
            }
            for (int d = 0; d < D; ++d)
              expected[d] += own * weights[1][(a * r + k) * D + d] + moved * weights[3][(a * r + k) * D + d];
          }
          for (int d = 0; d < D; ++d)
            ASSERT_NEAR(result[j * D + d], expected[d], 100 * this->kTolerance)
                << D << " wide, rank " << r << ", key " << j << " of modality " << a << " at " << d;
        }
      }
}

}  // namespace
}  // namespace cpu
}  // namespace moda_ext
