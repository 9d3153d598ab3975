"""The modular attention mask (MODA, section 3.3): a prior for every pair of modalities, and pseudo scores.

The mask is two small tensors that :func:`moda_ext.attention.modular_attention` takes as they are: a bias for every row
and key modality, and a sink for every row. Nothing here is N x N.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda_ext._ops import mkl
from moda_ext._ops.limits import MAX_MODALITIES, accumulation_dtype
from moda_ext.functional.alignment import gram_indicator
from moda_ext.functional.attention import modular_attention
from moda_ext.functional.sink import pseudo_score_sink, sink_of_left

__all__ = ["ModularMask"]

VARIANTS = ("inf", "fix", "attn", "learned")
CONDITIONAL = ("attn", "learned")  # the prior follows the Gram indicator
SOFTMAXES = ("joint", "split")


class ModularMask(nn.Module):
    r"""The modality bias and the sink of every row, which together are MODA's modular mask.

    .. math::
        b_{i,m} = w_{h, a_i, m} + \lambda_{h, a_i, m}\, e_{i,m}, \qquad
        c_i = \log \sum_{t=1}^{n-i} e^{\text{base} - (t-1)\,\text{decay}}

    with :math:`a_i` the modality of row i, :math:`e` its :func:`moda_ext.alignment.gram_indicator` and :math:`n` =
    ``length``. The prior w and the condition :math:`\lambda` start at 0. Source: MODA (arXiv 2507.04635), Eq. 7-10,
    Fig. 3c, Table 1(d); pseudo scores: StableMask (arXiv 2402.04779).

    Pseudo scores are **not** an identity: they take a share :math:`e^{c_i - L_i}` of every row. ``base=-inf`` is one;
    about -10 is a start for pretrained models, and 0, the default, is the paper's value for training from scratch.

    What is switched off is a setting and no number among the weights, so that averages and differences of state dicts
    stay finite: with ``base=-inf`` for all heads there is no ``base`` in the state dict; where some entries of
    ``prior`` or ``base`` are -inf, they are stored as 0, and a buffer ``prior_off`` or ``base_off`` holds 1 there, 0
    elsewhere. State dicts of before, with -inf in ``prior`` and ``base``, load as ever.

    Args:
        num_heads: H, the query heads.
        num_modalities: M, 1 to 16.
        variant: the row of Table 1(d):

            - ``"inf"``: no prior, no sink (plain attention);
            - ``"fix"``: fixed prior, pseudo scores;
            - ``"attn"``: learnable prior, conditioned on the Gram indicator, pseudo scores (the paper's choice);
            - ``"learned"``: as ``"attn"``, but the sink is one learnable number per head, which starts at ``base``.
        decay: decay of the pseudo scores per position, a number or (H,), at least 0 and finite. The paper gives none;
            0.5 is StableMask's.
        length: n, the largest number of tokens, or None for an infinite one (the sink is then the same for every row).
        base: the first pseudo score, a number or (H,), finite or -inf.
        learn_decay: make ``decay`` a parameter per head. It is the softplus of ``raw_decay``, so it stays above 0.
        learn_base: make ``base`` a parameter per head.
        softmax: ``"joint"``, one softmax over all keys (Fig. 3c), or ``"split"``, one over the keys of the row's own
            modality and one over the others (Eq. 7-8 read literally), each with bias and sink; see :meth:`attend`.
        prior: starting value of w, broadcastable to (H, M, M): [h, modality of the row, modality of the key], finite,
            or -inf, which hides a modality from a row and is not learned. None is 0.
        learn_prior: make w a parameter. By default it is one, except for ``"fix"``.

    Raises:
        ValueError: an unknown option, a size that does not fit, or a combination that cannot be trained.

    Example:
        >>> mask = ModularMask(8, variant="fix", prior=torch.tensor([[0.0, 1.0], [0.0, 0.0]]))  # text favours vision
        >>> query, modality = torch.randn(1, 8, 6, 64), torch.tensor([[0, 1, 1, 1, 0, 0]])
        >>> modality_bias, sink = mask(query, modality)
        >>> modality_bias.shape, sink.shape
        (torch.Size([1, 8, 6, 2]), torch.Size([8, 1]))
    """

    has_base = True  # also of masks that were pickled before this was told apart
    fixed_decay: Tensor
    base: Tensor
    sink: Tensor
    prior: Tensor

    def __init__(
        self,
        num_heads: int,
        num_modalities: int = 2,
        *,
        variant: str = "attn",
        decay: float | Tensor = 0.5,
        length: int | None = None,
        base: float | Tensor = 0.0,
        learn_decay: bool = False,
        learn_base: bool = False,
        softmax: str = "joint",
        prior: Tensor | None = None,
        learn_prior: bool | None = None,
    ):
        super().__init__()
        mkl.warm_up()
        if num_heads < 1:
            raise ValueError(f"ModularMask: num_heads must be at least 1, got {num_heads}")
        if not 1 <= num_modalities <= MAX_MODALITIES:
            raise ValueError(f"ModularMask: num_modalities must lie in 1 to {MAX_MODALITIES}, got {num_modalities}")
        if variant not in VARIANTS:
            raise ValueError(f"ModularMask: variant must be one of {VARIANTS}, got {variant!r}")
        if softmax not in SOFTMAXES:
            raise ValueError(f"ModularMask: softmax must be one of {SOFTMAXES}, got {softmax!r}")
        if length is not None and length < 1:
            raise ValueError(f"ModularMask: length must be at least 1 or None, got {length}")
        decay, base = _per_head("decay", decay, num_heads), _per_head("base", base, num_heads)
        closed_form = variant in ("fix", "attn")
        if not (decay >= 0).all():
            raise ValueError(f"ModularMask: decay must be at least 0, got {decay.tolist()}")
        if not decay.isfinite().all():
            raise ValueError(f"ModularMask: decay must be finite, got {decay.tolist()}; from 100 on one score is left")
        _check_finite_or_off("base", base)
        if closed_form and length is None and not (decay > 0).all():
            raise ValueError("ModularMask: decay must be above 0 when length is None, or pseudo scores sum to infinity")
        if (learn_decay or learn_base) and not closed_form:
            raise ValueError(f"ModularMask: variant {variant!r} has no pseudo scores to learn, set learn_* to False")
        if learn_decay and not (decay > 0).all():
            raise ValueError(f"ModularMask: learn_decay needs a decay above 0 to start from, got {decay.tolist()}")
        if (learn_base or variant == "learned") and not base.isfinite().all():
            raise ValueError(f"ModularMask: base must be finite to be learned, got {base.tolist()}")
        if variant == "inf" and (prior is not None or learn_prior):
            raise ValueError("ModularMask: variant 'inf' has no prior")

        self.num_heads, self.num_modalities = num_heads, num_modalities
        self.variant, self.softmax, self.length = variant, softmax, length
        self.learn_decay = learn_decay
        self.conditional = variant in CONDITIONAL
        if closed_form:
            if learn_decay:
                self.raw_decay = nn.Parameter(decay + (-torch.expm1(-decay)).log())  # the inverse of softplus
            else:
                self.register_buffer("fixed_decay", decay.clone())
            self.has_base = not (base == -math.inf).all()
            if self.has_base:
                _register(self, "base", base, learn_base)
            else:
                self.base = base.clone()  # to be read only: neither a parameter nor a buffer
        if variant == "learned":
            _register(self, "sink", base, True)
        if variant != "inf":
            pairs = (num_heads, num_modalities, num_modalities)
            prior = torch.zeros(pairs) if prior is None else _broadcast("prior", prior, pairs)
            _check_finite_or_off("prior", prior)
            _register(self, "prior", prior, variant != "fix" if learn_prior is None else learn_prior)
        if self.conditional:
            self.condition = nn.Parameter(torch.zeros(pairs))
        if softmax == "split":
            self.gate = nn.Parameter(torch.zeros(num_heads))

    @property
    def decay(self) -> Tensor:
        """Decay of the pseudo scores, (H,)."""
        return F.softplus(self.raw_decay) if self.learn_decay else self.fixed_decay

    def forward(
        self,
        query: Tensor,
        query_modality: Tensor,
        gram_projection: Tensor | None = None,
        start: int | Tensor = 0,
        *,
        indicator: Tensor | None = None,
        return_condition: bool = False,
        read: Callable | None = None,
    ) -> tuple[Tensor | None, ...]:
        """The mask of some rows, in the form that :func:`moda_ext.attention.modular_attention` takes.

        Args:
            query: (B, H, N, D), any floating-point dtype.
            query_modality: (B, N), integer, in [0, M), -1 for padding.
            gram_projection: (M, B, H, N, D), for the variants with a condition; see
                :func:`moda_ext.alignment.gram_indicator`. Without it e is 0 and the prior unconditional.
            start: how many tokens came before the first row, without padding: a number, or (B,) for a batch of
                sequences of different lengths. Padding does not count, so the mask does not depend on where it is.
            indicator: (B, H, N, M), instead of ``gram_projection`` where it is there already.
            return_condition: also return the condition of every row, for an operator that multiplies it with the
                indicator itself.
            read: for the other methods: is called instead, and its result returned. Parameters are sure to be there in
                a forward pass only, where offloading and sharding bring them.

        Returns:
            ``(modality_bias, sink)``: (B, H, N, M) and a sink broadcastable to (B, H, N), in float32, or float64 for a
            float64 query. None instead of a tensor where there is none: in variant ``"inf"``, and of the sink where
            ``base`` is -inf. With ``return_condition`` also lambda, (B, H, N, M) like the bias, or None.

        Raises:
            ValueError: a shape does not fit.
        """
        if read is not None:
            return read()
        if query.dim() != 4 or query.shape[1] != self.num_heads:
            raise ValueError(
                f"ModularMask: query must have shape (B, {self.num_heads}, N, D), got {tuple(query.shape)}"
            )
        if query_modality.shape != (query.shape[0], query.shape[2]):
            expected = query.shape[0], query.shape[2]
            raise ValueError(
                f"ModularMask: query_modality must have shape {expected}, got {tuple(query_modality.shape)}"
            )
        if self.variant == "inf":
            return (None, None, None) if return_condition else (None, None)
        dtype = accumulation_dtype(query.dtype)
        bias = self._of_rows(self._switched("prior", dtype), query_modality)
        if indicator is None and gram_projection is not None:
            indicator = gram_indicator(query, gram_projection)
        if self.conditional and indicator is not None:
            bias = bias + self._of_rows(self.condition.to(dtype), query_modality) * indicator
        sink = self._sink(query_modality, start, dtype)
        if not return_condition:
            return bias, sink
        return bias, sink, self._of_rows(self.condition.to(dtype), query_modality) if self.conditional else None

    def condition_of_rows(self, query: Tensor, query_modality: Tensor) -> Tensor | None:
        """lam of each row, (B, H, N, M) in the dtype of the bias: what the indicator of a row is multiplied with. None
        for a variant without."""
        return self(query, query_modality, return_condition=True)[2]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_modality: Tensor,
        key_modality: Tensor,
        modality_bias: Tensor | None,
        sink: Tensor | None,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        return_mass: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        r""":func:`moda_ext.attention.modular_attention` under this mask: one call, or two for the split softmax.

        The split softmax is :math:`o = g\, o_\text{self} + (1 - g)\, o_\text{cross}` with a gate g = sigmoid(``gate``)
        per head, 0.5 at the start. Each side is a call in which the prior hides the other side.

        Args:
            query: (B, H, N, D) or query views (M, B, H, N, D).
            key, value: (B, Hkv, Nk, D).
            query_modality, key_modality: (B, N) and (B, Nk).
            modality_bias, sink: what :meth:`forward` returned.
            is_causal, scale, return_mass: as in ``modular_attention``.

        Returns:
            ``out`` (B, H, N, D), or ``(out, mass)`` with mass (B, H, N, M), gated like ``out``.
        """

        def attention(bias: Tensor | None) -> Tensor | tuple[Tensor, ...]:
            return modular_attention(
                query,
                key,
                value,
                key_modality,
                num_modalities=self.num_modalities,
                modality_bias=bias,
                sink=sink,
                is_causal=is_causal,
                scale=scale,
                return_mass=return_mass,
            )

        return self.over_softmaxes(attention, query[0] if query.dim() == 5 else query, query_modality, modality_bias)

    def over_softmaxes(
        self, attention: Callable, query: Tensor, query_modality: Tensor, modality_bias: Tensor | None
    ) -> Tensor | tuple[Tensor, ...]:
        """``attention`` of a bias (B, H, N, M), or of both sides of the split softmax, blended by the gate.

        Args:
            attention: from a bias to a result, or a tuple of results, (B, H, N, ...).
            query: (B, H, N, D).
            query_modality: (B, N).
            modality_bias: what :meth:`forward` returned.
        """
        if self.softmax == "joint":
            return attention(modality_bias)
        dtype = accumulation_dtype(query.dtype)
        if modality_bias is None:
            modality_bias = torch.zeros((), dtype=dtype, device=query.device)
        modalities = torch.arange(self.num_modalities, device=query.device)
        own = query_modality[:, None, :, None] == modalities  # (B, 1, N, M)
        from_own, from_others = [attention(modality_bias.masked_fill(other, -math.inf)) for other in (~own, own)]
        gate = self(query, query_modality, read=lambda: self.gate.to(dtype).sigmoid())[:, None, None]

        def blend(own: Tensor, cross: Tensor) -> Tensor:
            return torch.lerp(cross.to(dtype), own.to(dtype), gate).to(own.dtype)

        if isinstance(from_own, Tensor) and isinstance(from_others, Tensor):
            return blend(from_own, from_others)
        return tuple(map(blend, from_own, from_others))

    def extra_repr(self) -> str:
        return (
            f"{self.num_heads}, {self.num_modalities}, variant={self.variant!r}, length={self.length}, "
            f"softmax={self.softmax!r}"
        )

    def _of_rows(self, table: Tensor, query_modality: Tensor) -> Tensor:
        """table[:, a_i, :] as (B, H, N, M). By selection, not by a product: the prior may hold -inf."""
        rows = query_modality[:, None, :, None]
        result = table[:, 0][:, None].expand(rows.shape[0], -1, rows.shape[2], -1)
        for a in range(1, self.num_modalities):
            result = torch.where(rows == a, table[:, a][:, None], result)
        return result

    def _sink(self, query_modality: Tensor, start: int | Tensor, dtype: torch.dtype) -> Tensor | None:
        if self.variant == "learned":
            return self.sink.to(dtype)[:, None]
        if not self.has_base and not self.learn_decay:
            return None
        decay = self.decay.to(dtype)
        # Without a base a learned decay gets the gradient 0 from a sink of -inf: DDP wants one of every parameter.
        base = self._switched("base", dtype) if self.has_base else torch.full_like(decay, -math.inf)
        if self.length is None:
            return pseudo_score_sink(1, None, decay, base=base, dtype=dtype)
        if isinstance(start, Tensor):
            start = start[:, None]
        seen = start + (query_modality >= 0).cumsum(dim=1)  # i of each row, 1-based
        return sink_of_left(self.length - seen[:, None], decay[:, None], base[:, None])

    def _switched(self, name: str, dtype: torch.dtype) -> Tensor:
        """``prior`` or ``base`` as the equation has it, -inf where it is switched off."""
        value, off = getattr(self, name).to(dtype), self._buffers.get(f"{name}_off")
        return value if off is None else value.masked_fill(off > 0.5, -math.inf)

    def take_infinities_out(self) -> None:
        """Stores -inf that got into ``prior`` or ``base`` past :meth:`load_state_dict` as a new mask would."""
        if not any(tensor.is_meta for tensor in self.state_dict().values()):
            self.load_state_dict(self.state_dict())

    def is_off_unlike(self, state_dict: dict[str, Tensor], prefix: str = "") -> bool:
        """Whether this mask has no pseudo scores, and a state dict has some, which would switch them on here."""
        base = state_dict.get(f"{prefix}base")
        return not self.has_base and base is not None and bool((base != -math.inf).any())

    def upgrade_state_dict(self, state_dict: dict[str, Tensor], prefix: str = "") -> list[str]:
        """Brings a state dict of any version to today's form, in place.

        The names begin with ``prefix``. Returns the buffers that this mask lacks for it, see :meth:`make_room`.
        """
        lacking: list[str] = []
        for name in ("prior", "base"):
            key, off_key = f"{prefix}{name}", f"{prefix}{name}_off"
            if key not in state_dict or not hasattr(self, name):
                continue
            value = state_dict[key]
            off = value == -math.inf
            if name == "base" and not self.has_base:
                if off.all():  # neither has pseudo scores
                    del state_dict[key]
                    continue
                lacking.append(name)
            if off.any():
                state_dict[key], state_dict[off_key] = value.masked_fill(off, 0.0), off.to(value.dtype)
            if off_key in state_dict and f"{name}_off" not in self._buffers:
                lacking.append(f"{name}_off")
            elif off_key not in state_dict and f"{name}_off" in self._buffers:
                state_dict[off_key] = torch.zeros_like(value)
        return lacking

    def make_room(self, buffers: Sequence[str]) -> None:
        """Registers what :meth:`upgrade_state_dict` found lacking: what was off by the settings is on from now on."""
        if "base" in buffers:
            del self.base
            self.register_buffer("base", torch.zeros_like(self.decay))
            self.has_base = True
        for name in ("prior", "base"):
            if f"{name}_off" in buffers:
                self.register_buffer(f"{name}_off", torch.zeros_like(getattr(self, name).detach()))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.make_room(self.upgrade_state_dict(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _register(module: nn.Module, name: str, value: Tensor, learn: bool) -> None:
    """A parameter or a buffer with memory of its own: ``value`` may be expanded. Where it is -inf, see ModularMask."""
    off = value == -math.inf
    value = value.masked_fill(off, 0.0).clone()
    if learn:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)
    if off.any():  # a float, which averages over all buffers pass through, as they do not all integers and booleans
        module.register_buffer(f"{name}_off", off.to(value.dtype))


def _check_finite_or_off(name: str, value: Tensor) -> None:
    if not (value < math.inf).all():
        raise ValueError(f"ModularMask: {name} must be finite or -inf, got {value.tolist()}")


def _per_head(name: str, value: float | Tensor, num_heads: int) -> Tensor:
    return _broadcast(name, torch.as_tensor(value, dtype=torch.get_default_dtype()), (num_heads,))


def _broadcast(name: str, value: Tensor, shape: Sequence[int]) -> Tensor:
    try:
        return value.detach().to(torch.get_default_dtype()).expand(shape)
    except RuntimeError:
        raise ValueError(
            f"ModularMask: {name} must broadcast to {tuple(shape)}, got shape {tuple(value.shape)}"
        ) from None
