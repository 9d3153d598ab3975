// Backward pass of duplex_query_views_forward.h for compute capability 8.0 and later, as
// cpu/kernels/vector/duplex_query_views_backward.h. With d = dview_a, h_im = de_im / |q_i|^2 and w = x A2_a^T, what a loss
// feels of the Grams are bilinear forms of rows:
//
//   sum_{m != a} s_{i,m} w_i G^m_i d_i^T for every view, and sum_m h_{i,m} q_i G^m_i q_i^T for the indicator
//
// which causal_gram_projection_backward.h differentiates. The rest is of low rank, with v = sum_{m != a} s_{i,m} d_i
// G^m_i, the gradient of w, and u likewise of the indicator's rows:
//
//   dy = d A1    dx = v A2    dq = sum_a (d + dy B1 + dx B2) + 2 u - 2 (sum_m h_m e_m) q
//   dA1 = sum d^T y    dB1 = sum dy^T q    dA2 = sum v^T x    dB2 = sum dx^T q
//
// Kernels, beside those of the forms:
//
//   MoveKernel            x, y and w of every row and view
//   FormScaleKernel       h
//   QueryGradientKernel   dx, dy and dq
//   WeightGradientKernel  the gradients of the weights for stretches of the rows, which ReduceWeights adds up in order
//
// The forms are met with whole D x D Grams, which all views share, and not through rank x D states for each pair of
// modalities, as the forward pass has them: D / rank times the work for rows of earlier segments, but for two
// modalities and D = 128 still less than a row's own segment takes. Memory: w and v are as large as the views in
// float32.
//
// Numbers: w and v have to fit in the storage type. Results in float32 are good to it: what they are made of is exact
// or comes in two parts.
#pragma once

#include "cuda/sm80/causal_gram_projection_backward.h"
#include "cuda/sm80/duplex_query_views_low_rank.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {

// View M is the indicator: a set for every query head, because its scales are those of one head. Before it come the
// views in one set, whose scales are of the key head.
struct DuplexQueryViewsForms : BilinearForms {
  DuplexQueryViewsBackwardArgs args;
  PackedWeights weights;
  int row_blocks;            // of queries of a head
  Output moved, grad_moved;  // views (part, view): w and v; then, in grad_moved alone, u
  Output factors;            // views (part, Weight, view): of each row what enters that gradient, padded to rank tiles
  Output form_scale;         // h, as the indicator

  static constexpr bool kExact = true;  // the gradients of scales and initial Grams are float32

  template <class Element>
  MODA_EXT_DEVICE int parts(int form) const {
    return view_of(form) < args.num_modalities ? kExactParts<Element> : 1;
  }
  template <class Element>
  MODA_EXT_DEVICE int indicator_view() const {
    return kExactParts<Element> * args.num_modalities;
  }

  MODA_EXT_DEVICE int group() const { return args.query_heads / args.kv_heads; }
  MODA_EXT_DEVICE int head_of(int kv_head, int form) const { return kv_head * group() + form % group(); }
  MODA_EXT_DEVICE int view_of(int form) const { return form / group(); }

  MODA_EXT_DEVICE int sets() const { return args.grad_indicator.data == nullptr ? 1 : 1 + group(); }
  MODA_EXT_DEVICE int first_form(int set) const { return set == 0 ? 0 : args.num_modalities * group() + set - 1; }
  MODA_EXT_DEVICE bool meets(int form, int modality) const { return view_of(form) != modality; }
  static MODA_EXT_DEVICE bool wants_scale(int set) { return set == 0; }
  MODA_EXT_DEVICE float scale(const Sequence& sequence, int kv_head, int set, int query, int modality) const {
    if (set == 0) return scale_of(args, sequence, kv_head, query, modality);
    return row_of<float>(form_scale, sequence.batch, kv_head * group() + set - 1, query)[modality];
  }
  template <class Element>
  MODA_EXT_DEVICE FormOperand<Element> left(const Sequence& sequence, int kv_head, int form, int part,
                                            int query) const {
    const int head = head_of(kv_head, form), view = view_of(form);
    if (view == args.num_modalities) return {row_of<Element>(args.query, sequence.batch, head, query), args.query.row};
    return {row_of<Element>(moved, sequence.batch, head, query) + (part * args.num_modalities + view) * moved.view,
            moved.row};
  }
  template <class Element>
  MODA_EXT_DEVICE FormOperand<Element> right(const Sequence& sequence, int kv_head, int form, int query, int) const {
    const int head = head_of(kv_head, form), view = view_of(form);
    if (view == args.num_modalities) return {row_of<Element>(args.query, sequence.batch, head, query), args.query.row};
    return {row_of<Element>(args.grad_views, sequence.batch, head, query) + view * args.grad_views.view,
            args.grad_views.row};
  }
  template <class Element>
  MODA_EXT_DEVICE Element* grad_left(const Sequence& sequence, int kv_head, int form, int part, int query) const {
    const int view = view_of(form), modalities = args.num_modalities;
    const int64_t at = view < modalities ? part * modalities + view : indicator_view<Element>();
    return row_of<Element>(grad_moved, sequence.batch, head_of(kv_head, form), query) + at * grad_moved.view;
  }

  template <class Element>
  MODA_EXT_DEVICE Element* factor_row(const Sequence& sequence, int head, int query, int part, Weight weight,
                                      int view) const {
    const int64_t matrix = (part * kWeights + static_cast<int64_t>(weight)) * args.num_modalities + view;
    return row_of<Element>(factors, sequence.batch, head, query) + matrix * factors.view;
  }
};

// The place of a block in a grid over the queries of every head.
template <int kRows>
struct QueryBlock {
  int head, first_query;
  Sequence sequence;

  MODA_EXT_DEVICE QueryBlock(const CausalGramArgs& args, int row_blocks, int64_t index) {
    first_query = static_cast<int>(index % row_blocks) * kRows;
    index /= row_blocks;
    head = static_cast<int>(index % args.query_heads);
    sequence = batch_element(args, index / args.query_heads);
  }
  MODA_EXT_DEVICE bool has_row(int row) const { return first_query + row < sequence.num_queries; }
};

inline int64_t count_query_blocks(const CausalGramArgs& args, int rows) {
  return static_cast<int64_t>(args.num_sequences) * args.query_heads * divide_up(args.num_queries, rows);
}

template <class Element, int kHeadDim>
struct MoveKernel {
  using Params = DuplexQueryViewsForms;
  static constexpr int kRows = GramTile<Element, kHeadDim>::kRows, kThreads = 2 * kRows;
  using LowRank = LowRankRows<Element, kHeadDim, kRows, kExactParts<Element>>;

  static int64_t blocks(const Params& p) { return count_query_blocks(p.args, kRows) * p.args.num_modalities; }
  static size_t shared_bytes(const Params& p) { return LowRank::shared_bytes(p.args); }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    const DuplexQueryViewsBackwardArgs& args = p.args;
    const int view = static_cast<int>(block_index() % args.num_modalities);
    const QueryBlock<kRows> at(args, p.row_blocks, block_index() / args.num_modalities);
    const LowRank rows(args, p.weights, shared);
    const auto store_factor = [&](Weight weight) {
      rows.store_reduced([&](int row, int part) -> Element* {
        if (!at.has_row(row)) return nullptr;
        return p.factor_row<Element>(at.sequence, at.head, at.first_query + row, part, weight, view);
      });
    };
    rows.copy(row_of<Element>(args.query, at.sequence.batch, at.head, at.first_query), args.query.row,
              [&](int row) { return at.has_row(row); });
    rows.reduce(rows.weight(Weight::kB1, view));
    store_factor(Weight::kA1);
    rows.reduce(rows.weight(Weight::kB2, view));
    store_factor(Weight::kA2);
    typename LowRank::Sums out;
    set_zero(out);
    rows.add_product(rows.weight(Weight::kA2, view), out);
    for (int part = 0; part < kExactParts<Element>; ++part) {
      rows.take(out);
      rows.store([&](int row) -> Element* {
        if (!at.has_row(row)) return nullptr;
        return row_of<Element>(p.moved, at.sequence.batch, at.head, at.first_query + row) +
               (part * args.num_modalities + view) * p.moved.view;
      });
    }
  }
};

// A warp has a row.
template <class Element>
struct FormScaleKernel {
  using Params = DuplexQueryViewsForms;
  static constexpr int kThreads = 128;
  static int64_t blocks(const Params& p) { return divide_up(p.args.num_rows() * 32, kThreads); }
  static size_t shared_bytes(const Params&) { return 0; }

  static MODA_EXT_DEVICE void run(const Params& p, char*) {
    const DuplexQueryViewsBackwardArgs& args = p.args;
    const int64_t index = block_index() * (kThreads / 32) + warp_index();
    const int query = static_cast<int>(index % args.num_queries);
    const int head = static_cast<int>(index / args.num_queries % args.query_heads);
    const int64_t sequence_index = index / args.num_queries / args.query_heads;
    if (sequence_index >= args.num_sequences) return;
    const Sequence sequence = batch_element(args, sequence_index);
    const Element* row = row_of<Element>(args.query, sequence.batch, head, query);
    float square = 0.0f;
    for (int d = lane_index(); d < args.head_dim; d += 32) square += to_float(row[d]) * to_float(row[d]);
    square = warp_sum(square);
    const int m = lane_index();
    if (m >= args.num_modalities) return;
    const float grad = row_of<float>(args.grad_indicator, sequence.batch, head, query)[m * args.grad_indicator.last];
    row_of<float>(p.form_scale, sequence.batch, head, query)[m] = square > 0.0f ? grad / square : 0.0f;
  }
};

// A block owns the queries of one head; d, v and at last u and q of them take turns in shared memory.
template <class Element, int kHeadDim>
class QueryGradientKernel {
 public:
  using Params = DuplexQueryViewsForms;
  static constexpr int kRows = GramTile<Element, kHeadDim>::kRows, kThreads = 2 * kRows;

  static int64_t blocks(const Params& p) { return count_query_blocks(p.args, kRows); }
  static size_t shared_bytes(const Params& p) { return LowRank::shared_bytes(p.args); }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    QueryGradientKernel block(p, shared);
    block.run();
  }

 private:
  using LowRank = LowRankRows<Element, kHeadDim, kRows, kExactParts<Element>>;

  MODA_EXT_DEVICE QueryGradientKernel(const Params& params, char* shared)
      : p(params), args(params.args), at(args, p.row_blocks, block_index()), rows(args, p.weights, shared) {}

  MODA_EXT_DEVICE void run() {
    set_zero(sums);
    for (int view = 0; view < args.num_modalities; ++view) {
      copy(row_of<Element>(args.grad_views, at.sequence.batch, at.head, at.first_query) + view * args.grad_views.view,
           args.grad_views.row);
      rows.reduce(rows.weight(Weight::kA1, view));
      rows.add_rows([](int) { return 1.0f; }, sums);
      add_reduced(Weight::kB1, view);
      for (int part = 0; part < kExactParts<Element>; ++part) {
        copy(grad_moved(part * args.num_modalities + view), p.grad_moved.row);
        rows.reduce(rows.weight(Weight::kA2, view), part > 0);
      }
      add_reduced(Weight::kB2, view);
    }
    if (args.grad_indicator.data != nullptr) add_indicator();
    rows.take(sums);
    rows.store([&](int row) -> Element* {
      if (!at.has_row(row)) return nullptr;
      return row_of<Element>(args.grad_query, at.sequence.batch, at.head, at.first_query + row);
    });
  }

  MODA_EXT_DEVICE const Element* grad_moved(int view) const {
    return row_of<Element>(p.grad_moved, at.sequence.batch, at.head, at.first_query) + view * p.grad_moved.view;
  }

  MODA_EXT_DEVICE void copy(const Element* first, int64_t row_stride) const {
    sync_threads();  // everyone is done with the rows
    rows.copy(first, row_stride, [&](int row) { return at.has_row(row); });
  }

  // sums += reduced B. What is reduced enters the gradient of B.
  MODA_EXT_DEVICE void add_reduced(Weight up, int view) {
    rows.store_reduced([&](int row, int part) -> Element* {
      if (!at.has_row(row)) return nullptr;
      return p.factor_row<Element>(at.sequence, at.head, at.first_query + row, part, up, view);
    });
    rows.add_product(rows.weight(up, view), sums);
  }

  MODA_EXT_DEVICE void add_indicator() {
    copy(grad_moved(p.indicator_view<Element>()), p.grad_moved.row);
    wait_copies<0>();
    sync_threads();
    rows.add_rows([](int) { return 2.0f; }, sums);
    copy(row_of<Element>(args.query, at.sequence.batch, at.head, at.first_query), args.query.row);
    wait_copies<0>();
    sync_threads();
    rows.add_rows(
        [&](int row) {
          if (!at.has_row(row)) return 0.0f;
          const int query = at.first_query + row;
          const float* scale = row_of<float>(p.form_scale, at.sequence.batch, at.head, query);
          const float* indicator = row_of<float>(args.indicator, at.sequence.batch, at.head, query);
          float along = 0.0f;
          for (int m = 0; m < args.num_modalities; ++m) along += scale[m] * indicator[m * args.indicator.last];
          return -2.0f * along;
        },
        sums);
  }

  const Params& p;
  const DuplexQueryViewsBackwardArgs& args;
  const QueryBlock<kRows> at;
  const LowRank rows;
  typename LowRank::Sums sums;
};

struct WeightGradientParams {
  DuplexQueryViewsForms forms;
  int pieces;
  int64_t tiles_per_piece;  // of kRows queries of a head
  float* parts;             // (piece, packed weights)
};

// A block owns a rank tile of one weight's gradient over a piece of the rows: a warp has 16 ranks and half of the
// columns.
template <class Element, int kHeadDim>
struct WeightGradientKernel {
  using Params = WeightGradientParams;
  using Products = Fragments<Element, kHeadDim>;
  static constexpr int kRows = GramTile<Element, kHeadDim>::kRows, kThreads = 128;
  static constexpr int kFactorStride = kRowStride<Element, kRankTile>, kColumns = kHeadDim / 2;
  static constexpr int kParts = kExactParts<Element>;

  static int64_t blocks(const Params& p) {
    return static_cast<int64_t>(kWeights) * p.forms.args.num_modalities * p.forms.weights.rank_tiles * p.pieces;
  }
  static size_t shared_bytes(const Params&) {
    return static_cast<size_t>(kRows) * (Products::kStride + kParts * kFactorStride);
  }

  static MODA_EXT_DEVICE void run(const Params& params, char* shared) {
    const DuplexQueryViewsForms& p = params.forms;
    const DuplexQueryViewsBackwardArgs& args = p.args;
    int64_t index = block_index();
    float* part = params.parts + index * kRankTile * args.head_dim;
    const int rank_tile = static_cast<int>(index % p.weights.rank_tiles);
    index /= p.weights.rank_tiles;
    const int view = static_cast<int>(index % args.num_modalities);
    const Weight weight = static_cast<Weight>(index / args.num_modalities % kWeights);
    const int64_t first_tile = index / args.num_modalities / kWeights * params.tiles_per_piece;
    const int64_t tiles = static_cast<int64_t>(args.num_sequences) * args.query_heads * p.row_blocks;
    char* factors = shared + kRows * Products::kStride;
    const int first_rank = warp_index() % 2 * 16, first_column = warp_index() / 2 * kColumns;

    float sum[1][kColumns / 8][4];
    set_zero(sum);
    for (int64_t tile = first_tile; tile < first_tile + params.tiles_per_piece && tile < tiles; ++tile) {
      const QueryBlock<kRows> at(args, p.row_blocks, tile);
      const auto has_row = [&](int row) { return at.has_row(row); };
      const int row_parts = weight == Weight::kA2 ? kParts : 1;
      for (int i = 0; i < row_parts; ++i) {
        sync_threads();  // everyone is done with the buffers
        const FormOperand<Element> rows = rows_of(p, at, weight, i, view);
        copy_rows<Element, kHeadDim, kRows, kThreads, 1>(shared, thread_index(), rows.first, rows.stride, args.head_dim,
                                                         has_row);
        for (int j = 0; i == 0 && j < kParts; ++j)
          copy_rows<Element, kRankTile, kRows, kThreads, 1>(
              factors + j * kRows * kFactorStride, thread_index(),
              p.factor_row<Element>(at.sequence, at.head, at.first_query, j, weight, view) + rank_tile * kRankTile,
              p.factors.row, kRankTile, has_row);
        commit_copies();
        wait_copies<0>();
        sync_threads();
        for (int j = 0; i + j < kParts; ++j)
          Products::template multiply_columns<kRows, kFactorStride>(
              sum, factors + j * kRows * kFactorStride + first_rank * static_cast<int>(sizeof(Element)),
              shared + first_column * static_cast<int>(sizeof(Element)));
      }
    }
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      char* target = reinterpret_cast<char*>(part + (first_rank + h * 8 + g) * args.head_dim);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const int column = first_column + n * 8 + 2 * t;
        if (column < args.head_dim)
          Fragments<float, kHeadDim>::store_pair(target, column, sum[0][n][2 * h], sum[0][n][2 * h + 1]);
      }
    }
  }

 private:
  // What the factors of a weight's gradient are multiplied with.
  static MODA_EXT_DEVICE FormOperand<Element> rows_of(const DuplexQueryViewsForms& p, const QueryBlock<kRows>& at,
                                                      Weight weight, int part, int view) {
    if (weight == Weight::kA1)
      return {row_of<Element>(p.args.grad_views, at.sequence.batch, at.head, at.first_query) +
                  view * p.args.grad_views.view,
              p.args.grad_views.row};
    if (weight == Weight::kA2)
      return {row_of<Element>(p.grad_moved, at.sequence.batch, at.head, at.first_query) +
                  (part * p.args.num_modalities + view) * p.grad_moved.view,
              p.grad_moved.row};
    return {row_of<Element>(p.args.query, at.sequence.batch, at.head, at.first_query), p.args.query.row};
  }
};

// A thread has a number of the packed weights.
struct ReduceWeights {
  using Params = WeightGradientParams;
  static constexpr int kThreads = 256;
  static int64_t blocks(const Params& p) { return divide_up(PackedWeights::numbers(p.forms.args), kThreads); }
  static size_t shared_bytes(const Params&) { return 0; }

  static MODA_EXT_DEVICE void run(const Params& p, char*) {
    const DuplexQueryViewsBackwardArgs& args = p.forms.args;
    const int64_t index = block_index() * kThreads + thread_index();
    const WeightNumber number(args, p.forms.weights.rank_tiles, index);
    if (!number.exists) return;
    const int64_t numbers =
        static_cast<int64_t>(kWeights) * args.num_modalities * p.forms.weights.rank_tiles * kRankTile * args.head_dim;
    float sum = 0.0f;
    for (int piece = 0; piece < p.pieces; ++piece) sum += p.parts[piece * numbers + index];
    float* to = args.grad_b1;
    if (number.weight == Weight::kB2) to = args.grad_b2;
    if (number.weight == Weight::kA1) to = args.grad_a1;
    if (number.weight == Weight::kA2) to = args.grad_a2;
    to[number.offset] = sum;
  }
};

// Memory of the parts of DuplexQueryViewsForms and WeightGradientParams; plan_states describes what comes before.
struct DuplexQueryViewsBackwardPlan {
  StatesPlan states;
  int row_blocks, pieces;
  int64_t tiles_per_piece;
  int64_t weights_at, moved_at, grad_moved_at, factors_at, form_scale_at, parts_at, bytes;
};

template <class Element, int kHeadDim>
DuplexQueryViewsBackwardPlan plan_duplex_query_views_backward(const DuplexQueryViewsBackwardArgs& args) {
  constexpr int kRows = GramTile<Element, kHeadDim>::kRows;
  constexpr int64_t kElement = sizeof(Element), kParts = kExactParts<Element>;
  // Blocks of WeightGradientKernel: enough for every GPU, and few enough that their parts are a small sum.
  constexpr int64_t kBlocksWanted = 512;
  const int64_t rank_tiles = count_rank_tiles(args), views = args.num_modalities;
  const bool with_indicator = args.grad_indicator.data != nullptr;
  const int64_t numbers = args.num_rows() * args.head_dim;
  DuplexQueryViewsBackwardPlan plan;
  plan.states = plan_states<Element, kHeadDim>(args, DuplexQueryViewsForms::kExact);
  plan.row_blocks = static_cast<int>(divide_up(args.num_queries, kRows));
  const int64_t tiles = count_query_blocks(args, kRows);
  int64_t pieces = divide_up(kBlocksWanted, kWeights * views * rank_tiles);
  if (pieces > tiles) pieces = tiles;
  plan.tiles_per_piece = pieces > 0 ? divide_up(tiles, pieces) : 0;
  plan.pieces = static_cast<int>(pieces);
  plan.weights_at = plan.states.bytes;
  plan.moved_at = plan.weights_at + round_up(kElement * kParts * PackedWeights::numbers(args));
  plan.grad_moved_at = plan.moved_at + round_up(kElement * kParts * views * numbers);
  plan.factors_at = plan.grad_moved_at + round_up(kElement * (kParts * views + with_indicator) * numbers);
  plan.form_scale_at =
      plan.factors_at + round_up(kElement * kParts * kWeights * views * args.num_rows() * rank_tiles * kRankTile);
  plan.parts_at = plan.form_scale_at + round_up(with_indicator ? 4 * args.num_rows() * views : 0);
  plan.bytes = plan.parts_at + round_up(4 * pieces * PackedWeights::numbers(args));
  return plan;
}

// Rows of `width` numbers in the workspace, (view, batch, head, query, width).
inline Output workspace_rows(const CausalGramArgs& args, int64_t width, void* memory) {
  Output rows;
  rows.data = memory;
  rows.row = width;
  rows.head = rows.row * args.num_queries;
  rows.batch = rows.head * args.query_heads;
  rows.view = rows.batch * args.num_sequences;
  return rows;
}

template <class Element, int kHeadDim>
void duplex_query_views_backward(const DuplexQueryViewsBackwardArgs& args, void* workspace, void* stream) {
  const DuplexQueryViewsBackwardPlan plan = plan_duplex_query_views_backward<Element, kHeadDim>(args);
  char* memory = static_cast<char*>(workspace);
  const int rank_tiles = count_rank_tiles(args);
  DuplexQueryViewsForms forms{};
  forms.args = args;
  forms.weights = {memory + plan.weights_at, rank_tiles, kExactParts<Element>};
  forms.row_blocks = plan.row_blocks;
  forms.moved = workspace_rows(args, args.head_dim, memory + plan.moved_at);
  forms.grad_moved = workspace_rows(args, args.head_dim, memory + plan.grad_moved_at);
  forms.factors = workspace_rows(args, rank_tiles * kRankTile, memory + plan.factors_at);
  forms.form_scale = workspace_rows(args, args.num_modalities, memory + plan.form_scale_at);
  forms.states = make_states<Element, kHeadDim>(args, DuplexQueryViewsForms::kExact, nullptr, workspace, stream);
  launch<PackWeights<Element>>({args, forms.weights}, stream);
  launch<MoveKernel<Element, kHeadDim>>(forms, stream);
  if (args.grad_indicator.data != nullptr) launch<FormScaleKernel<Element>>(forms, stream);
  differentiate_forms<Element, kHeadDim>(forms, plan.states, workspace, stream);
  launch<QueryGradientKernel<Element, kHeadDim>>(forms, stream);
  const WeightGradientParams sums{forms, plan.pieces, plan.tiles_per_piece,
                                  reinterpret_cast<float*>(memory + plan.parts_at)};
  launch<WeightGradientKernel<Element, kHeadDim>>(sums, stream);
  launch<ReduceWeights>(sums, stream);
}

template <int kHeadDim>
int64_t DuplexQueryViewsBackwardKernels<kHeadDim>::workspace(const DuplexQueryViewsBackwardArgs& args,
                                                             Storage storage) {
  return storage == Storage::kFloat32 ? plan_duplex_query_views_backward<float, kHeadDim>(args).bytes
                                      : plan_duplex_query_views_backward<BFloat16, kHeadDim>(args).bytes;
}
template <int kHeadDim>
void DuplexQueryViewsBackwardKernels<kHeadDim>::run(const DuplexQueryViewsBackwardArgs& args, Storage storage,
                                                    void* workspace, void* stream) {
  if (storage == Storage::kBFloat16) return duplex_query_views_backward<BFloat16, kHeadDim>(args, workspace, stream);
  if (storage == Storage::kFloat16) return duplex_query_views_backward<Float16, kHeadDim>(args, workspace, stream);
  duplex_query_views_backward<float, kHeadDim>(args, workspace, stream);
}

}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
