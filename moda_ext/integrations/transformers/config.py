"""Settings of MODA in a Transformers model."""

from __future__ import annotations

import dataclasses
import math

import torch

from moda_ext.mask import CONDITIONAL, VARIANTS

__all__ = ["MODAConfig"]

MODES = ("moda", "release")
DEFAULT_MODALITIES = {"text": 0, "image": 1, "video": 1}


@dataclasses.dataclass
class MODAConfig:
    """Settings of MODA in a Transformers model, saved with it in ``config.text_config.moda``.

    A model with the default settings computes what it computed before, until it is trained: aligner and prior start at
    0 and the pseudo scores are off.

    Args:
        modalities: the modality of each kind of token, from 0: ``"text"``, and ``"image"``, ``"video"`` and ``"audio"``
            where the family has such tokens. By default text is 0, image and video are 1 (the paper's two modalities).
        aligner: keyword arguments of :class:`moda_ext.alignment.DuplexAligner` (``fusion``, ``rank``, ``key_norm``,
            ``normalize``), or None for no aligner. The scope is causal.
        mask: keyword arguments of :class:`moda_ext.mask.ModularMask` (``variant``, ``decay``, ``length``, ``base``,
            ``learn_decay``, ``learn_base``, ``softmax``, ``prior``, ``learn_prior``), or None for plain attention. Here
            ``base`` is None by default, which switches the pseudo scores off; start pretrained models that are to learn
            it with ``{"base": -10.0, "learn_base": True}``. ``prior`` may be nested lists.
        layers: indices of the layers that get MODA; None for all that have full attention.
        mode: ``"moda"``, or ``"release"``: the alignment of the authors' release, for its checkpoints and for
            comparison only (see :mod:`moda_ext.release`); aligner and mask must be None.

    Raises:
        ValueError: settings that do not go together, or an unknown option.
        TypeError: an unknown keyword of the aligner or the mask.

    Example:
        >>> MODAConfig().num_modalities
        2
        >>> MODAConfig.fixed_prior([[0.0, 0.5], [0.0, 0.0]]).mask["variant"]  # text looks more at images
        'fix'
    """

    modalities: dict[str, int] = dataclasses.field(default_factory=lambda: dict(DEFAULT_MODALITIES))
    aligner: dict | None = dataclasses.field(default_factory=dict)
    mask: dict | None = dataclasses.field(default_factory=dict)
    layers: list[int] | None = None
    mode: str = "moda"

    def __post_init__(self):
        ids = set(self.modalities.values())
        if self.modalities.get("text") is None or ids != set(range(len(ids))):
            raise ValueError(
                f"MODAConfig: modalities must name 'text' and number the modalities from 0, got {self.modalities}"
            )
        if self.mode not in MODES:
            raise ValueError(f"MODAConfig: mode must be one of {MODES}, got {self.mode!r}")
        if self.mode == "release":
            if self.aligner or self.mask:
                raise ValueError("MODAConfig: mode='release' has no aligner and no mask of ours, both must be None")
            self.aligner = self.mask = None
        if self.aligner is not None and self.aligner.get("scope", "causal") != "causal":
            raise ValueError(
                f"MODAConfig: aligner scope must be 'causal', got {self.aligner['scope']!r}: a language model's answer "
                "would leak into its prompt ('full'), or the prompt's end would have to be known ('context')"
            )
        if self.mask is not None:
            self.mask = {"base": None, **self.mask}
            variant = self.mask.get("variant", "attn")
            if variant not in VARIANTS:
                raise ValueError(f"MODAConfig: mask variant must be one of {VARIANTS}, got {variant!r}")
            if self.aligner is None and variant in CONDITIONAL:
                raise ValueError(
                    f"MODAConfig: mask variant {variant!r} is conditioned on the aligner's Gram; give an aligner, or "
                    "use variant 'fix' or 'inf'"
                )
            if self.mask["base"] is None and variant == "learned":
                raise ValueError("MODAConfig: mask variant 'learned' needs a finite base to start from, such as -10.0")
            if isinstance(self.mask.get("prior"), torch.Tensor):
                self.mask = {**self.mask, "prior": self.mask["prior"].tolist()}
        if self.layers is not None:
            self.layers = sorted(set(self.layers))

    @classmethod
    def plain(cls, **settings) -> MODAConfig:
        """Plain attention with no weights of ours, equal to ``sdpa``: for measuring."""
        return cls(aligner=None, mask=None, **settings)

    @classmethod
    def fixed_prior(cls, prior, **settings) -> MODAConfig:
        """Rebalancing without training: a fixed prior and no parameters.

        Args:
            prior: broadcastable to (H, M, M), natural logarithm: what is added to the scores of head h, a query of
                modality a and a key of modality m. -inf hides.
        """
        return cls(aligner=None, mask={"variant": "fix", "prior": torch.as_tensor(prior).tolist()}, **settings)

    @property
    def num_modalities(self) -> int:
        """M."""
        return len(set(self.modalities.values()))

    def mask_options(self) -> dict:
        """What :class:`moda_ext.mask.ModularMask` takes."""
        options = dict(self.mask)
        options["base"] = -math.inf if options["base"] is None else options["base"]
        if options.get("prior") is not None:
            options["prior"] = torch.tensor(options["prior"], dtype=torch.get_default_dtype())
        return options

    def values(self) -> dict:
        """The settings as plain values, for a JSON file."""
        return dataclasses.asdict(self)

    def to_dict(self) -> dict:
        """The settings as plain values, for ``config.text_config.moda`` of a model that is to be made or switched on.

        From then on in this process, models of the families apply what their configs hold where their attention is
        "moda".
        """
        from moda_ext.integrations.transformers.models import apply_settings_in_configs

        apply_settings_in_configs()
        return self.values()

    @classmethod
    def from_dict(cls, settings: dict) -> MODAConfig:
        """What :meth:`to_dict` gave."""
        return cls(**settings)
