// Backward pass of modular attention (docs/mathematics.md section 3) for compute capability 8.0 and later.
//
//   D_i = dO_i . o_i + sum_m g_im mass_im - dL_i                   dS_ij = p_ij (dO_i . v_j + g_{i,a_j} - D_i)
//   dq^(m)_i = tau sum_{a_j = m} dS_ij k_j    dk_j = tau sum_i dS_ij q_i^(a_j)    dv_j = sum_i p_ij dO_i
//   db_im = sum_{a_j = m} dS_ij               dc_i = -exp(c_i - L_i) D_i
//
// Three kernels, each number written by one thread after a sum in fixed order: results are deterministic, without
// atomics. That costs two products more than adding dq up across blocks would (seven instead of five).
//
//   RowKernel    for each row and modality the two numbers that make the others plain attention backward:
//                p = 2^(s tau log2(e) - exponent), dS = p (dP - shift), with
//                exponent = (L - b) log2(e), infinite where the row sees nothing, and shift = D - g; also dc.
//                L is lse and what rounding took from it: beside a large b and lse, all there is to know
//   KeyKernel    dk and dv: a block owns keys, and rows stream by
//   QueryKernel  dq and db: a block owns rows, and keys stream by
//
// Tiling: what a block owns stays in shared memory, 16 rows (or keys) for each warp, with the gradients in registers;
// what streams by comes in tiles, double-buffered where shared memory allows. KeyKernel computes the transposes
//
//   S^T = K Q^T        dP^T = V dO^T
//
// so that both kernels find their second operand in the registers of the first product. Memory traffic of a block: what
// it owns once, what it sees once.
#pragma once

#include "cuda/sm80/key_tiles.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {

// By the length of a row in bytes, as ForwardTile: warps that own 16 rows each, rows of a tile that streams by,
// buffers.
template <int kRowBytes>
struct BackwardTile;
template <int kOwnWarps_, int kStream_, int kStages_>
struct BackwardTileOf {
  static constexpr int kOwnWarps = kOwnWarps_, kOwn = 16 * kOwnWarps_, kStream = kStream_, kStages = kStages_;
};
template <>
struct BackwardTile<64> : BackwardTileOf<4, 64, 2> {};  // 16-bit: 32
template <>
struct BackwardTile<128> : BackwardTileOf<4, 64, 2> {};  // 64; float32: 32
template <>
struct BackwardTile<192> : BackwardTileOf<4, 32, 2> {};  // 96
template <>
struct BackwardTile<256> : BackwardTileOf<4, 32, 2> {};  // 128; float32: 64
template <>
struct BackwardTile<384> : BackwardTileOf<4, 32, 1> {};  // 192; float32: 96
template <>
struct BackwardTile<512> : BackwardTileOf<3, 32, 1> {};  // 256; float32: 128
template <>
struct BackwardTile<768> : BackwardTileOf<2, 16, 1> {};  // float32: 192
template <>
struct BackwardTile<1024> : BackwardTileOf<1, 16, 1> {};  // float32: 256

struct BackwardParams {
  ModularAttentionBackwardArgs args;
  const uint32_t* tiles;  // words of DescribeTiles, for tiles of kStream keys
  int tiles_per_sequence;
  int row_tiles;               // of kStream rows, for each head
  int row_blocks, key_blocks;  // of kOwn rows and keys
  int64_t rows;                // of all query heads and sequences
  float* exponent;             // (modalities, rows)
  float* shift;                // (modalities, rows)
  float* delta;                // (rows): D
  uint32_t* row_words;         // (sequences, heads, row_tiles): modalities that some row of the tile sees
  float softmax_scale_log2;    // tau log2(e)
};

// exp(c - L): the part of a row that its sink has.
MODA_EXT_DEVICE float sink_probability(const ModularAttentionBackwardArgs& args, int64_t batch, int head,
                                       int64_t token) {
  if (args.sink.data == nullptr) return 0.0f;
  const float sink = *row_of<float>(args.sink, batch, head, token);
  if (sink == -infinity()) return 0.0f;
  const float lse = *row_of<float>(args.saved_lse, batch, head, token);
  const float residual = *row_of<float>(args.saved_lse_residual, batch, head, token);
  // Above 0 only where scores are so large that their rounding decides about the sink.
  const float exponent = ((sink - lse) - residual) * kLog2e;
  return exp2_fast(exponent > 0.0f ? 0.0f : exponent);
}

template <class Element, int kHeadDim>
struct RowKernel {
  using Params = BackwardParams;
  static constexpr int kTileRows = BackwardTile<kHeadDim* static_cast<int>(sizeof(Element))>::kStream;
  static constexpr int kThreads = 128, kWarps = kThreads / 32;

  static int64_t blocks(const Params& p) {
    return static_cast<int64_t>(p.args.num_sequences) * p.args.query_heads * p.row_tiles;
  }
  static size_t shared_bytes(const Params&) { return sizeof(uint32_t) * kWarps; }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    const ModularAttentionBackwardArgs& args = p.args;
    const int64_t index = block_index();
    const int tile = static_cast<int>(index % p.row_tiles);
    const int head = static_cast<int>(index / p.row_tiles % args.query_heads);
    const Sequence sequence = locate_sequence(args, index / p.row_tiles / args.query_heads);
    uint32_t seen = 0;
    for (int row = tile * kTileRows + warp_index(); row < minimum(tile * kTileRows + kTileRows, sequence.num_queries);
         row += kWarps)
      seen |= prepare_row(p, sequence, head, row);
    uint32_t* words = reinterpret_cast<uint32_t*>(shared);
    if (lane_index() == 0) words[warp_index()] = seen;
    sync_threads();
    if (thread_index() != 0) return;
    for (int w = 1; w < kWarps; ++w) seen |= words[w];
    p.row_words[index] = seen;
  }

 private:
  // One warp, one row: returns the modalities that it sees.
  static MODA_EXT_DEVICE uint32_t prepare_row(const Params& p, const Sequence& sequence, int head, int row) {
    const ModularAttentionBackwardArgs& args = p.args;
    const int64_t token = sequence.first_query + row;
    float sum = 0.0f;
    if (args.grad_out.data != nullptr) {
      const Element* out = row_of<Element>(args.saved_out, sequence.batch, head, token);
      const Element* grad_out = row_of<Element>(args.grad_out, sequence.batch, head, token);
      for (int d = lane_index(); d < args.head_dim; d += 32) sum += to_float(out[d]) * to_float(grad_out[d]);
    }
    const int m = lane_index();
    float grad_mass = 0.0f;
    if (args.grad_mass.data != nullptr && m < args.num_modalities) {
      grad_mass = row_of<float>(args.grad_mass, sequence.batch, head, token)[m * args.grad_mass.last];
      sum += grad_mass * row_of<float>(args.saved_mass, sequence.batch, head, token)[m * args.saved_mass.last];
    }
    sum = warp_sum(sum);
    if (args.grad_lse.data != nullptr) sum -= *row_of<float>(args.grad_lse, sequence.batch, head, token);

    const float lse = *row_of<float>(args.saved_lse, sequence.batch, head, token);
    const float residual = *row_of<float>(args.saved_lse_residual, sequence.batch, head, token);
    const int64_t at = row_index(args, sequence, head, row);
    bool sees = false;
    if (m < args.num_modalities) {
      const float bias =
          args.bias.data == nullptr ? 0.0f : row_of<float>(args.bias, sequence.batch, head, token)[m * args.bias.last];
      sees = bias != -infinity() && lse != -infinity();
      p.exponent[m * p.rows + at] = sees ? ((lse - bias) + residual) * kLog2e : infinity();
      p.shift[m * p.rows + at] = sum - grad_mass;
    }
    if (lane_index() == 0) {
      p.delta[at] = sum;
      if (args.grad_sink.data != nullptr)
        *row_of<float>(args.grad_sink, sequence.batch, head, token) =
            -sink_probability(args, sequence.batch, head, token) * sum;
    }
    return warp_or(sees ? 1u << m : 0u);
  }
};

template <class Element, int kHeadDim>
class KeyKernel {
  using Tile = BackwardTile<kHeadDim* static_cast<int>(sizeof(Element))>;
  using Products = Fragments<Element, kHeadDim>;
  // Two gradients of 256 columns do not fit in the registers of one warp: two warps share the keys, each with half of
  // the columns, and both compute the scores.
  static constexpr int kParts = kHeadDim > 128 ? 2 : 1;
  static constexpr int kStride = Products::kStride, kStream = Tile::kStream;
  static constexpr int kRowFragments = kStream / 8, kColumnFragments = kHeadDim / 8 / kParts;

 public:
  static constexpr int kOwn = Tile::kOwn;
  static constexpr int kWarps = Tile::kOwnWarps * kParts, kThreads = 32 * kWarps;
  using Params = BackwardParams;

  static int64_t blocks(const Params& p) {
    return static_cast<int64_t>(p.args.num_sequences) * p.args.kv_heads * p.key_blocks;
  }
  static size_t shared_bytes(const Params& p) {
    return static_cast<size_t>(2 * kOwn + 2 * kStream * Tile::kStages) * kStride +
           sizeof(float) * Tile::kStages * 2 * kStream * p.args.num_modalities + sizeof(uint32_t) * kWarps;
  }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    KeyKernel block(p, shared);
    block.run();
  }

 private:
  // A tile of rows: of which head of the group, and against which query view.
  struct Item {
    int view, head, tile;
  };

  MODA_EXT_DEVICE KeyKernel(const Params& params, char* shared)
      : p(params), args(params.args), g(lane_index() / 4), t(lane_index() % 4), part(warp_index() / Tile::kOwnWarps) {
    const int64_t index = block_index();
    first_key = static_cast<int>(index % p.key_blocks) * kOwn;
    kv_head = static_cast<int>(index / p.key_blocks % args.kv_heads);
    sequence_index = index / p.key_blocks / args.kv_heads;
    sequence = locate_sequence(args, sequence_index);
    group = args.query_heads / args.kv_heads;
    keys = shared;
    values = keys + kOwn * kStride;
    stream = values + kOwn * kStride;
    planes = reinterpret_cast<float*>(stream + Tile::kStages * 2 * kStream * kStride);
    words = reinterpret_cast<uint32_t*>(planes + Tile::kStages * 2 * kStream * args.num_modalities);
    warp_keys = warp_index() % Tile::kOwnWarps * 16;
  }

  MODA_EXT_DEVICE void run() {
    if (first_key >= sequence.num_keys) return;  // packed sequences differ in length
    uint32_t present = find_keys();
    copy_own(args.key, keys);
    copy_own(args.value, values);
    set_zero(grad_key);
    set_zero(grad_value);

    // Rows before the first see none of these keys.
    const int offset = sequence.num_keys - sequence.num_queries;
    first_tile = args.causal ? maximum(0, first_key - offset) / kStream : 0;
    end_tile = (sequence.num_queries + kStream - 1) / kStream;
    Item item{args.num_views > 1 ? lowest_bit(present) : 0, 0, first_tile - 1};
    bool more = present != 0 && advance(item, present);
    if (Tile::kStages == 2 && more) copy_rows_of(item, 0, present);
    commit_copies();
    int stage = 0;
    while (more) {
      const Item current = item;
      if (Tile::kStages == 2) {
        more = advance(item, present);
        if (more) copy_rows_of(item, stage ^ 1, present);
        commit_copies();
        wait_copies<1>();
      } else {
        copy_rows_of(current, 0, present);
        commit_copies();
        more = advance(item, present);
        wait_copies<0>();
      }
      sync_threads();
      differentiate(current, stage);
      sync_threads();  // everyone is done with this buffer
      if (Tile::kStages == 2) stage ^= 1;
    }
    wait_copies<0>();
    // The gradients take the place of the keys and values; where no row sees these, nobody has waited for them yet.
    sync_threads();
    if (args.grad_key.data != nullptr) write(grad_key, args.scale, keys, args.grad_key);
    if (args.grad_value.data != nullptr) write(grad_value, 1.0f, values, args.grad_value);
  }

  // Modalities of this thread's two keys; returns those of the block.
  MODA_EXT_DEVICE uint32_t find_keys() {
    uint32_t present = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      modality[h] = modality_of(args, sequence, first_key + warp_keys + h * 8 + g);
      present |= modality_bit(modality[h]);
    }
    present = warp_or(present) & kAllModalities;
    if (lane_index() == 0) words[warp_index()] = present;
    sync_threads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) present |= words[w];
    return present;
  }

  MODA_EXT_DEVICE void copy_own(const Input& operand, char* target) {
    const Element* first = row_of<Element>(operand, sequence.batch, kv_head, sequence.first_key + first_key);
    copy_rows<Element, kHeadDim, kOwn, kThreads>(
        target, thread_index(), first, operand.row, args.head_dim,
        [&](int row) { return modality_of(args, sequence, first_key + row) >= 0; });
  }

  // The next tile of rows that sees any of the keys (with views: of the view's modality).
  MODA_EXT_DEVICE bool advance(Item& item, uint32_t present) const {
    for (;;) {
      if (++item.tile >= end_tile) {
        item.tile = first_tile;
        if (item.tile >= end_tile) return false;
        if (++item.head == group) {
          item.head = 0;
          const uint32_t later = args.num_views > 1 ? present & ~((2u << item.view) - 1) : 0;
          if (later == 0) return false;
          item.view = lowest_bit(later);
        }
      }
      const uint32_t wanted = args.num_views > 1 ? 1u << item.view : present;
      const int64_t head = sequence_index * args.query_heads + kv_head * group + item.head;
      if (p.row_words[head * p.row_tiles + item.tile] & wanted) return true;
    }
  }

  MODA_EXT_DEVICE void copy_rows_of(const Item& item, int stage, uint32_t present) {
    const int head = kv_head * group + item.head, row = item.tile * kStream;
    char* target = stream + stage * 2 * kStream * kStride;
    const int64_t token = sequence.first_query + row;
    const int count = sequence.num_queries - row;
    const auto valid = [&](int i) { return i < count; };
    copy_rows<Element, kHeadDim, kStream, kThreads>(
        target, thread_index(), row_of<Element>(args.query, sequence.batch, head, token) + item.view * args.query.view,
        args.query.row, args.head_dim, valid);
    const auto some = [&](int i) { return i < count && args.grad_out.data != nullptr; };
    copy_rows<Element, kHeadDim, kStream, kThreads>(target + kStream * kStride, thread_index(),
                                                    args.grad_out.data == nullptr
                                                        ? row_of<Element>(args.query, sequence.batch, head, token)
                                                        : row_of<Element>(args.grad_out, sequence.batch, head, token),
                                                    args.grad_out.row, args.head_dim, some);
    float* plane = planes + stage * 2 * kStream * args.num_modalities;
    const int64_t at = row_index(args, sequence, head, row);
    for (int i = thread_index(); i < args.num_modalities * kStream; i += kThreads) {
      const int m = i / kStream, own = i % kStream;
      if (!(present >> m & 1)) continue;
      const bool read = own < count;
      const int64_t source = m * p.rows + at + (read ? own : 0);
      copy_async_4(plane + i, p.exponent + source, read);
      copy_async_4(plane + args.num_modalities * kStream + i, p.shift + source, read);
    }
  }

  // The five products of a tile of rows with the block's keys, transposed: fragments hold keys x rows.
  MODA_EXT_DEVICE void differentiate(const Item& item, int stage) {
    const char* queries = stream + stage * 2 * kStream * kStride;
    const char* grad_outs = queries + kStream * kStride;
    const float* exponents = planes + stage * 2 * kStream * args.num_modalities;
    const float* shifts = exponents + kStream * args.num_modalities;
    float probability[1][kRowFragments][4], grad_score[1][kRowFragments][4];
    set_zero(probability);
    set_zero(grad_score);
    Products::multiply_rows(probability, keys + warp_keys * kStride, queries);
    Products::multiply_rows(grad_score, values + warp_keys * kStride, grad_outs);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // First row of the tile that sees the key; rows beyond the end hold zeros and add nothing.
      const bool taken = args.num_views > 1 ? modality[h] == item.view : modality[h] >= 0;
      int first_row = 0;
      if (args.causal)
        first_row =
            first_key + warp_keys + h * 8 + g - (sequence.num_keys - sequence.num_queries) - item.tile * kStream;
      if (!taken) first_row = kStream;
      const int plane = maximum(modality[h], 0) * kStream;
#pragma unroll
      for (int n = 0; n < kRowFragments; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int row = n * 8 + 2 * t + j;
          float& score = probability[0][n][2 * h + j];
          float& grad = grad_score[0][n][2 * h + j];
          const bool visible = row >= first_row;
          score = visible ? exp2_fast(score * p.softmax_scale_log2 - exponents[plane + row]) : 0.0f;
          grad = visible ? score * (grad - shifts[plane + row]) : 0.0f;
        }
      }
    }
    const int first_column = part * kColumnFragments * 8 * static_cast<int>(sizeof(Element));
    Products::multiply_registers(grad_value, probability, grad_outs + first_column);
    Products::multiply_registers(grad_key, grad_score, queries + first_column);
  }

  MODA_EXT_DEVICE void write(const float (&grad)[1][kColumnFragments][4], float scale, char* place,
                             const Output& output) {
    char* rows = place + warp_keys * kStride;
    const int first_column = part * kColumnFragments * 8;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < kColumnFragments; ++n)
        Products::store_pair(rows + (h * 8 + g) * kStride, first_column + n * 8 + 2 * t, grad[0][n][2 * h] * scale,
                             grad[0][n][2 * h + 1] * scale);
    sync_warp();
    const int end = minimum(first_column + kColumnFragments * 8, args.head_dim);
    if (first_column >= end) return;
    store_rows<Element, kHeadDim, 16>(rows, first_column, end, [&](int own) -> Element* {
      const int key = first_key + warp_keys + own;
      if (key >= sequence.num_keys) return nullptr;
      return row_of<Element>(output, sequence.batch, kv_head, sequence.first_key + key);
    });
  }

  const Params& p;
  const ModularAttentionBackwardArgs& args;
  const int g, t, part;  // the lane's row and column pair in a fragment; the warp's part of the columns
  int first_key, kv_head, group, warp_keys;
  int first_tile, end_tile;
  int64_t sequence_index;
  Sequence sequence;
  char *keys, *values, *stream;  // a buffer of the stream: queries, then output gradients
  float* planes;                 // a buffer: exponents (modality, row), then shifts
  uint32_t* words;
  int modality[2];
  float grad_key[1][kColumnFragments][4], grad_value[1][kColumnFragments][4];
};

template <class Element, int kHeadDim>
class QueryKernel {
  using Tile = BackwardTile<kHeadDim* static_cast<int>(sizeof(Element))>;
  using Products = Fragments<Element, kHeadDim>;
  static constexpr int kStride = Products::kStride, kStream = Tile::kStream;
  static constexpr int kKeyFragments = kStream / 8, kHeadFragments = kHeadDim / 8;

 public:
  static constexpr int kOwn = Tile::kOwn;
  static constexpr int kThreads = 32 * Tile::kOwnWarps;
  using Params = BackwardParams;

  static int64_t blocks(const Params& p) {
    return static_cast<int64_t>(p.args.num_sequences) * p.args.query_heads * p.row_blocks;
  }
  static size_t shared_bytes(const Params& p) {
    return static_cast<size_t>(2 * kOwn + 2 * kStream * Tile::kStages) * kStride +
           sizeof(float) * 2 * kOwn * p.args.num_modalities;
  }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    QueryKernel block(p, shared);
    block.run();
  }

 private:
  MODA_EXT_DEVICE QueryKernel(const Params& params, char* shared)
      : p(params), args(params.args), g(lane_index() / 4), t(lane_index() % 4) {
    locate();
    queries = shared + warp_index() * 16 * kStride;  // of this warp
    grad_outs = queries + kOwn * kStride;
    stream = shared + 2 * kOwn * kStride;
    float* tables = reinterpret_cast<float*>(stream + Tile::kStages * 2 * kStream * kStride);
    probability_table = tables + warp_index() * 16 * args.num_modalities;
    grad_table = probability_table + kOwn * args.num_modalities;
  }

  // The block's place in the grid. Called again after each main loop, whose registers are full.
  MODA_EXT_DEVICE void locate() {
    const int64_t index = block_index();
    int row_block = static_cast<int>(index % p.row_blocks);
    if (args.causal) row_block = p.row_blocks - 1 - row_block;  // the longest first
    block_row = row_block * kOwn;
    first_row = block_row + warp_index() * 16;
    head = static_cast<int>(index / p.row_blocks % args.query_heads);
    kv_head = head / (args.query_heads / args.kv_heads);
    sequence_index = index / p.row_blocks / args.query_heads;
    sequence = locate_sequence(args, sequence_index);
    tiles = p.tiles + sequence_index * p.tiles_per_sequence;
  }

  MODA_EXT_DEVICE void run() {
    if (block_row >= sequence.num_queries) return;
    for (int i = lane_index(); i < 16 * args.num_modalities; i += 32) probability_table[i] = grad_table[i] = 0.0f;
    uint32_t seen = 0;
    const int last_row = minimum(block_row + kOwn, sequence.num_queries) - 1;
    const int64_t row_words = (sequence_index * args.query_heads + head) * p.row_tiles;
    for (int tile = block_row / kStream; tile <= last_row / kStream; ++tile) seen |= p.row_words[row_words + tile];
    end_tile = (maximum(0, sequence.last_visible(args, last_row) + 1) + kStream - 1) / kStream;

    copy_own(args.grad_out, grad_outs, 0);
    for (int view = 0; view < args.num_views; ++view) {
      sync_warp();  // every lane is done with the tables, and with the view before
      copy_own(args.query, queries, view);
      set_zero(grad_query);
      run_tiles(args.num_views > 1 ? seen & 1u << view : seen);
      locate();
      if (args.grad_query.data != nullptr) write(view);
    }
    if (args.grad_bias.data != nullptr) finish_bias_gradient();
  }

  MODA_EXT_DEVICE void run_tiles(uint32_t seen) {
    int tile = next_tile(0, seen);
    if (Tile::kStages == 2 && tile < end_tile) copy_stream(tile, 0);
    commit_copies();
    int stage = 0;
    while (tile < end_tile) {
      const int current = tile;
      if (Tile::kStages == 2) {
        tile = next_tile(tile + 1, seen);
        if (tile < end_tile) copy_stream(tile, stage ^ 1);
        commit_copies();
        wait_copies<1>();
      } else {
        copy_stream(current, 0);
        commit_copies();
        tile = next_tile(tile + 1, seen);
        wait_copies<0>();
      }
      sync_threads();
      const uint32_t present = tiles[current] & seen;
      differentiate(current, stage, (present & (present - 1)) == 0 ? lowest_bit(present) : kMixed, present);
      sync_threads();  // everyone is done with this buffer
      if (Tile::kStages == 2) stage ^= 1;
    }
    wait_copies<0>();
    finish_run();
    run_modality = kMixed;
  }

  MODA_EXT_DEVICE int next_tile(int tile, uint32_t seen) const {
    while (tile < end_tile && (tiles[tile] & seen) == 0) ++tile;
    return tile;
  }

  MODA_EXT_DEVICE void copy_own(const Input& operand, char* target, int view) {
    const int count = sequence.num_queries - first_row;
    const bool present = operand.data != nullptr;
    const Input& source = present ? operand : args.query;  // without data: zeros
    const Element* first =
        row_of<Element>(source, sequence.batch, head, sequence.first_query + (count > 0 ? first_row : 0)) +
        view * operand.view;
    copy_rows<Element, kHeadDim, 16, 32>(target, lane_index(), first, operand.row, args.head_dim,
                                         [&](int row) { return present && row < count; });
  }
  MODA_EXT_DEVICE void copy_stream(int tile, int stage) {
    char* target = stream + stage * 2 * kStream * kStride;
    const bool whole = !(tiles[tile] & kOther);
    const auto valid = [&](int row) { return whole || modality_of(args, sequence, tile * kStream + row) >= 0; };
    const int64_t token = sequence.first_key + tile * kStream;
    copy_rows<Element, kHeadDim, kStream, kThreads>(target, thread_index(),
                                                    row_of<Element>(args.key, sequence.batch, kv_head, token),
                                                    args.key.row, args.head_dim, valid);
    copy_rows<Element, kHeadDim, kStream, kThreads>(target + kStream * kStride, thread_index(),
                                                    row_of<Element>(args.value, sequence.batch, kv_head, token),
                                                    args.value.row, args.head_dim, valid);
  }

  // Row of the thread, in the sequence; rows beyond the end stand in for the last.
  MODA_EXT_DEVICE int row_of_half(int h) const { return minimum(first_row + h * 8 + g, sequence.num_queries - 1); }

  MODA_EXT_DEVICE void differentiate(int tile, int stage, int modality, uint32_t present) {
    const char* keys = stream + stage * 2 * kStream * kStride;
    const char* values = keys + kStream * kStride;
    float probability[1][kKeyFragments][4], grad_score[1][kKeyFragments][4];
    set_zero(probability);
    set_zero(grad_score);
    Products::multiply_rows(probability, queries, keys);
    Products::multiply_rows(grad_score, grad_outs, values);

    if (modality != run_modality || modality == kMixed) {
      finish_run();
      run_modality = modality;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t at = maximum(modality, 0) * p.rows + row_index(args, sequence, head, row_of_half(h));
        exponent[h] = p.exponent[at];
        shift[h] = p.shift[at];
      }
    }
    const bool pure = (tiles[tile] & (tiles[tile] - 1)) == 0;
    Columns columns{0, ~0u};
    if (!pure) columns = find_columns<kKeyFragments>(args, sequence, tile * kStream, modality);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Columns of the tile that the row sees, counted from this thread's first.
      const int limit = sequence.last_visible(args, row_of_half(h)) - (tile * kStream + 2 * t);
      const int64_t at = row_index(args, sequence, head, row_of_half(h));
#pragma unroll
      for (int n = 0; n < kKeyFragments; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = probability[0][n][2 * h + j];
          float& grad = grad_score[0][n][2 * h + j];
          float own_exponent = exponent[h], own_shift = shift[h];
          if (modality == kMixed) {
            own_exponent = p.exponent[columns.id(2 * n + j) * p.rows + at];
            own_shift = p.shift[columns.id(2 * n + j) * p.rows + at];
          }
          const bool visible = columns.takes(2 * n + j) && n * 8 + j <= limit;
          score = visible ? exp2_fast(score * p.softmax_scale_log2 - own_exponent) : 0.0f;
          grad = visible ? score * (grad - own_shift) : 0.0f;
          probability_sum[h] += score;
          grad_sum[h] += grad;
        }
      }
    }
    if (modality == kMixed) fold_columns(probability, grad_score, present, columns);
    Products::multiply_registers(grad_query, grad_score, keys);
  }

  // Sums over the keys of a modality go to the tables; one lane of a quad owns the entry.
  MODA_EXT_DEVICE void fold(int modality, int h, float probability, float grad) {
    probability = quad_sum(probability);
    grad = quad_sum(grad);
    if (t != 0) return;
    probability_table[modality * 16 + h * 8 + g] += probability;
    grad_table[modality * 16 + h * 8 + g] += grad;
  }
  MODA_EXT_DEVICE void finish_run() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (run_modality != kMixed) fold(run_modality, h, probability_sum[h], grad_sum[h]);
      probability_sum[h] = grad_sum[h] = 0.0f;
    }
  }
  MODA_EXT_DEVICE void fold_columns(const float (&probability)[1][kKeyFragments][4],
                                    const float (&grad_score)[1][kKeyFragments][4], uint32_t present,
                                    const Columns& columns) {
    if (args.grad_bias.data == nullptr) return;
    for (; present != 0; present &= present - 1) {
      const int modality = lowest_bit(present);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = 0.0f, grad = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeyFragments; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            if (columns.id(2 * n + j) != modality) continue;
            sum += probability[0][n][2 * h + j];
            grad += grad_score[0][n][2 * h + j];
          }
        }
        fold(modality, h, sum, grad);
      }
    }
  }

  MODA_EXT_DEVICE void write(int view) {
    sync_warp();  // every lane has read the queries, whose place the gradient takes
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < kHeadFragments; ++n)
        Products::store_pair(queries + (h * 8 + g) * kStride, n * 8 + 2 * t, grad_query[0][n][2 * h] * args.scale,
                             grad_query[0][n][2 * h + 1] * args.scale);
    sync_warp();
    store_rows<Element, kHeadDim, 16>(queries, 0, args.head_dim, [&](int own) -> Element* {
      const int row = first_row + own;
      if (row >= sequence.num_queries) return nullptr;
      return row_of<Element>(args.grad_query, sequence.batch, head, sequence.first_query + row) +
             view * args.grad_query.view;
    });
  }

  // db_m = sum dS over the keys of modality m is a small difference of large numbers (zero for one modality without a
  // sink), and the D that went into dS was made from the rounded output. Here it is replaced by the D that the row's
  // own probabilities imply, and the common factor that the rounding of lse gives to them is divided out, known from
  // what they should sum to:
  //   k = sum_m mass_m / sum_m Q_m    with Q_m = sum P
  //   D' = k sum_m (db_m + Q_m D) - dL
  //   db_m <- k (db_m + Q_m (D - D'))    where D - D' = s D - k sum_m db_m + dL, with s the sink's part of the row:
  // 1 - sum_m mass_m would be one more difference of large numbers.
  // The keys of a part of a row do not say what its probabilities sum to: their db_m stays as it is.
  MODA_EXT_DEVICE void finish_bias_gradient() {
    if (t != 0) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int own = h * 8 + g, row = first_row + own;
      if (row >= sequence.num_queries) continue;
      const int64_t token = sequence.first_query + row;
      const float* mass = row_of<float>(args.saved_mass, sequence.batch, head, token);
      float sum = 0.0f, expected = 0.0f, grads = 0.0f;
      for (int m = 0; m < args.num_modalities; ++m) {
        sum += probability_table[m * 16 + own];
        grads += grad_table[m * 16 + own];
        expected += mass[m * args.saved_mass.last];
      }
      const float of_sink = sink_probability(args, sequence.batch, head, token);
      if (of_sink == 0.0f) expected = 1.0f;
      float correction = sum == 0.0f ? 0.0f : expected / sum;
      float difference = p.delta[row_index(args, sequence, head, row)] * of_sink - correction * grads;
      if (args.grad_lse.data != nullptr) difference += *row_of<float>(args.grad_lse, sequence.batch, head, token);
      if (!args.whole_rows) correction = 1.0f, difference = 0.0f;
      float* grad_bias = row_of<float>(args.grad_bias, sequence.batch, head, token);
      for (int m = 0; m < args.num_modalities; ++m)
        grad_bias[m * args.grad_bias.last] =
            (grad_table[m * 16 + own] + probability_table[m * 16 + own] * difference) * correction;
    }
  }

  const Params& p;
  const ModularAttentionBackwardArgs& args;
  const int g, t;  // the lane's row and column pair in a fragment
  int block_row, first_row, head, kv_head, end_tile;
  int64_t sequence_index;
  Sequence sequence;
  const uint32_t* tiles;
  char *queries, *grad_outs, *stream;     // a buffer of the stream: keys, then values
  float *probability_table, *grad_table;  // [modality][row of the warp]
  float grad_query[1][kHeadFragments][4];
  float exponent[2] = {}, shift[2] = {};            // of the run's modality
  float probability_sum[2] = {}, grad_sum[2] = {};  // since the modality changed, this lane's columns
  int run_modality = kMixed;
};

struct BackwardPlan {
  int row_tiles, row_blocks, key_blocks, tiles_per_sequence;
  int64_t tiles_at, words_at, exponent_at, shift_at, delta_at, bytes;  // workspace
};

inline BackwardPlan plan_backward(const ModularAttentionBackwardArgs& args, int own, int stream) {
  BackwardPlan plan{};
  plan.row_tiles = static_cast<int>(divide_up(args.num_queries, stream));
  plan.row_blocks = static_cast<int>(divide_up(args.num_queries, own));
  plan.key_blocks = static_cast<int>(divide_up(args.num_keys, own));
  plan.tiles_per_sequence = static_cast<int>(divide_up(args.num_keys, stream));
  plan.tiles_at = 0;
  plan.words_at = round_up(4 * static_cast<int64_t>(args.num_sequences) * plan.tiles_per_sequence);
  plan.exponent_at =
      plan.words_at + round_up(4 * static_cast<int64_t>(args.num_sequences) * args.query_heads * plan.row_tiles);
  plan.shift_at = plan.exponent_at + round_up(4 * args.num_rows() * args.num_modalities);
  plan.delta_at = plan.shift_at + round_up(4 * args.num_rows() * args.num_modalities);
  plan.bytes = plan.delta_at + round_up(4 * args.num_rows());
  return plan;
}

template <class Element, int kHeadDim>
int64_t backward_workspace(const ModularAttentionBackwardArgs& args) {
  using Tile = BackwardTile<kHeadDim* static_cast<int>(sizeof(Element))>;
  return plan_backward(args, Tile::kOwn, Tile::kStream).bytes;
}

template <class Element, int kHeadDim>
void backward(const ModularAttentionBackwardArgs& args, void* workspace, void* stream) {
  using Tile = BackwardTile<kHeadDim* static_cast<int>(sizeof(Element))>;
  const BackwardPlan plan = plan_backward(args, Tile::kOwn, Tile::kStream);
  char* memory = static_cast<char*>(workspace);
  uint32_t* words = reinterpret_cast<uint32_t*>(memory + plan.tiles_at);
  BackwardParams params{};
  params.args = args;
  params.tiles = words;
  params.tiles_per_sequence = plan.tiles_per_sequence;
  params.row_tiles = plan.row_tiles;
  params.row_blocks = plan.row_blocks;
  params.key_blocks = plan.key_blocks;
  params.rows = args.num_rows();
  params.exponent = reinterpret_cast<float*>(memory + plan.exponent_at);
  params.shift = reinterpret_cast<float*>(memory + plan.shift_at);
  params.delta = reinterpret_cast<float*>(memory + plan.delta_at);
  params.row_words = reinterpret_cast<uint32_t*>(memory + plan.words_at);
  params.softmax_scale_log2 = args.scale * kLog2e;

  launch<RowKernel<Element, kHeadDim>>(params, stream);
  if (args.grad_key.data != nullptr || args.grad_value.data != nullptr)
    launch<KeyKernel<Element, kHeadDim>>(params, stream);
  if (args.grad_query.data == nullptr && args.grad_bias.data == nullptr) return;
  launch<DescribeTiles>({args, Tile::kStream, plan.tiles_per_sequence, words}, stream);
  launch<QueryKernel<Element, kHeadDim>>(params, stream);
}

template <int kHeadDim>
int64_t ModularAttentionBackwardKernels<kHeadDim>::workspace(const ModularAttentionBackwardArgs& args,
                                                             Storage storage) {
  return storage == Storage::kFloat32 ? backward_workspace<float, kHeadDim>(args)
                                      : backward_workspace<BFloat16, kHeadDim>(args);
}
template <int kHeadDim>
void ModularAttentionBackwardKernels<kHeadDim>::run(const ModularAttentionBackwardArgs& args, Storage storage,
                                                    void* workspace, void* stream) {
  if (storage == Storage::kBFloat16) return backward<BFloat16, kHeadDim>(args, workspace, stream);
  if (storage == Storage::kFloat16) return backward<Float16, kHeadDim>(args, workspace, stream);
  backward<float, kHeadDim>(args, workspace, stream);
}

}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
