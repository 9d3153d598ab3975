"""Modular attention over a part of the keys at a time: what a row is, how parts merge, and the gradient of a part.

For keys that are in several places, or come one after the other (docs/mathematics.md section 3). Nothing here is
recorded by autograd: the callers are gradients' own homes, ``torch.autograd.Function``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_ext._ops import backend, operators
from moda_ext.functional.attention import attend, last_contiguous


class Rows(NamedTuple):
    """Results of attention rows, (B, Hq, N, ...), over all keys or a part of them.

    ``lse + lse_residual`` is the logarithm; the residual is what rounding took from it.
    """

    out: Tensor
    lse: Tensor
    mass: Tensor
    lse_residual: Tensor

    def select(self, rows: slice) -> "Rows":
        return Rows(*(tensor[:, :, rows] for tensor in self))


class Keys(NamedTuple):
    """What rows attend to: key and value (B, Hkv, Nk, D), key_modality (B, Nk) in int32."""

    key: Tensor
    value: Tensor
    key_modality: Tensor


class Terms(NamedTuple):
    """The other arguments of :func:`moda_ext.attention.modular_attention`; bias (B, Hq, Nq, M) and sink (B, Hq, Nq) in
    the dtype of sums, or None."""

    modality_bias: Tensor | None
    sink: Tensor | None
    num_modalities: int
    is_causal: bool
    scale: float

    def as_keywords(self) -> dict[str, Any]:
        return self._asdict()


def attend_part(query: Tensor, keys: Keys, terms: Terms) -> Rows:
    """Rows over these keys alone; query (B, Hq, Nq, D) or (M, B, Hq, Nq, D)."""
    key, value = last_contiguous(keys.key), last_contiguous(keys.value)
    if _is_native(query, key):
        results = operators.modular_attention(
            query=last_contiguous(query), key=key, value=value, key_modality=keys.key_modality, **terms.as_keywords()
        )
        return Rows(*results)
    out, lse, mass = attend(query, *keys, **terms.as_keywords(), return_lse=True, return_mass=True)
    return Rows(out, lse, mass, torch.zeros_like(lse))


def merge(one: Rows, other: Rows) -> Rows:
    r"""Rows over the keys of both, with ``out`` in the dtype of sums.

    .. math:: L = \log(e^{L_1} + e^{L_2}), \qquad o = e^{L_1 - L} o_1 + e^{L_2 - L} o_2

    and the mass like o. L may be so large that the logarithm of a sum is lost beside it: differences are taken first.
    """
    both_empty = (one.lse == -torch.inf) & (other.lse == -torch.inf)
    gap = (one.lse - other.lse) + (one.lse_residual - other.lse_residual)
    gap = gap.masked_fill(both_empty, 0.0)
    is_larger = gap >= 0
    largest = torch.where(is_larger, one.lse, other.lse)
    rest = torch.where(is_larger, one.lse_residual, other.lse_residual) + (-gap.abs()).exp().log1p()
    lse = largest + rest
    residual = ((largest - lse) + rest).masked_fill(both_empty, 0.0)
    shares = gap.sigmoid()[..., None], (-gap).sigmoid()[..., None]
    out, mass = (
        a.to(lse.dtype) * shares[0] + b.to(lse.dtype) * shares[1]
        for a, b in ((one.out, other.out), (one.mass, other.mass))
    )
    return Rows(out, lse, mass, residual)


class Gradients(NamedTuple):
    """Of query, key, value, modality_bias and sink; None where it is not asked for."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    modality_bias: Tensor | None
    sink: Tensor | None


def differentiate_part(
    grad_out: Tensor | None,
    grad_mass: Tensor | None,
    query: Tensor,
    keys: Keys,
    terms: Terms,
    rows: Rows,
    needs: tuple[bool, ...],
    *,
    whole_rows: bool,
) -> Gradients:
    """What these keys add to the gradient of ``rows``, which see them and, unless ``whole_rows``, others.

    Args:
        grad_out, grad_mass: the gradients of ``rows.out`` and ``rows.mass``, None for none.
        query, keys, terms: as in :func:`attend_part`. The sink is that of the whole row, in one part only.
        rows: of all keys, with ``out`` in the dtype of the query.
        needs: of which of query, key, value, modality_bias and sink the gradient is asked for.
        whole_rows: whether ``keys`` are all keys. Otherwise the sum over the parts is the gradient; for the bias before
            :func:`finish_bias_gradient`.
    """
    given = query, keys.key, keys.value, terms.modality_bias, terms.sink
    needs = tuple(need and tensor is not None for need, tensor in zip(needs, given, strict=True))
    if not _is_native(query, keys.key):
        return _differentiate_again(grad_out, grad_mass, query, keys, terms, rows, needs, whole_rows)
    assert operators.modular_attention.backward is not None, "it has a gradient"
    gradients = operators.modular_attention.backward(
        grad_out=None if grad_out is None else last_contiguous(grad_out),
        grad_lse=None,
        grad_mass=None if grad_mass is None else last_contiguous(grad_mass),
        query=last_contiguous(query),
        key=last_contiguous(keys.key),
        value=last_contiguous(keys.value),
        key_modality=keys.key_modality,
        **terms.as_keywords(),
        **rows._asdict(),
        **{f"need_{name}": need for name, need in zip(Gradients._fields, needs, strict=True)},
        whole_rows=whole_rows,
    )
    return Gradients(*(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)))


def finish_bias_gradient(
    gradient: Tensor, grad_out: Tensor | None, grad_mass: Tensor | None, rows: Rows, sink: Tensor | None
) -> Tensor:
    r"""The bias gradient of whole rows, from its sum over the parts.

    It is a small difference of large numbers, made with the D of a rounded ``out``. As the kernels do for whole rows,
    it is brought to the sum that it has with the D that the row's own probabilities imply:

    .. math::
        \delta = D (1 - s) - \sum_m db_m, \qquad db_m \leftarrow db_m + \text{mass}_m\, \delta

    with 1 - s = exp(c - L) the sink's part of the row, 0 without one.
    """
    delta = torch.zeros_like(rows.lse)
    for grad, result in ((grad_out, rows.out), (grad_mass, rows.mass)):
        if grad is not None:
            delta = delta + (grad.to(delta.dtype) * result.to(delta.dtype)).sum(dim=-1)
    missing = -gradient.sum(dim=-1)
    if sink is not None:  # what is left of 1 would be a difference again
        of_sink = ((sink - rows.lse) - rows.lse_residual).clamp(max=0).exp()
        missing = missing + delta * torch.where(sink == -torch.inf, 0.0, of_sink)
    return gradient + rows.mass * missing[..., None]


def _is_native(query: Tensor, key: Tensor) -> bool:
    return backend.choose("modular_attention", query, key) == backend.NATIVE


def _differentiate_again(
    grad_out: Tensor | None,
    grad_mass: Tensor | None,
    query: Tensor,
    keys: Keys,
    terms: Terms,
    rows: Rows,
    needs: tuple[bool, ...],
    whole_rows: bool,
) -> Gradients:
    """:func:`differentiate_part` on other backends, whose gradient wants the part's own forward pass.

    With w = exp(L_part - L), the part of the row's out and mass is w out_part and w mass_part.
    """
    given = query, keys.key, keys.value, terms.modality_bias, terms.sink
    leaves: list[Any] = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(given, needs, strict=True)]
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    if not wanted:
        return Gradients(None, None, None, None, None)
    with torch.enable_grad():
        again = terms._replace(modality_bias=leaves[3], sink=leaves[4]).as_keywords()
        query, key, value = leaves[:3]
        out, lse, mass = attend(query, key, value, keys.key_modality, **again, return_lse=True, return_mass=True)
    dtype = lse.dtype
    weight = torch.ones_like(lse) if whole_rows else ((lse.detach() - rows.lse) - rows.lse_residual).exp()
    weight = torch.where(rows.lse == -torch.inf, 0.0, weight)
    grad_lse, results, incoming = torch.zeros_like(weight), [lse], []
    for grad, part, row in ((grad_out, out, rows.out), (grad_mass, mass, rows.mass)):
        if grad is not None:
            results.append(part)
            incoming.append((grad.to(dtype) * weight[..., None]).to(part.dtype))
            if not whole_rows:
                gap = part.detach().to(dtype) - row.to(dtype)
                grad_lse = grad_lse + weight * (grad.to(dtype) * gap).sum(dim=-1)
    found = iter(torch.autograd.grad(results, wanted, [grad_lse, *incoming], allow_unused=True))
    gradients = [next(found) if need else None for need in needs]
    return Gradients(
        *(
            torch.zeros_like(tensor) if need and gradient is None and tensor is not None else gradient
            for tensor, need, gradient in zip(given, needs, gradients, strict=True)
        )
    )
