// The run planner: from the modality of every key to key tiles of a single modality (docs/kernels.md, "Structure").
//
// Multimodal sequences are long runs (an image's patches, then text), so nearly every tile lies inside one run and the
// inner loops of the kernels are plain attention with one scalar per row. Padding keys (modality -1) are in no tile:
// they are never read. When runs are so short that rounding each up to whole panels would waste work, keys are grouped
// by modality instead (a stable sort), and causality becomes a count per row and tile, because positions inside a tile
// still ascend.
#pragma once

#include <cstdint>
#include <vector>

#include "core/tile.h"

namespace moda_ext {

struct KeyPlan {
  std::vector<int32_t> order;  // order[slot] = position of the key in its sequence; padding left out
  std::vector<KeyTile> tiles;
  std::vector<int32_t> first_position;  // of each modality: where its first key is, INT32_MAX if it has none
  int32_t num_panels = 0;               // packed storage needed, each tile rounded up to whole panels
  bool grouped = false;                 // keys were grouped by modality
};

// Plans num_keys keys whose modalities are key_modality[i * stride], into tiles of at most tile_keys keys and panels of
// panel_keys (tile_keys is a multiple of panel_keys). Throws std::invalid_argument, naming op and key_modality, on an
// id outside [-1, num_modalities).
KeyPlan plan_keys(const int32_t* key_modality, int64_t stride, int64_t num_keys, int num_modalities, int tile_keys,
                  int panel_keys, const char* op = "modular_attention");

}  // namespace moda_ext
