// The emulated thread block itself: instructions as PTX documents them, and that it notices what it promises to. And
// which kernels a GPU gets.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/dispatch.h"
#include "cuda/ptx.h"

namespace moda_ext {
namespace cuda {
namespace {

using emulation::Schedule;

void run_block(int threads, size_t shared_bytes, const std::function<void(char*)>& body) {
  emulation::run_grid(1, threads, shared_bytes, body);
}

std::string error_of(int threads, const std::function<void(char*)>& body) {
  try {
    run_block(threads, 1024, body);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Emulation, SharedMemoryStartsAsNaN) {
  bool nan = false;
  run_block(32, 64, [&](char* shared) { nan = std::isnan(reinterpret_cast<float*>(shared)[thread_index() % 16]); });
  EXPECT_TRUE(nan);
}

// A value that one warp leaves in shared memory for the next. Every schedule must show a missing barrier to one side.
float handed_over(Schedule schedule, bool with_barrier) {
  float got = 0;
  emulation::set_schedule(schedule, 3);
  run_block(64, 64, [&](char* shared) {
    float* slot = reinterpret_cast<float*>(shared);
    if (thread_index() == (schedule == Schedule::kFirstWarp ? 63 : 0)) *slot = 5;
    if (with_barrier) sync_threads();
    if (thread_index() == (schedule == Schedule::kFirstWarp ? 0 : 63)) got = *slot;
  });
  emulation::set_schedule(Schedule::kFirstWarp);
  return got;
}
TEST(Emulation, AMissingBarrierShows) {
  for (const Schedule schedule : {Schedule::kFirstWarp, Schedule::kLastWarp}) {
    EXPECT_EQ(handed_over(schedule, true), 5);
    EXPECT_TRUE(std::isnan(handed_over(schedule, false)));
  }
}

TEST(Emulation, CopiesArriveWhenWaitedFor) {
  const std::vector<float> source(8, 2.0f);
  std::vector<float> seen;
  run_block(32, 64, [&](char* shared) {
    if (thread_index() != 0) return;
    float* slot = reinterpret_cast<float*>(shared);
    copy_async_16(slot, source.data(), true);
    commit_copies();
    copy_async_16(slot + 4, source.data(), false);
    commit_copies();
    seen.push_back(slot[0]);
    wait_copies<1>();
    seen.push_back(slot[0]);
    seen.push_back(slot[4]);
    wait_copies<0>();
    seen.push_back(slot[4]);
  });
  ASSERT_EQ(seen.size(), 4u);
  EXPECT_TRUE(std::isnan(seen[0]));
  EXPECT_EQ(seen[1], 2);
  EXPECT_TRUE(std::isnan(seen[2]));
  EXPECT_EQ(seen[3], 0);
}

TEST(Emulation, ErrorsNameTheInstruction) {
  const float source[8] = {};
  EXPECT_NE(error_of(64,
                     [](char*) {
                       if (thread_index() < 32) sync_threads();
                     })
                .find("deadlock"),
            std::string::npos);
  EXPECT_NE(error_of(32,
                     [](char*) {
                       if (thread_index() < 31) shuffle(1, 0);
                     })
                .find("(shuffle)"),
            std::string::npos);
  EXPECT_NE(error_of(32,
                     [](char*) {
                       if (thread_index() < 16) {
                         shuffle(1, 0);
                       } else {
                         sync_warp();
                       }
                     })
                .find("diverge"),
            std::string::npos);
  EXPECT_NE(error_of(32, [&](char* shared) { copy_async_16(shared + 4, source, true); }).find("misaligned shared"),
            std::string::npos);
  EXPECT_NE(error_of(32, [&](char* shared) { copy_async_16(shared, source + 1, true); }).find("misaligned global"),
            std::string::npos);
  EXPECT_NE(error_of(32, [&](char* shared) { copy_async_16(shared + 1024, source, true); }).find("outside shared"),
            std::string::npos);
  EXPECT_NE(error_of(32,
                     [&](char* shared) {
                       copy_async_16(shared, source, true);
                       commit_copies();
                     })
                .find("in flight"),
            std::string::npos);
}

// load_matrices and multiply_add against the index formulas of the PTX manual, written out a second time: element (r,
// c) of a matrix lies in lane 4 r + c / 2, or, transposed, in lane 4 c + r / 2.
TEST(Emulation, MatricesLieWhereTheManualSays) {
  run_block(32, 512, [](char* shared) {
    const int lane = lane_index();
    uint16_t* numbers = reinterpret_cast<uint16_t*>(shared);
    for (int i = lane; i < 256; i += 32) numbers[i] = static_cast<uint16_t>(i);  // matrix i / 64, row i / 8 % 8
    sync_warp();
    uint32_t plain[4], transposed[4];
    load_matrices(plain, numbers + 8 * lane);
    load_matrices_transposed(transposed, numbers + 8 * lane);
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int row = 0; row < 8; ++row) {
        for (int column = 0; column < 8; ++column) {
          const uint32_t expected = static_cast<uint32_t>(64 * matrix + 8 * row + column);
          if (lane == 4 * row + column / 2) {
            EXPECT_EQ(plain[matrix] >> 16 * (column % 2) & 0xffff, expected);
          }
          if (lane == 4 * column + row / 2) {
            EXPECT_EQ(transposed[matrix] >> 16 * (row % 2) & 0xffff, expected);
          }
        }
      }
    }
  });
}

TEST(Emulation, MultiplyAddFollowsTheFragmentLayouts) {
  const auto a_of = [](int row, int k) { return static_cast<float>((7 * row + 3 * k) % 11 - 5); };
  const auto b_of = [](int k, int column) { return static_cast<float>((5 * column + 2 * k) % 13 - 6); };
  run_block(32, 16, [&](char*) {
    // The manual: for a_i, i = 0..7, row = g for i in {0, 1, 4, 5} else g + 8, column = 2 t + i % 2, plus 8 for i >= 4;
    // for b_i, i = 0..3, row = 2 t + i % 2, plus 8 for i >= 2, column = g; for c_i, row = g + 8 (i / 2), column = 2 t +
    // i % 2.
    const int g = lane_index() >> 2, t = lane_index() & 3;
    uint32_t a[4], b[2];
    for (int i = 0; i < 8; i += 2) {
      const int row = i == 0 || i == 4 ? g : g + 8, column = 2 * t + (i >= 4 ? 8 : 0);
      a[i / 2] = pack_pair<BFloat16>(a_of(row, column), a_of(row, column + 1));
    }
    for (int i = 0; i < 4; i += 2) {
      const int row = 2 * t + (i >= 2 ? 8 : 0);
      b[i / 2] = pack_pair<BFloat16>(b_of(row, g), b_of(row + 1, g));
    }
    float c[4] = {1, 2, 3, 4};
    multiply_add<BFloat16>(c, a, b[0], b[1]);
    for (int i = 0; i < 4; ++i) {
      float expected = static_cast<float>(i + 1);
      for (int k = 0; k < 16; ++k) expected += a_of(g + 8 * (i / 2), k) * b_of(k, 2 * t + i % 2);
      EXPECT_EQ(c[i], expected);
    }
  });
}

TEST(Emulation, ShuffleAndOr) {
  run_block(64, 16, [](char*) {
    const int lane = lane_index();
    EXPECT_EQ(shuffle(static_cast<float>(thread_index()), 5), static_cast<float>(thread_index() - lane + 5));
    EXPECT_EQ(shuffle_xor(static_cast<float>(lane), 3), static_cast<float>(lane ^ 3));
    EXPECT_EQ(warp_or(lane == 7 ? 4u : lane == 9 ? 1u : 0u), 5u);
  });
}

TEST(Emulation, Conversions) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float b = to_float(BFloat16{half}), f = to_float(Float16{half});
    if (!std::isnan(b)) {
      ASSERT_EQ(from_float<BFloat16>(b).bits, half);
    }
    if (!std::isnan(f)) {
      ASSERT_EQ(from_float<Float16>(f).bits, half);
    }
  }
  EXPECT_EQ(from_float<BFloat16>(1.00390625f).bits, 0x3f80);  // halfway: to even
  EXPECT_EQ(from_float<BFloat16>(1.01171875f).bits, 0x3f82);  // halfway: to even
  EXPECT_EQ(from_float<Float16>(1.00048828125f).bits, 0x3c00);
  EXPECT_EQ(from_float<Float16>(65519.0f).bits, 0x7bff);
  EXPECT_EQ(from_float<Float16>(65520.0f).bits, 0x7c00);
  EXPECT_EQ(from_float<Float16>(-3e-8f).bits, 0x8001);
  EXPECT_TRUE(std::isnan(to_float(from_float<Float16>(NAN))));
  EXPECT_EQ(exp2_fast(-INFINITY), 0);
  EXPECT_EQ(exp2_fast(-130.0f), 0);  // subnormal results flush
}

template <int kHeadDim>
struct OldKernels {
  static constexpr int kCapability = 80, kSize = kHeadDim;
};
template <int kHeadDim>
struct NewKernels {
  static constexpr int kCapability = 90, kSize = kHeadDim;
};

TEST(Dispatch, AGpuGetsTheNewestKernelsItRunsAndTheSmallestSizeThatHoldsItsHeads) {
  struct Choice {
    int capability, size;
  };
  const auto choose = [](int capability, int64_t head_dim) {
    Choice choice{};
    with_kernels<NewKernels, OldKernels>(capability, head_dim, [&](auto kernels) {
      choice = {decltype(kernels)::kCapability, decltype(kernels)::kSize};
    });
    return choice;
  };
  for (const int capability : {80, 86, 89}) EXPECT_EQ(choose(capability, 64).capability, 80);
  for (const int capability : {90, 100, 120}) EXPECT_EQ(choose(capability, 64).capability, 90);
  for (const int capability : {80, 90}) {
    EXPECT_EQ(choose(capability, 8).size, 32);
    EXPECT_EQ(choose(capability, 64).size, 64);
    EXPECT_EQ(choose(capability, 72).size, 96);
    EXPECT_EQ(choose(capability, 256).size, 256);
  }
}

TEST(Dispatch, AnOlderGpuIsRefused) {
  try {
    with_kernels<OldKernels>(75, 64, [](auto) { ADD_FAILURE() << "no kernels run there"; });
    ADD_FAILURE() << "accepted";
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "moda_ext: the CUDA kernels need compute capability 8.0 or later, this GPU has 7.5");
  }
}

}  // namespace
}  // namespace cuda
}  // namespace moda_ext
