#include "cuda/sm80/modular_attention_backward.h"

template struct moda_ext::cuda::BackwardKernels<32>;
