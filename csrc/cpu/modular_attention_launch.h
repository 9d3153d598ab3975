// The forward pass of modular_attention on query views that are made while it runs.
#pragma once

#include "core/operand.h"
#include "ops/modular_attention_checks.h"

namespace moda_ext {
namespace cpu {

class QueryViews {
 public:
  virtual ~QueryViews() = default;
  // Memory for the views of the query heads that share a key head.
  virtual int64_t bytes_per_head() const = 0;
  // Makes the views of key heads [first, first + count), counted through the batch, and the bias if it depends on them,
  // and describes where the views are.
  virtual void make(int64_t first, int64_t count, char* memory, Input& views) const = 0;
};

// modular_attention(views of in.query, ...) with the views of a few key heads at a time. Not for packed sequences.
ModularAttentionOutputs forward_with_views(const ModularAttentionInputs& in, QueryViews& views);

}  // namespace cpu
}  // namespace moda_ext
