"""Modality-aware attention (MODA) for PyTorch: native operators with gradients, and their plain PyTorch reference."""

import torch

from moda_ext import alignment, attention, mask, reference
from moda_ext._info import info
from moda_ext._ops.backend import use_backend
from moda_ext._version import __version__

ops = torch.ops.moda_ext

__all__ = ["__version__", "alignment", "attention", "info", "mask", "ops", "reference", "use_backend"]
