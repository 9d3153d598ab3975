#include "cuda/sm80/causal_gram.h"

template struct moda_ext::cuda::ProjectionKernels<32>;
