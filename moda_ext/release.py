"""The alignment of the authors' release, as it is: to load its checkpoints and to compare with, for nothing else.

Differences from the paper (Eq. 5-6) and from :mod:`moda_ext.alignment`, kept here on purpose:

- the Gram is keys times values of the text, phi(K)^T V, each row divided by its length: NaN if there is no text;
- it is made of all text tokens, the answer too, so in a causal model later tokens leak into earlier ones;
- only vision keys are aligned, in the prefill only: a decode step attends to raw new keys;
- a new aligner is not the identity (its fuser is a random full-rank matrix), and there is no modular mask.

python_tests/nn/test_release.py shows each of them, and that the rest of this package has none.
"""

import re

import torch
from torch import Tensor, nn

__all__ = ["ReleaseAligner", "split_release_state_dict"]

TEXT, VISION = 0, 1


class ReleaseAligner(nn.Module):
    r"""The release's aligned keys.

    .. math::
        k'_j = \big(k_j + r_v \odot \phi(k_j)\, \hat G\big) W_v^\top \ \text{ for vision}, \qquad
        G = \phi(K_\text{text})^\top V_\text{text}, \quad \phi(k) = \frac{k + 10^{-6}}{\lVert k + 10^{-6} \rVert}

    with the rows of G divided by their lengths. Text keys stay. The parameters have the names of the checkpoints;
    ``ratio_t`` and ``pfuser_t`` are in them and take no part.

    Args:
        head_dim: D.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.ratio_v = nn.Parameter(torch.zeros(1, 1, head_dim))
        self.ratio_t = nn.Parameter(torch.zeros(1, 1, head_dim))
        self.pfuser_v = nn.Linear(head_dim, head_dim, bias=False)
        self.pfuser_t = nn.Linear(head_dim, head_dim, bias=False)

    def forward(self, key: Tensor, value: Tensor, modality: Tensor) -> Tensor:
        """key, value (B, Hkv, N, D) and modality (B, N), text 0 and vision 1 -> aligned keys (B, Hkv, N, D)."""
        unit = key + 1e-6
        unit = unit / unit.norm(dim=-1, keepdim=True)
        text, vision = ((modality == m)[:, None, :, None] for m in (TEXT, VISION))
        gram = torch.where(text, unit, 0.0).mT @ value
        gram = gram / gram.norm(dim=-1, keepdim=True)  # 0 / 0 without text, as in the release
        return torch.where(vision, self.pfuser_v(key + self.ratio_v * (unit @ gram)), key)


_NAME = re.compile(r"(?:model\.)?layers\.(\d+)\.self_attn\.(ratio_[vt]|pfuser_[vt]\.weight|pnorm\.weight)")


def split_release_state_dict(state_dict: dict[str, Tensor]) -> tuple[dict[int, dict[str, Tensor]], dict[str, Tensor]]:
    """A checkpoint of the release in two parts: the aligners, and the language model without them.

    Args:
        state_dict: with the names ``model.layers.{i}.self_attn.{ratio_v,ratio_t,pfuser_v.weight,pfuser_t.weight}``.
            ``pnorm.weight``, which the release does not use, is dropped.

    Returns:
        ``(aligners, rest)``: for each layer what ``ReleaseAligner(head_dim).load_state_dict`` takes, and everything
        else under its own name.

    Raises:
        ValueError: there is no aligner in it, or one that is incomplete.
    """
    aligners: dict[int, dict[str, Tensor]] = {}
    rest = {}
    for name, tensor in state_dict.items():
        match = _NAME.fullmatch(name)
        if match is None:
            rest[name] = tensor
        elif match[2] != "pnorm.weight":
            aligners.setdefault(int(match[1]), {})[match[2]] = tensor
    expected = {"ratio_v", "ratio_t", "pfuser_v.weight", "pfuser_t.weight"}
    if not aligners:
        raise ValueError("split_release_state_dict: state_dict has no name like model.layers.0.self_attn.ratio_v")
    for layer, tensors in aligners.items():
        missing = sorted(expected - tensors.keys())
        if missing:
            raise ValueError(f"split_release_state_dict: layer {layer} lacks {', '.join(missing)}")
    return aligners, rest
