// What the CUDA launches share: what kernels ask of tensors.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

#include "cuda/device.h"
#include "cuda/dispatch.h"
#include "ops/checks.h"

namespace moda_ext {
namespace cuda {

inline void check_dtype(const ArgumentCheck& check, const char* argument, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  check.require(dtype != ScalarType::Double, argument, "float32, bfloat16 or float16 on CUDA", dtype);
}

// How results are allocated: for the operators of every family.
struct CudaResults {
  static Tensor result_like(const Tensor& like, const std::vector<int64_t>& sizes, bool packed = false) {
    return empty_in_layout_of(like, sizes, packed);
  }
};

// Kernels move 16 bytes at a time: a tensor whose rows do not start at multiples of that is copied.
inline Tensor with_aligned_rows(const Tensor& tensor) {
  bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d)
    aligned &= tensor.size(d) <= 1 || tensor.stride(d) * static_cast<int64_t>(tensor.element_size()) % 16 == 0;
  return aligned ? tensor : torch::stable::clone(tensor);
}

inline Tensor new_workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

}  // namespace cuda
}  // namespace moda_ext
