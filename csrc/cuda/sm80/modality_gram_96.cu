#include "cuda/sm80/modality_gram.h"

template struct moda_ext::cuda::ModalityGramKernels<96>;
template struct moda_ext::cuda::ModalityGramBackwardKernels<96>;
