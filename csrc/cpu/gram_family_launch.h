// What the CPU launches of the Gram family share.
#pragma once

#include "cpu/kernels/gram_family_kernels.h"
#include "cpu/launch.h"
#include "ops/gram_family_checks.h"

namespace moda_ext {
namespace cpu {

// Of an operator with so many query rows for each key head; 0: one without tile kernels.
const GramFamilyKernels& select_gram_family_kernels(const Tensor& key, int64_t rows_per_key_head);

// Throws std::invalid_argument, naming operator and argument, if an id is neither a modality nor padding.
void check_ids(const char* op, const char* argument, const Tensor& modality, int64_t num_modalities);

void fill_args(const GramInputs& in, const GramShape& shape, GramArgs& args);
void fill_args(const CausalGramInputs& in, const GramShape& shape, CausalGramArgs& args);
void fill_args(const DuplexQueryViewsInputs& in, const GramShape& shape, DuplexArgs& args);

void fill_args(const DuplexWeights& weights, const GramShape& shape, DuplexArgs& args);

// bias + condition * indicator for the query heads of a key head, where `sum` holds the indicator of the raw Gram and
// becomes the result. bias.data may be null.
void add_condition(const GramFamilyKernels& kernels, const CausalGramArgs& args, const Input& bias,
                   const Input& condition, const Output& sum, int64_t batch, int64_t kv_head);

// The weights of `args` as the kernels want them, for as long as this lives.
class PackedWeights {
 public:
  PackedWeights(const GramFamilyKernels& kernels, DuplexArgs& args) : memory_(kernels.weights_bytes(args)) {
    kernels.pack_weights(args, memory_.at());
    args.weights = memory_.at();
  }

 private:
  Workspace memory_;
};

}  // namespace cpu
}  // namespace moda_ext
