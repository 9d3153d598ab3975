// modality_gram.h with AMX (see amx.h for operands and accuracy).
//
// Keys are collected for each modality until there are kGramKeys, so that however modalities alternate, every product
// is full but the last. Of the symmetric sum only the blocks on and above the diagonal are made.
#pragma once

#include "cpu/kernels/amx/amx.h"
#include "cpu/kernels/vector/modality_gram.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

struct ModalityGramAmxScratch {
  static constexpr int kKeys = 128, kSteps = kKeys / kTileDepth;  // 200 KB with the operands: they stay in L2

  float* keys;  // [num_modalities][kKeys] rows: phi
  float* sums;  // [num_modalities][block above the diagonal][kStripRows][kStripRows]
  float* products;
  Word *columns, *rows;  // operands of one modality's keys: [column tile][step][part], transposed and not
  int depth;             // steps of the head size

  ModalityGramAmxScratch(const GramArgs& args, Arena<float>& arena) : depth(steps_of(args.head_dim)) {
    keys = arena.take(int64_t{args.num_modalities} * kKeys * kScratchColumns);
    sums = arena.take(args.num_modalities * sum_elements());
    products = arena.take(2 * kBlockElements);
    columns = arena.take<Word>(2 * depth * column_step());
    rows = arena.take<Word>(2 * depth * column_step());
  }
  int64_t sum_elements() const { return int64_t{depth} * (depth + 1) / 2 * kBlockElements; }
  static int64_t column_step() { return int64_t{kSteps} * kFullWords; }
  float* keys_of(int m) const { return keys + int64_t{m} * kKeys * kScratchColumns; }
  // The block of strips i <= j; those of one i follow each other.
  float* sum_of(int m, int i, int j) const {
    return sums + m * sum_elements() + (i * depth - i * (i - 1) / 2 + j - i) * kBlockElements;
  }
};

inline int64_t modality_gram_amx_scratch_bytes(const GramArgs& args) {
  const int64_t forward = scratch_bytes<ModalityGramAmxScratch, float>(args),
                backward = modality_gram_scratch_bytes<float>(args);
  return forward > backward ? forward : backward;
}

// Adds the collected keys of a modality to its Gram.
inline void add_keys(const GramArgs& args, int m, int count, ModalityGramAmxScratch& s) {
  const int steps = steps_of(count);
  float* keys = s.keys_of(m);
  clear_rows(keys, steps * kTileDepth, args.head_dim, count);
  for (int step = 0; step < steps; ++step) {
    const float* block = keys + step * kTileDepth * kScratchColumns;
    make_pair_tiles<kFullParts, true>(block, 2 * s.depth, s.columns + step * kFullWords, s.column_step());
    make_pair_tiles<kFullParts, false>(block, 2 * s.depth, s.rows + step * kFullWords, s.column_step());
  }
  for (int i = 0; i < s.depth; ++i)
    multiply_strip<kFullParts, kFullParts>(
        s.depth - i, [&](int) { return steps; }, s.columns + 2 * i * s.column_step(), s.column_step(),
        s.rows + 2 * i * s.column_step(), s.column_step(), s.products,
        [&](int pair, const float* product, int r) {
          float* sum = s.sum_of(m, i, i + pair);
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half)
#pragma GCC unroll 2
            for (int tile = 0; tile < 2; ++tile) {
              const int at = (r + half * kTileRows) * kStripRows + tile * kTileRows;
              store(sum + at, load(sum + at) + load(product + at));
            }
        });
}

// Both triangles of the sums as (D, D).
inline void store_gram(const GramArgs& args, int m, const ModalityGramAmxScratch& s, float* out) {
  const int D = args.head_dim;
  for (int i = 0; i < s.depth; ++i)
    for (int j = i; j < s.depth; ++j) {
      const float* sum = s.sum_of(m, i, j);
      const int rows = smaller(kStripRows, D - i * kStripRows), columns = smaller(kStripRows, D - j * kStripRows);
      float* upper = out + int64_t{i} * kStripRows * D + j * kStripRows;
      copy_rows<float>(rows, columns, sum, kStripRows, upper, D);
      if (i < j) transpose(columns, rows, sum, kStripRows, out + int64_t{j} * kStripRows * D + i * kStripRows, D);
    }
}

template <class Storage>
void modality_gram_amx(const GramArgs& args, const ModalityGramItem& item, void* memory) {
  Arena<float> arena(memory);
  ModalityGramAmxScratch s(args, arena);
  const AmxTileConfig unit;
  memset(s.sums, 0, sizeof(float) * static_cast<size_t>(args.num_modalities * s.sum_elements()));
  const int32_t* modality = args.modality + item.batch * args.modality_batch;
  int counts[kMaxModalities] = {};
  for (int64_t token = item.first; token < item.last; ++token) {
    const int m = modality[token * args.modality_token];
    if (m < 0) continue;
    float factor;
    bool normalised;
    load_feature(args, row_of<Storage>(args.key, item.batch, item.kv_head, token_row(args, token)),
                 s.keys_of(m) + counts[m] * kScratchColumns, &factor, &normalised);
    if (++counts[m] < ModalityGramAmxScratch::kKeys) continue;
    add_keys(args, m, counts[m], s);
    counts[m] = 0;
  }
  for (int m = 0; m < args.num_modalities; ++m) {
    if (counts[m] > 0) add_keys(args, m, counts[m], s);
    store_gram(args, m, s, static_cast<float*>(item.gram) + m * state_elements(args));
  }
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
