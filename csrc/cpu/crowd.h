// How many threads a call takes on a machine that others keep busy, too.
//
// A thread whose core another process takes for a turn of the scheduler, 4 ms or two of them, is waited for: with its item,
// or by the end of a parallel region, for which all threads have to come. That does little to a call of 80 ms, which gains
// more from the rest of the thread's time. One of 7 ms then takes 15, and is better off with a thread less.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace moda_ext {
namespace cpu {

class Crowd {
 public:
  using Clock = std::chrono::steady_clock;
  using Time = Clock::time_point;
  using Duration = Clock::duration;

  // One thread less for a while after one was missed; then all of them are tried again. On two cores that is one thread,
  // and no parallel region. Of more, the one that is left out holds no item, but PyTorch's region still ends with it.
  int64_t threads(int64_t wanted, Time now) const {
    return wanted > 1 && now < Time(Duration(until_)) ? wanted - 1 : wanted;
  }

  // Of a call from `begin` to `end`, at whose end the caller `waited` for threads, which had not run for `away`. To wait for
  // one that runs is no fault of others; nor is what it costs an unimportant part of the call.
  void note(Time begin, Time end, Duration waited, Duration away) {
    const Duration cost = std::min(waited, away);
    if (cost < std::max<Duration>(kLeast, (end - begin) / kPart)) return;
    // Missed again when all were tried: for longer, so that trying costs little.
    const bool again = end < Time(Duration(until_)) + kLongest;
    const Duration period = again ? std::min<Duration>(2 * Duration(period_), kLongest) : Duration(kShortest);
    period_ = period.count();
    until_ = (end + period).time_since_epoch().count();
  }

 private:
  static constexpr std::chrono::milliseconds kLeast{1}, kShortest{125}, kLongest{1000};
  static constexpr int kPart = 5;

  // Calls on several threads may lose each other's notes.
  std::atomic<Duration::rep> until_{0}, period_{0};
};

}  // namespace cpu
}  // namespace moda_ext
