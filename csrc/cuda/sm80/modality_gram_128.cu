#include "cuda/sm80/modality_gram.h"

template struct moda_ext::cuda::ModalityGramKernels<128>;
template struct moda_ext::cuda::ModalityGramBackwardKernels<128>;
