// Which kernels serve a call: by the GPU's compute capability and by head size.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <iterator>
#include <stdexcept>
#include <string>

namespace moda_ext {
namespace cuda {

constexpr int kHeadSizes[] = {32, 64, 96, 128, 192, 256};  // head_sizes in csrc/sources.json

template <template <int> class Kernels, size_t index = 0, class Use>
void with_head_size(int64_t head_dim, const Use& use) {
  if constexpr (index + 1 < std::size(kHeadSizes))
    if (head_dim > kHeadSizes[index]) return with_head_size<Kernels, index + 1>(head_dim, use);
  use(Kernels<kHeadSizes[index]>{});
}

// Calls use(Kernels<size>{}) for the smallest of kHeadSizes that holds head_dim, with the first of the kernels that a
// GPU of this compute capability (80 for 8.0) runs: a family lists those of its newest architecture first, as in
// with_kernels<sm90::Kernels, sm80::Kernels>.
template <template <int> class Kernels, template <int> class... Older, class Use>
void with_kernels(int capability, int64_t head_dim, const Use& use) {
  constexpr int kOldest = Kernels<kHeadSizes[0]>::kCapability;
  if (capability >= kOldest) return with_head_size<Kernels>(head_dim, use);
  if constexpr (sizeof...(Older) > 0) return with_kernels<Older...>(capability, head_dim, use);
  const auto text = [](int number) { return std::to_string(number / 10) + "." + std::to_string(number % 10); };
  throw std::runtime_error("moda_ext: the CUDA kernels need compute capability " + text(kOldest) +
                           " or later, this GPU has " + text(capability));
}

}  // namespace cuda
}  // namespace moda_ext
