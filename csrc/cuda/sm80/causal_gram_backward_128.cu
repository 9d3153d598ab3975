#include "cuda/sm80/causal_gram_backward.h"

template struct moda_ext::cuda::ProjectionBackwardKernels<128>;
