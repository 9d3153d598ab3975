// Defines the tables of primitives.h for the instruction set this file is compiled for.
#pragma once

#include "cpu/kernels/vector/modular_attention_forward.h"
#include "primitives.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

template <class T, Order order>
void multiply_in_order(Product mode, int rows, int columns, int depth, const T* a, const T* b, T* c,
                       const T* row_scale) {
  constexpr int kStride = kScratchStride<T>;
  if (mode == Product::kStore)
    multiply_panel<T, order, Accumulate::kStore>(rows, columns, depth, a, b, kPanel<T>, c, kStride, nullptr);
  if (mode == Product::kAdd)
    multiply_panel<T, order, Accumulate::kAdd>(rows, columns, depth, a, b, kPanel<T>, c, kStride, nullptr);
  if (mode == Product::kScaledAdd)
    multiply_panel<T, order, Accumulate::kScaledAdd>(rows, columns, depth, a, b, kPanel<T>, c, kStride, row_scale);
}

template <class T>
const Primitives<T>& primitives() {
  static const Primitives<T> table = {
      kLanes<T>,
      kPanel<T>,
      kRows,
      kScratchStride<T>,
      [](Product mode, bool a_transposed, int rows, int columns, int depth, const T* a, const T* b, T* c,
         const T* row_scale) {
        if (a_transposed) {
          multiply_in_order<T, Order::kColumnMajor>(mode, rows, columns, depth, a, b, c, row_scale);
        } else {
          multiply_in_order<T, Order::kRowMajor>(mode, rows, columns, depth, a, b, c, row_scale);
        }
      },
      [](const T* x, T* y, int count) {
        for (int i = 0; i < count; i += kLanes<T>) store(y + i, exp2_nonpositive(load(x + i)));
      },
      [](const T* x) { return reduce_add<T>(load(x)); },
      [](const T* x) { return reduce_max<T>(load(x)); },
      [](const T* a, const T* b, T* maxima, T* minima) {
        store(maxima, maximum(load(a), load(b)));
        store(minima, minimum(load(a), load(b)));
      },
      [](const T* x, int count) { return row_max(x, count); },
      [](T* x, int count, T shift) { return exponentiate_row(x, count, shift); },
      [](T* square) {
        Vector<T> rows[kLanes<T>];
        for (int i = 0; i < kLanes<T>; ++i) rows[i] = load(square + i * kLanes<T>);
        transpose_square<T>(rows);
        for (int i = 0; i < kLanes<T>; ++i) store(square + i * kLanes<T>, rows[i]);
      },
  };
  return table;
}

inline const Conversions& conversions() {
  static const Conversions table = {
      [](const uint16_t* from, float* to, int count) {
        load_row(reinterpret_cast<const BFloat16*>(from), 1.0f, to, count);
      },
      [](const float* from, uint16_t* to, int count) { store_row(from, 1.0f, reinterpret_cast<BFloat16*>(to), count); },
      [](const uint16_t* from, float* to, int count) {
        load_row(reinterpret_cast<const Float16*>(from), 1.0f, to, count);
      },
      [](const float* from, uint16_t* to, int count) { store_row(from, 1.0f, reinterpret_cast<Float16*>(to), count); },
      [](const uint16_t* from, float* to, int count) {
        store(to, load_as<float>(reinterpret_cast<const BFloat16*>(from), count));
      },
      [](const uint16_t* from, float* to, int count) {
        store(to, load_as<float>(reinterpret_cast<const Float16*>(from), count));
      },
  };
  return table;
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext

#define MODA_EXT_DEFINE_PRIMITIVES(isa)                                                         \
  namespace moda_ext {                                                                          \
  namespace cpu {                                                                               \
  const Primitives<float>& primitives32_##isa() { return MODA_EXT_ISA::primitives<float>(); }   \
  const Primitives<double>& primitives64_##isa() { return MODA_EXT_ISA::primitives<double>(); } \
  const Conversions& conversions_##isa() { return MODA_EXT_ISA::conversions(); }                \
  }                                                                                             \
  }
