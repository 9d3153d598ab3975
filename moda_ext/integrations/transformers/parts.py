"""The parts of a Transformers model that MODA works with, as type checkers see them. Nothing is made of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

    class GenerativeModel(PreTrainedModel, GenerationMixin):
        """A ``...ForConditionalGeneration`` model."""

    _Model = PreTrainedModel
else:
    _Model = nn.Module


class SelfAttention(nn.Module):
    """``self_attn`` of a layer."""

    config: PreTrainedConfig
    layer_idx: int
    head_dim: int
    q_proj: nn.Module
    moda: nn.Module  # a MODAAttention, or what PEFT puts around one


class DecoderLayer(nn.Module):
    """A layer of the text stack."""

    self_attn: SelfAttention


class TextStack(_Model):
    """The decoder of a vision-language model."""

    layers: Sequence[DecoderLayer]
