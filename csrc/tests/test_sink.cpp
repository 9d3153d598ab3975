// The closed form of pseudo scores against the sum it stands for, at its edges.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/sink.h"

namespace moda_ext {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double summed(double base, double decay, int64_t remaining) {
  double sum = 0;
  for (int64_t t = remaining; t >= 1; --t) sum += std::exp(-static_cast<double>(t - 1) * decay);
  return base + std::log(sum);
}

class SinkFormula : public testing::TestWithParam<double> {};

TEST_P(SinkFormula, EqualsTheSumInDouble) {
  for (int64_t remaining : {1, 2, 3, 10, 1000, 100000})
    EXPECT_NEAR(pseudo_score_sink<double>(0.25, GetParam(), remaining, false), summed(0.25, GetParam(), remaining),
                1e-12);
}

TEST_P(SinkFormula, EqualsTheSumInFloat) {
  for (int64_t remaining : {1, 2, 3, 10, 1000, 100000}) {
    const double expected = summed(-1.5, static_cast<float>(GetParam()), remaining);
    EXPECT_NEAR(pseudo_score_sink<float>(-1.5f, static_cast<float>(GetParam()), remaining, false), expected,
                1e-6 * (1 + std::abs(expected)));
  }
}

TEST_P(SinkFormula, DerivativeEqualsFiniteDifferences) {
  const double decay = GetParam(), step = decay > 1e-3 ? 1e-6 * decay : 1e-9;
  for (int64_t remaining : {1, 2, 3, 10, 100}) {
    const double numeric = (pseudo_score_sink<double>(0, decay + step, remaining, false) -
                            pseudo_score_sink<double>(0, std::max(0.0, decay - step), remaining, false)) /
                           (decay + step - std::max(0.0, decay - step));
    EXPECT_NEAR(pseudo_score_sink_decay_grad<double>(decay, remaining, false), numeric, 1e-5 * (1 + std::abs(numeric)));
  }
}

INSTANTIATE_TEST_SUITE_P(Decays, SinkFormula, testing::Values(0.0, 1e-30, 1e-8, 1e-4, 0.09, 0.5, 3.0, 40.0, 900.0));

TEST(Sink, DecayZeroIsTheLogarithmOfTheCount) {
  EXPECT_DOUBLE_EQ(pseudo_score_sink<double>(2.0, 0.0, 7, false), 2.0 + std::log(7.0));
}

TEST(Sink, OnePseudoScoreIsTheBase) {
  for (double decay : {0.0, 1e-20, 0.5, 700.0})
    EXPECT_DOUBLE_EQ(pseudo_score_sink<double>(0.75, decay, 1, false), 0.75);
}

TEST(Sink, HugeDecayLeavesTheFirstPseudoScore) {
  EXPECT_DOUBLE_EQ(pseudo_score_sink<double>(0.0, 1e6, 1000, false), 0.0);
  EXPECT_FLOAT_EQ(pseudo_score_sink<float>(0.0f, 1e6f, 1000, true), 0.0f);
}

TEST(Sink, TinyDecayIsContinuousWithZero) {
  EXPECT_NEAR(pseudo_score_sink<float>(0.0f, 1e-38f, 1000, false), std::log(1000.0), 1e-5);
  EXPECT_NEAR(pseudo_score_sink<double>(0.0, 1e-300, 1000, false), std::log(1000.0), 1e-12);
}

TEST(Sink, NothingLeftIsMinusInfinity) {
  for (int64_t remaining : {0, -1, -1000}) {
    EXPECT_EQ(pseudo_score_sink<double>(0.0, 0.5, remaining, false), -kInfinity);
    EXPECT_EQ(pseudo_score_sink<double>(0.0, 0.0, remaining, false), -kInfinity);
    EXPECT_EQ(pseudo_score_sink_decay_grad<double>(0.5, remaining, false), 0.0);
  }
}

TEST(Sink, InfiniteLengthIsTheLimit) {
  for (double decay : {0.01, 0.5, 4.0})
    EXPECT_NEAR(pseudo_score_sink<double>(1.0, decay, 0, true), pseudo_score_sink<double>(1.0, decay, 1000000, false),
                1e-12);
}

TEST(Sink, InfiniteLengthDerivative) {
  for (double decay : {0.01, 0.5, 4.0}) {
    const double step = 1e-6;
    const double numeric =
        (pseudo_score_sink<double>(0, decay + step, 0, true) - pseudo_score_sink<double>(0, decay - step, 0, true)) /
        (2 * step);
    EXPECT_NEAR(pseudo_score_sink_decay_grad<double>(decay, 0, true), numeric, 1e-4 * std::abs(numeric));
  }
}

TEST(Sink, MinusInfinityBaseSwitchesOff) {
  EXPECT_EQ(pseudo_score_sink<double>(-kInfinity, 0.5, 10, false), -kInfinity);
  EXPECT_EQ(pseudo_score_sink<double>(-kInfinity, 0.5, 0, true), -kInfinity);
}

TEST(Sink, DerivativeAtZeroDecay) {
  for (int64_t remaining : {1, 2, 50})
    EXPECT_DOUBLE_EQ(pseudo_score_sink_decay_grad<double>(0.0, remaining, false), -0.5 * (remaining - 1));
}

TEST(Sink, SeriesAndQuotientMeetAtTheSwitch) {
  for (int64_t remaining : {2, 5, 1000}) {
    const double at = 0.1 / static_cast<double>(remaining);
    const double below = pseudo_score_sink_decay_grad<double>(at * (1 - 1e-9), remaining, false);
    const double above = pseudo_score_sink_decay_grad<double>(at * (1 + 1e-9), remaining, false);
    EXPECT_NEAR(below, above, 1e-8 * std::abs(above));
  }
}

}  // namespace
}  // namespace moda_ext
