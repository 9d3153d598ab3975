// Strided operands of the attention kernels, the same for every device: plain data, no torch and no STL, because
// kernels include this file (see cpu/kernels/simd.h).
#pragma once

#include <stdint.h>

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

constexpr int kMaxModalities = 16;

}  // namespace moda_ext
