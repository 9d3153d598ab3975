// What the Gram kernels share: keys that become features, sums of key tiles' Gram matrices, and such sums as the second
// operand of a product.
#pragma once

#include "cuda/gram_family_kernels.h"
#include "cuda/sm80/key_tiles.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {

// A batch element: these operators have no packed layout, and kernels no registers to spare for one.
MODA_EXT_DEVICE Sequence batch_element(const GramArgs& args, int64_t index) {
  return {index, 0, 0, args.num_queries, args.num_keys};
}

// By the length of a row; shared memory stays below 99 KB, see ForwardTile.
//   kKeys   keys of a tile that streams by
//   kRows   rows that a block owns, 16 for each warp
//   kSlice  rows of a D x D matrix that are in shared memory together
template <class Element, int kHeadDim>
struct GramTile {
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(Element));
  static constexpr int kKeys = kRowBytes > 768 ? 16 : kRowBytes > 256 ? 32 : 64;
  static constexpr int kRows = kRowBytes > 512 ? 32 : 64;
  static constexpr int kSlice = kHeadDim % 64 == 0 || kKeys < 32 ? kKeys : 32;
};

// 16 bytes of a row.
template <class Element>
struct alignas(16) RowChunk {
  static constexpr int kNumbers = 16 / static_cast<int>(sizeof(Element));
  Element at[kNumbers];
};

// phi = factor k. The factor is 1 / |k| where `normalised`, else a constant.
struct KeyNorm {
  float factor, normalised;
};

// Multiplies rows in shared memory with factor_of(row), rounded, in place; a quad has a row, and all of its lanes call
// factor_of. What rounding took away goes to `rest` (null: nowhere): sums in float32 take 16-bit operands in two parts.
// Every thread must see the rows before, and a barrier must follow.
template <class Element, int kHeadDim, int kRows, int kThreads, class FactorOf>
MODA_EXT_DEVICE void scale_rows(char* rows, char* rest, const FactorOf& factor_of) {
  static_assert(kRows % 8 == 0, "a warp has eight quads");
  using Chunk = RowChunk<Element>;
#pragma unroll 1
  for (int first = warp_index() * 8; first < kRows; first += kThreads / 4) {
    const int row = first + lane_index() / 4;
    Chunk* chunks = reinterpret_cast<Chunk*>(rows + row * kRowStride<Element, kHeadDim>);
    Chunk* rests = reinterpret_cast<Chunk*>(rest + row * kRowStride<Element, kHeadDim>);
    const float factor = factor_of(row);
#pragma unroll
    for (int i = lane_index() % 4; i < kHeadDim / Chunk::kNumbers; i += 4) {
#pragma unroll
      for (int j = 0; j < Chunk::kNumbers; ++j) {
        const float exact = to_float(chunks[i].at[j]) * factor;
        chunks[i].at[j] = from_float<Element>(exact);
        if (rest != nullptr) rests[i].at[j] = from_float<Element>(exact - to_float(chunks[i].at[j]));
      }
    }
  }
}

// How a key in shared memory becomes its features. A quad has a row.
template <class Element, int kHeadDim>
MODA_EXT_DEVICE KeyNorm measure_key(const GramArgs& args, const char* keys, int row) {
  using Chunk = RowChunk<Element>;
  if (!args.unit_keys) return {1.0f, 0.0f};
  const Chunk* chunks = reinterpret_cast<const Chunk*>(keys + row * kRowStride<Element, kHeadDim>);
  float square = 0.0f;
#pragma unroll
  for (int i = lane_index() % 4; i < kHeadDim / Chunk::kNumbers; i += 4)
#pragma unroll
    for (int j = 0; j < Chunk::kNumbers; ++j) square += to_float(chunks[i].at[j]) * to_float(chunks[i].at[j]);
  const float length = sqrtf(quad_sum(square));
  return {1.0f / maximum(length, args.eps), length > args.eps ? 1.0f : 0.0f};
}

// Keys of a tile in shared memory become phi as scale_rows does it; norms[row] (null: not wanted) says how.
template <class Element, int kHeadDim, int kRows, int kThreads>
MODA_EXT_DEVICE void make_features(const GramArgs& args, char* keys, char* rest, KeyNorm* norms) {
  scale_rows<Element, kHeadDim, kRows, kThreads>(keys, rest, [&](int row) {
    const KeyNorm norm = measure_key<Element, kHeadDim>(args, keys, row);
    if (norms != nullptr && lane_index() % 4 == 0) norms[row] = norm;
    return norm.factor;
  });
}

// How blocks share a D x D sum: above 128 columns four of them have a quarter each. It is in registers, 16
// kRowFragments rows of it for each warp.
template <int kHeadDim>
struct SumPart {
  static constexpr int kParts = kHeadDim > 128 ? 2 : 1, kPart = kHeadDim / kParts;
  static constexpr int kRowFragments = kPart > 64 ? 2 : 1, kColumnFragments = kPart / 8;
  static constexpr int kThreads = 32 * kPart / (16 * kRowFragments);
  using Sums = float[kRowFragments][kColumnFragments][4];
  int row, column;  // first of the warp

  // Takes the part's place out of a block index.
  MODA_EXT_DEVICE explicit SumPart(int64_t& index) {
    column = static_cast<int>(index % kParts) * kPart;
    index /= kParts;
    row = static_cast<int>(index % kParts) * kPart + warp_index() * 16 * kRowFragments;
    index /= kParts;
  }

  MODA_EXT_DEVICE void write(const Sums& sums, float factor, int head_dim, float* matrix) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int r = 0; r < kRowFragments; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = row + r * 16 + h * 8 + g;
        if (i >= head_dim) continue;
        char* target = reinterpret_cast<char*>(matrix + i * head_dim);
#pragma unroll
        for (int n = 0; n < kColumnFragments; ++n) {
          const int j = column + n * 8 + 2 * t;
          if (j < head_dim)
            Fragments<float, kHeadDim>::store_pair(target, j, sums[r][n][2 * h] * factor,
                                                   sums[r][n][2 * h + 1] * factor);
        }
      }
    }
  }
};

// Gram matrices of stretches of the sequence: grams[(batch, kv head, modality), piece] = sum phi_j^T phi_j over the
// keys of the modality in a piece of tiles_per_piece tiles.
//
// Tiling: a block owns one such matrix, or a part of it. The tiles of keys that hold its modality stream by,
// double-buffered; one tile is both operands, and what is not of the modality comes as zeros. Features of 16 bits are
// two parts, rounded and rest, whose products but the smallest are added up: the sum is good to float32.
// Memory traffic: a key is read for each modality in its tile, nearly always one; a quarter reads whole keys too.
struct GramParams {
  GramArgs args;
  const uint32_t* tiles;  // words of DescribeTiles
  int tiles_per_sequence;
  int pieces, tiles_per_piece;
  float* grams;
};

template <class Element, int kHeadDim>
class GramKernel {
  using Products = Fragments<Element, kHeadDim>;
  static constexpr int kStride = Products::kStride;
  using Part = SumPart<kHeadDim>;

 public:
  static constexpr int kKeys = GramTile<Element, kHeadDim>::kKeys;
  static constexpr int kThreads = Part::kThreads;
  static constexpr int kBuffers = sizeof(Element) == 2 ? 3 : 2;  // the third for the rest of 16-bit features
  using Params = GramParams;

  static int64_t blocks(const Params& p) { return p.args.num_grams() * p.pieces * Part::kParts * Part::kParts; }
  static size_t shared_bytes(const Params&) { return static_cast<size_t>(kBuffers * kKeys) * kStride; }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    const GramArgs& args = p.args;
    int64_t index = block_index();
    const Part part(index);
    float* gram = p.grams + index * args.head_dim * args.head_dim;
    const int first_tile = static_cast<int>(index % p.pieces) * p.tiles_per_piece;
    index /= p.pieces;
    const int modality = static_cast<int>(index % args.num_modalities);
    const int kv_head = static_cast<int>(index / args.num_modalities % args.kv_heads);
    const int64_t sequence_index = index / args.num_modalities / args.kv_heads;
    const Sequence sequence = batch_element(args, sequence_index);
    const uint32_t* words = p.tiles + sequence_index * p.tiles_per_sequence;
    const int end = minimum(first_tile + p.tiles_per_piece, p.tiles_per_sequence);
    const auto next_tile = [&](int tile) {
      while (tile < end && !(words[tile] >> modality & 1)) ++tile;
      return tile;
    };
    const auto copy = [&](int tile, char* target) {
      if (tile < end)
        copy_rows<Element, kHeadDim, kKeys, kThreads>(
            target, thread_index(),
            row_of<Element>(args.key, sequence.batch, kv_head, static_cast<int64_t>(tile) * kKeys), args.key.row,
            args.head_dim, [&](int row) { return modality_of(args, sequence, tile * kKeys + row) == modality; });
      commit_copies();
    };

    typename Part::Sums sum;
    set_zero(sum);
    int tile = next_tile(first_tile), stage = 0;
    copy(tile, shared);
    while (tile < end) {
      tile = next_tile(tile + 1);
      char* keys = shared + stage * kKeys * kStride;
      stage ^= 1;
      copy(tile, shared + stage * kKeys * kStride);
      wait_copies<1>();
      sync_threads();
      const bool has_rest = args.unit_keys && sizeof(Element) == 2;
      char* rest = shared + 2 * kKeys * kStride;
      if (args.unit_keys) {
        make_features<Element, kHeadDim, kKeys, kThreads>(args, keys, has_rest ? rest : nullptr, nullptr);
        sync_threads();
      }
      const int row = part.row * static_cast<int>(sizeof(Element));
      const int column = part.column * static_cast<int>(sizeof(Element));
      Products::template multiply_columns<kKeys>(sum, keys + row, keys + column);
      if (has_rest) {
        Products::template multiply_columns<kKeys>(sum, keys + row, rest + column);
        Products::template multiply_columns<kKeys>(sum, rest + row, keys + column);
      }
      sync_threads();  // everyone is done with this buffer
    }
    wait_copies<0>();
    part.write(sum, 1.0f, args.head_dim, gram);
  }
};

// Adds matrices up in order, one warp for each of their rows:
//
//   before[i, piece] = initial[i] + sum of parts[i, earlier pieces]
//   total[i] = factor (initial[i] + sum of all parts[i])
//
// In reverse, later pieces instead of earlier ones.
// `before` is what products take: symmetric, so that its rows serve as columns, in the storage type. 16-bit rows are
// divided by their largest magnitude, which goes to `largest`: sums over a long sequence exceed float16, and gradients
// fall below it.
struct ScanParams {
  int64_t matrices;
  int head_dim, pieces;
  bool reverse;
  bool add_transpose;    // of every matrix that comes in
  const float* initial;  // (matrices, D, D); null: 0
  const float* parts;    // (matrices, pieces, D, D); null: 0
  void* before;          // (matrices, pieces, D, D); null: not wanted
  void* rest;            // what rounding took away from them; null: not wanted
  float* largest;        // (matrices, pieces, D); float32: not used
  float* total;          // (matrices, D, D); null: not wanted
  float factor;
};

template <class Element, int kHeadDim>
struct ScanKernel {
  using Params = ScanParams;
  static constexpr int kThreads = 128, kNumbers = kHeadDim / 32;
  static int64_t blocks(const Params& p) { return divide_up(p.matrices * p.head_dim * 32, kThreads); }
  static size_t shared_bytes(const Params&) { return 0; }

  static MODA_EXT_DEVICE void run(const Params& p, char*) {
    const int64_t index = block_index() * (kThreads / 32) + warp_index();
    const int64_t matrix = index / p.head_dim;
    if (matrix >= p.matrices) return;
    const int row = static_cast<int>(index % p.head_dim);
    const int64_t elements = static_cast<int64_t>(p.head_dim) * p.head_dim;
    float sum[kNumbers] = {};
    if (p.initial != nullptr) add(p, p.initial + matrix * elements, row, sum);
#pragma unroll 1
    for (int piece = 0; piece < p.pieces; ++piece) {
      const int64_t at = matrix * p.pieces + (p.reverse ? p.pieces - 1 - piece : piece);
      if (p.before != nullptr) store(p, row, sum, at * elements, p.largest + at * p.head_dim);
      if (p.parts != nullptr) add(p, p.parts + at * elements, row, sum);
    }
    if (p.total == nullptr) return;
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      const int column = i * 32 + lane_index();
      if (column < p.head_dim) p.total[matrix * elements + row * p.head_dim + column] = p.factor * sum[i];
    }
  }

 private:
  static MODA_EXT_DEVICE void add(const Params& p, const float* matrix, int row, float (&sum)[kNumbers]) {
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      const int column = i * 32 + lane_index();
      if (column >= p.head_dim) continue;
      sum[i] += matrix[row * p.head_dim + column];
      if (p.add_transpose) sum[i] += matrix[column * p.head_dim + row];
    }
  }

  static MODA_EXT_DEVICE void store(const Params& p, int row, const float (&sum)[kNumbers], int64_t matrix,
                                    float* largest) {
    Element* before = static_cast<Element*>(p.before) + matrix + row * p.head_dim;
    Element* rest = p.rest == nullptr ? nullptr : static_cast<Element*>(p.rest) + matrix + row * p.head_dim;
    float divisor = 1.0f;
    if (sizeof(Element) == 2) {
      float magnitude = 0.0f;
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) magnitude = maximum(magnitude, fabsf(sum[i]));
      magnitude = warp_maximum(magnitude);
      if (lane_index() == 0) largest[row] = magnitude;
      if (magnitude > 0.0f) divisor = magnitude;
    }
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      const int column = i * 32 + lane_index();
      if (column >= p.head_dim) continue;
      const float exact = sum[i] / divisor;
      before[column] = from_float<Element>(exact);
      if (rest != nullptr) rest[column] = from_float<Element>(exact - to_float(before[column]));
    }
  }
};

// A S for a symmetric matrix S that ScanKernel left, in slices of kSlice columns: rows of A in shared memory, 16 for
// each warp; `slice` is a buffer of kSlice rows; `rest` may be null. All threads take part; copies on their way arrive.
template <class Element, int kHeadDim, int kThreads>
struct SymmetricProduct {
  using Products = Fragments<Element, kHeadDim>;
  static constexpr int kSlice = GramTile<Element, kHeadDim>::kSlice;
  static constexpr int kSlices = kHeadDim / kSlice, kSliceFragments = kSlice / 8;

  // take(first column tile, c) for each slice, c in the C layout.
  template <class Take>
  static MODA_EXT_DEVICE void run(const Element* matrix, const Element* rest, const float* largest, int head_dim,
                                  const char* rows, char* slice, const Take& take) {
    const int t = lane_index() % 4;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      float c[1][kSliceFragments][4];
      set_zero(c);
      for (const Element* operand = matrix; operand != nullptr; operand = operand == matrix ? rest : nullptr) {
        sync_threads();  // everyone is done with the buffer
        copy(operand, largest, head_dim, s * kSlice, slice);
        wait_copies<0>();
        sync_threads();
        Products::multiply_rows(c, as_new(rows), as_new(slice));
      }
      if (sizeof(Element) == 2) {
#pragma unroll
        for (int n = 0; n < kSliceFragments; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float factor =
                *reinterpret_cast<const float*>(slice + (n * 8 + 2 * t + j) * Products::kStride + kLargestAt);
            c[0][n][j] *= factor;
            c[0][n][2 + j] *= factor;
          }
        }
      }
      take(s * kSliceFragments, c);
    }
  }

 private:
  static constexpr int kLargestAt = kHeadDim * static_cast<int>(sizeof(Element));  // in a row's padding

  static MODA_EXT_DEVICE void copy(const Element* matrix, const float* largest, int head_dim, int first, char* slice) {
    const auto has_row = [&](int row) { return first + row < head_dim; };
    copy_rows<Element, kHeadDim, kSlice, kThreads, 1>(slice, thread_index(), matrix + first * head_dim, head_dim,
                                                      head_dim, has_row);
    static_assert(kSlice <= kThreads, "a thread for each row");
    const int row = thread_index();
    if (sizeof(Element) == 2 && row < kSlice)
      copy_async_4(slice + row * Products::kStride + kLargestAt, has_row(row) ? largest + first + row : largest,
                   has_row(row));
    commit_copies();
  }
};

// The gradient of the warp's 16 keys from that of their features: dk = factor (dphi - (dphi . phi) phi) for unit keys,
// else dphi. `rows` holds the features, and is overwritten. Padding gets 0, because its features and gradient are.
template <class Element, int kHeadDim>
MODA_EXT_DEVICE void write_key_gradient(const Output& grad_key, const GramArgs& args, const Sequence& sequence,
                                        int kv_head, int first_key, const float (&gradient)[1][kHeadDim / 8][4],
                                        char* rows, const KeyNorm* norms) {
  using Products = Fragments<Element, kHeadDim>;
  const int g = lane_index() / 4, t = lane_index() % 4, warp_row = warp_index() * 16;
  sync_warp();  // every lane is done with the features as an operand
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    char* row = rows + (h * 8 + g) * Products::kStride;
    const KeyNorm norm = norms[warp_row + h * 8 + g];
    float along = 0.0f;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      float low, high;
      Products::load_pair(row, n * 8 + 2 * t, low, high);
      along += gradient[0][n][2 * h] * low + gradient[0][n][2 * h + 1] * high;
    }
    along = quad_sum(along) * norm.normalised;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      float low, high;
      Products::load_pair(row, n * 8 + 2 * t, low, high);
      Products::store_pair(row, n * 8 + 2 * t, norm.factor * (gradient[0][n][2 * h] - along * low),
                           norm.factor * (gradient[0][n][2 * h + 1] - along * high));
    }
  }
  sync_warp();
  store_rows<Element, kHeadDim, 16>(rows, 0, args.head_dim, [&](int own) -> Element* {
    const int key = first_key + warp_row + own;
    if (key >= sequence.num_keys) return nullptr;
    return row_of<Element>(grad_key, sequence.batch, kv_head, key);
  });
}

}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
