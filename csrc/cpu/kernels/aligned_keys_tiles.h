// aligned_keys.h on the tile unit (see tiles.h for operands and accuracy).
//
// Normalised by its trace, a Gram is needed for A2_a^T G^m alone, which is made of the keys without it:
//
//   A2_a^T G^m = sum_{a_j = m} f_j^2 (k_j A2_a)^T k_j      f_j = 1 / |k_j|, or 1
//
// At D = 128, two modalities and rank 16 that is 40 % of the work of a Gram's triangle. Keys are taken in blocks of one
// modality. They are the first operand of one product and the second of another; both are made of one split of a key.
// The first kKeptBlocks stay in the second-level cache until the update, so a key is read from memory once. (They are
// copied: in a tokens-major tensor the rows of a head are so far apart that they share a few of the cache's sets.)
#pragma once

#include "aligned_keys.h"
#include "modality_gram_tiles.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_TIER {

constexpr int kBlockKeys = 2 * kStripRows, kBlockTiles = kBlockKeys / kTileRows;
constexpr int kBlockSteps = kBlockKeys / kTileDepth;
constexpr int64_t kKeptBlocks = 16;  // 80 KB each at D = 128

// Four tiles of one operand times one of the other: four sums hide the latency of a tile product.
template <bool many_first>
MODA_EXT_INLINE void multiply_four(const Word* many, int64_t step) {
#define MODA_EXT_PRODUCT(sum, tile)                                             \
  _tile_loadd(tile, many + sum * step, 64);                                     \
  if (many_first) _tile_dpbf16ps(sum, tile, 7);                                 \
  if (!many_first) _tile_dpbf16ps(sum, 7, tile)
  MODA_EXT_PRODUCT(0, 4);
  MODA_EXT_PRODUCT(1, 5);
  MODA_EXT_PRODUCT(2, 6);
  MODA_EXT_PRODUCT(3, 4);
#undef MODA_EXT_PRODUCT
}

// C = many one (many_first: 4 x 1 tiles) or one many (1 x 4 tiles), with operands as in multiply_tiles.
template <int PMany, int POne, bool many_first>
__attribute__((noinline)) void multiply_four(int steps, const Word* many, int64_t many_step, const Word* one, float* c,
                                             int64_t c_stride) {
  finish_stores();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const Word *m = many, *o = one;
  for (int k = 0; k < steps; ++k, m += PMany * kTileWords, o += POne * kTileWords) {
    if (POne > 2) {
      _tile_loadd(7, o + 2 * kTileWords, 64);
      multiply_four<many_first>(m, many_step);
    }
    if (POne > 1) {
      _tile_loadd(7, o + kTileWords, 64);
      multiply_four<many_first>(m, many_step);
      if (PMany > 1) multiply_four<many_first>(m + kTileWords, many_step);
    }
    if (PMany > 1) {
      _tile_loadd(7, o, 64);
      multiply_four<many_first>(m + kTileWords, many_step);
    }
    if (PMany > 2) multiply_four<many_first>(m + 2 * kTileWords, many_step);
  }
  for (int k = 0; k < steps; ++k, many += PMany * kTileWords, one += POne * kTileWords) {
    _tile_loadd(7, one, 64);
    multiply_four<many_first>(many, many_step);
  }
  const int64_t bytes = c_stride * static_cast<int64_t>(sizeof(float)), next = kTileRows * (many_first ? c_stride : 1);
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + next, bytes);
  _tile_stored(2, c + 2 * next, bytes);
  _tile_stored(3, c + 3 * next, bytes);
  finish_stores();
}

// Keys of one modality, or as many as there are: order[first], .., order[first + count - 1].
struct KeyBlock {
  int modality;
  bool included;  // in its Gram
  int64_t first;
  int count;
};

// The tokens by modality, those outside the Grams last; padding left out.
struct KeyOrder {
  int32_t* tokens;
  int64_t begin[2 * kMaxModalities + 1];

  static int group_of(const AlignedKeysArgs& args, int64_t batch, int64_t j) {
    const int m = args.members[batch * args.members_batch + j * args.members_token];
    if (m < 0) return -1;
    const bool included = args.modality[batch * args.modality_batch + j * args.modality_token] >= 0;
    return included ? m : args.num_modalities + m;
  }
  void sort(const AlignedKeysArgs& args, int64_t batch) {
    const int groups = 2 * args.num_modalities;
    int64_t next[2 * kMaxModalities] = {};
    for (int64_t j = 0; j < args.num_keys; ++j) {
      const int group = group_of(args, batch, j);
      if (group >= 0) ++next[group];
    }
    begin[0] = 0;
    for (int g = 0; g < groups; ++g) {
      begin[g + 1] = begin[g] + next[g];
      next[g] = begin[g];
    }
    for (int64_t j = 0; j < args.num_keys; ++j) {
      const int group = group_of(args, batch, j);
      if (group >= 0) tokens[next[group]++] = static_cast<int32_t>(j);
    }
  }
  // work(block, index) for the blocks of groups [from, to), of which the first is number `index`; returns the next.
  template <class Work>
  int64_t for_each_block(int num_modalities, int from, int to, int64_t index, const Work& work) const {
    for (int g = from; g < to; ++g)
      for (int64_t first = begin[g]; first < begin[g + 1]; first += kBlockKeys, ++index) {
        const int64_t left = begin[g + 1] - first;
        work(KeyBlock{g % num_modalities, g < num_modalities, first, static_cast<int>(left < kBlockKeys ? left : kBlockKeys)}, index);
      }
    return index;
  }
};

// Sizes, in steps of 32 and in words, that follow from the arguments.
struct AlignedTileShape {
  int depth;    // steps of the head size
  int rank;     // padded to whole tiles
  int M;
  int64_t kept;  // blocks
  bool by_rank;  // A2^T G without the Gram

  explicit AlignedTileShape(const AlignedKeysArgs& args)
      : depth(steps_of(args.head_dim)), rank(padded_rank<float>(args)), M(args.num_modalities) {
    // Costs (M - 1) 4 D rank for a key, against 5/4 D^2 and more operands of keys.
    by_rank = args.normalization == Normalization::kTrace && 2 * (M - 1) * rank <= args.head_dim;
    const int64_t most = args.num_keys / kBlockKeys + 2 * M;
    kept = !by_rank ? 0 : most < kKeptBlocks ? most : kKeptBlocks;
  }
  int wide_tiles() const { return (2 * depth + 3) / 4 * 4; }  // column tiles of a key, in fours
  int rank_tiles() const { return rank / kTileRows; }
  int rank_steps() const { return 2 * rank / kTileDepth; }    // of both ranks side by side
  int64_t depth_step() const { return int64_t{depth} * kFullWords; }
};

template <int kKeyParts>
struct AlignedTileScratch {
  KeyOrder order;
  float* rows;             // [kept + 1 blocks][kBlockKeys] rows: keys
  Word* row_tiles;         // [kept + 1 blocks] first operands [row tile][step][part]
  Word* pair_tiles;        // second operands [column tile][key step][part]
  float* latent;           // [kBlockKeys] rows: k A2, then k [A1 | H^T]
  Word* latent_tiles;      // first operands: of the former's transpose [key step][part], of the latter [row tile][step][part]
  float *sums, *products;  // [M][rank] rows: A2_a^T G of one modality; scratch
  float* alignment;        // [M][rank] rows: H
  float* view;             // [kStripRows] rows
  Word *key_down, *down, *up;  // [M] second operands: A2; A1 | H^T; B1 ; B2

  AlignedTileScratch(const AlignedKeysArgs& args, const AlignedTileShape& shape, Arena<float>& arena) {
    const auto rows_of = [&](int64_t count) { return arena.take(count * kScratchColumns); };
    const auto words = [&](int64_t count) { return arena.template take<Word>(count); };
    order.tokens = arena.template take<int32_t>(args.num_keys);
    rows = rows_of((shape.kept + 1) * kBlockKeys);
    row_tiles = words((shape.kept + 1) * block_words(shape));
    pair_tiles = words(shape.wide_tiles() * pair_step());
    latent = rows_of(kBlockKeys);
    const int64_t transposed = kBlockSteps, plain = int64_t{kBlockTiles} * shape.rank_steps();
    latent_tiles = words((transposed > plain ? transposed : plain) * kFullWords);
    sums = rows_of(int64_t{shape.M} * shape.rank);
    products = rows_of(kTileRows);
    alignment = rows_of(int64_t{shape.M} * shape.rank);
    view = rows_of(kStripRows);
    key_down = words(shape.M * key_down_words(shape));
    down = words(shape.M * 2 * key_down_words(shape));
    up = words(shape.M * up_words(shape));
  }
  static int64_t key_step(const AlignedTileShape& shape) { return int64_t{shape.depth} * kKeyParts * kTileWords; }
  static int64_t block_words(const AlignedTileShape& shape) { return kBlockTiles * key_step(shape); }
  static int64_t pair_step() { return int64_t{kBlockSteps} * kKeyParts * kTileWords; }
  static int64_t key_down_words(const AlignedTileShape& shape) { return shape.rank_tiles() * shape.depth_step(); }
  static int64_t up_step(const AlignedTileShape& shape) { return int64_t{shape.rank_steps()} * kFullWords; }
  static int64_t up_words(const AlignedTileShape& shape) { return 2 * shape.depth * up_step(shape); }
  float* rows_of(int64_t slot) const { return rows + slot * kBlockKeys * kScratchColumns; }
  Word* tiles_of(const AlignedTileShape& shape, int64_t slot) const { return row_tiles + slot * block_words(shape); }
};

template <class Storage>
int64_t aligned_keys_tile_bytes(const AlignedKeysArgs& args) {
  const AlignedTileShape shape(args);
  Arena<float> arena(nullptr);
  if (!shape.by_rank) {
    const GramFactors<float> factors(args, arena);
    arena.take<char>(modality_gram_tile_bytes(args));
  }
  const AlignedTileScratch<kInputParts<Storage>> scratch(args, shape, arena);
  return arena.used();
}

// 32 rows as row tiles and as pair tiles, each element split once.
template <int parts>
void make_key_tiles(const float* rows, int depth, Word* row_tiles, int64_t row_step, Word* pair_tiles,
                    int64_t pair_step) {
  for (int step = 0; step < depth; ++step) {
    const float* low = rows + step * kTileDepth;
    const float* high = low + kTileRows * kScratchColumns;
    Word* row = row_tiles + step * parts * kTileWords;
    Word* pair = pair_tiles + 2 * step * pair_step;
    for (int r = 0; r < kTileRows; ++r) {
      Words part[2][2][parts];
      for (int half = 0; half < 2; ++half) {
        split<parts>(load(low + r * kScratchColumns + half * kTileRows), part[0][half]);
        split<parts>(load(high + r * kScratchColumns + half * kTileRows), part[1][half]);
      }
#pragma GCC unroll 3
      for (int p = 0; p < parts; ++p) {
        Word* at = row + p * kTileWords + r * kTileRows;
        store_words(at, join(part[0][0][p], part[0][1][p]));
        store_words(at + row_step, join(part[1][0][p], part[1][1][p]));
        at = pair + p * kTileWords + r * kTileRows;
        store_words(at, join(part[0][0][p], part[1][0][p]));
        store_words(at + pair_step, join(part[0][1][p], part[1][1][p]));
      }
    }
  }
}

// The keys of a block as rows, zero beyond them, while those of the next are on their way.
template <class Storage>
void load_block(const AlignedKeysArgs& args, int64_t batch, int64_t kv_head, const KeyOrder& order,
                const KeyBlock& block, float* rows) {
  constexpr int kAhead = 24;
  const int64_t last = order.begin[2 * args.num_modalities] - 1;
  const int32_t* tokens = order.tokens + block.first;
  const Storage* keys = at<Storage>(args.key, batch, kv_head, 0);
  for (int i = 0; i < block.count; ++i) {
    const int64_t ahead = block.first + i + kAhead < last ? block.first + i + kAhead : last;
    prefetch_rows(keys + order.tokens[ahead] * args.key.row, args.key.row, 1, args.head_dim);
    load_row(keys + tokens[i] * args.key.row, 1.0f, rows + i * kScratchColumns, args.head_dim);
  }
  clear_rows(rows, kBlockKeys, args.head_dim, block.count);
}

// H by the rank, and the first blocks of keys as operands.
template <class Storage>
void align_by_rank(const AlignedKeysArgs& args, int64_t batch, int64_t kv_head, const AlignedTileShape& shape,
                   AlignedTileScratch<kInputParts<Storage>>& s) {
  constexpr int kKeyParts = kInputParts<Storage>;
  const int D = args.head_dim, width = shape.depth * kTileDepth;
  const size_t states = sizeof(float) * static_cast<size_t>(shape.M * shape.rank * kScratchColumns);
  memset(s.alignment, 0, states);
  int64_t index = 0;
  for (int m = 0; m < shape.M; ++m) {
    memset(s.sums, 0, states);
    float trace = 0;
    index = s.order.for_each_block(shape.M, m, m + 1, index, [&](const KeyBlock& block, int64_t number) {
      const int64_t slot = number < shape.kept ? number : shape.kept;
      float* rows = s.rows_of(slot);
      Word* tiles = s.tiles_of(shape, slot);
      load_block<Storage>(args, batch, kv_head, s.order, block, rows);
      float factor[kBlockKeys] = {};
      for (int i = 0; i < block.count; ++i) {
        const float square = dot(rows + i * kScratchColumns, rows + i * kScratchColumns, D);
        const float norm = sqrtf(square), eps = static_cast<float>(args.eps);
        factor[i] = args.unit_keys ? 1 / (norm > eps ? norm : eps) : 1.0f;
        trace += square * factor[i] * factor[i];
      }
      for (int step = 0; step < kBlockSteps; ++step)
        make_key_tiles<kKeyParts>(rows + step * kStripRows * kScratchColumns, shape.depth,
                                  tiles + 2 * step * s.key_step(shape), s.key_step(shape),
                                  s.pair_tiles + step * kKeyParts * kTileWords, s.pair_step());
      for (int a = 0; a < shape.M; ++a)
        for (int t = 0; a != m && t < shape.rank_tiles(); ++t) {
          multiply_four<kKeyParts, kFullParts, true>(shape.depth, tiles, s.key_step(shape),
                                                     s.key_down + a * s.key_down_words(shape) + t * shape.depth_step(),
                                                     s.latent, kScratchColumns);
          for (int i = 0; i < kBlockKeys; ++i) {
            float* row = s.latent + i * kScratchColumns;
            store(row, load(row) * splat(factor[i]) * splat(factor[i]));
          }
          for (int step = 0; step < kBlockSteps; ++step) {
            const float* first = s.latent + step * kTileDepth * kScratchColumns;
            make_tile<kFullParts, true>(first, first + kTileRows * kScratchColumns,
                                        s.latent_tiles + step * kFullWords);
          }
          float* sums = s.sums + (a * shape.rank + t * kTileRows) * kScratchColumns;
          for (int tile = 0; tile < shape.wide_tiles(); tile += 4) {
            multiply_four<kKeyParts, kFullParts, false>(kBlockSteps, s.pair_tiles + tile * s.pair_step(), s.pair_step(),
                                                        s.latent_tiles, s.products + tile * kTileRows, kScratchColumns);
          }
          for (int r = 0; r < kTileRows; ++r)
            for (int c = 0; c < width; c += kTileRows) {
              const int at = r * kScratchColumns + c;
              store(sums + at, load(sums + at) + load(s.products + at));
            }
        }
    });
    const float scale = trace > FLT_MIN ? 1 / trace : 0.0f;
    for (int a = 0; a < shape.M; ++a)
      for (int k = 0; a != m && k < shape.rank; ++k)
        add_scaled(scale, s.sums + (a * shape.rank + k) * kScratchColumns,
                   s.alignment + (a * shape.rank + k) * kScratchColumns, width);
  }
}

// The weights as operands. With H also those that contain it.
template <int kKeyParts>
void make_weight_tiles(const AlignedKeysArgs& args, const AlignedTileShape& shape, bool with_alignment,
                       AlignedTileScratch<kKeyParts>& s) {
  const auto tiles_of = [&](const float* weight, int64_t stride, Word* out) {
    for (int t = 0; t < shape.rank_tiles(); ++t) {
      for (int k = 0; k < kTileRows; ++k)
        memcpy(s.latent + k * kScratchColumns, weight + (t * kTileRows + k) * stride, sizeof(float) * static_cast<size_t>(args.head_dim));
      clear_rows(s.latent, kTileRows, args.head_dim, kTileRows);
      make_row_tiles<kFullParts, true>(s.latent, 1, shape.depth, out + t * shape.depth_step());
    }
  };
  for (int a = 0; a < shape.M; ++a) {
    const ViewWeights<float> w = ViewWeights<float>::of(args, a, args.weights);
    Word* down = s.down + a * 2 * s.key_down_words(shape);
    if (with_alignment) {
      tiles_of(s.alignment + a * shape.rank * kScratchColumns, kScratchColumns, down + s.key_down_words(shape));
      continue;
    }
    tiles_of(w.key_down, kScratchStride<float>, s.key_down + a * s.key_down_words(shape));
    tiles_of(w.up, kScratchStride<float>, down);
    for (int step = 0; step < shape.rank_steps(); ++step) {
      for (int k = 0; k < kTileDepth; ++k)
        memcpy(s.latent + k * kScratchColumns, w.back + (step * kTileDepth + k) * kScratchStride<float>, sizeof(float) * static_cast<size_t>(args.head_dim));
      clear_rows(s.latent, kTileDepth, args.head_dim, kTileDepth);
      make_pair_tiles<kFullParts, false>(s.latent, 2 * shape.depth, s.up + a * s.up_words(shape) + step * kFullWords,
                                         s.up_step(shape));
    }
  }
}

template <class Storage>
void update_block(const AlignedKeysArgs& args, int64_t batch, int64_t kv_head, const AlignedTileShape& shape,
                  const KeyBlock& block, const float* rows, const Word* tiles,
                  AlignedTileScratch<kInputParts<Storage>>& s) {
  constexpr int kKeyParts = kInputParts<Storage>;
  const Word* down = s.down + block.modality * 2 * s.key_down_words(shape);
  const Word* up = s.up + block.modality * s.up_words(shape);
  const int32_t* tokens = s.order.tokens + block.first;
  Storage* out = at<Storage>(args.aligned, batch, kv_head, 0);
  const bool direct = sizeof(Storage) == sizeof(float) && args.past_caches && args.head_dim % kStripRows == 0 &&
                      reinterpret_cast<uintptr_t>(out) % MODA_EXT_VECTOR_BYTES == 0 &&
                      args.aligned.row % kTileRows == 0;
  const int strips = (block.count + kStripRows - 1) / kStripRows;
  for (int strip = 0; strip < strips; ++strip)
    for (int pair = 0; pair < shape.rank_tiles(); ++pair)
      multiply_tiles<kKeyParts, kFullParts>(2, 2, shape.depth, tiles + 2 * strip * s.key_step(shape), s.key_step(shape),
                                            down + 2 * pair * shape.depth_step(), shape.depth_step(),
                                            s.latent + strip * kStripRows * kScratchColumns + pair * kStripRows,
                                            kScratchColumns);
  finish_stores();
  make_row_tiles<kFullParts, false>(s.latent, 2 * strips, shape.rank_steps(), s.latent_tiles);
  for (int strip = 0; strip < strips; ++strip) {
    const int first = strip * kStripRows, count = smaller(kStripRows, block.count - first);
    const float* keys = rows + first * kScratchColumns;
    multiply_strip<kFullParts, kFullParts>(
        shape.depth, [&](int) { return shape.rank_steps(); }, s.latent_tiles + 2 * strip * s.up_step(shape),
        s.up_step(shape), up, s.up_step(shape), s.products, [&](int pair, const float* product, int r) {
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const int row = r + half * kTileRows, at = row * kScratchColumns + pair * kStripRows;
            if (row >= count) continue;
            const Vector<float> low = load(keys + at) + load(product + row * kStripRows);
            const Vector<float> high = load(keys + at + kTileRows) + load(product + row * kStripRows + kTileRows);
            if (direct) {
              float* to = reinterpret_cast<float*>(out + tokens[first + row] * args.aligned.row) + pair * kStripRows;
              stream(to, low);
              stream(to + kTileRows, high);
            } else {
              store(s.view + at, low);
              store(s.view + at + kTileRows, high);
            }
          }
        });
    for (int i = 0; !direct && i < count; ++i)
      store_row(s.view + i * kScratchColumns, 1.0f, out + tokens[first + i] * args.aligned.row, args.head_dim);
  }
}

template <class Storage>
void aligned_keys_tiles(const AlignedKeysArgs& args, int64_t batch, int64_t kv_head, void* memory) {
  constexpr int kKeyParts = kInputParts<Storage>;
  const AlignedTileShape shape(args);
  Arena<float> arena(memory);
  const float* alignment = nullptr;
  if (!shape.by_rank) {
    const GramFactors<float> factors(args, arena);
    modality_gram_tiles<Storage>(args, {batch, kv_head, 0, args.num_keys, factors.gram},
                                 arena.take<char>(modality_gram_tile_bytes(args)));
    factors.align(args);
    alignment = factors.alignment;
  }
  AlignedTileScratch<kKeyParts> s(args, shape, arena);
  const TileUnit unit;
  s.order.sort(args, batch);
  make_weight_tiles(args, shape, false, s);
  if (shape.by_rank) {
    align_by_rank<Storage>(args, batch, kv_head, shape, s);
  } else {
    copy_rows<float>(int64_t{shape.M} * shape.rank, args.head_dim, alignment, kScratchStride<float>, s.alignment,
                     kScratchColumns);
  }
  make_weight_tiles(args, shape, true, s);
  s.order.for_each_block(shape.M, 0, 2 * shape.M, 0, [&](const KeyBlock& block, int64_t number) {
    const bool kept = block.included && number < shape.kept;
    float* rows = s.rows_of(kept ? number : shape.kept);
    Word* tiles = s.tiles_of(shape, kept ? number : shape.kept);
    if (!kept) {
      load_block<Storage>(args, batch, kv_head, s.order, block, rows);
      make_row_tiles<kKeyParts, false>(rows, kBlockTiles, shape.depth, tiles);
    }
    update_block<Storage>(args, batch, kv_head, shape, block, rows, tiles, s);
  });
  copy_padding<Storage>(args, batch, kv_head);
  stream_fence();
}

}  // namespace MODA_EXT_TIER
}  // namespace cpu
}  // namespace moda_ext
