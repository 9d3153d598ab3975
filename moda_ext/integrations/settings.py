"""Settings of MODA in a vision-language model, and what its config says of it: for every integration.

Nothing here needs the library that runs the model.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moda_ext.nn.aligner import DuplexAligner
from moda_ext.nn.mask import CONDITIONAL, VARIANTS, ModularMask

__all__ = ["FAMILIES", "SUFFIX", "MODAConfig", "modality_names", "placeholder", "token_modalities"]

# model type: prefix of the classes' names
FAMILIES = {
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "llava_onevision": "LlavaOnevision",
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "gemma3": "Gemma3",
    "internvl": "InternVL",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
}
SUFFIX = "_moda"  # of the model type of a family with MODA
TOKEN_ID_NAMES = {
    "image": ("image_token_id", "image_token_index"),
    "video": ("video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index"),
}

MODES = ("moda", "release")
DEFAULT_MODALITIES = {"text": 0, "image": 1, "video": 1}
CAN_BE_OFF = ("prior", "base")  # the options of a mask that may hold -inf
NUMBERS = (*CAN_BE_OFF, "decay", "length", "rank", "layers", "modalities")

PSEUDO_SCORES_ARE_OFF = (
    "the weights have a base of pseudo scores, which the model's settings switch off (mask={'base': None}); give the "
    "model the settings that it was saved with"
)


@dataclasses.dataclass
class MODAConfig:
    """Settings of MODA in a Transformers model, saved with it in ``config.text_config.moda``.

    A model with the default settings computes what it computed before, until it is trained: aligner and prior start at
    0 and the pseudo scores are off. Tensors, arrays, tuples and NumPy's numbers become lists and numbers here, as a
    JSON file can hold them.

    Args:
        modalities: the modality of each kind of token: 0 of ``"text"``, and from 1 of ``"image"``, ``"video"`` and
            ``"audio"`` where the family has such tokens; kinds may share one. By default image and video are 1 (the
            paper's two modalities).
        aligner: keyword arguments of :class:`moda_ext.alignment.DuplexAligner` (``fusion``, ``rank``, ``key_norm``,
            ``normalize``), or None for no aligner. The scope is causal.
        mask: keyword arguments of :class:`moda_ext.mask.ModularMask` (``variant``, ``decay``, ``length``, ``base``,
            ``learn_decay``, ``learn_base``, ``softmax``, ``prior``, ``learn_prior``), or None for plain attention. Here
            ``base`` is None by default, which switches the pseudo scores off; start pretrained models that are to learn
            it with ``{"base": -10.0, "learn_base": True}``. ``prior`` may be nested lists; -inf hides.
        layers: indices of the layers that get MODA; None for all that have full attention.
        mode: ``"moda"``, or ``"release"``: the alignment of the authors' release, for its checkpoints and for
            comparison only (see :mod:`moda_ext.release`); aligner and mask must be None.

    Raises:
        ValueError: settings that do not go together, an unknown option, NaN, or an infinity that is not the -inf of a
            prior or a base.
        TypeError: a value that is no number, string, list or dict, nor becomes one; when the model gets MODA, an
            unknown keyword of the aligner or the mask.

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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, _plain(field.name, getattr(self, field.name)))
        ids = set(self.modalities.values())
        if self.modalities.get("text") != 0 or ids != set(range(len(ids))):
            raise ValueError(
                "MODAConfig: modalities must number the kinds of token from 0, which is 'text': what is no "
                f"placeholder of another kind; got {self.modalities}"
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
            if self.mask["base"] == -math.inf:
                self.mask["base"] = None  # one way to say it
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
        if self.layers is not None:
            self.layers = sorted(set(self.layers))

    @classmethod
    def plain(cls, **settings: Any) -> MODAConfig:
        """Plain attention with no weights of ours, equal to ``sdpa``: for measuring."""
        return cls(aligner=None, mask=None, **settings)

    @classmethod
    def fixed_prior(cls, prior: Tensor | Sequence, **settings: Any) -> MODAConfig:
        """Rebalancing without training: a fixed prior and no parameters.

        Args:
            prior: broadcastable to (H, M, M), natural logarithm: what is added to the scores of head h, a query of
                modality a and a key of modality m. -inf hides.
        """
        return cls(aligner=None, mask={"variant": "fix", "prior": prior}, **settings)

    @property
    def num_modalities(self) -> int:
        """M."""
        return len(set(self.modalities.values()))

    def mask_options(self) -> dict:
        """What :class:`moda_ext.mask.ModularMask` takes."""
        assert self.mask is not None, "asked for where there is a mask"
        options = dict(self.mask)
        options["base"] = -math.inf if options["base"] is None else options["base"]
        if options.get("prior") is not None:
            options["prior"] = torch.tensor(options["prior"], dtype=torch.get_default_dtype())
        return options

    def make_aligner(self, head_dim: int) -> DuplexAligner | None:
        """A new aligner of one layer, None for none."""
        return None if self.aligner is None else DuplexAligner(head_dim, self.num_modalities, **self.aligner)

    def make_mask(self, num_heads: int) -> ModularMask | None:
        """A new mask of one layer, None for none."""
        return None if self.mask is None else ModularMask(num_heads, self.num_modalities, **self.mask_options())

    def values(self) -> dict:
        """The settings as plain values. Infinities are floats: Transformers writes them to ``config.json`` in a form of
        its own."""
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

    def to_json(self) -> str:
        """JSON that any reader takes: it has no infinities, they are the string "-inf"."""
        return json.dumps(_map_numbers(self.to_dict(), lambda x: "-inf" if x == -math.inf else x), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> MODAConfig:
        """What :meth:`to_json` gave."""
        return cls.from_dict(_map_numbers(json.loads(text), lambda x: -math.inf if x == "-inf" else x))


def _map_numbers(value: Any, function: Callable[[Any], Any]) -> Any:
    """``value`` with every number and string in its lists and dicts mapped."""
    if isinstance(value, dict):
        return {key: _map_numbers(item, function) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_numbers(item, function) for item in value]
    return function(value)


def _plain(name: str, value: Any) -> Any:
    """``value`` as numbers, strings, lists and dicts; ``name`` is its path in the settings, for errors."""
    if hasattr(value, "tolist"):  # tensors, arrays, NumPy's numbers
        value = value.tolist()
    path = name.replace("[", ".").split(".")
    if isinstance(value, bool | int | None) or (isinstance(value, str) and not any(part in NUMBERS for part in path)):
        return value
    if isinstance(value, float):
        option = next((part for part in path if part in CAN_BE_OFF), None)
        if math.isnan(value) or (math.isinf(value) and not (value < 0 and option)):
            raise ValueError(
                f"MODAConfig: {name} must be a finite number{', or -inf' * (option is not None)}, got {value}"
            )
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(f"{name}[{index}]", item) for index, item in enumerate(value)]
    raise TypeError(
        f"MODAConfig: {name} must be a number, a string, or a list, array or tensor of them, got {type(value).__name__}"
    )


def modality_names(modalities: dict[str, int]) -> tuple[str, ...]:
    """A name for each modality, by number: its kinds of token."""
    kinds = [[kind for kind, number in modalities.items() if number == m] for m in sorted(set(modalities.values()))]
    return tuple("vision" if kind == ["image", "video"] else "/".join(kind) for kind in kinds)


def placeholder(config: object, kind: str) -> int | None:
    """The id of a config's placeholder token of a kind ("image", ...), or None for a model that has no such tokens."""
    names = TOKEN_ID_NAMES[kind]
    return next((int(value) for name in names if (value := getattr(config, name, None)) is not None), None)


def token_modalities(config: Any, modalities: dict[str, int]) -> dict[int, int]:
    """{token id: modality} of the placeholder tokens of a model's config. Every other token is text.

    Raises:
        ValueError: the model has a kind of token that ``modalities`` lacks.
    """
    result = {}
    for kind in TOKEN_ID_NAMES:
        token = placeholder(config, kind)
        if token is None:
            continue
        if kind not in modalities:
            raise ValueError(f"modalities must say what {kind!r} is, which {config.model_type} has; got {modalities}")
        result[token] = modalities[kind]
    return result
