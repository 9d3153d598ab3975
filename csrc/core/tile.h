// A key tile and what a row sees of it. No STL here: the kernels of every instruction set include this file, and
// the function has internal linkage, so that no instruction set's code stands in for another's.
#pragma once

#include <stdint.h>

namespace moda_ext {

struct KeyTile {
  int32_t start;     // first slot in KeyPlan::order
  int32_t length;    // keys in the tile
  int32_t modality;  // of every key in the tile
  int32_t panel;     // index of the tile's first panel in packed storage
};

// Number of keys of a tile that a row sees whose last visible position is `last` (ascending positions, so they come
// first).
static inline int32_t visible_keys(const int32_t* order, const KeyTile& tile, int64_t last) {
  const int32_t* positions = order + tile.start;
  if (positions[0] > last) return 0;
  if (positions[tile.length - 1] <= last) return tile.length;
  if (positions[tile.length - 1] - positions[0] == tile.length - 1)
    return static_cast<int32_t>(last - positions[0] + 1);
  int32_t low = 1, high = tile.length - 1;  // the answer lies in [low, high]
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (positions[middle] <= last) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace moda_ext
