// Products of a few rows, as those of a decoding step, with keys and values that are read once, where they lie. Packing
// them (pack.h) would cost more than the products: at 4 rows and D = 128 three quarters of the time.
//
//   score_rows         S[i][j] = a_i . k_j             in blocks of kLanes sums, a vector each, summed up together
//   add_weighted_rows  C[i] = s_i C[i] + sum_j W[i][j] v_j   in blocks of rows x vectors that stay in registers
//
// `key(j)` is the address of row j, in the storage type. Blocks of A, S, W and C are scratch blocks (gemm.h).
#pragma once

#include "cpu/kernels/common/pack.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

#define MODA_EXT_ALWAYS_INLINE __attribute__((always_inline))

// Keys whose lines are asked for before they are read, so many ahead: the latency of the third-level cache.
constexpr int kKeysAhead = 16;

// Sums that stay in registers beside a vector of each operand, and vectors of a value that meet them. NEON multiplies
// nothing that lies in memory, so these take registers too.
#if defined(__AVX512F__)
constexpr int kRegisterSums = 16, kRegisterValues = 16;
#elif defined(__aarch64__)
constexpr int kRegisterSums = 16, kRegisterValues = 8;
#else
constexpr int kRegisterSums = 8, kRegisterValues = 8;
#endif

// rows <- where keys [first, first + count) of a tile lie in an operand. Found once: the way to one leads through the plan
// and, where keys are in pages, their rows.
template <class Storage>
MODA_EXT_INLINE void find_rows(const Input& operand, const Sequence& sequence, int64_t head, const KeyTile& tile,
                               int first, int count, const Storage** rows) {
  for (int j = 0; j < count; ++j)
    rows[j] = row_of<Storage>(operand, sequence.batch, head, key_row(sequence, tile.start + first + j));
}

// A vector from elements of the storage type; of half as many as it has, the rest is zero: head sizes are multiples of 8,
// the most lanes are 16.
template <class T, class Storage>
MODA_EXT_INLINE Vector<T> load_as(const Storage* from, int count = kLanes<T>) {
  T lanes[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = i < count ? upcast(from[i]) : T(0);
  return load(lanes);
}
#if defined(__aarch64__)  // vectors of 4: head sizes leave no rest
template <>
MODA_EXT_INLINE Vector<float> load_as<float, BFloat16>(const BFloat16* from, int) {
  return (Vector<float>)vshll_n_u16(vld1_u16(&from->bits), 16);
}
template <>
MODA_EXT_INLINE Vector<float> load_as<float, Float16>(const Float16* from, int) {
  return (Vector<float>)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits)));
}
#else
template <>
MODA_EXT_INLINE Vector<float> load_as<float, BFloat16>(const BFloat16* from, int count) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes<float>)));
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes<float>)));
  Halves halves{};
  memcpy(&halves, from, count < kLanes<float> ? sizeof(halves) / 2 : sizeof(halves));  // head sizes are multiples of 8
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Vector<float> result;
  memcpy(&result, &words, sizeof(result));
  return result;
}
#endif

#if defined(__F16C__) && (defined(__AVX512F__) || defined(__AVX2__))
template <>
MODA_EXT_INLINE Vector<float> load_as<float, Float16>(const Float16* from, int count) {
  uint16_t halves[kLanes<float>] = {};
  if (count < kLanes<float>) {
    memcpy(halves, from, sizeof(halves) / 2);
    from = reinterpret_cast<const Float16*>(halves);
  }
#if defined(__AVX512F__)  // the maskz form: see simd.h
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
}
#endif

// Halves `count` vectors: of two, blocks of `width` lanes that are next to each other are added, and lie next to each
// other. A template, so that the masks are constants.
template <class T, int width>
MODA_EXT_INLINE void add_neighbours(Vector<T>* vectors) {
  constexpr int L = kLanes<T>;
  if constexpr (width < L) {
#if !defined(__clang__)
    Bits<T> even, odd;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      even[i] = i / width % 2 * L + i / (2 * width) * 2 * width + i % width;
      odd[i] = even[i] + width;
    }
#endif
#pragma GCC unroll 8
    for (int i = 0; i < L / (2 * width); ++i) {
      const Vector<T> a = vectors[2 * i], b = vectors[2 * i + 1];
#if defined(__clang__)
      Vector<T> sum;
      for (int lane = 0; lane < L; ++lane) {
        const int first = lane / (2 * width) * 2 * width + lane % width;
        sum[lane] = lane / width % 2 ? b[first] + b[first + width] : a[first] + a[first + width];
      }
      vectors[i] = sum;
#else
      vectors[i] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
#endif
    }
    add_neighbours<T, 2 * width>(vectors);
  }
}

// Lane i of the result is the sum of the lanes of vectors[i]. Changes them.
template <class T>
MODA_EXT_INLINE Vector<T> sums_of_lanes(Vector<T>* vectors) {
  add_neighbours<T, 1>(vectors);
  return vectors[0];
}

template <int R>
struct Rows {
  static constexpr int value = R;
};

// R rows against kLanes / R keys at a time.
template <class T, int R, class KeyAt, class Ahead>
MODA_EXT_INLINE void score_block(int keys, int depth, const T* a, const KeyAt& key, const Ahead& ahead, T* scores) {
  constexpr int L = kLanes<T>, K = L / R, kStride = kScratchStride<T>;
  for (int first = 0; first < keys; first += K) {
    decltype(key(0)) at[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
      const int j = first + k < keys ? first + k : keys - 1;
      at[k] = key(j);
      ahead(j);
    }
    Vector<T> sum[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) sum[i] = Vector<T>{};
    const auto add = [&](int d, int lanes) MODA_EXT_ALWAYS_INLINE {
      Vector<T> of_row[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) of_row[r] = load(a + r * kStride + d);
      if (lanes < L)  // a scratch block may hold anything beyond
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) of_row[r] = keep_first<T>(of_row[r], lanes);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        const Vector<T> of_key = load_as<T>(at[k] + d, lanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[r * K + k] += of_row[r] * of_key;
      }
    };
    int d = 0;
    for (; d + L <= depth; d += L) add(d, L);
    if (d < depth) add(d, depth - d);
    const Vector<T> sums = sums_of_lanes<T>(sum);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      memcpy(scores + r * kStride + first, reinterpret_cast<const char*>(&sums) + sizeof(T) * r * K, sizeof(T) * K);
  }
}

// Values [first, last). Without row_scale, it is 1.
template <class T, int R, int V, class ValueAt>
MODA_EXT_INLINE void add_weighted_block(int first, int last, int column, int lanes, const T* w, const ValueAt& value,
                                        T* c, const T* row_scale) {
  constexpr int L = kLanes<T>, kStride = kScratchStride<T>;
  Vector<T> sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[r][v] = Vector<T>{};
  for (int j = first; j < last; ++j) {
    const auto* row = value(j) + column;
    Vector<T> of_value[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) of_value[v] = load_as<T>(row + v * L, lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector<T> weight = splat(w[r * kStride + j]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[r][v] += weight * of_value[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Vector<T> scale = splat(row_scale != nullptr ? row_scale[r] : T(1));
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      T* out = c + r * kStride + column + v * L;
      store(out, load(out) * scale + sum[r][v]);
    }
  }
}

// Columns from `column` on, in blocks as wide as they fit: each block reads the values' addresses and weights again.
template <class T, int R, int V, class ValueAt>
MODA_EXT_INLINE void add_weighted_columns(int first, int last, int column, int width, const T* w, const ValueAt& value,
                                          T* c, const T* row_scale) {
  constexpr int L = kLanes<T>;
  for (; column + V * L <= width; column += V * L)
    add_weighted_block<T, R, V>(first, last, column, L, w, value, c, row_scale);
  if constexpr (V > 1) {
    if (column < width) add_weighted_columns<T, R, V / 2>(first, last, column, width, w, value, c, row_scale);
  } else {
    if (column < width) add_weighted_block<T, R, 1>(first, last, column, width - column, w, value, c, row_scale);
  }
}

// A sum over values is one of pieces of kChain, as in gemm.h.
template <class T, int R, class ValueAt>
void add_weighted_rows_of(int keys, int width, const T* w, const ValueAt& value, T* c, const T* row_scale) {
  constexpr int V = kRegisterSums / R < kRegisterValues ? kRegisterSums / R : kRegisterValues;
  for (int first = 0; first < keys; first += kChain) {
    const int last = keys - first < kChain ? keys : first + kChain;
    const T* scale = first == 0 ? row_scale : nullptr;
    add_weighted_columns<T, R, V>(first, last, 0, width, w, value, c, scale);
  }
}

// Keys of a tile that stay in the first-level cache for all rows.
constexpr int kNearKeys = 32;

// `ahead(j)` is called when key j is read, to ask for what comes next.
template <class T, class KeyAt, class Ahead>
void score_rows(int rows, int keys, int depth, const T* a, const KeyAt& key, const Ahead& ahead, T* scores) {
  constexpr int kStride = kScratchStride<T>;
  for (int first = 0; first < keys; first += kNearKeys) {
    const int count = keys - first < kNearKeys ? keys - first : kNearKeys;
    const auto near = [&](int j) MODA_EXT_ALWAYS_INLINE { return key(first + j); };
    const auto before = [&](int j) MODA_EXT_ALWAYS_INLINE { ahead(first + j); };
    const auto nothing = [](int) {};
    int i = 0;
    const auto score = [&](auto height) MODA_EXT_ALWAYS_INLINE {
      constexpr int R = decltype(height)::value;
      for (; i + R <= rows; i += R) {
        T* out = scores + i * kStride + first;
        if (i == 0) {
          score_block<T, R>(count, depth, a, near, before, out);
        } else {
          score_block<T, R>(count, depth, a + i * kStride, near, nothing, out);
        }
      }
    };
    if constexpr (kLanes<T> >= 4) score(Rows<4>{});
    score(Rows<2>{});
    score(Rows<1>{});
  }
}

// row_scale may be null: 1.
template <class T, class ValueAt>
void add_weighted_rows(int rows, int keys, int width, const T* w, const ValueAt& value, T* c, const T* row_scale) {
  constexpr int kStride = kScratchStride<T>;
  const auto at = [&](int i) { return row_scale != nullptr ? row_scale + i : nullptr; };
  int i = 0;
  for (; i + 4 <= rows; i += 4) add_weighted_rows_of<T, 4>(keys, width, w + i * kStride, value, c + i * kStride, at(i));
  for (; i + 2 <= rows; i += 2) add_weighted_rows_of<T, 2>(keys, width, w + i * kStride, value, c + i * kStride, at(i));
  for (; i < rows; ++i) add_weighted_rows_of<T, 1>(keys, width, w + i * kStride, value, c + i * kStride, at(i));
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
