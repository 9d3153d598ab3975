"""A small real vision-language model and its world: what training, evaluation and calibration are tried on offline.

SmolLM2-135M reads the cells of an EfficientNet-Lite0 (:mod:`moda_ext.small.tower`); both come from packages of the
Python registry (:mod:`moda_ext.small.assemble`). It is asked about scenes of real pictures
(:mod:`moda_ext.small.scenes`, :mod:`moda_ext.small.questions`). Importing this makes its tower known to Transformers,
so that the Auto classes load it.
"""

from moda_ext.small.assemble import assemble
from moda_ext.small.tower import EfficientNetLiteConfig, EfficientNetLiteModel

__all__ = ["EfficientNetLiteConfig", "EfficientNetLiteModel", "assemble"]
