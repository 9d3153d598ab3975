"""Duplex attention: alignment and attention in one, causal."""

from torch import Tensor

from moda_ext._ops import autocast, backend, operators
from moda_ext._ops.limits import FLOATS
from moda_ext.functional import checks
from moda_ext.functional.alignment import (
    check_causal,
    check_fuser,
    low_rank_weights,
    query_views,
    row_scale,
)
from moda_ext.functional.attention import (
    Results,
    as_int32,
    attend,
    check_attention,
    expand,
    last_contiguous,
    pack_results,
)
from moda_ext.functional.gram import GramOptions


def duplex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_modality: Tensor,
    key_modality: Tensor,
    a1: Tensor,
    b1: Tensor,
    a2: Tensor,
    b2: Tensor,
    num_modalities: int = 2,
    *,
    new_key: Tensor | None = None,
    new_modality: Tensor | None = None,
    key_norm: str | None = "l2",
    normalize: str | None = "trace",
    eps: float = 1e-6,
    state: tuple[Tensor, Tensor] | None = None,
    modality_bias: Tensor | None = None,
    condition: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
) -> Results:
    r"""Causal duplex attention: :func:`moda_ext.alignment.duplex_query_views`, then :func:`modular_attention`.

    .. math::
        q^{(1..M)}, e = \text{duplex\_query\_views}(q, k; A, B), \qquad
        \text{out} = \text{modular\_attention}(q^{(1..M)}, k, v;\; b + \lambda \odot e,\; c)

    with the bias b, the sink c, and a condition :math:`\lambda` on the indicator e. Number for number what the two
    calls give. On the CPU, where no gradient is asked for, one operator does both: the views, M times the query, then
    never exist as a whole. Source: MODA (arXiv 2507.04635), Eq. 5-10; docs/mathematics.md sections 1 and 2.

    Args:
        query: (B, Hq, Nq, D), as in :func:`modular_attention`, and so are key, value, key_modality, num_modalities,
            modality_bias, sink, scale, return_lse and return_mass. Always causal.
        query_modality: (B, Nq), integer, -1 for padding.
        a1: (M, D, rank), like b1, a2 and b2 as in ``duplex_query_views``, and so are key_norm, normalize, eps and
            state.
        new_key: (B, Hkv, Nnew, D), the keys that ``state`` does not hold, Nq <= Nnew; by default ``key``.
        new_modality: (B, Nnew), their modalities; by default ``key_modality``.
        condition: broadcastable to (B, Hq, Nq, M), in the dtype of ``modality_bias``: the factor of the indicator; None
            is 0.

    Returns:
        As :func:`modular_attention`. Differentiable as the two functions are.

    Raises:
        ValueError, TypeError, NotImplementedError: as the two functions.

    Example:
        >>> query = torch.randn(1, 8, 6, 64)
        >>> key, value = torch.randn(1, 2, 6, 64), torch.randn(1, 2, 6, 64)
        >>> modality = torch.tensor([[0, 1, 1, 1, 0, 0]])
        >>> a, b = torch.randn(2, 64, 16), torch.randn(2, 16, 64)
        >>> duplex_attention(query, key, value, modality, modality, a, b, a, b).shape
        torch.Size([1, 8, 6, 64])
    """
    weights = (a1, b1, a2, b2)
    check_duplex("duplex_attention", key, new_key, new_modality, condition)
    new_names = ("key", "key_modality") if new_key is None else ("new_key", "new_modality")
    if new_key is None or new_modality is None:
        new_key, new_modality = key, key_modality
    alignment: GramOptions = {"key_norm": key_norm, "normalize": normalize, "eps": eps, "state": state}
    sums = state if isinstance(state, (tuple, list)) else ()
    op = "duplex_attention"
    chosen = backend.choose(op, query, key, value, new_key, *weights, *sums, modality_bias, condition, sink)
    query, key, value, new_key = autocast.cast_tokens(query, key, value, new_key)
    modality_bias, sink = autocast.cast_sums(query, modality_bias, sink)
    check_attention(query, key, value, key_modality, modality_bias, sink, num_modalities, True, scale, op)
    modalities = query_modality, new_modality, num_modalities
    check_causal(op, query, new_key, *modalities, key_norm, normalize, eps, state, *new_names)
    check_fuser(op, query, num_modalities, *weights)
    check_conditioned_bias(op, query, modality_bias, condition, num_modalities)
    with autocast.suspended(query):
        if chosen == backend.COMPOSED:
            of_views = query, new_key, query_modality, new_modality, weights, num_modalities
            if condition is None:
                views = query_views(*of_views, **alignment, return_indicator=False, return_state=False)
            else:
                views, indicator = query_views(*of_views, **alignment, return_indicator=True, return_state=False)
                conditioned = condition.to(indicator.dtype) * indicator
                modality_bias = conditioned if modality_bias is None else modality_bias + conditioned
            return attend(
                views,
                key,
                value,
                key_modality,
                num_modalities,
                modality_bias=modality_bias,
                sink=sink,
                is_causal=True,
                scale=scale,
                return_lse=return_lse,
                return_mass=return_mass,
            )

        rows = query.shape[:-1]
        scales, _ = row_scale(backend.NATIVE, query, new_key, *modalities, **alignment)
        out, lse, mass = operators.duplex_attention(
            query=last_contiguous(query),
            key=last_contiguous(key),
            value=last_contiguous(value),
            key_modality=as_int32(key_modality),
            new_key=last_contiguous(new_key),
            new_modality=as_int32(new_modality),
            row_scale=scales,
            **low_rank_weights(weights, scales.dtype),
            initial=None if state is None else state[0].contiguous(),
            modality_bias=expand(modality_bias, (*rows, num_modalities), query.dtype),
            condition=expand(condition, (*rows, num_modalities), query.dtype),
            sink=expand(sink, rows, query.dtype),
            num_modalities=num_modalities,
            unit_keys=key_norm == "l2",
            eps=float(eps),
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
        )
        return pack_results(out, lse, mass, return_lse, return_mass)


def check_duplex(
    op: str, key: Tensor, new_key: Tensor | None, new_modality: Tensor | None, condition: Tensor | None
) -> None:
    """Raise unless what ``duplex_attention`` has beside its two halves fits them."""
    if (new_key is None) != (new_modality is None):
        given, missing = ("new_modality", "new_key") if new_key is None else ("new_key", "new_modality")
        raise ValueError(f"{op}: {given} belongs to {missing}, which is None")
    if new_key is not None:
        for name, tensor in (("key", key), ("new_key", new_key)):
            checks.tensor(op, name, tensor)
            checks.rank(op, name, tensor, 4, "(B, Hkv, N, D)")
        if new_key.shape[1] != key.shape[1]:
            checks.mismatch(op, "new_key", "the number of heads of key", key.shape[1], new_key.shape[1])
    if condition is not None:
        checks.tensor(op, "condition", condition)
        checks.dtype(op, "condition", condition, FLOATS)


def check_conditioned_bias(
    op: str, query: Tensor, modality_bias: Tensor | None, condition: Tensor | None, num_modalities: int
) -> None:
    """Raise unless the indicator of this query can be scaled by ``condition`` and added to ``modality_bias``."""
    for name, tensor in (("modality_bias", modality_bias), ("condition", condition)):
        if tensor is not None:
            checks.tensor(op, name, tensor)
            checks.device(op, name, tensor, query)
            checks.broadcastable(op, name, tensor, (*query.shape[:3], num_modalities), "(B, Hq, Nq, M)")
