// Forward pass of modular attention (docs/mathematics.md sections 2 and 3) for compute capability 8.0 and later.
//
//   S = tau q^(a_j) . k_j + b_{i, a_j}    p = exp(S - L)    o = sum_j p v_j
//   L = log(sum_j exp(S) + exp(c))        mass_m = sum_{a_j = m} p
//
// Tiling: a block of kWarps warps owns kBlockM query rows, 16 kRowFragments for each warp, and meets one key tile after
// the other. Keys and values have one buffer each: values arrive while scores are computed, the next keys while values
// are multiplied. Scores and probabilities stay in registers. Rows of several query heads that share a kv head are
// packed into one block where that saves blocks (decoding), and few rows are split over the keys (see plan_forward).
//
// One tile is met in one or more *passes*. A pass has one modality, so its bias is one number for each row, folded into
// the exponent: 2^(s scale + (bias - maximum)), the same multiply-adds as without it. A tile of several modalities is
// one pass with the bias looked up for every column, or, with query views, one pass for each.
//
// The mass costs nothing in the inner loop: the sum of p that a softmax needs anyway is folded into the masses when the
// modality changes, and the denominator is the sum of the masses and the sink, whose logarithm seeds the maximum.
//
// A number common to a row changes nothing in a softmax, yet beside a large one its scores would be rounded away. So
// biases and sink are taken relative to the row's *base*, the largest of them that has a part in the row: of the sink,
// and of the biases of modalities of which the row sees a key. (A larger one that the row does not meet would leave
// only differences as large as it.) Blocks that share a row agree on it, whichever tiles they have.
//
// Memory traffic for each block: its queries and outputs once, the keys and values it sees once.
#pragma once

#include "cuda/sm80/key_tiles.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {

// Rows and keys of a tile by the length of a row in bytes. Shared memory stays below 99 KB, what compute capability 8.6
// and 8.9 have; registers hold 4 kRowFragments (kBlockN + head size) / 8 sums. Two row fragments for each warp halve
// the traffic from shared memory, which otherwise equals what it can deliver.
template <int kRowBytes>
struct ForwardTile;
template <int kWarps_, int kRowFragments_, int kBlockN_>
struct ForwardTileOf {
  static constexpr int kWarps = kWarps_, kRowFragments = kRowFragments_, kBlockN = kBlockN_;
};
template <>
struct ForwardTile<64> : ForwardTileOf<4, 2, 64> {};  // 16-bit: 32
template <>
struct ForwardTile<128> : ForwardTileOf<4, 2, 64> {};  // 64; float32: 32
template <>
struct ForwardTile<192> : ForwardTileOf<4, 2, 48> {};  // 96
template <>
struct ForwardTile<256> : ForwardTileOf<4, 2, 32> {};  // 128; float32: 64. With 64 keys registers spill
template <>
struct ForwardTile<384> : ForwardTileOf<4, 1, 64> {};  // 192; float32: 96
template <>
struct ForwardTile<512> : ForwardTileOf<4, 1, 32> {};  // 256; float32: 128
template <>
struct ForwardTile<768> : ForwardTileOf<4, 1, 16> {};  // float32: 192
template <>
struct ForwardTile<1024> : ForwardTileOf<3, 1, 16> {};  // float32: 256

struct ForwardParams {
  ModularAttentionForwardArgs args;
  const uint32_t* tiles;  // words of DescribeTiles
  int tiles_per_sequence;
  int pack_gqa;              // query heads whose rows share a block: row r is query r / pack_gqa, head r % pack_gqa
  int row_blocks;            // for each head, or group of packed heads
  int splits;                // over the keys; 1 writes the results
  int64_t rows;              // of all query heads and sequences
  float softmax_scale_log2;  // |tau| log2(e), above 0
  bool negate;               // tau < 0
  // With splits, for each split and row: the unnormalised output, its row maximum and the masses, all relative to
  // 2^maximum.
  float* partial_out;      // (splits, rows, head_dim)
  float* partial_row_max;  // (splits, rows)
  float* partial_mass;     // (splits, rows, modalities)
  float* base;             // (rows), with splits
};

// Bound of the largest exponent of a tile, which is 0 or below but for rounding.
constexpr float kSlack = 8;
MODA_EXT_DEVICE float at_most(float limit, float x) { return x > limit ? limit : x; }  // keeps NaN

// Writes lse = base + log_sum, and what rounding takes from it (Knuth's two-sum): beside a large base, all there is to
// know of the sum.
MODA_EXT_DEVICE void write_lse(const ModularAttentionForwardArgs& args, const Sequence& sequence, int head,
                               int64_t token, float base, float log_sum) {
  const float lse = base + log_sum, rest = lse - base;
  const float residual = (base - (lse - rest)) + (log_sum - rest);
  const bool finite = lse - lse == 0.0f;
  *row_of<float>(args.lse, sequence.batch, head, token) = lse;
  *row_of<float>(args.lse_residual, sequence.batch, head, token) = finite ? residual : 0.0f;
}

template <class Element, int kHeadDim>
class ForwardKernel {
  using Tile = ForwardTile<kHeadDim* static_cast<int>(sizeof(Element))>;
  using Products = Fragments<Element, kHeadDim>;
  static constexpr int kRowFragments = Tile::kRowFragments, kStride = Products::kStride;
  static constexpr int kKeyFragments = Tile::kBlockN / 8, kHeadFragments = kHeadDim / 8;
  static constexpr int kWarpRows = 16 * kRowFragments;

 public:
  static constexpr int kThreads = 32 * Tile::kWarps;
  static constexpr int kBlockM = kWarpRows * Tile::kWarps, kBlockN = Tile::kBlockN;
  using Params = ForwardParams;

  static int64_t blocks(const Params& p) {
    return static_cast<int64_t>(p.args.num_sequences) * (p.args.query_heads / p.pack_gqa) * p.row_blocks * p.splits;
  }
  static size_t shared_bytes(const Params& p) {
    return static_cast<size_t>(kBlockM + 2 * kBlockN) * kStride +
           sizeof(float) * kBlockM * (3 * p.args.num_modalities + 1) + sizeof(uint32_t) * Tile::kWarps;
  }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    ForwardKernel block(p, shared);
    block.run();
  }

 private:
  MODA_EXT_DEVICE ForwardKernel(const Params& params, char* shared)
      : p(params), args(params.args), g(lane_index() / 4), t(lane_index() % 4) {
    locate();
    queries = shared + warp_index() * kWarpRows * kStride;  // of this warp, as are the tables below
    keys = shared + kBlockM * kStride;
    values = keys + kBlockN * kStride;
    float* tables = reinterpret_cast<float*>(values + kBlockN * kStride);
    const int M = args.num_modalities;
    bias_table = tables + warp_index() * M * kWarpRows;
    mass_table = tables + M * kBlockM + warp_index() * M * kWarpRows;
    row_max_table = tables + 2 * M * kBlockM + warp_index() * M * kWarpRows;
    base_table = tables + 3 * M * kBlockM + warp_index() * kWarpRows;
    warp_words = reinterpret_cast<uint32_t*>(tables + (3 * M + 1) * kBlockM);
  }

  // The block's place in the grid. Called again wherever it is needed after the main loop, whose registers are full.
  MODA_EXT_DEVICE void locate() {
    int64_t index = block_index();
    split = static_cast<int>(index % p.splits);
    index /= p.splits;
    int row_block = static_cast<int>(index % p.row_blocks);
    if (args.causal) row_block = p.row_blocks - 1 - row_block;  // the longest first
    index /= p.row_blocks;
    const int head_groups = args.query_heads / p.pack_gqa;
    first_head = static_cast<int>(index % head_groups) * p.pack_gqa;
    kv_head = first_head / (args.query_heads / args.kv_heads);
    sequence = locate_sequence(args, index / head_groups);
    tiles = p.tiles + index / head_groups * p.tiles_per_sequence;
    num_rows = sequence.num_queries * p.pack_gqa;
    block_row = row_block * kBlockM;
    first_row = block_row + warp_index() * kWarpRows;
  }

  MODA_EXT_DEVICE int head_of(int row) const { return first_head + row % p.pack_gqa; }
  MODA_EXT_DEVICE int query_of(int row) const { return row / p.pack_gqa; }

  // The warp's rows of one query view; visible to its lanes after wait_copies and sync_warp.
  MODA_EXT_DEVICE void copy_queries(int view) {
    constexpr int kPerChunk = 16 / static_cast<int>(sizeof(Element));
    constexpr int kChunks = kHeadDim / kPerChunk;
#pragma unroll 1
    for (int i = lane_index(); i < kWarpRows * kChunks; i += 32) {
      const int row = i / kChunks, element = i % kChunks * kPerChunk;
      const bool read = first_row + row < num_rows && element < args.head_dim;
      const int r = read ? first_row + row : 0;
      const Element* source =
          row_of<Element>(args.query, sequence.batch, head_of(r), sequence.first_query + query_of(r)) +
          view * args.query.view;
      copy_async_16(queries + row * kStride + element * static_cast<int>(sizeof(Element)),
                    read ? source + element : source, read);
    }
  }
  MODA_EXT_DEVICE void copy_keys(const Input& operand, char* target, int tile) {
    const Element* first = row_of<Element>(operand, sequence.batch, kv_head, sequence.first_key + tile * kBlockN);
    const bool whole = !(tiles[tile] & kOther);
    copy_rows<Element, kHeadDim, kBlockN, kThreads>(
        target, thread_index(), first, operand.row, args.head_dim,
        [&](int row) { return whole || modality_of(args, sequence, tile * kBlockN + row) >= 0; });
  }

  // Modalities of which the lane's row (the last one, for those beyond the end) sees a key. Collective over the warp.
  MODA_EXT_DEVICE uint32_t modalities_met() const {
    const auto last_visible = [&](int row) {
      return sequence.last_visible(args, query_of(minimum(row, num_rows - 1)));
    };
    const int last = last_visible(first_row + lane_index()), end = last_visible(first_row + kWarpRows - 1) + 1;
    const int whole_tiles = maximum(0, last_visible(first_row) + 1) / kBlockN;  // seen by every row of the warp
    uint32_t met = 0;
    for (int tile = lane_index(); tile < whole_tiles; tile += 32) met |= tiles[tile];
    met = warp_or(met) & kAllModalities;
    for (int key = whole_tiles * kBlockN; key < end; key += 32) {
      const int id = modality_of(args, sequence, key + lane_index());
      for (uint32_t present = warp_or(modality_bit(id)) & kAllModalities; present != 0; present &= present - 1) {
        const int modality = lowest_bit(present);
        const int first = lowest_bit(warp_or(id == modality ? 1u << lane_index() : 0u));
        if (key + first <= last) met |= 1u << modality;
      }
    }
    return met;
  }

  // Fills the tables of bases and biases, relative to the base in log2 units; returns the modalities that have weight
  // in some row of the block.
  MODA_EXT_DEVICE uint32_t prepare_rows() {
    uint32_t seen = 0, met = 0;
    if (args.bias.data != nullptr || args.sink.data != nullptr) met = modalities_met();
    const int row = first_row + lane_index();
    if (lane_index() < kWarpRows) {
      const bool real = row < num_rows;
      const int64_t token = sequence.first_query + query_of(row);
      float base = -infinity();
      if (real && args.sink.data != nullptr) base = *row_of<float>(args.sink, sequence.batch, head_of(row), token);
      for (int m = 0; m < args.num_modalities; ++m) {
        float bias = 0.0f;
        if (real && args.bias.data != nullptr)
          bias = row_of<float>(args.bias, sequence.batch, head_of(row), token)[m * args.bias.last];
        if (met >> m & 1) base = maximum(base, bias);
        bias_table[m * kWarpRows + lane_index()] = bias;
        mass_table[m * kWarpRows + lane_index()] = 0.0f;
        row_max_table[m * kWarpRows + lane_index()] = kLowest;
      }
      if (base == -infinity()) base = 0.0f;
      base_table[lane_index()] = base;
      for (int m = 0; m < args.num_modalities; ++m) {
        float& bias = bias_table[m * kWarpRows + lane_index()];
        bias = (bias - base) * kLog2e;
        if (bias > 0.0f) bias = -infinity();  // above the base is only what the row does not meet, by any distance
        if (real && bias != -infinity()) seen |= 1u << m;
      }
    }
    seen = warp_or(seen);
    if (lane_index() == 0) warp_words[warp_index()] = seen;
    sync_threads();
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) seen |= warp_words[w];

#pragma unroll
    for (int r = 0; r < kRowFragments; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        row_sum[r][h] = 0.0f;
        row_max[r][h] = maximum(kLowest, sink_of(r * 16 + h * 8 + g));
      }
    }
    return seen;
  }
  // Of a row of the warp, relative to its base in log2 units; the merge adds it when keys are split.
  MODA_EXT_DEVICE float sink_of(int own) const {
    const int row = first_row + own;
    if (args.sink.data == nullptr || p.splits > 1 || row >= num_rows) return -infinity();
    const float sink = *row_of<float>(args.sink, sequence.batch, head_of(row), sequence.first_query + query_of(row));
    return (sink - base_table[own]) * kLog2e;
  }

  MODA_EXT_DEVICE int next_tile(int tile, int end, uint32_t seen) const {
    while (tile < end && (tiles[tile] & seen) == 0) ++tile;
    return tile;
  }

  // mass[modality] += sum over the quad, each relative to a maximum of its own. One lane of a quad owns the entry.
  MODA_EXT_DEVICE void fold(int modality, int r, int h, float sum) {
    sum = quad_sum(sum);
    if (t != 0) return;
    const int entry = modality * kWarpRows + r * 16 + h * 8 + g;
    mass_table[entry] = mass_table[entry] * exp2_fast(row_max_table[entry] - row_max[r][h]) + sum;
    row_max_table[entry] = row_max[r][h];
  }
  MODA_EXT_DEVICE void finish_run() {
    if (run_modality < 0) return;
#pragma unroll
    for (int r = 0; r < kRowFragments; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        fold(run_modality, r, h, row_sum[r][h]);
        row_sum[r][h] = 0.0f;
      }
  }

  // Hides what a row does not see; in a mixed pass also scales and adds the bias of every column's modality.
  MODA_EXT_DEVICE void mask(float (&scores)[kRowFragments][kKeyFragments][4], int tile, int modality,
                            const Columns& columns) const {
#pragma unroll
    for (int r = 0; r < kRowFragments; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int own = r * 16 + h * 8 + g;
        // Columns of the tile that the row sees, counted from this thread's first.
        const int limit =
            sequence.last_visible(args, query_of(minimum(first_row + own, num_rows - 1))) - (tile * kBlockN + 2 * t);
#pragma unroll
        for (int n = 0; n < kKeyFragments; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& score = scores[r][n][2 * h + j];
            if (modality == kMixed)
              score = score * p.softmax_scale_log2 + bias_table[columns.id(2 * n + j) * kWarpRows + own];
            if (!columns.takes(2 * n + j) || n * 8 + j > limit) score = -infinity();
          }
        }
      }
    }
  }

  // Scores become probabilities relative to the new maximum; output and sums so far follow it.
  MODA_EXT_DEVICE void softmax(float (&scores)[kRowFragments][kKeyFragments][4], int modality) {
    const float scale = modality == kMixed ? 1.0f : p.softmax_scale_log2;
#pragma unroll
    for (int r = 0; r < kRowFragments; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float bias = modality == kMixed ? 0.0f : bias_table[modality * kWarpRows + r * 16 + h * 8 + g];
        float tile_max = -infinity();
#pragma unroll
        for (int n = 0; n < kKeyFragments; ++n)
          tile_max = maximum(tile_max, maximum(scores[r][n][2 * h], scores[r][n][2 * h + 1]));
        const float before = row_max[r][h];
        tile_max = quad_maximum(tile_max) * scale;
        row_max[r][h] = maximum(before, tile_max + bias);
        const float rescale = exp2_fast(before - row_max[r][h]);
        // A bias so far below the row's base that its rounding counts has no weight in the end; till then it may not
        // overflow.
        const float shift = at_most(kSlack - tile_max, bias - row_max[r][h]);
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeyFragments; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& score = scores[r][n][2 * h + j];
            score = exp2_fast(score * scale + shift);
            sum += score;
          }
        }
        row_sum[r][h] = row_sum[r][h] * rescale + sum;
#pragma unroll
        for (int n = 0; n < kHeadFragments; ++n) {
          out[r][n][2 * h] *= rescale;
          out[r][n][2 * h + 1] *= rescale;
        }
      }
    }
  }

  // After a mixed pass: the sum of each modality that occurs goes to its mass.
  MODA_EXT_DEVICE void fold_columns(const float (&p_)[kRowFragments][kKeyFragments][4], uint32_t present,
                                    const Columns& columns) {
    for (; present != 0; present &= present - 1) {
      const int modality = lowest_bit(present);
#pragma unroll
      for (int r = 0; r < kRowFragments; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float sum = 0.0f;
#pragma unroll
          for (int n = 0; n < kKeyFragments; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j)
              if (columns.id(2 * n + j) == modality) sum += p_[r][n][2 * h + j];
          fold(modality, r, h, sum);
        }
      }
    }
  }

  MODA_EXT_DEVICE void run() {
    if (block_row >= num_rows) return;  // packed sequences differ in length
    const uint32_t seen = prepare_rows();
    set_zero(out);

    const int last_row = minimum(block_row + kBlockM, num_rows) - 1;
    const int visible = maximum(0, sequence.last_visible(args, query_of(last_row)) + 1);
    const int num_tiles = (visible + kBlockN - 1) / kBlockN;
    const int end = static_cast<int>(static_cast<int64_t>(num_tiles) * (split + 1) / p.splits);
    int tile = next_tile(static_cast<int>(static_cast<int64_t>(num_tiles) * split / p.splits), end, seen);

    int view = args.num_views > 1 ? -1 : 0;
    if (view == 0) copy_queries(0);
    if (tile < end) copy_keys(args.key, keys, tile);
    commit_copies();
    while (tile < end) {
      wait_copies<0>();
      sync_threads();  // keys are here, and everyone is done with the values before
      copy_keys(args.value, values, tile);
      commit_copies();
      const uint32_t word = tiles[tile];
      const bool pure = (word & (word - 1)) == 0;
      const int current = tile;
      uint32_t present = word & seen;
      bool last_pass;
      do {
        int modality = lowest_bit(present);
        uint32_t met = 1u << modality;
        if (args.num_views == 1 && present != met) {
          modality = kMixed;
          met = present;
        }
        last_pass = present == met;
        if (args.num_views > 1 && view != modality) {
          view = modality;
          sync_warp();  // every lane has read the view before
          locate();
          copy_queries(view);
          commit_copies();
          wait_copies<0>();
          sync_warp();
        }
        float scores[kRowFragments][kKeyFragments][4];
        set_zero(scores);
        Products::multiply_rows(scores, queries, keys);
        wait_copies<0>();
        sync_threads();  // values are here, and everyone has read the keys
        if (last_pass) {
          tile = next_tile(tile + 1, end, seen);
          if (tile < end) copy_keys(args.key, keys, tile);
          commit_copies();
        }
        if (p.negate) {
#pragma unroll
          for (int r = 0; r < kRowFragments; ++r)
#pragma unroll
            for (int n = 0; n < kKeyFragments; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) scores[r][n][i] = -scores[r][n][i];
        }
        if (modality != run_modality || modality == kMixed) {
          finish_run();
          run_modality = modality;
        }
        Columns columns{0, ~0u};
        if (!pure) columns = find_columns<kKeyFragments>(args, sequence, current * kBlockN, modality);
        const int least_visible = sequence.last_visible(args, query_of(minimum(first_row, num_rows - 1)));
        if (!pure || current * kBlockN + kBlockN - 1 > least_visible) mask(scores, current, modality, columns);
        softmax(scores, modality);
        if (modality == kMixed) {
          fold_columns(scores, present, columns);
#pragma unroll
          for (int r = 0; r < kRowFragments; ++r) row_sum[r][0] = row_sum[r][1] = 0.0f;
        }
        Products::multiply_registers(out, scores, values);
        present &= ~met;
      } while (!last_pass);
    }
    wait_copies<0>();
    finish_run();
    locate();
    if (p.splits > 1) {
      write_partial();
    } else {
      write_results();
    }
  }

  MODA_EXT_DEVICE void write_partial() const {
#pragma unroll
    for (int r = 0; r < kRowFragments; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int own = r * 16 + h * 8 + g, row = first_row + own;
        if (row >= num_rows) continue;
        const int64_t at = split * p.rows + row_index(args, sequence, head_of(row), query_of(row));
        float* target = p.partial_out + at * args.head_dim;
#pragma unroll
        for (int n = 0; n < kHeadFragments; ++n) {
          const int column = n * 8 + 2 * t;
          if (column >= args.head_dim) continue;
          target[column] = out[r][n][2 * h];
          target[column + 1] = out[r][n][2 * h + 1];
        }
        if (t != 0) continue;
        p.partial_row_max[at] = row_max[r][h];
        if (split == 0) p.base[at] = base_table[own];
        for (int m = 0; m < args.num_modalities; ++m) {
          const int entry = m * kWarpRows + own;
          p.partial_mass[at * args.num_modalities + m] =
              mass_table[entry] * exp2_fast(row_max_table[entry] - row_max[r][h]);
        }
      }
    }
  }

  MODA_EXT_DEVICE void write_results() {
    sync_warp();  // every lane has read the queries, whose place the output takes
#pragma unroll
    for (int r = 0; r < kRowFragments; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int own = r * 16 + h * 8 + g, row = first_row + own;
        float total = 0.0f;
        if (t == 0) {
          for (int m = 0; m < args.num_modalities; ++m) {
            const int entry = m * kWarpRows + own;
            mass_table[entry] *= exp2_fast(row_max_table[entry] - row_max[r][h]);
            total += mass_table[entry];
          }
          total += exp2_fast(sink_of(own) - row_max[r][h]);
        }
        total = shuffle(total, lane_index() & ~3);
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        char* target = queries + own * kStride;
#pragma unroll
        for (int n = 0; n < kHeadFragments; ++n)
          Products::store_pair(target, n * 8 + 2 * t, out[r][n][2 * h] * inverse, out[r][n][2 * h + 1] * inverse);
        if (t != 0 || row >= num_rows) continue;
        const int64_t token = sequence.first_query + query_of(row);
        write_lse(args, sequence, head_of(row), token, base_table[own], (row_max[r][h] + log2f(total)) * kLn2);
        float* mass = row_of<float>(args.mass, sequence.batch, head_of(row), token);
        for (int m = 0; m < args.num_modalities; ++m)
          mass[m * args.mass.last] = mass_table[m * kWarpRows + own] * inverse;
      }
    }
    sync_warp();
    store_rows<Element, kHeadDim, kWarpRows>(queries, 0, args.head_dim, [&](int own) -> Element* {
      const int row = first_row + own;
      if (row >= num_rows) return nullptr;
      return row_of<Element>(args.out, sequence.batch, head_of(row), sequence.first_query + query_of(row));
    });
  }

  const Params& p;
  const ModularAttentionForwardArgs& args;
  const int g, t;  // the lane's row and column pair in a fragment
  int split, first_head, kv_head, num_rows, block_row, first_row;
  Sequence sequence;
  const uint32_t* tiles;
  char *queries, *keys, *values;
  float *bias_table, *mass_table, *row_max_table;  // [modality][row of the warp]
  float* base_table;                               // [row of the warp]
  uint32_t* warp_words;

  float out[kRowFragments][kHeadFragments][4];
  float row_max[kRowFragments][2];  // running maximum, log2 units; the same in the four lanes of a quad
  float row_sum[kRowFragments][2];  // of p since the modality changed, this lane's columns
  int run_modality = kMixed;
};

// Adds up what the splits of each row left, and the sink. One warp for each row.
template <class Element>
struct MergeKernel {
  using Params = ForwardParams;
  static constexpr int kThreads = 128;
  static int64_t blocks(const Params& p) { return divide_up(p.rows * 32, kThreads); }
  static size_t shared_bytes(const Params&) { return 0; }

  static MODA_EXT_DEVICE void run(const Params& p, char*) {
    const ModularAttentionForwardArgs& args = p.args;
    const int64_t rows = p.rows;
    const int64_t index = block_index() * (kThreads / 32) + warp_index();
    if (index >= rows) return;
    // Splits exist in both layouts; a row's tensors are reached as (batch, head, token).
    const int64_t token = index % args.rows_per_batch;
    const int head = static_cast<int>(index / args.rows_per_batch % args.query_heads);
    Sequence sequence{};
    sequence.batch = index / args.rows_per_batch / args.query_heads;

    const float base = p.base[index];
    const float sink = args.sink.data == nullptr
                           ? -infinity()
                           : (*row_of<float>(args.sink, sequence.batch, head, token) - base) * kLog2e;
    float row_max = maximum(kLowest, sink);
    for (int s = 0; s < p.splits; ++s) row_max = maximum(row_max, p.partial_row_max[s * rows + index]);
    const auto mass_of = [&](int m) {
      float mass = 0.0f;
      for (int s = 0; s < p.splits; ++s)
        mass += p.partial_mass[(s * rows + index) * args.num_modalities + m] *
                exp2_fast(p.partial_row_max[s * rows + index] - row_max);
      return mass;
    };
    const float own_mass = lane_index() < args.num_modalities ? mass_of(lane_index()) : 0.0f;
    const float total = warp_sum(own_mass) + exp2_fast(sink - row_max);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;

    Element* out = row_of<Element>(args.out, sequence.batch, head, token);
    for (int d = lane_index(); d < args.head_dim; d += 32) {
      float sum = 0.0f;
      for (int s = 0; s < p.splits; ++s)
        sum += p.partial_out[(s * rows + index) * args.head_dim + d] *
               exp2_fast(p.partial_row_max[s * rows + index] - row_max);
      out[d] = from_float<Element>(sum * inverse);
    }
    float* mass = row_of<float>(args.mass, sequence.batch, head, token);
    if (lane_index() < args.num_modalities) mass[lane_index() * args.mass.last] = own_mass * inverse;
    if (lane_index() == 0) write_lse(args, sequence, head, token, base, (row_max + log2f(total)) * kLn2);
  }
};

// How a call is cut into blocks.
struct ForwardPlan {
  int pack_gqa, row_blocks, splits;
  int tiles_per_sequence;
  int64_t tiles_at, out_at, row_max_at, mass_at, base_at, bytes;  // workspace
};

// Heads of a group are packed into blocks where that makes fewer of them, and few blocks are split over the keys until
// every multiprocessor has two, in pieces of at least four tiles: below that the merge costs more than it brings.
inline ForwardPlan plan_forward(const ModularAttentionForwardArgs& args, int block_rows, int tile_keys,
                                int multiprocessors) {
  ForwardPlan plan{};
  const int group = args.query_heads / args.kv_heads;
  const int64_t apart = group * divide_up(args.num_queries, block_rows);
  const int64_t together = divide_up(static_cast<int64_t>(args.num_queries) * group, block_rows);
  plan.pack_gqa = together < apart ? group : 1;
  plan.row_blocks = static_cast<int>(divide_up(static_cast<int64_t>(args.num_queries) * plan.pack_gqa, block_rows));
  plan.tiles_per_sequence = static_cast<int>(divide_up(args.num_keys, tile_keys));
  const int64_t blocks =
      static_cast<int64_t>(args.num_sequences) * (args.query_heads / plan.pack_gqa) * plan.row_blocks;
  plan.splits = 1;
  if (blocks > 0 && blocks < multiprocessors) {
    const int64_t wanted = divide_up(2 * multiprocessors, blocks);
    const int64_t possible = plan.tiles_per_sequence / 4;
    plan.splits = static_cast<int>(wanted < possible ? wanted : possible);
    if (plan.splits < 1) plan.splits = 1;
  }
  const int64_t rows = plan.splits > 1 ? args.num_rows() * plan.splits : 0;
  plan.tiles_at = 0;
  plan.out_at = round_up(4 * static_cast<int64_t>(args.num_sequences) * plan.tiles_per_sequence);
  plan.row_max_at = plan.out_at + round_up(4 * rows * args.head_dim);
  plan.mass_at = plan.row_max_at + round_up(4 * rows);
  plan.base_at = plan.mass_at + round_up(4 * rows * args.num_modalities);
  plan.bytes = plan.base_at + round_up(plan.splits > 1 ? 4 * args.num_rows() : 0);
  return plan;
}

template <class Element, int kHeadDim>
int64_t forward_workspace(const ModularAttentionForwardArgs& args, int multiprocessors) {
  using Kernel = ForwardKernel<Element, kHeadDim>;
  return plan_forward(args, Kernel::kBlockM, Kernel::kBlockN, multiprocessors).bytes;
}

template <class Element, int kHeadDim>
void forward(const ModularAttentionForwardArgs& args, int multiprocessors, void* workspace, void* stream) {
  using Kernel = ForwardKernel<Element, kHeadDim>;
  const ForwardPlan plan = plan_forward(args, Kernel::kBlockM, Kernel::kBlockN, multiprocessors);
  char* memory = static_cast<char*>(workspace);
  uint32_t* words = reinterpret_cast<uint32_t*>(memory + plan.tiles_at);
  launch<DescribeTiles>({args, Kernel::kBlockN, plan.tiles_per_sequence, words}, stream);

  ForwardParams params{};
  params.args = args;
  params.tiles = words;
  params.tiles_per_sequence = plan.tiles_per_sequence;
  params.pack_gqa = plan.pack_gqa;
  params.row_blocks = plan.row_blocks;
  params.splits = plan.splits;
  params.rows = args.num_rows();
  // A scale of 0 must not meet the -inf of a hidden score: the smallest normal number makes the same of finite ones.
  const float magnitude = args.scale < 0 ? -args.scale : args.scale;
  params.softmax_scale_log2 = magnitude * kLog2e > 1.2e-38f ? magnitude * kLog2e : 1.2e-38f;
  params.negate = args.scale < 0;
  params.partial_out = reinterpret_cast<float*>(memory + plan.out_at);
  params.partial_row_max = reinterpret_cast<float*>(memory + plan.row_max_at);
  params.partial_mass = reinterpret_cast<float*>(memory + plan.mass_at);
  params.base = reinterpret_cast<float*>(memory + plan.base_at);
  launch<Kernel>(params, stream);
  if (plan.splits > 1) launch<MergeKernel<Element>>(params, stream);
}

template <int kHeadDim>
int64_t ModularAttentionForwardKernels<kHeadDim>::workspace(const ModularAttentionForwardArgs& args, Storage storage,
                                                            int multiprocessors) {
  return storage == Storage::kFloat32 ? forward_workspace<float, kHeadDim>(args, multiprocessors)
                                      : forward_workspace<BFloat16, kHeadDim>(args, multiprocessors);
}
template <int kHeadDim>
void ModularAttentionForwardKernels<kHeadDim>::run(const ModularAttentionForwardArgs& args, Storage storage,
                                                   int multiprocessors, void* workspace, void* stream) {
  if (storage == Storage::kBFloat16) return forward<BFloat16, kHeadDim>(args, multiprocessors, workspace, stream);
  if (storage == Storage::kFloat16) return forward<Float16, kHeadDim>(args, multiprocessors, workspace, stream);
  forward<float, kHeadDim>(args, multiprocessors, workspace, stream);
}

}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
