"""Peers of a prior without training, from their papers: PAI and VCD, for greedy decoding of Llava models.

Each has ``generate``, ``device`` and ``dtype`` of the model that it wraps, as ``generate_answers`` asks for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.masking_utils import eager_mask

from moda_ext.integrations.settings import placeholder
from moda_ext.integrations.transformers import attention_modules
from moda_ext.integrations.transformers.hooks import cache_argument
from moda_ext.integrations.transformers.models import has_moda

NAME = "pai"


class Decoder:
    """A model that decodes in another way.

    Raises:
        ValueError: a model of another family, whose inputs this would not know, or with MODA.
    """

    def __init__(self, model):
        if not isinstance(model, LlavaForConditionalGeneration) or has_moda(model, "Decoder"):
            raise ValueError(f"{type(self).__name__} decodes Llava models without MODA, got {type(model).__name__}")
        self.model, self.device, self.dtype = model, model.device, model.dtype


class Contrast(LogitsProcessor):
    """Changes the scores of each step by those of the same model after another prompt, which has its own cache.

    Args:
        model: a Llava.
        inputs: the other prompt, padded on the left: ``input_ids``, ``attention_mask`` and perhaps ``pixel_values``.
        combine: from scores and the other's, both (B, V) and float32, to scores.
    """

    def __init__(self, model, inputs: dict[str, Tensor], combine: Callable[[Tensor, Tensor], Tensor]):
        self.model, self.combine, self.next = model, combine, dict(inputs)
        self.mask = self.next.pop("attention_mask")
        self.cache = {cache_argument(type(model)): DynamicCache()}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.next:
            self.next = {"input_ids": input_ids[:, -1:]}
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(input_ids), 1)], dim=1)
        position = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -self.next["input_ids"].shape[1] :]
        options = {"attention_mask": self.mask, "position_ids": position, "use_cache": True, **self.cache}
        other = self.model(**self.next, **options).logits[:, -1]
        self.next = {}
        return self.combine(scores, other.to(scores))


def plausible(changed: Tensor, scores: Tensor, beta: float) -> Tensor:
    """``changed`` where a token is at least beta times as likely as the likeliest, by ``scores``; -inf elsewhere.

    The adaptive plausibility constraint of VCD, which PAI's published code has too, with beta = 0.1.
    """
    return changed.masked_fill(scores < scores.max(dim=-1, keepdim=True).values + math.log(beta), -math.inf)


class VCD(Decoder):
    r"""Visual contrastive decoding (arXiv 2311.16922): softmax of (1 + alpha) logit(v, x) - alpha logit(v', x).

    v' is the picture v after step T of diffusion, :math:`\sqrt{\bar a_T} v + \sqrt{1 - \bar a_T} \epsilon`, with the
    1,000 steps of the authors' published code, counted from 0, whose variances are a sigmoid from 1e-5 to 5e-3.

    Args:
        model: a Llava.
        alpha: strength, 1 in the paper; 0 is plain decoding.
        steps: T, 500 in the paper.
        beta: of :func:`plausible`, 0.1 in the paper.
        seed: of the noise.
    """

    def __init__(self, model, alpha: float, steps: int = 500, beta: float = 0.1, seed: int = 0):
        super().__init__(model)
        if alpha < 0 or not 0 <= steps < 1000 or not 0 < beta <= 1:
            raise ValueError(f"VCD: alpha at least 0, steps in 0 to 999, beta in 0 to 1, got {alpha}, {steps}, {beta}")
        variances = torch.linspace(-6, 6, 1000).sigmoid() * (5e-3 - 1e-5) + 1e-5
        self.kept = (1 - variances)[: steps + 1].prod()
        self.alpha, self.beta = alpha, beta
        self.generator = torch.Generator().manual_seed(seed)

    def noisy(self, pixels: Tensor) -> Tensor:
        """v' of v, normalised pixels of any shape."""
        noise = torch.randn(pixels.shape, generator=self.generator).to(pixels)
        return self.kept.sqrt().item() * pixels + (1 - self.kept).sqrt().item() * noise

    def combine(self, scores: Tensor, other: Tensor) -> Tensor:
        return plausible((1 + self.alpha) * scores - self.alpha * other, scores, self.beta)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None = None, **options):
        """As the model's. Without pictures there is nothing to contrast."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if pixel_values is None:
            return self.model.generate(**inputs, **options)
        contrast = Contrast(self.model, {**inputs, "pixel_values": self.noisy(pixel_values)}, self.combine)
        options["logits_processor"] = LogitsProcessorList([contrast])
        return self.model.generate(**inputs, pixel_values=pixel_values, **options)


class PAI(Decoder):
    r"""Paying more attention to the image (arXiv 2407.21771), both of its parts.

    In some layers the scores A of the last row on image keys become A + alpha \|A\| before the softmax. With gamma
    above 1 the next token's log-probabilities become gamma log p(image, text) - (gamma - 1) log p(text), under
    :func:`plausible`; the prompt of the second loses its image tokens, and its scores are left as they are.

    Args:
        model: a Llava without MODA.
        alpha: strength, 0.2 to 0.6 in the paper; 0 changes no score.
        layers: which.
        gamma: 1.1 in the paper; 1 is without the second pass.
    """

    beta = 0.1

    def __init__(self, model, alpha: float, layers: Sequence[int], gamma: float = 1.0):
        super().__init__(model)
        if alpha < 0 or gamma < 1:
            raise ValueError(f"PAI: alpha must be at least 0 and gamma at least 1, got {alpha} and {gamma}")
        self.alpha, self.layers, self.gamma = alpha, set(layers), gamma
        self.image_token = placeholder(model.config, "image")
        self.is_image: Tensor | None = None  # (B, P), of the prompt; None in the pass that sees no picture

    def __call__(self, scores: Tensor) -> Tensor:
        """(B, H, Nq, Nk) scores before the mask, with those of the last row on image keys raised."""
        if self.is_image is None:
            return scores
        after = scores.shape[-1] - self.is_image.shape[1]
        last = scores[:, :, -1]
        raised = torch.where(
            nn.functional.pad(self.is_image, (0, after))[:, None], last + self.alpha * last.abs(), last
        )
        return torch.cat([scores[:, :, :-1], raised[:, :, None]], dim=2)

    def combine(self, scores: Tensor, other: Tensor) -> Tensor:
        own, text = scores.log_softmax(dim=-1), other.log_softmax(dim=-1)
        return plausible(self.gamma * own - (self.gamma - 1) * text, own, self.beta)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **inputs):
        """As the model's."""
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.gamma > 1:
            contrast = _WithoutPicture(self, self.model, self._text_only(input_ids, attention_mask), self.combine)
            inputs["logits_processor"] = LogitsProcessorList([contrast])
        with self._attending():
            self.is_image = input_ids == self.image_token
            return self.model.generate(**inputs)

    def _text_only(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """The prompts without image tokens, padded on the left."""
        kept = attention_mask.bool() & (input_ids != self.image_token)
        order = kept.int().argsort(dim=1, stable=True)[:, -int(kept.sum(dim=1).max()) :]
        return {"input_ids": input_ids.gather(1, order), "attention_mask": kept.gather(1, order).to(attention_mask)}

    @contextlib.contextmanager
    def _attending(self) -> Iterator[None]:
        before, modules = self.model.config.text_config._attn_implementation, attention_modules(self.model)
        try:
            for module in modules:
                module.pai = self if module.layer_idx in self.layers else None
            self.model.set_attn_implementation({"text_config": NAME})
            yield
        finally:
            self.model.set_attn_implementation({"text_config": before})
            for module in modules:
                del module.pai


class _WithoutPicture(Contrast):
    """The second pass of PAI, in which no score is raised."""

    def __init__(self, pai: PAI, *arguments):
        super().__init__(*arguments)
        self.pai = pai

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        is_image, self.pai.is_image = self.pai.is_image, None
        try:
            return super().__call__(input_ids, scores)
        finally:
            self.pai.is_image = is_image


def pai_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Plain attention by N x N scores, which ``module.pai`` changes where there is one."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if module.pai is not None:
        scores = module.pai(scores)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, pai_attention)
AttentionMaskInterface.register(NAME, eager_mask)
