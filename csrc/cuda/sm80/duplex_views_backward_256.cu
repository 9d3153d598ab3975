#include "cuda/sm80/duplex_views_backward.h"

template struct moda_ext::cuda::DuplexBackwardKernels<256>;
