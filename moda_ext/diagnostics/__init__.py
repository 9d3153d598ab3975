"""Deficit disorder attention, measured: which modality a model's attention starves, layer by layer.

:class:`AttentionMeter` measures a model while it runs, :class:`Diagnosis` holds what it found beside what uniform
attention would give, :mod:`moda_ext.diagnostics.figures` draws it, :class:`AttentionBalanceLoss` trains against it. The
formulas are in :mod:`moda_ext.diagnostics.measures`. On the command line: ``moda-ext diagnose``.
"""

from moda_ext.diagnostics.loss import AttentionBalanceLoss
from moda_ext.diagnostics.meter import AttentionMeter
from moda_ext.diagnostics.results import Comparison, Diagnosis, LayerSums, TokenScores

__all__ = ["AttentionBalanceLoss", "AttentionMeter", "Comparison", "Diagnosis", "LayerSums", "TokenScores"]
