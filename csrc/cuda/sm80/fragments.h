// Matrix products of one warp, for 16-bit elements on tensor cores and for float32 with ordinary multiply-adds. Both
// keep sums in the C layout of ptx.h, so kernels are written once.
//
//   multiply_rows       C += A B^T, rows of A and B in shared memory      (scores: queries and keys)
//   multiply_registers  C += P B, P in the C layout, B in shared memory   (output: probabilities and values)
//   multiply_columns    C += A^T B, rows of A and B in shared memory      (Gram matrices: keys and keys)
//
// Rows in shared memory are kHeadDim elements and 16 bytes of padding: their length is then an odd number of 16-byte
// units, and eight consecutive rows, read 16 bytes each, touch every bank once. Padding serves every head size; a
// swizzle would need a rule for each.
#pragma once

#include "cuda/ptx.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {

template <class Element, int kHeadDim>
constexpr int kRowStride = kHeadDim * static_cast<int>(sizeof(Element)) + 16;  // bytes

template <int kRowFragments, int kColumnFragments>
MODA_EXT_DEVICE void set_zero(float (&c)[kRowFragments][kColumnFragments][4]) {
#pragma unroll
  for (int r = 0; r < kRowFragments; ++r)
#pragma unroll
    for (int n = 0; n < kColumnFragments; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[r][n][i] = 0.0f;
}

template <class Element, int kHeadDim>
struct Fragments {
  static constexpr int kStride = kRowStride<Element, kHeadDim>;

  // Column fragments n and n + 1 of C += A B, B as load_matrices brings it.
  template <int kRowFragments, int kColumnFragments>
  static MODA_EXT_DEVICE void multiply_two_columns(float (&c)[kRowFragments][kColumnFragments][4], int n,
                                                   const uint32_t (&a)[kRowFragments][4], const uint32_t (&b)[4]) {
#pragma unroll
    for (int r = 0; r < kRowFragments; ++r) {
      multiply_add<Element>(c[r][n], a[r], b[0], b[1]);
      multiply_add<Element>(c[r][n + 1], a[r], b[2], b[3]);
    }
  }

  // a: first of 16 kRowFragments rows, b: first of 8 kColumnFragments rows.
  template <int kRowFragments, int kColumnFragments>
  static MODA_EXT_DEVICE void multiply_rows(float (&c)[kRowFragments][kColumnFragments][4], const char* a,
                                            const char* b) {
    static_assert(kColumnFragments % 2 == 0, "B is loaded two fragments at a time");
    const int lane = lane_index();
    const char* a_lane = a + lane % 16 * kStride + lane / 16 * 16;
    const char* b_lane = b + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 16;
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t a_fragment[kRowFragments][4];
#pragma unroll
      for (int r = 0; r < kRowFragments; ++r) load_matrices(a_fragment[r], a_lane + r * 16 * kStride + k * 32);
#pragma unroll
      for (int n = 0; n < kColumnFragments; n += 2) {
        uint32_t b_fragment[4];
        load_matrices(b_fragment, b_lane + n * 8 * kStride + k * 32);
        multiply_two_columns(c, n, a_fragment, b_fragment);
      }
    }
  }

  // b: first of 8 kDepthFragments rows, from the first of the 8 kColumnFragments columns that are wanted. P is rounded
  // to Element.
  template <int kRowFragments, int kDepthFragments, int kColumnFragments>
  static MODA_EXT_DEVICE void multiply_registers(float (&c)[kRowFragments][kColumnFragments][4],
                                                 const float (&p)[kRowFragments][kDepthFragments][4], const char* b) {
    static_assert(kDepthFragments % 2 == 0 && kColumnFragments % 2 == 0,
                  "fragments are 16 deep, B is loaded two fragments at a time");
    const int lane = lane_index();
    const char* b_lane = b + lane % 16 * kStride + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < kDepthFragments; k += 2) {
      uint32_t a_fragment[kRowFragments][4];  // the C layout of two fragments side by side is the A layout
#pragma unroll
      for (int r = 0; r < kRowFragments; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a_fragment[r][i] = pack_pair<Element>(p[r][k + i / 2][i % 2 * 2], p[r][k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < kColumnFragments; n += 2) {
        uint32_t b_fragment[4];
        load_matrices_transposed(b_fragment, b_lane + k * 8 * kStride + n * 16);
        multiply_two_columns(c, n, a_fragment, b_fragment);
      }
    }
  }

  // a, b: first of kDepth rows, from the first of the 16 kRowFragments columns of A and 8 kColumnFragments of B. Rows
  // of A may have a length of their own.
  template <int kDepth, int kStrideOfA = kStride, int kRowFragments, int kColumnFragments>
  static MODA_EXT_DEVICE void multiply_columns(float (&c)[kRowFragments][kColumnFragments][4], const char* a,
                                               const char* b) {
    static_assert(kDepth % 16 == 0 && kColumnFragments % 2 == 0,
                  "fragments are 16 deep, B is loaded two fragments at a time");
    const int lane = lane_index();
    const char* a_lane = a + (lane % 8 + lane / 16 * 8) * kStrideOfA + lane / 8 % 2 * 16;
    const char* b_lane = b + lane % 16 * kStride + lane / 16 * 16;
#pragma unroll 1
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a_fragment[kRowFragments][4];
#pragma unroll
      for (int r = 0; r < kRowFragments; ++r) load_matrices_transposed(a_fragment[r], a_lane + k * kStrideOfA + r * 32);
#pragma unroll
      for (int n = 0; n < kColumnFragments; n += 2) {
        uint32_t b_fragment[4];
        load_matrices_transposed(b_fragment, b_lane + k * kStride + n * 16);
        multiply_two_columns(c, n, a_fragment, b_fragment);
      }
    }
  }

  // Two neighbouring columns of a row, rounded.
  static MODA_EXT_DEVICE void store_pair(char* row, int column, float low, float high) {
    *reinterpret_cast<uint32_t*>(row + column * 2) = pack_pair<Element>(low, high);
  }
  static MODA_EXT_DEVICE void load_pair(const char* row, int column, float& low, float& high) {
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(row + column * 2);
    low = to_float(Element{static_cast<uint16_t>(pair)});
    high = to_float(Element{static_cast<uint16_t>(pair >> 16)});
  }
};

template <int kHeadDim>
struct Fragments<float, kHeadDim> {
  static constexpr int kStride = kRowStride<float, kHeadDim>;

  struct alignas(16) Float4 {
    float at[4];
  };
  struct alignas(8) Float2 {
    float at[2];
  };

  template <int kRowFragments, int kColumnFragments>
  static MODA_EXT_DEVICE void multiply_rows(float (&c)[kRowFragments][kColumnFragments][4], const char* a,
                                            const char* b) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 1
    for (int k = 0; k < kHeadDim; k += 4) {
      Float4 a_rows[kRowFragments][2];
#pragma unroll
      for (int r = 0; r < kRowFragments; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          a_rows[r][h] = *reinterpret_cast<const Float4*>(a + (r * 16 + h * 8 + g) * kStride + k * 4);
#pragma unroll
      for (int n = 0; n < kColumnFragments; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const Float4 b_row = *reinterpret_cast<const Float4*>(b + (n * 8 + 2 * t + j) * kStride + k * 4);
#pragma unroll
          for (int r = 0; r < kRowFragments; ++r)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
              for (int i = 0; i < 4; ++i) c[r][n][2 * h + j] += a_rows[r][h].at[i] * b_row.at[i];
        }
      }
    }
  }

  // A row of P lies in the four lanes of its quad: each number is handed round when its turn comes.
  template <int kRowFragments, int kDepthFragments, int kColumnFragments>
  static MODA_EXT_DEVICE void multiply_registers(float (&c)[kRowFragments][kColumnFragments][4],
                                                 const float (&p)[kRowFragments][kDepthFragments][4], const char* b) {
    const int quad = lane_index() & ~3, t = lane_index() % 4;
#pragma unroll
    for (int k = 0; k < kDepthFragments; ++k) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll 1
        for (int owner = 0; owner < 4; ++owner) {
          float weight[kRowFragments][2];
#pragma unroll
          for (int r = 0; r < kRowFragments; ++r)
#pragma unroll
            for (int h = 0; h < 2; ++h) weight[r][h] = shuffle(p[r][k][2 * h + j], quad + owner);
          const char* row = b + (k * 8 + 2 * owner + j) * kStride + t * 8;
#pragma unroll
          for (int n = 0; n < kColumnFragments; ++n) {
            const Float2 pair = *reinterpret_cast<const Float2*>(row + n * 32);
#pragma unroll
            for (int r = 0; r < kRowFragments; ++r)
#pragma unroll
              for (int i = 0; i < 4; ++i) c[r][n][i] += weight[r][i / 2] * pair.at[i % 2];
          }
        }
      }
    }
  }

  template <int kDepth, int kStrideOfA = kStride, int kRowFragments, int kColumnFragments>
  static MODA_EXT_DEVICE void multiply_columns(float (&c)[kRowFragments][kColumnFragments][4], const char* a,
                                               const char* b) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 1
    for (int k = 0; k < kDepth; ++k) {
      float weight[kRowFragments][2];
#pragma unroll
      for (int r = 0; r < kRowFragments; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          weight[r][h] = *reinterpret_cast<const float*>(a + k * kStrideOfA + (r * 16 + h * 8 + g) * 4);
#pragma unroll
      for (int n = 0; n < kColumnFragments; ++n) {
        const Float2 pair = *reinterpret_cast<const Float2*>(b + k * kStride + (n * 8 + 2 * t) * 4);
#pragma unroll
        for (int r = 0; r < kRowFragments; ++r)
#pragma unroll
          for (int i = 0; i < 4; ++i) c[r][n][i] += weight[r][i / 2] * pair.at[i % 2];
      }
    }
  }

  static MODA_EXT_DEVICE void store_pair(char* row, int column, float low, float high) {
    *reinterpret_cast<Float2*>(row + column * 4) = Float2{{low, high}};
  }
  static MODA_EXT_DEVICE void load_pair(const char* row, int column, float& low, float& high) {
    const Float2 pair = *reinterpret_cast<const Float2*>(row + column * 4);
    low = pair.at[0];
    high = pair.at[1];
  }
};

}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
