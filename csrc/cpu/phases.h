// Work that threads share, in phases: the items of a phase are taken from a counter, and the next phase begins when all
// of them are finished.
//
// Finished are items, not threads. A thread that the operating system runs late finds no item left and has kept nobody
// waiting. One that is put behind another process while it holds an item does; the others then give up their cores, so
// that it can be moved to one of them.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

namespace moda_ext {
namespace cpu {

struct Phase {
  int64_t items;
  std::function<void(int64_t item, int64_t thread)> work;
};

class Phases {
 public:
  explicit Phases(std::vector<Phase> phases) : phases_(std::move(phases)), progress_(phases_.size()) {
    for (size_t p = 0; p < phases_.size(); ++p) progress_[p].unfinished = phases_[p].items;
  }

  // Takes items, in order of their index, until those of all phases are finished. Called by each of the threads that
  // share the work, with a number of its own. What an item throws comes out of the call that worked on it; after that
  // no other item begins, and the other calls return.
  void work_as(int64_t thread) {
    for (size_t p = 0; p < phases_.size(); ++p) {
      if (phases_[p].items == 0) continue;
      Progress& progress = progress_[p];
      int64_t worked = 0;
      const Interruption interruption;
      try {
        for (int64_t item;
             !failed_ && (item = progress.next.fetch_add(1, std::memory_order_relaxed)) < phases_[p].items; ++worked)
          phases_[p].work(item, thread);
      } catch (...) {
        failed_ = true;
        wake();
        throw;
      }
      if (worked > 0) note_interruption(interruption.so_far());
      const auto idle_since = std::chrono::steady_clock::now();
      // Whoever sees zero sees what all threads wrote in this phase.
      if (worked > 0 && progress.unfinished.fetch_sub(worked, std::memory_order_acq_rel) == worked) wake();
      wait([&] { return progress.unfinished.load(std::memory_order_acquire) <= 0 || failed_; });
      if (thread == 0) waited_ += std::chrono::steady_clock::now() - idle_since;
      if (failed_) return;
    }
  }

  // To be asked for when all calls have returned: how long thread 0 waited for items of others in all,
  std::chrono::nanoseconds waited() const { return waited_; }
  // and the longest time in which a thread that had items did not run: others had its core.
  std::chrono::nanoseconds longest_interruption() const { return std::chrono::nanoseconds(interruption_.load()); }

 private:
  // Time that goes by without this thread's clock.
  class Interruption {
   public:
    Interruption() : begin_(elsewhere()) {}
    std::chrono::nanoseconds so_far() const { return elsewhere() - begin_; }

   private:
    static std::chrono::nanoseconds elsewhere() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
      timespec own{};
      clock_gettime(CLOCK_THREAD_CPUTIME_ID, &own);
      return std::chrono::steady_clock::now().time_since_epoch() - std::chrono::seconds(own.tv_sec) -
             std::chrono::nanoseconds(own.tv_nsec);
#else
      return std::chrono::nanoseconds(0);
#endif
    }
    std::chrono::nanoseconds begin_;
  };

  void note_interruption(std::chrono::nanoseconds time) {
    int64_t longest = interruption_;
    while (time.count() > longest && !interruption_.compare_exchange_weak(longest, time.count())) {
    }
  }

  struct Progress {
    std::atomic<int64_t> next{0}, unfinished{0};
  };

  // A thread sleeps after this long. To wake it costs about as much, and threads that nobody disturbs wait for another
  // no longer than a short item takes.
  static constexpr std::chrono::microseconds kSpin{50};

  template <class Condition>
  void wait(const Condition& over) {
    if (over()) return;
    const auto until = std::chrono::steady_clock::now() + kSpin;
    while (std::chrono::steady_clock::now() < until) {
      pause();
      if (over()) return;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, over);
  }

  // After a change of what the others wait for. A thread that looked before it holds the lock until it sleeps, so that
  // none misses this.
  void wake() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }
    changed_.notify_all();
  }

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const std::vector<Phase> phases_;
  std::vector<Progress> progress_;
  std::atomic<bool> failed_{false};
  std::atomic<int64_t> interruption_{0};
  std::chrono::nanoseconds waited_{0};  // of thread 0 alone
  std::mutex mutex_;
  std::condition_variable changed_;
};

}  // namespace cpu
}  // namespace moda_ext
