"""Duplex attention alignment as a module. Public in ``moda_ext.alignment``."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda_ext._ops import autocast, backend, operators
from moda_ext._ops.limits import KEY_NORMS, MAX_MODALITIES, MAX_RANK, NORMALIZATIONS, accumulation_dtype
from moda_ext.functional.alignment import (
    causal_gram_projection,
    check_fuser,
    check_gram,
    duplex_query_views,
    gram_indicator,
    low_rank_weights,
    modality_gram,
    project_queries,
)
from moda_ext.functional.attention import as_int32, last_contiguous
from moda_ext.functional.gram import GramOptions, normalize_gram
from moda_ext.nn.states import GramState

__all__ = ["DuplexAligner"]


FUSIONS = ("concat", "add")
SCOPES = ("causal", "context", "full")


class DuplexAligner(nn.Module):
    r"""Duplex attention alignment: every key mapped into the spaces of the other modalities, as views of the query.

    A key of modality a becomes, with :math:`\hat G^m` the normalised Gram matrix of modality m,

    .. math::
        u_j = \sum_{m \ne a_j} k_j \hat G^m, \qquad
        k'_j = \begin{cases}
            k_j (I + A^1_a B^1_a) + u_j A^2_a B^2_a & \text{fusion="concat"} \\
            (k_j + r_a \odot u_j)(I + A^1_a B^1_a) & \text{fusion="add"}
        \end{cases}

    which, linear in k as it is, moves to the query: :math:`q_i \cdot k'_j = q_i^{(a_j)} \cdot k_j`. The result is one
    view of the query for every key modality, the 5-dimensional ``query`` of
    :func:`moda_ext.attention.modular_attention`; keys and the key cache stay as they are. B and r start at 0: a new
    aligner returns the query itself, bit for bit. The weights are shared by all heads. Source: MODA (arXiv 2507.04635),
    section 3.3, Eq. 5-6, Table 1(b) and 1(c).

    Args:
        head_dim: D.
        num_modalities: M, 1 to 16.
        fusion: ``"concat"`` (the best row of Table 1(c)) or ``"add"``.
        rank: r of A (M, D, r) and B (M, r, D), at least 1.
        scope: which tokens a Gram is made of:

            - ``"causal"``: for query i the tokens up to i, so nothing leaks from the future;
            - ``"context"``: those of the mask ``include`` (the prompt), for all queries and for all of decoding;
            - ``"full"``: all tokens (Eq. 5 as printed). Not for causal language models: the Gram holds the answer.
        key_norm: ``"l2"``, keys of unit length, or None, keys as they are.
        normalize: ``"trace"`` (the "+CoV" row of Table 1(b)), ``"frobenius"``, or ``"row"`` (not in causal scope).

    Raises:
        ValueError: an unknown option, or a size that does not fit.

    Example:
        >>> aligner = DuplexAligner(64)
        >>> query, key = torch.randn(1, 8, 6, 64), torch.randn(1, 2, 6, 64)
        >>> modality = torch.tensor([[0, 1, 1, 1, 0, 0]])
        >>> views = aligner(query, key, modality, modality)
        >>> views.shape, torch.equal(views[0], query)
        (torch.Size([2, 1, 8, 6, 64]), True)
    """

    def __init__(
        self,
        head_dim: int,
        num_modalities: int = 2,
        *,
        fusion: str = "concat",
        rank: int = 16,
        scope: str = "causal",
        key_norm: str | None = "l2",
        normalize: str = "trace",
    ):
        super().__init__()
        if head_dim < 1:
            raise ValueError(f"DuplexAligner: head_dim must be at least 1, got {head_dim}")
        if not 1 <= num_modalities <= MAX_MODALITIES:
            raise ValueError(f"DuplexAligner: num_modalities must lie in 1 to {MAX_MODALITIES}, got {num_modalities}")
        if rank < 1:
            raise ValueError(f"DuplexAligner: rank must be at least 1, got {rank}")
        for name, value, allowed in (
            ("fusion", fusion, FUSIONS),
            ("scope", scope, SCOPES),
            ("key_norm", key_norm, KEY_NORMS),
            ("normalize", normalize, NORMALIZATIONS),
        ):
            if value not in allowed:
                raise ValueError(f"DuplexAligner: {name} must be one of {allowed}, got {value!r}")
        if scope == "causal" and normalize == "row":
            raise ValueError(
                "DuplexAligner: normalize='row' has no causal form (its norm is a vector for every query); "
                "use 'trace' or 'frobenius', or another scope"
            )
        self.head_dim, self.num_modalities = head_dim, num_modalities
        self.fusion, self.scope, self.key_norm, self.normalize = fusion, scope, key_norm, normalize
        self.a1 = nn.Parameter(torch.empty(num_modalities, head_dim, rank))
        self.b1 = nn.Parameter(torch.empty(num_modalities, rank, head_dim))
        if fusion == "concat":
            self.a2 = nn.Parameter(torch.empty(num_modalities, head_dim, rank))
            self.b2 = nn.Parameter(torch.empty(num_modalities, rank, head_dim))
        else:
            self.ratio = nn.Parameter(torch.empty(num_modalities, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the identity: A random, B and ratio 0."""
        for name, parameter in self.named_parameters():
            if name in ("a1", "a2"):
                nn.init.normal_(parameter, std=self.head_dim**-0.5)
            else:
                nn.init.zeros_(parameter)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        query_modality: Tensor,
        key_modality: Tensor,
        state: GramState | None = None,
        *,
        include: Tensor | None = None,
        return_indicator: bool = False,
        return_state: bool = False,
        read: Callable | None = None,
    ) -> Tensor | tuple[Tensor | GramState, ...]:
        """The views of the query.

        Args:
            query: (B, Hq, Nq, D), float32, float64, bfloat16 or float16; D as the operators take it.
            key: (B, Hkv, Nk, D), dtype of ``query``, as attention sees them (after RoPE), without those that ``state``
                holds already. In causal scope query and key are the same new tokens (or Nq <= Nk, aligned at the bottom
                right).
            query_modality, key_modality: (B, Nq) and (B, Nk), integer, in [0, M), -1 for padding.
            state: the tokens before, from the call before. Not in full scope.
            include: (B, Nk), boolean: the context. In context scope, and there in the first call only.
            return_indicator: also return how much of a query lies in each modality's space, see
                :func:`moda_ext.alignment.gram_indicator`.
            return_state: also return the state for the call after this one.
            read: for the other methods: is called instead, and its result returned. Parameters are sure to be there in
                a forward pass only, where offloading and sharding bring them.

        Returns:
            ``views`` (M, B, Hq, Nq, D) in the dtype of ``query``, or the tuple ``(views[, indicator][, state])`` of
            what was asked for, with ``indicator`` (B, Hq, Nq, M) in float32 or float64. Differentiable in everything.

        Raises:
            ValueError: ``state`` or ``include`` in a scope that has none, or shapes that do not fit.
            TypeError, NotImplementedError: as :func:`moda_ext.alignment.duplex_query_views`.
        """
        self.check(query, key, state, include, return_state)
        if read is not None:
            return read()
        if self.scope == "causal":
            results = self._causal(query, key, query_modality, key_modality, state, return_indicator)
        else:
            if state is None:
                state = GramState.from_keys(
                    key, key_modality, self.num_modalities, include=include, key_norm=self.key_norm, window=None
                )
            results = self.fixed_views(query, normalize_gram(state.gram, self.normalize), return_indicator)
        if return_state:
            return (*results, self.state_after(key, key_modality, state))
        return results[0] if len(results) == 1 else results

    def state_after(self, key: Tensor, key_modality: Tensor, state: GramState | None = None) -> GramState:
        """The state after ``state`` and more tokens: key (B, Hkv, N, D), modality (B, N)."""
        if state is not None:
            return state.append(key, key_modality)
        return GramState.from_keys(key, key_modality, self.num_modalities, key_norm=self.key_norm)

    def align_keys(self, key: Tensor, modality: Tensor, include: Tensor | None = None) -> Tensor:
        """The other side of the same scores: the aligned keys k', for full and context scope.

        ``query @ align_keys(key, ...)`` equals the views times ``key``; the keys must then be aligned before they are
        cached. On the CPU, with ``fusion="concat"``, outside autocast and where no gradient is asked for
        (``torch.no_grad``), it is one fused operator, for two modalities several times as fast.

        Args:
            key: (B, Hkv, N, D).
            modality: (B, N), integer. Padding is left as it is.
            include: (B, N), boolean, in context scope.

        Returns:
            (B, Hkv, N, D) in the dtype of ``key``.

        Raises:
            ValueError: causal scope, where a key looks different to every query.
        """
        if self.scope == "causal":
            raise ValueError("DuplexAligner: align_keys has no causal form (a key would differ from query to query)")
        read = functools.partial(self._aligned, key, modality, include)
        return self(key, key, modality, modality, include=include, read=read)

    def _aligned(self, key: Tensor, modality: Tensor, include: Tensor | None) -> Tensor:
        options = self.key_norm, self.normalize, 1e-6
        check_gram("DuplexAligner.align_keys", key, modality, self.num_modalities, include, *options)
        if self._aligns_in_one_step(key):
            return self._align_in_one_step(key, modality, include)
        gram = modality_gram(
            key, modality, self.num_modalities, include=include, key_norm=self.key_norm, normalize=self.normalize
        )
        upcast = torch.where((modality >= 0)[:, None, :, None], key.to(gram.dtype), 0.0)  # padding may hold anything
        down, up = self._factors(self._others(gram))
        # The products of all modalities in one, of which each key keeps those of its own.
        members = modality[..., None] == torch.arange(self.num_modalities, device=modality.device)
        low_rank = (upcast @ down.movedim(0, 3).flatten(3)).unflatten(3, (self.num_modalities, -1))
        low_rank = torch.where(members[:, None, :, :, None], low_rank, 0.0)
        return (key + low_rank.flatten(3) @ up.flatten(0, 1)).to(key.dtype)

    def _aligns_in_one_step(self, key: Tensor) -> bool:
        """Whether the fused operator takes these keys."""
        if self.fusion != "concat" or self.a1.shape[-1] > MAX_RANK:
            return False
        if autocast.cast_tokens(key)[0] is not key:  # which is for the products; the sum stays as accurate as key
            return False
        return backend.choose("duplex_aligned_keys", key, *self.parameters(), name="key") == backend.NATIVE

    def _align_in_one_step(self, key: Tensor, modality: Tensor, include: Tensor | None) -> Tensor:
        weights, eps = (self.a1, self.b1, self.a2, self.b2), 1e-6
        check_fuser("DuplexAligner.align_keys", key, self.num_modalities, *weights)
        return operators.duplex_aligned_keys(
            key=last_contiguous(key),
            modality=as_int32(modality),
            include=include,
            **low_rank_weights(weights, accumulation_dtype(key.dtype)),
            num_modalities=self.num_modalities,
            unit_keys=self.key_norm == "l2",
            eps=eps,
            normalization=NORMALIZATIONS.index(self.normalize),
        )

    def _factors(self, others: Tensor) -> tuple[Tensor, Tensor]:
        """down (M, B, Hkv, D, R) and up (M, R, D): a key k of modality a becomes k + k down_a up_a."""
        a1, b1 = self.a1.to(others.dtype)[:, None, None], self.b1.to(others.dtype)
        if self.fusion == "concat":
            down = torch.cat(
                [a1.expand(*others.shape[:-1], -1), others @ self.a2.to(others.dtype)[:, None, None]], dim=-1
            )
            return down, torch.cat([b1, self.b2.to(others.dtype)], dim=1)
        gated = others * self.ratio.to(others.dtype)[:, None, None, None]
        identity = torch.eye(self.head_dim, dtype=others.dtype, device=others.device)
        return torch.cat([gated, a1 + gated @ a1], dim=-1), torch.cat([identity.expand(len(b1), -1, -1), b1], dim=1)

    def low_rank(self) -> dict[str, Tensor]:
        """The weights a1, b1, a2, b2 of an aligner with ``fusion="concat"`` that computes what this one does, as
        :func:`moda_ext.attention.duplex_attention` takes them: k' = k (I + a1 b1) + u a2 b2. For ``"add"`` their rank
        is at least D, as a2 b2 = diag(r) (I + a1 b1).
        """
        if self.fusion == "concat":
            return {"a1": self.a1, "b1": self.b1, "a2": self.a2, "b2": self.b2}
        identity = torch.eye(self.head_dim, dtype=self.a1.dtype, device=self.a1.device)
        missing = self.head_dim - self.a1.shape[-1]  # one rank for both products
        a1, b1 = F.pad(self.a1, (0, max(0, missing))), F.pad(self.b1, (0, 0, 0, max(0, missing)))
        a2, b2 = torch.diag_embed(self.ratio), identity + self.a1 @ self.b1
        return {
            "a1": a1,
            "b1": b1,
            "a2": F.pad(a2, (0, max(0, -missing))),
            "b2": F.pad(b2, (0, 0, 0, max(0, -missing))),
        }

    def extra_repr(self) -> str:
        return (
            f"{self.head_dim}, {self.num_modalities}, fusion={self.fusion!r}, rank={self.a1.shape[-1]}, "
            f"scope={self.scope!r}, key_norm={self.key_norm!r}, normalize={self.normalize!r}"
        )

    def _causal(
        self,
        query: Tensor,
        key: Tensor,
        query_modality: Tensor,
        key_modality: Tensor,
        state: GramState | None,
        return_indicator: bool,
    ) -> tuple[Tensor, ...]:
        keywords: GramOptions = {"key_norm": self.key_norm, "normalize": self.normalize}
        if state is not None:
            key, key_modality = state.with_recent(key, key_modality)
            keywords["state"] = state.gram, state.trace
        modalities = query_modality, key_modality
        if self.fusion == "concat":
            weights = self.a1, self.b1, self.a2, self.b2
            arguments = query, key, *modalities, *weights, self.num_modalities
            results = duplex_query_views(*arguments, return_indicator=return_indicator, **keywords)
            return tuple(results) if return_indicator else (results,)

        dtype = accumulation_dtype(query.dtype)
        upcast = query.to(dtype)
        # view_a = q + q own_a + sum_{m != a} q cross_a (Ghat^m)^T
        own = (self.a1.to(dtype) @ self.b1.to(dtype)).mT
        cross = (torch.eye(self.head_dim, dtype=dtype, device=own.device) + own) * self.ratio.to(dtype)[:, None]
        asked = [upcast @ cross[a] for a in range(self.num_modalities)] + [upcast] * return_indicator
        # As many more query heads of the same group, so that one pass over the keys serves all of them.
        group = query.shape[1] // key.shape[1]
        heads = torch.stack([t.unflatten(1, (-1, group)) for t in asked], dim=2)  # (B, Hkv, asked, group, Nq, D)
        projection = causal_gram_projection(
            heads.flatten(1, 3), key.to(dtype), *modalities, self.num_modalities, **keywords
        )
        projection = projection.unflatten(2, heads.shape[1:4]).movedim(3, 0).flatten(3, 4)  # (asked, M, B, Hq, Nq, D)
        each = []
        for a in range(self.num_modalities):
            others = [projection[a, m] for m in range(self.num_modalities) if m != a]
            each.append(sum(others, start=upcast + upcast @ own[a]))
        views = torch.stack(each).to(query.dtype)
        return (views, gram_indicator(query, projection[-1])) if return_indicator else (views,)

    def fixed_views(self, query: Tensor, gram: Tensor, return_indicator: bool) -> tuple[Tensor, ...]:
        """Views, and the indicator, through one normalised Gram: small matrices first, then a product for each view."""
        down, up = self._factors(self._others(gram))
        maps = (down @ up[:, None, None]).mT  # (M, B, Hkv, D, D)
        group = query.shape[1] // gram.shape[1]
        grouped = query.to(gram.dtype).unflatten(1, (-1, group)).flatten(2, 3)  # (B, Hkv, group * Nq, D)
        views = (grouped + grouped @ maps).unflatten(3, (group, -1)).flatten(2, 3).to(query.dtype)
        return (views, gram_indicator(query, project_queries(query, gram))) if return_indicator else (views,)

    def _others(self, gram: Tensor) -> Tensor:
        """(M, B, Hkv, D, D): for each modality the sum of the others' Grams."""
        zero = torch.zeros_like(gram[:, :, 0])
        modalities = range(self.num_modalities)
        return torch.stack([sum((gram[:, :, m] for m in modalities if m != a), start=zero) for a in modalities])

    def check(
        self, query: Tensor, key: Tensor, state: GramState | None, include: Tensor | None, return_state: bool
    ) -> None:
        """What the operators cannot know; they check the rest."""
        if query.dim() != 4 or query.shape[-1] != self.head_dim:
            raise ValueError(
                f"DuplexAligner: query must have shape (B, Hq, Nq, {self.head_dim}), got {tuple(query.shape)}"
            )
        if key.dim() != 4 or query.shape[1] % key.shape[1]:
            raise ValueError(
                f"DuplexAligner: key must have shape (B, Hkv, Nk, D) with Hkv a divisor of {query.shape[1]}, "
                f"got {tuple(key.shape)}"
            )
        if self.scope == "full" and (state is not None or return_state):
            raise ValueError("DuplexAligner: the full scope sees all tokens at once and has no state")
        if state is not None and (state.key_norm, state.window is None) != (self.key_norm, self.scope == "context"):
            raise ValueError(
                f"DuplexAligner: state must be of key_norm={self.key_norm!r} and scope={self.scope!r}, got "
                f"key_norm={state.key_norm!r} and a {'fixed' if state.window is None else 'running'} Gram"
            )
        if self.scope != "context" and include is not None:
            raise ValueError(f"DuplexAligner: include belongs to scope='context', this aligner has {self.scope!r}")
        if self.scope == "context" and (include is None) == (state is None):
            raise ValueError(
                "DuplexAligner: context scope needs include in the first call and state in every later one"
            )
