#include "core/runs.h"

#include <stdexcept>
#include <string>

namespace moda_ext {
namespace {

struct Run {
  int64_t start, length;
  int32_t modality;
};

int64_t panels_of(int64_t keys, int panel_keys) { return (keys + panel_keys - 1) / panel_keys; }

}  // namespace

KeyPlan plan_keys(const int32_t* key_modality, int64_t stride, int64_t num_keys, int num_modalities, int tile_keys,
                  int panel_keys, const char* op) {
  KeyPlan plan;
  plan.first_position.assign(num_modalities, INT32_MAX);
  std::vector<Run> runs;
  std::vector<int64_t> keys_of(num_modalities, 0);
  for (int64_t j = 0; j < num_keys; ++j) {
    const int32_t modality = key_modality[j * stride];
    if (modality < -1 || modality >= num_modalities) {
      throw std::invalid_argument(std::string(op) + ": key_modality holds " + std::to_string(modality) + " at key " +
                                  std::to_string(j) + "; expected ids in [0, " + std::to_string(num_modalities) +
                                  "), or -1 for padding");
    }
    if (modality < 0) continue;
    if (keys_of[modality]++ == 0) plan.first_position[modality] = static_cast<int32_t>(j);
    if (!runs.empty() && runs.back().modality == modality && runs.back().start + runs.back().length == j) {
      ++runs.back().length;
    } else {
      runs.push_back({j, 1, modality});
    }
  }

  int64_t keys = 0, natural_panels = 0, grouped_panels = 0;
  for (const Run& run : runs) {
    keys += run.length;
    natural_panels += panels_of(run.length, panel_keys);
  }
  for (int64_t count : keys_of) grouped_panels += panels_of(count, panel_keys);

  // A quarter of wasted panels is where the extra diagonal tiles of the grouped order (one per modality and row) are
  // paid for.
  plan.grouped = 4 * (natural_panels * panel_keys - keys) > keys && 4 * grouped_panels < 3 * natural_panels;
  plan.order.reserve(keys);
  const auto append_tiles = [&](int64_t start, int64_t length, int32_t modality) {
    for (int64_t done = 0; done < length; done += tile_keys) {
      const int64_t count = length - done < tile_keys ? length - done : tile_keys;
      plan.tiles.push_back(
          {static_cast<int32_t>(start + done), static_cast<int32_t>(count), modality, plan.num_panels});
      plan.num_panels += static_cast<int32_t>(panels_of(count, panel_keys));
    }
  };
  if (plan.grouped) {
    for (int32_t modality = 0; modality < num_modalities; ++modality) {
      const int64_t start = static_cast<int64_t>(plan.order.size());
      for (const Run& run : runs) {
        if (run.modality != modality) continue;
        for (int64_t j = 0; j < run.length; ++j) plan.order.push_back(static_cast<int32_t>(run.start + j));
      }
      append_tiles(start, static_cast<int64_t>(plan.order.size()) - start, modality);
    }
  } else {
    for (const Run& run : runs) {
      const int64_t start = static_cast<int64_t>(plan.order.size());
      for (int64_t j = 0; j < run.length; ++j) plan.order.push_back(static_cast<int32_t>(run.start + j));
      append_tiles(start, run.length, run.modality);
    }
  }
  return plan;
}

}  // namespace moda_ext
