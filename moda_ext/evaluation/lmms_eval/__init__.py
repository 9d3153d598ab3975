"""Vision-language models of Transformers, with MODA or without, in lmms-eval: ``lmms-eval --model moda_ext``.

lmms-eval finds :func:`manifest` by the entry point ``lmms_eval.models`` where moda_ext is installed. Needs the extra
``moda_ext[lmms]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

__all__ = ["manifest"]


def manifest() -> ModelManifest:
    """What lmms-eval is told of the model; it imports the class, and Transformers with it, when one is evaluated."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("moda_ext", chat_class_path="moda_ext.evaluation.lmms_eval.model.MODAExt")
