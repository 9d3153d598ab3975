#include "cuda/sm80/modular_attention_forward.h"

template struct moda_ext::cuda::ForwardKernels<32>;
