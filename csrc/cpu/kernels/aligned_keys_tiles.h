// aligned_keys.h on the tile unit (see tiles.h for operands and accuracy).
//
// Normalised by its trace, a Gram is needed for A2_a^T G^m alone, which is made of the keys without it:
//
//   A2_a^T G^m = sum_{a_j = m} f_j^2 (k_j A2_a)^T k_j      f_j = 1 / |k_j|, or 1
//
// At D = 128, two modalities and rank 16 that is 40 % of the work of a Gram's triangle. Keys are taken in strips of one
// modality. They are the first operand of one product and the second of another; both are made of one split of a key.
// The first kKeptStrips stay in the second-level cache until the update, so a key is read from memory once. They are
// copied, because in a tokens-major tensor the rows of a head are so far apart that they share a few of the cache's
// sets. Their tiles, half as large again, are made anew: keeping them took longer.
#pragma once

#include "aligned_keys.h"
#include "modality_gram_tiles.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_TIER {

constexpr int64_t kKeptStrips = 32;  // 16 KB each at D = 128

// Keys of one modality, kStripRows or as many as there are: KeyOrder::tokens[first], .., [first + count - 1].
struct KeyStrip {
  int modality;
  bool included;  // in its Gram
  int64_t first;
  int count;
};

// The tokens by modality, those outside the Grams last; padding left out.
struct KeyOrder {
  int32_t* tokens;
  int64_t* begin;  // [2 num_modalities + 1]

  static int group_of(const AlignedKeysArgs& args, int64_t batch, int64_t j) {
    const int m = args.members[batch * args.members_batch + j * args.members_token];
    if (m < 0) return -1;
    const bool included = args.modality[batch * args.modality_batch + j * args.modality_token] >= 0;
    return included ? m : args.num_modalities + m;
  }
  void take(const AlignedKeysArgs& args, Arena<float>& arena) {
    tokens = arena.take<int32_t>(args.num_keys);
    begin = arena.take<int64_t>(2 * args.num_modalities + 1);
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
  // work(strip, index) for the strips of groups [from, to), of which the first is number `index`; returns the next.
  template <class Work>
  int64_t for_each_strip(int num_modalities, int from, int to, int64_t index, const Work& work) const {
    for (int g = from; g < to; ++g)
      for (int64_t first = begin[g]; first < begin[g + 1]; first += kStripRows, ++index) {
        const int64_t left = begin[g + 1] - first;
        const int count = static_cast<int>(left < kStripRows ? left : kStripRows);
        work(KeyStrip{g % num_modalities, g < num_modalities, first, count}, index);
      }
    return index;
  }
};

// Sizes, in steps of 32 and in words, that follow from the arguments.
struct AlignedTileShape {
  int depth;  // steps of the head size
  int rank;   // padded to whole tiles
  int M;
  int64_t kept;  // strips
  bool by_rank;  // A2^T G without the Gram

  explicit AlignedTileShape(const AlignedKeysArgs& args)
      : depth(steps_of(args.head_dim)), rank(padded_rank<float>(args)), M(args.num_modalities) {
    // Costs (M - 1) 4 D rank for a key, against 5/4 D^2 and more operands of keys.
    by_rank = args.normalization == Normalization::kTrace && 2 * (M - 1) * rank <= args.head_dim;
    const int64_t most = args.num_keys / kStripRows + 2 * M;
    kept = !by_rank ? 0 : most < kKeptStrips ? most : kKeptStrips;
  }
  int rank_tiles() const { return rank / kTileRows; }
  int rank_steps() const { return 2 * rank / kTileDepth; }  // of both ranks side by side
  int64_t depth_step() const { return int64_t{depth} * kFullWords; }
};

template <int kKeyParts>
struct AlignedTileScratch {
  KeyOrder order;
  float* rows;                 // [kept + 2][kStripRows] rows: keys
  Word* row_tiles;             // [2] of a strip, first operands [row tile][step][part]
  Word* pair_tiles;            // of a strip, second operands [column tile][part]
  float* latent;               // [kStripRows] rows: k A2, then k [A1 | H^T]
  Word* latent_tiles;          // first operands: of the former's transpose [part], of the latter [row tile][step][part]
  float *sums, *alignment;     // [M][rank] rows: A2_a^T G of one modality; H
  float* products;             // two blocks
  float* view;                 // [kStripRows] rows
  Word *key_down, *down, *up;  // [M] second operands [column tile][step][part]: A2; A1 | H^T; B1 ; B2

  AlignedTileScratch(const AlignedKeysArgs& args, const AlignedTileShape& shape, Arena<float>& arena) {
    const auto rows_of = [&](int64_t count) { return arena.take(count * kScratchColumns); };
    const auto words = [&](int64_t count) { return arena.template take<Word>(count); };
    order.take(args, arena);
    rows = rows_of((shape.kept + 2) * kStripRows);
    row_tiles = words(2 * 2 * key_step(shape));
    pair_tiles = words(2 * shape.depth * pair_step());
    latent = rows_of(kStripRows);
    latent_tiles = words(2 * up_step(shape));
    sums = rows_of(int64_t{shape.M} * shape.rank);
    alignment = rows_of(int64_t{shape.M} * shape.rank);
    products = arena.take(2 * kBlockElements);
    view = rows_of(kStripRows);
    key_down = words(shape.M * key_down_words(shape));
    down = words(shape.M * 2 * key_down_words(shape));
    up = words(shape.M * 2 * shape.depth * up_step(shape));
  }
  static int64_t key_step(const AlignedTileShape& shape) { return int64_t{shape.depth} * kKeyParts * kTileWords; }
  static int64_t pair_step() { return int64_t{kKeyParts} * kTileWords; }
  static int64_t key_down_words(const AlignedTileShape& shape) { return shape.rank_tiles() * shape.depth_step(); }
  static int64_t up_step(const AlignedTileShape& shape) { return int64_t{shape.rank_steps()} * kFullWords; }
  float* rows_of(int64_t slot) const { return rows + slot * kStripRows * kScratchColumns; }
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

// A strip as row tiles and as pair tiles: every element is split once. Step by step, so that what is written together
// spreads over the sets of the first-level cache (a row of all tiles would fall into four of its 64).
template <int parts>
void make_key_tiles(const float* rows, int depth, Word* row_tiles, int64_t row_step, Word* pair_tiles,
                    int64_t pair_step) {
  for (int step = 0; step < depth; ++step)
    for (int r = 0; r < kTileRows; ++r) {
      Words part[2][2][parts];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const float* at = rows + r * kScratchColumns + step * kTileDepth + half * kTileRows;
        split<parts>(load(at), part[0][half]);
        split<parts>(load(at + kTileRows * kScratchColumns), part[1][half]);
      }
      Word* row = row_tiles + step * parts * kTileWords + r * kTileRows;
      Word* pair = pair_tiles + 2 * step * pair_step + r * kTileRows;
#pragma GCC unroll 3
      for (int p = 0; p < parts; ++p) {
        store_words(row + p * kTileWords, join(part[0][0][p], part[0][1][p]));
        store_words(row + p * kTileWords + row_step, join(part[1][0][p], part[1][1][p]));
        store_words(pair + p * kTileWords, join(part[0][0][p], part[1][0][p]));
        store_words(pair + p * kTileWords + pair_step, join(part[0][1][p], part[1][1][p]));
      }
    }
}

// Keys in memory.
template <class Storage>
struct KeyRows {
  const AlignedKeysArgs& args;
  const KeyOrder& order;
  const Storage* keys;

  KeyRows(const AlignedKeysArgs& args, int64_t batch, int64_t kv_head, const KeyOrder& order)
      : args(args), order(order), keys(at<Storage>(args.key, batch, kv_head, 0)) {}
  // A strip as rows, zero beyond its keys.
  void load(const KeyStrip& strip, float* rows) const {
    for (int i = 0; i < strip.count; ++i)
      load_row(keys + order.tokens[strip.first + i] * args.key.row, 1.0f, rows + i * kScratchColumns, args.head_dim);
    clear_rows(rows, kStripRows, args.head_dim, strip.count);
  }
  // Asks for a key of a later strip.
  MODA_EXT_INLINE void prefetch(int64_t index) const {
    if (index < order.begin[2 * args.num_modalities])
      prefetch_rows(keys + order.tokens[index] * args.key.row, args.key.row, 1, args.head_dim);
  }
};

// H by the rank, and the first strips of keys as rows.
template <class Storage>
void align_by_rank(const AlignedKeysArgs& args, const KeyRows<Storage>& keys, const AlignedTileShape& shape,
                   AlignedTileScratch<kInputParts<Storage>>& s) {
  constexpr int kKeyParts = kInputParts<Storage>;
  const int width = shape.depth * kTileDepth;
  const float eps = static_cast<float>(args.eps);
  const size_t states = sizeof(float) * static_cast<size_t>(shape.M * shape.rank * kScratchColumns);
  memset(s.alignment, 0, states);
  int64_t index = 0;
  for (int m = 0; m < shape.M; ++m) {
    memset(s.sums, 0, states);
    float trace = 0;
    index = s.order.for_each_strip(shape.M, m, m + 1, index, [&](const KeyStrip& strip, int64_t number) {
      float* rows = s.rows_of(number < shape.kept ? number : shape.kept);
      keys.load(strip, rows);
      float factor[kStripRows];
      for (int i = 0; i < kStripRows; ++i) {
        const float* row = rows + i * kScratchColumns;
        Vector<float> squares{};
        for (int c = 0; c < width; c += kTileRows) squares += load(row + c) * load(row + c);
        const float square = reduce_add<float>(squares), norm = sqrtf(square);
        factor[i] = args.unit_keys ? 1 / (norm > eps ? norm : eps) : 1.0f;
        const float length = factor[i] == 0 ? 0 : norm * factor[i];  // of phi; 0 where the square overflows
        trace += length * length;
      }
      make_key_tiles<kKeyParts>(rows, shape.depth, s.row_tiles, s.key_step(shape), s.pair_tiles, s.pair_step());
      bool asked = false;
      for (int a = 0; a < shape.M; ++a)
        for (int t = 0; a != m && t < shape.rank_tiles(); ++t) {
          const auto next = [&](int r) {
            if (asked) return;
            keys.prefetch(strip.first + kStripRows + r);
            keys.prefetch(strip.first + kStripRows + kTileRows + r);
          };
          multiply_tiles<kKeyParts, kFullParts, 2, 1>(shape.depth, s.row_tiles, s.key_step(shape),
                                                      s.key_down + a * s.key_down_words(shape) + t * shape.depth_step(),
                                                      0, s.latent, kScratchColumns,
                                                      Slices(shape.depth * num_groups(kKeyParts, kFullParts), next));
          finish_stores();
          asked = true;
          for (int i = 0; i < kStripRows; ++i) {
            float* row = s.latent + i * kScratchColumns;
            store(row, load(row) * splat(factor[i]) * splat(factor[i]));
          }
          make_tile<kFullParts, true>(s.latent, s.latent + kTileRows * kScratchColumns, s.latent_tiles);
          float* sums = s.sums + (a * shape.rank + t * kTileRows) * kScratchColumns;
          const auto product_of = [&](int pair) { return s.products + pair % 2 * kBlockElements; };
          const auto add = [&](int pair, int r) {
#pragma GCC unroll 2
            for (int tile = 0; tile < kStripRows; tile += kTileRows) {
              float* sum = sums + r * kScratchColumns + pair * kStripRows + tile;
              store(sum, load(sum) + load(product_of(pair) + r * kStripRows + tile));
            }
          };
          for (int pair = 0; pair < shape.depth; ++pair) {
            const auto previous = [&](int r) {
              if (pair > 0) add(pair - 1, r);
            };
            multiply_tiles<kFullParts, kKeyParts, 1, 2>(1, s.latent_tiles, 0, s.pair_tiles + 2 * pair * s.pair_step(),
                                                        s.pair_step(), product_of(pair), kStripRows,
                                                        Slices(num_groups(kFullParts, kKeyParts), previous));
          }
          finish_stores();
          for (int r = 0; r < kTileRows; ++r) add(shape.depth - 1, r);
        }
    });
    const float scale = trace > FLT_MIN ? 1 / trace : 0.0f;
    for (int a = 0; a < shape.M; ++a)
      for (int k = 0; a != m && k < shape.rank; ++k)
        add_scaled(scale, s.sums + (a * shape.rank + k) * kScratchColumns,
                   s.alignment + (a * shape.rank + k) * kScratchColumns, width);
  }
}

// `count` rows of weights (of stride kScratchStride), zero-padded to whole steps.
inline void load_weights(const AlignedKeysArgs& args, const float* from, int count, float* rows) {
  copy_rows<float>(count, args.head_dim, from, kScratchStride<float>, rows, kScratchColumns);
  clear_rows(rows, count, args.head_dim, count);
}

// The weights as operands, apart from H.
template <int kKeyParts>
void make_weight_tiles(const AlignedKeysArgs& args, const AlignedTileShape& shape, AlignedTileScratch<kKeyParts>& s) {
  for (int a = 0; a < shape.M; ++a) {
    const ViewWeights<float> w = ViewWeights<float>::of(args, a, args.weights);
    for (int t = 0; t < shape.rank_tiles(); ++t) {
      const int64_t from = int64_t{t} * kTileRows * kScratchStride<float>, to = t * shape.depth_step();
      load_weights(args, w.key_down + from, kTileRows, s.latent);
      make_row_tiles<kFullParts, true>(s.latent, 1, shape.depth, s.key_down + a * s.key_down_words(shape) + to);
      load_weights(args, w.up + from, kTileRows, s.latent);
      make_row_tiles<kFullParts, true>(s.latent, 1, shape.depth, s.down + 2 * a * s.key_down_words(shape) + to);
    }
    for (int step = 0; step < shape.rank_steps(); ++step) {
      load_weights(args, w.back + int64_t{step} * kTileDepth * kScratchStride<float>, kTileDepth, s.latent);
      make_pair_tiles<kFullParts, false>(s.latent, 2 * shape.depth,
                                         s.up + 2 * a * shape.depth * s.up_step(shape) + step * kFullWords,
                                         s.up_step(shape));
    }
  }
}
template <int kKeyParts>
void make_alignment_tiles(const AlignedTileShape& shape, AlignedTileScratch<kKeyParts>& s) {
  for (int a = 0; a < shape.M; ++a)
    make_row_tiles<kFullParts, true>(s.alignment + int64_t{a} * shape.rank * kScratchColumns, shape.rank_tiles(),
                                     shape.depth, s.down + (2 * a + 1) * s.key_down_words(shape));
}

// Rows r and r + 16 of a strip as row tiles.
template <int parts>
MODA_EXT_INLINE void make_row_of_tiles(const float* rows, int depth, int r, Word* out) {
  for (int tile = 0; tile < 2; ++tile)
    for (int step = 0; step < depth; ++step) {
      const float* from = rows + (tile * kTileRows + r) * kScratchColumns + step * kTileDepth;
      Words low[parts], high[parts];
      split<parts>(load(from), low);
      split<parts>(load(from + kTileRows), high);
      Word* to = out + (tile * depth + step) * parts * kTileWords + r * kTileRows;
#pragma GCC unroll 3
      for (int p = 0; p < parts; ++p) store_words(to + p * kTileWords, join(low[p], high[p]));
    }
}

// A strip whose keys are to be updated, as rows and as tiles.
struct LoadedStrip {
  KeyStrip strip;
  const float* rows;
  Word* tiles;
};

// Writes the updated keys of a strip, and makes the tiles of the next one (if there is one) under its first product.
template <class Storage>
void update_strip(const AlignedKeysArgs& args, const AlignedTileShape& shape, const LoadedStrip& loaded,
                  const LoadedStrip* next, Storage* out, AlignedTileScratch<kInputParts<Storage>>& s) {
  constexpr int kKeyParts = kInputParts<Storage>;
  const KeyStrip& strip = loaded.strip;
  const float* rows = loaded.rows;
  const Word* down = s.down + 2 * strip.modality * s.key_down_words(shape);
  for (int pair = 0; pair < shape.rank_tiles(); ++pair) {
    const auto row = [&](int r) {
      if (pair == 0 && next != nullptr) make_row_of_tiles<kKeyParts>(next->rows, shape.depth, r, next->tiles);
    };
    multiply_tiles<kKeyParts, kFullParts, 2, 2>(
        shape.depth, loaded.tiles, s.key_step(shape), down + 2 * pair * shape.depth_step(), shape.depth_step(),
        s.latent + pair * kStripRows, kScratchColumns, Slices(shape.depth * num_groups(kKeyParts, kFullParts), row));
  }
  finish_stores();
  make_row_tiles<kFullParts, false>(s.latent, 2, shape.rank_steps(), s.latent_tiles);

  const int32_t* tokens = s.order.tokens + strip.first;
  const bool direct = sizeof(Storage) == sizeof(float) && args.past_caches && args.head_dim % kStripRows == 0 &&
                      reinterpret_cast<uintptr_t>(out) % MODA_EXT_VECTOR_BYTES == 0 &&
                      args.aligned.row % kTileRows == 0;
  multiply_strip<kFullParts, kFullParts>(
      shape.depth, [&](int) { return shape.rank_steps(); }, s.latent_tiles, s.up_step(shape),
      s.up + 2 * strip.modality * shape.depth * s.up_step(shape), s.up_step(shape), s.products,
      [&](int pair, const float* product, int r) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const int row = r + half * kTileRows, at = row * kScratchColumns + pair * kStripRows;
          if (row >= strip.count) continue;
          const Vector<float> low = load(rows + at) + load(product + row * kStripRows);
          const Vector<float> high = load(rows + at + kTileRows) + load(product + row * kStripRows + kTileRows);
          if (direct) {
            float* to = reinterpret_cast<float*>(out + tokens[row] * args.aligned.row) + pair * kStripRows;
            stream(to, low);
            stream(to + kTileRows, high);
          } else {
            store(s.view + at, low);
            store(s.view + at + kTileRows, high);
          }
        }
      });
  for (int i = 0; !direct && i < strip.count; ++i)
    store_row(s.view + i * kScratchColumns, 1.0f, out + tokens[i] * args.aligned.row, args.head_dim);
}

template <class Storage>
void aligned_keys_tiles(const AlignedKeysArgs& args, const AlignedKeysItem& item, void* memory) {
  const int64_t batch = item.batch, kv_head = item.kv_head;
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
  AlignedTileScratch<kInputParts<Storage>> s(args, shape, arena);
  const TileUnit unit;
  if (item.batch_before != batch) s.order.sort(args, batch);
  if (item.batch_before < 0) make_weight_tiles(args, shape, s);
  const KeyRows<Storage> keys(args, batch, kv_head, s.order);
  if (shape.by_rank) {
    align_by_rank(args, keys, shape, s);
  } else {
    const int rows = shape.M * shape.rank;
    load_weights(args, alignment, rows, s.alignment);
  }
  make_alignment_tiles(shape, s);
  Storage* out = at<Storage>(args.aligned, batch, kv_head, 0);
  LoadedStrip loaded[2];
  const int64_t count = s.order.for_each_strip(shape.M, 0, 2 * shape.M, 0, [&](const KeyStrip& strip, int64_t number) {
    const bool kept = strip.included && number < shape.kept;
    float* rows = s.rows_of(kept ? number : shape.kept + number % 2);
    if (!kept) keys.load(strip, rows);
    LoadedStrip& next = loaded[number % 2];
    next = {strip, rows, s.row_tiles + number % 2 * 2 * s.key_step(shape)};
    if (number == 0) {
      make_row_tiles<kInputParts<Storage>, false>(rows, 2, shape.depth, next.tiles);
    } else {
      update_strip<Storage>(args, shape, loaded[(number + 1) % 2], &next, out, s);
    }
  });
  if (count > 0) update_strip<Storage>(args, shape, loaded[(count + 1) % 2], nullptr, out, s);
  copy_padding<Storage>(args, batch, kv_head);
  stream_fence();
}

}  // namespace MODA_EXT_TIER
}  // namespace cpu
}  // namespace moda_ext
