"""What layers with MODA have in common, here and in the integrations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

__all__ = ["DuplexLayer", "on_own_heads"]


class Split(Protocol):
    """A :class:`moda_ext.distributed.heads.HeadSplit`, as layers see it."""

    @property
    def mesh(self) -> Any: ...

    @property
    def size(self) -> int: ...

    def own_heads(self, layer: DuplexLayer) -> contextlib.AbstractContextManager[None]: ...


class DuplexLayer(nn.Module):
    """A module with an ``aligner`` and a ``mask``, which may both be None, and maybe with some of its heads only."""

    aligner: Any
    mask: Any
    head_split: Split | None = None  # set by moda_ext.distributed.split_heads

    @property
    def whole_heads(self) -> int:
        """Hq of all processes."""
        raise NotImplementedError

    @property
    def whole_kv_heads(self) -> int | None:
        """Hkv of all processes, None if the layer does not know."""
        return None

    @property
    def own_share(self) -> int:
        """One in how many heads this process has."""
        return 1 if self.head_split is None else self.head_split.size

    def own_heads(self) -> contextlib.AbstractContextManager[None]:
        """A block in which aligner and mask are those of this process's heads."""
        return contextlib.nullcontext() if self.head_split is None else self.head_split.own_heads(self)


def on_own_heads(forward: Callable) -> Callable:
    """A method of a :class:`DuplexLayer` all of which is about this process's heads."""

    @functools.wraps(forward)
    def inner(self: DuplexLayer, *args: Any, **kwargs: Any) -> Any:
        with self.own_heads():
            return forward(self, *args, **kwargs)

    return inner
