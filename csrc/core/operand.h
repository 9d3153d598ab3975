// Strided operands of the attention kernels, the same for every device: plain data, no torch and no STL, because
// kernels include this file (see cpu/kernels/common/simd.h).
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define MODA_EXT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MODA_EXT_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace moda_ext {

// Where element (sequence, head h, row i, 0) of an operand lies:
//
//   data + batch * sequence.batch + head * h + row * (first row of the sequence + i)
//
// The last dimension (head size, or one number) is contiguous; modality_bias also has a stride over modalities.
template <class Pointer>
struct Operand {
  Pointer data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  int64_t last = 1;  // modality stride of modality_bias; 1 elsewhere
  int64_t view = 0;  // query views: stride over key modalities; 0 when one query serves all
};
using Input = Operand<const void*>;
using Output = Operand<void*>;

// Address of a row, counted through the sequences where tokens are packed. Always inline, with internal linkage: no
// instruction set's code stands in for another's.
template <class Element>
static MODA_EXT_HOST_DEVICE const Element* row_of(const Input& operand, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const Element*>(operand.data) + batch * operand.batch + head * operand.head + row * operand.row;
}
template <class Element>
static MODA_EXT_HOST_DEVICE Element* row_of(const Output& operand, int64_t batch, int64_t head, int64_t row) {
  return static_cast<Element*>(operand.data) + batch * operand.batch + head * operand.head + row * operand.row;
}

constexpr int kMaxModalities = 16;

}  // namespace moda_ext
