"""The modular mask: a prior for every pair of modalities, and pseudo scores."""

from moda_ext.nn.mask import CONDITIONAL as CONDITIONAL
from moda_ext.nn.mask import SOFTMAXES as SOFTMAXES
from moda_ext.nn.mask import VARIANTS as VARIANTS
from moda_ext.nn.mask import ModularMask

__all__ = ["ModularMask"]
