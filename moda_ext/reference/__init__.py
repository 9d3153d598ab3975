"""Plain-PyTorch operators: dense, differentiable by autograd, on any device and in any floating-point dtype.

They are the tests' oracle (run them in float64) and what the package runs where there are no kernels. Memory is
O(Nq * Nk). Everything follows the equations; the one liberty is that the sink is one more column of the scores, which
is what a sum of exponentials that only enlarges the denominator amounts to. Nothing here is shared with what it judges:
these files import nothing of the package but each other.
"""

from moda_ext.reference import alignment, attention, paged, sink
from moda_ext.reference.alignment import *  # noqa: F403  an operator is named in its family's file alone
from moda_ext.reference.attention import *  # noqa: F403
from moda_ext.reference.paged import *  # noqa: F403
from moda_ext.reference.sink import *  # noqa: F403

__all__ = [*alignment.__all__, *attention.__all__, *paged.__all__, *sink.__all__]
