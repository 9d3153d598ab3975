// A CUDA thread block on the CPU, for tests: every thread is a fiber that runs until it waits for others.
//
// What it shows that a plain loop would not:
// - A missing barrier. One warp runs as far ahead of the others as barriers let it, and one lane of the others as
//   warp-wide instructions let it (which, set_schedule says), and shared memory starts as NaN in every block.
// - A missing wait for an asynchronous copy: its data arrive when the thread that issued it waits for them, not before.
// - A warp-wide instruction that not all lanes reach, or that lanes reach out of step, and a barrier that some threads
//   skip: an error that names the instruction.
// - A misaligned or out-of-range shared address. Out-of-range global addresses are the address sanitizer's to find.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>

namespace moda_ext {
namespace cuda {
namespace emulation {

// Which warp, and which of its lanes, runs ahead: the first, the last, or one drawn anew at every step.
enum class Schedule { kFirstWarp, kLastWarp, kRandom };
void set_schedule(Schedule schedule, uint32_t seed = 0);

// Runs body(shared memory of the block) in every thread of every block, one block after the other. Throws
// std::runtime_error on the errors above.
void run_grid(int64_t num_blocks, int num_threads, size_t shared_bytes, const std::function<void(char*)>& body);

// For emulation/ptx.h; these are called by the running thread.
int current_thread();
int64_t current_block();
void block_barrier();
// All 32 lanes hand in a pointer; the last one to come runs compute(pointers by lane), then all go on. `what` must be
// the same string for all.
void collective(const char* what, void* mine, void (*compute)(void* const* lanes));
void copy_async(void* shared, const void* global, int bytes, bool valid);
void commit_copies();
void wait_copies(int pending);
void check_shared(const void* address, int bytes, int alignment, const char* what);

}  // namespace emulation
}  // namespace cuda
}  // namespace moda_ext
