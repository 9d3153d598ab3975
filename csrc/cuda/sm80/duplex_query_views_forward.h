// Query views of the duplex aligner in causal scope (docs/mathematics.md section 1, fusion "concat") for compute capability 8.0 and
// later, as cpu/kernels/vector/duplex_query_views_forward.h:
//
//   view_{a,i} = q_i + y A1_a^T + sum_{m != a} s_{i,m} x A2_a^T G^m_i     y = q_i B1_a^T, x = q_i B2_a^T
//   e_{i,m}    = q_i G^m_i q_i^T / |q_i|^2
//
// Segments, their Grams and the states before them are those of causal_gram_projection_forward.h. LatentKernel
// multiplies each state by the weights once, A2_a^T G^m, rank x D numbers, and that is what rows meet; the keys of
// their own segment they meet as x A2_a^T, all modalities in one pass. Only e needs the states themselves. Cost: a row
// and view take about 2 kSegment D multiply-adds in the segment, 4 rank D for the weights and rank D for each other
// modality. Beside the states, memory is rank D numbers for each segment, key head and pair of modalities.
//
// Numbers: weights, x, y and x A2_a^T are rounded to the storage type, and have to fit. Rows divide their scales by the
// largest, so that 1 / count does not take scores below float16.
#pragma once

#include "cuda/sm80/causal_gram_projection_forward.h"
#include "cuda/sm80/duplex_query_views_low_rank.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {

struct DuplexQueryViewsParams {
  DuplexQueryViewsForwardArgs args;
  States states;
  PackedWeights weights;
  int first_segment, num_segments;  // those that rows lie in
  int first_block, row_blocks;      // of kRows positions
  // (batch, kv head, view, other modality in ascending order, segment, rank tile, kRankTile, D). 16-bit numbers are
  // divided by the tile's largest magnitude.
  void* latent;
  float* largest;

  int num_terms() const { return args.num_modalities - 1; }
};

// Memory of the parts of DuplexQueryViewsParams; plan_states describes what comes before.
struct DuplexQueryViewsPlan {
  int first_segment, num_segments;
  int64_t weights_at, latent_at, largest_at, bytes;
};

template <class Element, int kHeadDim>
DuplexQueryViewsPlan plan_duplex_query_views(const DuplexQueryViewsForwardArgs& args) {
  DuplexQueryViewsPlan plan;
  plan.first_segment = (args.num_keys - args.num_queries) / kSegment;
  plan.num_segments = static_cast<int>(divide_up(args.num_keys, kSegment)) - plan.first_segment;
  const int64_t tiles = args.num_grams() * (args.num_modalities - 1) * plan.num_segments * count_rank_tiles(args);
  const int64_t element = sizeof(Element);
  plan.weights_at = plan_states<Element, kHeadDim>(args, args.indicator.data != nullptr).bytes;
  plan.latent_at = plan.weights_at + round_up(element * PackedWeights::numbers(args));
  plan.largest_at = plan.latent_at + round_up(element * tiles * kRankTile * args.head_dim);
  plan.bytes = plan.largest_at + round_up(4 * tiles);
  return plan;
}

// First of the rank tiles of the states that rows of a segment meet, term by term.
MODA_EXT_DEVICE int64_t latent_index(const DuplexQueryViewsParams& p, int64_t sequence_index, int kv_head, int view,
                                     int term, int segment) {
  const int64_t matrix =
      ((sequence_index * p.args.kv_heads + kv_head) * p.args.num_modalities + view) * (p.args.num_modalities - 1) +
      term;
  return (matrix * p.num_segments + segment - p.first_segment) * p.weights.rank_tiles;
}

MODA_EXT_DEVICE int modality_of_term(int view, int term) { return term < view ? term : term + 1; }

// A rank tile of A2_a^T G^m for the G^m before a segment.
template <class Element, int kHeadDim>
struct LatentKernel {
  using Params = DuplexQueryViewsParams;
  using Products = Fragments<Element, kHeadDim>;
  static constexpr int kThreads = 2 * kRankTile;
  using Product = SymmetricProduct<Element, kHeadDim, kThreads>;

  static int64_t blocks(const Params& p) {
    return p.args.num_grams() * p.num_terms() * p.num_segments * p.weights.rank_tiles;
  }
  static size_t shared_bytes(const Params&) {
    return static_cast<size_t>(kRankTile + Product::kSlice) * Products::kStride + sizeof(float) * kThreads / 32;
  }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    const DuplexQueryViewsForwardArgs& args = p.args;
    const int terms = args.num_modalities - 1;
    int64_t index = block_index();
    const int rank_tile = static_cast<int>(index % p.weights.rank_tiles);
    index /= p.weights.rank_tiles;
    const int segment = p.first_segment + static_cast<int>(index % p.num_segments);
    if (segment == 0 && args.initial == nullptr) return;
    index /= p.num_segments;
    const int term = static_cast<int>(index % terms), view = static_cast<int>(index / terms % args.num_modalities);
    const int64_t head = index / terms / args.num_modalities;  // of all sequences
    const int64_t matrix = (head * args.num_modalities + modality_of_term(view, term)) * p.states.segments + segment;
    copy_rows<Element, kHeadDim, kRankTile, kThreads>(shared, thread_index(),
                                                      weight_rows<Element>(args, p.weights, Weight::kA2, view) +
                                                          static_cast<int64_t>(rank_tile) * kRankTile * args.head_dim,
                                                      args.head_dim, args.head_dim, [](int) { return true; });
    commit_copies();

    char* rows = shared + warp_index() * 16 * Products::kStride;
    char* slice = shared + kRankTile * Products::kStride;
    float out[1][kHeadDim / 8][4];
    float magnitude = 0.0f;
    Product::run(static_cast<const Element*>(p.states.before) + matrix * args.head_dim * args.head_dim, nullptr,
                 p.states.largest + matrix * args.head_dim, args.head_dim, rows, slice,
                 [&](int first, const float (&c)[1][Product::kSliceFragments][4]) {
#pragma unroll
                   for (int n = 0; n < Product::kSliceFragments; ++n) {
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

 public:
  static constexpr int kRows = Tile::kRows, kThreads = 2 * kRows;
  using Params = DuplexQueryViewsParams;

  static int64_t blocks(const Params& p) {
    return static_cast<int64_t>(p.args.num_sequences) * p.args.query_heads * p.row_blocks * p.args.num_modalities;
  }
  static size_t shared_bytes(const Params& p) {
    return LowRank::shared_bytes(p.args, kKept + kKeptOfModality * p.args.num_modalities);
  }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    ViewsKernel block(p, shared);
    block.run();
  }

 private:
  using Projection = RowProjection<Element, kHeadDim, kRows, false>;
  using LowRank = LowRankRows<Element, kHeadDim, kRows, 1, Projection::kSharedBytes>;  // keys stream by as weights do

  // Bytes kept behind the stream: modalities of the keys in it, then scales.
  static constexpr int kKept = 4 * (Tile::kKeys + kRows), kKeptOfModality = 4 * kRows;

  MODA_EXT_DEVICE ViewsKernel(const Params& params, char* shared)
      : p(params), args(params.args), rows(args, p.weights, shared, kKept + kKeptOfModality * args.num_modalities) {
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
  MODA_EXT_DEVICE int* ids() const { return reinterpret_cast<int*>(rows.kept()); }
  // Scales of a row by modality, divided by their largest magnitude, which comes after them; that of the view is 0.
  MODA_EXT_DEVICE float* scales_of(int row) const {
    return reinterpret_cast<float*>(ids() + Tile::kKeys) + row * (args.num_modalities + 1);
  }

  MODA_EXT_DEVICE void run() {
    find_scales();
    copy_queries();
    rows.reduce(rows.weight(Weight::kB2, view));
    set_zero(out);
    rows.add_product(rows.weight(Weight::kA2, view), out);
    rows.take(out);
    set_zero(out);
    add_states();
    const uint32_t others = ((1u << args.num_modalities) - 1) & ~(1u << view);
    Projection::add_segment(args, p.states, sequence, sequence.batch, kv_head(), others, first_position, rows.rows,
                            rows.stream(), *this, out);
    scale_sums([&](int row) { return scales_of(row)[args.num_modalities]; });
    sync_threads();  // everyone is done with the rows
    copy_queries();
    rows.reduce(rows.weight(Weight::kB1, view));
    rows.add_product(rows.weight(Weight::kA1, view), out);
    rows.add_rows([](int) { return 1.0f; }, out);
    rows.take(out);
    rows.store([&](int row) -> Element* {
      if (!has_row(row)) return nullptr;
      return row_of<Element>(args.views, sequence.batch, head, first_query() + row) + view * args.views.view;
    });
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
        has_row(row) ? row_of<float>(args.row_scale, sequence.batch, kv_head(), first_query() + row) : nullptr;
    const auto scale = [&](int m) { return source == nullptr || m == view ? 0.0f : source[m * args.row_scale.last]; };
    for (int m = 0; m < args.num_modalities; ++m) largest = maximum(largest, fabsf(scale(m)));
    for (int m = 0; m < args.num_modalities; ++m) target[m] = largest > 0.0f ? scale(m) / largest : 0.0f;
    target[args.num_modalities] = largest;
  }

  MODA_EXT_DEVICE void copy_queries() {
    rows.copy(row_of<Element>(args.query, sequence.batch, head, first_query()), args.query.row,
              [&](int row) { return has_row(row); });
  }

  template <class FactorOf>
  MODA_EXT_DEVICE void scale_sums(const FactorOf& factor_of) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float factor = factor_of(LowRank::own_row(h));
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
      for (int tile = 0; tile < p.weights.rank_tiles; ++tile)
        largest = maximum(largest, p.largest[first_tile(term) + tile]);
    if (kDivided && largest == 0.0f) return;
    for (int term = 0; term < args.num_modalities - 1; ++term) {
      const int64_t first = first_tile(term);
      const int modality = modality_of_term(view, term);
      rows.add_product(
          static_cast<const Element*>(p.latent) + first * kRankTile * args.head_dim,
          [&](int row, int tile) {
            return scales_of(row)[modality] * (kDivided ? p.largest[first + tile] / largest : 1.0f);
          },
          out);
    }
    if (kDivided) scale_sums([&](int) { return largest; });
  }

  const Params& p;
  const DuplexQueryViewsForwardArgs& args;
  const LowRank rows;
  int view, head, first_position;
  Sequence sequence;
  typename LowRank::Sums out;
};

template <class Element, int kHeadDim>
struct IndicatorKernel {
  using Params = DuplexQueryViewsParams;
  using Products = Fragments<Element, kHeadDim>;
  static constexpr int kRows = GramTile<Element, kHeadDim>::kRows, kThreads = 2 * kRows;
  using Projection = RowProjection<Element, kHeadDim, kRows, true>;

  static int64_t blocks(const Params& p) { return ViewsKernel<Element, kHeadDim>::blocks(p); }
  static size_t shared_bytes(const Params&) {
    return static_cast<size_t>(kRows) * Products::kStride + Projection::kSharedBytes;
  }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    const DuplexQueryViewsForwardArgs& args = p.args;
    const ModalityRows at(p, kRows);
    const auto has_row = [&](int row) { return at.has_row(row); };
    copy_rows<Element, kHeadDim, kRows, kThreads>(
        shared, thread_index(), row_of<Element>(args.query, at.sequence.batch, at.head, at.first_query), args.query.row,
        args.head_dim, has_row);
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
      row_of<float>(args.indicator, at.sequence.batch, at.head,
                    at.first_query + row)[at.modality * args.indicator.last] = square > 0.0f ? form / square : 0.0f;
    }
  }
};

template <class Element, int kHeadDim>
void duplex_query_views(const DuplexQueryViewsForwardArgs& args, void* workspace, void* stream) {
  using Kernel = ViewsKernel<Element, kHeadDim>;
  const DuplexQueryViewsPlan plan = plan_duplex_query_views<Element, kHeadDim>(args);
  const bool with_indicator = args.indicator.data != nullptr;
  char* memory = static_cast<char*>(workspace);
  DuplexQueryViewsParams params{};
  params.args = args;
  params.states = make_states<Element, kHeadDim>(args, with_indicator, args.gram, workspace, stream);
  if (args.num_queries == 0) return;
  params.first_segment = plan.first_segment;
  params.num_segments = plan.num_segments;
  params.first_block = (args.num_keys - args.num_queries) / Kernel::kRows;
  params.row_blocks = static_cast<int>(divide_up(args.num_keys, Kernel::kRows)) - params.first_block;
  params.weights = {memory + plan.weights_at, count_rank_tiles(args), 1};
  params.latent = memory + plan.latent_at;
  params.largest = reinterpret_cast<float*>(memory + plan.largest_at);
  launch<PackWeights<Element>>({args, params.weights}, stream);
  launch<LatentKernel<Element, kHeadDim>>(params, stream);
  launch<Kernel>(params, stream);
  if (with_indicator) launch<IndicatorKernel<Element, kHeadDim>>(params, stream);
}

template <int kHeadDim>
int64_t DuplexQueryViewsForwardKernels<kHeadDim>::workspace(const DuplexQueryViewsForwardArgs& args, Storage storage) {
  return storage == Storage::kFloat32 ? plan_duplex_query_views<float, kHeadDim>(args).bytes
                                      : plan_duplex_query_views<BFloat16, kHeadDim>(args).bytes;
}
template <int kHeadDim>
void DuplexQueryViewsForwardKernels<kHeadDim>::run(const DuplexQueryViewsForwardArgs& args, Storage storage,
                                                   void* workspace, void* stream) {
  if (storage == Storage::kBFloat16) return duplex_query_views<BFloat16, kHeadDim>(args, workspace, stream);
  if (storage == Storage::kFloat16) return duplex_query_views<Float16, kHeadDim>(args, workspace, stream);
  duplex_query_views<float, kHeadDim>(args, workspace, stream);
}

}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
