"""Who computes? One function decides for every public function, and gives the reason.

Backends, in the order in which they are preferred:

- ``"native"``: the operator's kernels (csrc);
- ``"flex"``: PyTorch's FlexAttention, merged (functional/flex.py): attention on GPUs where the kernels are not in use;
- ``"composite"``: PyTorch's matrix products, chunk by chunk (functional/composite.py): the alignment there;
- ``"reference"``: :mod:`moda_ext.reference`, dense;

and ``"composed"``: other operators, one after the other, each with a backend of its own: what ``duplex_attention`` and
``DuplexAligner.align_keys`` are where a gradient is asked for.

:class:`use_backend` and the environment variable MODA_EXT_BACKEND name the backend that comes first.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from moda_ext._ops import library, operators, stamps
from moda_ext._ops.operator import transformed

NATIVE, FLEX, COMPOSITE, REFERENCE, COMPOSED = "native", "flex", "composite", "reference", "composed"
PREFERRED = (NATIVE, FLEX, COMPOSITE, REFERENCE)
TO_ASK_FOR = (NATIVE, FLEX, REFERENCE)

OPERATORS = tuple(operators.DECLARED)
FUSED = frozenset(name for name, op in operators.DECLARED.items() if op.instead)  # see Operator
_HAS_COMPOSITE = tuple(name for name, op in operators.DECLARED.items() if op.composite)
_HAS_FLEX = tuple(name for name, op in operators.DECLARED.items() if op.flex)

# Devices with native kernels; a meta tensor is answered by the fake kernels.
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "meta": None}
NATIVE_DEVICES = frozenset(
    device
    for device, key in _DISPATCH_KEYS.items()
    if library.native_loaded
    and (key is None or torch._C._dispatch_has_kernel_for_dispatch_key("moda_ext::modular_attention", key))
)
_FAILED_ON_CPU = stamps.obstacles_on_cpu(OPERATORS)
FLEX_IS_WHOLE_ON_CPU = False  # the tests step around what FlexAttention lacks there: gradients, and a log-sum-exp
FLEX_DEVICES = ("cuda", "xpu")  # where FlexAttention has kernels with a log-sum-exp and gradients; ROCm is "cuda"


def _from_environment() -> str | None:
    asked = os.environ.get("MODA_EXT_BACKEND") or None
    if asked is not None and asked not in TO_ASK_FOR:
        raise ImportError(f"moda_ext: MODA_EXT_BACKEND: expected one of {', '.join(TO_ASK_FOR)}, got {asked!r}")
    if os.environ.get("MODA_EXT_CUDA"):
        raise ImportError("moda_ext: MODA_EXT_CUDA has become MODA_EXT_BACKEND, for every device")
    return asked


_asked = _from_environment()


class use_backend:  # noqa: N801 - used like a function, as torch.no_grad
    """A context manager: which backend comes first, for every operator and device that it can compute.

    .. code-block:: python

        with moda_ext.use_backend("reference"):
            expected = modular_attention(query, key, value, key_modality)

    What it cannot compute goes to the next, as ``moda_ext info --why`` tells. The setting is the process's, as that of
    ``torch.backends``: other threads see it. Inside of ``torch.compile`` it is part of what is compiled.

    Args:
        name: ``"native"``, ``"flex"`` or ``"reference"``; None is the default order.

    Raises:
        ValueError: no such backend.
    """

    def __init__(self, name: str | None):
        if name is not None and name not in TO_ASK_FOR:
            raise ValueError(f"use_backend: name must be one of {', '.join(TO_ASK_FOR)} or None, got {name!r}")
        self.name = name
        self._before: list[str | None] = []

    def __enter__(self) -> use_backend:
        global _asked
        self._before.append(_asked)
        _asked = self.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _asked
        _asked = self._before.pop()


class Choice(NamedTuple):
    """``backend`` is None where nothing can compute; ``reason`` says why in either case."""

    backend: str | None
    reason: str


def choose(op: str, tensor: Tensor, *others: Tensor | None, name: str = "query") -> str:
    """The backend of a public function for these tensors, of which ``tensor`` decides on device and dtype.

    Args:
        op: its name, one of ``OPERATORS``.
        tensor: the argument ``name``.
        others: all other tensors that take part. For one of ``FUSED``, weights that are elsewhere until their module
            is called (offloading) want it to be called.

    Raises:
        NotImplementedError: nothing can compute here; it says why, and what would work.
    """
    differentiated = elsewhere = False
    if op in FUSED or _asked == FLEX:
        recorded, on_cpu = torch.is_grad_enabled(), tensor.is_cpu
        for other in (tensor, *others):  # a plain loop: it runs in every layer of a step of decoding
            if isinstance(other, Tensor):
                differentiated |= recorded and other.requires_grad
                elsewhere |= other.is_cpu != on_cpu
    choice = _decide(op, tensor.device.type, tensor.dtype, differentiated, elsewhere)
    if choice.backend is None:
        raise NotImplementedError(
            f"{op}: {name} is on {tensor.device}, and {choice.reason}; install it again where the compiler for that "
            f"device is found (python -m moda_ext.info shows what was built), or call moda_ext.reference.{op}, which "
            "runs on any device, with O(Nq Nk) memory"
        )
    return choice.backend


def explain(op: str, device_type: str, dtype: torch.dtype = torch.float32, *, differentiated: bool = False) -> Choice:
    """What :func:`choose` would answer for tensors of this kind, and why."""
    return _decide(op, device_type, dtype, differentiated, False)


def _decide(op: str, device_type: str, dtype: torch.dtype, differentiated: bool, elsewhere: bool) -> Choice:
    if op in FUSED:
        return _decide_fused(op, device_type, dtype, differentiated, elsewhere)
    obstacles: list[str] = []
    for backend in PREFERRED if _asked is None else (_asked, *PREFERRED):
        obstacle = _obstacle(backend, op, device_type, dtype, differentiated)
        if obstacle is None:
            merit = "native kernels" if backend == NATIVE else "it is asked for"
            return Choice(backend, "; ".join(obstacles) or merit)
        if obstacle and obstacle not in obstacles:
            obstacles.append(obstacle)
    return Choice(None, obstacles[0])


def _obstacle(backend: str, op: str, device_type: str, dtype: torch.dtype, differentiated: bool) -> str | None:
    """Why a backend cannot compute, or None; empty if it is not meant for such calls."""
    asked = backend == _asked
    if backend == NATIVE:
        if not library.native_loaded:
            return library.fallback_reason or "the native library is not built"
        if device_type not in NATIVE_DEVICES:
            return f"this build of moda_ext has no kernels for {device_type}"
        if device_type == "cuda" and dtype == torch.float64:
            return "there are no float64 kernels for CUDA"
        return None if asked else _unproven(op, device_type)
    if backend == FLEX:
        if op not in _HAS_FLEX or not (asked or device_type in FLEX_DEVICES):
            return ""
        if device_type not in (*FLEX_DEVICES, "cpu"):
            return f"FlexAttention does not serve {device_type}"
        if dtype == torch.float64 and device_type != "cpu":
            return "FlexAttention has no float64 kernels"
        if device_type == "cpu" and not FLEX_IS_WHOLE_ON_CPU:
            if differentiated:
                return "FlexAttention has no gradients on the CPU"
            if torch.compiler.is_compiling():
                return "FlexAttention has no log-sum-exp on the CPU where it is compiled"
        if device_type == "cuda":
            from moda_ext._ops.on_gpus import FLEX_OBSTACLE

            if FLEX_OBSTACLE:
                return FLEX_OBSTACLE
        return "FlexAttention has no rules for torch.func and forward mode" if transformed() else None
    if backend == COMPOSITE:
        return None if op in _HAS_COMPOSITE and device_type in FLEX_DEVICES else ""
    return None if asked or device_type in ("cpu", "meta", *FLEX_DEVICES) else ""


def _unproven(op: str, device_type: str) -> str | None:
    """Why a native operator is not trusted on this machine, or None."""
    if device_type == "cuda":
        from moda_ext._ops.on_gpus import NATIVE_OBSTACLES

        return NATIVE_OBSTACLES.get(op)
    return _FAILED_ON_CPU.get(op) if device_type == "cpu" else None


def _decide_fused(op: str, device_type: str, dtype: torch.dtype, differentiated: bool, elsewhere: bool) -> Choice:
    if not library.native_loaded:
        return Choice(COMPOSED, library.fallback_reason or "")
    if _asked not in (None, NATIVE):
        return Choice(COMPOSED, f"{_asked} is asked for, and the fused operator is native")
    if device_type != "cpu":
        return Choice(COMPOSED, "the fused operator has kernels for the CPU alone")
    if (failed := _unproven(op, device_type)) and _asked is None:
        return Choice(COMPOSED, failed)
    if elsewhere:
        return Choice(COMPOSED, "the tensors are on several devices")
    if differentiated:
        return Choice(COMPOSED, "a gradient is asked for, and the fused operator has none")
    if transformed():
        return Choice(COMPOSED, "under torch.func and forward mode, and the fused operator has no derivative")
    return Choice(NATIVE, "native kernels")
