#include "cuda/emulation/machine.h"

#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/ptx.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace moda_ext {
namespace cuda {
namespace emulation {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr int kWarpSize = 32;

enum class State { kRunnable, kInCollective, kAtBarrier, kDone };

struct Copy {
  void* target;
  const void* source;
  int bytes;
  bool valid;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::kRunnable;
  std::vector<Copy> open_copies;            // not yet committed
  std::deque<std::vector<Copy>> committed;  // groups, oldest first
  void* fake_stack = nullptr;               // the address sanitizer's
};

struct Warp {
  const char* what = nullptr;  // the collective in progress
  void* lanes[kWarpSize];
  int arrived = 0;
};

struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  int num_threads = 0, current = 0, at_barrier = 0;
  int64_t block = 0;
  std::unique_ptr<char[]> shared_storage;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  const std::function<void(char*)>* body = nullptr;
  char error[256] = "";
  Schedule schedule = Schedule::kFirstWarp;
  std::mt19937 random;
};
Machine machine;

// Fibers must not be unwound across, so an error ends the block: the thread that met it never runs again.
void switch_to_scheduler(bool forever = false) {
  Thread& self = *machine.threads[machine.current];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(forever ? nullptr : &self.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_bytes);
#endif
  (void)forever;
  swapcontext(&self.context, &machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
#endif
}

// No std::string: the stack of the thread is abandoned, and what it owns with it.
[[noreturn]] void fail(const char* a, const char* b = "", const char* c = "", const char* d = "") {
  snprintf(machine.error, sizeof(machine.error), "thread %d of block %lld: %s%s%s%s", machine.current,
           static_cast<long long>(machine.block), a, b, c, d);
  for (;;) switch_to_scheduler();
}

void thread_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
#endif
  (*machine.body)(machine.shared);
  Thread& self = *machine.threads[machine.current];
  for (const std::vector<Copy>& group : self.committed)
    if (!group.empty()) fail("ended with asynchronous copies in flight");
  if (!self.open_copies.empty()) fail("ended with asynchronous copies that were never committed");
  self.state = State::kDone;
  switch_to_scheduler(true);
}

void resume(int thread) {
  machine.current = thread;
  Thread& next = *machine.threads[thread];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, next.stack.get(), kStackBytes);
#endif
  swapcontext(&machine.scheduler, &next.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
}

// First runnable thread of the warp in the order of the schedule, or -1.
int runnable_lane(int warp) {
  const int first = machine.schedule == Schedule::kRandom ? static_cast<int>(machine.random() % kWarpSize) : 0;
  for (int i = 0; i < kWarpSize; ++i) {
    const int lane = machine.schedule == Schedule::kLastWarp ? kWarpSize - 1 - i : (first + i) % kWarpSize;
    const int thread = warp * kWarpSize + lane;
    if (machine.threads[thread]->state == State::kRunnable) return thread;
  }
  return -1;
}

int pick_thread() {
  const int count = static_cast<int>(machine.warps.size());
  const int first = machine.schedule == Schedule::kRandom ? static_cast<int>(machine.random() % count) : 0;
  for (int i = 0; i < count; ++i) {
    const int warp = machine.schedule == Schedule::kLastWarp ? count - 1 - i : (first + i) % count;
    const int thread = runnable_lane(warp);
    if (thread >= 0) return thread;
  }
  return -1;
}

std::string describe_deadlock() {
  int done = 0, in_collective = 0;
  const char* what = nullptr;
  for (int i = 0; i < machine.num_threads; ++i) {
    done += machine.threads[i]->state == State::kDone;
    in_collective += machine.threads[i]->state == State::kInCollective;
  }
  for (const Warp& warp : machine.warps)
    if (warp.arrived > 0) what = warp.what;
  return "deadlock in block " + std::to_string(machine.block) + ": " + std::to_string(machine.at_barrier) +
         " threads wait at a barrier, " + std::to_string(in_collective) + " in a warp-wide instruction" +
         (what ? std::string(" (") + what + ")" : "") + ", " + std::to_string(done) + " have ended, of " +
         std::to_string(machine.num_threads);
}

void start_thread(Thread& thread) {
  thread.state = State::kRunnable;
  thread.open_copies.clear();
  thread.committed.clear();
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, thread_main, 0);
}

void run_block() {
  memset(machine.shared, 0xff, machine.shared_bytes);
  machine.at_barrier = 0;
  for (Warp& warp : machine.warps) warp = Warp{};
  for (int i = 0; i < machine.num_threads; ++i) start_thread(*machine.threads[i]);
  for (;;) {
    const int thread = pick_thread();
    if (thread < 0) break;
    resume(thread);
    if (machine.error[0] != '\0') throw std::runtime_error(machine.error);
  }
  for (int i = 0; i < machine.num_threads; ++i)
    if (machine.threads[i]->state != State::kDone) throw std::runtime_error(describe_deadlock());
}

void land(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    if (copy.valid) {
      memcpy(copy.target, copy.source, static_cast<size_t>(copy.bytes));
    } else {
      memset(copy.target, 0, static_cast<size_t>(copy.bytes));
    }
  }
}

}  // namespace

void set_schedule(Schedule schedule, uint32_t seed) {
  machine.schedule = schedule;
  machine.random.seed(seed);
}

void run_grid(int64_t num_blocks, int num_threads, size_t shared_bytes, const std::function<void(char*)>& body) {
  if (num_threads <= 0 || num_threads % kWarpSize != 0 || num_threads > 1024)
    throw std::runtime_error("launch: a block of " + std::to_string(num_threads) + " threads");
  constexpr size_t kLargestShared = 99 << 10;  // of compute capability 8.6 and 8.9, the smallest that kernels run on
  if (shared_bytes > kLargestShared)
    throw std::runtime_error("launch: " + std::to_string(shared_bytes) + " bytes of shared memory");
  while (static_cast<int>(machine.threads.size()) < num_threads) machine.threads.push_back(std::make_unique<Thread>());
  machine.num_threads = num_threads;
  machine.warps.resize(static_cast<size_t>(num_threads / kWarpSize));
  machine.shared_bytes = shared_bytes;
  machine.shared_storage.reset(new char[shared_bytes + 128]);  // its end is the sanitizer's to watch
  const size_t misaligned = reinterpret_cast<uintptr_t>(machine.shared_storage.get()) % 128;
  machine.shared = machine.shared_storage.get() + (128 - misaligned) % 128;
  machine.body = &body;
  machine.error[0] = '\0';
  for (machine.block = 0; machine.block < num_blocks; ++machine.block) run_block();
}

int current_thread() { return machine.current; }
int64_t current_block() { return machine.block; }

void block_barrier() {
  machine.threads[machine.current]->state = State::kAtBarrier;
  if (++machine.at_barrier == machine.num_threads) {
    machine.at_barrier = 0;
    for (int i = 0; i < machine.num_threads; ++i) machine.threads[i]->state = State::kRunnable;
  }
  switch_to_scheduler();
}

void collective(const char* what, void* mine, void (*compute)(void* const* lanes)) {
  const int thread = machine.current, first = thread / kWarpSize * kWarpSize;
  Warp& warp = machine.warps[static_cast<size_t>(thread / kWarpSize)];
  if (warp.arrived > 0 && strcmp(warp.what, what) != 0)
    fail("lanes of a warp diverge: one in ", warp.what, ", one in ", what);
  warp.what = what;
  warp.lanes[thread - first] = mine;
  machine.threads[thread]->state = State::kInCollective;
  if (++warp.arrived < kWarpSize) {
    switch_to_scheduler();
    return;
  }
  compute(warp.lanes);
  warp.arrived = 0;
  for (int i = first; i < first + kWarpSize; ++i) machine.threads[i]->state = State::kRunnable;
}

void check_shared(const void* address, int bytes, int alignment, const char* what) {
  const char* begin = static_cast<const char*>(address);
  if (begin < machine.shared || begin + bytes > machine.shared + machine.shared_bytes)
    fail(what, ": address outside shared memory");
  if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(alignment) != 0)
    fail(what, ": misaligned shared address");
}

void copy_async(void* shared, const void* global, int bytes, bool valid) {
  check_shared(shared, bytes, bytes, "copy_async");
  if (reinterpret_cast<uintptr_t>(global) % static_cast<uintptr_t>(bytes) != 0)
    fail("copy_async: misaligned global address");
  memset(shared, 0xff, static_cast<size_t>(bytes));  // on its way: what was there is gone, what comes is not there yet
  machine.threads[machine.current]->open_copies.push_back({shared, global, bytes, valid});
}
void commit_copies() {
  Thread& self = *machine.threads[machine.current];
  self.committed.push_back(std::move(self.open_copies));
  self.open_copies.clear();
}
void wait_copies(int pending) {
  Thread& self = *machine.threads[machine.current];
  for (; static_cast<int>(self.committed.size()) > pending; self.committed.pop_front()) land(self.committed.front());
}

float bits_to_float(uint16_t bits, BFloat16) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof(value));
  return value;
}
float bits_to_float(uint16_t bits, Float16) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * ldexpf(static_cast<float>(fraction), -24);
  return sign * ldexpf(static_cast<float>(1024 + fraction), exponent - 25);
}
uint16_t float_to_bits(float value, BFloat16) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
uint16_t float_to_bits(float value, Float16) {
  const uint16_t sign = signbit(value) ? 0x8000 : 0;
  const float magnitude = fabsf(value);
  if (value != value) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent;
  frexpf(magnitude, &exponent);  // magnitude = f 2^exponent, 0.5 <= f < 1
  const int unit = (exponent < -13 ? -13 : exponent) - 11;
  const float steps = nearbyintf(ldexpf(magnitude, -unit));  // to nearest even
  if (steps == 0) return sign;
  // Adding the steps to the exponent field carries into it where rounding reached the next power of two.
  const int biased = unit + 24;
  return static_cast<uint16_t>(sign | (biased * 1024 + static_cast<int>(steps)));
}

}  // namespace emulation
}  // namespace cuda
}  // namespace moda_ext
