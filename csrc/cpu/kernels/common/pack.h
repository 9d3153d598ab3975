// Loading rows into scratch blocks and packing key tiles into panels (see gemm.h for the two operand forms).
#pragma once

#include "cpu/kernels/common/gemm.h"
#include "cpu/kernels/modular_attention_kernels.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

template <class T>
MODA_EXT_INLINE int64_t round_up_to_panel(int64_t n) {
  return (n + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
}

// Transposes a square of kLanes x kLanes elements held in vectors: each of log2(kLanes) rounds interleaves rows i and
// i + kLanes / 2.
template <class T>
MODA_EXT_INLINE void transpose_square(Vector<T>* rows) {
  constexpr int L = kLanes<T>;
  typedef Bits<T> I;
  I low, high;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    low[i] = i / 2 + (i % 2) * L;
    high[i] = L / 2 + i / 2 + (i % 2) * L;
  }
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
    Vector<T> next[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
#if defined(__clang__)
      for (int lane = 0; lane < L; ++lane) {
        next[2 * i][lane] = rows[i + (lane % 2) * (L / 2)][lane / 2];
        next[2 * i + 1][lane] = rows[i + (lane % 2) * (L / 2)][L / 2 + lane / 2];
      }
#else
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + L / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + L / 2], high);
#endif
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
}

// A row of numbers as elements of an operand along its depth (gemm.h). Pairs are the bfloat16 numbers as they lie: their
// factor is that of the product.
template <class Storage, class T>
MODA_EXT_INLINE void load_elements(const Storage* from, T factor, T* to, int count) {
  load_row(from, factor, to, count);
}
MODA_EXT_INLINE void load_elements(const BFloat16* from, float, Pair* to, int count) {
  memcpy(to, from, sizeof(BFloat16) * count);
}

// Keys of a tile, transposed: panels [elements of head_dim][kPanel], zero beyond the tile's length up to a whole vector
// (no kernel reads further). `rows` is scratch for kLanes rows.
template <class Storage, class T>
MODA_EXT_INLINE void pack_transposed(const Input& operand, const Sequence& sequence, int64_t head, const KeyTile& tile,
                                     int numbers, T* rows, T* packed) {
  static_assert(kScratchStride<Pair> == kScratchStride<float> && kPanel<Pair> == kPanel<float>);  // share blocks
  constexpr int L = kLanes<T>;
  const int head_dim = elements_of<T>(numbers);
  const int64_t stride = round_up_to_panel<T>(head_dim);
  for (int first = 0; first < tile.length; first += L) {
    const int count = tile.length - first < L ? tile.length - first : L;
    for (int j = 0; j < count; ++j)
      load_elements(row_of<Storage>(operand, sequence.batch, head, key_row(sequence, tile.start + first + j)),
                    Sum<T>(1), rows + j * stride, numbers);
    for (int j = count; j < L; ++j) memset(rows + j * stride, 0, sizeof(T) * stride);
    T* out = packed + (first / kPanel<T>)*kPanel<T> * static_cast<int64_t>(head_dim) + first % kPanel<T>;
    int d = 0;
    for (; d + L <= head_dim; d += L) {
      Vector<T> square[L];
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) square[j] = load(rows + j * stride + d);
      transpose_square<T>(square);
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) store(out + (d + j) * kPanel<T>, square[j]);
    }
    for (; d < head_dim; ++d)
      for (int j = 0; j < L; ++j) out[d * kPanel<T> + j] = rows[j * stride + d];
  }
}

// Rows of a tile as column panels: [head_dim / kPanel][tile rows][kPanel], times `factor`. Columns beyond head_dim are
// zero.
template <class Storage, class T>
MODA_EXT_INLINE void pack_columns(const Input& operand, const Sequence& sequence, int64_t head, const KeyTile& tile,
                                  int head_dim, T factor, T* row, T* packed) {
  const int64_t width = round_up_to_panel<T>(head_dim);
  for (int64_t d = head_dim; d < width; ++d) row[d] = T(0);
  for (int j = 0; j < tile.length; ++j) {
    load_row(row_of<Storage>(operand, sequence.batch, head, key_row(sequence, tile.start + j)), factor, row, head_dim);
    for (int64_t d = 0; d < width; d += kPanel<T>) {
      T* out = packed + d * tile.length + j * kPanel<T>;
      store(out, load(row + d));
      store(out + kLanes<T>, load(row + d + kLanes<T>));
    }
  }
}

// Two rows as pairs, one of each: what a product over rows reads. `second` may be null, for zeros. Zero up to a whole
// panel; `count` is a multiple of 8.
inline void interleave_rows(const BFloat16* first, const BFloat16* second, int count, Pair* to) {
  for (int d = 0; d < count; ++d)
    to[d] = static_cast<Pair>(first[d].bits) | (second == nullptr ? Pair{0} : static_cast<Pair>(second[d].bits) << 16);
  for (int64_t d = count; d < round_up_to_panel<Pair>(count); ++d) to[d] = 0;
}

// The same rows in pairs: [head_dim / kPanel][pairs of rows][kPanel]. An odd last row is paired with zeros.
template <class Storage>
MODA_EXT_INLINE void pack_columns(const Input& operand, const Sequence& sequence, int64_t head, const KeyTile& tile,
                                  int head_dim, float, Pair* row, Pair* packed) {
  const int pairs = elements_of<Pair>(tile.length);
  const auto at = [&](int j) __attribute__((always_inline)) {
    return row_of<Storage>(operand, sequence.batch, head, key_row(sequence, tile.start + j));
  };
  for (int j = 0; j < pairs; ++j) {
    interleave_rows(at(2 * j), 2 * j + 1 < tile.length ? at(2 * j + 1) : nullptr, head_dim, row);
    for (int64_t d = 0; d < head_dim; d += kPanel<Pair>) {
      Pair* out = packed + d * pairs + j * kPanel<Pair>;
      store(out, load(row + d));
      store(out + kLanes<Pair>, load(row + d + kLanes<Pair>));
    }
  }
}

// Query-side rows into a scratch block of stride kScratchStride, times `factor`.
template <class Storage, class E>
MODA_EXT_INLINE void load_block(const Storage* from, int64_t row_stride, int64_t rows, int head_dim, Sum<E> factor,
                                E* block) {
  for (int64_t i = 0; i < rows; ++i)
    load_elements(from + i * row_stride, factor, block + i * kScratchStride<E>, head_dim);
}

#if defined(MODA_EXT_PAIRS)
// The first `count` numbers of a scratch row as pairs of neighbours, in place; what lies between them and the end of
// their last two vectors is left as anything.
MODA_EXT_INLINE void make_row_pairs(float* row, int count) {
  constexpr int L = kLanes<float>;
  Pair* to = reinterpret_cast<Pair*>(row);
  for (int j = 0; j < count; j += 2 * L) store(to + j / 2, pairs_of_neighbours(load(row + j), load(row + j + L)));
}
// The first `count` numbers of two rows as pairs of one number of each. `to` may be the first row.
MODA_EXT_INLINE void make_pairs_of_rows(const float* first, const float* second, int count, Pair* to) {
  for (int j = 0; j < count; j += kLanes<float>) store(to + j, pairs_of_two(load(first + j), load(second + j)));
}
#endif

// Asks for a line that will be needed, in the second-level cache. By an instruction that stays where it is: GCC moves
// its builtin out from between tile instructions, to where the line is wanted.
MODA_EXT_INLINE void prefetch_line(const char* line) {
#if defined(__x86_64__)
  __asm__ volatile("prefetcht1 %0" : : "m"(*line));
#else
  __builtin_prefetch(line, 0, 2);
#endif
}
// Asks for rows that will be needed while other work goes on.
template <class Element>
MODA_EXT_INLINE void prefetch_rows(const Element* first, int64_t row_stride, int64_t rows, int64_t elements) {
  for (int64_t i = 0; i < rows; ++i) {
    const char* line = reinterpret_cast<const char*>(first + i * row_stride);
    for (int64_t at = 0; at < elements * static_cast<int64_t>(sizeof(Element)); at += 64) prefetch_line(line + at);
  }
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
