// Phases of work that threads share: every item once, phases in order, and nobody waits for a thread without an item.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/crowd.h"
#include "cpu/phases.h"

namespace moda_ext {
namespace cpu {
namespace {

using std::chrono::milliseconds;

void run_with(Phases& phases, const std::vector<int64_t>& numbers) {
  std::vector<std::thread> threads;
  for (int64_t number : numbers) threads.emplace_back([&phases, number] { phases.work_as(number); });
  for (std::thread& thread : threads) thread.join();
}

TEST(Phases, EveryItemRunsOnceAndSeesWhatThePhaseBeforeWrote) {
  constexpr int64_t kItems = 2000, kRounds = 10;
  std::vector<std::vector<int64_t>> written(kRounds + 1, std::vector<int64_t>(kItems, 0));  // plain numbers: no races
  std::vector<Phase> phases;
  for (int64_t round = 0; round < kRounds; ++round)
    phases.push_back({kItems, [&written, round](int64_t item, int64_t) {
                        const std::vector<int64_t>& before = written[round];
                        written[round + 1][item] += before[item] + before[kItems - 1 - item] + 1;
                      }});
  Phases shared(std::move(phases));
  run_with(shared, {0, 1, 2, 3});
  for (int64_t round = 0; round <= kRounds; ++round)
    EXPECT_EQ(written[round], std::vector<int64_t>(kItems, (int64_t{1} << round) - 1)) << round;
}

TEST(Phases, ItemsBeginInOrderWithTheNumberOfTheirThread) {
  std::mutex mutex;
  std::vector<int64_t> order;
  std::set<int64_t> numbers;
  Phases alone({{5, [&](int64_t item, int64_t thread) { order.push_back(10 * thread + item); }}});
  alone.work_as(3);
  EXPECT_EQ(order, (std::vector<int64_t>{30, 31, 32, 33, 34}));

  std::atomic<int> met{0};
  const auto meet = [&](int64_t, int64_t thread) {  // each thread has one item
    for (++met; met < 3;) std::this_thread::yield();
    const std::lock_guard<std::mutex> lock(mutex);
    numbers.insert(thread);
  };
  Phases shared({{3, meet}});
  run_with(shared, {0, 4, 7});
  EXPECT_EQ(numbers, (std::set<int64_t>{0, 4, 7}));
}

TEST(Phases, PhasesWithoutItemsArePassed) {
  std::atomic<int> worked{0};
  const auto count = [&](int64_t, int64_t) { ++worked; };
  Phases shared({{0, nullptr}, {3, count}, {0, nullptr}, {0, nullptr}, {2, count}, {0, nullptr}});
  run_with(shared, {0, 1});
  EXPECT_EQ(worked, 5);
  Phases nothing({});
  nothing.work_as(0);
}

TEST(Phases, ThreadThatNeverComesHoldsUpNothing) {
  int worked = 0;
  const auto count = [&](int64_t, int64_t) { ++worked; };
  Phases shared({{4, count}, {1, count}, {7, count}});
  shared.work_as(1);  // of threads 0 and 1
  EXPECT_EQ(worked, 12);
}

TEST(Phases, ThreadThatComesLateFindsNothingToDoOrHelps) {
  std::promise<void> late;
  std::set<int64_t> workers;
  std::mutex mutex;
  const auto note = [&](int64_t, int64_t thread) {
    const std::lock_guard<std::mutex> lock(mutex);
    workers.insert(thread);
  };
  // The last phase has two items that both must be held at once: only with the late thread can it end.
  std::atomic<int> met{0};
  const auto meet = [&](int64_t, int64_t thread) {
    if (thread == 0) late.set_value();
    for (++met; met < 2;) std::this_thread::yield();
    note(0, 10 + thread);
  };
  Phases shared({{20, note}, {20, note}, {2, meet}});
  std::thread second([&] {
    late.get_future().wait();
    shared.work_as(1);
  });
  shared.work_as(0);
  second.join();
  EXPECT_EQ(workers, (std::set<int64_t>{0, 10, 11}));
  shared.work_as(2);  // all is done
}

TEST(Phases, NextPhaseWaitsForAnItemThatTakesLongerThanASpin) {
  std::atomic<bool> held{false}, released{false};
  std::atomic<int> after{0};
  const auto hold = [&](int64_t item, int64_t) {
    if (item > 0) return;
    held = true;
    std::this_thread::sleep_for(milliseconds(20));
    released = true;
  };
  const auto check = [&](int64_t, int64_t) {
    EXPECT_TRUE(released);
    ++after;
  };
  Phases shared({{30, hold}, {30, check}});
  std::thread first([&] { shared.work_as(0); });
  while (!held) std::this_thread::yield();
  run_with(shared, {1, 2});  // these sleep until it is released
  first.join();
  EXPECT_EQ(after, 30);
}

// Thousands of phases with one short item each: wakers and sleepers meet in every order.
TEST(Phases, NoWakeUpIsLost) {
  int64_t total = 0;  // one item at a time: needs no lock
  const auto add = [&](int64_t, int64_t) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(total % 120);
    while (std::chrono::steady_clock::now() < until) {
    }
    ++total;
  };
  Phases shared(std::vector<Phase>(3000, Phase{1, add}));
  run_with(shared, {0, 1, 2, 3});
  EXPECT_EQ(total, 3000);
}

TEST(Phases, ExceptionEndsAllPhasesAndComesOutOfItsThread) {
  std::atomic<int> waiting{0}, later{0}, thrown{0};
  const auto fail = [&](int64_t item, int64_t) {
    if (item > 0) return;
    while (waiting < 1) std::this_thread::yield();
    std::this_thread::sleep_for(milliseconds(5));  // the others sleep by now
    throw std::runtime_error("item 0");
  };
  Phases shared({{2, fail}, {4, [&](int64_t, int64_t) { ++later; }}});
  const auto work = [&](int64_t thread) {
    try {
      if (thread > 0) ++waiting;
      shared.work_as(thread);
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "item 0");
      ++thrown;
    }
  };
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < 3; ++i) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(thrown, 1);
  EXPECT_EQ(later, 0);
}

TEST(Phases, TellHowLongTheCallerWaited) {
  std::promise<void> both[2];  // have an item
  Phases phases({{2,
                  [&](int64_t, int64_t thread) {
                    both[thread].set_value();
                    both[1 - thread].get_future().wait();
                    if (thread == 1) std::this_thread::sleep_for(milliseconds(20));
                  }},
                 {0, [](int64_t, int64_t) {}}});
  std::thread other([&] { phases.work_as(1); });
  phases.work_as(0);
  other.join();
  EXPECT_GE(phases.waited(), milliseconds(15));
}

TEST(Phases, TellHowLongAThreadDidNotRun) {
  Phases asleep({{1, [](int64_t, int64_t) { std::this_thread::sleep_for(milliseconds(20)); }}});
  asleep.work_as(0);
  EXPECT_GE(asleep.longest_interruption(), milliseconds(15));
  EXPECT_LT(asleep.waited(), milliseconds(15));
  Phases idle({{0, [](int64_t, int64_t) {}}});
  idle.work_as(0);
  EXPECT_EQ(idle.longest_interruption().count(), 0);
}

// Calls of 10 ms, at whose end 5 ms were lost.
struct Calls {
  Crowd crowd;
  Crowd::Time now{std::chrono::hours(1)};

  int64_t threads() const { return crowd.threads(4, now); }
  void lose(milliseconds waited, milliseconds away, milliseconds call = milliseconds(10)) {
    crowd.note(now - call, now, waited, away);
  }
  // How long one thread is left out.
  milliseconds period() {
    const Crowd::Time begin = now;
    while (threads() == 3) now += milliseconds(1);
    return std::chrono::duration_cast<milliseconds>(now - begin);
  }
};

TEST(Crowd, OneThreadLessForAWhile) {
  Calls calls;
  EXPECT_EQ(calls.threads(), 4);
  calls.lose(milliseconds(5), milliseconds(5));
  EXPECT_EQ(calls.threads(), 3);
  EXPECT_EQ(calls.crowd.threads(1, calls.now), 1);
  EXPECT_EQ(calls.period(), milliseconds(125));
}

TEST(Crowd, LongerEachTimeUpToASecond) {
  Calls calls;
  for (const int expected : {125, 250, 500, 1000, 1000}) {
    calls.lose(milliseconds(5), milliseconds(5));
    EXPECT_EQ(calls.period(), milliseconds(expected));
  }
  calls.now += milliseconds(1001);  // nobody was missed for as long
  calls.lose(milliseconds(5), milliseconds(5));
  EXPECT_EQ(calls.period(), milliseconds(125));
}

TEST(Crowd, OnlyForWhatOthersCost) {
  Calls calls;
  calls.lose(milliseconds(5), milliseconds(0));                     // the other thread had a longer item
  calls.lose(milliseconds(0), milliseconds(5));                     // was away, and had nothing to do
  calls.lose(milliseconds(5), milliseconds(5), milliseconds(100));  // a small part of the call
  EXPECT_EQ(calls.threads(), 4);
}

}  // namespace
}  // namespace cpu
}  // namespace moda_ext
