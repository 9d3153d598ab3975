"""Deficit disorder attention, measured: which modality a model's attention starves, layer by layer.

:class:`AttentionMeter` measures a model while it runs, :class:`Diagnosis` holds what it found beside what uniform
attention would give, :mod:`moda_ext.diagnostics.figures` draws it, :class:`AttentionBalanceLoss` trains against it, and
:func:`diagnose` asks a model about images, as ``moda-ext diagnose`` does on the command line. The formulas are in
:mod:`moda_ext.diagnostics.measures`.
"""

from moda_ext.diagnostics.loss import AttentionBalanceLoss
from moda_ext.diagnostics.meter import AttentionMeter
from moda_ext.diagnostics.results import Comparison, Diagnosis, LayerSums, TokenScores
from moda_ext.diagnostics.runner import Picture, diagnose, load_model

__all__ = [
    "AttentionBalanceLoss",
    "AttentionMeter",
    "Comparison",
    "Diagnosis",
    "LayerSums",
    "Picture",
    "TokenScores",
    "diagnose",
    "load_model",
]
