// SIMD vocabulary of the CPU kernels, at the width the including file is compiled for.
//
// Everything here lives in namespace MODA_EXT_ISA, one namespace for each instruction set, so that code compiled
// with special flags can never be picked by the linker for another instruction set. For the same reason kernel files
// include C headers and intrinsics only: an inline function of the STL compiled with AVX flags could replace the
// portable one.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "core/storage.h"

#if defined(__AMX_BF16__)
#define MODA_EXT_ISA amx
#define MODA_EXT_VECTOR_BYTES 64
#elif defined(__AVX512BF16__)
#define MODA_EXT_ISA avx512_bf16
#define MODA_EXT_VECTOR_BYTES 64
#elif defined(__AVX512F__)
#define MODA_EXT_ISA avx512
#define MODA_EXT_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define MODA_EXT_ISA avx2
#define MODA_EXT_VECTOR_BYTES 32
#elif defined(MODA_EXT_NEON_BF16)  // of the tier's own flags: a user's may ask for BF16 everywhere
#define MODA_EXT_ISA neon_bf16
#define MODA_EXT_VECTOR_BYTES 16
#elif defined(__aarch64__)
#define MODA_EXT_ISA neon
#define MODA_EXT_VECTOR_BYTES 16
#else
#define MODA_EXT_ISA baseline
#define MODA_EXT_VECTOR_BYTES 16
#endif

#define MODA_EXT_INLINE inline __attribute__((always_inline))

namespace moda_ext {
namespace cpu {

namespace MODA_EXT_ISA {

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(MODA_EXT_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(MODA_EXT_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t bits __attribute__((vector_size(MODA_EXT_VECTOR_BYTES)));
  typedef uint32_t unsigned_bits __attribute__((vector_size(MODA_EXT_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(MODA_EXT_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(MODA_EXT_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t bits __attribute__((vector_size(MODA_EXT_VECTOR_BYTES)));
  typedef uint64_t unsigned_bits __attribute__((vector_size(MODA_EXT_VECTOR_BYTES)));
};
// Two bfloat16 numbers, the first in the lower half: what instructions that add two products to a float read.
typedef uint32_t Pair;
template <>
struct VectorOf<Pair> : VectorOf<float> {
  typedef unsigned_bits type;
  typedef Pair unaligned __attribute__((vector_size(MODA_EXT_VECTOR_BYTES), aligned(4), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using Bits = typename VectorOf<T>::bits;
template <class T>
using UnsignedBits = typename VectorOf<T>::unsigned_bits;

template <class T>
constexpr int kLanes = MODA_EXT_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class T>
MODA_EXT_INLINE Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <class T>
MODA_EXT_INLINE void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}
// Past the caches, for results too large to stay there: the line need not be read first. p is aligned to a vector;
// fence before another thread reads. ARM's processors see by themselves that whole lines are written.
template <class T>
MODA_EXT_INLINE void store_nontemporal(T* p, Vector<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  store(p, v);
#endif
}
MODA_EXT_INLINE void nontemporal_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
template <class T>
MODA_EXT_INLINE Vector<T> splat(T x) {
  return x - Vector<T>{};  // x - 0 folds into a plain broadcast; 0 + x would not, because of -0
}

// Lanes of `a` where the mask is set, of `b` where it is not.
template <class T>
MODA_EXT_INLINE Vector<T> choose(Bits<T> mask, Vector<T> a, Vector<T> b) {
  return (Vector<T>)(((Bits<T>)a & mask) | ((Bits<T>)b & ~mask));
}

// max(a, b) and min(a, b) that return b when either is NaN, as the x86 instructions do: maximum(limit, x) keeps a NaN
// in x. A comparison and a choice elsewhere: ARM's instructions return NaN also where only a is.
#if defined(__AVX512F__)  // the maskz form: GCC 12 warns of an uninitialised operand in the plain one
#define MODA_EXT_BOUND(name, operation, compare)                                        \
  MODA_EXT_INLINE Vector<float> name(Vector<float> a, Vector<float> b) {                \
    return (Vector<float>)_mm512_maskz_##operation##_ps(0xffff, (__m512)a, (__m512)b);  \
  }                                                                                     \
  MODA_EXT_INLINE Vector<double> name(Vector<double> a, Vector<double> b) {             \
    return (Vector<double>)_mm512_maskz_##operation##_pd(0xff, (__m512d)a, (__m512d)b); \
  }
#elif defined(__AVX2__)
#define MODA_EXT_BOUND(name, operation, compare)                            \
  MODA_EXT_INLINE Vector<float> name(Vector<float> a, Vector<float> b) {    \
    return (Vector<float>)_mm256_##operation##_ps((__m256)a, (__m256)b);    \
  }                                                                         \
  MODA_EXT_INLINE Vector<double> name(Vector<double> a, Vector<double> b) { \
    return (Vector<double>)_mm256_##operation##_pd((__m256d)a, (__m256d)b); \
  }
#elif defined(__SSE2__)
#define MODA_EXT_BOUND(name, operation, compare)                            \
  MODA_EXT_INLINE Vector<float> name(Vector<float> a, Vector<float> b) {    \
    return (Vector<float>)_mm_##operation##_ps((__m128)a, (__m128)b);       \
  }                                                                         \
  MODA_EXT_INLINE Vector<double> name(Vector<double> a, Vector<double> b) { \
    return (Vector<double>)_mm_##operation##_pd((__m128d)a, (__m128d)b);    \
  }
#else
#define MODA_EXT_BOUND(name, operation, compare)                                                       \
  MODA_EXT_INLINE Vector<float> name(Vector<float> a, Vector<float> b) { return a compare b ? a : b; } \
  MODA_EXT_INLINE Vector<double> name(Vector<double> a, Vector<double> b) { return a compare b ? a : b; }
#endif
MODA_EXT_BOUND(maximum, max, >)
MODA_EXT_BOUND(minimum, min, <)
#undef MODA_EXT_BOUND

// Horizontal reductions, halving the vector down to 16 bytes and then lane by lane: a fixed order, so a result depends
// only on the instruction set. Extracting halves is one instruction each; general shuffles would need masks from
// memory.
template <class T, int bytes>
struct PartOf {
  typedef T type __attribute__((vector_size(bytes)));
};
template <class Part, class Whole>
MODA_EXT_INLINE Part lower_half(Whole v) {
  Part part;
  memcpy(&part, &v, sizeof(part));
  return part;
}
template <class Part, class Whole>
MODA_EXT_INLINE Part upper_half(Whole v) {
  Part part;
  memcpy(&part, reinterpret_cast<const char*>(&v) + sizeof(part), sizeof(part));
  return part;
}

template <class T>
MODA_EXT_INLINE T reduce_add(Vector<T> v) {
  typedef typename PartOf<T, 16>::type Sixteen;
#if MODA_EXT_VECTOR_BYTES == 64
  typedef typename PartOf<T, 32>::type ThirtyTwo;
  const ThirtyTwo half = lower_half<ThirtyTwo>(v) + upper_half<ThirtyTwo>(v);
  const Sixteen quarter = lower_half<Sixteen>(half) + upper_half<Sixteen>(half);
#elif MODA_EXT_VECTOR_BYTES == 32
  const Sixteen quarter = lower_half<Sixteen>(v) + upper_half<Sixteen>(v);
#else
  const Sixteen quarter = v;
#endif
  if (sizeof(T) == 8) return quarter[0] + quarter[1];
  return (quarter[0] + quarter[2 % (16 / sizeof(T))]) + (quarter[1] + quarter[3 % (16 / sizeof(T))]);
}

template <class V>
MODA_EXT_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}
template <class T>
MODA_EXT_INLINE T reduce_max(Vector<T> v) {
  typedef typename PartOf<T, 16>::type Sixteen;
#if MODA_EXT_VECTOR_BYTES == 64
  typedef typename PartOf<T, 32>::type ThirtyTwo;
  const ThirtyTwo half = larger(lower_half<ThirtyTwo>(v), upper_half<ThirtyTwo>(v));
  const Sixteen quarter = larger(lower_half<Sixteen>(half), upper_half<Sixteen>(half));
#elif MODA_EXT_VECTOR_BYTES == 32
  const Sixteen quarter = larger(lower_half<Sixteen>(v), upper_half<Sixteen>(v));
#else
  const Sixteen quarter = v;
#endif
  if (sizeof(T) == 8) return larger(quarter[0], quarter[1]);
  return larger(larger(quarter[0], quarter[2 % (16 / sizeof(T))]), larger(quarter[1], quarter[3 % (16 / sizeof(T))]));
}

// Lanes below count keep v, the others become zero.
template <class T>
MODA_EXT_INLINE Vector<T> keep_first(Vector<T> v, int count) {
  typedef Bits<T> I;
  I iota;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) iota[i] = i;
  return (Vector<T>)((I)v & (iota < (I{} + count)));
}
// Lanes below count keep v, the others become fill.
template <class T>
MODA_EXT_INLINE Vector<T> keep_first_or(Vector<T> v, int count, T fill) {
  Bits<T> iota;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) iota[i] = i;
  return choose<T>(iota < (Bits<T>{} + count), v, splat(fill));
}

// 2^x for x <= 0 or slightly above; exactly 0 for x <= -127 (float) or x <= -1023 (double), -inf included; NaN stays
// NaN. A lane that its caller drops may hold any x: the exponent field is added to as unsigned numbers, which wrap.
// x = n + f with n = round(x) through the magic number 1.5 * 2^mantissa, a minimax polynomial for 2^f, |f| <= 1/2,
// whose constant term is exactly 1, and n added to the exponent field. Relative error 1e-7 (float, degree 5), 2e-16
// (double, degree 12).
MODA_EXT_INLINE Vector<float> exp2_nonpositive(Vector<float> x) {
  typedef Vector<float> V;
  typedef UnsignedBits<float> U;
  const V magic = splat(12582912.0f);
  x = maximum(splat(-127.0f), x);
  const V t = x + magic;
  const V f = x - (t - magic);
  V p = splat(1.3264727e-3f);
  p = p * f + splat(9.6715130e-3f);
  p = p * f + splat(5.5507336e-2f);
  p = p * f + splat(2.4022242e-1f);
  p = p * f + splat(6.9314700e-1f);
  p = p * f + splat(1.0f);
  return (V)((U)p + ((U)t << 23));
}
MODA_EXT_INLINE Vector<double> exp2_nonpositive(Vector<double> x) {
  typedef Vector<double> V;
  typedef UnsignedBits<double> U;
  // Taylor coefficients ln(2)^k / k!: at degree 12 the truncation error on [-1/2, 1/2] is below 1e-17.
  constexpr double kC[] = {1.0,
                           0.69314718055994530942,
                           0.24022650695910071233,
                           0.05550410866482157995,
                           0.00961812910762847716,
                           0.00133335581464284434,
                           0.00015403530393381609,
                           1.52527338040598403e-5,
                           1.32154867901443095e-6,
                           1.01780860092396997e-7,
                           7.05491162080112333e-9,
                           4.44553827187081150e-10,
                           2.56784359934882051e-11};
  const V magic = splat(6755399441055744.0);
  x = maximum(splat(-1023.0), x);
  const V t = x + magic;
  const V f = x - (t - magic);
  V p = splat(kC[12]);
#pragma GCC unroll 12
  for (int k = 11; k >= 0; --k) p = p * f + splat(kC[k]);
  return (V)((U)p + ((U)t << 52));
}
template <class T>
MODA_EXT_INLINE T exp2_nonpositive(T x) {
  return exp2_nonpositive(splat(x))[0];
}

// Element conversions between storage and compute type.
MODA_EXT_INLINE float upcast(float x) { return x; }
MODA_EXT_INLINE double upcast(double x) { return x; }
MODA_EXT_INLINE float upcast(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
MODA_EXT_INLINE float upcast(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  __fp16 half;
  memcpy(&half, &x, 2);
  return half;
#else
  // Exponent and mantissa moved into a float and multiplied by 2^112 (which also normalises subnormals); inf and NaN
  // restored.
  uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float value;
  memcpy(&value, &magnitude, 4);
  value *= 5.192296858534828e33f;
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((x.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000u;
  bits |= static_cast<uint32_t>(x.bits & 0x8000) << 16;
  memcpy(&value, &bits, 4);
  return value;
#endif
}

MODA_EXT_INLINE void downcast(float x, float* out) { *out = x; }
MODA_EXT_INLINE void downcast(double x, double* out) { *out = x; }
MODA_EXT_INLINE void downcast(float x, BFloat16* out) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
MODA_EXT_INLINE void downcast(float x, Float16* out) {
#if defined(__F16C__)
  out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  const __fp16 half = x;
  memcpy(out, &half, 2);
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (bits >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to infinity
  } else if (bits < 0x38800000u) {
    // Subnormal half: adding 0.5 aligns the mantissa so that the float addition itself rounds to nearest even.
    float value;
    memcpy(&value, &bits, 4);
    value += 0.5f;
    memcpy(&half, &value, 4);
    half -= 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
#endif
}

// Products of pairs, and numbers rounded to them: of the neighbours in (low, high), and of one number of each vector.
#if defined(__AVX512BF16__)
#define MODA_EXT_PAIRS
MODA_EXT_INLINE Vector<float> multiply_add_pairs(Vector<float> sum, Vector<Pair> a, Vector<Pair> b) {
  return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
MODA_EXT_INLINE Vector<Pair> pairs_of_neighbours(Vector<float> low, Vector<float> high) {
  return (Vector<Pair>)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
MODA_EXT_INLINE Vector<Pair> pairs_of_two(Vector<float> first, Vector<float> second) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  Halves order;
#pragma GCC unroll 32
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  return (Vector<Pair>)_mm512_permutexvar_epi16((__m512i)order, (__m512i)pairs_of_neighbours(first, second));
}
#elif defined(MODA_EXT_NEON_BF16)
#define MODA_EXT_PAIRS
MODA_EXT_INLINE Vector<float> multiply_add_pairs(Vector<float> sum, Vector<Pair> a, Vector<Pair> b) {
  return (Vector<float>)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
MODA_EXT_INLINE Vector<Pair> pairs_of_neighbours(Vector<float> low, Vector<float> high) {
  return (Vector<Pair>)vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)low), (float32x4_t)high);
}
MODA_EXT_INLINE Vector<Pair> pairs_of_two(Vector<float> first, Vector<float> second) {
  return (Vector<Pair>)vzip1q_u16((uint16x8_t)vcvtq_low_bf16_f32((float32x4_t)first),
                                  (uint16x8_t)vcvtq_low_bf16_f32((float32x4_t)second));
}
#endif

// Row conversions with a factor; count is a multiple of 8 (head sizes are).
template <class Storage, class T>
MODA_EXT_INLINE void load_row(const Storage* from, T factor, T* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = upcast(from[i]) * factor;
}
template <class Storage, class T>
MODA_EXT_INLINE void store_row(const T* from, T factor, Storage* to, int count) {
  for (int i = 0; i < count; ++i) downcast(from[i] * factor, to + i);
}
#if defined(__F16C__)
template <>
MODA_EXT_INLINE void load_row<Float16, float>(const Float16* from, float factor, float* to, int count) {
  const __m256 f = _mm256_set1_ps(factor);
  for (int i = 0; i < count; i += 8)
    _mm256_storeu_ps(to + i,
                     _mm256_mul_ps(f, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)))));
}
template <>
MODA_EXT_INLINE void store_row<Float16, float>(const float* from, float factor, Float16* to, int count) {
  const __m256 f = _mm256_set1_ps(factor);
  for (int i = 0; i < count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_mul_ps(f, _mm256_loadu_ps(from + i)), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)  // GCC vectorises the other direction by itself
template <>
MODA_EXT_INLINE void store_row<Float16, float>(const float* from, float factor, Float16* to, int count) {
  for (int i = 0; i < count; i += 4)
    vst1_u16(&to[i].bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)(load(from + i) * splat(factor)))));
}
#endif

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
