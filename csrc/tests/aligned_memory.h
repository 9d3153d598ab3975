// Memory for kernels that want whole cache lines.
#pragma once

#include <cstdint>
#include <vector>

inline std::vector<char> bytes(int64_t count) { return std::vector<char>(static_cast<size_t>(count) + 64, char(-1)); }
inline void* aligned(std::vector<char>& memory) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<void*>((at + 63) / 64 * 64);
}
