// What the CPU launches share: threads and workspace.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "cpu/crowd.h"
#include "cpu/kernels/modular_attention_kernels.h"
#include "cpu/phases.h"
#include "ops/checks.h"
#include "ops/operands.h"

namespace moda_ext {
namespace cpu {

inline int64_t num_threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// Threads that are worth having for so many items.
inline int64_t threads_for(int64_t items) { return std::max<int64_t>(1, std::min(num_threads(), items)); }

// Runs phases one after the other on up to so many threads, numbered from 0. All of it is one parallel region, because
// the end of one waits for every thread, whatever it has left to do.
inline void run_phases(int64_t threads, std::vector<Phase> phases) {
  int64_t most = 1;
  for (const Phase& phase : phases) most = std::max(most, phase.items);
  static Crowd crowd;
  const Crowd::Time begin = Crowd::Clock::now();
  Crowd::Time left = begin;  // by the caller
  Phases shared(std::move(phases));
  torch::stable::parallel_for(0, crowd.threads(std::min(threads, most), begin), 1, [&](int64_t thread, int64_t) {
    shared.work_as(thread);
    if (thread == 0) left = Crowd::Clock::now();
  });
  const Crowd::Time end = Crowd::Clock::now();
  const Crowd::Duration late = end - left;
  crowd.note(begin, end, shared.waited() + late, std::max<Crowd::Duration>(late, shared.longest_interruption()));
}

// Runs work(index, thread) for every index.
template <class Work>
void run_items(int64_t count, const Work& work) {
  if (count > 0) run_phases(threads_for(count), {{count, std::cref(work)}});
}

// Asks for huge pages under a large result that is about to be written: fresh memory costs a page fault for each 4 KB,
// which for 100 MB of query views is twice the time of writing them. Advice only: nothing depends on it. Touching the
// pages here would cost more than it saves: one that is cleared when an item first writes to it is in the caches then.
inline void prefer_huge_pages(const Tensor& fresh) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(fresh.const_data_ptr());
  const uintptr_t bytes = static_cast<uintptr_t>(fresh.numel()) * static_cast<uintptr_t>(fresh.element_size());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)fresh;
#endif
}

// How results are allocated: for the operators of every family.
struct CpuResults {
  static Tensor result_like(const Tensor& like, const std::vector<int64_t>& sizes, bool packed = false) {
    Tensor result = empty_in_layout_of(like, sizes, packed);
    prefer_huge_pages(result);
    return result;
  }
};

// Uninitialised, aligned scratch memory. Each thread that calls operators keeps its last few blocks, up to
// kRetainedBytes together, because mapping fresh pages in every call costs as much as several percent of a small
// attention.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    std::vector<Block>& spare = spare_blocks();
    for (size_t i = 0; i < spare.size(); ++i) {
      if (spare[i].bytes < bytes) continue;
      block_ = std::move(spare[i]);
      spare.erase(spare.begin() + static_cast<std::ptrdiff_t>(i));
      return;
    }
    block_.bytes = std::max<int64_t>(bytes, 64);
    block_.memory.reset(static_cast<char*>(::operator new(static_cast<size_t>(block_.bytes), kAlignment)));
  }
  ~Workspace() {
    // Smallest first, so that a request takes the tightest fit; the largest go when they are too much.
    std::vector<Block>& spare = spare_blocks();
    const auto larger = [&](const Block& other) { return other.bytes > block_.bytes; };
    spare.insert(std::find_if(spare.begin(), spare.end(), larger), std::move(block_));
    int64_t kept = 0;
    for (const Block& block : spare) kept += block.bytes;
    for (; kept > kRetainedBytes; spare.pop_back()) kept -= spare.back().bytes;
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* at(int64_t offset = 0) const { return block_.memory.get() + offset; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  static constexpr int64_t kRetainedBytes = int64_t{16} << 20;
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, kAlignment); }
  };
  struct Block {
    std::unique_ptr<char, Free> memory;
    int64_t bytes = 0;
  };
  static std::vector<Block>& spare_blocks() {
    static thread_local std::vector<Block> blocks;
    return blocks;
  }
  Block block_;
};

inline int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// One block of scratch for each of so many threads.
class Scratch {
 public:
  Scratch(int64_t bytes, int64_t threads) : stride_(round_up(bytes)), memory_(stride_ * threads) {}
  void* of(int64_t thread) const { return memory_.at(thread * stride_); }

 private:
  int64_t stride_;
  Workspace memory_;
};

}  // namespace cpu
}  // namespace moda_ext
