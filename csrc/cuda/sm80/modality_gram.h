// Raw Gram matrices of every modality (docs/mathematics.md section 1) and their backward pass, for compute capability 8.0 and
// later.
//
//   G^m = sum_{a_j = m} phi_j^T phi_j        dphi_j = phi_j (dG^m + dG^mT),  m = a_j
//
// Forward: GramKernel over pieces of the sequence, added up in order by ScanKernel: no atomics, and the number of
// pieces depends on shapes and the device alone. Backward: ScanKernel makes dG + dG^T an operand, and each block turns
// its keys into gradients; it reads the matrix of each modality in its tile once.
#pragma once

#include "cuda/sm80/gram_family_tiles.h"

namespace moda_ext {
namespace cuda {
namespace sm80 {

struct ModalityGramPlan {
  int tiles_per_sequence, pieces, tiles_per_piece;
  int64_t tiles_at, parts_at, bytes;
};

template <class Element, int kHeadDim>
ModalityGramPlan plan_modality_gram(const ModalityGramArgs& args, int multiprocessors) {
  using Kernel = GramKernel<Element, kHeadDim>;
  ModalityGramPlan plan;
  plan.tiles_per_sequence = static_cast<int>(divide_up(args.num_keys, Kernel::kKeys));
  // A piece of fewer keys costs more to write and add up than its keys to read.
  constexpr int kFewestTiles = 512 / Kernel::kKeys;
  const int64_t possible = plan.tiles_per_sequence / kFewestTiles;
  int64_t pieces = args.num_grams() > 0 ? divide_up(2 * multiprocessors, args.num_grams()) : 1;
  if (pieces > possible) pieces = possible;
  if (pieces < 1) pieces = 1;
  plan.tiles_per_piece = static_cast<int>(divide_up(plan.tiles_per_sequence, pieces));
  plan.pieces = static_cast<int>(pieces);
  plan.tiles_at = 0;
  plan.parts_at = round_up(4 * static_cast<int64_t>(args.num_sequences) * plan.tiles_per_sequence);
  const int64_t parts = plan.pieces > 1 ? args.num_grams() * plan.pieces : 0;
  plan.bytes = plan.parts_at + 4 * parts * args.head_dim * args.head_dim;
  return plan;
}

template <class Element, int kHeadDim>
int64_t modality_gram_workspace(const ModalityGramArgs& args, int multiprocessors) {
  return plan_modality_gram<Element, kHeadDim>(args, multiprocessors).bytes;
}

template <class Element, int kHeadDim>
void modality_gram(const ModalityGramArgs& args, int multiprocessors, void* workspace, void* stream) {
  using Kernel = GramKernel<Element, kHeadDim>;
  const ModalityGramPlan plan = plan_modality_gram<Element, kHeadDim>(args, multiprocessors);
  char* memory = static_cast<char*>(workspace);
  uint32_t* words = reinterpret_cast<uint32_t*>(memory + plan.tiles_at);
  float* parts = plan.pieces > 1 ? reinterpret_cast<float*>(memory + plan.parts_at) : args.gram;
  launch<DescribeTiles>({args, Kernel::kKeys, plan.tiles_per_sequence, words}, stream);
  launch<Kernel>({args, words, plan.tiles_per_sequence, plan.pieces, plan.tiles_per_piece, parts}, stream);
  if (plan.pieces == 1) return;
  ScanParams scan{};
  scan.matrices = args.num_grams();
  scan.head_dim = args.head_dim;
  scan.pieces = plan.pieces;
  scan.parts = parts;
  scan.total = args.gram;
  scan.factor = 1.0f;
  launch<ScanKernel<float, kHeadDim>>(scan, stream);
}

struct ModalityGramBackwardParams {
  ModalityGramBackwardArgs args;
  int key_blocks;
  const void* sums;      // dG + dG^T, as ScanKernel leaves it
  const float* largest;  // of its rows
};

template <class Element, int kHeadDim>
class ModalityGramBackwardKernel {
  using Tile = GramTile<Element, kHeadDim>;
  using Products = Fragments<Element, kHeadDim>;
  static constexpr int kStride = Products::kStride;

 public:
  static constexpr int kRows = Tile::kRows, kThreads = 2 * kRows;
  using Params = ModalityGramBackwardParams;
  using Product = SymmetricProduct<Element, kHeadDim, kThreads>;

  static int64_t blocks(const Params& p) {
    return static_cast<int64_t>(p.args.num_sequences) * p.args.kv_heads * p.key_blocks;
  }
  static size_t shared_bytes(const Params&) {
    return static_cast<size_t>(kRows + Tile::kSlice) * kStride + sizeof(KeyNorm) * kRows + sizeof(uint32_t) * 4;
  }

  static MODA_EXT_DEVICE void run(const Params& p, char* shared) {
    const GramArgs& args = p.args;
    const int64_t index = block_index();
    const int first_key = static_cast<int>(index % p.key_blocks) * kRows;
    const int kv_head = static_cast<int>(index / p.key_blocks % args.kv_heads);
    const int64_t sequence_index = index / p.key_blocks / args.kv_heads;
    const Sequence sequence = batch_element(args, sequence_index);
    char* keys = shared;
    char* slice = keys + kRows * kStride;
    KeyNorm* norms = reinterpret_cast<KeyNorm*>(slice + Tile::kSlice * kStride);
    uint32_t* words = reinterpret_cast<uint32_t*>(norms + kRows);

    copy_rows<Element, kHeadDim, kRows, kThreads>(
        keys, thread_index(), row_of<Element>(args.key, sequence.batch, kv_head, first_key), args.key.row,
        args.head_dim, [&](int row) { return modality_of(args, sequence, first_key + row) >= 0; });
    commit_copies();
    const int warp_row = warp_index() * 16 + lane_index() / 4;
    const int modality[2] = {modality_of(args, sequence, first_key + warp_row),
                             modality_of(args, sequence, first_key + warp_row + 8)};
    uint32_t present = warp_or(modality_bit(modality[0]) | modality_bit(modality[1]));
    if (lane_index() == 0) words[warp_index()] = present;
    wait_copies<0>();
    sync_threads();
    for (int w = 0; w < kThreads / 32; ++w) present |= words[w];
    present &= kAllModalities;
    make_features<Element, kHeadDim, kRows, kThreads>(args, keys, nullptr, norms);

    float gradient[1][kHeadDim / 8][4];
    set_zero(gradient);
    char* rows = keys + warp_index() * 16 * kStride;
    for (; present != 0; present &= present - 1) {
      const int m = lowest_bit(present);
      const int64_t matrix = (sequence_index * args.kv_heads + kv_head) * args.num_modalities + m;
      Product::run(static_cast<const Element*>(p.sums) + matrix * args.head_dim * args.head_dim, nullptr,
                   p.largest + matrix * args.head_dim, args.head_dim, rows, slice,
                   [&](int first, const float (&c)[1][Product::kSliceFragments][4]) {
#pragma unroll
                     for (int n = 0; n < Product::kSliceFragments; ++n)
#pragma unroll
                       for (int i = 0; i < 4; ++i)
                         if (modality[i / 2] == m) gradient[0][first + n][i] = c[0][n][i];
                   });
    }
    sync_threads();  // the norms are there also where no modality is
    write_key_gradient<Element, kHeadDim>(p.args.grad_key, args, sequence, kv_head, first_key, gradient, rows, norms);
  }
};

struct ModalityGramBackwardPlan {
  int64_t sums_at, largest_at, bytes;
};
inline ModalityGramBackwardPlan plan_modality_gram_backward(const ModalityGramBackwardArgs& args, int element_bytes) {
  ModalityGramBackwardPlan plan;
  plan.sums_at = 0;
  plan.largest_at = round_up(args.num_grams() * args.head_dim * args.head_dim * element_bytes);
  plan.bytes = plan.largest_at + round_up(4 * args.num_grams() * args.head_dim);
  return plan;
}

template <class Element, int kHeadDim>
void modality_gram_backward(const ModalityGramBackwardArgs& args, void* workspace, void* stream) {
  using Kernel = ModalityGramBackwardKernel<Element, kHeadDim>;
  const ModalityGramBackwardPlan plan = plan_modality_gram_backward(args, sizeof(Element));
  char* memory = static_cast<char*>(workspace);
  ScanParams scan{};
  scan.matrices = args.num_grams();
  scan.head_dim = args.head_dim;
  scan.pieces = 1;
  scan.add_transpose = true;
  scan.initial = args.grad_gram;
  scan.before = memory + plan.sums_at;
  scan.largest = reinterpret_cast<float*>(memory + plan.largest_at);
  launch<ScanKernel<Element, kHeadDim>>(scan, stream);
  launch<Kernel>({args, static_cast<int>(divide_up(args.num_keys, Kernel::kRows)), scan.before, scan.largest}, stream);
}

template <int kHeadDim>
int64_t ModalityGramForwardKernels<kHeadDim>::workspace(const ModalityGramArgs& args, Storage storage,
                                                        int multiprocessors) {
  return storage == Storage::kFloat32 ? modality_gram_workspace<float, kHeadDim>(args, multiprocessors)
                                      : modality_gram_workspace<BFloat16, kHeadDim>(args, multiprocessors);
}
template <int kHeadDim>
void ModalityGramForwardKernels<kHeadDim>::run(const ModalityGramArgs& args, Storage storage, int multiprocessors,
                                               void* workspace, void* stream) {
  if (storage == Storage::kBFloat16) return modality_gram<BFloat16, kHeadDim>(args, multiprocessors, workspace, stream);
  if (storage == Storage::kFloat16) return modality_gram<Float16, kHeadDim>(args, multiprocessors, workspace, stream);
  modality_gram<float, kHeadDim>(args, multiprocessors, workspace, stream);
}
template <int kHeadDim>
int64_t ModalityGramBackwardKernels<kHeadDim>::workspace(const ModalityGramBackwardArgs& args, Storage storage) {
  return plan_modality_gram_backward(args, storage == Storage::kFloat32 ? 4 : 2).bytes;
}
template <int kHeadDim>
void ModalityGramBackwardKernels<kHeadDim>::run(const ModalityGramBackwardArgs& args, Storage storage, void* workspace,
                                                void* stream) {
  if (storage == Storage::kBFloat16) return modality_gram_backward<BFloat16, kHeadDim>(args, workspace, stream);
  if (storage == Storage::kFloat16) return modality_gram_backward<Float16, kHeadDim>(args, workspace, stream);
  modality_gram_backward<float, kHeadDim>(args, workspace, stream);
}

}  // namespace sm80
}  // namespace cuda
}  // namespace moda_ext
