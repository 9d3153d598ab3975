// What the CPU adapters of the alignment operators share.
#pragma once

#include "cpu/kernels/gram.h"
#include "ops/gram.h"

namespace moda_ext {
namespace cpu {

// Of an operator with so many query rows for each key head; 0: one without tile kernels.
const GramKernels& select_gram_kernels(const Tensor& key, int64_t rows_per_key_head);

// Throws std::invalid_argument if an id is neither a modality nor padding.
void check_ids(const char* op, const Tensor& modality, int64_t num_modalities);

void fill_args(const GramInputs& in, const GramShape& shape, GramArgs& args);
void fill_args(const CausalInputs& in, const GramShape& shape, CausalArgs& args);
void fill_args(const DuplexInputs& in, const GramShape& shape, DuplexArgs& args);

}  // namespace cpu
}  // namespace moda_ext
