// What the CUDA launches ask of the device.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace moda_ext {
namespace cuda {

inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

inline int device_attribute(int32_t device, cudaDeviceAttr attribute) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("moda_ext: cannot ask the device: ") + cudaGetErrorString(error));
  return value;
}

inline int multiprocessor_count(int32_t device) { return device_attribute(device, cudaDevAttrMultiProcessorCount); }

// 80 for 8.0.
inline int compute_capability(int32_t device) {
  return 10 * device_attribute(device, cudaDevAttrComputeCapabilityMajor) +
         device_attribute(device, cudaDevAttrComputeCapabilityMinor);
}

}  // namespace cuda
}  // namespace moda_ext
