"""What the variants of the study are, each as a change of one thing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moda_ext.integrations.transformers import MODAConfig, apply_moda, attention_modules

__all__ = ["BASELINE", "VARIANTS", "BilinearGate", "Variant"]

BASELINE = "lora"
RANDOM = "lora, hints at random"
TRAINING = "train.jsonl"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train; all have LoRA and the projector.

    Attributes:
        name: of it.
        meaning: in a line.
        moda: settings of MODA, or None for none.
        data: the file of conversations.
        blind: tokens are told apart by whether their place is even, not by modality: the control for parameters that
            know nothing of pictures.
        gate: the aligner of each layer is a :class:`BilinearGate`.
        balance: the weight of :class:`moda_ext.diagnostics.AttentionBalanceLoss`.
        calibrated: the prior starts at the plan's, for text rows and image keys of the plan's layers.
        against: the variant that differs in this one thing alone; None of the baseline.
    """

    name: str
    meaning: str
    moda: dict[str, Any] | None = None
    data: str = TRAINING
    blind: bool = False
    gate: bool = False
    balance: float = 0.0
    calibrated: bool = False
    against: str | None = "lora"

    def attach(self, model: Any, prior: float, layers: Sequence[int] | None = None, rank: int = 16) -> None:
        """Puts MODA into a loaded model, as the variant has it; ``layers`` are the first and the last of ``prior``."""
        if self.moda is None:
            return
        apply_moda(model, MODAConfig(**self.moda))
        modules = attention_modules(model)
        if self.calibrated:
            first, last = layers or (0, len(modules) - 1)
            if not 0 <= first <= last < len(modules):
                raise ValueError(f"study: prior_layers {first}-{last} are not among the model's {len(modules)}")
            for module in modules[first : last + 1]:
                module.get_parameter("moda.mask.prior").data[:, 0, 1] = prior
        for module in modules if self.gate else []:
            module.moda.aligner = BilinearGate(module.head_dim, rank)
        if self.blind:
            model.model.register_forward_pre_hook(by_parity, prepend=True, with_kwargs=True)


def by_parity(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A hook of the base model: every other token is of the other modality, whatever it is.

    The place of a token is counted in its sequence, so that it is the same in training and while decoding, where
    ``generate`` gives no mask without padding, but positions.
    """
    mask, number = kwargs.get("attention_mask"), kwargs["input_ids"].shape[1]
    if mask is None and kwargs.get("position_ids") is None:
        raise ValueError("by_parity: needs attention_mask or position_ids, to know the places of tokens")
    if mask is not None:
        modality = (mask.long().cumsum(dim=1) % 2).masked_fill(mask == 0, -1)
    else:
        modality = (kwargs["position_ids"] + 1) % 2
    return args, {**kwargs, "modality_ids": modality[:, -number:]}


class BilinearGate(nn.Module):
    r"""A learned bias of each query and each image key, in the place of a layer's aligner.

    .. math:: b_{ij} = D^{-1/2} (q_i A B) \cdot k_j \text{ for image keys } j, \quad b_{ij} = 0 \text{ for others,}

    which is a view of the query for image keys, q + q A B, and costs no N x N matrix. B starts at 0. After RAVE (arXiv
    2605.18359), whose bias is bilinear in queries and visual keys too, but takes them before RoPE; after it, the bias
    can depend on how far the two are apart.

    Args:
        head_dim: D.
        rank: of A B, shared by the heads of a layer.
    """

    fusion, scope = "bilinear", "causal"  # an aligner that no fused operator knows

    def __init__(self, head_dim: int, rank: int):
        super().__init__()
        self.a1 = nn.Parameter(torch.randn(head_dim, rank) / math.sqrt(head_dim))
        self.b1 = nn.Parameter(torch.zeros(rank, head_dim))

    def forward(self, query: Tensor, *tokens: Any, **options: Any) -> Tensor:
        """(B, Hq, N, D) -> views (2, B, Hq, N, D), for text and for image keys."""
        change = (query.to(self.a1.dtype) @ self.a1) @ self.b1
        return torch.stack([query, query + change.to(query.dtype)])


NOTHING = {"aligner": None, "mask": {"variant": "fix"}}  # MODA with a prior of 0, that stays
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(BASELINE, "LoRA and the projector, no MODA", against=None),
        Variant("moda", "and MODA: aligner and conditional mask in every layer", {}),
        Variant("blind", "the same, with the parity of a token's place for its modality: the control", {}, blind=True),
        Variant("balance", "moda, and the attention balance loss", {}, balance=0.1, against="moda"),
        Variant("prior", "moda, its prior for the image starting above 0", {}, calibrated=True, against="moda"),
        Variant("gate", "a bilinear gate on image keys, after RAVE", NOTHING, gate=True),
        Variant(RANDOM, "lora, trained on hints that tell nothing", data="train_random_hints.jsonl"),
        Variant(
            "moda, hints at random",
            "moda, trained on hints that tell nothing",
            {},
            data="train_random_hints.jsonl",
            against=RANDOM,
        ),
    )
}
