// Forward pass with AMX (see amx.h for operands and accuracy).
//
// Everything is transposed with respect to VectorEngine: S^T = K Q^T and O^T = V^T P^T, keys (or head dimensions) down
// the rows, queries across. Running maximum, masses, bias and visibility are then vectors over 16 queries: no
// horizontal reductions. Two rows of probabilities, 16 keys apart, join into a row of the tile that the second product
// reads, so P^T needs no transposition between the products.
//
// The unit of work is a strip of 32 queries against one key tile: scores (32 x 128 floats), probabilities (three parts)
// and outputs of a strip stay in the first-level cache or close to it, packed keys and values stream from the second
// level. The unit of what is skipped above the diagonal is 32 x 32.
#pragma once

#include "cpu/kernels/amx/amx.h"
#include "cpu/kernels/vector/modular_attention_forward.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

constexpr int kStrip = 2 * kTileRows;  // queries that one block of tile products covers
constexpr int kStrips = kBlockRows / kStrip;
static_assert(kBlockRows % kStrip == 0, "a block is whole strips");

// Scores are S = q . k times this in log2 units; its sign goes into the queries, so that a maximum over keys stays a
// maximum.
MODA_EXT_INLINE double softmax_scale_log2(const ModularAttentionArgs& args) { return fabs(args.scale) * kLog2e; }
MODA_EXT_INLINE float score_sign(const ModularAttentionArgs& args) { return args.scale < 0 ? -1.0f : 1.0f; }

// 32 keys (or values) of a tile from slot `first` on, zero-padded.
template <class Storage>
MODA_EXT_INLINE void load_keys(const Input& operand, const ModularAttentionArgs& args, const Sequence& sequence,
                               int64_t kv_head, const KeyTile& tile, int first, float* rows) {
  clear_rows(rows, kTileDepth, args.head_dim, tile.length - first);
  for (int j = first; j < tile.length && j < first + kTileDepth; ++j)
    load_row(row_of<Storage>(operand, sequence.batch, kv_head, key_row(sequence, tile.start + j)), 1.0f,
             rows + (j - first) * kScratchColumns, args.head_dim);
}

// What a key tile shows to a strip of queries.
struct StripView {
  alignas(64) int32_t visible[kStrip];  // keys of the tile that each query sees; 0 beyond the last query
  int limit;                            // the largest of them
  int full;                             // the smallest: up to here nothing needs a mask
};

// last(i): the last key position that query i of `count` sees, below 0 for nothing.
template <class Last>
MODA_EXT_INLINE StripView view_strip(const int32_t* order, const KeyTile& tile, int count, const Last& last) {
  StripView strip;
  strip.limit = 0;
  strip.full = count < kStrip ? 0 : tile.length;
  for (int i = 0; i < kStrip; ++i) {
    const int visible = i < count ? visible_keys(order, tile, last(i)) : 0;
    strip.visible[i] = visible;
    strip.limit = strip.limit > visible ? strip.limit : visible;
    strip.full = strip.full < visible ? strip.full : visible;
  }
  return strip;
}

// Lanes of queries that see key j.
MODA_EXT_INLINE Bits<float> sees(const int32_t* visible, int j) {
  Bits<float> counts;
  memcpy(&counts, visible, sizeof(counts));
  return counts > (Bits<float>{} + j);
}
MODA_EXT_INLINE Vector<float> keep_where(Bits<float> mask, Vector<float> v) {
  return (Vector<float>)((Bits<float>)v & mask);
}
MODA_EXT_INLINE bool any(Bits<float> mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }

// Columns of 16 queries (stride kStrip) to 16 rows.
MODA_EXT_INLINE void transpose_columns(const float* from, int columns, float* to, int64_t to_stride) {
  for (int d = 0; d < columns; d += kTileRows) {
    Vector<float> square[kTileRows];
    for (int r = 0; r < kTileRows; ++r) square[r] = load(from + (d + r) * kStrip);
    transpose_square<float>(square);
    for (int r = 0; r < kTileRows; ++r) store(to + r * to_stride + d, square[r]);
  }
}

template <class StorageType>
class AmxEngine {
 public:
  using Storage = StorageType;
  using T = float;
  using Packed = Word;
  static constexpr int kTileKeys = 128;
  static constexpr int kMostUnpackedRows = 0;  // tile instructions want packed keys
  static constexpr int kInput = kInputParts<Storage>;
  static constexpr int kInner = kInnerParts<Storage>;

  struct Scratch {
    RowState<float> state;
    float output[kStrips][kScratchColumns * kStrip];  // O^T of each strip
    float scores[kTileKeys * kStrip];
    Word probability[kTileKeys / kTileDepth * 2 * kInner * kTileWords];  // [query tile][step of keys][part]
    float product[kStrip * kStrip];
    float rows[kTileDepth * kScratchColumns];
    alignas(64) float bias[kBlockRows];  // relative_bias of the tile's modality
    // followed by: queries [view][query tile][step of columns][part], then room for one packed tile
  };

  static int64_t packed_elements(const ModularAttentionArgs& args, int64_t num_panels) {
    return num_panels * kInput * kTileWords * (2 * steps_of(args.head_dim) + tiles_of(args.head_dim));
  }
  static int64_t scratch_bytes(const ModularAttentionArgs& args) {
    return static_cast<int64_t>(sizeof(Scratch)) +
           static_cast<int64_t>(sizeof(Word)) *
               (args.num_views * query_words(args) + packed_elements(args, kTileKeys / kTileDepth));
  }

  // Row tiles of the keys, then transposed pair tiles of the values [tile of columns][step of keys][part].
  static void pack(const ModularAttentionArgs& args, const Sequence& sequence, int64_t kv_head, const KeyTile& tile,
                   Word* packed) {
    alignas(64) float rows[kTileDepth * kScratchColumns];
    const int steps = steps_of(tile.length), depth = steps_of(args.head_dim);
    Word* values = packed + packed_value_offset(args, tile);
    for (int s = 0; s < steps; ++s) {
      load_keys<Storage>(args.key, args, sequence, kv_head, tile, s * kTileDepth, rows);
      make_row_tiles<kInput, false>(rows, 2, depth, packed + static_cast<int64_t>(s) * 2 * depth * kInput * kTileWords);
      load_keys<Storage>(args.value, args, sequence, kv_head, tile, s * kTileDepth, rows);
      make_pair_tiles<kInput, true>(rows, tiles_of(args.head_dim), values + s * kInput * kTileWords,
                                    static_cast<int64_t>(steps) * kInput * kTileWords);
    }
  }

  AmxEngine(const ModularAttentionForwardArgs& args, void* memory)
      : args_(args),
        scratch_(*static_cast<Scratch*>(memory)),
        queries_(reinterpret_cast<Word*>(&scratch_ + 1)),
        own_tile_(queries_ + args.num_views * query_words(args)) {}

  RowState<float>& state() { return scratch_.state; }
  Word* own_tile() { return own_tile_; }

  void start(const ItemRows& rows) {
    for (int first = 0; first < rows.count; first += kStrip)
      memset(scratch_.output[first / kStrip], 0, sizeof(float) * tiles_of(args_.head_dim) * kTileRows * kStrip);
  }

  void load_queries(const ItemRows& rows, int view) {
    const int depth = steps_of(args_.head_dim);
    Word* out = queries_ + view * query_words(args_);
    for (int first = 0; first < rows.count; first += kTileRows, out += depth * kInput * kTileWords) {
      clear_rows(scratch_.rows, kTileRows, args_.head_dim, rows.count - first);
      for (int i = first; i < rows.count && i < first + kTileRows; ++i)
        load_row(rows.at<Storage>(args_.query, i) + args_.query.view * view, score_sign(args_),
                 scratch_.rows + (i - first) * kScratchColumns, args_.head_dim);
      make_row_tiles<kInput, true>(scratch_.rows, 1, depth, out);
    }
  }

  void attend(const ItemRows& rows, const KeyTile& tile, int view, const Word* packed) {
    const Sequence& sequence = *rows.item.sequence;
    const int64_t offset = args_.causal ? sequence.num_keys - sequence.num_queries : sequence.num_keys;
    for (int first = 0; first < rows.count; first += kStrip) {
      const int count = rows.count - first;
      for (int i = 0; i < kStrip; ++i) {
        scratch_.bias[first + i] =
            i < count ? relative_bias(args_, rows, first + i, tile.modality, state().base[first + i]) : 0.0f;
      }
      const StripView strip = view_strip(sequence.order, tile, count, [&](int i) {
        if (scratch_.bias[first + i] == -INFINITY) return int64_t{-1};
        return args_.causal ? rows.row[first + i] + offset : offset;
      });
      if (strip.limit > 0) attend_strip(first, count > kTileRows ? 2 : 1, strip, tile, view, packed);
    }
  }

  // Transposes the outputs into the row state.
  void finish(const ItemRows& rows) {
    const int columns = tiles_of(args_.head_dim) * kTileRows;
    for (int first = 0; first < rows.count; first += kTileRows) {
      const float* from = scratch_.output[first / kStrip] + first % kStrip;
      transpose_columns(from, columns, state().output + first * kScratchStride<float>, kScratchStride<float>);
    }
  }

 private:
  static int64_t query_words(const ModularAttentionArgs& args) {
    return static_cast<int64_t>(kBlockRows / kTileRows) * steps_of(args.head_dim) * kInput * kTileWords;
  }
  static int64_t packed_value_offset(const ModularAttentionArgs& args, const KeyTile& tile) {
    return static_cast<int64_t>(steps_of(tile.length)) * 2 * steps_of(args.head_dim) * kInput * kTileWords;
  }

  void attend_strip(int first, int query_tiles, const StripView& strip, const KeyTile& tile, int view,
                    const Word* packed) {
    const int depth = steps_of(args_.head_dim);
    const Word* queries = queries_ + view * query_words(args_) + first / kTileRows * depth * kInput * kTileWords;
    const int64_t row_step = static_cast<int64_t>(depth) * kInput * kTileWords;
    const Vector<float> scale = splat(static_cast<float>(softmax_scale_log2(args_)));
    Vector<float> row_max_before[2], bias[2], shift[2], tile_max[2], mass[2] = {},
                                                                     rescale[2] = {splat(1.0f), splat(1.0f)};
#pragma GCC unroll 2
    for (int q = 0; q < 2; ++q) {
      row_max_before[q] = load(state().row_max + first + q * kTileRows);
      bias[q] = load(scratch_.bias + first + q * kTileRows);
      shift[q] = bias[q] - row_max_before[q];
      tile_max[q] = splat(kLowest<float>);
    }

    // Scores of 32 keys at a time. As long as none exceeds the running maximum by more than 2^kSlack, the maximum
    // stays, and the probabilities of 32 keys are computed in between the tile instructions of the next product. Else
    // all scores of the tile come first.
    const int steps = steps_of(strip.limit);
    const auto row_of_step = [&](int step) {
      return [&, step](int r) { exponentiate_row<false>(step, r, strip, scale, shift, mass); };
    };
    const auto interleaves = [&](int step) { return query_tiles == 2 && (step + 1) * kTileDepth <= strip.full; };
    bool keep = true;
    for (int s = 0; s < steps; ++s) {
      float* scores = scratch_.scores + s * kTileDepth * kStrip;
      const Word* keys = packed + 2 * s * row_step;
      if (s > 0 && keep && interleaves(s - 1)) {
        const auto row = row_of_step(s - 1);
        multiply_tiles<kInput, kInput, 2, 2>(depth, keys, row_step, queries, row_step, scores, kStrip,
                                             Slices(depth * num_groups(kInput, kInput), row));
      } else {
        if (s > 0 && keep) exponentiate(s - 1, strip, scale, shift, mass);
        multiply_tiles<kInput, kInput>(2, query_tiles, depth, keys, row_step, queries, row_step, scores, kStrip);
      }
      update_tile_max(s, strip, tile_max);
      keep = keep && !any(exceeds(tile_max[0] * scale + shift[0])) && !any(exceeds(tile_max[1] * scale + shift[1]));
    }
    const bool interleaves_last = keep && steps > 1 && interleaves(steps - 1);
    if (!keep) {
      Vector<float> reference[2];
#pragma GCC unroll 2
      for (int q = 0; q < 2; ++q) {
        // Each query for itself: no row may depend, not even in its rounding, on what others in the strip see.
        const Bits<float> moves = exceeds(tile_max[q] * scale + shift[q]);
        const Vector<float> top = maximum(row_max_before[q], tile_max[q] * scale + bias[q]);
        const Vector<float> now = choose<float>(moves, top, row_max_before[q]);
        rescale[q] = exp2_nonpositive(row_max_before[q] - now);
        // What the rounding of `now` and of the shift leaves of the largest score. It is large where they are: scores
        // are therefore taken relative to the largest, and what is left is bounded.
        const Vector<float> left = tile_max[q] * scale + (bias[q] - now);
        reference[q] = choose<float>(moves, tile_max[q], Vector<float>{});
        shift[q] = choose<float>(moves, within_slack<float>(left), shift[q]);
        mass[q] = Vector<float>{};
        store(state().row_max + first + q * kTileRows, now);
        for (int m = 0; m < args_.num_modalities; ++m) {
          float* total = state().mass[m] + first + q * kTileRows;
          store(total, load(total) * rescale[q]);
        }
      }
      for (int s = 0; s < steps; ++s) exponentiate(s, strip, scale, shift, mass, reference);
    } else if (!interleaves_last) {
      exponentiate(steps - 1, strip, scale, shift, mass);
    }

    const Word* values = packed + packed_value_offset(args_, tile);
    const int64_t value_step = static_cast<int64_t>(steps_of(tile.length)) * kInput * kTileWords;
    float* output = scratch_.output[first / kStrip];
    const int tiles = tiles_of(args_.head_dim);
    for (int d = 0; d < tiles; d += 2) {
      const int count = tiles - d < 2 ? tiles - d : 2;
      if (d == 0 && interleaves_last) {
        // The last step is read after the groups of the small terms of all others.
        const auto row = row_of_step(steps - 1);
        const Slices slices((steps - 1) * (num_groups(kInput, kInner) - 1), row);
        multiply_tiles<kInput, kInner>(count, steps, values, value_step, scratch_.probability, kProbabilityStep,
                                       scratch_.product, kStrip, slices);
      } else {
        multiply_tiles<kInput, kInner>(count, query_tiles, steps, values + d * value_step, value_step,
                                       scratch_.probability, kProbabilityStep, scratch_.product, kStrip);
      }
      for (int r = 0; r < count * kTileRows; ++r) {
        float* out = output + (d * kTileRows + r) * kStrip;
#pragma GCC unroll 2
        for (int q = 0; q < 2; ++q)
          store(out + q * kTileRows,
                load(out + q * kTileRows) * rescale[q] + load(scratch_.product + r * kStrip + q * kTileRows));
      }
    }
#pragma GCC unroll 2
    for (int q = 0; q < 2; ++q) {
      float* total = state().mass[tile.modality] + first + q * kTileRows;
      store(total, load(total) + mass[q]);
    }
  }

  // tile_max <- the largest of it and of the visible scores of 32 keys.
  MODA_EXT_INLINE void update_tile_max(int step, const StripView& strip, Vector<float>* tile_max) const {
    const float* scores = scratch_.scores + step * kTileDepth * kStrip;
    if ((step + 1) * kTileDepth <= strip.full) {
#pragma GCC unroll 4
      for (int j = 0; j < kTileDepth; ++j) {
        tile_max[0] = maximum(tile_max[0], load(scores + j * kStrip));
        tile_max[1] = maximum(tile_max[1], load(scores + j * kStrip + kTileRows));
      }
      return;
    }
    for (int j = 0; j < kTileDepth; ++j) {
#pragma GCC unroll 2
      for (int q = 0; q < 2; ++q)
        tile_max[q] =
            maximum(tile_max[q], choose<float>(sees(strip.visible + q * kTileRows, step * kTileDepth + j),
                                               load(scores + j * kStrip + q * kTileRows), splat(kLowest<float>)));
    }
  }

  // Probabilities of keys r and r + 16 of a step, from scores (relative to `reference`, if there is one) to a row of
  // the pair tiles.
  template <bool masked>
  MODA_EXT_INLINE void exponentiate_row(int step, int r, const StripView& strip, Vector<float> scale,
                                        const Vector<float>* shift, Vector<float>* mass,
                                        const Vector<float>* reference = nullptr) {
    const float* scores = scratch_.scores + step * kTileDepth * kStrip;
    Word* out = scratch_.probability + step * kInner * kTileWords;
#pragma GCC unroll 2
    for (int q = 0; q < 2; ++q) {
      const auto probability = [&](int key) {
        const Vector<float> score = load(scores + key * kStrip + q * kTileRows);
        return exp2_nonpositive((reference == nullptr ? score : score - reference[q]) * scale + shift[q]);
      };
      Vector<float> low = probability(r), high = probability(r + kTileRows);
      if (masked) {
        const int key = step * kTileDepth + r;
        low = keep_where(sees(strip.visible + q * kTileRows, key), low);
        high = keep_where(sees(strip.visible + q * kTileRows, key + kTileRows), high);
      }
      mass[q] += low + high;
      Words first[kInner], second[kInner];
      split<kInner>(low, first);
      split<kInner>(high, second);
#pragma GCC unroll 3
      for (int p = 0; p < kInner; ++p)
        store_words(out + q * kProbabilityStep + p * kTileWords + r * kTileRows, join(first[p], second[p]));
    }
  }

  MODA_EXT_INLINE void exponentiate(int step, const StripView& strip, Vector<float> scale, const Vector<float>* shift,
                                    Vector<float>* mass, const Vector<float>* reference = nullptr) {
    if ((step + 1) * kTileDepth <= strip.full) {
      for (int r = 0; r < kTileRows; ++r) exponentiate_row<false>(step, r, strip, scale, shift, mass, reference);
    } else {
      for (int r = 0; r < kTileRows; ++r) exponentiate_row<true>(step, r, strip, scale, shift, mass, reference);
    }
  }

  // Lanes whose largest score, relative to the running maximum, no longer fits.
  static Bits<float> exceeds(Vector<float> v) { return v > splat(kSlack); }

  static constexpr int64_t kProbabilityStep = int64_t{kTileKeys / kTileDepth} * kInner * kTileWords;

  const ModularAttentionForwardArgs& args_;
  Scratch& scratch_;
  Word* queries_;
  Word* own_tile_;
  AmxTileConfig unit_;
};

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
