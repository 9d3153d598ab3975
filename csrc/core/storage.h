// The dtypes of query, key and value, and the elements that C++ has no type for: the same for every device, plain data,
// because kernels include this file (see cpu/kernels/common/simd.h).
#pragma once

#include <stdint.h>

namespace moda_ext {

enum class Storage { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Bit patterns: converted to float on load and rounded to nearest even on store, by instructions of the device.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace moda_ext
