"""Training a vision-language model with MODA: stages of a recipe, on Transformers' Trainer and PEFT.

Needs the extra ``moda_ext[train]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moda_ext.training.collator import Collator
from moda_ext.training.recipe import Lora, Recipe, Source, Stage, read_recipe

if TYPE_CHECKING:
    from moda_ext.training.run import train, train_stage

__all__ = ["Collator", "Lora", "Recipe", "Source", "Stage", "read_recipe", "train", "train_stage"]


def __getattr__(name: str) -> Any:
    """Those that need Transformers when they are asked for."""
    if name in ("train", "train_stage"):
        from moda_ext.training import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
