// Gradients of bilinear forms with the causal Grams of a key head, for compute capability 8.0 and later, and the
// backward pass of the causal Gram projection, which is one of them; segments and states as in
// causal_gram_projection_forward.h.
//
//   f_i = sum_m s_{i,m} x_i G^m_i y_{i,m}^T
//
//   dx_i   = sum_m s_{i,m} y_{i,m} G^m_i                ds_{i,m} = x_i . (y_{i,m} G^m_i)
//   dphi_j = sum_{i >= j} s_{i,m} ((y_{i,m} . phi_j) x_i + (x_i . phi_j) y_{i,m}),  m = a_j
//
// A key head has one form or more for each query; the projection has one for each query head, x = q and y = do. Each
// number is written by one thread after a sum in fixed order, without atomics:
//
//   RowGradientKernel  dx and ds: the projection of y, for each form and each modality in turn
//   LaterKernel        L^m = sum s x^T y of every segment, which ScanKernel adds up from the end, beginning with the
//                      gradient of the final Gram: it acts on every key as a later row would
//   KeyGradientKernel  dphi_j = phi_j (L + L^T) of later segments, and the rows of its own segment through two scores
//
// The operands of LaterKernel take the place of those of RowGradientKernel.
//
// What the forms are, the kernels' Params say: BilinearForms, `args` (CausalGramArgs and CausalGramGradients) and
//
//   kExact                      16-bit operands of float32 results come in two parts
//   parts<Element>(form)        so do the form's x and dx: their number
//   sets(), first_form(set)     a key head's forms lie in sets that share scales; first_form(sets()) is their number
//   meets(form, m)              false: y_m is zero
//   scale(..., set, query, m)   s
//   wants_scale(set)            ds, summed over forms, goes to grad_row_scale
//   left, right                 rows of x and of y_m
//   grad_left                   where dx goes
#pragma once

#include "cuda/sm80/causal_gram_projection_forward.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {

// The part of the kernels' Params that does not depend on what the forms are.
struct BilinearForms {
  States states;
  int first_block, blocks;  // RowGradientKernel: of kRows positions; KeyGradientKernel: of kRows keys
  float* later;             // LaterKernel: (batch, kv head, modality, segment, D, D)
};

template <class Element>
struct FormOperand {
  const Element* first;
  int64_t stride;
};

// Query at a position; outside [0, num_queries) it is none.
MODA_EXT_DEVICE int query_at(const CausalGramArgs& args, int position) {
  return position - (args.num_keys - args.num_queries);
}
MODA_EXT_DEVICE bool has_query(const CausalGramArgs& args, int query) { return query >= 0 && query < args.num_queries; }

MODA_EXT_DEVICE float scale_of(const CausalGramArgs& args, const Sequence& sequence, int kv_head, int query,
                               int modality) {
  return row_of<float>(args.row_scale, sequence.batch, kv_head, query)[modality * args.row_scale.last];
}

struct CausalGramProjectionForms : BilinearForms {
  CausalGramProjectionBackwardArgs args;
  static constexpr bool kExact = true;  // ds is float32
  template <class Element>
  static MODA_EXT_DEVICE int parts(int) {
    return 1;
  }

  MODA_EXT_DEVICE int head_of(int kv_head, int form) const { return kv_head * first_form(1) + form; }
  static MODA_EXT_DEVICE int sets() { return 1; }
  MODA_EXT_DEVICE int first_form(int set) const { return set * (args.query_heads / args.kv_heads); }
  static MODA_EXT_DEVICE bool meets(int, int) { return true; }
  MODA_EXT_DEVICE float scale(const Sequence& sequence, int kv_head, int, int query, int modality) const {
    return scale_of(args, sequence, kv_head, query, modality);
  }
  static MODA_EXT_DEVICE bool wants_scale(int) { return true; }
  template <class Element>
  MODA_EXT_DEVICE FormOperand<Element> left(const Sequence& sequence, int kv_head, int form, int, int query) const {
    return {row_of<Element>(args.query, sequence.batch, head_of(kv_head, form), query), args.query.row};
  }
  template <class Element>
  MODA_EXT_DEVICE FormOperand<Element> right(const Sequence& sequence, int kv_head, int form, int query,
                                             int modality) const {
    return {row_of<Element>(args.grad_projection, sequence.batch, head_of(kv_head, form), query) +
                modality * args.grad_projection.view,
            args.grad_projection.row};
  }
  template <class Element>
  MODA_EXT_DEVICE Element* grad_left(const Sequence& sequence, int kv_head, int form, int, int query) const {
    return row_of<Element>(args.grad_query, sequence.batch, head_of(kv_head, form), query);
  }
};

// Products take scales relative to the largest magnitude of a set (amax): those of long sequences are below float16.
// Sums of several sets follow one another in the same registers, relative to the amax of the last.
struct AmaxScale {
  float value = 0.0f;

  // To the largest magnitude of the set's scales of queries [first, end); returns the factor for sums so far. `words`:
  // one for each warp.
  template <int kThreads, class Params>
  MODA_EXT_DEVICE float update(const Params& p, const Sequence& sequence, int kv_head, int set, int modality, int first,
                               int end, float* words) {
    float largest = 0.0f;
    for (int query = first + thread_index(); query < end; query += kThreads)
      largest = maximum(largest, fabsf(p.scale(sequence, kv_head, set, query, modality)));
    largest = warp_maximum(largest);
    sync_threads();  // everyone is done with the words
    if (lane_index() == 0) words[warp_index()] = largest;
    sync_threads();
    for (int w = 0; w < kThreads / 32; ++w) largest = maximum(largest, words[w]);
    const float before = value;
    value = maximum(largest, before * kSmallest);
    return value > 0.0f ? before / value : 1.0f;
  }
  MODA_EXT_DEVICE float relative(float scale) const { return value > 0.0f ? scale / value : 0.0f; }

 private:
  static constexpr float kSmallest = 1e-30f;  // of the amax before: the factor stays finite
};

// The rows of a part of x and of y_m that belong to queries [query, query + kRows) into shared memory, x first. Every
// thread sees them after the barrier; rows without a query are zeros.
template <class Element, int kHeadDim, int kRows, int kThreads, class Params, class HasRow>
MODA_EXT_DEVICE void bring_form(const Params& p, const Sequence& sequence, int kv_head, int form, int part,
                                int modality, int query, char* target, const HasRow& has_row) {
  const FormOperand<Element> left = p.template left<Element>(sequence, kv_head, form, part, query);
  const FormOperand<Element> right = p.template right<Element>(sequence, kv_head, form, query, modality);
  sync_threads();  // everyone is done with the buffers
  copy_rows<Element, kHeadDim, kRows, kThreads, 1>(target, thread_index(), left.first, left.stride, p.args.head_dim,
                                                   has_row);
  copy_rows<Element, kHeadDim, kRows, kThreads, 1>(target + kRows * kRowStride<Element, kHeadDim>, thread_index(),
                                                   right.first, right.stride, p.args.head_dim, has_row);
  commit_copies();
}

template <class Element, int kHeadDim, class Form>
class RowGradientKernel {
  using Products = Fragments<Element, kHeadDim>;
  using Floats = Fragments<float, kHeadDim>;
  static constexpr int kStride = Products::kStride;

 public:
  // Rows and, in float32, their gradients have to fit in shared memory.
  static constexpr int kRows =
      kHeadDim * (static_cast<int>(sizeof(Element)) + 4) > 1200 ? 32 : GramTile<Element, kHeadDim>::kRows;
  static constexpr int kThreads = 2 * kRows;
  using Params = Form;
  using Projection = RowProjection<Element, kHeadDim, kRows, Form::kExact>;

  static int64_t blocks(const Params& p) {
    return static_cast<int64_t>(p.args.num_sequences) * p.args.kv_heads * p.blocks;
  }
  static size_t shared_bytes(const Params& p) {
    return static_cast<size_t>(kRows) * (kStride + Floats::kStride) + Projection::kSharedBytes +
           sizeof(float) * kRows * static_cast<size_t>(p.args.num_modalities);
  }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    const CausalGramArgs& args = p.args;
    for (int i = lane_index(); i < 16 * args.num_modalities; i += 32) table_of_warp(args, shared)[i] = 0.0f;
    for (int set = 0; set < p.sets(); ++set) {
      for (int form = p.first_form(set); form < p.first_form(set + 1); ++form) {
        clear(shared);
        for (int m = 0; m < args.num_modalities; ++m) {
          if (!p.meets(form, m)) continue;
          typename Projection::Sums out;
          project(p, form, m, shared, out);
          const Place at(p);
          if (p.wants_scale(set)) {
            for (int part = 0; part < p.template parts<Element>(form); ++part) {
              copy_own_left(p, at, form, part, shared);
              add_dots(args, m, out, shared);
            }
          }
          add(p, at, set, m, out, shared);
        }
        for (int part = 0; part < p.template parts<Element>(form); ++part)
          write_gradient(p, Place(p), form, part, shared);
      }
    }
    const Place at(p);
    for (int i = lane_index(); i < 16 * args.num_modalities; i += 32) {
      const int m = i % args.num_modalities, query = at.warp_query() + i / args.num_modalities;
      if (has_query(args, query))
        row_of<float>(p.args.grad_row_scale, at.sequence.batch, at.kv_head, query)[m * p.args.grad_row_scale.last] =
            table_of_warp(args, shared)[i];
    }
  }

 private:
  // Shared memory holds rows, the stream of the projection, gradients in float32 and those of scales.
  static constexpr size_t kStreamAt = static_cast<size_t>(kRows) * kStride;
  static constexpr size_t kGradientsAt = kStreamAt + Projection::kSharedBytes;
  static MODA_EXT_DEVICE char* rows_of_warp(char* shared) { return shared + warp_index() * 16 * kStride; }
  static MODA_EXT_DEVICE char* gradients_of_warp(char* shared) {
    return shared + kGradientsAt + warp_index() * 16 * Floats::kStride;
  }
  static MODA_EXT_DEVICE float* table_of_warp(const CausalGramArgs& args, char* shared) {
    return reinterpret_cast<float*>(shared + kGradientsAt + kRows * Floats::kStride) +
           warp_index() * 16 * args.num_modalities;
  }

  // The block's place, worked out again wherever it is needed: registers are full while rows are projected.
  struct Place {
    int first_position, first_query, kv_head;
    Sequence sequence;

    MODA_EXT_DEVICE explicit Place(const Params& p) {
      const int64_t index = block_index();
      first_position = (p.first_block + static_cast<int>(index % p.blocks)) * kRows;
      first_query = query_at(p.args, first_position);
      kv_head = static_cast<int>(index / p.blocks % p.args.kv_heads);
      sequence = batch_element(p.args, index / p.blocks / p.args.kv_heads);
    }
    MODA_EXT_DEVICE int warp_query() const { return first_query + warp_index() * 16; }
  };

  static MODA_EXT_DEVICE void project(const Params& p, int form, int modality, char* shared,
                                      typename Projection::Sums& out) {
    const Place at(p);
    const FormOperand<Element> right =
        p.template right<Element>(at.sequence, at.kv_head, form, at.first_query, modality);
    sync_threads();  // everyone is done with the rows
    copy_rows<Element, kHeadDim, kRows, kThreads, 1>(shared, thread_index(), right.first, right.stride, p.args.head_dim,
                                                     [&](int row) { return has_query(p.args, at.first_query + row); });
    commit_copies();
    Projection::run(p.args, p.states, at.sequence, at.sequence.batch, at.kv_head, modality, at.first_position, shared,
                    shared + kStreamAt, out);
  }

  // The warp's rows of x take the place of those of y.
  static MODA_EXT_DEVICE void copy_own_left(const Params& p, const Place& at, int form, int part, char* shared) {
    const int warp_query = at.warp_query();
    const FormOperand<Element> left = p.template left<Element>(at.sequence, at.kv_head, form, part, warp_query);
    sync_warp();  // every lane is done with the rows
    copy_rows<Element, kHeadDim, 16, 32, 1>(rows_of_warp(shared), lane_index(), left.first, left.stride,
                                            p.args.head_dim,
                                            [&](int row) { return has_query(p.args, warp_query + row); });
    commit_copies();
    wait_copies<0>();
    sync_warp();
  }

  // One lane of a quad owns the table's entry.
  static MODA_EXT_DEVICE void add_dots(const CausalGramArgs& args, int modality, const typename Projection::Sums& out,
                                       char* shared) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const char* row = rows_of_warp(shared) + (h * 8 + g) * kStride;
      float dot = 0.0f;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        float low, high;
        Products::load_pair(row, n * 8 + 2 * t, low, high);
        dot += out[0][n][2 * h] * low + out[0][n][2 * h + 1] * high;
      }
      dot = quad_sum(dot);
      if (t == 0) table_of_warp(args, shared)[(h * 8 + g) * args.num_modalities + modality] += dot;
    }
  }

  // Every thread has the gradients at its own places in the fragments.
  static MODA_EXT_DEVICE void clear(char* shared) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    char* gradients = gradients_of_warp(shared);
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
        Floats::store_pair(gradients + (h * 8 + g) * Floats::kStride, n * 8 + 2 * t, 0.0f, 0.0f);
  }
  static MODA_EXT_DEVICE void add(const Params& p, const Place& at, int set, int modality,
                                  const typename Projection::Sums& out, char* shared) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = at.warp_query() + h * 8 + g;
      const float scale = has_query(p.args, query) ? p.scale(at.sequence, at.kv_head, set, query, modality) : 0.0f;
      char* gradient = gradients_of_warp(shared) + (h * 8 + g) * Floats::kStride;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        float low, high;
        Floats::load_pair(gradient, n * 8 + 2 * t, low, high);
        Floats::store_pair(gradient, n * 8 + 2 * t, low + scale * out[0][n][2 * h],
                           high + scale * out[0][n][2 * h + 1]);
      }
    }
  }

  // Leaves what rounding took away.
  static MODA_EXT_DEVICE void write_gradient(const Params& p, const Place& at, int form, int part, char* shared) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    char* gradients = gradients_of_warp(shared);
    char* rows = rows_of_warp(shared);
    sync_warp();  // every lane has read the rows, whose place the result takes
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        char* gradient = gradients + (h * 8 + g) * Floats::kStride;
        float low, high;
        Floats::load_pair(gradient, n * 8 + 2 * t, low, high);
        Products::store_pair(rows + (h * 8 + g) * kStride, n * 8 + 2 * t, low, high);
        if (sizeof(Element) == 2)
          Floats::store_pair(gradient, n * 8 + 2 * t, low - to_float(from_float<Element>(low)),
                             high - to_float(from_float<Element>(high)));
      }
    sync_warp();
    store_rows<Element, kHeadDim, 16>(rows, 0, p.args.head_dim, [&](int own) -> Element* {
      const int query = at.warp_query() + own;
      if (!has_query(p.args, query)) return nullptr;
      return p.template grad_left<Element>(at.sequence, at.kv_head, form, part, query);
    });
  }
};

template <class Element, int kHeadDim, class Form>
class LaterKernel {
  using Products = Fragments<Element, kHeadDim>;
  using Part = SumPart<kHeadDim>;
  static constexpr int kStride = Products::kStride, kRows = GramTile<Element, kHeadDim>::kKeys;
  static constexpr bool kHasRest = Form::kExact && sizeof(Element) == 2;  // of scaled rows

 public:
  static constexpr int kThreads = Part::kThreads;
  static constexpr int kBuffers = kHasRest ? 3 : 2;
  using Params = Form;

  static int64_t blocks(const Params& p) {
    return p.args.num_grams() * p.states.segments * Part::kParts * Part::kParts;
  }
  static size_t shared_bytes(const Params&) {
    return static_cast<size_t>(kBuffers * kRows) * kStride + sizeof(float) * kThreads / 32;
  }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    const auto& args = p.args;
    int64_t index = block_index();
    const Part part(index);
    float* later = p.later + index * args.head_dim * args.head_dim;
    const int first_position = static_cast<int>(index % p.states.segments) * kSegment;
    index /= p.states.segments;
    const int modality = static_cast<int>(index % args.num_modalities);
    const int kv_head = static_cast<int>(index / args.num_modalities % args.kv_heads);
    const Sequence sequence = batch_element(args, index / args.num_modalities / args.kv_heads);
    const int first = maximum(query_at(args, first_position), 0);
    const int end = minimum(query_at(args, first_position + kSegment), args.num_queries);
    char* rights = shared + kRows * kStride;
    char* rest = kHasRest ? rights + kRows * kStride : nullptr;
    const int row_at = part.row * static_cast<int>(sizeof(Element));
    const int column_at = part.column * static_cast<int>(sizeof(Element));

    typename Part::Sums sum;
    set_zero(sum);
    AmaxScale amax;
    for (int set = 0; set < p.sets(); ++set) {
      const float factor =
          amax.template update<kThreads>(p, sequence, kv_head, set, modality, first, end,
                                         reinterpret_cast<float*>(shared + kBuffers * kRows * kStride));
      if (set > 0) {
#pragma unroll
        for (int r = 0; r < Part::kRowFragments; ++r)
#pragma unroll
          for (int n = 0; n < Part::kColumnFragments; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[r][n][i] *= factor;
      }
      for (int form = p.first_form(set); form < p.first_form(set + 1); ++form) {
        if (!p.meets(form, modality)) continue;
        for (int part_of_x = 0; part_of_x < p.template parts<Element>(form); ++part_of_x) {
          for (int query = first; query < end; query += kRows) {
            const auto has_row = [&](int row) { return query + row < end; };
            bring_form<Element, kHeadDim, kRows, kThreads>(p, sequence, kv_head, form, part_of_x, modality, query,
                                                           shared, has_row);
            wait_copies<0>();
            sync_threads();
            scale_rows<Element, kHeadDim, kRows, kThreads>(shared, rest, [&](int row) {
              return has_row(row) ? amax.relative(p.scale(sequence, kv_head, set, query + row, modality)) : 0.0f;
            });
            sync_threads();
            Products::template multiply_columns<kRows>(sum, shared + row_at, rights + column_at);
            if (kHasRest && part_of_x == 0)
              Products::template multiply_columns<kRows>(sum, rest + row_at, rights + column_at);
          }
        }
      }
    }
    part.write(sum, amax.value, args.head_dim, later);
  }
};

template <class Element, int kHeadDim, class Form>
class KeyGradientKernel {
  using Tile = GramTile<Element, kHeadDim>;
  using Products = Fragments<Element, kHeadDim>;
  static constexpr int kStride = Products::kStride, kStream = Tile::kKeys;
  static constexpr int kPass = kHeadDim > 128 ? 16 : kStream;  // rows whose scores fit in registers beside the sums
  static_assert(Tile::kSlice <= 2 * kStream, "slices take the place of rows");

 public:
  static constexpr int kRows = Tile::kRows, kThreads = 2 * kRows;
  using Params = Form;

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
      : p(params), args(params.args), keys(shared), g(lane_index() / 4), t(lane_index() % 4) {
    norms = reinterpret_cast<KeyNorm*>(keys + (kRows + 2 * kStream) * kStride);
    scales = reinterpret_cast<float*>(norms + kRows);
    words = reinterpret_cast<uint32_t*>(scales + kStream);
  }

  // The block's place, worked out again wherever it is needed: registers are full.
  struct Place {
    int first_key, kv_head;
    Sequence sequence;

    MODA_EXT_DEVICE explicit Place(const Params& p) {
      const int64_t index = block_index();
      first_key = static_cast<int>(index % p.blocks) * kRows;
      kv_head = static_cast<int>(index / p.blocks % p.args.kv_heads);
      sequence = batch_element(p.args, index / p.blocks / p.args.kv_heads);
    }
  };
  MODA_EXT_DEVICE char* stream() const { return keys + kRows * kStride; }  // rows of x, then of y

  MODA_EXT_DEVICE void run() {
    const Place at(p);
    copy_rows<Element, kHeadDim, kRows, kThreads>(
        keys, thread_index(), row_of<Element>(args.key, at.sequence.batch, at.kv_head, at.first_key), args.key.row,
        args.head_dim, [&](int row) { return modality_of(args, at.sequence, at.first_key + row) >= 0; });
    commit_copies();
    uint32_t present = find_keys(at);
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
    const Place end(p);
    write_key_gradient<Element, kHeadDim>(args.grad_key, args, end.sequence, end.kv_head, end.first_key, gradient,
                                          keys + warp_index() * 16 * kStride, norms);
  }

  // Modalities of this thread's two keys; leaves those of every warp.
  MODA_EXT_DEVICE uint32_t find_keys(const Place& at) {
    for (int h = 0; h < 2; ++h)
      modality[h] = modality_of(args, at.sequence, at.first_key + warp_index() * 16 + h * 8 + g);
    const uint32_t present = warp_or(modality_bit(modality[0]) | modality_bit(modality[1]));
    if (lane_index() == 0) words[warp_index()] = present;
    return present;
  }

  MODA_EXT_DEVICE void add_own_segment(int m) {
    const int first_key = Place(p).first_key;
    const int end_position = minimum((first_key / kSegment + 1) * kSegment, args.num_keys);
    AmaxScale amax;
    for (int set = 0; set < p.sets(); ++set) {
      const float factor = update_amax(m, set, end_position, amax);
      if (set > 0) scale_gradient(m, factor);
      for (int form = p.first_form(set); form < p.first_form(set + 1); ++form) {
        if (!p.meets(form, m)) continue;
        for (int position = first_key; position < end_position; position += kStream)
          if (query_at(args, position + kStream) > 0) add_rows(m, set, form, position, amax);
      }
    }
    scale_gradient(m, amax.value);
  }

  MODA_EXT_DEVICE float update_amax(int m, int set, int end_position, AmaxScale& amax) const {
    const Place at(p);
    const int first_query = maximum(query_at(args, at.first_key / kSegment * kSegment), 0);
    return amax.template update<kThreads>(p, at.sequence, at.kv_head, set, m, first_query, query_at(args, end_position),
                                          reinterpret_cast<float*>(words));
  }

  MODA_EXT_DEVICE void scale_gradient(int m, float factor) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (modality[h] != m) continue;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        gradient[0][n][2 * h] *= factor;
        gradient[0][n][2 * h + 1] *= factor;
      }
    }
  }

  // The four products of a tile of rows with the block's keys: fragments hold keys x rows.
  MODA_EXT_DEVICE void add_rows(int m, int set, int form, int position, const AmaxScale& amax) {
    const Place at(p);
    const int query = query_at(args, position);
    const auto has_row = [&](int row) { return has_query(args, query + row); };
    char* rights = stream() + kStream * kStride;
    bring_form<Element, kHeadDim, kStream, kThreads>(p, at.sequence, at.kv_head, form, 0, m, query, stream(), has_row);
    static_assert(kStream <= kThreads, "a thread for each row");
    const int row = thread_index();
    if (row < kStream)
      scales[row] = has_row(row) ? amax.relative(p.scale(at.sequence, at.kv_head, set, query + row, m)) : 0.0f;
    wait_copies<0>();
    sync_threads();
#pragma unroll 1
    for (int first = 0; first < kStream; first += kPass)
      add_pass(m, position + first - at.first_key, stream() + first * kStride, rights + first * kStride,
               scales + first);
  }

  // `ahead`: position of the first row, counted from the block's first key.
  MODA_EXT_DEVICE void add_pass(int m, int ahead, const char* lefts, const char* rights, const float* row_scales) {
    const char* own = keys + warp_index() * 16 * kStride;
    float left_score[1][kPass / 8][4], right_score[1][kPass / 8][4];
    set_zero(left_score);
    set_zero(right_score);
    Products::multiply_rows(left_score, own, lefts);
    Products::multiply_rows(right_score, own, rights);
#pragma unroll
    for (int n = 0; n < kPass / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = n * 8 + 2 * t + i % 2, key = warp_index() * 16 + i / 2 * 8 + g;
        const bool seen = modality[i / 2] == m && ahead + row >= key;
        left_score[0][n][i] = seen ? left_score[0][n][i] * row_scales[row] : 0.0f;
        right_score[0][n][i] = seen ? right_score[0][n][i] * row_scales[row] : 0.0f;
      }
    }
    Products::multiply_registers(gradient, left_score, rights);
    Products::multiply_registers(gradient, right_score, lefts);
  }

  MODA_EXT_DEVICE void add_later_segments(int m) {
    const Place at(p);
    const int segment = at.first_key / kSegment;
    if (segment + 1 == p.states.segments && args.grad_gram == nullptr) return;
    using Product = SymmetricProduct<Element, kHeadDim, kThreads>;
    const int64_t matrix =
        ((at.sequence.batch * args.kv_heads + at.kv_head) * args.num_modalities + m) * p.states.segments + segment;
    Product::run(static_cast<const Element*>(p.states.before) + matrix * args.head_dim * args.head_dim, nullptr,
                 p.states.largest + matrix * args.head_dim, args.head_dim, keys + warp_index() * 16 * kStride, stream(),
                 [&](int first, const float (&c)[1][Product::kSliceFragments][4]) {
#pragma unroll
                   for (int n = 0; n < Product::kSliceFragments; ++n)
#pragma unroll
                     for (int i = 0; i < 4; ++i)
                       if (modality[i / 2] == m) gradient[0][first + n][i] += c[0][n][i];
                 });
  }

  const Params& p;
  const decltype(Form::args)& args;
  char* const keys;
  const int g, t;  // the lane's row and column pair in a fragment
  KeyNorm* norms;
  float* scales;  // of the rows in the stream, relative
  uint32_t* words;
  int modality[2];
  float gradient[1][kHeadDim / 8][4];
};

// The gradients, into what `forms.args` says; forms.states and the plan's memory are those of make_states, which is
// done with its parts.
template <class Element, int kHeadDim, class Form>
void differentiate_forms(Form forms, const StatesPlan& plan, void* workspace, void* stream) {
  using RowKernel = RowGradientKernel<Element, kHeadDim, Form>;
  using KeyKernel = KeyGradientKernel<Element, kHeadDim, Form>;
  const auto& args = forms.args;
  forms.first_block = (args.num_keys - args.num_queries) / RowKernel::kRows;
  forms.blocks = static_cast<int>(divide_up(args.num_keys, RowKernel::kRows)) - forms.first_block;
  if (args.num_queries > 0) launch<RowKernel>(forms, stream);

  char* memory = static_cast<char*>(workspace);
  forms.later = reinterpret_cast<float*>(memory + plan.parts_at);
  launch<LaterKernel<Element, kHeadDim, Form>>(forms, stream);
  ScanParams scan{};
  scan.matrices = args.num_grams();
  scan.head_dim = args.head_dim;
  scan.pieces = plan.segments;
  scan.reverse = scan.add_transpose = true;
  scan.initial = args.grad_gram;
  scan.parts = forms.later;
  scan.before = memory + plan.before_at;
  scan.largest = reinterpret_cast<float*>(memory + plan.largest_at);
  scan.total = args.grad_initial;
  scan.factor = 0.5f;  // symmetric like the initial Gram, as the mean of L and L^T
  launch<ScanKernel<Element, kHeadDim>>(scan, stream);
  forms.blocks = static_cast<int>(divide_up(args.num_keys, KeyKernel::kRows));
  launch<KeyKernel>(forms, stream);
}

template <class Element, int kHeadDim>
void causal_gram_projection_backward(const CausalGramProjectionBackwardArgs& args, void* workspace, void* stream) {
  constexpr bool kExact = CausalGramProjectionForms::kExact;
  CausalGramProjectionForms forms{};
  forms.args = args;
  forms.states = make_states<Element, kHeadDim>(args, kExact, nullptr, workspace, stream);
  differentiate_forms<Element, kHeadDim>(forms, plan_states<Element, kHeadDim>(args, kExact), workspace, stream);
}

template <int kHeadDim>
int64_t CausalGramProjectionBackwardKernels<kHeadDim>::workspace(const CausalGramProjectionBackwardArgs& args,
                                                                 Storage storage) {
  return states_bytes<kHeadDim>(args, storage, true);
}
template <int kHeadDim>
void CausalGramProjectionBackwardKernels<kHeadDim>::run(const CausalGramProjectionBackwardArgs& args, Storage storage,
                                                        void* workspace, void* stream) {
  if (storage == Storage::kBFloat16)
    return causal_gram_projection_backward<BFloat16, kHeadDim>(args, workspace, stream);
  if (storage == Storage::kFloat16) return causal_gram_projection_backward<Float16, kHeadDim>(args, workspace, stream);
  causal_gram_projection_backward<float, kHeadDim>(args, workspace, stream);
}

}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
