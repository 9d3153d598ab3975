#include "cuda/sm80/modality_gram.h"

template struct moda_ext::cuda::ModalityGramKernels<32>;
template struct moda_ext::cuda::ModalityGramBackwardKernels<32>;
