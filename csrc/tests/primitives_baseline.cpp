#include "primitives_tier.h"

MODA_EXT_DEFINE_PRIMITIVES(baseline)
