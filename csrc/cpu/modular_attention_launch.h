// The forward pass of modular_attention for other launches: on query views that are made while it runs, and on keys
// that are planned elsewhere.
#pragma once

#include <vector>

#include "core/operand.h"
#include "core/runs.h"
#include "cpu/kernels/modular_attention_kernels.h"
#include "cpu/phases.h"
#include "ops/modular_attention_checks.h"

namespace moda_ext {
namespace cpu {

// Query views are made for as many key heads at a time as fit in this much memory.
constexpr int64_t kViewsBudget = int64_t{16} << 20;

// What was written, to be read.
inline Input read_from(const Output& written) {
  return {written.data, written.batch, written.head, written.row, written.last, written.view};
}

class QueryViews {
 public:
  virtual ~QueryViews() = default;
  // Memory for the views of the query heads that share a key head.
  virtual int64_t bytes_per_head() const = 0;
  // Memory that a thread needs to make them.
  virtual int64_t scratch_bytes() const = 0;
  // Where the views of key heads [first, first + count), counted through the batch, come to be.
  virtual Input place(int64_t first, int64_t count, char* memory) = 0;
  // Makes the views of one of the heads that were placed, and the bias if it depends on them.
  virtual void make(int64_t head, void* scratch) const = 0;
};

// The sequences of a call with the key plans they point into.
struct Batch {
  std::vector<KeyPlan> plans;
  std::vector<Sequence> sequences;
  bool covers_every_row = true;  // no padding key, no token outside the sequences

  explicit Batch(size_t size) {  // sequences point into plans, and items to sequences: neither moves
    plans.reserve(size);
    sequences.reserve(size);
  }
  void add(Sequence sequence, KeyPlan plan);
};

// Of a forward pass in which a key head meets so many query rows of a sequence.
const ModularAttentionKernels& select_forward_kernels(ScalarType dtype, int64_t rows_per_key_head);
struct KeyHeads {
  int64_t first, last;
};
// Of some key heads. Without `views`, the query is that of `args`. `before` runs first, with thread numbers below
// num_threads().
void run_forward(const ModularAttentionKernels& kernels, ModularAttentionForwardArgs args,
                 const ModularAttentionShape& shape, const Batch& batch, KeyHeads heads, QueryViews* views = nullptr,
                 std::vector<Phase> before = {});

// modular_attention(views of in.query, ...) with the views of a few key heads at a time. Not for packed sequences.
ModularAttentionOutputs forward_with_views(const ModularAttentionInputs& in, QueryViews& views);

}  // namespace cpu
}  // namespace moda_ext
