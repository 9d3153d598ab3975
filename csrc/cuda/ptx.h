// Every device instruction that the kernels use, under a plain name: the only file of csrc/cuda with inline PTX.
//
// It has a host twin (emulation/ptx.h, with MODA_EXT_CUDA_EMULATION defined): there the same kernel sources compile
// with the C++ compiler, and run on the CPU with the semantics that PTX documents. Kernels therefore see no CUDA header
// and no built-in variable but what is named here.
//
// Naming: a *fragment* is what one thread of a warp holds of a small matrix. With g = lane / 4 and t = lane % 4,
//   C (16 x 8, float)   c[0..3] = (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
//   A (16 x 16, 16-bit) a[0..3] = pairs from column 2t of rows g, g+8, then from column 2t+8 of rows g, g+8
//   B (16 x 8, 16-bit)  b[0..1] = pairs from row 2t, then from row 2t+8, of column g
#pragma once

#include <stdint.h>

#include "core/storage.h"

namespace moda_ext {
namespace cuda {

struct alignas(16) Word4 {
  uint32_t word[4];
};

}  // namespace cuda
}  // namespace moda_ext

#if defined(MODA_EXT_CUDA_EMULATION)
#include "cuda/emulation/ptx.h"
#else

#define MODA_EXT_DEVICE __device__ __forceinline__

namespace moda_ext {
namespace cuda {

MODA_EXT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
// Read anew at each call, which lets a kernel work its place in the grid out again instead of holding it in registers.
MODA_EXT_DEVICE int64_t block_index() {
  uint32_t index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}
// The same pointer, which the compiler takes for another one: addresses made from it in a loop are not kept in
// registers throughout the loop.
template <class T>
MODA_EXT_DEVICE T* as_new(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}
MODA_EXT_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) & 31; }
MODA_EXT_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) >> 5; }

MODA_EXT_DEVICE void sync_threads() { __syncthreads(); }
MODA_EXT_DEVICE void sync_warp() { __syncwarp(); }

// Collective over the whole warp; every lane takes part.
MODA_EXT_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
MODA_EXT_DEVICE float shuffle(float value, int source) { return __shfl_sync(0xffffffffu, value, source); }
MODA_EXT_DEVICE uint32_t warp_or(uint32_t value) { return __reduce_or_sync(0xffffffffu, value); }

MODA_EXT_DEVICE int lowest_bit(uint32_t value) { return __ffs(static_cast<int>(value)) - 1; }
MODA_EXT_DEVICE float infinity() { return __int_as_float(0x7f800000); }

// 2^x: relative error below 2^-22, 2^-inf = 0, subnormal results flush to 0.
MODA_EXT_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

MODA_EXT_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Asynchronous copies into shared memory. The thread that issued them sees them after wait_copies, other threads after
// a barrier on top of it. With valid = false the target is filled with zeros and the source is not read.
MODA_EXT_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
MODA_EXT_DEVICE void copy_async_4(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}
MODA_EXT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but the `kPending` groups committed last.
template <int kPending>
MODA_EXT_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; lanes 8i .. 8i+7 give the addresses of the rows (16 bytes) of matrix i. The
// lane receives elements (g, 2t), (g, 2t+1) of each matrix; transposed, elements (2t, g), (2t+1, g).
MODA_EXT_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
MODA_EXT_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// C += A B on 16 x 8 x 16.
template <class Element>
MODA_EXT_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
MODA_EXT_DEVICE void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
MODA_EXT_DEVICE void multiply_add<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded to nearest even, `low` in the lower half.
template <class Element>
MODA_EXT_DEVICE uint32_t pack_pair(float low, float high);
template <>
MODA_EXT_DEVICE uint32_t pack_pair<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
MODA_EXT_DEVICE uint32_t pack_pair<Float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

MODA_EXT_DEVICE float to_float(float value) { return value; }
MODA_EXT_DEVICE float to_float(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
MODA_EXT_DEVICE float to_float(Float16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

template <class Element>
MODA_EXT_DEVICE Element from_float(float value) {
  return Element{static_cast<uint16_t>(pack_pair<Element>(value, 0.0f))};
}
template <>
MODA_EXT_DEVICE float from_float<float>(float value) {
  return value;
}

}  // namespace cuda
}  // namespace moda_ext

#endif
