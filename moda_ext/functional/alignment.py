"""Duplex attention alignment: the Gram matrix of every modality's keys, and queries seen through it.

Each function checks its arguments, brings them to the form of the operators and calls the operator, or
:mod:`moda_ext.reference` where there are no kernels. Source: MODA, ICML 2025 (arXiv 2507.04635), Eq. 5-6.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moda_ext import reference
from moda_ext._ops import autocast, backend, operators
from moda_ext._ops.limits import FLOATS, KEY_NORMS, MAX_RANK, NORMALIZATIONS, accumulation_dtype
from moda_ext.functional import checks, composite
from moda_ext.functional.attention import Results, as_int32, last_contiguous
from moda_ext.functional.gram import (
    GramOptions,
    causal_gram_scale,
    frobenius_scale,
    key_features,
    normalize_gram,
    project,
)


def modality_gram(
    key: Tensor,
    modality: Tensor,
    num_modalities: int = 2,
    *,
    include: Tensor | None = None,
    key_norm: str | None = "l2",
    normalize: str | None = "trace",
    eps: float = 1e-6,
) -> Tensor:
    r"""The normalised Gram matrix of every modality over its keys (Eq. 5).

    .. math::
        G^m = \sum_{j: a_j = m} \varphi(k_j)^\top \varphi(k_j), \qquad \hat G^m = G^m / \lVert G^m \rVert

    with :math:`\varphi(k) = k / \max(\lVert k \rVert_2, \text{eps})` or :math:`\varphi(k) = k`. A modality without a
    token has :math:`\hat G^m = 0`.

    Args:
        key: (B, Hkv, N, D), float32, float64, bfloat16 or float16; D is a multiple of 8 from 8 to 256. Any strides.
        modality: (B, N), any integer dtype. The modality of each token in [0, M), or -1 for padding, which is left out
            whatever it holds.
        num_modalities: M, 1 to 16.
        include: (B, N) boolean, True for the tokens that count (``scope="context"``), by default all.
        key_norm: "l2" for unit keys, or None for the keys as they are.
        normalize: "trace" (with unit keys: the uncentred covariance; its eigenvalues sum to 1), "frobenius", "row"
            (every row by its L2 norm, what the authors' release does), or None for the raw sum.
        eps: the least norm that a key is divided by, above 0.

    Returns:
        (B, Hkv, M, D, D), float64 for float64 keys, else float32. Differentiable in ``key`` (once;
        :mod:`moda_ext.reference` has higher derivatives).

    Raises:
        ValueError: a shape, size or option does not fit, or (on the CPU) an id is outside [-1, M).
        TypeError: an argument is not a tensor, or has the wrong dtype.
        NotImplementedError: no kernel for this head size or device; the message says what would work.

    Under autocast the key is cast to the autocast dtype.

    Example:
        >>> key = torch.randn(1, 2, 6, 64)
        >>> modality = torch.tensor([[0, 1, 1, 1, 0, 0]])  # text, three image patches, text
        >>> gram = modality_gram(key, modality)
        >>> gram.shape
        torch.Size([1, 2, 2, 64, 64])
        >>> torch.allclose(gram.diagonal(dim1=-2, dim2=-1).sum(-1), torch.ones(1, 2, 2))
        True
    """
    op = "modality_gram"
    (key,) = autocast.cast_tokens(key)
    check_gram(op, key, modality, num_modalities, include, key_norm, normalize, eps)
    with autocast.suspended(key):
        chosen = backend.choose(op, key, name="key")
        if chosen == backend.REFERENCE:
            return reference.modality_gram(
                key, modality, num_modalities, include=include, key_norm=key_norm, normalize=normalize, eps=eps
            )
        modality = as_int32(modality)
        if include is not None:
            modality = modality.masked_fill(~include, -1)
        gram = _implementation(op, chosen)(
            key=last_contiguous(key),
            modality=modality,
            num_modalities=num_modalities,
            unit_keys=key_norm == "l2",
            eps=float(eps),
        )
        return normalize_gram(gram, normalize)


def project_queries(query: Tensor, gram: Tensor) -> Tensor:
    r"""Queries seen through every modality's Gram matrix, :math:`q\, \hat G^{m\top}`: one plain product.

    Args:
        query: (B, Hq, Nq, D), floating point.
        gram: (B, Hkv, M, D, D), as :func:`modality_gram` returns it; Hq is a multiple of Hkv: query head h meets the
            Gram of key head h // (Hq / Hkv).

    Returns:
        (M, B, Hq, Nq, D) in the dtype of ``query``, computed in the dtype of ``gram``. Differentiable.

    Raises:
        ValueError: the shapes or devices do not fit.
        TypeError: an argument is not a tensor, or not of a floating-point dtype.

    Example:
        >>> gram = modality_gram(torch.randn(1, 2, 6, 64), torch.tensor([[0, 1, 1, 1, 0, 0]]))
        >>> project_queries(torch.randn(1, 8, 3, 64), gram).shape
        torch.Size([2, 1, 8, 3, 64])
    """
    check_projected("project_queries", query, gram)
    with autocast.suspended(query):
        return project(query, gram)


def causal_gram_projection(
    query: Tensor,
    key: Tensor,
    query_modality: Tensor,
    key_modality: Tensor,
    num_modalities: int = 2,
    *,
    key_norm: str | None = "l2",
    normalize: str | None = "trace",
    eps: float = 1e-6,
    state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
) -> Results:
    r"""Each query through the Gram matrices of the tokens up to it: alignment that leaks nothing
    (docs/mathematics.md section 1).

    .. math::
        o_{i,m} = q_i \hat G^m_{\le i} = s_{i,m} \Big( q_i G^m_0
            + \sum_{j \le i,\, a_j = m} (q_i \cdot \varphi_j)\, \varphi_j \Big)

    a causal linear attention whose values are its keys, chunk by chunk, in O(N D^2) time and O(N) memory. Changing
    token j changes no row before j, to the bit.

    Args:
        query: (B, Hq, Nq, D). float32, float64, bfloat16 or float16; D is a multiple of 8 from 8 to 256.
        key: (B, Hkv, Nk, D), dtype and device of ``query``; Hq is a multiple of Hkv. The queries are the last Nq of the
            Nk tokens: row i sees the keys j <= i + Nk - Nq.
        query_modality: (B, Nq), integer. A padded row (-1) gets 0, whatever finite numbers it holds.
        key_modality: (B, Nk), integer, in [0, M), or -1 for padding, which nobody sees.
        num_modalities: M, 1 to 16.
        key_norm: "l2" for unit keys, or None.
        normalize: "trace", "frobenius", or None for the raw sums; "row" is not one number for a row and modality.
        eps: the least norm that a key is divided by, above 0.
        state: what came before the first key, as ``return_state`` gives it: the pair of the raw Gram (B, Hkv, M, D, D),
            symmetric, and its trace (B, Hkv, M), in float32, or float64 for float64 inputs.
        return_state: also return the state after the last key.

    Returns:
        (M, B, Hq, Nq, D) in the dtype of ``query``, or with ``return_state`` the pair of it and the state.
        Differentiable (once) in ``query``, ``key`` and ``state``.

    Raises:
        ValueError: a shape, size or option does not fit, or (on the CPU) an id is outside [-1, M).
        TypeError: an argument is not a tensor, or has the wrong dtype.
        NotImplementedError: no kernel for this head size or device; the message says what would work.

    Under autocast, query and key are cast to the autocast dtype.

    Example:
        >>> query, key = torch.randn(1, 8, 6, 64), torch.randn(1, 2, 6, 64)
        >>> modality = torch.tensor([[0, 1, 1, 1, 0, 0]])
        >>> whole = causal_gram_projection(query, key, modality, modality)
        >>> first, state = causal_gram_projection(
        ...     query[:, :, :4], key[:, :, :4], modality[:, :4], modality[:, :4], return_state=True
        ... )
        >>> rest = causal_gram_projection(query[:, :, 4:], key[:, :, 4:], modality[:, 4:], modality[:, 4:], state=state)
        >>> torch.allclose(torch.cat([first, rest], dim=3), whole, atol=1e-5)
        True
    """
    op = "causal_gram_projection"
    query, key = autocast.cast_tokens(query, key)
    check_causal(op, query, key, query_modality, key_modality, num_modalities, key_norm, normalize, eps, state)
    options: GramOptions = {"key_norm": key_norm, "normalize": normalize, "eps": eps, "state": state}
    with autocast.suspended(query):
        chosen = backend.choose(op, query)
        if chosen == backend.REFERENCE:
            return reference.causal_gram_projection(
                query, key, query_modality, key_modality, num_modalities, **options, return_state=return_state
            )
        scale, trace = row_scale(chosen, query, key, query_modality, key_modality, num_modalities, **options)
        projection, gram = _implementation(op, chosen)(
            query=last_contiguous(query),
            key=last_contiguous(key),
            key_modality=as_int32(key_modality),
            row_scale=scale,
            initial=None if state is None else state[0].contiguous(),
            num_modalities=num_modalities,
            unit_keys=key_norm == "l2",
            eps=float(eps),
        )
        return (projection, (gram, trace)) if return_state else projection


def duplex_query_views(
    query: Tensor,
    key: Tensor,
    query_modality: Tensor,
    key_modality: Tensor,
    a1: Tensor,
    b1: Tensor,
    a2: Tensor,
    b2: Tensor,
    num_modalities: int = 2,
    *,
    key_norm: str | None = "l2",
    normalize: str | None = "trace",
    eps: float = 1e-6,
    state: tuple[Tensor, Tensor] | None = None,
    return_indicator: bool = False,
    return_state: bool = False,
) -> Results:
    r"""The query views of :class:`DuplexAligner` with ``fusion="concat"`` and ``scope="causal"``, in one fused step.

    View a is the query as keys of modality a meet it (Eq. 6, moved to the query; docs/mathematics.md section 1):

    .. math::
        q^{(a)}_i = q_i W_{1,a}^\top + \sum_{m \ne a} q_i W_{2,a}^\top \hat G^m_{\le i}, \qquad
        W_{1,a} = I + A_{1,a} B_{1,a}, \quad W_{2,a} = A_{2,a} B_{2,a}

    and the indicator, which conditions the modular mask, is how much of a query lies in modality m's space:

    .. math:: e_{i,m} = q_i \hat G^m_{\le i} q_i^\top / \lVert q_i \rVert^2

    The rank makes it cheap: a chunk's state enters the views as a rank x D matrix. With B1 = B2 = 0 every view is the
    query, bit for bit.

    Args:
        query: (B, Hq, Nq, D), as in :func:`causal_gram_projection`, and so are key, query_modality, key_modality,
            num_modalities, key_norm, normalize, eps and state.
        a1: (M, D, rank), floating point, like b1 (M, rank, D), a2 (M, D, rank) and b2 (M, rank, D): the weights of each
            view, shared by the heads. rank 1 to 128. They are used in float32 (float64 for float64 inputs).
        return_indicator: also return the indicator.
        return_state: also return the state after the last key.

    Returns:
        The views (M, B, Hq, Nq, D) in the dtype of ``query``, or the tuple ``(views[, indicator][, state])`` of what
        was asked for; the indicator (B, Hq, Nq, M) in float32, or float64 for float64 inputs. A padded row has
        indicator 0 and views q W1^T. Differentiable (once) in query, key, the weights and the state.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`causal_gram_projection`.

    Example:
        >>> query, key = torch.randn(1, 8, 6, 64), torch.randn(1, 2, 6, 64)
        >>> modality = torch.tensor([[0, 1, 1, 1, 0, 0]])
        >>> a, b = torch.randn(2, 64, 16), torch.zeros(2, 16, 64)
        >>> views, indicator = duplex_query_views(query, key, modality, modality, a, b, a, b, return_indicator=True)
        >>> torch.equal(views[0], query), indicator.shape
        (True, torch.Size([1, 8, 6, 2]))
    """
    op = "duplex_query_views"
    query, key = autocast.cast_tokens(query, key)
    check_causal(op, query, key, query_modality, key_modality, num_modalities, key_norm, normalize, eps, state)
    check_fuser(op, query, num_modalities, a1, b1, a2, b2)
    with autocast.suspended(query):
        return query_views(
            query,
            key,
            query_modality,
            key_modality,
            (a1, b1, a2, b2),
            num_modalities,
            key_norm=key_norm,
            normalize=normalize,
            eps=eps,
            state=state,
            return_indicator=return_indicator,
            return_state=return_state,
        )


def gram_indicator(query: Tensor, gram_projection: Tensor) -> Tensor:
    r"""How much of each query lies in each modality's space: the indicator that conditions the mask (Fig. 3c).

    .. math:: e_{i,m} = \frac{q_i \hat G^m_i q_i^\top}{\lVert q_i \rVert^2}

    Args:
        query: (B, Hq, N, D), any floating-point dtype.
        gram_projection: (M, B, Hq, N, D), :math:`q_i \hat G^m_i`, from :func:`project_queries` or
            :func:`causal_gram_projection`.

    Returns:
        (B, Hq, N, M) in float32, or float64 for a float64 query; between 0 and 1 for the ``trace`` and ``frobenius``
        normalisations. A query of length 0 has indicator 0.
    """
    dtype = accumulation_dtype(query.dtype)
    query = query.to(dtype)
    square = query.square().sum(dim=-1)
    dots = (gram_projection.to(dtype) * query).sum(dim=-1)  # (M, B, Hq, N)
    return (dots / square.clamp(min=torch.finfo(dtype).tiny)).movedim(0, -1)


def query_views(
    query: Tensor,
    key: Tensor,
    query_modality: Tensor,
    key_modality: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    num_modalities: int,
    *,
    key_norm: str | None,
    normalize: str | None,
    eps: float,
    state: tuple[Tensor, Tensor] | None,
    return_indicator: bool,
    return_state: bool,
) -> Results:
    """:func:`duplex_query_views` of arguments that are checked, and cast for autocast."""
    op = "duplex_query_views"
    options: GramOptions = {"key_norm": key_norm, "normalize": normalize, "eps": eps, "state": state}
    chosen = backend.choose(op, query)
    if chosen == backend.REFERENCE:
        tokens = (query, key, query_modality, key_modality)
        return reference.duplex_query_views(
            *tokens, *weights, num_modalities, **options, return_indicator=return_indicator, return_state=return_state
        )
    scale, trace = row_scale(chosen, query, key, query_modality, key_modality, num_modalities, **options)
    views, square, gram = _implementation(op, chosen)(
        query=last_contiguous(query),
        key=last_contiguous(key),
        key_modality=as_int32(key_modality),
        row_scale=scale,
        **low_rank_weights(weights, scale.dtype),
        initial=None if state is None else state[0].contiguous(),
        num_modalities=num_modalities,
        unit_keys=key_norm == "l2",
        eps=float(eps),
        with_indicator=return_indicator,
        with_gram=return_state,
    )
    results: list[Tensor | tuple[Tensor, Tensor]] = [views]
    if return_indicator:
        per_group = (key.shape[1], query.shape[1] // key.shape[1])
        scaled = square.unflatten(1, per_group) * scale.unsqueeze(2)
        results.append(torch.cat(scaled.unbind(1), dim=1))  # flatten(1, 2), which torch 2.11 cannot export
    if return_state:
        results.append((gram, trace))
    return views if len(results) == 1 else tuple(results)


def low_rank_weights(weights: tuple[Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments a1, b1, a2 and b2 of an operator."""
    names = ("a1", "b1", "a2", "b2")
    return {name: weight.to(dtype).contiguous() for name, weight in zip(names, weights, strict=True)}


def row_scale(
    chosen: str,
    query: Tensor,
    key: Tensor,
    query_modality: Tensor,
    key_modality: Tensor,
    num_modalities: int,
    *,
    key_norm: str | None,
    normalize: str | None,
    eps: float,
    state: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """(B, Hkv, Nq, M), what the raw causal Gram of each row is multiplied with, and the trace after the last key."""
    scale, trace = causal_gram_scale(key, query_modality, key_modality, num_modalities, key_norm, normalize, eps, state)
    if normalize != "frobenius":
        return scale, trace
    # ||G_i||^2 = ||G_{i-1}||^2 + 2 phi_i G_i phi_i^T - |phi_i|^4: the raw projection of the keys themselves.
    features = last_contiguous(key_features(key, key_modality, key_norm, eps))
    ones = scale.new_ones((*key.shape[:3], num_modalities))
    ids = as_int32(key_modality)
    initial = None if state is None else state[0].contiguous()
    projection, _ = _implementation("causal_gram_projection", chosen)(
        query=features,
        key=features,
        key_modality=ids,
        row_scale=ones,
        initial=initial,
        num_modalities=num_modalities,
        unit_keys=False,
        eps=1.0,
    )
    forms = (projection * features).sum(-1).movedim(0, -1)  # (B, Hkv, Nk, M)
    growth = 2 * forms - features.square().sum(-1).square()[..., None]
    members = key_modality[:, None, :, None] == torch.arange(num_modalities, device=key.device)
    square = torch.where(members, growth, 0.0).cumsum(dim=2)
    if state is not None:
        square = square + state[0].square().sum((-2, -1))[:, :, None]
    return frobenius_scale(square[:, :, key.shape[2] - query.shape[2] :], scale), trace


def _implementation(op: str, chosen: str) -> Callable:
    """The operator, or what PyTorch's own make of it."""
    return getattr(composite if chosen == backend.COMPOSITE else operators, op)


def check_gram(
    op: str,
    key: Tensor,
    modality: Tensor,
    num_modalities: int,
    include: Tensor | None,
    key_norm: str | None,
    normalize: str | None,
    eps: float,
    key_name: str = "key",
    modality_name: str = "modality",
) -> None:
    """Raise unless ``modality_gram`` can run these arguments (after the autocast conversion)."""
    checks.num_modalities(op, num_modalities)
    checks.choice(op, "key_norm", key_norm, KEY_NORMS)
    checks.choice(op, "normalize", normalize, (*NORMALIZATIONS, None))
    checks.positive(op, "eps", eps)
    checks.tensor(op, key_name, key)
    checks.dtype(op, key_name, key, FLOATS)
    checks.rank(op, key_name, key, 4, "(B, Hkv, N, D)")
    checks.head_size(op, key_name, key.shape[-1])
    batch, _, tokens, _ = key.shape
    checks.token_ids(op, modality_name, modality, key, key_name, "(B, N)")
    if include is not None:
        checks.tensor(op, "include", include)
        checks.dtype(op, "include", include, (torch.bool,))
        checks.device(op, "include", include, key, "key")
        checks.shape(op, "include", include, (batch, tokens), "(B, N)")


def check_projected(op: str, query: Tensor, gram: Tensor) -> None:
    """Raise unless ``project_queries`` can run these arguments."""
    for name, tensor in (("query", query), ("gram", gram)):
        checks.tensor(op, name, tensor)
        checks.dtype(op, name, tensor, FLOATS)
    checks.device(op, "gram", gram, query)
    checks.rank(op, "query", query, 4, "(B, Hq, Nq, D)")
    checks.rank(op, "gram", gram, 5, "(B, Hkv, M, D, D)")
    checks.multiple_of(op, query.shape[1], gram.shape[1], "gram")
    expected = (query.shape[0], *gram.shape[1:3], query.shape[3], query.shape[3])
    if gram.shape != expected:
        checks.mismatch(op, "gram", "the batch and head size of query, (B, Hkv, M, D, D)", expected, tuple(gram.shape))


def check_causal(
    op: str,
    query: Tensor,
    key: Tensor,
    query_modality: Tensor,
    key_modality: Tensor,
    num_modalities: int,
    key_norm: str | None,
    normalize: str | None,
    eps: float,
    state: tuple[Tensor, Tensor] | None,
    key_name: str = "key",
    modality_name: str = "key_modality",
) -> None:
    """Raise unless ``causal_gram_projection`` can run these arguments (after the autocast conversion)."""
    checks.tensor(op, "query", query)
    checks.dtype(op, "query", query, FLOATS)
    check_gram(op, key, key_modality, num_modalities, None, key_norm, normalize, eps, key_name, modality_name)
    if normalize == "row":
        raise ValueError(
            f"{op}: normalize='row' has no causal form, one number for each row and modality; expected 'trace', "
            "'frobenius' or None"
        )
    if key.dtype != query.dtype:
        raise TypeError(f"{op}: {key_name} must have the dtype of query ({query.dtype}), got {key.dtype}")
    checks.device(op, key_name, key, query)
    checks.rank(op, "query", query, 4, "(B, Hq, Nq, D)")
    batch, heads, rows, head_size = query.shape
    kv_heads, columns = key.shape[1:3]
    if key.shape[0] != batch:
        checks.mismatch(op, key_name, "the batch size of query", batch, key.shape[0])
    if key.shape[-1] != head_size:
        checks.mismatch(op, key_name, "the head size of query", head_size, key.shape[-1])
    checks.multiple_of(op, heads, kv_heads, key_name)
    if rows > columns:
        raise ValueError(
            f"{op}: query must have at most as many tokens as {key_name}, of which it is the last, got {rows} and "
            f"{columns}"
        )
    checks.token_ids(op, "query_modality", query_modality, query, "query", "(B, Nq)")
    checks.ids(op, "query_modality", query_modality, num_modalities)
    if state is None:
        return
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"{op}: state must be a pair (gram, trace) of tensors, got {type(state).__name__}")
    shape = (batch, kv_heads, num_modalities)
    for name, tensor, expected in (
        ("state[0] (gram)", state[0], (*shape, head_size, head_size)),
        ("state[1] (trace)", state[1], shape),
    ):
        checks.tensor(op, name, tensor)
        checks.dtype(op, name, tensor, (accumulation_dtype(key.dtype),))
        checks.device(op, name, tensor, query)
        checks.shape(op, name, tensor, expected, "(B, Hkv, M, ...)")


def check_fuser(op: str, query: Tensor, num_modalities: int, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> None:
    """Raise unless these are low-rank weights for the views of ``query``."""
    checks.tensor(op, "a1", a1)
    checks.rank(op, "a1", a1, 3, "(M, D, rank)")
    rank, head_size = a1.shape[-1], query.shape[-1]
    if rank < 1:
        checks.mismatch(op, "a1", "a rank of at least 1", "(M, D, rank)", tuple(a1.shape))
    if rank > MAX_RANK:
        raise NotImplementedError(
            f"{op}: a1 has rank {rank}, but the kernels take ranks up to {MAX_RANK}; call moda_ext.reference.{op}, "
            "which takes any"
        )
    for name, weight, expected in (
        ("a1", a1, (num_modalities, head_size, rank)),
        ("b1", b1, (num_modalities, rank, head_size)),
        ("a2", a2, (num_modalities, head_size, rank)),
        ("b2", b2, (num_modalities, rank, head_size)),
    ):
        checks.tensor(op, name, weight)
        checks.dtype(op, name, weight, FLOATS)
        checks.device(op, name, weight, query)
        checks.shape(op, name, weight, expected, "(M, D, rank)" if name in ("a1", "a2") else "(M, rank, D)")
