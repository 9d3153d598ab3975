#include "primitives_isa.h"

MODA_EXT_DEFINE_PRIMITIVES(avx512)
