// duplex_aligned_keys.h with AMX (see amx.h for operands and accuracy).
//
// Normalised by its trace, a Gram is needed for A2_a^T G^m alone, which is made of the keys without it:
//
//   A2_a^T G^m = sum_{a_j = m} f_j^2 (k_j A2_a)^T k_j      f_j = 1 / |k_j|, or 1
//
// At D = 128, two modalities and rank 16 that is 40 % of the work of a Gram's triangle. Keys are taken in strips of one
// modality. They are the first operand of one product and the second of another; both are made of one split of a key.
//
// H_a waits for the sums of the other modalities only. So these come first, and the modality with most keys is summed
// and updated in one visit to each of its strips; the others are visited twice.
//
// A strip's operands would fill a first-level cache, and a store that misses it costs more than the vector work behind
// it. So they are made a step of the head size at a time, under the products of the step before. Of a first operand
// that up to three tiles of columns need, all but the first parts are then overwritten two steps later. Asking for the
// keys of the next strip brought nothing.
#pragma once

#include "cpu/kernels/amx/modality_gram.h"
#include "cpu/kernels/vector/duplex_aligned_keys.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

// Sizes, in steps of 32 and in words, that follow from the arguments.
struct DuplexAlignedKeysAmxShape {
  int depth;  // steps of the head size
  int rank;   // padded to whole tiles
  int M;
  bool by_rank;  // A2^T G without the Gram

  explicit DuplexAlignedKeysAmxShape(const DuplexAlignedKeysArgs& args)
      : depth(steps_of(args.head_dim)), rank(padded_rank<float>(args)), M(args.num_modalities) {
    // Costs (M - 1) 4 D rank for a key, against 5/4 D^2 and more operands of keys.
    by_rank = args.normalization == Normalization::kTrace && 2 * (M - 1) * rank <= args.head_dim;
  }
  int rank_tiles() const { return rank / kTileRows; }
  int rank_steps() const { return 2 * rank / kTileDepth; }  // of both ranks side by side
  int width() const { return depth * kTileDepth; }
  int columns() const { return (M + 1) * rank_tiles(); }  // that a strip is multiplied with, at most
  int64_t depth_step() const { return int64_t{depth} * kFullWords; }
};

// A strip, tokens[first], .., [first + count - 1], and what is done with it.
struct Visit {
  int modality, count;
  int64_t first;
  bool sum;            // into A2_a^T G of the other modalities
  bool update;         // its keys
  bool opens, closes;  // the first and the last of those alike

  bool like(const Visit& other) const {
    return modality == other.modality && sum == other.sum && update == other.update;
  }
};

// The tokens by modality, those outside the Grams last, padding left out; and the visits to them. The same for all key
// heads of a batch element.
struct KeyPlan {
  int32_t* tokens;
  Visit* visits;
  int64_t* count;  // of visits

  int64_t num_visits() const { return *count; }

  static int64_t most_visits(const DuplexAlignedKeysArgs& args) {
    return 2 * (args.num_keys / kStripRows + 2 * args.num_modalities);
  }
  void take(const DuplexAlignedKeysArgs& args, Arena<float>& arena) {
    tokens = arena.take<int32_t>(args.num_keys);
    visits = arena.take<Visit>(most_visits(args));
    count = arena.take<int64_t>(1);
  }
  void make(const DuplexAlignedKeysArgs& args, int64_t batch, bool by_rank) {
    const int M = args.num_modalities;
    int64_t begin[2 * kMaxModalities + 1] = {}, next[2 * kMaxModalities];
    const auto for_each_token = [&](const auto& work) {
      for (int64_t j = 0; j < args.num_keys; ++j) {
        const int m = args.members[batch * args.members_batch + j * args.members_token];
        if (m < 0) continue;
        const bool included = args.modality[batch * args.modality_batch + j * args.modality_token] >= 0;
        work(included ? m : M + m, static_cast<int32_t>(j));
      }
    };
    for_each_token([&](int group, int32_t) { ++begin[group + 1]; });
    for (int g = 0; g < 2 * M; ++g) {
      next[g] = begin[g];
      begin[g + 1] += begin[g];
    }
    for_each_token([&](int group, int32_t j) { tokens[next[group]++] = j; });

    int largest = 0;
    for (int m = 1; m < M; ++m)
      if (begin[m + 1] - begin[m] > begin[largest + 1] - begin[largest]) largest = m;
    const int once = by_rank ? largest : -1;
    *count = 0;
    const auto visit = [&](int group, bool sum, bool update) {
      for (int64_t first = begin[group]; first < begin[group + 1]; first += kStripRows) {
        const int64_t left = begin[group + 1] - first;
        const int keys = static_cast<int>(left < kStripRows ? left : kStripRows);
        visits[(*count)++] = {group % M, keys, first, sum, update, true, true};
      }
    };
    for (int m = 0; m < M; ++m)
      if (by_rank && m != once) visit(m, true, false);
    if (by_rank) visit(once, true, true);
    for (int group = 0; group < 2 * M; ++group)
      if (group != once) visit(group, false, true);
    for (int64_t v = 1; v < num_visits(); ++v)
      if (visits[v].like(visits[v - 1])) visits[v].opens = visits[v - 1].closes = false;
  }
};

template <int kKeyParts>
struct DuplexAlignedKeysAmxScratch {
  KeyPlan plan;
  float *rows, *zeros;         // [2][kStripRows] rows: keys that are not read where they lie; the row of no key
  StripTiles<kKeyParts> keys;  // first operand
  Word* pair_tiles;            // of a strip, second operands [column tile][part]
  float* latent;               // [rank tiles][kStripRows][kTileRows]: of the others, k A2; k A1; k H^T
  Word* latent_tiles;          // first operands: of k A2, transposed [part]; of the rest [row tile][step][part]
  float* sums;                 // [M][rank][steps * 32]: A2_a^T G of one modality
  float* alignment;            // [M][rank] rows: H
  float* products;             // two blocks
  float* view;                 // [kStripRows] rows: updated keys, and weights on their way into tiles
  Word *key_down, *down, *up;  // [M] second operands [column tile][step][part]: A2; A1 | H^T; B1 ; B2
  Column* columns;

  DuplexAlignedKeysAmxScratch(const DuplexAlignedKeysArgs& args, const DuplexAlignedKeysAmxShape& shape,
                              Arena<float>& arena) {
    const auto rows_of = [&](int64_t count) { return arena.take(count * kScratchColumns); };
    const auto words = [&](int64_t count) { return arena.template take<Word>(count); };
    plan.take(args, arena);
    rows = rows_of(2 * kStripRows);
    zeros = rows_of(1);
    keys.steps = shape.depth;
    keys.first = words(2 * shape.depth * kTileWords);
    keys.others = words(2 * (shape.depth > 2 ? shape.depth : 2) * (kKeyParts - 1) * kTileWords);
    pair_tiles = words(2 * shape.depth * pair_step());
    latent = arena.take(shape.columns() * 2 * kTileWords);
    latent_tiles = words(2 * up_step(shape));
    sums = arena.take(sum_elements(shape));
    alignment = rows_of(int64_t{shape.M} * shape.rank);
    products = arena.take(2 * kBlockElements);
    view = rows_of(kStripRows);
    key_down = words(shape.M * key_down_words(shape));
    down = words(shape.M * 2 * key_down_words(shape));
    up = words(shape.M * 2 * shape.depth * up_step(shape));
    columns = arena.template take<Column>(shape.columns());
  }
  static int64_t pair_step() { return int64_t{kKeyParts} * kTileWords; }
  static int64_t key_down_words(const DuplexAlignedKeysAmxShape& shape) {
    return shape.rank_tiles() * shape.depth_step();
  }
  static int64_t up_step(const DuplexAlignedKeysAmxShape& shape) { return int64_t{shape.rank_steps()} * kFullWords; }
  static int64_t sum_elements(const DuplexAlignedKeysAmxShape& shape) {
    return int64_t{shape.M} * shape.rank * shape.width();
  }
  // The operands of a strip: A2 of the others if it is summed, A1 | H^T of its own if it is updated.
  int list_columns(const DuplexAlignedKeysAmxShape& shape, const Visit& visit) {
    int count = 0;
    const auto add = [&](const Word* tiles, int number) {
      for (int t = 0; t < number; ++t, ++count) columns[count] = {tiles + t * shape.depth_step(), latent_of(count)};
    };
    for (int a = 0; a < shape.M && visit.sum; ++a)
      if (a != visit.modality) add(key_down + a * key_down_words(shape), shape.rank_tiles());
    if (visit.update) add(down + 2 * visit.modality * key_down_words(shape), 2 * shape.rank_tiles());
    return count;
  }
  float* latent_of(int column) const { return latent + column * 2 * kTileWords; }
  float* sums_of(const DuplexAlignedKeysAmxShape& shape, int a, int rank_tile) const {
    return sums + (int64_t{a} * shape.rank + rank_tile * kTileRows) * shape.width();
  }
};

template <class Storage>
int64_t duplex_aligned_keys_amx_scratch_bytes(const DuplexAlignedKeysArgs& args) {
  const DuplexAlignedKeysAmxShape shape(args);
  Arena<float> arena(nullptr);
  if (!shape.by_rank) {
    const GramFactors<float> factors(args, arena);
    arena.take<char>(modality_gram_amx_scratch_bytes(args));
  }
  const DuplexAlignedKeysAmxScratch<kInputParts<Storage>> scratch(args, shape, arena);
  return arena.used();
}

// The keys of one head in memory.
template <class Storage>
struct KeyRows {
  const DuplexAlignedKeysArgs& args;
  const KeyPlan& plan;
  const Storage* keys;
  const float* zeros;
  bool direct;  // usable where they lie

  KeyRows(const DuplexAlignedKeysArgs& args, int64_t batch, int64_t kv_head, const KeyPlan& plan, const float* zeros)
      : args(args),
        plan(plan),
        keys(row_of<Storage>(args.key, batch, kv_head, 0)),
        zeros(zeros),
        direct(sizeof(Storage) == sizeof(float) && args.head_dim % kTileDepth == 0) {}
  MODA_EXT_INLINE const Storage* key(const Visit& visit, int i) const {
    return keys + plan.tokens[visit.first + i] * args.key.row;
  }
  // Key i of a strip, zero beyond its keys and, up to a whole step, beyond the head size.
  MODA_EXT_INLINE const float* row(const Visit& visit, int i, float* copy) const {
    if (i >= visit.count) return zeros;
    if (direct) return reinterpret_cast<const float*>(key(visit, i));
    load_row(key(visit, i), 1.0f, copy, args.head_dim);
    memset(copy + args.head_dim, 0, sizeof(float) * (steps_of(args.head_dim) * kTileDepth - args.head_dim));
    return copy;
  }
};

// The keys of a strip, and what a sum needs beside them.
struct LoadedStrip {
  const float* row[kStripRows];
  Vector<float> squares[kStripRows];  // of what was split so far
  float factor[kStripRows];           // f_j
  float trace;                        // share in the trace of the Gram
};

// One step of keys r and r + 16 as tiles: every element is split once.
template <bool sum, int parts>
MODA_EXT_INLINE void split_keys(const StripTiles<parts>& tiles, int step, int r, LoadedStrip& strip, Word* pair_tiles) {
  Words part[2][2][parts];
#pragma GCC unroll 2
  for (int tile = 0; tile < 2; ++tile) {
    const int i = r + tile * kTileRows;
    const Vector<float> low = load(strip.row[i] + step * kTileDepth);
    const Vector<float> high = load(strip.row[i] + step * kTileDepth + kTileRows);
    if (sum) strip.squares[i] = (step == 0 ? Vector<float>{} : strip.squares[i]) + low * low + high * high;
    split<parts>(low, part[tile][0]);
    split<parts>(high, part[tile][1]);
  }
  Word* pair = pair_tiles + 2 * step * parts * kTileWords + r * kTileRows;
#pragma GCC unroll 3
  for (int p = 0; p < parts; ++p) {
    store_words(tiles.at(0, step, p) + r * kTileRows, join(part[0][0][p], part[0][1][p]));
    store_words(tiles.at(1, step, p) + r * kTileRows, join(part[1][0][p], part[1][1][p]));
    if (!sum) continue;
    store_words(pair + p * kTileWords, join(part[0][0][p], part[1][0][p]));
    store_words(pair + (parts + p) * kTileWords, join(part[0][1][p], part[1][1][p]));
  }
}

// f_i and its share of the trace, once the squares of key i are complete. Where there is nothing, 0.
MODA_EXT_INLINE void find_factor(const DuplexAlignedKeysArgs& args, int i, LoadedStrip& strip) {
  const float norm = sqrtf(reduce_add<float>(strip.squares[i])), eps = static_cast<float>(args.eps);
  strip.factor[i] = norm == 0 ? 0.0f : args.unit_keys ? 1 / (norm > eps ? norm : eps) : 1.0f;
  const float length = strip.factor[i] == 0 ? 0 : norm * strip.factor[i];  // of phi; 0 where the square overflows
  strip.trace += length * length;
}

// Adds a strip to A2_a^T G of all other modalities a.
template <int kKeyParts>
void sum_strip(const DuplexAlignedKeysAmxShape& shape, int modality, const LoadedStrip& strip,
               DuplexAlignedKeysAmxScratch<kKeyParts>& s) {
  float* latent = s.latent;
  for (int a = 0; a < shape.M; ++a)
    for (int t = 0; a != modality && t < shape.rank_tiles(); ++t, latent += 2 * kTileWords) {
      for (int i = 0; i < kStripRows; ++i) {
        const Vector<float> factor = splat(strip.factor[i]);
        store(latent + i * kTileRows, load(latent + i * kTileRows) * factor * factor);
      }
      make_tile<kFullParts, true>(latent, latent + kTileWords, s.latent_tiles, kTileRows);
      float* sums = s.sums_of(shape, a, t);
      const auto product_of = [&](int pair) { return s.products + pair % 2 * kBlockElements; };
      const auto add = [&](int pair, int r) {
#pragma GCC unroll 2
        for (int tile = 0; tile < kStripRows; tile += kTileRows) {
          float* sum = sums + r * shape.width() + pair * kStripRows + tile;
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
}

// Adds what sum_strip() added, for modality m, to H of all others.
template <int kKeyParts>
void add_sums(const DuplexAlignedKeysAmxShape& shape, int m, float trace, DuplexAlignedKeysAmxScratch<kKeyParts>& s) {
  const float scale = trace > FLT_MIN ? 1 / trace : 0.0f;
  for (int a = 0; a < shape.M; ++a)
    for (int k = 0; a != m && k < shape.rank; ++k)
      add_scaled(scale, s.sums_of(shape, a, 0) + k * shape.width(),
                 s.alignment + (a * shape.rank + k) * kScratchColumns, shape.width());
}

// `count` rows of weights (of stride kScratchStride), zero-padded to whole steps.
inline void load_weights(const DuplexAlignedKeysArgs& args, const float* from, int count, float* rows) {
  copy_rows<float>(count, args.head_dim, from, kScratchStride<float>, rows, kScratchColumns);
  clear_rows(rows, count, args.head_dim, count);
}

// The weights as operands, apart from H.
template <int kKeyParts>
void make_weight_tiles(const DuplexAlignedKeysArgs& args, const DuplexAlignedKeysAmxShape& shape,
                       DuplexAlignedKeysAmxScratch<kKeyParts>& s) {
  for (int a = 0; a < shape.M; ++a) {
    const ViewWeights<float> w = ViewWeights<float>::of(args, a, args.weights);
    for (int t = 0; t < shape.rank_tiles(); ++t) {
      const int64_t from = int64_t{t} * kTileRows * kScratchStride<float>, to = t * shape.depth_step();
      load_weights(args, w.key_down + from, kTileRows, s.view);
      make_row_tiles<kFullParts, true>(s.view, 1, shape.depth, s.key_down + a * s.key_down_words(shape) + to);
      load_weights(args, w.up + from, kTileRows, s.view);
      make_row_tiles<kFullParts, true>(s.view, 1, shape.depth, s.down + 2 * a * s.key_down_words(shape) + to);
    }
    for (int step = 0; step < shape.rank_steps(); ++step) {
      load_weights(args, w.back + int64_t{step} * kTileDepth * kScratchStride<float>, kTileDepth, s.view);
      make_pair_tiles<kFullParts, false>(
          s.view, 2 * shape.depth, s.up + 2 * a * shape.depth * s.up_step(shape) + step * kFullWords, s.up_step(shape));
    }
  }
}
// H of a modality as an operand.
template <int kKeyParts>
void make_alignment_tiles(const DuplexAlignedKeysAmxShape& shape, int a, DuplexAlignedKeysAmxScratch<kKeyParts>& s) {
  make_row_tiles<kFullParts, true>(s.alignment + int64_t{a} * shape.rank * kScratchColumns, shape.rank_tiles(),
                                   shape.depth, s.down + (2 * a + 1) * s.key_down_words(shape));
}

// Writes the updated keys of a strip, of which `latent` is k [A1 | H^T]. between(r) runs under the first product.
template <class Storage, class Between>
void update_strip(const DuplexAlignedKeysArgs& args, const DuplexAlignedKeysAmxShape& shape, const Visit& visit,
                  const LoadedStrip& strip, const float* latent, const Between& between, Storage* out,
                  DuplexAlignedKeysAmxScratch<kInputParts<Storage>>& s) {
  for (int tile = 0; tile < 2; ++tile)
    for (int step = 0; step < shape.rank_steps(); ++step) {
      const float* first = latent + (4 * step + tile) * kTileWords;
      make_tile<kFullParts, false>(first, first + 2 * kTileWords,
                                   s.latent_tiles + tile * s.up_step(shape) + step * kFullWords, kTileRows);
    }
  const int32_t* tokens = s.plan.tokens + visit.first;
  const bool direct = sizeof(Storage) == sizeof(float) && args.nontemporal && args.head_dim % kStripRows == 0 &&
                      reinterpret_cast<uintptr_t>(out) % MODA_EXT_VECTOR_BYTES == 0 &&
                      args.aligned.row % kTileRows == 0;
  multiply_strip<kFullParts, kFullParts>(
      shape.depth, [&](int) { return shape.rank_steps(); }, s.latent_tiles, s.up_step(shape),
      s.up + 2 * visit.modality * shape.depth * s.up_step(shape), s.up_step(shape), s.products, between,
      [&](int pair, const float* product, int r) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const int row = r + half * kTileRows, at = row * kScratchColumns + pair * kStripRows;
          if (row >= visit.count) continue;
          const float* key = strip.row[row] + pair * kStripRows;
          const Vector<float> low = load(key) + load(product + row * kStripRows);
          const Vector<float> high = load(key + kTileRows) + load(product + row * kStripRows + kTileRows);
          if (direct) {
            float* to = reinterpret_cast<float*>(out + tokens[row] * args.aligned.row) + pair * kStripRows;
            store_nontemporal(to, low);
            store_nontemporal(to + kTileRows, high);
          } else {
            store(s.view + at, low);
            store(s.view + at + kTileRows, high);
          }
        }
      });
  for (int i = 0; !direct && i < visit.count; ++i)
    store_row(s.view + i * kScratchColumns, 1.0f, out + tokens[i] * args.aligned.row, args.head_dim);
}

template <class Storage>
void duplex_aligned_keys_amx(const DuplexAlignedKeysArgs& args, const DuplexAlignedKeysItem& item, void* memory) {
  const int64_t batch = item.batch, kv_head = item.kv_head;
  const DuplexAlignedKeysAmxShape shape(args);
  Arena<float> arena(memory);
  const float* alignment = nullptr;
  if (!shape.by_rank) {
    const GramFactors<float> factors(args, arena);
    modality_gram_amx<Storage>(args, {batch, kv_head, 0, args.num_keys, factors.gram},
                               arena.take<char>(modality_gram_amx_scratch_bytes(args)));
    factors.align(args);
    alignment = factors.alignment;
  }
  DuplexAlignedKeysAmxScratch<kInputParts<Storage>> s(args, shape, arena);
  const AmxTileConfig unit;
  const KeyPlan& plan = s.plan;
  if (item.batch_before != batch) s.plan.make(args, batch, shape.by_rank);
  if (item.batch_before < 0) {
    make_weight_tiles(args, shape, s);
    memset(s.zeros, 0, sizeof(float) * static_cast<size_t>(shape.width()));
  }
  if (shape.by_rank) {
    memset(s.alignment, 0, sizeof(float) * static_cast<size_t>(shape.M * shape.rank * kScratchColumns));
  } else {
    load_weights(args, alignment, shape.M * shape.rank, s.alignment);
  }
  const KeyRows<Storage> keys(args, batch, kv_head, plan, s.zeros);
  Storage* out = row_of<Storage>(args.aligned, batch, kv_head, 0);
  LoadedStrip loaded[2];
  const auto split = [&](int64_t v, int step, int r) {
    if (v == plan.num_visits()) return;
    const Visit& visit = plan.visits[v];
    LoadedStrip& strip = loaded[v % 2];
    if (step == 0)
      for (int i = r; i < kStripRows; i += kTileRows)
        strip.row[i] = keys.row(visit, i, s.rows + (v % 2 * kStripRows + i) * kScratchColumns);
    if (visit.sum) {
      split_keys<true>(s.keys, step, r, strip, s.pair_tiles);
    } else {
      split_keys<false>(s.keys, step, r, strip, s.pair_tiles);
    }
  };
  float trace = 0;
  for (int64_t v = 0; v < plan.num_visits(); ++v) {
    const Visit& visit = plan.visits[v];
    LoadedStrip& strip = loaded[v % 2];
    if (visit.opens && visit.sum) {
      memset(s.sums, 0, sizeof(float) * static_cast<size_t>(s.sum_elements(shape)));
      trace = 0;
    }
    if (visit.opens && visit.update) make_alignment_tiles(shape, visit.modality, s);

    const int columns = s.list_columns(shape, visit);
    s.keys.ring = columns <= 3;
    if (v == 0 || !plan.visits[v - 1].update)
      for (int r = 0; r < kTileRows; ++r) split(v, 0, r);
    strip.trace = 0;
    const auto prepare = [&](int step, int r) { split(v, step, r); };
    const auto between = [&](int r) {
      if (!visit.sum) return;
      find_factor(args, r, strip);
      find_factor(args, r + kTileRows, strip);
    };
    multiply_columns(smaller(columns, 3), s.keys, s.columns, prepare, between);
    for (int c = 3; c < columns; c += 3)
      multiply_columns(smaller(columns - c, 3), s.keys, s.columns + c, Nothing(), Nothing());

    if (visit.sum) {
      trace += strip.trace;
      sum_strip(shape, visit.modality, strip, s);
      if (visit.closes) add_sums(shape, visit.modality, trace, s);
    }
    if (visit.update)
      update_strip<Storage>(
          args, shape, visit, strip, s.latent_of(columns - 2 * shape.rank_tiles()), [&](int r) { split(v + 1, 0, r); },
          out, s);
  }
  copy_padding<Storage>(args, batch, kv_head);
  nontemporal_fence();
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
