// Matrix products with AMX: float32 accuracy from bfloat16 tile instructions.
//
// A float is the exact sum of three bfloat16 numbers x = x0 + x1 + x2 (8 bits of mantissa each), a half of two, a
// bfloat16 of one. A product of two such sums keeps the terms x_i y_j with i + j <= 2: what is dropped is below 2^-25
// of |x||y|. The AMX unit does 1024 operations a cycle against 64 of a core's two AVX-512 units, so six terms still
// leave 2.7 times the rate. The small terms are summed first, over the whole depth, and x0 y0 last: the accumulator is
// then rounded at its final magnitude only as often as in an ordinary float product.
//
// A tile is 16 rows of 16 32-bit words; a word holds two bfloat16 numbers that are neighbours along the depth of the
// product. Everything is stored as whole tiles (1 KB, one after the other), zero beyond the edges:
//
//   row tile   row = row of the matrix, words = its columns c and c + 16 of a step of 32      depth = columns
//   pair tile  row = rows r and r + 16 of a step of 32, words = 16 columns                    depth = rows
//
// The first operand of a tile product is [rows][depth], the second [depth][columns], both in words. So a row tile is a
// first operand (A of A B^T) and its transpose a second one (B), a pair tile is a second operand (B of A^T B) and its
// transpose a first one (A). Which rows or columns share a word is our choice as long as both operands agree; 16 apart
// makes it a shift and an or of whole vectors.
#pragma once

#include "cpu/kernels/common/pack.h"

namespace moda_ext {
namespace cpu {
namespace MODA_EXT_ISA {

constexpr int kTileRows = 16;              // of a tile register; also words in a row
constexpr int kTileDepth = 32;             // bfloat16 numbers in a row of a first operand
constexpr int kTileWords = 256;            // 1 KB
constexpr int kStripRows = 2 * kTileRows;  // rows, or columns, of a block of 2 x 2 tiles
constexpr int kBlockElements = kStripRows * kStripRows;

typedef uint32_t Word;
typedef Word Words __attribute__((vector_size(64)));

// How many bfloat16 numbers make up an element of an input, and of a probability or its gradient. For inputs it is
// exact; probabilities of 16-bit attention get 17 bits, more than the results will keep.
template <class Storage>
constexpr int kInputParts = 3;
template <>
constexpr int kInputParts<Float16> = 2;
template <>
constexpr int kInputParts<BFloat16> = 1;
template <class Storage>
constexpr int kInnerParts = sizeof(Storage) == 4 ? 3 : 2;
constexpr int kFullParts = 3;  // of what is to have float32 accuracy
constexpr int kFullWords = kFullParts * kTileWords;

MODA_EXT_INLINE constexpr int tiles_of(int rows) { return (rows + kTileRows - 1) / kTileRows; }
MODA_EXT_INLINE constexpr int steps_of(int depth) { return (depth + kTileDepth - 1) / kTileDepth; }

// The AMX unit, configured for whole tiles; released afterwards, so that the operating system saves no tile data.
class AmxTileConfig {
 public:
  AmxTileConfig() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    __asm__ volatile("" : : "r"(&config) : "memory");  // GCC believes that only eight bytes of it are read
    _tile_loadconfig(&config);
  }
  ~AmxTileConfig() { _tile_release(); }
  AmxTileConfig(const AmxTileConfig&) = delete;
  AmxTileConfig& operator=(const AmxTileConfig&) = delete;
};

// GCC's tile loads do not say that they read memory: what was stored before must not be moved behind them.
MODA_EXT_INLINE void finish_stores() { __asm__ volatile("" ::: "memory"); }

// Registers: sums in 0 to 3 (2 x 2 tiles), A in 4 and 5, B in 6 and 7.
template <int MT>
MODA_EXT_INLINE void load_a(const Word* a, int64_t row_step) {
  _tile_loadd(4, a, 64);
  if (MT == 2) _tile_loadd(5, a + row_step, 64);
}
template <int NT>
MODA_EXT_INLINE void load_b(const Word* b, int64_t column_step) {
  _tile_loadd(6, b, 64);
  if (NT == 2) _tile_loadd(7, b + column_step, 64);
}
template <int MT, int NT>
MODA_EXT_INLINE void multiply_loaded() {
  _tile_dpbf16ps(0, 4, 6);
  if (NT == 2) _tile_dpbf16ps(1, 4, 7);
  if (MT == 2) _tile_dpbf16ps(2, 5, 6);
  if (MT == 2 && NT == 2) _tile_dpbf16ps(3, 5, 7);
}

// C = A B for MT x NT tiles and a depth of `steps` steps. Tile (row tile r, step k, part p) of A lies at
//
//   a + r * a_row_step + (k * PA + p) * kTileWords
//
// and of B alike. between() is called num_groups(PA, PB) * steps times, after each group of MT x NT tile instructions:
// vector work placed there runs while the AMX unit is busy.
MODA_EXT_INLINE constexpr int num_groups(int pa, int pb) {
  return 1 + (pa > 1) + (pb > 1) + (pa > 1 && pb > 1) + (pa > 2) + (pb > 2);
}

template <int PA, int PB, int MT, int NT, class Between>
MODA_EXT_INLINE void multiply_tiles(int steps, const Word* a, int64_t a_row_step, const Word* b, int64_t b_column_step,
                                    float* c, int64_t c_stride, Between between) {
  finish_stores();
  _tile_zero(0);
  if (NT == 2) _tile_zero(1);
  if (MT == 2) _tile_zero(2);
  if (MT == 2 && NT == 2) _tile_zero(3);
  if (PA > 1 || PB > 1) {
    const Word *ak = a, *bk = b;
    for (int k = 0; k < steps; ++k, ak += PA * kTileWords, bk += PB * kTileWords) {
      // (0,2) (0,1) (1,1) (1,0) (2,0): one operand changes at a time
      load_a<MT>(ak, a_row_step);
      if (PB > 2) {
        load_b<NT>(bk + 2 * kTileWords, b_column_step);
        multiply_loaded<MT, NT>();
        between();
      }
      if (PB > 1) {
        load_b<NT>(bk + kTileWords, b_column_step);
        multiply_loaded<MT, NT>();
        between();
      }
      if (PA > 1) {
        load_a<MT>(ak + kTileWords, a_row_step);
        if (PB > 1) {
          multiply_loaded<MT, NT>();
          between();
        }
        load_b<NT>(bk, b_column_step);
        multiply_loaded<MT, NT>();
        between();
      }
      if (PA > 2) {
        load_a<MT>(ak + 2 * kTileWords, a_row_step);
        multiply_loaded<MT, NT>();
        between();
      }
    }
  }
  for (int k = 0; k < steps; ++k, a += PA * kTileWords, b += PB * kTileWords) {
    load_a<MT>(a, a_row_step);
    load_b<NT>(b, b_column_step);
    multiply_loaded<MT, NT>();
    between();
  }
  const int64_t bytes = c_stride * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, c, bytes);
  if (NT == 2) _tile_stored(1, c + kTileRows, bytes);
  if (MT == 2) _tile_stored(2, c + kTileRows * c_stride, bytes);
  if (MT == 2 && NT == 2) _tile_stored(3, c + kTileRows * c_stride + kTileRows, bytes);
}

// The same for row_tiles in {1, 2} and two tiles of columns.
template <int PA, int PB, class Between>
MODA_EXT_INLINE void multiply_tiles(int row_tiles, int steps, const Word* a, int64_t a_row_step, const Word* b,
                                    int64_t b_column_step, float* c, int64_t c_stride, Between between) {
  if (row_tiles == 2) {
    multiply_tiles<PA, PB, 2, 2>(steps, a, a_row_step, b, b_column_step, c, c_stride, between);
  } else {
    multiply_tiles<PA, PB, 1, 2>(steps, a, a_row_step, b, b_column_step, c, c_stride, between);
  }
}

// The same for row_tiles, column_tiles in {1, 2}, with nothing in between.
template <int PA, int PB>
__attribute__((noinline)) void multiply_tiles(int row_tiles, int column_tiles, int steps, const Word* a,
                                              int64_t a_row_step, const Word* b, int64_t b_column_step, float* c,
                                              int64_t c_stride) {
  if (row_tiles == 2 && column_tiles == 2) {
    multiply_tiles<PA, PB, 2, 2>(steps, a, a_row_step, b, b_column_step, c, c_stride, [] {});
  } else if (row_tiles == 2) {
    multiply_tiles<PA, PB, 2, 1>(steps, a, a_row_step, b, b_column_step, c, c_stride, [] {});
  } else if (column_tiles == 2) {
    multiply_tiles<PA, PB, 1, 2>(steps, a, a_row_step, b, b_column_step, c, c_stride, [] {});
  } else {
    multiply_tiles<PA, PB, 1, 1>(steps, a, a_row_step, b, b_column_step, c, c_stride, [] {});
  }
}

// Calls row(0) .. row(15), spread evenly over the first `groups` groups of a tile product: vector work that runs while
// the AMX unit is busy.
template <class Row>
class Slices {
 public:
  Slices(int groups, const Row& row) : groups_(groups), row_(row) {}
  MODA_EXT_INLINE void operator()() {
    for (credit_ += kTileRows; credit_ >= groups_ && next_ < kTileRows; credit_ -= groups_) row_(next_++);
    finish_stores();
  }

 private:
  const int groups_;
  const Row& row_;
  int credit_ = 0, next_ = 0;
};

struct Nothing {
  template <class... Arguments>
  MODA_EXT_INLINE void operator()(Arguments...) const {}
};
template <class Work>
constexpr bool kIsNothing = false;
template <>
constexpr bool kIsNothing<Nothing> = true;

// A strip as a first operand that is made while it is used, a step of its depth at a time. Its first parts are kept,
// for the last pass over them; the others too, for further products, or else in a ring of two steps.
template <int parts>
struct StripTiles {
  Word *first, *others;
  int steps;
  bool ring;

  MODA_EXT_INLINE Word* at(int row_tile, int step, int part) const {
    if (part == 0) return first + (row_tile * steps + step) * kTileWords;
    const int slot = ring ? step % 2 : step;
    return others + ((slot * 2 + row_tile) * (parts - 1) + part - 1) * kTileWords;
  }
};

// A tile of columns of the second operand, [step][part], and where its product goes: [kStripRows][kTileRows].
struct Column {
  const Word* tiles;
  float* product;

  MODA_EXT_INLINE const Word* at(int step, int part) const { return tiles + (step * kFullParts + part) * kTileWords; }
};

// Adds the product of parts PA and PB of one step to sums 0, 1, 2 (first row tile) and 3, 4, 5.
template <int PA, int PB, int NT, int parts, class Between>
MODA_EXT_INLINE void multiply_parts(const StripTiles<parts>& strip, int step, const Column* columns, Between& between) {
  _tile_loadd(6, strip.at(0, step, PA), 64);
  _tile_loadd(7, columns[0].at(step, PB), 64);
  _tile_dpbf16ps(0, 6, 7);
  if (NT > 1) {
    _tile_loadd(7, columns[1].at(step, PB), 64);
    _tile_dpbf16ps(1, 6, 7);
  }
  if (NT > 2) {
    _tile_loadd(7, columns[2].at(step, PB), 64);
    _tile_dpbf16ps(2, 6, 7);
  }
  between();
  _tile_loadd(6, strip.at(1, step, PA), 64);
  if (NT > 2) {
    _tile_dpbf16ps(5, 6, 7);
    _tile_loadd(7, columns[1].at(step, PB), 64);
  }
  if (NT > 1) {
    _tile_dpbf16ps(4, 6, 7);
    _tile_loadd(7, columns[0].at(step, PB), 64);
  }
  _tile_dpbf16ps(3, 6, 7);
  between();
}

// A strip times NT in {1, 2, 3} tiles of columns in full parts. prepare(step, r), r < 16, runs for every step but the
// first, under the products of the one before; between(r) under those of the first parts.
template <int NT, int parts, class Prepare, class Between>
MODA_EXT_INLINE void multiply_columns(const StripTiles<parts>& strip, const Column* columns, const Prepare& prepare,
                                      const Between& between) {
  finish_stores();
  _tile_zero(0);
  _tile_zero(3);
  if (NT > 1) _tile_zero(1);
  if (NT > 1) _tile_zero(4);
  if (NT > 2) _tile_zero(2);
  if (NT > 2) _tile_zero(5);
  for (int step = 0; step < strip.steps; ++step) {
    const auto row = [&](int r) {
      if (step + 1 < strip.steps) prepare(step + 1, r);
    };
    Slices slices(2 * (num_groups(parts, kFullParts) - 1), row);
    multiply_parts<0, 2, NT>(strip, step, columns, slices);
    multiply_parts<0, 1, NT>(strip, step, columns, slices);
    if constexpr (parts > 1) {
      multiply_parts<1, 1, NT>(strip, step, columns, slices);
      multiply_parts<1, 0, NT>(strip, step, columns, slices);
    }
    if constexpr (parts > 2) multiply_parts<2, 0, NT>(strip, step, columns, slices);
  }
  Slices slices(2 * strip.steps, between);
  for (int step = 0; step < strip.steps; ++step) multiply_parts<0, 0, NT>(strip, step, columns, slices);
  _tile_stored(0, columns[0].product, 64);
  _tile_stored(3, columns[0].product + kTileWords, 64);
  if (NT > 1) _tile_stored(1, columns[1].product, 64);
  if (NT > 1) _tile_stored(4, columns[1].product + kTileWords, 64);
  if (NT > 2) _tile_stored(2, columns[2].product, 64);
  if (NT > 2) _tile_stored(5, columns[2].product + kTileWords, 64);
  finish_stores();
}

// The same for NT = count.
template <int parts, class Prepare, class Between>
MODA_EXT_INLINE void multiply_columns(int count, const StripTiles<parts>& strip, const Column* columns,
                                      const Prepare& prepare, const Between& between) {
  if (count == 1) multiply_columns<1>(strip, columns, prepare, between);
  if (count == 2) multiply_columns<2>(strip, columns, prepare, between);
  if (count == 3) multiply_columns<3>(strip, columns, prepare, between);
}

// One strip times `pairs` pairs of column tiles, steps(pair) steps deep. epilogue(pair, product, r) takes rows r and
// r + 16 of a product (stride kStripRows); it runs between the tile instructions of the next one. before(r) runs
// between those of the first.
template <int PA, int PB, class Steps, class Before, class Epilogue>
MODA_EXT_INLINE void multiply_strip(int pairs, const Steps& steps, const Word* a, int64_t a_row_step, const Word* b,
                                    int64_t b_column_step, float* products, const Before& before,
                                    const Epilogue& epilogue) {
  const auto product_of = [&](int pair) { return products + pair % 2 * kBlockElements; };
  for (int pair = 0; pair < pairs; ++pair) {
    const Word* columns = b + 2 * pair * b_column_step;
    if (kIsNothing<Before> && pair == 0) {
      multiply_tiles<PA, PB>(2, 2, steps(pair), a, a_row_step, columns, b_column_step, product_of(pair), kStripRows);
      continue;
    }
    const auto row = [&](int r) {
      if (pair == 0) {
        before(r);
      } else {
        epilogue(pair - 1, product_of(pair - 1), r);
      }
    };
    multiply_tiles<PA, PB, 2, 2>(steps(pair), a, a_row_step, columns, b_column_step, product_of(pair), kStripRows,
                                 Slices(steps(pair) * num_groups(PA, PB), row));
  }
  finish_stores();
  for (int r = 0; r < kTileRows; ++r) epilogue(pairs - 1, product_of(pairs - 1), r);
}
template <int PA, int PB, class Steps, class Epilogue>
MODA_EXT_INLINE void multiply_strip(int pairs, const Steps& steps, const Word* a, int64_t a_row_step, const Word* b,
                                    int64_t b_column_step, float* products, const Epilogue& epilogue) {
  multiply_strip<PA, PB>(pairs, steps, a, a_row_step, b, b_column_step, products, Nothing(), epilogue);
}

// x as a sum of `parts` bfloat16 numbers, in the upper halves of words, rounded to nearest (ties away from zero). A
// third part needs no rounding, 8 of 24 bits are left; only where it is subnormal there is something below, which join
// drops.
template <int parts>
MODA_EXT_INLINE void split(Vector<float> x, Words* part) {
#pragma GCC unroll 3
  for (int i = 0; i < parts; ++i) {
    part[i] = i < 2 ? ((Words)x + 0x8000u) & 0xffff0000u : (Words)x;
    if (i + 1 < parts) x -= (Vector<float>)part[i];
  }
}
// Upper halves of two vectors of words side by side, the second in the upper halves.
MODA_EXT_INLINE Words join(Words first, Words second) {
  constexpr int kOrAnd = 0xf8;  // a | (b & c)
  return (Words)_mm512_ternarylogic_epi32((__m512i)(first >> 16), (__m512i)second, _mm512_set1_epi32(-0x10000), kOrAnd);
}

// Before `count` rows of head_dim columns are loaded into `rows` (stride kScratchColumns): zeros wherever whole tiles
// read beyond them.
MODA_EXT_INLINE void clear_rows(float* rows, int tile_rows, int head_dim, int count) {
  const int width = steps_of(head_dim) * kTileDepth;
  for (int i = 0; i < tile_rows; ++i) {
    const int from = i < count ? head_dim : 0;
    if (from < width) memset(rows + i * kScratchColumns + from, 0, sizeof(float) * (width - from));
  }
}

MODA_EXT_INLINE void store_words(Word* to, Words words) { memcpy(to, &words, sizeof(words)); }

// One tile in all its parts, or its transpose: row r joins 16 numbers of row r of `first` and of `second` (both of
// stride `stride`).
template <int parts, bool transposed>
MODA_EXT_INLINE void make_tile(const float* first, const float* second, Word* out, int64_t stride = kScratchColumns) {
  Vector<float> square[parts][kTileRows];
  for (int r = 0; r < kTileRows; ++r) {
    Words low[parts], high[parts];
    split<parts>(load(first + r * stride), low);
    split<parts>(load(second + r * stride), high);
    for (int p = 0; p < parts; ++p) square[p][r] = (Vector<float>)join(low[p], high[p]);
  }
  for (int p = 0; p < parts; ++p) {
    if (transposed) transpose_square<float>(square[p]);
    for (int r = 0; r < kTileRows; ++r) store_words(out + p * kTileWords + r * kTileRows, (Words)square[p][r]);
  }
}

// Row tiles of 16 row_tiles rows (zero-padded to whole steps): [tile][step of columns][part].
template <int parts, bool transposed>
MODA_EXT_INLINE void make_row_tiles(const float* rows, int row_tiles, int steps, Word* out) {
  for (int tile = 0; tile < row_tiles; ++tile) {
    for (int step = 0; step < steps; ++step, out += parts * kTileWords) {
      const float* first = rows + tile * kTileRows * kScratchColumns + step * kTileDepth;
      make_tile<parts, transposed>(first, first + kTileRows, out);
    }
  }
}

// Pair tiles of 32 rows: tile c of the columns goes to out + c * column_step.
template <int parts, bool transposed>
MODA_EXT_INLINE void make_pair_tiles(const float* rows, int column_tiles, Word* out, int64_t column_step) {
  for (int tile = 0; tile < column_tiles; ++tile, out += column_step) {
    const float* first = rows + tile * kTileRows;
    make_tile<parts, transposed>(first, first + kTileRows * kScratchColumns, out);
  }
}

}  // namespace MODA_EXT_ISA
}  // namespace cpu
}  // namespace moda_ext
