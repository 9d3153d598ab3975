"""Who computes? One function decides for every public function, and gives the reason.

Backends:

- ``"native"``: the operator's kernels (csrc);
- ``"composed"``: other operators, one after the other, each with a backend of its own: what ``duplex_attention`` and
  ``DuplexAligner.align_keys`` are where a gradient is asked for;
- ``"composite"``: PyTorch's matrix products, chunk by chunk (composite.py), for dtypes without kernels;
- ``"reference"``: :mod:`moda_ext.reference`, dense.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moda_ext._ops import library, operators
from moda_ext._ops.operator import transformed

NATIVE, COMPOSED, COMPOSITE, REFERENCE = "native", "composed", "composite", "reference"

OPERATORS = tuple(operators.DECLARED)
FUSED = tuple(name for name, op in operators.DECLARED.items() if op.instead)  # see Operator
_HAS_COMPOSITE = tuple(name for name, op in operators.DECLARED.items() if op.composite)

# Devices with native kernels; a meta tensor is answered by the fake kernels.
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "meta": None}
NATIVE_DEVICES = frozenset(
    device
    for device, key in _DISPATCH_KEYS.items()
    if library.native_loaded
    and (key is None or torch._C._dispatch_has_kernel_for_dispatch_key("moda_ext::modular_attention", key))
)


class Choice(NamedTuple):
    """``backend`` is None where nothing can compute; ``reason`` says why in either case."""

    backend: str | None
    reason: str


def choose(op: str, tensor: Tensor, *others: Tensor | None, name: str = "query") -> str:
    """The backend of a public function for these tensors, of which ``tensor`` decides on device and dtype.

    Args:
        op: its name, one of ``OPERATORS``.
        tensor: the argument ``name``.
        others: for one of ``FUSED``: all other tensors that take part. Weights that are elsewhere until their module is
            called (offloading) want it to be called.

    Raises:
        NotImplementedError: nothing can compute here; it says why, and what would work.
    """
    differentiated = elsewhere = False
    if op in FUSED:
        given = [tensor, *(other for other in others if isinstance(other, Tensor))]
        differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        elsewhere = any(t.device.type != tensor.device.type for t in given)
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
    fused = op in FUSED
    if not library.native_loaded:
        return Choice(COMPOSED if fused else REFERENCE, library.fallback_reason or "")
    if fused and device_type != "cpu":
        return Choice(COMPOSED, "the fused operator has kernels for the CPU alone")
    if fused and elsewhere:
        return Choice(COMPOSED, "the tensors are on several devices")
    if fused and differentiated:
        return Choice(COMPOSED, "a gradient is asked for, and the fused operator has none")
    if fused and transformed():
        return Choice(COMPOSED, "under torch.func and forward mode, and the fused operator has no derivative")
    if device_type == "cuda" and library.cuda_mode() == "reference":
        return Choice(REFERENCE, library.cuda_reason())
    if device_type == "cuda" and dtype == torch.float64 and op not in _HAS_COMPOSITE:
        return Choice(REFERENCE, "there are no float64 kernels for CUDA")
    if device_type not in NATIVE_DEVICES:
        return Choice(None, f"this build of moda_ext has no kernels for {device_type}")
    if device_type == "cuda" and dtype == torch.float64:
        return Choice(COMPOSITE, "there are no float64 kernels for CUDA")
    return Choice(NATIVE, "native kernels")
