#include "cuda/sm80/modality_gram.h"

template struct moda_ext::cuda::ModalityGramKernels<256>;
template struct moda_ext::cuda::ModalityGramBackwardKernels<256>;
