// Register-blocked matrix products of the CPU attention kernels.
//
//   C[i][j] (+)= sum_k A(i, k) B[k][j]        for a block of kRows rows and two vectors of columns
//
// A is broadcast element by element, B is read in vectors, C stays in registers over the whole k loop. Leading
// dimensions of A are compile-time constants, so the rows of a block are one base register plus displacements; B comes
// in panels of kPanel<T> columns (packed, stride kPanel) or as rows of a scratch block (stride kScratchStride).
//
// Block shape: rows x 2 vectors must fill the register file and leave room for two vectors of B and one broadcast:
// 12 x 2 + 3 = 27 of 32 registers with AVX-512, 6 x 2 + 3 = 15 of 16 with AVX2 and SSE. 24 (12) independent sums cover
// the latency of 4 cycles x 2 multiply-adds per cycle, and 14 (8) loads for 24 (12) multiply-adds stay below the load
// ports. NEON multiplies by a lane, so a broadcast is a scalar load, and GCC issues those of all rows ahead: 8 x 2 + 2 +
// 8 = 26 of 32 registers, where 12 rows spill. 16 sums cover 4 cycles x 4 multiply-adds, the widest cores.
#pragma once

#include "cpu/kernels/common/simd.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

// The elements E of A and B are the numbers of C, or pairs: two neighbours along the depth (k) of a bfloat16 product,
// which one instruction multiplies and adds at twice the rate. Its products are exact; its float sum is rounded, on ARM to
// odd, and subnormal numbers count as 0.
template <class E>
struct SumOf {
  typedef E type;
};
template <>
struct SumOf<Pair> {
  typedef float type;
};
template <class E>
using Sum = typename SumOf<E>::type;
template <class E>
constexpr int kPerElement = 1;  // numbers along the depth
template <>
constexpr int kPerElement<Pair> = 2;
template <class E>
MODA_EXT_INLINE constexpr int elements_of(int numbers) {
  return (numbers + kPerElement<E> - 1) / kPerElement<E>;
}

template <class E>
MODA_EXT_INLINE Vector<Sum<E>> multiply_add(Vector<Sum<E>> sum, Vector<E> a, Vector<E> b) {
  return sum + a * b;
}
#if defined(MODA_EXT_PAIRS)
template <>
MODA_EXT_INLINE Vector<float> multiply_add<Pair>(Vector<float> sum, Vector<Pair> a, Vector<Pair> b) {
  return multiply_add_pairs(sum, a, b);
}
#endif

template <class T>
constexpr int kPanel = 2 * kLanes<T>;  // columns of a packed panel

#if defined(__AVX512F__)
constexpr int kRows = 12;
#elif defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 6;
#endif

// Leading dimension of every scratch block: the largest head size or key tile (256), plus one cache line so that equal
// columns of consecutive rows fall into different cache sets, plus half a line so that they fall into different banks:
// with whole lines the broadcast loads of a row-major A all hit one bank and the inner loop takes 13.8 instead of 13.0
// cycles (Sapphire Rapids; the vector accesses that then straddle lines cost far less).
constexpr int kScratchColumns = 256;
template <class T>
constexpr int kScratchStride = kScratchColumns + 96 / static_cast<int>(sizeof(T));

// A sum of this many steps is one chain of roundings; longer ones are sums of such pieces, which divides the error
// of a head size of 256 by two (the error of a chain grows with its length, that of a sum of pieces with the root of
// their number). The pieces meet in C: 24 loads, additions and stores for 24 x 64 multiply-adds. The backward pass takes
// shorter ones for the gradients of probabilities, as the first rows of a causal call hand their errors to few keys; not
// for scores, which have to be the numbers of the forward pass, where short ones cost 2 to 3 %. Pairs have larger errors.
constexpr int kChain = 64;
template <class E>
constexpr int kShortChain = kPerElement<E> > 1 ? kChain : 32;

enum class Accumulate { kStore, kAdd, kScaledAdd };  // C = f AB, C += f AB, C = row_scale * C + f AB

// How A(i, k) lies in memory: kRowMajor a[i * stride + k], kColumnMajor a[k * stride + i] (the transpose of a scratch
// block).
enum class Order { kRowMajor, kColumnMajor };

// `factor` is of products of pairs alone: other operands have it in them already.
template <class E, int R, int NV, Order order, Accumulate mode>
MODA_EXT_INLINE void multiply_block(int depth, const E* __restrict a, const E* __restrict b, int b_stride,
                                    Sum<E>* __restrict c, int64_t c_stride, const Sum<E>* __restrict row_scale,
                                    Sum<E> factor) {
  typedef Sum<E> T;
  constexpr int kStride = kScratchStride<E>;
  Vector<T> acc[R][NV];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = Vector<T>{};
  }
  // Two steps at a time: 2-3 % over one (fewer integer operations compete for ports 0 and 5); four and more are slower.
#pragma GCC unroll 2
  for (int k = 0; k < depth; ++k) {
    Vector<E> bk[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) bk[j] = load(b + j * kLanes<E>);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vector<E> ai = splat(order == Order::kRowMajor ? a[i * kStride] : a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = multiply_add<E>(acc[i][j], ai, bk[j]);
    }
    a += order == Order::kRowMajor ? 1 : kStride;
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      if constexpr (kPerElement<E> > 1) acc[i][j] *= splat(factor);
      T* out = c + i * c_stride + j * kLanes<T>;
      if (mode == Accumulate::kStore) store(out, acc[i][j]);
      if (mode == Accumulate::kAdd) store(out, load(out) + acc[i][j]);
      if (mode == Accumulate::kScaledAdd) store(out, load(out) * splat(row_scale[i]) + acc[i][j]);
    }
  }
}

// One block of any height up to kRows: the full height in one kernel, the rest of a ragged edge in pieces of 4 and 1.
template <class E, int NV, Order order, Accumulate mode>
__attribute__((noinline)) void multiply_rows(int rows, int depth, const E* a, const E* b, int b_stride, Sum<E>* c,
                                             int64_t c_stride, const Sum<E>* row_scale, Sum<E> factor) {
  constexpr int kRowStep = order == Order::kRowMajor ? kScratchStride<E> : 1;
  if (rows == kRows) {
    multiply_block<E, kRows, NV, order, mode>(depth, a, b, b_stride, c, c_stride, row_scale, factor);
    return;
  }
  int i = 0;
  for (; i + 4 <= rows; i += 4)
    multiply_block<E, 4, NV, order, mode>(depth, a + i * kRowStep, b, b_stride, c + i * c_stride, c_stride,
                                          row_scale + i, factor);
  for (; i < rows; ++i)
    multiply_block<E, 1, NV, order, mode>(depth, a + i * kRowStep, b, b_stride, c + i * c_stride, c_stride,
                                          row_scale + i, factor);
}

// The same in pieces of `chain` steps, for `columns` in {1 .. kPanel}: one vector suffices for the left half of a panel.
// `depth` is in elements.
template <class E, Order order, Accumulate mode, int chain = kChain>
MODA_EXT_INLINE void multiply_panel(int rows, int columns, int depth, const E* a, const E* b, int b_stride, Sum<E>* c,
                                    int64_t c_stride, const Sum<E>* row_scale, Sum<E> factor = 1) {
  const bool both = columns > kLanes<E>;
  const int first = depth < chain ? depth : chain;
  (both ? multiply_rows<E, 2, order, mode> : multiply_rows<E, 1, order, mode>)(rows, first, a, b, b_stride, c, c_stride,
                                                                               row_scale, factor);
  for (int k = chain; k < depth; k += chain) {
    a += chain * (order == Order::kRowMajor ? 1 : kScratchStride<E>);
    b += int64_t(chain) * b_stride;
    const int piece = depth - k < chain ? depth - k : chain;
    (both ? multiply_rows<E, 2, order, Accumulate::kAdd>
          : multiply_rows<E, 1, order, Accumulate::kAdd>)(rows, piece, a, b, b_stride, c, c_stride, nullptr, factor);
  }
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
