// Query views of the duplex aligner in causal scope (MATH.md section 1, fusion "concat") for compute capability 8.0 and
// later, as cpu/kernels/duplex_views.h:
//
//   view_{a,i} = q_i + y A1_a^T + sum_{m != a} s_{i,m} x A2_a^T G^m_i     y = q_i B1_a^T, x = q_i B2_a^T
//   e_{i,m}    = q_i G^m_i q_i^T / |q_i|^2
//
// Segments, their Grams and the states before them are those of causal_gram.h. LatentKernel multiplies each state by
// the weights once, A2_a^T G^m, rank x D numbers, and that is what rows meet; the keys of their own segment they meet
// as x A2_a^T, all modalities in one pass. Only e needs the states themselves. Cost: a row and view take about 2
// kSegment D multiply-adds in the segment, 4 rank D for the weights and rank D for each other modality. Beside the
// states, memory is rank D numbers for each segment, key head and pair of modalities.
//
// Numbers: weights, x, y and x A2_a^T are rounded to the storage type, and have to fit. Rows divide their scales by the
// largest, so that 1 / count does not take scores below float16.
#pragma once

#include "cuda/sm80/causal_gram.h"

namespace moda_ext {
namespace cuda {

constexpr int kRankTile = 32;  // ranks that are in shared memory together; weights are padded with zeros to whole tiles

// The weights as products take them: rank_tiles kRankTile rows of D numbers for each of these and each view.
enum class Weight { kB1, kB2, kA1, kA2 };  // A transposed

struct DuplexParams {
  DuplexArgs args;
  States states;
  int rank_tiles;
  int first_segment, num_segments;  // those that rows lie in
  int first_block, row_blocks;      // of kRows positions
  void* weights;                    // (Weight, view, rank, D)
  // (batch, kv head, view, other modality in ascending order, segment, rank tile, kRankTile, D). 16-bit numbers are
  // divided by the tile's largest magnitude.
  void* latent;
  float* largest;

  int num_terms() const { return args.num_modalities - 1; }
};

// Memory of the parts of DuplexParams; plan_states describes what comes before.
struct DuplexPlan {
  int rank_tiles, first_segment, num_segments;
  int64_t weights_at, latent_at, largest_at, bytes;
};

template <class Element, int kHeadDim>
DuplexPlan plan_duplex(const DuplexArgs& args) {
  DuplexPlan plan;
  plan.rank_tiles = static_cast<int>(divide_up(args.rank, kRankTile));
  plan.first_segment = (args.num_keys - args.num_queries) / kSegment;
  plan.num_segments = static_cast<int>(divide_up(args.num_keys, kSegment)) - plan.first_segment;
  const int64_t tiles = args.num_grams() * (args.num_modalities - 1) * plan.num_segments * plan.rank_tiles;
  const int64_t tile_bytes = static_cast<int64_t>(sizeof(Element)) * kRankTile * args.head_dim;
  plan.weights_at = plan_states<Element, kHeadDim>(args, args.indicator.data != nullptr).bytes;
  plan.latent_at = plan.weights_at + round_up(4 * args.num_modalities * plan.rank_tiles * tile_bytes);
  plan.largest_at = plan.latent_at + round_up(tiles * tile_bytes);
  plan.bytes = plan.largest_at + round_up(4 * tiles);
  return plan;
}

template <class Element>
MODA_EXT_DEVICE const Element* weight_rows(const DuplexParams& p, Weight weight, int view) {
  const int64_t index = static_cast<int64_t>(weight) * p.args.num_modalities + view;
  return static_cast<const Element*>(p.weights) + index * p.rank_tiles * kRankTile * p.args.head_dim;
}

// First of the rank tiles of the states that rows of a segment meet, term by term.
MODA_EXT_DEVICE int64_t latent_index(const DuplexParams& p, int64_t sequence_index, int kv_head, int view, int term,
                                     int segment) {
  const int64_t matrix =
      ((sequence_index * p.args.kv_heads + kv_head) * p.args.num_modalities + view) * (p.args.num_modalities - 1) +
      term;
  return (matrix * p.num_segments + segment - p.first_segment) * p.rank_tiles;
}

MODA_EXT_DEVICE int modality_of_term(int view, int term) { return term < view ? term : term + 1; }

template <class Element>
struct PackWeights {
  using Params = DuplexParams;
  static constexpr int kThreads = 256;
  static int64_t numbers(const Params& p) {
    return static_cast<int64_t>(4) * p.args.num_modalities * p.rank_tiles * kRankTile * p.args.head_dim;
  }
  static int64_t blocks(const Params& p) { return divide_up(numbers(p), kThreads); }
  static size_t shared_bytes(const Params&) { return 0; }

  static MODA_EXT_DEVICE void run(const Params& p, char*) {
    const int D = p.args.head_dim, rank = p.args.rank, padded = p.rank_tiles * kRankTile;
    int64_t index = block_index() * kThreads + thread_index();
    const int64_t at = index;
    const int d = static_cast<int>(index % D);
    index /= D;
    const int k = static_cast<int>(index % padded);
    index /= padded;
    const int64_t view = index % p.args.num_modalities;
    const int64_t weight = index / p.args.num_modalities;
    if (weight > 3) return;
    const bool transposed = weight >= static_cast<int>(Weight::kA1), second = weight % 2 == 1;
    const float* from = transposed ? (second ? p.args.a2 : p.args.a1) : (second ? p.args.b2 : p.args.b1);
    const int64_t element = view * D * rank + (transposed ? static_cast<int64_t>(d) * rank + k : k * D + d);
    static_cast<Element*>(p.weights)[at] = from_float<Element>(k < rank ? from[element] : 0.0f);
  }
};

// A rank tile of A2_a^T G^m for the G^m before a segment.
template <class Element, int kHeadDim>
struct LatentKernel {
  using Params = DuplexParams;
  using Products = Fragments<Element, kHeadDim>;
  static constexpr int kThreads = 2 * kRankTile;
  using Product = SymmetricProduct<Element, kHeadDim, kThreads>;

  static int64_t blocks(const Params& p) { return p.args.num_grams() * p.num_terms() * p.num_segments * p.rank_tiles; }
  static size_t shared_bytes(const Params&) {
    return static_cast<size_t>(kRankTile + Product::kSlice) * Products::kStride + sizeof(float) * kThreads / 32;
  }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    const DuplexArgs& args = p.args;
    const int terms = args.num_modalities - 1;
    int64_t index = block_index();
    const int rank_tile = static_cast<int>(index % p.rank_tiles);
    index /= p.rank_tiles;
    const int segment = p.first_segment + static_cast<int>(index % p.num_segments);
    if (segment == 0 && args.initial == nullptr) return;
    index /= p.num_segments;
    const int term = static_cast<int>(index % terms), view = static_cast<int>(index / terms % args.num_modalities);
    const int64_t head = index / terms / args.num_modalities;  // of all sequences
    const int64_t matrix = (head * args.num_modalities + modality_of_term(view, term)) * p.states.segments + segment;
    copy_rows<Element, kHeadDim, kRankTile, kThreads>(
        shared, thread_index(),
        weight_rows<Element>(p, Weight::kA2, view) + static_cast<int64_t>(rank_tile) * kRankTile * args.head_dim,
        args.head_dim, args.head_dim, [](int) { return true; });
    commit_copies();

    char* rows = shared + warp_index() * 16 * Products::kStride;
    char* slice = shared + kRankTile * Products::kStride;
    float out[1][kHeadDim / 8][4];
    float magnitude = 0.0f;
    Product::run(static_cast<const Element*>(p.states.before) + matrix * args.head_dim * args.head_dim, nullptr,
                 p.states.largest + matrix * args.head_dim, args.head_dim, rows, slice,
                 [&](int first, const float (&c)[1][Product::kSliceTiles][4]) {
#pragma unroll
                   for (int n = 0; n < Product::kSliceTiles; ++n) {
#pragma unroll
                     for (int i = 0; i < 4; ++i) {
                       out[0][first + n][i] = c[0][n][i];
                       magnitude = maximum(magnitude, fabsf(c[0][n][i]));
                     }
                   }
                 });
    float divisor = 1.0f;
    if (sizeof(Element) == 2) {
      float* magnitudes = reinterpret_cast<float*>(slice + Product::kSlice * Products::kStride);
      magnitude = warp_maximum(magnitude);
      if (lane_index() == 0) magnitudes[warp_index()] = magnitude;
      sync_threads();
      for (int w = 0; w < kThreads / 32; ++w) magnitude = maximum(magnitude, magnitudes[w]);
      if (magnitude > 0.0f) divisor = magnitude;
      if (thread_index() == 0) p.largest[block_index()] = magnitude;
    }
    const int g = lane_index() / 4, t = lane_index() % 4;
    sync_warp();  // every lane has read the weights, whose place the result takes
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
        Products::store_pair(rows + (h * 8 + g) * Products::kStride, n * 8 + 2 * t, out[0][n][2 * h] / divisor,
                             out[0][n][2 * h + 1] / divisor);
    sync_warp();
    Element* latent = static_cast<Element*>(p.latent) + block_index() * kRankTile * args.head_dim;
    store_rows<Element, kHeadDim, 16>(rows, 0, args.head_dim,
                                      [&](int own) { return latent + (warp_index() * 16 + own) * args.head_dim; });
  }
};

// A block owns the rows of one view. They are in shared memory as queries, then as x A2_a^T, then as queries again.
template <class Element, int kHeadDim>
class ViewsKernel {
  using Tile = GramTile<Element, kHeadDim>;
  using Products = Fragments<Element, kHeadDim>;
  using Reduced = Fragments<Element, kRankTile>;
  static constexpr int kStride = Products::kStride;

 public:
  static constexpr int kRows = Tile::kRows, kThreads = 2 * kRows;
  using Params = DuplexParams;

  static int64_t blocks(const Params& p) {
    return static_cast<int64_t>(p.args.num_sequences) * p.args.query_heads * p.row_blocks * p.args.num_modalities;
  }
  static size_t shared_bytes(const Params& p) {
    const int64_t rank_tiles = divide_up(p.args.rank, kRankTile);
    return static_cast<size_t>(kRows) * kStride + kStreamBytes + sizeof(int) * Tile::kKeys +
           sizeof(float) * kRows * static_cast<size_t>(p.args.num_modalities + 1) +
           static_cast<size_t>(rank_tiles * kRows) * Reduced::kStride;
  }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    ViewsKernel block(p, shared);
    block.run();
  }

 private:
  using Projection = RowProjection<Element, kHeadDim, kRows, false>;
  static constexpr size_t kTileBytes = static_cast<size_t>(kRankTile) * kStride;
  static constexpr size_t kStreamBytes = kTileBytes > Projection::kSharedBytes ? kTileBytes : Projection::kSharedBytes;

  MODA_EXT_DEVICE ViewsKernel(const Params& params, char* shared) : p(params), args(params.args), rows(shared) {
    int64_t index = block_index();
    view = static_cast<int>(index % args.num_modalities);
    index /= args.num_modalities;
    first_position = (p.first_block + static_cast<int>(index % p.row_blocks)) * kRows;
    index /= p.row_blocks;
    head = static_cast<int>(index % args.query_heads);
    sequence = batch_element(args, index / args.query_heads);
  }

  MODA_EXT_DEVICE int kv_head() const { return head / (args.query_heads / args.kv_heads); }
  MODA_EXT_DEVICE int first_query() const { return first_position - (sequence.num_keys - sequence.num_queries); }
  MODA_EXT_DEVICE bool has_row(int row) const {
    return first_query() + row >= 0 && first_query() + row < sequence.num_queries;
  }
  // Shared memory holds the rows, a stream of keys or of rank tiles, the modalities of the keys in it, scales, and what
  // is `reduced` to the rank.
  MODA_EXT_DEVICE char* stream() const { return rows + kRows * kStride; }
  MODA_EXT_DEVICE int* ids() const { return reinterpret_cast<int*>(stream() + kStreamBytes); }
  MODA_EXT_DEVICE char* warp_rows() const { return rows + warp_index() * 16 * kStride; }
  // Scales of a row by modality, divided by their largest magnitude, which comes after them; that of the view is 0.
  MODA_EXT_DEVICE float* scales_of(int row) const {
    return reinterpret_cast<float*>(ids() + Tile::kKeys) + row * (args.num_modalities + 1);
  }
  MODA_EXT_DEVICE char* warp_reduced(int rank_tile) const {
    return reinterpret_cast<char*>(scales_of(kRows)) + (rank_tile * kRows + warp_index() * 16) * Reduced::kStride;
  }

  MODA_EXT_DEVICE void run() {
    find_scales();
    copy_queries();
    reduce(Weight::kB2);
    set_zero(out);
    add_product(weight_rows<Element>(p, Weight::kA2, view), [](int, int) { return 1.0f; });
    store_rows_of_warp();
    set_zero(out);
    add_states();
    const uint32_t others = ((1u << args.num_modalities) - 1) & ~(1u << view);
    Projection::add_segment(args, p.states, sequence, sequence.batch, kv_head(), others, first_position, rows, stream(),
                            *this, out);
    scale_sums([&](int row) { return scales_of(row)[args.num_modalities]; });
    sync_threads();  // everyone is done with the rows
    copy_queries();
    reduce(Weight::kB1);
    add_product(weight_rows<Element>(p, Weight::kA1, view), [](int, int) { return 1.0f; });
    write();
  }

 public:
  // The weights of scores, see RowProjection.
  MODA_EXT_DEVICE void see(int column, int key) const {
    const int id = modality_of(args, sequence, key);
    ids()[column] = id < 0 ? view : id;
  }
  MODA_EXT_DEVICE float of(int row, int column) const { return scales_of(row)[ids()[column]]; }

 private:
  MODA_EXT_DEVICE void find_scales() {
    const int row = thread_index();
    if (row >= kRows) return;
    float* target = scales_of(row);
    float largest = 0.0f;
    const float* source =
        has_row(row) ? row_of<float>(args.row_scale, sequence, kv_head(), first_query() + row) : nullptr;
    const auto scale = [&](int m) { return source == nullptr || m == view ? 0.0f : source[m * args.row_scale.last]; };
    for (int m = 0; m < args.num_modalities; ++m) largest = maximum(largest, fabsf(scale(m)));
    for (int m = 0; m < args.num_modalities; ++m) target[m] = largest > 0.0f ? scale(m) / largest : 0.0f;
    target[args.num_modalities] = largest;
  }

  MODA_EXT_DEVICE void copy_queries() {
    copy_rows<Element, kHeadDim, kRows, kThreads, 1>(
        rows, thread_index(), row_of<Element>(args.query, sequence, head, first_query()), args.query.row, args.head_dim,
        [&](int row) { return has_row(row); });
    commit_copies();
  }

  // kRankTile rows into the stream.
  MODA_EXT_DEVICE void bring(const Element* source) {
    sync_threads();  // everyone is done with the buffer
    copy_rows<Element, kHeadDim, kRankTile, kThreads, 1>(stream(), thread_index(), source, args.head_dim, args.head_dim,
                                                         [](int) { return true; });
    commit_copies();
    wait_copies<0>();
    sync_threads();
  }

  // reduced = rows W^T, rounded.
  MODA_EXT_DEVICE void reduce(Weight weight) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const Element* source = weight_rows<Element>(p, weight, view);
#pragma unroll 1
    for (int tile = 0; tile < p.rank_tiles; ++tile) {
      bring(source + static_cast<int64_t>(tile) * kRankTile * args.head_dim);
      float c[1][kRankTile / 8][4];
      set_zero(c);
      Products::multiply_rows(c, as_new(warp_rows()), as_new(stream()));
      char* target = warp_reduced(tile);
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int n = 0; n < kRankTile / 8; ++n)
          Reduced::store_pair(target + (h * 8 + g) * Reduced::kStride, n * 8 + 2 * t, c[0][n][2 * h],
                              c[0][n][2 * h + 1]);
    }
    sync_warp();
  }

  // out += reduced S, rows of reduced times factor_of(row of the block, rank tile).
  template <class FactorOf>
  MODA_EXT_DEVICE void add_product(const Element* source, const FactorOf& factor_of) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 1
    for (int tile = 0; tile < p.rank_tiles; ++tile) {
      bring(source + static_cast<int64_t>(tile) * kRankTile * args.head_dim);
      float x[1][kRankTile / 8][4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float factor = factor_of(warp_index() * 16 + h * 8 + g, tile);
#pragma unroll
        for (int n = 0; n < kRankTile / 8; ++n) {
          float low, high;
          Reduced::load_pair(warp_reduced(tile) + (h * 8 + g) * Reduced::kStride, n * 8 + 2 * t, low, high);
          x[0][n][2 * h] = low * factor;
          x[0][n][2 * h + 1] = high * factor;
        }
      }
      Products::multiply_registers(out, x, as_new(stream()));
    }
  }

  template <class FactorOf>
  MODA_EXT_DEVICE void scale_sums(const FactorOf& factor_of) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float factor = factor_of(warp_index() * 16 + h * 8 + lane_index() / 4);
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        out[0][n][2 * h] *= factor;
        out[0][n][2 * h + 1] *= factor;
      }
    }
  }

  // What the segments before, and the initial Grams, hold for the rows. 16-bit states come divided by the largest
  // magnitude of all.
  MODA_EXT_DEVICE void add_states() {
    const int segment = first_position / kSegment;
    if (segment == 0 && args.initial == nullptr) return;
    constexpr bool kDivided = sizeof(Element) == 2;
    const auto first_tile = [&](int term) { return latent_index(p, sequence.batch, kv_head(), view, term, segment); };
    float largest = 0.0f;
    for (int term = 0; kDivided && term < args.num_modalities - 1; ++term)
      for (int tile = 0; tile < p.rank_tiles; ++tile) largest = maximum(largest, p.largest[first_tile(term) + tile]);
    if (kDivided && largest == 0.0f) return;
    for (int term = 0; term < args.num_modalities - 1; ++term) {
      const int64_t first = first_tile(term);
      const int modality = modality_of_term(view, term);
      add_product(static_cast<const Element*>(p.latent) + first * kRankTile * args.head_dim, [&](int row, int tile) {
        return scales_of(row)[modality] * (kDivided ? p.largest[first + tile] / largest : 1.0f);
      });
    }
    if (kDivided) scale_sums([&](int) { return largest; });
  }

  MODA_EXT_DEVICE void store_rows_of_warp() {
    const int g = lane_index() / 4, t = lane_index() % 4;
    sync_warp();  // every lane has read the rows that were there
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
        Products::store_pair(warp_rows() + (h * 8 + g) * kStride, n * 8 + 2 * t, out[0][n][2 * h],
                             out[0][n][2 * h + 1]);
    sync_warp();
  }

  MODA_EXT_DEVICE void write() {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        float low, high;
        Products::load_pair(warp_rows() + (h * 8 + g) * kStride, n * 8 + 2 * t, low, high);
        out[0][n][2 * h] += low;
        out[0][n][2 * h + 1] += high;
      }
    store_rows_of_warp();
    store_rows<Element, kHeadDim, 16>(warp_rows(), 0, args.head_dim, [&](int own) -> Element* {
      const int row = warp_index() * 16 + own;
      if (!has_row(row)) return nullptr;
      return row_of<Element>(args.views, sequence, head, first_query() + row) + view * args.views.view;
    });
  }

  const Params& p;
  const DuplexArgs& args;
  int view, head, first_position;
  Sequence sequence;
  char* rows;
  float out[1][kHeadDim / 8][4];
};

template <class Element, int kHeadDim>
struct IndicatorKernel {
  using Params = DuplexParams;
  using Products = Fragments<Element, kHeadDim>;
  static constexpr int kRows = GramTile<Element, kHeadDim>::kRows, kThreads = 2 * kRows;
  using Projection = RowProjection<Element, kHeadDim, kRows, true>;

  static int64_t blocks(const Params& p) { return ViewsKernel<Element, kHeadDim>::blocks(p); }
  static size_t shared_bytes(const Params&) {
    return static_cast<size_t>(kRows) * Products::kStride + Projection::kSharedBytes;
  }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    const DuplexArgs& args = p.args;
    const ModalityRows at(p, kRows);
    const auto has_row = [&](int row) { return at.has_row(row); };
    copy_rows<Element, kHeadDim, kRows, kThreads>(shared, thread_index(),
                                                  row_of<Element>(args.query, at.sequence, at.head, at.first_query),
                                                  args.query.row, args.head_dim, has_row);
    commit_copies();
    typename Projection::Sums out;
    Projection::run(args, p.states, at.sequence, at.sequence_index, at.kv_head, at.modality, at.first_position, shared,
                    shared + kRows * Products::kStride, out);

    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_index() * 16 + h * 8 + g;
      float form = 0.0f, square = 0.0f;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        float low, high;
        Products::load_pair(shared + row * Products::kStride, n * 8 + 2 * t, low, high);
        form += out[0][n][2 * h] * low + out[0][n][2 * h + 1] * high;
        square += low * low + high * high;
      }
      form = quad_sum(form);
      square = quad_sum(square);
      if (t != 0 || !has_row(row)) continue;
      row_of<float>(args.indicator, at.sequence, at.head, at.first_query + row)[at.modality * args.indicator.last] =
          square > 0.0f ? form / square : 0.0f;
    }
  }
};

template <class Element, int kHeadDim>
void duplex_views(const DuplexArgs& args, void* workspace, void* stream) {
  using Kernel = ViewsKernel<Element, kHeadDim>;
  const DuplexPlan plan = plan_duplex<Element, kHeadDim>(args);
  const bool with_indicator = args.indicator.data != nullptr;
  char* memory = static_cast<char*>(workspace);
  DuplexParams params{};
  params.args = args;
  params.states = make_states<Element, kHeadDim>(args, with_indicator, args.gram, workspace, stream);
  if (args.num_queries == 0) return;
  params.rank_tiles = plan.rank_tiles;
  params.first_segment = plan.first_segment;
  params.num_segments = plan.num_segments;
  params.first_block = (args.num_keys - args.num_queries) / Kernel::kRows;
  params.row_blocks = static_cast<int>(divide_up(args.num_keys, Kernel::kRows)) - params.first_block;
  params.weights = memory + plan.weights_at;
  params.latent = memory + plan.latent_at;
  params.largest = reinterpret_cast<float*>(memory + plan.largest_at);
  launch<PackWeights<Element>>(params, stream);
  launch<LatentKernel<Element, kHeadDim>>(params, stream);
  launch<Kernel>(params, stream);
  if (with_indicator) launch<IndicatorKernel<Element, kHeadDim>>(params, stream);
}

template <int kHeadDim>
int64_t DuplexKernels<kHeadDim>::workspace(const DuplexArgs& args, Storage storage) {
  return storage == Storage::kFloat32 ? plan_duplex<float, kHeadDim>(args).bytes
                                      : plan_duplex<BFloat16, kHeadDim>(args).bytes;
}
template <int kHeadDim>
void DuplexKernels<kHeadDim>::run(const DuplexArgs& args, Storage storage, void* workspace, void* stream) {
  if (storage == Storage::kBFloat16) return duplex_views<BFloat16, kHeadDim>(args, workspace, stream);
  if (storage == Storage::kFloat16) return duplex_views<Float16, kHeadDim>(args, workspace, stream);
  duplex_views<float, kHeadDim>(args, workspace, stream);
}

}  // namespace cuda
}  // namespace moda_ext
