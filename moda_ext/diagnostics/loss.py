"""A penalty on unbalanced attention, for training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moda_ext.diagnostics import measures
from moda_ext.diagnostics.attach import in_backward, mean_over_heads, recorded
from moda_ext.integrations.recording import AttentionRecord

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["AttentionBalanceLoss"]

TARGETS = ("uniform", "equal")


class AttentionBalanceLoss(nn.Module):
    r"""How far the attention of each row is from the shares that modalities should get.

    .. math::
        \mathcal{L} = \frac{1}{|R| H} \sum_{i \in R} \sum_h \mathrm{KL}(t_i \,\|\, \pi_{hi}), \qquad
        \pi_{him} = \text{mass}_{him} / \textstyle\sum_{m'} \text{mass}_{him'}

    over the rows R that see every modality of their sequence (others have no choice). Attention within a modality is
    free, and so is the sink's share. Differentiable in the mass, which costs no N x N matrix.

    Args:
        target: the shares t_i. ``"uniform"``: the share of each modality among the visible keys, so that every token
            counts alike; ``"equal"``: the same for every visible modality, however many tokens it has; or a tensor
            (M,), or (M, M) with one line for the rows of each modality, scaled to sum to 1 over visible modalities.
        eps: shares below count as this one: bounds the loss and the gradient where a modality is hidden.

    Raises:
        ValueError: an unknown target, a tensor of another shape or with a negative entry, or eps not in (0, 1).

    Example:
        >>> balance = AttentionBalanceLoss()
        >>> out, mass = layer(x, modality, return_mass=True)
        >>> loss = out.square().mean() + 0.1 * balance(mass, modality)

        On a Transformers model with MODA, or measured in plain mode, :meth:`collect` takes the mass of every layer:

        >>> with balance.collect(model) as penalties:
        ...     loss = model(**batch).loss
        ...     (loss + 0.1 * torch.stack(penalties).mean()).backward()
    """

    shares: Tensor | None

    def __init__(self, target: str | Tensor = "uniform", *, eps: float = 1e-6):
        super().__init__()
        if isinstance(target, Tensor):
            if target.dim() not in (1, 2) or target.shape[0] != target.shape[-1] or bool((target < 0).any()):
                raise ValueError(
                    "AttentionBalanceLoss: target must have shape (M,) or (M, M) and no negative entry, got shape "
                    f"{tuple(target.shape)}"
                )
        elif target not in TARGETS:
            raise ValueError(f"AttentionBalanceLoss: target must be {', '.join(TARGETS)} or a tensor, got {target!r}")
        if not 0 < eps < 1:
            raise ValueError(f"AttentionBalanceLoss: eps must lie between 0 and 1, got {eps}")
        self.register_buffer("shares", target if isinstance(target, Tensor) else None)
        self.target = None if isinstance(target, Tensor) else target
        self.eps = eps

    def forward(
        self,
        mass: Tensor,
        query_modality: Tensor,
        key_modality: Tensor | None = None,
        *,
        counts: Tensor | None = None,
        is_causal: bool = True,
        mesh: DeviceMesh | None = None,
    ) -> Tensor:
        """The loss of one attention call.

        Args:
            mass: (B, Hq, Nq, M), from :func:`moda_ext.attention.modular_attention` or a layer.
            query_modality: (B, Nq), integer, -1 for padding.
            key_modality: (B, Nk), by default ``query_modality``.
            counts: (B, Nq, M), the visible keys of each modality, by default those of
                :func:`moda_ext.diagnostics.measures.key_counts`.
            is_causal: for the default ``counts``.
            mesh: over which the heads are split, for the mass of a layer after
                :func:`moda_ext.distributed.split_heads`. All its processes must call this, and get the same loss.

        Returns:
            A scalar in the dtype of ``mass``; 0 if no row sees two modalities.

        Raises:
            ValueError: a shape that does not fit.
        """
        if mass.dim() != 4 or query_modality.shape != (mass.shape[0], mass.shape[2]):
            raise ValueError(
                "AttentionBalanceLoss: mass must have shape (B, Hq, Nq, M) and query_modality (B, Nq), got "
                f"{tuple(mass.shape)} and {tuple(query_modality.shape)}"
            )
        num_modalities = mass.shape[-1]
        if self.shares is not None and self.shares.shape[-1] != num_modalities:
            raise ValueError(
                f"AttentionBalanceLoss: target is for {self.shares.shape[-1]} modalities, and mass has {num_modalities}"
            )
        key_modality = query_modality if key_modality is None else key_modality
        if counts is None:
            counts = measures.key_counts(query_modality, key_modality, num_modalities, is_causal=is_causal)
        rows = measures.rows_that_see_all(counts, key_modality) & (query_modality >= 0)
        target = self._target(counts, query_modality).to(mass.dtype)[:, None]  # (B, 1, N, M)
        mass = torch.where(rows[:, None, :, None], mass, 1.0)  # rows of padding may hold NaN
        share = mass / mass.sum(dim=-1, keepdim=True).clamp(min=self.eps)
        divergence = (torch.xlogy(target, target) - target * share.clamp(min=self.eps).log()).sum(dim=-1)
        own = (divergence * rows[:, None]).sum() / (rows.sum() * mass.shape[1]).clamp(min=1)
        return mean_over_heads(own, mesh)

    @contextlib.contextmanager
    def collect(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """Yields a list that gets the loss of every attention call while the block runs, first layer first.

        With gradient checkpointing the backward pass belongs into the block: it computes the layers once more.

        Raises:
            RuntimeError: in a call, where gradients are off although the model is in training mode: reentrant gradient
                checkpointing. Use ``gradient_checkpointing_kwargs={"use_reentrant": False}``.
            ValueError: a model of an unknown family.
        """
        penalties: list[Tensor] = []

        def recorder(record: AttentionRecord) -> None:
            if model.training and not torch.is_grad_enabled():
                raise RuntimeError(
                    "AttentionBalanceLoss: no gradient reaches the attention mass. Leave torch.no_grad, or use "
                    "gradient checkpointing with use_reentrant=False."
                )
            with torch.autocast(record.mass.device.type, enabled=False):
                counts = record.key_counts()
                modalities = record.query_modality, record.key_modality
                penalty = self(record.mass, *modalities, counts=counts, mesh=record.mesh)
            if not in_backward():  # there checkpointing wants its tensors again, and nothing else
                penalties.append(penalty)

        with recorded(model, recorder):
            yield penalties

    def extra_repr(self) -> str:
        target = self.target if self.shares is None else tuple(self.shares.shape)
        return f"target={target!r}, eps={self.eps}"

    def _target(self, counts: Tensor, query_modality: Tensor) -> Tensor:
        """(B, N, M), sums to 1 over the visible modalities."""
        if self.target == "uniform":
            return measures.uniform_mass(counts)
        visible = (counts > 0).to(torch.float32)
        if self.shares is not None:
            shares = self.shares if self.shares.dim() == 1 else self.shares[query_modality.clamp(min=0).long()]
            visible = visible * shares
        return visible / visible.sum(dim=-1, keepdim=True).clamp(min=self.eps)
