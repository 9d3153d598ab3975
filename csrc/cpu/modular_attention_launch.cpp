// Launches the CPU kernels of modular_attention: plans the keys, cuts the work into items, hands items to threads, owns
// all workspace.
//
// Items are taken from a shared counter, those of one kv head together (its packed keys stay in cache) and the largest
// of them first, so threads stay busy whatever the causal triangle or the machine does; every number is written by one
// item in a fixed order, so results do not depend on which thread ran it.
#include "cpu/modular_attention_launch.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/runs.h"
#include "cpu/isa.h"
#include "cpu/kernels/modular_attention_kernels.h"
#include "cpu/launch.h"
#include "ops/modular_attention_operators.h"

namespace moda_ext {
namespace cpu {
namespace {

// Packed keys and values of as many kv heads as fit in this much memory are held at a time (at least one).
constexpr int64_t kPackedBudget = int64_t{32} << 20;
// Partial key gradients of items that share a kv head: at least this much memory may go to them, and this much for each
// thread.
constexpr int64_t kPartialBudget = int64_t{24} << 20;
constexpr int64_t kPartialBudgetPerThread = int64_t{8} << 20;
// Splitting few large items: how many are wanted at least, whatever the number of threads (so that small machines agree
// bit for bit).
constexpr int64_t kForwardItems = 16;
constexpr int64_t kBackwardItems = 8;
// Large forward blocks are halved, down to this many rows, until there are four for each thread.
constexpr int64_t kFewestBlockRows = 64;

enum class Direction { kForward, kBackward };

// The query rows that share a key head from which on tile instructions pay: they take 32 at a time, and packing keys
// costs as much for few as for many, most in the backward pass. In float32 both directions must decide alike, or the
// scores of the backward pass are not those that went into lse.
constexpr int64_t tile_rows_wanted(Storage storage, Direction direction) {
  return direction == Direction::kForward && storage != Storage::kFloat32 ? 64 : 256;
}

const ModularAttentionKernels& select_kernels(ScalarType dtype, [[maybe_unused]] Direction direction,
                                              [[maybe_unused]] int64_t rows_per_key_head) {
  const Storage storage = storage_of(dtype);
#if defined(MODA_EXT_AMX_ISA)
  if (active_isa() == Isa::amx && storage != Storage::kFloat64 &&
      rows_per_key_head >= tile_rows_wanted(storage, direction))
    return modular_attention_kernels_amx(storage);
#endif
#if defined(MODA_EXT_PAIRS_ISA)
  if (active_isa() == Isa::pairs && storage == Storage::kBFloat16) return modular_attention_kernels_pairs();
#endif
  return MODA_EXT_VECTOR_ISA(modular_attention_kernels)(storage);
}

// Query rows that share a key head, of a sequence of average length.
int64_t rows_per_key_head(const ModularAttentionInputs& in, const ModularAttentionShape& shape) {
  const int64_t sequences = in.packed() ? std::max<int64_t>(1, in.cu_seqlens_q->size(0) - 1) : 1;
  return shape.kv_heads > 0 ? shape.num_queries / sequences * (shape.query_heads / shape.kv_heads) : 0;
}

void check_cu_seqlens(const char* op, const char* name, const Tensor& cu_seqlens, int64_t total, int64_t max_seqlen,
                      const char* max_name) {
  const int32_t* offsets = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t stride = cu_seqlens.stride(0), count = cu_seqlens.size(0);
  const std::string prefix = std::string(op) + ": ";
  if (offsets[0] != 0 || offsets[(count - 1) * stride] != total) {
    throw std::invalid_argument(prefix + name + ": expected to start at 0 and end at the number of tokens " +
                                std::to_string(total) + ", got " + std::to_string(offsets[0]) + " and " +
                                std::to_string(offsets[(count - 1) * stride]));
  }
  for (int64_t i = 1; i < count; ++i) {
    const int64_t length = int64_t{offsets[i * stride]} - offsets[(i - 1) * stride];
    if (length < 0)
      throw std::invalid_argument(prefix + name + ": expected ascending offsets, got a decrease at index " +
                                  std::to_string(i));
    if (length > max_seqlen)
      throw std::invalid_argument(prefix + max_name + ": expected at least the longest sequence, got " +
                                  std::to_string(max_seqlen) + " for a sequence of " + std::to_string(length));
  }
}

Batch plan_batch(const ModularAttentionInputs& in, const ModularAttentionShape& shape, int tile_keys, int panel_keys) {
  const int32_t* modality = static_cast<const int32_t*>(in.key_modality.const_data_ptr());
  const int64_t token_stride = in.key_modality.dim() ? in.key_modality.stride(in.key_modality.dim() - 1) : 1;
  const int64_t batch_stride = in.packed() ? 0 : in.key_modality.stride(0);
  const int64_t count = in.packed() ? in.cu_seqlens_q->size(0) - 1 : shape.batch;
  Batch batch(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    Sequence sequence;
    if (in.packed()) {
      const int32_t* q = static_cast<const int32_t*>(in.cu_seqlens_q->const_data_ptr());
      const int32_t* k = static_cast<const int32_t*>(in.cu_seqlens_k->const_data_ptr());
      const int64_t q_stride = in.cu_seqlens_q->stride(0), k_stride = in.cu_seqlens_k->stride(0);
      sequence.first_query = q[i * q_stride];
      sequence.num_queries = q[(i + 1) * q_stride] - sequence.first_query;
      sequence.first_key = k[i * k_stride];
      sequence.num_keys = k[(i + 1) * k_stride] - sequence.first_key;
    } else {
      sequence.batch = i;
      sequence.num_queries = shape.num_queries;
      sequence.num_keys = shape.num_keys;
    }
    batch.add(sequence,
              plan_keys(modality + sequence.batch * batch_stride + sequence.first_key * token_stride, token_stride,
                        sequence.num_keys, static_cast<int>(in.num_modalities), tile_keys, panel_keys, in.op));
  }
  return batch;
}

void fill_args(const ModularAttentionInputs& in, const ModularAttentionShape& shape, ModularAttentionArgs& args) {
  set_inputs(in, shape, args);
  args.group = static_cast<int>(shape.kv_heads > 0 ? shape.query_heads / shape.kv_heads : 1);
}

// Last key position that a row sees.
int64_t last_visible(const Sequence& sequence, bool causal, int64_t row) {
  return causal ? row + sequence.num_keys - sequence.num_queries : sequence.num_keys - 1;
}

// ------------------------------------------------------------------------------------------------------------------
// forward

// The forward items of a call, kv head by kv head, and which of them share packed keys.
struct ForwardPlan {
  struct Head {  // one (sequence, kv head)
    const Sequence* sequence;
    int64_t kv_head;
    int64_t first_block, last_block;  // of `blocks`
    bool packs;                       // keys are packed once for all blocks; else each item packs what it reads
  };
  std::vector<Head> heads;
  std::vector<ModularAttentionForwardItem> blocks;  // row blocks, not yet split over keys
  int64_t splits = 1;                               // of a block over its keys, at most

  // Pieces of a block: of at least four tiles.
  int64_t pieces_of(const ModularAttentionForwardItem& block) const {
    return std::min<int64_t>(splits, std::max<int64_t>(1, block.last_tile / 4));
  }
};

int64_t forward_block_rows(const ModularAttentionKernels& kernels, const ModularAttentionShape& shape,
                           const Batch& batch) {
  int64_t rows = 0, block_rows = kernels.forward_block_rows;
  for (const Sequence& sequence : batch.sequences) rows += shape.query_heads * sequence.num_queries;
  while (block_rows >= 2 * kFewestBlockRows && rows < 4 * num_threads() * block_rows) block_rows /= 2;
  return block_rows;
}

ForwardPlan plan_forward(const Batch& batch, KeyHeads heads, int64_t group, int64_t block_rows) {
  ForwardPlan plan;
  for (const Sequence& sequence : batch.sequences) {
    const int64_t rows = sequence.num_queries;
    if (rows == 0) continue;
    // Short sequences of queries (decoding): several heads of the group share a block, so that a key tile is read once
    // for all.
    const int64_t heads_per_block = std::min(group, std::max<int64_t>(1, block_rows / rows));
    for (int64_t kv_head = heads.first; kv_head < heads.last; ++kv_head) {
      const int64_t first = static_cast<int64_t>(plan.blocks.size());
      for (int64_t row = (rows - 1) / block_rows * block_rows; row >= 0; row -= block_rows) {
        for (int64_t head = 0; head < group; head += heads_per_block) {
          ModularAttentionForwardItem item{};
          item.sequence = &sequence;
          item.first_head = kv_head * group + head;
          item.num_heads = std::min(heads_per_block, group - head);
          item.first_row = row;
          item.num_rows = std::min(block_rows, rows - row);
          item.last_tile = sequence.num_tiles;
          plan.blocks.push_back(item);
        }
      }
      const int64_t last = static_cast<int64_t>(plan.blocks.size());
      plan.heads.push_back({&sequence, kv_head, first, last, last - first > 1});
    }
  }
  // Few blocks: each is split over its keys.
  const int64_t num_blocks = static_cast<int64_t>(plan.blocks.size());
  const int64_t wanted = std::max(kForwardItems, 2 * num_threads());
  if (num_blocks > 0 && num_blocks < wanted / 2) plan.splits = (wanted + num_blocks - 1) / num_blocks;
  return plan;
}

// The views of as many kv heads as fit in their budget, or as there are threads to make them.
class PlacedViews {
 public:
  PlacedViews(QueryViews* views, size_t num_heads)
      : views_(views), num_heads_(num_heads), end_(views == nullptr ? num_heads : 0) {}
  // Makes those of head `begin`, and of others that follow it. Without items where they are there already.
  Phase make(size_t begin, Input& query, const Scratch& scratch) {
    if (begin < end_) return {0, nullptr};
    const int64_t bytes = std::max<int64_t>(1, views_->bytes_per_head());
    const int64_t first = static_cast<int64_t>(begin), left = static_cast<int64_t>(num_heads_) - first;
    const int64_t count = std::min(left, std::max(num_threads(), kViewsBudget / bytes));
    memory_.reset();
    memory_.emplace(count * bytes);
    query = views_->place(first, count, memory_->at());
    end_ = begin + static_cast<size_t>(count);
    return {count, [this, first, &scratch](int64_t i, int64_t thread) { views_->make(first + i, scratch.of(thread)); }};
  }
  size_t end() const { return end_; }  // heads before it have a place for their views

 private:
  QueryViews* views_;
  size_t num_heads_, end_;
  std::optional<Workspace> memory_;
};

// Heads [begin, end) of a plan, computed together, and the memory that they need.
struct ForwardWave {
  size_t begin, end;
  std::vector<int64_t> packed_at;  // of each head: where its packed keys go
  int64_t packed_bytes = 0, partial_bytes = 0;
};

int64_t partial_bytes_of(const ModularAttentionKernels& kernels, const ModularAttentionForwardArgs& args,
                         const ModularAttentionForwardItem& item) {
  return round_up(kernels.partial_bytes(args, item.num_heads * item.num_rows));
}

// As many heads, of those before `limit`, as have packed keys that fit in the budget.
ForwardWave plan_forward_wave(const ModularAttentionKernels& kernels, const ModularAttentionForwardArgs& args,
                              const ForwardPlan& plan, size_t begin, size_t limit) {
  ForwardWave wave{begin, begin, {}};
  for (; wave.end < limit; ++wave.end) {
    const ForwardPlan::Head& head = plan.heads[wave.end];
    const int64_t bytes = head.packs ? round_up(kernels.packed_bytes(args, head.sequence->num_panels)) : 0;
    if (wave.end > begin && wave.packed_bytes + bytes > kPackedBudget) break;
    wave.packed_at.push_back(wave.packed_bytes);
    wave.packed_bytes += bytes;
    for (int64_t b = head.first_block; b < head.last_block; ++b) {
      const int64_t pieces = plan.pieces_of(plan.blocks[b]);
      if (pieces > 1) wave.partial_bytes += pieces * partial_bytes_of(kernels, args, plan.blocks[b]);
    }
  }
  return wave;
}

// What the kernels are called with for one wave.
struct ForwardWork {
  struct Pack {
    const ForwardPlan::Head* head;
    int64_t tile;
    void* packed;
  };
  struct Split {
    ModularAttentionForwardItem block;
    std::vector<void*> partials;
  };
  std::vector<Pack> packs;
  std::vector<ModularAttentionForwardItem> items;
  std::vector<Split> splits;
};

ForwardWork assign_forward(const ModularAttentionKernels& kernels, const ModularAttentionForwardArgs& args,
                           const ForwardPlan& plan, const ForwardWave& wave, const Workspace& packed,
                           const Workspace& partials) {
  ForwardWork work;
  for (size_t h = wave.begin; h < wave.end; ++h) {
    const ForwardPlan::Head& head = plan.heads[h];
    char* at = packed.at(wave.packed_at[h - wave.begin]);
    for (int64_t tile = 0; head.packs && tile < head.sequence->num_tiles; ++tile)
      work.packs.push_back({&head, tile, at});
    for (int64_t b = head.first_block; b < head.last_block; ++b) {
      ModularAttentionForwardItem block = plan.blocks[b];
      block.packed = head.packs ? at : nullptr;
      const int64_t pieces = plan.pieces_of(block);
      if (pieces == 1) {
        work.items.push_back(block);
      } else {
        work.splits.push_back({block, std::vector<void*>(pieces)});
      }
    }
  }
  int64_t partial_at = 0;
  for (ForwardWork::Split& split : work.splits) {
    const int64_t pieces = static_cast<int64_t>(split.partials.size());
    for (int64_t s = 0; s < pieces; ++s) {
      ModularAttentionForwardItem item = split.block;
      item.first_tile = split.block.last_tile * s / pieces;
      item.last_tile = split.block.last_tile * (s + 1) / pieces;
      item.partial = split.partials[s] = partials.at(partial_at);
      partial_at += partial_bytes_of(kernels, args, item);
      work.items.push_back(item);
    }
  }
  return work;
}

// After the phases of `before`.
void launch_forward(const ModularAttentionKernels& kernels, const ModularAttentionForwardArgs& args,
                    const ForwardWork& work, const Scratch& scratch, int64_t threads, std::vector<Phase> before) {
  const std::vector<ModularAttentionForwardItem>& items = work.items;
  const int64_t count = static_cast<int64_t>(items.size());
  const auto pack = [&](int64_t i, int64_t) {
    const ForwardWork::Pack& pack = work.packs[i];
    kernels.pack_tile(args, *pack.head->sequence, pack.head->kv_head, pack.tile, pack.packed);
  };
  const auto attend = [&](int64_t i, int64_t thread) {
    kernels.forward(args, items[i], i + threads < count ? &items[i + threads] : nullptr, scratch.of(thread));
  };
  const auto merge = [&](int64_t i, int64_t thread) {
    const ForwardWork::Split& split = work.splits[i];
    kernels.merge(args, split.block, split.partials.data(), static_cast<int>(split.partials.size()),
                  scratch.of(thread));
  };
  std::vector<Phase> phases = std::move(before);
  phases.push_back({static_cast<int64_t>(work.packs.size()), pack});
  phases.push_back({count, attend});
  phases.push_back({static_cast<int64_t>(work.splits.size()), merge});
  run_phases(threads, std::move(phases));
}

}  // namespace

void Batch::add(Sequence sequence, KeyPlan plan) {
  plans.push_back(std::move(plan));
  const KeyPlan& kept = plans.back();
  sequence.order = kept.order.data();
  sequence.tiles = kept.tiles.data();
  sequence.first_position = kept.first_position.data();
  sequence.num_tiles = static_cast<int32_t>(kept.tiles.size());
  sequence.num_panels = kept.num_panels;
  sequence.num_slots = static_cast<int32_t>(kept.order.size());
  if (sequence.num_slots < sequence.num_keys || sequence.num_queries == 0) covers_every_row = false;
  sequences.push_back(sequence);
}

const ModularAttentionKernels& select_forward_kernels(ScalarType dtype, int64_t rows_per_key_head) {
  return select_kernels(dtype, Direction::kForward, rows_per_key_head);
}

void run_forward(const ModularAttentionKernels& kernels, ModularAttentionForwardArgs args,
                 const ModularAttentionShape& shape, const Batch& batch, KeyHeads heads, QueryViews* views,
                 std::vector<Phase> before) {
  const ForwardPlan plan = plan_forward(batch, heads, args.group, forward_block_rows(kernels, shape, batch));
  if (plan.blocks.empty()) return;
  const int64_t threads = threads_for(static_cast<int64_t>(plan.blocks.size()) * plan.splits);
  const Scratch scratch(
      std::max(kernels.forward_scratch_bytes(args), views == nullptr ? int64_t{0} : views->scratch_bytes()), threads);
  PlacedViews placed(views, plan.heads.size());
  for (size_t begin = 0; begin < plan.heads.size();) {
    before.push_back(placed.make(begin, args.query, scratch));
    const ForwardWave wave = plan_forward_wave(kernels, args, plan, begin, placed.end());
    const Workspace packed(wave.packed_bytes), partials(wave.partial_bytes);
    launch_forward(kernels, args, assign_forward(kernels, args, plan, wave, packed, partials), scratch, threads,
                   std::exchange(before, {}));
    begin = wave.end;
  }
}

namespace {

void forward(const ModularAttentionInputs& in, const ModularAttentionShape& shape,
             const ModularAttentionOutputs& outputs, QueryViews* views) {
  const ModularAttentionKernels& kernels = select_forward_kernels(in.query.scalar_type(), rows_per_key_head(in, shape));
  const Batch batch = plan_batch(in, shape, kernels.forward_tile_keys, kernels.panel_keys);
  ModularAttentionForwardArgs args;
  fill_args(in, shape, args);
  set_outputs(outputs, shape, args);
  run_forward(kernels, args, shape, batch, {0, shape.kv_heads}, views);
}

// -----------------------------------------------------------------------------------------------------------------
// backward

// Cuts the blocks of a kv head into `pieces` stretches of about equal work, where the work of a block is the keys its
// rows see.
std::vector<int64_t> balance_blocks(const Sequence& sequence, bool causal, int64_t group, int64_t block_rows,
                                    int64_t pieces) {
  const int64_t per_head = (sequence.num_queries + block_rows - 1) / block_rows;
  const auto work = [&](int64_t block) {
    const int64_t row = std::min(sequence.num_queries - 1, block % per_head * block_rows + block_rows / 2);
    return 1 + std::max<int64_t>(0, last_visible(sequence, causal, row) + 1);
  };
  int64_t total = 0;
  for (int64_t b = 0; b < per_head * group; ++b) total += work(b);
  std::vector<int64_t> bounds = {0};
  int64_t done = 0;
  for (int64_t b = 0; b < per_head * group; ++b) {
    done += work(b);
    if (static_cast<int64_t>(bounds.size()) < pieces && done * pieces >= total * static_cast<int64_t>(bounds.size()))
      bounds.push_back(b + 1);
  }
  while (static_cast<int64_t>(bounds.size()) < pieces) bounds.push_back(per_head * group);
  bounds.push_back(per_head * group);
  return bounds;
}

// One (sequence, kv head) of a backward pass.
struct BackwardHead {
  const Sequence* sequence;
  int64_t kv_head;
  int64_t packed_bytes, partial_bytes;  // its packed keys and values; partial gradients of one item
};

std::vector<BackwardHead> backward_heads(const ModularAttentionKernels& kernels,
                                         const ModularAttentionBackwardArgs& args, const ModularAttentionShape& shape,
                                         const Batch& batch) {
  std::vector<BackwardHead> heads;
  for (const Sequence& sequence : batch.sequences) {
    if (sequence.num_queries == 0) continue;
    for (int64_t kv_head = 0; kv_head < shape.kv_heads; ++kv_head)
      heads.push_back({&sequence, kv_head, round_up(kernels.backward_packed_bytes(args, sequence.num_panels)),
                       round_up(2 * int64_t{sequence.num_slots} * args.head_dim * kernels.compute_bytes)});
  }
  return heads;
}

// Heads [begin, end), computed together, and the memory that they need.
struct BackwardWave {
  size_t begin, end;
  bool packs;      // items share packed keys, and have partial gradients of their own
  int64_t splits;  // items that share a head, at most
  int64_t packed_bytes = 0, partial_bytes = 0;
};

// All heads at once unless packed keys or partial gradients need more than their budgets.
BackwardWave plan_backward_wave(const ModularAttentionKernels& kernels, const ModularAttentionBackwardArgs& args,
                                const std::vector<BackwardHead>& heads, size_t begin) {
  const int64_t threads = num_threads();
  const int64_t budget = std::max(kPartialBudget, kPartialBudgetPerThread * threads);
  const int64_t wanted = std::max(kBackwardItems, 2 * threads);
  BackwardWave wave{begin, begin, kernels.backward_packed_bytes(args, 1) > 0, 1};
  for (; wave.end < heads.size(); ++wave.end) {
    const BackwardHead& head = heads[wave.end];
    if (wave.packs && wave.end > begin &&
        (wave.packed_bytes + head.packed_bytes > kPackedBudget || wave.partial_bytes + head.partial_bytes > budget))
      break;
    wave.packed_bytes += head.packed_bytes;
    wave.partial_bytes += head.partial_bytes;
  }
  // Few heads: several items share one, each with partial gradients of its own. Where items need those anyway, every
  // thread gets one whatever the budget says.
  const int64_t num_heads = static_cast<int64_t>(wave.end - begin);
  wave.splits = num_heads >= wanted ? 1 : (wanted + num_heads - 1) / num_heads;
  wave.splits = std::min(wave.splits, budget / std::max<int64_t>(1, wave.partial_bytes));
  wave.splits = std::max<int64_t>(wave.splits, wave.packs ? (threads + num_heads - 1) / num_heads : 1);
  wave.partial_bytes *= wave.splits;
  return wave;
}

// What the kernels are called with for one wave.
struct BackwardWork {
  struct Pack {
    const BackwardHead* head;
    int64_t tile;
    void* packed;
  };
  struct Reduction {  // the partial gradients of a head
    const BackwardHead* head;
    std::vector<void*> partials;
  };
  std::vector<Pack> packs;
  std::vector<ModularAttentionBackwardItem> items;
  std::vector<Reduction> reductions;
  int64_t most_blocks = 0;  // of an item
};

BackwardWork assign_backward(const ModularAttentionKernels& kernels, const ModularAttentionBackwardArgs& args,
                             const std::vector<BackwardHead>& heads, const BackwardWave& wave, const Workspace& packed,
                             const Workspace& partials) {
  BackwardWork work;
  int64_t partials_at = 0, packed_at = 0;
  for (size_t h = wave.begin; h < wave.end; ++h) {
    const BackwardHead& head = heads[h];
    const Sequence& sequence = *head.sequence;
    void* const packed_keys = wave.packs ? packed.at(packed_at) : nullptr;
    packed_at += head.packed_bytes;
    for (int64_t tile = 0; wave.packs && tile < sequence.num_tiles; ++tile)
      work.packs.push_back({&head, tile, packed_keys});
    const int64_t blocks =
        args.group * ((sequence.num_queries + kernels.backward_block_rows - 1) / kernels.backward_block_rows);
    const int64_t pieces = std::min(wave.splits, blocks);
    const std::vector<int64_t> bounds =
        balance_blocks(sequence, args.causal, args.group, kernels.backward_block_rows, pieces);
    if (wave.packs || pieces > 1) work.reductions.push_back({&head, {}});
    for (int64_t p = 0; p < pieces; ++p) {
      void* partial = nullptr;
      if (wave.packs || pieces > 1) {
        partial = partials.at(partials_at);
        partials_at += head.partial_bytes;
        work.reductions.back().partials.push_back(partial);
      }
      work.items.push_back({&sequence, head.kv_head, bounds[p], bounds[p + 1], partial, packed_keys});
      work.most_blocks = std::max(work.most_blocks, bounds[p + 1] - bounds[p]);
    }
  }
  return work;
}

void launch_backward(const ModularAttentionKernels& kernels, const ModularAttentionBackwardArgs& args,
                     const BackwardWork& work) {
  constexpr int64_t kSlotsPerItem = 256;
  struct Slots {
    const BackwardWork::Reduction* reduction;
    int64_t begin, end;
  };
  std::vector<Slots> slots;
  for (const BackwardWork::Reduction& reduction : work.reductions) {
    const int64_t all = reduction.head->sequence->num_slots;
    for (int64_t first = 0; first < all; first += kSlotsPerItem)
      slots.push_back({&reduction, first, std::min(first + kSlotsPerItem, all)});
  }
  const int64_t num_packs = static_cast<int64_t>(work.packs.size()), num_slots = static_cast<int64_t>(slots.size());
  const int64_t count = static_cast<int64_t>(work.items.size());
  const int64_t threads = threads_for(std::max({num_packs, count, num_slots}));
  const Scratch scratch(kernels.backward_scratch_bytes(args, work.most_blocks), threads);
  const auto pack = [&](int64_t i, int64_t) {
    const BackwardWork::Pack& pack = work.packs[i];
    kernels.pack_backward_tile(args, *pack.head->sequence, pack.head->kv_head, pack.tile, pack.packed);
  };
  const auto attend = [&](int64_t i, int64_t thread) { kernels.backward(args, work.items[i], scratch.of(thread)); };
  const auto reduce = [&](int64_t i, int64_t) {
    const BackwardWork::Reduction& reduction = *slots[i].reduction;
    kernels.reduce_partials(args, *reduction.head->sequence, reduction.head->kv_head, reduction.partials.data(),
                            static_cast<int>(reduction.partials.size()), slots[i].begin, slots[i].end);
  };
  run_phases(threads, {{num_packs, pack}, {count, attend}, {num_slots, reduce}});
}

void run_backward(const ModularAttentionKernels& kernels, ModularAttentionBackwardArgs args,
                  const ModularAttentionShape& shape, const Batch& batch) {
  for (const Sequence& sequence : batch.sequences)
    if (kernels.backward_packed_bytes(args, sequence.num_panels) > kPackedBudget) args.packs_transposed_keys = false;
  const std::vector<BackwardHead> heads = backward_heads(kernels, args, shape, batch);
  for (size_t begin = 0; begin < heads.size();) {
    const BackwardWave wave = plan_backward_wave(kernels, args, heads, begin);
    const Workspace packed(wave.packed_bytes), partials(wave.partial_bytes);
    launch_backward(kernels, args, assign_backward(kernels, args, heads, wave, packed, partials));
    begin = wave.end;
  }
}

void backward(const ModularAttentionInputs& in, const ModularAttentionShape& shape, const ModularAttentionSaved& saved,
              const ModularAttentionGradients& gradients) {
  const ModularAttentionKernels& kernels =
      select_kernels(in.query.scalar_type(), Direction::kBackward, rows_per_key_head(in, shape));
  const Batch batch = plan_batch(in, shape, kernels.backward_tile_keys, kernels.panel_keys);
  ModularAttentionBackwardArgs args;
  fill_args(in, shape, args);
  set_gradients(saved, gradients, shape, args);
  const Tensor zero_row = torch::stable::new_zeros(in.query, {shape.head_dim});
  if (!saved.grad_out) args.grad_out.data = zero_row.const_data_ptr();  // every stride 0
  const Tensor delta = empty_sums(in.query, shape.rows());
  args.delta = output(delta, shape.packed, Last::kNone);
  const Tensor probability_sums = empty_sums(in.query, shape.mass(), args.grad_bias.data != nullptr);
  args.probability_sums = wanted_output(probability_sums, shape.packed, Last::kPresent);
  if (!batch.covers_every_row)
    for (Tensor gradient : {gradients.key, gradients.value}) torch::stable::zero_(gradient);
  run_backward(kernels, args, shape, batch);
}

struct CpuModularAttention : CpuResults {
  static void check(const ArgumentCheck& check, const ModularAttentionInputs& in, const ModularAttentionShape& shape) {
    if (!shape.packed) return;
    check_cu_seqlens(check.op(), "cu_seqlens_q", *in.cu_seqlens_q, shape.num_queries, in.max_seqlen_q, "max_seqlen_q");
    check_cu_seqlens(check.op(), "cu_seqlens_k", *in.cu_seqlens_k, shape.num_keys, in.max_seqlen_k, "max_seqlen_k");
  }
  static void modular_attention(const ModularAttentionInputs& in, const ModularAttentionShape& shape,
                                const ModularAttentionOutputs& outputs) {
    forward(in, shape, outputs, nullptr);
  }
  static void modular_attention_backward(const ModularAttentionInputs& in, const ModularAttentionShape& shape,
                                         const ModularAttentionSaved& saved,
                                         const ModularAttentionGradients& gradients) {
    backward(in, shape, saved, gradients);
  }
};

}  // namespace

ModularAttentionOutputs forward_with_views(const ModularAttentionInputs& in, QueryViews& views) {
  ModularAttentionShape shape = check_modular_attention(in);
  shape.num_views = in.num_modalities;
  const ModularAttentionOutputs outputs = empty_outputs<CpuModularAttention>(in, shape);
  forward(in, shape, outputs, &views);
  return outputs;
}

}  // namespace cpu
}  // namespace moda_ext

STABLE_TORCH_LIBRARY_IMPL(moda_ext, CPU, m) {
  moda_ext::ModularAttentionOperators<moda_ext::cpu::CpuModularAttention>::implement(m);
}
