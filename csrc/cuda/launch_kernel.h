// Launches a kernel: a class with
//   struct Params                                    passed by value
//   static constexpr int kThreads                    of a block
//   static int64_t blocks(const Params&)             grid size, one-dimensional; 0 launches nothing
//   static size_t shared_bytes(const Params&)        dynamic shared memory of a block
//   static MODA_EXT_DEVICE void run(const Params&, char* shared)
// The grid comes from the same host functions on a device and in emulation.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <stdexcept>
#include <string>

#include "cuda/ptx.h"

namespace moda_ext {
namespace cuda {

inline void check_grid(int64_t blocks) {
  if (blocks > INT32_MAX) throw std::runtime_error("moda_ext: a grid of " + std::to_string(blocks) + " blocks");
}

#if defined(MODA_EXT_CUDA_EMULATION)

template <class Kernel>
void launch(const typename Kernel::Params& params, void*) {
  check_grid(Kernel::blocks(params));
  emulation::run_grid(Kernel::blocks(params), Kernel::kThreads, Kernel::shared_bytes(params),
                      [&](char* shared) { Kernel::run(params, shared); });
}

#else

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1) kernel(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(16) char shared[];
  Kernel::run(params, shared);
}

template <class Kernel>
void launch(const typename Kernel::Params& params, void* stream) {
  const int64_t blocks = Kernel::blocks(params);
  if (blocks == 0) return;
  check_grid(blocks);
  constexpr size_t kWithoutAsking = 48 << 10;
  const size_t bytes = Kernel::shared_bytes(params);
  cudaError_t error = cudaSuccess;
  if (bytes > kWithoutAsking)
    error = cudaFuncSetAttribute(kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) {
    kernel<Kernel>
        <<<static_cast<unsigned>(blocks), Kernel::kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(params);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("moda_ext: kernel launch failed: ") + cudaGetErrorString(error));
}

#endif

}  // namespace cuda
}  // namespace moda_ext
