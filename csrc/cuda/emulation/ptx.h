// Host twin of cuda/ptx.h: the same functions on the CPU, with the semantics that the PTX manual gives them.
#pragma once

#include <math.h>
#include <string.h>

#include "cuda/emulation/machine.h"

#define MODA_EXT_DEVICE inline

namespace moda_ext {
namespace cuda {

inline int thread_index() { return emulation::current_thread(); }
inline int64_t block_index() { return emulation::current_block(); }
template <class T>
T* as_new(T* pointer) {
  return pointer;
}
inline int lane_index() { return thread_index() & 31; }
inline int warp_index() { return thread_index() >> 5; }

inline void sync_threads() { emulation::block_barrier(); }
inline void sync_warp() {
  emulation::collective("sync_warp", nullptr, [](void* const*) {});
}

inline float shuffle(float value, int source) {
  struct Exchange {
    float value;
    int source;
    float result;
  } mine{value, source, 0};
  emulation::collective("shuffle", &mine, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      Exchange& lane = *static_cast<Exchange*>(lanes[i]);
      lane.result = static_cast<Exchange*>(lanes[lane.source & 31])->value;
    }
  });
  return mine.result;
}
inline float shuffle_xor(float value, int mask) { return shuffle(value, lane_index() ^ mask); }
inline uint32_t warp_or(uint32_t value) {
  emulation::collective("warp_or", &value, [](void* const* lanes) {
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i) all |= *static_cast<uint32_t*>(lanes[i]);
    for (int i = 0; i < 32; ++i) *static_cast<uint32_t*>(lanes[i]) = all;
  });
  return value;
}

inline int lowest_bit(uint32_t value) { return __builtin_ffs(static_cast<int>(value)) - 1; }
inline float infinity() { return INFINITY; }
inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // a NaN stays one
}

inline void copy_async_16(void* shared, const void* global, bool valid) {
  emulation::copy_async(shared, global, 16, valid);
}
inline void copy_async_4(void* shared, const void* global, bool valid) {
  emulation::copy_async(shared, global, 4, valid);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kPending>
void wait_copies() {
  emulation::wait_copies(kPending);
}

namespace emulation {

struct MatrixLoad {
  const void* row;
  uint32_t result[4];
};
template <bool kTransposed>
void load_matrices_of_warp(void* const* lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      const MatrixLoad& source = *static_cast<MatrixLoad*>(lanes[8 * matrix + row]);
      check_shared(source.row, 16, 16, "load_matrices");
      memcpy(elements[row], source.row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = kTransposed ? elements[2 * t][g] : elements[g][2 * t];
      const uint32_t high = kTransposed ? elements[2 * t + 1][g] : elements[g][2 * t + 1];
      static_cast<MatrixLoad*>(lanes[lane])->result[matrix] = low | high << 16;
    }
  }
}

float bits_to_float(uint16_t bits, BFloat16);
float bits_to_float(uint16_t bits, Float16);
uint16_t float_to_bits(float value, BFloat16);
uint16_t float_to_bits(float value, Float16);

struct MultiplyAdd {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};
template <class Element>
void multiply_add_of_warp(void* const* lanes) {
  float a[16][16], b[16][8];
  const auto half = [](uint32_t pair, int i) {
    return bits_to_float(static_cast<uint16_t>(pair >> 16 * i), Element{});
  };
  for (int lane = 0; lane < 32; ++lane) {
    const MultiplyAdd& operands = *static_cast<MultiplyAdd*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      for (int part = 0; part < 4; ++part)
        a[g + 8 * (part % 2)][2 * t + 8 * (part / 2) + i] = half(operands.a[part], i);
      for (int part = 0; part < 2; ++part) b[2 * t + 8 * part + i][g] = half(operands.b[part], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* c = static_cast<MultiplyAdd*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = c[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      c[i] = sum;
    }
  }
}

}  // namespace emulation

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  emulation::MatrixLoad mine{row, {}};
  emulation::collective("load_matrices", &mine, emulation::load_matrices_of_warp<false>);
  memcpy(r, mine.result, sizeof(r));
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulation::MatrixLoad mine{row, {}};
  emulation::collective("load_matrices_transposed", &mine, emulation::load_matrices_of_warp<true>);
  memcpy(r, mine.result, sizeof(r));
}

template <class Element>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::MultiplyAdd mine{c, a, {b0, b1}};
  emulation::collective("multiply_add", &mine, emulation::multiply_add_of_warp<Element>);
}

template <class Element>
uint32_t pack_pair(float low, float high) {
  return emulation::float_to_bits(low, Element{}) | static_cast<uint32_t>(emulation::float_to_bits(high, Element{}))
                                                        << 16;
}

inline float to_float(float value) { return value; }
template <class Element>
float to_float(Element value) {
  return emulation::bits_to_float(value.bits, value);
}
template <class Element>
Element from_float(float value) {
  return Element{emulation::float_to_bits(value, Element{})};
}
template <>
inline float from_float<float>(float value) {
  return value;
}

}  // namespace cuda
}  // namespace moda_ext
