"""Layers and models whose attention is measured, and the same figures from dense attention weights."""

import torch
from torch import nn

from moda_ext.attention import ModularDuplexAttention
from moda_ext.diagnostics import AttentionMeter

# One head over [text][image][image][text], causal. Weights p_ij, row by row:
WEIGHTS = torch.tensor(
    [
        [1.0, 0.0, 0.0, 0.0],  # text sees itself
        [0.5, 0.5, 0.0, 0.0],  # image
        [0.2, 0.4, 0.4, 0.0],  # image
        [0.1, 0.2, 0.3, 0.4],  # text
    ],
    dtype=torch.float64,
)

MODALITY = torch.tensor([[0, 1, 1, 0]])
ONE_HOT = torch.nn.functional.one_hot(MODALITY[0], 2).double()
MASS = (WEIGHTS @ ONE_HOT)[None]  # (B, N, M)


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=1e-6, atol=1e-7, equal_nan=True)


# The meter beside dense weights ---------------------------------------------------------------------------------------
TOKENS = torch.tensor(  # text, image, text; with padding on the left; an image first; text alone
    [
        [0, 0, 0, 1, 1, 1, 1, 0, 0, 0],
        [-1, -1, 0, 1, 1, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, -1, -1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)


class Stack(nn.Module):
    """A model of layers of this package."""

    def __init__(self, layers=2, **options):
        super().__init__()
        self.layers = nn.ModuleList(ModularDuplexAttention(32, 4, 2, **options) for _ in range(layers))

    def forward(self, x, modality):
        for layer in self.layers:
            x = x + layer(x, modality)
        return x


def make_stack(trained=True, **options):
    torch.manual_seed(0)
    stack = Stack(**options)
    for name, parameter in stack.named_parameters():
        if trained and "_proj" not in name:
            nn.init.normal_(parameter, std=0.5)
    for layer in stack.layers:
        nn.init.normal_(layer.q_proj.weight, std=0.5)
    return stack


class Dense:
    """A recorder that keeps the weights of each layer, (B, H, N, N)."""

    def __init__(self):
        self.weights = []

    def __call__(self, record):
        self.weights.append(record.weights().detach())


def measured(model, *inputs, **options):
    with torch.no_grad(), AttentionMeter(model, **options) as meter:
        model(*inputs)
    return meter.result()


# Transformers ---------------------------------------------------------------------------------------------------------
FAMILIES = (
    *("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl"),
    *("qwen3_vl", "gemma3", "internvl", "idefics3", "smolvlm"),
)
