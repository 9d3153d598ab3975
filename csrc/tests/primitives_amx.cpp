// The tile products of amx.h for unit tests. The vector code of these kernels is that of AVX-512, tested there.
#include "cpu/kernels/amx/amx.h"
#include "primitives.h"

namespace moda_ext {
namespace cpu {
namespace amx {

constexpr int kSteps = TileProducts::kDepth / kTileDepth;

template <int parts>
void multiply_by_columns(const float* a, const float* b, float* c) {
  alignas(64) Word a_tiles[2 * kSteps * parts * kTileWords], b_tiles[2 * kSteps * parts * kTileWords];
  constexpr int64_t step = int64_t{kSteps} * parts * kTileWords;
  make_row_tiles<parts, false>(a, 2, kSteps, a_tiles);
  make_row_tiles<parts, true>(b, 2, kSteps, b_tiles);
  const AmxTileConfig unit;
  multiply_tiles<parts, parts>(2, 2, kSteps, a_tiles, step, b_tiles, step, c, kScratchColumns);
}

template <int parts>
void multiply_by_rows(const float* a, const float* b, int row_tiles, int column_tiles, float* c) {
  alignas(64) Word a_tiles[2 * kSteps * parts * kTileWords], b_tiles[2 * kSteps * parts * kTileWords];
  constexpr int64_t step = int64_t{kSteps} * parts * kTileWords;
  for (int k = 0; k < kSteps; ++k) {
    make_pair_tiles<parts, true>(a + k * kTileDepth * kScratchColumns, 2, a_tiles + k * parts * kTileWords, step);
    make_pair_tiles<parts, false>(b + k * kTileDepth * kScratchColumns, 2, b_tiles + k * parts * kTileWords, step);
  }
  const AmxTileConfig unit;
  multiply_tiles<parts, parts>(row_tiles, column_tiles, kSteps, a_tiles, step, b_tiles, step, c, kScratchColumns);
}

}  // namespace amx

const TileProducts& tile_products() {
  static const TileProducts table = {
      amx::kScratchColumns,
      {amx::multiply_by_columns<1>, amx::multiply_by_columns<2>, amx::multiply_by_columns<3>},
      {amx::multiply_by_rows<1>, amx::multiply_by_rows<2>, amx::multiply_by_rows<3>},
      [](float x, int parts, float* part) {
        using namespace amx;
        Words words[3] = {};
        if (parts == 1) split<1>(splat(x), words);
        if (parts == 2) split<2>(splat(x), words);
        if (parts == 3) split<3>(splat(x), words);
        for (int p = 0; p < parts; ++p) {
          const Word bits = words[p][0];
          memcpy(part + p, &bits, sizeof(bits));
        }
      },
  };
  return table;
}

}  // namespace cpu
}  // namespace moda_ext
