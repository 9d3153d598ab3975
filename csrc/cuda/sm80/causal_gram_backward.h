// Backward pass of the causal Gram projection for compute capability 8.0 and later; segments and states as in
// causal_gram.h.
//
//   u_{i,m} = do_{i,m} G^m_i            dq_i = sum_m s_{i,m} u_{i,m}      ds_{i,m} = q_i . u_{i,m}
//   dphi_j  = sum_{i >= j} s_{i,m} ((do_i . phi_j) q_i + (q_i . phi_j) do_i),  m = a_j
//
// Each number is written by one thread after a sum in fixed order, without atomics:
//
//   RowGradientKernel  dq and ds: the projection of do instead of q, for each head of a group and each modality in turn
//   LaterKernel        L^m = sum s q^T do of every segment, which ScanKernel adds up from the end, beginning with the
//                      gradient of the final Gram: it acts on every key as a later row would
//   KeyGradientKernel  dphi_j = phi_j (L + L^T) of later segments, and the rows of its own segment through two scores
//
// The operands of LaterKernel take the place of those of RowGradientKernel.
#pragma once

#include "cuda/sm80/causal_gram.h"

namespace moda_ext {
namespace cuda {

struct ProjectionBackwardParams {
  ProjectionBackwardArgs args;
  States states;
  int first_block, blocks;  // RowGradientKernel: of kRows positions; KeyGradientKernel: of kRows keys
  float* later;             // LaterKernel: (batch, kv head, modality, segment, D, D)

  // Query at a position; outside [0, num_queries) it is none.
  MODA_EXT_DEVICE int query_at(int position) const { return position - (args.num_keys - args.num_queries); }
  MODA_EXT_DEVICE bool has_query(int query) const { return query >= 0 && query < args.num_queries; }
};

template <class Element>
MODA_EXT_DEVICE const Element* grad_row(const ProjectionBackwardArgs& args, const Sequence& sequence, int head,
                                        int query, int modality) {
  return row_of<Element>(args.grad_projection, sequence, head, query) + modality * args.grad_projection.view;
}

MODA_EXT_DEVICE float scale_of(const CausalArgs& args, const Sequence& sequence, int kv_head, int query, int modality) {
  return row_of<float>(args.row_scale, sequence, kv_head, query)[modality * args.row_scale.last];
}

// Largest magnitude of the scales of queries [first, end). Products take scales relative to it: those of long sequences
// are below float16. `words`: one for each warp.
template <int kThreads>
MODA_EXT_DEVICE float largest_scale(const CausalArgs& args, const Sequence& sequence, int kv_head, int modality,
                                    int first, int end, float* words) {
  float largest = 0.0f;
  for (int query = first + thread_index(); query < end; query += kThreads)
    largest = maximum(largest, fabsf(scale_of(args, sequence, kv_head, query, modality)));
  largest = warp_maximum(largest);
  sync_threads();  // everyone is done with the words
  if (lane_index() == 0) words[warp_index()] = largest;
  sync_threads();
  for (int w = 0; w < kThreads / 32; ++w) largest = maximum(largest, words[w]);
  return largest;
}
MODA_EXT_DEVICE float relative(float scale, float largest) { return largest > 0.0f ? scale / largest : 0.0f; }

template <class Element, int kHeadDim>
class RowGradientKernel {
  using Products = Fragments<Element, kHeadDim>;
  using Floats = Fragments<float, kHeadDim>;
  static constexpr int kStride = Products::kStride;

 public:
  // Rows and, in float32, their gradients have to fit in shared memory.
  static constexpr int kRows =
      kHeadDim * (static_cast<int>(sizeof(Element)) + 4) > 1200 ? 32 : GramTile<Element, kHeadDim>::kRows;
  static constexpr int kThreads = 2 * kRows;
  using Params = ProjectionBackwardParams;
  using Projection = RowProjection<Element, kHeadDim, kRows, true>;  // ds is float32

  static int64_t blocks(const Params& p) {
    return static_cast<int64_t>(p.args.num_sequences) * p.args.kv_heads * p.blocks;
  }
  static size_t shared_bytes(const Params& p) {
    return static_cast<size_t>(kRows) * (kStride + Floats::kStride) + Projection::kSharedBytes +
           sizeof(float) * kRows * static_cast<size_t>(p.args.num_modalities);
  }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    const ProjectionBackwardArgs& args = p.args;
    const int64_t index = block_index();
    const int first_position = (p.first_block + static_cast<int>(index % p.blocks)) * kRows;
    const int kv_head = static_cast<int>(index / p.blocks % args.kv_heads);
    const int64_t sequence_index = index / p.blocks / args.kv_heads;
    const Sequence sequence = batch_element(args, sequence_index);
    const int first_query = p.query_at(first_position), warp_row = warp_index() * 16;
    char* stream = shared + kRows * kStride;
    char* gradients = stream + Projection::kSharedBytes + warp_row * Floats::kStride;  // of this warp, as the table
    float* table = reinterpret_cast<float*>(stream + Projection::kSharedBytes + kRows * Floats::kStride) +
                   warp_row * args.num_modalities;
    for (int i = lane_index(); i < 16 * args.num_modalities; i += 32) table[i] = 0.0f;

    const int group = args.query_heads / args.kv_heads;
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int m = 0; m < args.num_modalities; ++m) {
        sync_threads();  // everyone is done with the rows
        copy_rows<Element, kHeadDim, kRows, kThreads, 1>(
            shared, thread_index(), grad_row<Element>(args, sequence, head, first_query, m), args.grad_projection.row,
            args.head_dim, [&](int row) { return p.has_query(first_query + row); });
        commit_copies();
        typename Projection::Sums out;
        Projection::run(args, p.states, sequence, sequence_index, kv_head, m, first_position, shared, stream, out);
        copy_own_queries(p, sequence, head, first_query + warp_row, shared + warp_row * kStride);
        add(p, sequence, kv_head, m, first_query + warp_row, out, shared + warp_row * kStride, gradients, table);
      }
      write_query_gradient(p, sequence, head, first_query + warp_row, gradients, shared + warp_row * kStride);
    }
    for (int i = lane_index(); i < 16 * args.num_modalities; i += 32) {
      const int m = i % args.num_modalities, query = first_query + warp_row + i / args.num_modalities;
      if (p.has_query(query))
        row_of<float>(args.grad_row_scale, sequence, kv_head, query)[m * args.grad_row_scale.last] = table[i];
    }
  }

 private:
  // The warp's queries take the place of its rows.
  static MODA_EXT_DEVICE void copy_own_queries(const Params& p, const Sequence& sequence, int head, int warp_query,
                                               char* rows) {
    sync_warp();  // every lane is done with the rows
    copy_rows<Element, kHeadDim, 16, 32, 1>(rows, lane_index(),
                                            row_of<Element>(p.args.query, sequence, head, warp_query), p.args.query.row,
                                            p.args.head_dim, [&](int row) { return p.has_query(warp_query + row); });
    commit_copies();
    wait_copies<0>();
    sync_warp();
  }

  // Every thread adds to the numbers of its own place in the fragments; one lane of a quad owns the table's entry.
  static MODA_EXT_DEVICE void add(const Params& p, const Sequence& sequence, int kv_head, int modality, int warp_query,
                                  const typename Projection::Sums& out, const char* queries, char* gradients,
                                  float* table) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int own = h * 8 + g;
      const float scale =
          p.has_query(warp_query + own) ? scale_of(p.args, sequence, kv_head, warp_query + own, modality) : 0.0f;
      char* gradient = gradients + own * Floats::kStride;
      float dot = 0.0f;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        const int column = n * 8 + 2 * t;
        const float low = out[0][n][2 * h], high = out[0][n][2 * h + 1];
        float pair[2];
        Products::load_pair(queries + own * kStride, column, pair[0], pair[1]);
        dot += low * pair[0] + high * pair[1];
        pair[0] = pair[1] = 0.0f;
        if (modality > 0) Floats::load_pair(gradient, column, pair[0], pair[1]);
        Floats::store_pair(gradient, column, pair[0] + scale * low, pair[1] + scale * high);
      }
      dot = quad_sum(dot);
      if (t == 0) table[own * p.args.num_modalities + modality] += dot;
    }
  }

  static MODA_EXT_DEVICE void write_query_gradient(const Params& p, const Sequence& sequence, int head, int warp_query,
                                                   const char* gradients, char* rows) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    sync_warp();  // every lane has read the rows, whose place the result takes
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        float low, high;
        Floats::load_pair(gradients + (h * 8 + g) * Floats::kStride, n * 8 + 2 * t, low, high);
        Products::store_pair(rows + (h * 8 + g) * kStride, n * 8 + 2 * t, low, high);
      }
    sync_warp();
    store_rows<Element, kHeadDim, 16>(rows, 0, p.args.head_dim, [&](int own) -> Element* {
      if (!p.has_query(warp_query + own)) return nullptr;
      return row_of<Element>(p.args.grad_query, sequence, head, warp_query + own);
    });
  }
};

template <class Element, int kHeadDim>
class LaterKernel {
  using Products = Fragments<Element, kHeadDim>;
  using Part = SumPart<kHeadDim>;
  static constexpr int kStride = Products::kStride, kRows = GramTile<Element, kHeadDim>::kKeys;

 public:
  static constexpr int kThreads = Part::kThreads;
  static constexpr int kBuffers = sizeof(Element) == 2 ? 3 : 2;  // the third for the rest of scaled queries
  using Params = ProjectionBackwardParams;

  static int64_t blocks(const Params& p) {
    return p.args.num_grams() * p.states.segments * Part::kParts * Part::kParts;
  }
  static size_t shared_bytes(const Params&) {
    return static_cast<size_t>(kBuffers * kRows) * kStride + sizeof(float) * kThreads / 32;
  }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    const ProjectionBackwardArgs& args = p.args;
    int64_t index = block_index();
    const Part part(index);
    float* later = p.later + index * args.head_dim * args.head_dim;
    const int first_position = static_cast<int>(index % p.states.segments) * kSegment;
    index /= p.states.segments;
    const int modality = static_cast<int>(index % args.num_modalities);
    const int kv_head = static_cast<int>(index / args.num_modalities % args.kv_heads);
    const Sequence sequence = batch_element(args, index / args.num_modalities / args.kv_heads);
    const int first = maximum(p.query_at(first_position), 0);
    const int end = minimum(p.query_at(first_position + kSegment), args.num_queries);
    char* grads = shared + kRows * kStride;
    char* rest = sizeof(Element) == 2 ? grads + kRows * kStride : nullptr;
    const float largest = largest_scale<kThreads>(args, sequence, kv_head, modality, first, end,
                                                  reinterpret_cast<float*>(shared + kBuffers * kRows * kStride));

    typename Part::Sums sum;
    set_zero(sum);
    const int group = args.query_heads / args.kv_heads;
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int query = first; query < end; query += kRows) {
        const auto has_row = [&](int row) { return query + row < end; };
        sync_threads();  // everyone is done with the buffers
        copy_rows<Element, kHeadDim, kRows, kThreads, 1>(shared, thread_index(),
                                                         row_of<Element>(args.query, sequence, head, query),
                                                         args.query.row, args.head_dim, has_row);
        copy_rows<Element, kHeadDim, kRows, kThreads, 1>(grads, thread_index(),
                                                         grad_row<Element>(args, sequence, head, query, modality),
                                                         args.grad_projection.row, args.head_dim, has_row);
        commit_copies();
        wait_copies<0>();
        sync_threads();
        scale_rows<Element, kHeadDim, kRows, kThreads>(shared, rest, [&](int row) {
          return has_row(row) ? relative(scale_of(args, sequence, kv_head, query + row, modality), largest) : 0.0f;
        });
        sync_threads();
        const int row = part.row * static_cast<int>(sizeof(Element));
        const int column = part.column * static_cast<int>(sizeof(Element));
        Products::template multiply_columns<kRows>(sum, shared + row, grads + column);
        if (rest != nullptr) Products::template multiply_columns<kRows>(sum, rest + row, grads + column);
      }
    }
    part.write(sum, largest, args.head_dim, later);
  }
};

template <class Element, int kHeadDim>
class KeyGradientKernel {
  using Tile = GramTile<Element, kHeadDim>;
  using Products = Fragments<Element, kHeadDim>;
  static constexpr int kStride = Products::kStride, kStream = Tile::kKeys, kRowTiles = kStream / 8;
  static_assert(Tile::kSlice <= 2 * kStream, "slices take the place of rows");

 public:
  static constexpr int kRows = Tile::kRows, kThreads = 2 * kRows;
  using Params = ProjectionBackwardParams;

  static int64_t blocks(const Params& p) {
    return static_cast<int64_t>(p.args.num_sequences) * p.args.kv_heads * p.blocks;
  }
  static size_t shared_bytes(const Params&) {
    return static_cast<size_t>(kRows + 2 * kStream) * kStride + sizeof(KeyNorm) * kRows + sizeof(float) * kStream +
           sizeof(uint32_t) * kThreads / 32;
  }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    KeyGradientKernel block(p, shared);
    block.run();
  }

 private:
  MODA_EXT_DEVICE KeyGradientKernel(const Params& params, char* shared)
      : p(params), args(params.args), g(lane_index() / 4), t(lane_index() % 4) {
    const int64_t index = block_index();
    first_key = static_cast<int>(index % p.blocks) * kRows;
    kv_head = static_cast<int>(index / p.blocks % args.kv_heads);
    sequence_index = index / p.blocks / args.kv_heads;
    sequence = batch_element(args, sequence_index);
    keys = shared;
    stream = keys + kRows * kStride;
    norms = reinterpret_cast<KeyNorm*>(stream + 2 * kStream * kStride);
    scales = reinterpret_cast<float*>(norms + kRows);
    words = reinterpret_cast<uint32_t*>(scales + kStream);
  }

  MODA_EXT_DEVICE void run() {
    copy_rows<Element, kHeadDim, kRows, kThreads>(
        keys, thread_index(), row_of<Element>(args.key, sequence, kv_head, first_key), args.key.row, args.head_dim,
        [&](int row) { return modality_of(args, sequence, first_key + row) >= 0; });
    commit_copies();
    uint32_t present = find_keys();
    wait_copies<0>();
    sync_threads();
    for (int w = 0; w < kThreads / 32; ++w) present |= words[w];
    make_features<Element, kHeadDim, kRows, kThreads>(args, keys, nullptr, norms);
    sync_threads();
    set_zero(gradient);
    for (present &= kAllModalities; present != 0; present &= present - 1) {
      const int m = lowest_bit(present);
      add_own_segment(m);
      add_later_segments(m);
    }
    write_key_gradient<Element, kHeadDim>(args.grad_key, args, sequence, kv_head, first_key, gradient,
                                          keys + warp_index() * 16 * kStride, norms);
  }

  // Modalities of this thread's two keys; leaves those of every warp.
  MODA_EXT_DEVICE uint32_t find_keys() {
    for (int h = 0; h < 2; ++h) modality[h] = modality_of(args, sequence, first_key + warp_index() * 16 + h * 8 + g);
    const uint32_t present = warp_or(modality_bit(modality[0]) | modality_bit(modality[1]));
    if (lane_index() == 0) words[warp_index()] = present;
    return present;
  }

  MODA_EXT_DEVICE void add_own_segment(int m) {
    const int end_position = minimum((first_key / kSegment + 1) * kSegment, args.num_keys);
    const int first_query = maximum(p.query_at(first_key / kSegment * kSegment), 0);
    const float largest = largest_scale<kThreads>(args, sequence, kv_head, m, first_query, p.query_at(end_position),
                                                  reinterpret_cast<float*>(words));
    const int group = args.query_heads / args.kv_heads;
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int position = first_key; position < end_position; position += kStream)
        if (p.query_at(position + kStream) > 0) add_rows(m, head, position, largest);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (modality[h] != m) continue;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        gradient[0][n][2 * h] *= largest;
        gradient[0][n][2 * h + 1] *= largest;
      }
    }
  }

  // The four products of a tile of rows with the block's keys: fragments hold keys x rows.
  MODA_EXT_DEVICE void add_rows(int m, int head, int position, float largest) {
    const int query = p.query_at(position);
    const auto has_row = [&](int row) { return p.has_query(query + row); };
    char* grads = stream + kStream * kStride;
    sync_threads();  // everyone is done with the buffers
    copy_rows<Element, kHeadDim, kStream, kThreads, 1>(stream, thread_index(),
                                                       row_of<Element>(args.query, sequence, head, query),
                                                       args.query.row, args.head_dim, has_row);
    copy_rows<Element, kHeadDim, kStream, kThreads, 1>(grads, thread_index(),
                                                       grad_row<Element>(args, sequence, head, query, m),
                                                       args.grad_projection.row, args.head_dim, has_row);
    commit_copies();
    static_assert(kStream <= kThreads, "a thread for each row");
    const int row = thread_index();
    if (row < kStream)
      scales[row] = has_row(row) ? relative(scale_of(args, sequence, kv_head, query + row, m), largest) : 0.0f;
    wait_copies<0>();
    sync_threads();
    const char* own = keys + warp_index() * 16 * kStride;
    float score[1][kRowTiles][4], grad_score[1][kRowTiles][4];
    set_zero(score);
    set_zero(grad_score);
    Products::multiply_rows(score, own, stream);
    Products::multiply_rows(grad_score, own, grads);
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = n * 8 + 2 * t + i % 2, key = first_key + warp_index() * 16 + i / 2 * 8 + g;
        const bool seen = modality[i / 2] == m && position + column >= key;
        score[0][n][i] = seen ? score[0][n][i] * scales[column] : 0.0f;
        grad_score[0][n][i] = seen ? grad_score[0][n][i] * scales[column] : 0.0f;
      }
    }
    Products::multiply_registers(gradient, score, grads);
    Products::multiply_registers(gradient, grad_score, stream);
  }

  MODA_EXT_DEVICE void add_later_segments(int m) {
    const int segment = first_key / kSegment;
    if (segment + 1 == p.states.segments && args.grad_gram == nullptr) return;
    using Product = SymmetricProduct<Element, kHeadDim, kThreads>;
    const int64_t matrix =
        ((sequence_index * args.kv_heads + kv_head) * args.num_modalities + m) * p.states.segments + segment;
    Product::run(static_cast<const Element*>(p.states.before) + matrix * args.head_dim * args.head_dim, nullptr,
                 p.states.largest + matrix * args.head_dim, args.head_dim, keys + warp_index() * 16 * kStride, stream,
                 [&](int first, const float (&c)[1][Product::kSliceTiles][4]) {
#pragma unroll
                   for (int n = 0; n < Product::kSliceTiles; ++n)
#pragma unroll
                     for (int i = 0; i < 4; ++i)
                       if (modality[i / 2] == m) gradient[0][first + n][i] += c[0][n][i];
                 });
  }

  const Params& p;
  const ProjectionBackwardArgs& args;
  const int g, t;  // the lane's row and column pair in a fragment
  int first_key, kv_head;
  int64_t sequence_index;
  Sequence sequence;
  char *keys, *stream;  // the stream: queries, then gradients of the projection
  KeyNorm* norms;
  float* scales;  // of the rows in the stream, relative
  uint32_t* words;
  int modality[2];
  float gradient[1][kHeadDim / 8][4];
};

template <class Element, int kHeadDim>
void causal_projection_backward(const ProjectionBackwardArgs& args, void* workspace, void* stream) {
  using RowKernel = RowGradientKernel<Element, kHeadDim>;
  using KeyKernel = KeyGradientKernel<Element, kHeadDim>;
  const StatesPlan plan = plan_states<Element, kHeadDim>(args, true);
  ProjectionBackwardParams params{};
  params.args = args;
  params.states = make_states<Element, kHeadDim>(args, true, nullptr, workspace, stream);
  params.first_block = (args.num_keys - args.num_queries) / RowKernel::kRows;
  params.blocks = static_cast<int>(divide_up(args.num_keys, RowKernel::kRows)) - params.first_block;
  if (args.num_queries > 0) launch<RowKernel>(params, stream);

  char* memory = static_cast<char*>(workspace);
  params.later = reinterpret_cast<float*>(memory + plan.parts_at);
  launch<LaterKernel<Element, kHeadDim>>(params, stream);
  ScanParams scan{};
  scan.matrices = args.num_grams();
  scan.head_dim = args.head_dim;
  scan.pieces = plan.segments;
  scan.reverse = scan.add_transpose = true;
  scan.initial = args.grad_gram;
  scan.parts = params.later;
  scan.before = memory + plan.before_at;
  scan.largest = reinterpret_cast<float*>(memory + plan.largest_at);
  scan.total = args.grad_initial;
  scan.factor = 0.5f;  // symmetric like the initial Gram, as the mean of L and L^T
  launch<ScanKernel<Element, kHeadDim>>(scan, stream);
  params.blocks = static_cast<int>(divide_up(args.num_keys, KeyKernel::kRows));
  launch<KeyKernel>(params, stream);
}

template <int kHeadDim>
int64_t ProjectionBackwardKernels<kHeadDim>::workspace(const ProjectionBackwardArgs& args, Storage storage) {
  return states_bytes<kHeadDim>(args, storage, true);
}
template <int kHeadDim>
void ProjectionBackwardKernels<kHeadDim>::run(const ProjectionBackwardArgs& args, Storage storage, void* workspace,
                                              void* stream) {
  if (storage == Storage::kBFloat16) return causal_projection_backward<BFloat16, kHeadDim>(args, workspace, stream);
  if (storage == Storage::kFloat16) return causal_projection_backward<Float16, kHeadDim>(args, workspace, stream);
  causal_projection_backward<float, kHeadDim>(args, workspace, stream);
}

}  // namespace cuda
}  // namespace moda_ext
