#include "cuda/sm80/duplex_views.h"

template struct moda_ext::cuda::DuplexKernels<64>;
