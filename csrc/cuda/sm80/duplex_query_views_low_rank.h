// Weights of low rank (docs/mathematics.md section 1, fusion "concat"), and rows that they multiply.
#pragma once

#include "cuda/sm80/gram_family_tiles.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {

constexpr int kRankTile = 32;  // ranks that are in shared memory together; weights are padded with zeros to whole tiles

inline int count_rank_tiles(const DuplexArgs& args) { return static_cast<int>(divide_up(args.rank, kRankTile)); }

enum class Weight { kB1, kB2, kA1, kA2 };
constexpr int kWeights = 4;

// Parts in which operands of 16 bits make sums that are good to float32: rounded, and what rounding took away.
template <class Element>
constexpr int kExactParts = sizeof(Element) == 2 ? 2 : 1;

// The weights as products take them, A transposed: (part, Weight, view, rank_tiles kRankTile, D).
struct PackedWeights {
  void* data;
  int rank_tiles, parts;

  static int64_t numbers(const DuplexArgs& args) {  // of a part
    return static_cast<int64_t>(kWeights) * args.num_modalities * count_rank_tiles(args) * kRankTile * args.head_dim;
  }
};

template <class Element>
MODA_EXT_DEVICE const Element* weight_rows(const DuplexArgs& args, const PackedWeights& weights, Weight weight,
                                           int view) {
  const int64_t index = static_cast<int64_t>(weight) * args.num_modalities + view;
  return static_cast<const Element*>(weights.data) + index * weights.rank_tiles * kRankTile * args.head_dim;
}
MODA_EXT_DEVICE int64_t weight_part_stride(const DuplexArgs& args, const PackedWeights& weights) {
  return static_cast<int64_t>(kWeights) * args.num_modalities * weights.rank_tiles * kRankTile * args.head_dim;
}

// What a number of the packed weights is.
struct WeightNumber {
  Weight weight;
  bool exists;     // else padding
  int64_t offset;  // in the operator's tensor

  MODA_EXT_DEVICE WeightNumber(const DuplexArgs& args, int rank_tiles, int64_t index) {
    const int D = args.head_dim, padded = rank_tiles * kRankTile;
    const int column = static_cast<int>(index % D), rank = static_cast<int>(index / D % padded);
    const int64_t view = index / D / padded % args.num_modalities;
    weight = static_cast<Weight>(index / D / padded / args.num_modalities);
    exists = static_cast<int>(weight) < kWeights && rank < args.rank;
    const bool transposed = weight == Weight::kA1 || weight == Weight::kA2;
    offset = view * D * args.rank + (transposed ? column * args.rank + rank : rank * D + column);
  }
};

template <class Element>
struct PackWeights {
  struct Params {
    DuplexArgs args;
    PackedWeights weights;
  };
  static constexpr int kThreads = 256;
  static int64_t blocks(const Params& p) { return divide_up(PackedWeights::numbers(p.args), kThreads); }
  static size_t shared_bytes(const Params&) { return 0; }

  static MODA_EXT_DEVICE void run(const Params& p, char*) {
    const int64_t index = block_index() * kThreads + thread_index();
    const WeightNumber number(p.args, p.weights.rank_tiles, index);
    if (static_cast<int>(number.weight) >= kWeights) return;
    const float* from = p.args.b1;
    if (number.weight == Weight::kB2) from = p.args.b2;
    if (number.weight == Weight::kA1) from = p.args.a1;
    if (number.weight == Weight::kA2) from = p.args.a2;
    float rest = number.exists ? from[number.offset] : 0.0f;
    Element* to = static_cast<Element*>(p.weights.data) + index;
    for (int part = 0; part < p.weights.parts; ++part, to += weight_part_stride(p.args, p.weights)) {
      *to = from_float<Element>(rest);
      rest -= to_float(*to);
    }
  }
};

// A block's rows in shared memory, 16 for each warp; behind them a stream of weights, kStreamed bytes at least, then
// what else the block keeps there, and what is `reduced` of the rows to the rank. Every thread takes part in what
// copies; a warp's own rows are in order for it throughout. kParts: of weights, and of what is reduced.
template <class Element, int kHeadDim, int kRows, int kParts, size_t kStreamed = 0>
class LowRankRows {
  using Products = Fragments<Element, kHeadDim>;
  using Reduced = Fragments<Element, kRankTile>;
  static constexpr int kStride = Products::kStride;

 public:
  static constexpr int kThreads = 2 * kRows;
  static size_t shared_bytes(const DuplexArgs& args, size_t kept = 0) {
    return kKeptAt + kept + static_cast<size_t>(count_rank_tiles(args)) * kParts * kRows * Reduced::kStride;
  }
  using Sums = float[1][kHeadDim / 8][4];

  MODA_EXT_DEVICE LowRankRows(const DuplexArgs& of_call, const PackedWeights& packed, char* shared, int kept = 0)
      : args(of_call), weights(packed), rows(shared), reduced(shared + kKeptAt + kept) {}

  MODA_EXT_DEVICE const Element* weight(Weight which, int view) const {
    return weight_rows<Element>(args, weights, which, view);
  }
  MODA_EXT_DEVICE char* stream() const { return rows + kStreamAt; }
  MODA_EXT_DEVICE char* kept() const { return rows + kKeptAt; }

  // Row of the block that the thread has sums of, h = 0 and 1.
  static MODA_EXT_DEVICE int own_row(int h) { return warp_index() * 16 + h * 8 + lane_index() / 4; }

  // Rows for which valid(row) is false become zeros. They arrive with the next copy that is waited for.
  template <class Valid>
  MODA_EXT_DEVICE void copy(const Element* first, int64_t row_stride, const Valid& valid) const {
    copy_rows<Element, kHeadDim, kRows, kThreads, 1>(rows, thread_index(), first, row_stride, args.head_dim, valid);
    commit_copies();
  }

  // reduced = rows W^T, or that much more.
  MODA_EXT_DEVICE void reduce(const Element* source, bool add = false) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 1
    for (int tile = 0; tile < weights.rank_tiles; ++tile) {
      float c[1][kRankTile / 8][4];
      set_zero(c);
      for (int part = 0; add && part < kParts; ++part) add_reduced(part, tile, c);
#pragma unroll 1
      for (int part = 0; part < kParts; ++part) {
        bring(source, part, tile);
        Products::multiply_rows(c, as_new(warp_rows()), as_new(stream()));
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        char* target = warp_reduced(part, tile);
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int n = 0; n < kRankTile / 8; ++n) {
            float &low = c[0][n][2 * h], &high = c[0][n][2 * h + 1];
            Reduced::store_pair(target + (h * 8 + g) * Reduced::kStride, n * 8 + 2 * t, low, high);
            low -= to_float(from_float<Element>(low));
            high -= to_float(from_float<Element>(high));
          }
      }
    }
    sync_warp();
  }

  // sums += reduced W, rows of reduced times factor_of(row of the block, rank tile).
  template <class FactorOf>
  MODA_EXT_DEVICE void add_product(const Element* source, const FactorOf& factor_of, Sums& sums) const {
#pragma unroll 1
    for (int tile = 0; tile < weights.rank_tiles; ++tile) {
#pragma unroll 1
      for (int part = 0; part < kParts; ++part) {
        bring(source, part, tile);
#pragma unroll 1
        for (int other = 0; other + part < kParts; ++other) {  // both rests' product is below float32
          float x[1][kRankTile / 8][4];
          set_zero(x);
          add_reduced(other, tile, x);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float factor = factor_of(own_row(h), tile);
#pragma unroll
            for (int n = 0; n < kRankTile / 8; ++n) {
              x[0][n][2 * h] *= factor;
              x[0][n][2 * h + 1] *= factor;
            }
          }
          Products::multiply_registers(sums, x, as_new(stream()));
        }
      }
    }
  }
  MODA_EXT_DEVICE void add_product(const Element* source, Sums& sums) const {
    add_product(source, [](int, int) { return 1.0f; }, sums);
  }

  // sums += rows times factor_of(row of the block).
  template <class FactorOf>
  MODA_EXT_DEVICE void add_rows(const FactorOf& factor_of, Sums& sums) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float factor = factor_of(own_row(h));
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        float low, high;
        Products::load_pair(warp_rows() + (h * 8 + g) * kStride, n * 8 + 2 * t, low, high);
        sums[0][n][2 * h] += factor * low;
        sums[0][n][2 * h + 1] += factor * high;
      }
    }
  }

  // The sums, rounded, take the place of the warp's rows, and keep what rounding took away.
  MODA_EXT_DEVICE void take(Sums& sums) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
    sync_warp();  // every lane has read the rows that were there
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        float &low = sums[0][n][2 * h], &high = sums[0][n][2 * h + 1];
        Products::store_pair(warp_rows() + (h * 8 + g) * kStride, n * 8 + 2 * t, low, high);
        low -= to_float(from_float<Element>(low));
        high -= to_float(from_float<Element>(high));
      }
    sync_warp();
  }

  // To where pointer_of(row of the block) says (null: nowhere): the rows, or the parts of what is reduced of them.
  template <class PointerOf>
  MODA_EXT_DEVICE void store(const PointerOf& pointer_of) const {
    store_rows<Element, kHeadDim, 16>(warp_rows(), 0, args.head_dim,
                                      [&](int own) -> Element* { return pointer_of(warp_index() * 16 + own); });
  }
  template <class PointerOf>
  MODA_EXT_DEVICE void store_reduced(const PointerOf& pointer_of) const {
#pragma unroll 1
    for (int tile = 0; tile < weights.rank_tiles; ++tile)
#pragma unroll 1
      for (int part = 0; part < kParts; ++part)
        store_rows<Element, kRankTile, 16>(warp_reduced(part, tile), 0, kRankTile, [&](int own) -> Element* {
          Element* row = pointer_of(warp_index() * 16 + own, part);
          return row == nullptr ? nullptr : row + tile * kRankTile;
        });
  }

 private:
  static constexpr size_t kStreamAt = static_cast<size_t>(kRows) * kStride;
  static constexpr size_t kTileBytes = static_cast<size_t>(kRankTile) * kStride;
  static constexpr size_t kKeptAt = kStreamAt + (kStreamed > kTileBytes ? kStreamed : kTileBytes);

  MODA_EXT_DEVICE char* warp_rows() const { return rows + warp_index() * 16 * kStride; }
  MODA_EXT_DEVICE char* warp_reduced(int part, int tile) const {
    return reduced + ((tile * kParts + part) * kRows + warp_index() * 16) * Reduced::kStride;
  }

  MODA_EXT_DEVICE void add_reduced(int part, int tile, float (&x)[1][kRankTile / 8][4]) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < kRankTile / 8; ++n) {
        float low, high;
        Reduced::load_pair(warp_reduced(part, tile) + (h * 8 + g) * Reduced::kStride, n * 8 + 2 * t, low, high);
        x[0][n][2 * h] += low;
        x[0][n][2 * h + 1] += high;
      }
  }

  // A tile of a part of a weight into the stream.
  MODA_EXT_DEVICE void bring(const Element* source, int part, int tile) const {
    const int64_t first =
        part * weight_part_stride(args, weights) + static_cast<int64_t>(tile) * kRankTile * args.head_dim;
    sync_threads();  // everyone is done with the buffer
    copy_rows<Element, kHeadDim, kRankTile, kThreads, 1>(stream(), thread_index(), source + first, args.head_dim,
                                                         args.head_dim, [](int) { return true; });
    commit_copies();
    wait_copies<0>();
    sync_threads();
  }

  const DuplexArgs& args;
  const PackedWeights& weights;

 public:
  char* const rows;

 private:
  char* const reduced;
};

}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
