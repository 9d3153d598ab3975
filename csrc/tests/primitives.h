// The building blocks of the CPU kernels, exposed for unit tests: one table for each instruction set and compute
// type, compiled with its flags (primitives_<isa>.cpp) and called through pointers, so that test code itself
// stays portable.
#pragma once

#include <stdint.h>

namespace moda_ext {
namespace cpu {

enum class Product { kStore, kAdd, kScaledAdd };

template <class T>
struct Primitives {
  int lanes, panel, rows, scratch_stride;

  // C (rows x columns, stride scratch_stride) from A (scratch block, transposed or not) and B (panel of depth rows).
  void (*multiply)(Product mode, bool a_transposed, int rows, int columns, int depth, const T* a, const T* b, T* c,
                   const T* row_scale);
  void (*exp2)(const T* x, T* y, int count);  // count: multiple of lanes
  T (*sum)(const T* x);                       // of one vector
  T (*largest)(const T* x);
  void (*bounds)(const T* a, const T* b, T* maxima, T* minima);  // of one vector
  T (*row_max)(const T* x, int count);
  T (*exponentiate_row)(T* x, int count, T shift);
  void (*transpose)(T* square);  // lanes x lanes, in place
};

// Conversions between storage bit patterns and float; count is a multiple of 8.
struct Conversions {
  void (*from_bfloat16)(const uint16_t* from, float* to, int count);
  void (*to_bfloat16)(const float* from, uint16_t* to, int count);
  void (*from_float16)(const uint16_t* from, float* to, int count);
  void (*to_float16)(const float* from, uint16_t* to, int count);
  void (*vector_from_bfloat16)(const uint16_t* from, float* to, int count);  // at most one vector, zero beyond count
  void (*vector_from_float16)(const uint16_t* from, float* to, int count);
};

// Products with AMX (cpu/kernels/amx/amx.h), for elements made of 1, 2 or 3 bfloat16 numbers. Matrices are
// row-major with leading dimension `stride`.
struct TileProducts {
  static constexpr int kDepth = 96;
  int stride;
  void (*by_columns[3])(const float* a, const float* b, float* c);  // C (32 x 32) = A (32 x kDepth) B (32 x kDepth)^T
  // C = A^T B for 16 row_tiles columns of A (kDepth x 32) and 16 column_tiles of B.
  void (*by_rows[3])(const float* a, const float* b, int row_tiles, int column_tiles, float* c);
  void (*split)(float x, int parts, float* part);
};
const TileProducts& tile_products();

#define MODA_EXT_DECLARE_PRIMITIVES(isa)          \
  const Primitives<float>& primitives32_##isa();  \
  const Primitives<double>& primitives64_##isa(); \
  const Conversions& conversions_##isa();

MODA_EXT_DECLARE_PRIMITIVES(baseline)
MODA_EXT_DECLARE_PRIMITIVES(avx2)
MODA_EXT_DECLARE_PRIMITIVES(avx512)

}  // namespace cpu
}  // namespace moda_ext
