// The building blocks of the CPU kernels, exposed for unit tests: one table for each instruction set tier and compute
// type, compiled with the tier's flags (primitives_<tier>.cpp) and called through pointers, so that test code itself
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
  T (*row_maximum)(const T* x, int count);
  T (*exponentiate_row)(T* x, int count, T shift);
  void (*transpose)(T* square);  // lanes x lanes, in place
};

// Conversions between storage bit patterns and float; count is a multiple of 8.
struct Conversions {
  void (*from_bfloat16)(const uint16_t* from, float* to, int count);
  void (*to_bfloat16)(const float* from, uint16_t* to, int count);
  void (*from_float16)(const uint16_t* from, float* to, int count);
  void (*to_float16)(const float* from, uint16_t* to, int count);
};

#define MODA_EXT_DECLARE_PRIMITIVES(tier)          \
  const Primitives<float>& primitives32_##tier();  \
  const Primitives<double>& primitives64_##tier(); \
  const Conversions& conversions_##tier();

MODA_EXT_DECLARE_PRIMITIVES(baseline)
MODA_EXT_DECLARE_PRIMITIVES(avx2)
MODA_EXT_DECLARE_PRIMITIVES(avx512)

}  // namespace cpu
}  // namespace moda_ext
