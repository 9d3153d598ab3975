// The run planner: every key in exactly one tile of its own modality, in order, and what a row sees of a tile.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/runs.h"

namespace moda_ext {
namespace {

constexpr int kTile = 64, kPanelKeys = 16;

KeyPlan plan(const std::vector<int32_t>& modality, int num_modalities) {
  return plan_keys(modality.data(), 1, static_cast<int64_t>(modality.size()), num_modalities, kTile, kPanelKeys);
}

std::vector<int32_t> runs(std::initializer_list<std::pair<int32_t, int>> list) {
  std::vector<int32_t> result;
  for (const auto& [modality, length] : list) result.insert(result.end(), length, modality);
  return result;
}

// What every plan owes its kernels.
void check_invariants(const std::vector<int32_t>& modality, const KeyPlan& plan) {
  std::vector<int> seen(modality.size(), 0);
  int32_t slot = 0, panel = 0;
  for (const KeyTile& tile : plan.tiles) {
    EXPECT_EQ(tile.start, slot);
    EXPECT_EQ(tile.panel, panel);
    EXPECT_GE(tile.length, 1);
    EXPECT_LE(tile.length, kTile);
    for (int32_t j = 0; j < tile.length; ++j) {
      const int32_t position = plan.order[tile.start + j];
      ++seen[position];
      EXPECT_EQ(modality[position], tile.modality);
      EXPECT_TRUE(j == 0 || position > plan.order[tile.start + j - 1]);
    }
    slot += tile.length;
    panel += (tile.length + kPanelKeys - 1) / kPanelKeys;
  }
  EXPECT_EQ(static_cast<size_t>(slot), plan.order.size());
  EXPECT_EQ(panel, plan.num_panels);
  for (size_t j = 0; j < modality.size(); ++j) EXPECT_EQ(seen[j], modality[j] >= 0 ? 1 : 0) << "key " << j;
  for (size_t m = 0; m < plan.first_position.size(); ++m) {
    const auto first = std::find(modality.begin(), modality.end(), static_cast<int32_t>(m));
    EXPECT_EQ(plan.first_position[m], first == modality.end() ? INT32_MAX : first - modality.begin()) << "id " << m;
  }
}

TEST(PlanKeys, EmptySequenceHasNoTiles) {
  const KeyPlan result = plan({}, 2);
  EXPECT_TRUE(result.tiles.empty());
  EXPECT_EQ(result.num_panels, 0);
}

TEST(PlanKeys, OneShortRunIsOneTile) {
  const KeyPlan result = plan(runs({{0, 5}}), 1);
  ASSERT_EQ(result.tiles.size(), 1u);
  EXPECT_EQ(result.tiles[0].length, 5);
  EXPECT_EQ(result.num_panels, 1);
}

TEST(PlanKeys, LongRunIsCutIntoFullTiles) {
  const KeyPlan result = plan(runs({{1, 3 * kTile + 1}}), 2);
  ASSERT_EQ(result.tiles.size(), 4u);
  EXPECT_EQ(result.tiles[2].length, kTile);
  EXPECT_EQ(result.tiles[3].length, 1);
}

TEST(PlanKeys, TilesSnapToRuns) {
  const std::vector<int32_t> modality = runs({{0, 32}, {1, 100}, {0, 30}});
  const KeyPlan result = plan(modality, 2);
  EXPECT_FALSE(result.grouped);
  ASSERT_EQ(result.tiles.size(), 4u);
  EXPECT_EQ(result.tiles[1].modality, 1);
  EXPECT_EQ(result.tiles[2].length, 36);
  check_invariants(modality, result);
}

TEST(PlanKeys, PaddingIsInNoTile) {
  const std::vector<int32_t> modality = runs({{-1, 7}, {0, 40}, {-1, 3}, {1, 33}, {-1, 9}});
  const KeyPlan result = plan(modality, 2);
  EXPECT_EQ(result.order.size(), 73u);
  check_invariants(modality, result);
}

TEST(PlanKeys, PaddingSplitsARunOfOneModality) {
  const std::vector<int32_t> modality = runs({{0, 40}, {-1, 1}, {0, 40}});
  check_invariants(modality, plan(modality, 1));
}

TEST(PlanKeys, AllPaddingHasNoTiles) {
  const KeyPlan result = plan(runs({{-1, 50}}), 3);
  EXPECT_TRUE(result.tiles.empty());
  EXPECT_TRUE(result.order.empty());
}

TEST(PlanKeys, AlternatingKeysAreGroupedByModality) {
  std::vector<int32_t> modality;
  for (int j = 0; j < 200; ++j) modality.push_back(j % 2);
  const KeyPlan result = plan(modality, 2);
  EXPECT_TRUE(result.grouped);
  EXPECT_EQ(result.num_panels, 14);  // 100 keys each: 6 full panels and one of 4 keys; alternating tiles would need 200
  check_invariants(modality, result);
}

TEST(PlanKeys, LongRunsAreNotGrouped) { EXPECT_FALSE(plan(runs({{1, 256}, {0, 64}, {1, 256}, {0, 64}}), 2).grouped); }

TEST(PlanKeys, StrideIsRespected) {
  const std::vector<int32_t> modality = {0, 9, 1, 9, 0, 9};
  const KeyPlan result = plan_keys(modality.data(), 2, 3, 2, kTile, kPanelKeys);
  EXPECT_EQ(result.order.size(), 3u);
}

TEST(PlanKeys, RandomSequencesKeepTheInvariants) {
  std::mt19937 random(0);
  for (int trial = 0; trial < 200; ++trial) {
    const int num_modalities = 1 + static_cast<int>(random() % 16);
    std::vector<int32_t> modality;
    const int pieces = static_cast<int>(random() % 20);
    const int longest = trial % 2 ? 3 : 150;
    for (int p = 0; p < pieces; ++p)
      modality.insert(modality.end(), random() % longest + 1,
                      static_cast<int32_t>(random() % (num_modalities + 1)) - 1);
    check_invariants(modality, plan(modality, num_modalities));
  }
}

void expect_rejected(const std::vector<int32_t>& modality, int num_modalities, const std::string& id,
                     const std::string& key) {
  try {
    plan(modality, num_modalities);
    FAIL() << "accepted";
  } catch (const std::invalid_argument& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("key_modality holds " + id + " at key " + key), std::string::npos) << message;
  }
}

TEST(PlanKeys, IdAboveTheRangeIsRejected) { expect_rejected({0, 1, 2}, 2, "2", "2"); }
TEST(PlanKeys, IdBelowTheRangeIsRejected) { expect_rejected({0, -2}, 2, "-2", "1"); }

TEST(VisibleKeys, CountsPositionsUpToTheLast) {
  // A contiguous tile, one with a gap, and single keys: against counting.
  const std::vector<std::vector<int32_t>> tiles = {
      {4, 5, 6, 7, 8}, {0, 2, 4, 6, 8, 10, 12}, {3, 4, 9, 10, 11, 30}, {5}, {0, 1}, {7, 9}};
  for (const std::vector<int32_t>& order : tiles) {
    const KeyTile tile = {0, static_cast<int32_t>(order.size()), 0, 0};
    for (int64_t last = -3; last < 40; ++last) {
      const auto expected = std::count_if(order.begin(), order.end(), [&](int32_t p) { return p <= last; });
      EXPECT_EQ(visible_keys(order.data(), tile, last), expected) << "last " << last;
    }
  }
}

}  // namespace
}  // namespace moda_ext
