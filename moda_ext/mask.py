"""The modular mask. Its module is :class:`ModularMask`; see ``nn/mask.py``."""

from moda_ext.nn.mask import CONDITIONAL, SOFTMAXES, VARIANTS, ModularMask

__all__ = ["CONDITIONAL", "SOFTMAXES", "VARIANTS", "ModularMask"]
