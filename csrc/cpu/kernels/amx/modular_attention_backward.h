// Backward pass with AMX (equations in modular_attention_backward.h, operands in amx.h).
//
// As in the forward pass everything is transposed, keys down the rows and queries across:
//
//   S^T = K Q^T    dP^T = V dO^T    P^T, dS^T    dV += P^T dO    dK += dS^T Q    dQ^T += K^T dS^T
//
// One sweep over 32 keys x 32 queries turns S^T and dP^T into row tiles of P^T and dS^T (first operands of dV and dK)
// and pair tiles of dS^T (second operand of dQ^T); sums over keys for the bias gradient are vertical additions.
//
// The outer loop is over blocks of query rows, so that each block is brought into its tile forms once; the forms of
// keys and values (K and V in row tiles, K in transposed pair tiles) are packed once for a kv head and shared by all
// items of the head, that is by all query heads of the group and all threads. Key gradients are added up in float32 in
// memory of the item (`partial`): 16 bytes of traffic an element for each row block and key tile, against 10 kBlockRows
// products.
#pragma once

#include "cpu/kernels/amx/modular_attention_forward.h"
#include "cpu/kernels/vector/modular_attention_backward.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

template <class StorageType>
class AmxBackward {
 public:
  using Storage = StorageType;
  static constexpr int kTileKeys = 128;
  static constexpr int kBlockRows =
      128;  // fewer than forward: the block's forms, P and dS share the second-level cache
  static constexpr int kStrips = kBlockRows / kStrip;
  static constexpr int kInput = kInputParts<Storage>;
  static constexpr int kInner = kInnerParts<Storage>;

  struct Scratch {
    float scores[2][kStrip * kStrip];       // S^T of 32 keys; two, as one is swept while the next comes
    float grad_scores[2][kStrip * kStrip];  // dP^T
    float product[kStrip * kStrip];
    Word probability[kTileKeys / kTileRows * kStrips * kInner * kTileWords];  // row tiles [key tile][strip][part]
    Word grad_score[kTileKeys / kTileRows * kStrips * kInner * kTileWords];   // the same
    Word grad_score_pairs[2 * kTileKeys / kTileDepth * kInner * kTileWords];  // [query tile][step of keys][part]
    float rows[kTileDepth * kScratchColumns];
    // For each key modality, of the rows of the block: what turns scores into P and dP into dS (RowExponent; D -
    // dmass), whether the modality is hidden, and the sums over keys of P and dS.
    alignas(64) float shift[kMaxModalities][kBlockRows];
    alignas(64) float factor[kMaxModalities][kBlockRows];
    alignas(64) float delta[kMaxModalities][kBlockRows];
    alignas(64) float probability_sums[kMaxModalities][kBlockRows];
    alignas(64) float grad_score_sums[kMaxModalities][kBlockRows];
    bool hidden[kMaxModalities][kBlockRows];
    // followed by the output gradient in two forms, for each view the query in two forms and its gradient, and one tile
    // of transposed keys if those are not packed for all
  };

  static int64_t packed_bytes(const ModularAttentionBackwardArgs& args, int64_t num_panels) {
    return num_panels * panel_words(args) * static_cast<int64_t>(sizeof(Word));
  }
  static int64_t scratch_bytes(const ModularAttentionBackwardArgs& args, int64_t) {
    return static_cast<int64_t>(sizeof(Scratch) + sizeof(Word) * (form_words(args) + args.num_views * view_words(args) +
                                                                  transposed_key_words(args)));
  }

  static void pack_tile(const ModularAttentionBackwardArgs& args, const Sequence& sequence, int64_t kv_head,
                        int64_t index, void* memory) {
    const KeyTile& tile = sequence.tiles[index];
    const PackedTile packed(args, tile, memory);
    alignas(64) float rows[kTileDepth * kScratchColumns];
    for (int s = 0; s < packed.steps; ++s) {
      load_keys<Storage>(args.key, args, sequence, kv_head, tile, s * kTileDepth, rows);
      make_row_tiles<kInput, false>(rows, 2, packed.depth, packed.keys + 2 * s * packed.row_step);
      if (args.packs_transposed_keys)
        make_pair_tiles<kInput, true>(rows, tiles_of(args.head_dim),
                                      packed.transposed_keys + static_cast<int64_t>(s) * kInput * kTileWords,
                                      packed.column_step);
      load_keys<Storage>(args.value, args, sequence, kv_head, tile, s * kTileDepth, rows);
      make_row_tiles<kInput, false>(rows, 2, packed.depth, packed.values + 2 * s * packed.row_step);
    }
  }

  static void run(const ModularAttentionBackwardArgs& args, const ModularAttentionBackwardItem& item, void* memory) {
    AmxBackward(args, item, memory).run();
  }

 private:
  // The three forms of a tile's keys and values.
  struct PackedTile {
    int steps, depth;               // of 32 keys, of 32 columns
    int64_t row_step, column_step;  // from one row tile to the next, from one tile of columns of K^T to the next
    Word *keys, *values, *transposed_keys;

    PackedTile(const ModularAttentionBackwardArgs& args, const KeyTile& tile, const void* memory)
        : steps(steps_of(tile.length)),
          depth(steps_of(args.head_dim)),
          row_step(static_cast<int64_t>(depth) * kInput * kTileWords),
          column_step(static_cast<int64_t>(steps) * kInput * kTileWords) {
      keys = static_cast<Word*>(const_cast<void*>(memory)) + tile.panel * panel_words(args);
      values = keys + 2 * steps * row_step;
      transposed_keys = values + 2 * steps * row_step;
    }
  };

  // Rows of a block as both second operands: transposed row tiles [query tile][step of columns][part], for products
  // over columns, and pair tiles [tile of columns][strip][part], for products over rows.
  struct Form {
    Word *rows, *pairs;
  };
  static int64_t panel_words(const ModularAttentionBackwardArgs& args) {
    const int columns = args.packs_transposed_keys ? tiles_of(args.head_dim) : 0;
    return static_cast<int64_t>(4 * steps_of(args.head_dim) + columns) * kInput * kTileWords;
  }
  static int64_t row_form_words(const ModularAttentionArgs& args) {
    return static_cast<int64_t>(2 * kStrips) * steps_of(args.head_dim) * kInput * kTileWords;
  }
  static int64_t form_words(const ModularAttentionArgs& args) {
    return row_form_words(args) + static_cast<int64_t>(kStrips) * tiles_of(args.head_dim) * kInput * kTileWords;
  }
  static int64_t query_grad_words(const ModularAttentionArgs& args) {
    return static_cast<int64_t>(kBlockRows) * tiles_of(args.head_dim) * kTileRows;
  }
  static int64_t transposed_key_words(const ModularAttentionBackwardArgs& args) {
    if (args.packs_transposed_keys) return 0;
    return static_cast<int64_t>(kTileKeys / kTileDepth) * tiles_of(args.head_dim) * kInput * kTileWords;
  }
  static int64_t view_words(const ModularAttentionArgs& args) { return form_words(args) + query_grad_words(args); }

  AmxBackward(const ModularAttentionBackwardArgs& args, const ModularAttentionBackwardItem& item, void* memory)
      : args_(args),
        item_(item),
        sequence_(*item.sequence),
        scratch_(*static_cast<Scratch*>(memory)),
        forms_(reinterpret_cast<Word*>(&scratch_ + 1)),
        grad_key_(static_cast<float*>(item.partial)),
        grad_value_(grad_key_ + static_cast<int64_t>(sequence_.num_slots) * args.head_dim),
        columns_(tiles_of(args.head_dim)),
        depth_(steps_of(args.head_dim)) {}

  Form grad_out_form() const { return {forms_, forms_ + row_form_words(args_)}; }
  Form query_form(int view) const {
    Word* at = forms_ + form_words(args_) + view * view_words(args_);
    return {at, at + row_form_words(args_)};
  }
  Word* own_transposed_keys() const { return forms_ + form_words(args_) + args_.num_views * view_words(args_); }
  // dQ^T of a view: [strip][column][query of the strip].
  float* query_grad(int view) const {
    return reinterpret_cast<float*>(forms_ + form_words(args_) + view * view_words(args_) + form_words(args_));
  }

  void run() {
    memset(grad_key_, 0, sizeof(float) * 2 * static_cast<size_t>(sequence_.num_slots) * args_.head_dim);
    const int64_t blocks_per_head = (sequence_.num_queries + kBlockRows - 1) / kBlockRows;
    for (int64_t index = item_.first_block; index < item_.last_block; ++index) {
      head_ = item_.kv_head * args_.group + index / blocks_per_head;
      first_row_ = index % blocks_per_head * kBlockRows;
      const int64_t left = sequence_.num_queries - first_row_;
      count_ = static_cast<int>(left < kBlockRows ? left : kBlockRows);
      strips_ = (count_ + kStrip - 1) / kStrip;
      differentiate_block();
    }
  }

  template <class Element, class Operand>
  auto at(const Operand& operand, int i) const {
    return row_of<Element>(operand, sequence_.batch, head_, sequence_.first_query + first_row_ + i);
  }

  void differentiate_block() {
    float* rows = scratch_.rows;
    for (int i = 0; i < count_; ++i) {
      load_row(at<Storage>(args_.saved_out, i), 1.0f, rows, args_.head_dim);
      load_row(at<Storage>(args_.grad_out, i), 1.0f, rows + kScratchColumns, args_.head_dim);
      prepare_row(args_, sequence_, head_, first_row_ + i, rows, rows + kScratchColumns);
    }
    make_form(args_.grad_out, 0, 1.0f, grad_out_form());

    const int64_t offset = args_.causal ? sequence_.num_keys - sequence_.num_queries : sequence_.num_keys;
    const int64_t last_position = args_.causal ? first_row_ + count_ - 1 + offset : offset;
    uint32_t loaded_views = 0, loaded_modalities = 0;
    for (int64_t t = 0; t < sequence_.num_tiles; ++t) {
      const KeyTile& tile = sequence_.tiles[t];
      if (visible_keys(sequence_.order, tile, last_position) == 0) continue;
      const int view = args_.num_views > 1 ? tile.modality : 0;
      if ((loaded_views >> view & 1) == 0) {
        loaded_views |= 1u << view;
        make_form(args_.query, args_.query.view * view, score_sign(args_), query_form(view));
        memset(query_grad(view), 0, sizeof(float) * query_grad_words(args_));
      }
      if ((loaded_modalities >> tile.modality & 1) == 0) {
        loaded_modalities |= 1u << tile.modality;
        load_modality(tile.modality);
      }
      differentiate_tile(tile, view, offset);
    }

    if (args_.grad_bias.data != nullptr) {
      for (int i = 0; i < count_; ++i) {
        for (int m = 0; m < args_.num_modalities; ++m) {
          if ((loaded_modalities >> m & 1) == 0) continue;
          at<float>(args_.probability_sums, i)[m] = scratch_.probability_sums[m][i];
          at<float>(args_.grad_bias, i)[m] = scratch_.grad_score_sums[m][i];
        }
        finish_bias_gradient<float>(args_, sequence_, head_, first_row_ + i);
      }
    }
    if (args_.grad_query.data == nullptr) return;
    for (int view = 0; view < args_.num_views; ++view) {
      for (int first = 0; first < count_; first += kTileRows) {
        if ((loaded_views >> view & 1) != 0) {
          transpose_columns(query_grad(view) + first / kStrip * columns_ * kTileRows * kStrip + first % kStrip,
                            columns_ * kTileRows, rows, kScratchColumns);
        } else {
          memset(rows, 0, sizeof(float) * kTileRows * kScratchColumns);
        }
        for (int i = first; i < count_ && i < first + kTileRows; ++i)
          store_row(rows + (i - first) * kScratchColumns, static_cast<float>(args_.scale),
                    at<Storage>(args_.grad_query, i) + args_.grad_query.view * view, args_.head_dim);
      }
    }
  }

  void make_form(const Input& operand, int64_t view_offset, float factor, const Form& form) {
    for (int strip = 0; strip < strips_; ++strip) {
      const int first = strip * kStrip;
      clear_rows(scratch_.rows, kStrip, args_.head_dim, count_ - first);
      for (int i = first; i < count_ && i < first + kStrip; ++i)
        load_row(at<Storage>(operand, i) + view_offset, factor, scratch_.rows + (i - first) * kScratchColumns,
                 args_.head_dim);
      make_row_tiles<kInput, true>(scratch_.rows, 2, depth_,
                                   form.rows + static_cast<int64_t>(2 * strip) * depth_ * kInput * kTileWords);
      make_pair_tiles<kInput, false>(scratch_.rows, columns_, form.pairs + strip * kInput * kTileWords,
                                     kStrips * kInput * kTileWords);
    }
  }

  void load_modality(int modality) {
    for (int i = 0; i < kBlockRows; ++i) {
      float bias = -INFINITY, delta = 0;
      RowExponent<float> exponent(0);
      if (i < count_) {
        bias = args_.bias.data != nullptr ? at<float>(args_.bias, i)[args_.bias.last * modality] : 0;
        exponent = RowExponent<float>(natural_exponent(args_, sequence_, head_, first_row_ + i, bias));
        delta = *at<float>(args_.delta, i);
        if (args_.grad_mass.data != nullptr) delta -= at<float>(args_.grad_mass, i)[args_.grad_mass.last * modality];
      }
      scratch_.hidden[modality][i] = bias == -INFINITY;
      scratch_.shift[modality][i] = exponent.shift;
      scratch_.factor[modality][i] = exponent.factor;
      scratch_.delta[modality][i] = delta;
      scratch_.probability_sums[modality][i] = 0;
      scratch_.grad_score_sums[modality][i] = 0;
    }
  }

  // All strips of the block against one key tile.
  void differentiate_tile(const KeyTile& tile, int view, int64_t offset) {
    PackedTile packed(args_, tile, item_.packed);
    if (!args_.packs_transposed_keys && args_.grad_query.data != nullptr) {
      packed.transposed_keys = own_transposed_keys();
      for (int s = 0; s < packed.steps; ++s) {
        load_keys<Storage>(args_.key, args_, sequence_, item_.kv_head, tile, s * kTileDepth, scratch_.rows);
        make_pair_tiles<kInput, true>(scratch_.rows, columns_,
                                      packed.transposed_keys + static_cast<int64_t>(s) * kInput * kTileWords,
                                      packed.column_step);
      }
    }
    const Form grad_out = grad_out_form(), query = query_form(view);
    int first_strip[kTileKeys / kTileDepth];  // that sees 32 keys; later ones are zero where they do not
    for (int s = 0; s < packed.steps; ++s) first_strip[s] = strips_;

    for (int strip = 0; strip < strips_; ++strip) {
      const int first = strip * kStrip;
      const StripView seen = view_strip(sequence_.order, tile, count_ - first, [&](int i) {
        if (scratch_.hidden[tile.modality][first + i]) return int64_t{-1};
        return args_.causal ? first_row_ + first + i + offset : offset;
      });
      const int query_tiles = count_ - first > kTileRows ? 2 : 1, steps = steps_of(seen.limit);
      const int64_t strip_words = static_cast<int64_t>(2 * strip) * packed.row_step;
      SweepState state(scratch_, tile.modality, first);
      const auto row_of_step = [&](int step) {
        return [&, step](int r) { sweep_row<false>(step, r, strip, seen, state); };
      };
      const auto interleaves = [&](int step) { return query_tiles == 2 && (step + 1) * kTileDepth <= seen.full; };
      // The rows of one step are swept in between the tile instructions of the next two products.
      for (int s = 0; s < packed.steps; ++s) {
        if (s >= steps) {
          if (first_strip[s] < strip) clear_strip(s, strip);
          continue;
        }
        if (first_strip[s] == strips_) first_strip[s] = strip;
        const Word* keys = packed.keys + 2 * s * packed.row_step;
        const Word* values = packed.values + 2 * s * packed.row_step;
        const Word* queries = query.rows + strip_words;
        const Word* grads = grad_out.rows + strip_words;
        if (s > 0 && interleaves(s - 1)) {
          const auto row = row_of_step(s - 1);
          Slices slices(2 * depth_ * num_groups(kInput, kInput), row);
          const auto between = [&] { slices(); };
          multiply_tiles<kInput, kInput, 2, 2>(depth_, keys, packed.row_step, queries, packed.row_step,
                                               scratch_.scores[s % 2], kStrip, between);
          multiply_tiles<kInput, kInput, 2, 2>(depth_, values, packed.row_step, grads, packed.row_step,
                                               scratch_.grad_scores[s % 2], kStrip, between);
        } else {
          if (s > 0) sweep(s - 1, strip, seen, state);
          multiply_tiles<kInput, kInput>(2, query_tiles, depth_, keys, packed.row_step, queries, packed.row_step,
                                         scratch_.scores[s % 2], kStrip);
          multiply_tiles<kInput, kInput>(2, query_tiles, depth_, values, packed.row_step, grads, packed.row_step,
                                         scratch_.grad_scores[s % 2], kStrip);
        }
      }
      if (steps == 0) continue;
      bool swept = args_.grad_query.data == nullptr || steps == 1 || !interleaves(steps - 1);
      if (swept) sweep(steps - 1, strip, seen, state);
      float* grad = query_grad(view) + static_cast<int64_t>(strip) * columns_ * kTileRows * kStrip;
      for (int d = 0; d < columns_ && args_.grad_query.data != nullptr; d += 2) {
        const int count = columns_ - d < 2 ? 1 : 2;
        const Word* keys = packed.transposed_keys + d * packed.column_step;
        if (!swept) {
          // The last step is read after the groups of the small terms of all others.
          swept = true;
          const auto row = row_of_step(steps - 1);
          const Slices slices((steps - 1) * (num_groups(kInput, kInner) - 1), row);
          multiply_tiles<kInput, kInner>(count, steps, keys, packed.column_step, scratch_.grad_score_pairs, kPairStep,
                                         scratch_.product, kStrip, slices);
        } else {
          multiply_tiles<kInput, kInner>(count, query_tiles, steps, keys, packed.column_step, scratch_.grad_score_pairs,
                                         kPairStep, scratch_.product, kStrip);
        }
        float* out = grad + d * kTileRows * kStrip;
        for (int i = 0; i < count * kTileRows * kStrip; i += kTileRows)
          store(out + i, load(out + i) + load(scratch_.product + i));
      }
      state.save(scratch_, tile.modality, first);
    }

    for (int s = 0; s < packed.steps; ++s) {
      const int strip = first_strip[s];
      if (strip == strips_) continue;
      const int keys = tile.length - s * kTileDepth < kTileDepth ? tile.length - s * kTileDepth : kTileDepth;
      const int64_t slot = tile.start + s * kTileDepth;
      if (args_.grad_value.data != nullptr)
        add_key_gradient(scratch_.probability, grad_out.pairs, s, strip, keys, 1.0f,
                         grad_value_ + slot * args_.head_dim);
      if (args_.grad_key.data != nullptr)
        add_key_gradient(scratch_.grad_score, query.pairs, s, strip, keys, static_cast<float>(fabs(args_.scale)),
                         grad_key_ + slot * args_.head_dim);
    }
  }

  // 32 rows of a key gradient: += factor * row tiles (strips from `strip` on) * pair tiles.
  void add_key_gradient(const Word* row_tiles, const Word* pairs, int step, int strip, int keys, float factor,
                        float* grad) {
    const int key_tiles = keys > kTileRows ? 2 : 1;
    const Word* a = row_tiles + 2 * step * kRowTileStep + strip * kInner * kTileWords;
    for (int d = 0; d < columns_; d += 2) {
      const int column_tiles = columns_ - d < 2 ? 1 : 2;
      multiply_tiles<kInner, kInput>(key_tiles, column_tiles, strips_ - strip, a, kRowTileStep,
                                     pairs + (static_cast<int64_t>(d) * kStrips + strip) * kInput * kTileWords,
                                     kStrips * kInput * kTileWords, scratch_.product, kStrip);
      const int width = args_.head_dim - d * kTileRows < kStrip ? args_.head_dim - d * kTileRows : kStrip;
      for (int j = 0; j < keys; ++j) {
        float* out = grad + j * args_.head_dim + d * kTileRows;
        const float* product = scratch_.product + j * kStrip;
        int i = 0;
        for (; i + kTileRows <= width; i += kTileRows)
          store(out + i, load(out + i) + load(product + i) * splat(factor));
        for (; i < width; ++i) out[i] += product[i] * factor;
      }
    }
  }

  void clear_strip(int step, int strip) {
    for (int tile = 2 * step; tile < 2 * step + 2; ++tile) {
      memset(scratch_.probability + tile * kRowTileStep + strip * kInner * kTileWords, 0,
             sizeof(Word) * kInner * kTileWords);
      memset(scratch_.grad_score + tile * kRowTileStep + strip * kInner * kTileWords, 0,
             sizeof(Word) * kInner * kTileWords);
    }
  }

  // Row constants and running sums of a strip.
  struct SweepState {
    Vector<float> shift[2], factor[2], delta[2], probability[2], grad_score[2];

    SweepState(const Scratch& scratch, int modality, int first) {
      for (int q = 0; q < 2; ++q) {
        const int at = first + q * kTileRows;
        shift[q] = load(scratch.shift[modality] + at);
        factor[q] = load(scratch.factor[modality] + at);
        delta[q] = load(scratch.delta[modality] + at);
        probability[q] = load(scratch.probability_sums[modality] + at);
        grad_score[q] = load(scratch.grad_score_sums[modality] + at);
      }
    }
    void save(Scratch& scratch, int modality, int first) const {
      for (int q = 0; q < 2; ++q) {
        store(scratch.probability_sums[modality] + first + q * kTileRows, probability[q]);
        store(scratch.grad_score_sums[modality] + first + q * kTileRows, grad_score[q]);
      }
    }
  };

  // P and dS of keys r and r + 16 of a step and a strip, from scores to rows of tiles.
  template <bool masked>
  MODA_EXT_INLINE void sweep_row(int step, int r, int strip, const StripView& seen, SweepState& state) {
    const Vector<float> scale = splat(static_cast<float>(softmax_scale_log2(args_)));
    Word* const probability_tiles = scratch_.probability + 2 * step * kRowTileStep + strip * kInner * kTileWords;
    Word* const grad_tiles = scratch_.grad_score + 2 * step * kRowTileStep + strip * kInner * kTileWords;
    Word* const grad_pairs = scratch_.grad_score_pairs + step * kInner * kTileWords;
    Words p[2][2][kInner], ds[2][2][kInner];  // [key r, key r + 16][query tile][part]
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 2
      for (int q = 0; q < 2; ++q) {
        const int from = (r + half * kTileRows) * kStrip + q * kTileRows;
        const Vector<float> exponent = load(scratch_.scores[step % 2] + from) * scale + state.shift[q];
        Vector<float> probability = exp2_nonpositive(nonpositive_exponent<float>(exponent)) * state.factor[q];
        Vector<float> grad = probability * (load(scratch_.grad_scores[step % 2] + from) - state.delta[q]);
        if (masked) {
          const Bits<float> mask = sees(seen.visible + q * kTileRows, step * kTileDepth + r + half * kTileRows);
          probability = keep_where(mask, probability);
          grad = keep_where(mask, grad);
        }
        state.probability[q] += probability;
        state.grad_score[q] += grad;
        split<kInner>(probability, p[half][q]);
        split<kInner>(grad, ds[half][q]);
      }
    }
#pragma GCC unroll 3
    for (int i = 0; i < kInner; ++i) {
      const int to = i * kTileWords + r * kTileRows;
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        store_words(probability_tiles + half * kRowTileStep + to, join(p[half][0][i], p[half][1][i]));
        store_words(grad_tiles + half * kRowTileStep + to, join(ds[half][0][i], ds[half][1][i]));
      }
#pragma GCC unroll 2
      for (int q = 0; q < 2; ++q) store_words(grad_pairs + q * kPairStep + to, join(ds[0][q][i], ds[1][q][i]));
    }
  }

  void sweep(int step, int strip, const StripView& seen, SweepState& state) {
    if ((step + 1) * kTileDepth <= seen.full) {
      for (int r = 0; r < kTileRows; ++r) sweep_row<false>(step, r, strip, seen, state);
    } else {
      for (int r = 0; r < kTileRows; ++r) sweep_row<true>(step, r, strip, seen, state);
    }
  }

  static constexpr int64_t kRowTileStep = int64_t{kStrips} * kInner * kTileWords;
  static constexpr int64_t kPairStep = int64_t{kTileKeys / kTileDepth} * kInner * kTileWords;

  const ModularAttentionBackwardArgs& args_;
  const ModularAttentionBackwardItem& item_;
  const Sequence& sequence_;
  Scratch& scratch_;
  Word* forms_;
  float *grad_key_, *grad_value_;
  const int columns_, depth_;  // tiles of 16 and steps of 32 columns
  int64_t head_ = 0, first_row_ = 0;
  int count_ = 0, strips_ = 0;
  AmxTileConfig unit_;
};

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
