// Forward pass of duplex_query_views_forward.h with AMX (see amx.h for operands and accuracy).
//
// With q the rows of a strip and the keys of the chunk up to them, all of it is five tile products:
//
//   [y_a | x_a] = q [B1_a^T | B2_a^T]           T_a = [y_a | s_m x_a for each m != a]
//   W_a = T_a Z_a^T, masked                     Z_a: z_a of each key in the columns of its modality's term
//   view_a = q + [T_a | W_a] [A1_a^T, H_a ; phi]
//   e_m |q|^2 = (q U_m) . q + sum_j (q . phi_j)^2
//
// U_m is the triangle of G^m that counts elements above the diagonal twice: half the blocks of a product with G^m. The
// states H grow by Z_a^T phi, the Grams by phi^T phi.
//
// Keys stay in order of their positions, other than in gram_family_chunk.h: which words of a tile meet in one sum, and
// with it the rounding, must not depend on the modalities of later tokens.
#pragma once

#include "cpu/kernels/amx/amx.h"
#include "cpu/kernels/vector/duplex_query_views_forward.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

constexpr int kAmxChunk = 2 * kStripRows;
constexpr int kKeySteps = kAmxChunk / kTileDepth;

// The keys of a chunk by position, and what is known of their modalities.
struct AmxChunk {
  int64_t first;
  int tokens;
  int num_present;
  int present[kMaxModalities];    // in ascending order
  uint64_t keys[kMaxModalities];  // of each modality, one bit for each position
  int steps() const { return steps_of(tokens); }
  bool has_others(int m) const { return num_present > 1 || (num_present == 1 && present[0] != m); }
};
static_assert(kAmxChunk == 64, "a chunk is a word of bits");

inline void plan_chunk(const GramArgs& args, int64_t batch, int64_t first, AmxChunk& chunk) {
  const int32_t* modality = args.modality + batch * args.modality_batch + first * args.modality_token;
  chunk.first = first;
  chunk.tokens = static_cast<int>(args.num_keys - first < kAmxChunk ? args.num_keys - first : kAmxChunk);
  for (int m = 0; m < args.num_modalities; ++m) chunk.keys[m] = 0;
  for (int i = 0; i < chunk.tokens; ++i)
    if (modality[i * args.modality_token] >= 0) chunk.keys[modality[i * args.modality_token]] |= uint64_t{1} << i;
  chunk.num_present = 0;
  for (int m = 0; m < args.num_modalities; ++m)
    if (chunk.keys[m] != 0) chunk.present[chunk.num_present++] = m;
}

// Lanes of 16 keys from position 16 * tile on.
MODA_EXT_INLINE __mmask16 lanes_of(uint64_t keys, int tile) {
  return static_cast<__mmask16>(keys >> (tile * kTileRows));
}
// Bits of the keys that a position sees.
MODA_EXT_INLINE uint64_t seen_from(int position) { return ~uint64_t{0} >> (kAmxChunk - 1 - position); }
MODA_EXT_INLINE Vector<float> keep_lanes(__mmask16 lanes, Vector<float> v) {
  return (Vector<float>)_mm512_maskz_mov_ps(lanes, (__m512)v);
}

// Sums of 16 vectors each, as lanes.
MODA_EXT_INLINE Vector<float> reduce_rows(const float* rows) {
  Vector<float> square[kTileRows];
  for (int r = 0; r < kTileRows; ++r) square[r] = load(rows + r * kTileRows);
  transpose_square<float>(square);
  for (int half = kTileRows / 2; half > 0; half /= 2)
    for (int r = 0; r < half; ++r) square[r] += square[r + half];
  return square[0];
}

// Keys of a chunk as rows (stride kScratchColumns), up to whole steps; zero for padding and beyond.
template <class Storage>
void load_features(const GramArgs& args, int64_t batch, int64_t kv_head, const AmxChunk& chunk, float* rows) {
  uint64_t keys = 0;
  for (int p = 0; p < chunk.num_present; ++p) keys |= chunk.keys[chunk.present[p]];
  for (int j = 0; j < kAmxChunk; ++j) {
    float* row = rows + j * kScratchColumns;
    if ((keys >> j & 1) == 0) {
      memset(row, 0, sizeof(float) * static_cast<size_t>(steps_of(args.head_dim) * kTileDepth));
      continue;
    }
    const Storage* key = row_of<Storage>(args.key, batch, kv_head, token_row(args, chunk.first + j));
    float factor;
    bool normalised;
    load_feature(args, key, row, &factor, &normalised);
    memset(row + args.head_dim, 0, sizeof(float) * static_cast<size_t>(-args.head_dim & (kTileDepth - 1)));
  }
}

// Rows of the chunk's keys that have one modality, the others zero.
MODA_EXT_INLINE void select_rows(uint64_t keys, int columns, const float* from, float* to) {
  for (int j = 0; j < kAmxChunk; ++j) {
    if (keys >> j & 1) {
      memcpy(to + j * kScratchColumns, from + j * kScratchColumns, sizeof(float) * static_cast<size_t>(columns));
    } else {
      memset(to + j * kScratchColumns, 0, sizeof(float) * static_cast<size_t>(columns));
    }
  }
}

// Sizes, in steps of 32 and in words, that follow from the arguments.
struct DuplexQueryViewsAmxShape {
  int depth;       // steps of the head size
  int rank;        // padded
  int rank_steps;  // steps of the rank
  int terms;       // steps of a view's terms
  int M;

  explicit DuplexQueryViewsAmxShape(const DuplexArgs& args)
      : depth(steps_of(args.head_dim)),
        rank(padded_rank<float>(args)),
        rank_steps(steps_of(rank)),
        terms(steps_of(args.num_modalities * rank)),
        M(args.num_modalities) {}
  // From one tile of rows, or columns, to the next.
  int64_t depth_step() const { return int64_t{depth} * kFullWords; }
  int64_t term_step() const { return int64_t{terms} * kFullWords; }
  int64_t up_step() const { return int64_t{terms + kKeySteps} * kFullWords; }
  int term_of(int view, int m) const { return term_of_modality(view, m) * rank; }
  static bool fits(const DuplexArgs& args) {
    return args.num_modalities * padded_rank<float>(args) <= kScratchColumns &&
           2 * padded_rank<float>(args) <= kScratchColumns;
  }
};

// The triangles U_m of the running Grams, as floats and as tiles.
struct GramTiles {
  float* triangle;  // [M][D] rows
  Word* tiles;      // [M][column tile][step][part]: second operands
  bool seen[kMaxModalities];

  static int64_t row_elements(const DuplexQueryViewsAmxShape& shape) {
    return int64_t{shape.depth} * kTileDepth * kScratchColumns;
  }
  void take(const DuplexQueryViewsAmxShape& shape, Arena<float>& arena) {
    triangle = arena.take(shape.M * row_elements(shape));
    tiles = arena.template take<Word>(shape.M * 2 * shape.depth * shape.depth_step());
  }
  float* of(const DuplexQueryViewsAmxShape& shape, int m) const { return triangle + m * row_elements(shape); }
  Word* tiles_of(const DuplexQueryViewsAmxShape& shape, int m) const {
    return tiles + m * 2 * shape.depth * shape.depth_step();
  }
  void make_tiles(const DuplexQueryViewsAmxShape& shape, int m, int row, int column) {
    make_pair_tiles<kFullParts, false>(of(shape, m) + row * kTileDepth * kScratchColumns + column * kStripRows, 2,
                                       tiles_of(shape, m) + 2 * column * shape.depth_step() + row * kFullWords,
                                       shape.depth_step());
  }
  void start(const DuplexQueryViewsAmxShape& shape, int head_dim, const float* initial) {
    for (int m = 0; m < shape.M; ++m) {
      seen[m] = initial != nullptr;
      memset(of(shape, m), 0, sizeof(float) * static_cast<size_t>(row_elements(shape)));
      if (initial == nullptr) continue;
      const float* gram = initial + int64_t{m} * head_dim * head_dim;
      for (int i = 0; i < head_dim; ++i)
        for (int j = i; j < head_dim; ++j)
          of(shape, m)[i * kScratchColumns + j] = (i < j ? 2 : 1) * gram[i * head_dim + j];
      for (int i = 0; i < shape.depth; ++i)
        for (int j = i; j < shape.depth; ++j) make_tiles(shape, m, i, j);
    }
  }
  // The triangle of keys^T keys: `columns` are transposed pair tiles of the keys of modality m [column tile][key
  // step][part], `keys` pair tiles of keys (the others' rows meet zeros).
  void add(const DuplexQueryViewsAmxShape& shape, int m, int steps, const Word* columns, const Word* keys,
           int64_t keys_step, float* products) {
    seen[m] = true;
    for (int i = 0; i < shape.depth; ++i)
      multiply_strip<kFullParts, kFullParts>(
          shape.depth - i, [&](int) { return steps; }, columns + 2 * i * kKeySteps * kFullWords, kKeySteps * kFullWords,
          keys + 2 * i * keys_step, keys_step, products,
          [&](int pair, const float* product, int r) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
              const int row = r + half * kTileRows;
              float* out = of(shape, m) + (i * kTileDepth + row) * kScratchColumns + (i + pair) * kStripRows;
              // On the diagonal: columns from this row on, and those beyond it twice.
              const uint32_t upper = pair > 0 ? ~0u : ~0u << row, beyond = pair > 0 ? ~0u : upper - (1u << row);
#pragma GCC unroll 2
              for (int tile = 0; tile < 2; ++tile) {
                const Vector<float> sum = load(product + row * kStripRows + tile * kTileRows);
                store(out + tile * kTileRows, load(out + tile * kTileRows) + keep_lanes(lanes_of(upper, tile), sum) +
                                                  keep_lanes(lanes_of(beyond, tile), sum));
              }
            }
          });
    for (int i = 0; i < shape.depth; ++i)
      for (int j = i; j < shape.depth; ++j) make_tiles(shape, m, i, j);
  }
  void write(const DuplexQueryViewsAmxShape& shape, int head_dim, float* out) const {
    for (int m = 0; m < shape.M; ++m)
      for (int i = 0; i < head_dim; ++i)
        for (int j = i; j < head_dim; ++j) {
          float* gram = out + int64_t{m} * head_dim * head_dim;
          const float element = of(shape, m)[i * kScratchColumns + j];
          gram[i * head_dim + j] = gram[j * head_dim + i] = i < j ? element / 2 : element;
        }
  }
};

// What both directions keep of one key head: the weights and the keys of a chunk as operands, and the states.
struct DuplexQueryViewsAmxScratch {
  float *keys, *selected;             // [kAmxChunk] rows: phi; of one modality
  float *query, *low_rank, *weights;  // [kStripRows] rows
  float* view;                        // [kStripRows] rows
  float* products;                    // two blocks
  float* stack;                       // [M][terms] rows: A1^T, then H of the other modalities
  float* latent;                      // [terms] rows, a column for each key: Z^T of one view
  float* key_latent;                  // [rank] rows: z^T of one view
  float* forms;                       // [M + 1][kStripRows] vectors, the sums over their lanes: q G^m q^T; |q|^2
  float (*scale)[kMaxModalities];

  Word* query_tiles;   // first operands [row tile][step][part]
  Word* term_tiles;    // first operands [row tile][terms, key steps][part]: T | W
  Word* down;          // [M] second operands [column tile][step][part]: B1^T | B2^T
  Word* key_down;      // [M] first operands [row tile][step][part]: A2^T
  Word* key_scores;    // second operands [column tile][step][part]: phi^T
  Word* key_columns;   // first operands [row tile][key step][part]: phi^T of one modality
  Word* latent_tiles;  // [M] second operands [column tile][terms][part]: Z^T
  Word* latent_rows;   // [M] first operands [row tile][key step][part]: Z^T
  Word* up;            // [M] second operands [column tile][terms, key steps][part]: A1^T, H ; phi
  GramTiles gram;

  DuplexQueryViewsAmxScratch(const DuplexQueryViewsAmxShape& shape, bool needs_gram, Arena<float>& arena) {
    const auto rows = [&](int count) { return arena.take(int64_t{count} * kScratchColumns); };
    const auto words = [&](int64_t count) { return arena.template take<Word>(count); };
    const int M = shape.M;
    keys = rows(kAmxChunk);
    selected = rows(kAmxChunk);
    query = rows(kStripRows);
    low_rank = rows(kStripRows);
    weights = rows(kStripRows);
    view = rows(kStripRows);
    products = arena.take(2 * kBlockElements);
    stack = rows(M * shape.terms * kTileDepth);
    latent = rows(shape.terms * kTileDepth);
    key_latent = rows(shape.rank_steps * kTileDepth);
    forms = arena.take(int64_t{M + 1} * kStripRows * kTileRows);
    scale = arena.template take<float[kMaxModalities]>(kAmxChunk);
    query_tiles = words(2 * shape.depth_step());
    term_tiles = words(2 * shape.up_step());
    down = words(M * down_words(shape));
    key_down = words(M * key_down_words(shape));
    key_scores = words(2 * kKeySteps * shape.depth_step());
    key_columns = words(int64_t{2} * shape.depth * kKeySteps * kFullWords);
    latent_tiles = words(M * 2 * kKeySteps * shape.term_step());
    latent_rows = words(M * 2 * shape.term_step() * kKeySteps);
    up = words(M * up_words(shape));
    if (needs_gram) gram.take(shape, arena);
  }
  static int64_t down_words(const DuplexQueryViewsAmxShape& shape) {
    return int64_t{2} * shape.rank / kTileRows * shape.depth_step();
  }
  static int64_t key_down_words(const DuplexQueryViewsAmxShape& shape) {
    return 2 * shape.rank_steps * shape.depth_step();
  }
  static int64_t up_words(const DuplexQueryViewsAmxShape& shape) { return 2 * shape.depth * shape.up_step(); }
  float* stack_of(const DuplexQueryViewsAmxShape& shape, int a) const {
    return stack + int64_t{a} * shape.terms * kTileDepth * kScratchColumns;
  }
  const Word* key_tiles(const DuplexQueryViewsAmxShape& shape) const { return up + shape.term_step(); }
};

// Weights as operands, and the states before the first token.
inline void start_tiles(const DuplexArgs& args, const DuplexQueryViewsAmxShape& shape, const float* initial,
                        DuplexQueryViewsAmxScratch& s) {
  const int D = args.head_dim, r = args.rank;
  const auto clear = [&](int rows, float* block) {
    memset(block, 0, sizeof(float) * static_cast<size_t>(rows) * kScratchColumns);
  };
  clear(shape.M * shape.terms * kTileDepth, s.stack);
  for (int a = 0; a < shape.M; ++a) {
    const int64_t from = int64_t{a} * D * r;
    const float* a1 = static_cast<const float*>(args.a1) + from;
    const float* a2 = static_cast<const float*>(args.a2) + from;
    const float* const b[] = {static_cast<const float*>(args.b1) + from, static_cast<const float*>(args.b2) + from};
    // At most 256 rows of a weight: one block of the chunk's keys at a time.
    const auto load = [&](int first, const float* weight, int64_t row, int64_t column) {
      clear(kStripRows, s.keys);
      for (int k = first; k < first + kStripRows && k < r; ++k)
        for (int d = 0; d < D; ++d) s.keys[(k - first) * kScratchColumns + d] = weight[k * row + d * column];
    };
    for (int first = 0; first < shape.rank; first += kStripRows) {
      const int tiles = shape.rank - first > kTileRows ? 2 : 1;
      for (int which = 0; which < 2; ++which) {
        load(first, b[which], D, 1);
        make_row_tiles<kFullParts, true>(s.keys, tiles, shape.depth,
                                         s.down + a * DuplexQueryViewsAmxScratch::down_words(shape) +
                                             (which * shape.rank + first) / kTileRows * shape.depth_step());
      }
      load(first, a2, 1, r);
      make_row_tiles<kFullParts, false>(
          s.keys, 2, shape.depth,
          s.key_down + a * DuplexQueryViewsAmxScratch::key_down_words(shape) + first / kTileRows * shape.depth_step());
    }
    float* stack = s.stack_of(shape, a);
    for (int k = 0; k < r; ++k)
      for (int d = 0; d < D; ++d) stack[k * kScratchColumns + d] = a1[d * r + k];
    for (int m = 0; initial != nullptr && m < shape.M; ++m)
      for (int k = 0; m != a && k < r; ++k)
        for (int d = 0; d < D; ++d)
          add_scaled(a2[d * r + k], initial + (int64_t{m} * D + d) * D,
                     stack + (shape.term_of(a, m) + k) * kScratchColumns, D);
  }
}

inline void make_stack_tiles(const DuplexQueryViewsAmxShape& shape, int a, DuplexQueryViewsAmxScratch& s) {
  for (int t = 0; t < shape.terms; ++t)
    make_pair_tiles<kFullParts, false>(s.stack_of(shape, a) + t * kTileDepth * kScratchColumns, 2 * shape.depth,
                                       s.up + a * DuplexQueryViewsAmxScratch::up_words(shape) + t * kFullWords,
                                       shape.up_step());
}

// The keys of a chunk as operands.
inline void make_key_tiles(const DuplexArgs& args, const DuplexQueryViewsAmxShape& shape, const AmxChunk& chunk,
                           DuplexQueryViewsAmxScratch& s) {
  make_row_tiles<kFullParts, true>(s.keys, 2 * kKeySteps, shape.depth, s.key_scores);
  for (int step = 0; step < kKeySteps; ++step)
    make_pair_tiles<kFullParts, false>(s.keys + step * kTileDepth * kScratchColumns, 2 * shape.depth,
                                       s.up + shape.term_step() + step * kFullWords, shape.up_step());
  for (int a = 0; a < args.num_modalities; ++a) {
    if (!chunk.has_others(a)) continue;
    if (a > 0)
      for (int tile = 0; tile < 2 * shape.depth; ++tile) {
        Word* keys = s.up + tile * shape.up_step() + shape.term_step();
        memcpy(keys + a * DuplexQueryViewsAmxScratch::up_words(shape), keys, sizeof(Word) * kKeySteps * kFullWords);
      }
    for (int i = 0; i < shape.rank_steps; ++i)
      for (int j = 0; j < kKeySteps; ++j)
        multiply_tiles<kFullParts, kFullParts>(
            2, 2, shape.depth,
            s.key_down + a * DuplexQueryViewsAmxScratch::key_down_words(shape) + 2 * i * shape.depth_step(),
            shape.depth_step(), s.key_scores + 2 * j * shape.depth_step(), shape.depth_step(),
            s.key_latent + i * kStripRows * kScratchColumns + j * kStripRows, kScratchColumns);
    finish_stores();
    memset(s.latent, 0, sizeof(float) * static_cast<size_t>(shape.terms * kTileDepth * kScratchColumns));
    for (int p = 0; p < chunk.num_present; ++p) {
      const int m = chunk.present[p];
      if (m == a) continue;
      for (int k = 0; k < shape.rank; ++k)
        for (int tile = 0; tile < 2 * kKeySteps; ++tile)
          store(s.latent + (shape.term_of(a, m) + k) * kScratchColumns + tile * kTileRows,
                keep_lanes(lanes_of(chunk.keys[m], tile), load(s.key_latent + k * kScratchColumns + tile * kTileRows)));
    }
    for (int t = 0; t < shape.terms; ++t)
      make_pair_tiles<kFullParts, false>(s.latent + t * kTileDepth * kScratchColumns, 2 * kKeySteps,
                                         s.latent_tiles + a * 2 * kKeySteps * shape.term_step() + t * kFullWords,
                                         shape.term_step());
    make_row_tiles<kFullParts, false>(s.latent, 2 * shape.terms, kKeySteps,
                                      s.latent_rows + a * 2 * kKeySteps * shape.term_step());
  }
}

// States after the chunk.
inline void add_chunk(const DuplexArgs& args, const DuplexQueryViewsAmxShape& shape, const AmxChunk& chunk,
                      bool needs_gram, DuplexQueryViewsAmxScratch& s) {
  for (int a = 0; a < args.num_modalities; ++a) {
    if (!chunk.has_others(a)) continue;
    for (int t = 0; t < shape.terms; ++t) {
      const auto add = [&](int pair, const float* product, int r) {
        for (int row = r; row < kStripRows; row += kTileRows) {
          float* out = s.stack_of(shape, a) + (t * kTileDepth + row) * kScratchColumns + pair * kStripRows;
          for (int c = 0; c < kStripRows; ++c) out[c] += product[row * kStripRows + c];
        }
      };
      multiply_strip<kFullParts, kFullParts>(
          shape.depth, [&](int) { return chunk.steps(); },
          s.latent_rows + a * 2 * kKeySteps * shape.term_step() + 2 * t * kKeySteps * kFullWords,
          kKeySteps * kFullWords, s.key_tiles(shape), shape.up_step(), s.products, add);
    }
    make_stack_tiles(shape, a, s);
  }
  for (int p = 0; needs_gram && p < chunk.num_present; ++p) {
    const int m = chunk.present[p];
    const float* rows = s.keys;
    if (chunk.num_present > 1) {
      select_rows(chunk.keys[m], shape.depth * kTileDepth, s.keys, s.selected);
      rows = s.selected;
    }
    for (int step = 0; step < chunk.steps(); ++step)
      make_pair_tiles<kFullParts, true>(rows + step * kTileDepth * kScratchColumns, 2 * shape.depth,
                                        s.key_columns + step * kFullWords, kKeySteps * kFullWords);
    s.gram.add(shape, m, chunk.steps(), s.key_columns, s.key_tiles(shape), shape.up_step(), s.products);
  }
}

template <class Storage>
int64_t duplex_query_views_amx_scratch_bytes(const DuplexQueryViewsForwardArgs& args) {
  Arena<float> arena(nullptr);
  DuplexQueryViewsAmxScratch scratch(DuplexQueryViewsAmxShape(args), DuplexQueryViewsScratch<float>::needs_gram(args),
                                     arena);
  const int64_t vector = duplex_query_views_scratch_bytes<float>(args);
  return DuplexQueryViewsAmxShape::fits(args) && arena.used() > vector ? arena.used() : vector;
}

// The positions of a strip that are rows of the query, and where they lie.
struct StripRows {
  int position;    // of row 0 in the chunk
  int begin, end;  // rows that exist
  int64_t first;   // index of row 0 in the query
};

// T_a as tiles, and with keys W_a behind it.
template <int kQueryParts, class Between>
void make_terms(const DuplexArgs& args, const DuplexQueryViewsAmxShape& shape, const AmxChunk& chunk,
                const StripRows& strip, int a, DuplexQueryViewsAmxScratch& s, const Between& between) {
  const int R = shape.rank;
  for (int pair = 0; pair < R / kTileRows; ++pair) {
    const auto row = [&](int r) {
      if (pair == 0) between(r);
    };
    multiply_tiles<kQueryParts, kFullParts, 2, 2>(
        shape.depth, s.query_tiles, int64_t{shape.depth} * kQueryParts * kTileWords,
        s.down + a * DuplexQueryViewsAmxScratch::down_words(shape) + 2 * pair * shape.depth_step(), shape.depth_step(),
        s.low_rank + pair * kStripRows, kScratchColumns,
        Slices(shape.depth * num_groups(kQueryParts, kFullParts), row));
  }
  finish_stores();
  for (int i = 0; i < kStripRows; ++i) {
    float* row = s.low_rank + i * kScratchColumns;
    const float* scale = s.scale[strip.position + i];
    Vector<float> x[kScratchColumns / 2 / kTileRows];
    for (int k = 0; k < R / kTileRows; ++k) x[k] = load(row + R + k * kTileRows);
    for (int m = 0; m < args.num_modalities; ++m)
      for (int k = 0; m != a && k < R / kTileRows; ++k)
        store(row + shape.term_of(a, m) + k * kTileRows, x[k] * splat(scale[m]));
    for (int c = args.num_modalities * R; c < shape.terms * kTileDepth; c += kTileRows) store(row + c, Vector<float>{});
  }
  for (int tile = 0; tile < 2; ++tile)
    make_row_tiles<kFullParts, false>(s.low_rank + tile * kTileRows * kScratchColumns, 1, shape.terms,
                                      s.term_tiles + tile * shape.up_step());
  if (!chunk.has_others(a)) return;
  for (int step = 0; step * kTileDepth <= strip.position; ++step) {
    multiply_tiles<kFullParts, kFullParts>(2, 2, shape.terms, s.term_tiles, shape.up_step(),
                                           s.latent_tiles + (a * 2 * kKeySteps + 2 * step) * shape.term_step(),
                                           shape.term_step(), s.weights, kScratchColumns);
    finish_stores();
    if (step * kTileDepth == strip.position)
      for (int i = 0; i < kStripRows; ++i)
        for (int tile = 0; tile < 2; ++tile) {
          float* row = s.weights + i * kScratchColumns + tile * kTileRows;
          store(row, keep_lanes(lanes_of(seen_from(i), tile), load(row)));
        }
    for (int tile = 0; tile < 2; ++tile)
      make_row_tiles<kFullParts, false>(s.weights + tile * kTileRows * kScratchColumns, 1, 1,
                                        s.term_tiles + tile * shape.up_step() + (shape.terms + step) * kFullWords);
  }
}

// between(0) .. between(15): work to do while the AMX unit is busy.
template <class Storage, int kQueryParts, class Between>
void make_view(const DuplexQueryViewsForwardArgs& args, const DuplexQueryViewsAmxShape& shape, const AmxChunk& chunk,
               const StripRows& strip, int a, Storage* out, DuplexQueryViewsAmxScratch& s, const Between& between) {
  make_terms<kQueryParts>(args, shape, chunk, strip, a, s, between);
  const int steps = shape.terms + (chunk.has_others(a) ? strip.position / kTileDepth + 1 : 0);
  const Word* up = s.up + a * DuplexQueryViewsAmxScratch::up_words(shape);
  const bool direct = sizeof(Storage) == sizeof(float) && args.nontemporal && args.head_dim % kStripRows == 0 &&
                      reinterpret_cast<uintptr_t>(out) % MODA_EXT_VECTOR_BYTES == 0 && args.views.row % kTileRows == 0;
  if (direct) {
    float* to = reinterpret_cast<float*>(out);
    multiply_strip<kFullParts, kFullParts>(
        shape.depth, [&](int) { return steps; }, s.term_tiles, shape.up_step(), up, shape.up_step(), s.products,
        [&](int pair, const float* product, int r) {
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const int row = r + half * kTileRows;
            if (row < strip.begin || row >= strip.end) continue;
            const float* query = s.query + row * kScratchColumns + pair * kStripRows;
            float* view = to + row * args.views.row + pair * kStripRows;
            store_nontemporal(view, load(query) + load(product + row * kStripRows));
            store_nontemporal(view + kTileRows, load(query + kTileRows) + load(product + row * kStripRows + kTileRows));
          }
        });
    return;
  }
  multiply_strip<kFullParts, kFullParts>(
      shape.depth, [&](int) { return steps; }, s.term_tiles, shape.up_step(), up, shape.up_step(), s.products,
      [&](int pair, const float* product, int r) {
        for (int row = r; row < kStripRows; row += kTileRows)
          for (int c = 0; c < kStripRows; c += kTileRows) {
            const int64_t at = row * kScratchColumns + pair * kStripRows + c;
            store(s.view + at, load(s.query + at) + load(product + row * kStripRows + c));
          }
      });
  for (int i = strip.begin; i < strip.end; ++i)
    store_row(s.view + i * kScratchColumns, 1.0f, out + i * args.views.row, args.head_dim);
}

// The indicator of a strip: out[row * args.indicator.row + m * args.indicator.last].
template <int kQueryParts>
void make_indicator(const DuplexQueryViewsForwardArgs& args, const DuplexQueryViewsAmxShape& shape,
                    const AmxChunk& chunk, const StripRows& strip, float* out, DuplexQueryViewsAmxScratch& s) {
  const int M = args.num_modalities;
  const int64_t query_step = int64_t{shape.depth} * kQueryParts * kTileWords;
  const auto form = [&](int m, int row) { return s.forms + (m * kStripRows + row) * kTileRows; };
  memset(s.forms, 0, sizeof(float) * static_cast<size_t>(M * kStripRows * kTileRows));
  for (int i = 0; i < kStripRows; ++i) {
    Vector<float> sum{};
    for (int c = 0; c < shape.depth * kTileDepth; c += kTileRows) {
      const Vector<float> q = load(s.query + i * kScratchColumns + c);
      sum += q * q;
    }
    store(form(M, i), sum);
  }
  for (int m = 0; m < M; ++m) {
    if (!s.gram.seen[m]) continue;
    multiply_strip<kQueryParts, kFullParts>(
        shape.depth, [](int pair) { return pair + 1; }, s.query_tiles, query_step, s.gram.tiles_of(shape, m),
        shape.depth_step(), s.products,
        [&](int pair, const float* product, int r) {
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const int row = r + half * kTileRows;
            const float *query = s.query + row * kScratchColumns + pair * kStripRows, *c = product + row * kStripRows;
            store(form(m, row),
                  load(form(m, row)) + load(c) * load(query) + load(c + kTileRows) * load(query + kTileRows));
          }
        });
  }
  if (chunk.num_present > 0)
    multiply_strip<kQueryParts, kFullParts>(
        strip.position / kStripRows + 1, [&](int) { return shape.depth; }, s.query_tiles, query_step, s.key_scores,
        shape.depth_step(), s.products,
        [&](int pair, const float* product, int r) {
          for (int row = r; row < kStripRows; row += kTileRows) {
            const uint64_t seen = seen_from(strip.position + row);
            for (int p = 0; p < chunk.num_present; ++p) {
              const int m = chunk.present[p];
              Vector<float> sum = load(form(m, row));
              for (int tile = 0; tile < 2; ++tile) {
                const Vector<float> score = keep_lanes(lanes_of(chunk.keys[m] & seen, 2 * pair + tile),
                                                       load(product + row * kStripRows + tile * kTileRows));
                sum += score * score;
              }
              store(form(m, row), sum);
            }
          }
        });
  for (int half = 0; half < kStripRows; half += kTileRows) {
    const Vector<float> norm = reduce_rows(form(M, half));
    for (int m = 0; m < M; ++m) {
      const Vector<float> sum = reduce_rows(form(m, half));
      for (int i = 0; i < kTileRows; ++i) {
        const int row = half + i;
        if (row < strip.begin || row >= strip.end) continue;
        out[row * args.indicator.row + m * args.indicator.last] = norm[i] > 0 ? sum[i] / norm[i] : 0.0f;
      }
    }
  }
}

// The rows of the query that lie in a chunk, as gram_family_chunk.h has them.
inline RowBlock rows_of(const CausalGramArgs& args, const AmxChunk& chunk) {
  Chunk positions;
  positions.first = chunk.first;
  positions.tokens = chunk.tokens;
  return rows_of(args, positions);
}

// Calls work(head, strip, next_head, next) for the strips of a chunk that have rows, of all heads of the group. The
// rows of `next` will probably be read next.
template <class Work>
void for_each_strip(const CausalGramArgs& args, int64_t kv_head, const RowBlock& block, const AmxChunk& chunk,
                    const Work& work) {
  StripRows strips[kKeySteps];
  int count = 0;
  for (int position = 0; position < chunk.tokens; position += kStripRows) {
    StripRows& strip = strips[count];
    strip.position = position;
    strip.begin = block.first > position ? block.first - position : 0;
    strip.end = smaller(kStripRows, chunk.tokens - position);
    strip.first = block.row + position - block.first;
    count += strip.begin < strip.end;
  }
  const int64_t first = kv_head * args.group, last = first + args.group;
  const int64_t left = args.num_queries - block.row - block.count;
  const StripRows next_chunk{0, 0, static_cast<int>(left < kStripRows ? left : kStripRows), block.row + block.count};
  for (int64_t head = first; count > 0 && head < last; ++head)
    for (int i = 0; i < count; ++i) {
      if (i + 1 < count) {
        work(head, strips[i], head, strips[i + 1]);
      } else if (head + 1 < last) {
        work(head, strips[i], head + 1, strips[0]);
      } else {
        work(head, strips[i], first, next_chunk);
      }
    }
}

// Asks for a row of a strip.
template <class Storage>
MODA_EXT_INLINE void prefetch_strip_row(const StripRows& strip, const Storage* row_zero, int64_t row_stride,
                                        int head_dim, int row) {
  if (row >= strip.begin && row < strip.end) prefetch_rows(row_zero + row * row_stride, row_stride, 1, head_dim);
}

// Rows of an operand into a strip's rows, zero where there is none.
template <class Storage>
void load_strip(const StripRows& strip, const Storage* row_zero, int64_t row_stride, int head_dim, float* rows) {
  const size_t width = sizeof(float) * static_cast<size_t>(steps_of(head_dim) * kTileDepth);
  for (int i = 0; i < kStripRows; ++i) {
    float* row = rows + i * kScratchColumns;
    if (i < strip.begin || i >= strip.end) {
      memset(row, 0, width);
      continue;
    }
    load_row(row_zero + i * row_stride, 1.0f, row, head_dim);
    memset(row + head_dim, 0, width - sizeof(float) * static_cast<size_t>(head_dim));
  }
}

// s_{i,m} by position; 0 for positions without a row.
inline void load_scale_by_position(const CausalGramArgs& args, int64_t batch, int64_t kv_head, const RowBlock& block,
                                   float (*scale)[kMaxModalities]) {
  memset(scale, 0, sizeof(float) * kAmxChunk * kMaxModalities);
  load_scale(args, batch, kv_head, block, scale + block.first);
}

template <class Storage>
void duplex_query_views_amx(const DuplexQueryViewsForwardArgs& args, int64_t batch, int64_t kv_head, void* memory) {
  constexpr int kQueryParts = kInputParts<Storage>;
  if (!DuplexQueryViewsAmxShape::fits(args)) return duplex_query_views<Storage, float>(args, batch, kv_head, memory);
  const DuplexQueryViewsAmxShape shape(args);
  const bool needs_gram = DuplexQueryViewsScratch<float>::needs_gram(args);
  Arena<float> arena(memory);
  DuplexQueryViewsAmxScratch s(shape, needs_gram, arena);
  const AmxTileConfig unit;
  const float* initial = grams_of<float>(args, args.initial, batch, kv_head);
  start_tiles(args, shape, initial, s);
  for (int a = 0; a < shape.M; ++a) make_stack_tiles(shape, a, s);
  if (needs_gram) s.gram.start(shape, args.head_dim, initial);

  AmxChunk chunk;
  for (int64_t first = 0; first < args.num_keys; first += kAmxChunk) {
    plan_chunk(args, batch, first, chunk);
    load_features<Storage>(args, batch, kv_head, chunk, s.keys);
    make_key_tiles(args, shape, chunk, s);
    const RowBlock block = rows_of(args, chunk);
    if (block.count > 0) load_scale_by_position(args, batch, kv_head, block, s.scale);
    for_each_strip(args, kv_head, block, chunk,
                   [&](int64_t head, const StripRows& strip, int64_t next_head, const StripRows& next) {
                     load_strip(strip, row_of<Storage>(args.query, batch, head, strip.first), args.query.row,
                                args.head_dim, s.query);
                     make_row_tiles<kQueryParts, false>(s.query, 2, shape.depth, s.query_tiles);
                     const Storage* next_rows = row_of<Storage>(args.query, batch, next_head, next.first);
                     // Half of the next strip for each of two views: requests queue up for few fill buffers.
                     const int rows_per_view = shape.M > 1 ? kTileRows : kStripRows;
                     for (int a = 0; a < shape.M; ++a)
                       make_view<Storage, kQueryParts>(
                           args, shape, chunk, strip, a,
                           row_of<Storage>(args.views, batch, head, strip.first) + args.views.view * a, s, [&](int r) {
                             const int first = a * rows_per_view;
                             for (int row = first + r; row < kStripRows && row < first + rows_per_view;
                                  row += kTileRows)
                               prefetch_strip_row(next, next_rows, args.query.row, args.head_dim, row);
                           });
                     if (args.indicator.data != nullptr)
                       make_indicator<kQueryParts>(args, shape, chunk, strip,
                                                   row_of<float>(args.indicator, batch, head, strip.first), s);
                   });
    add_chunk(args, shape, chunk, needs_gram, s);
  }
  nontemporal_fence();
  if (args.gram != nullptr) s.gram.write(shape, args.head_dim, grams_of<float>(args, args.gram, batch, kv_head));
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
