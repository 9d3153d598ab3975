"""What is trained, on what and how: a YAML file, checked before anything is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from moda_ext.integrations.settings import MODAConfig

__all__ = ["Lora", "Recipe", "Source", "Stage", "read_recipe"]

PARTS = ("text", "vision", "projector", "moda")
DTYPES = ("float32", "bfloat16")
AUTOCAST = ("bf16", "none")
UNFINISHED = "unfinished"  # a folder for what is being written: a killed process leaves nothing elsewhere
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


@dataclasses.dataclass(frozen=True)
class Source:
    """Conversations to train on.

    Attributes:
        path: a file in LLaVA's format, see :mod:`moda_ext.conversations`; or None.
        dataset: instead, the name of a Hugging Face dataset or a folder of one, whose rows hold ``conversations`` and
            ``image`` or ``images``. Needs the package ``datasets``.
        split: of the dataset.
        images: the folder of the images; by default that of ``path``.
        fraction: how much of it to use, drawn by the recipe's seed.
        repeat: how often an epoch goes through it.
    """

    path: str | None = None
    dataset: str | None = None
    split: str = "train"
    images: str | None = None
    fraction: float = 1.0
    repeat: int = 1

    def check(self, key: str) -> None:
        _require((self.path is None) != (self.dataset is None), key, "must have a path or a dataset", self)
        _require(0 < self.fraction <= 1, f"{key}.fraction", "must lie between 0 and 1", self.fraction)
        _require(self.repeat >= 1, f"{key}.repeat", "must be at least 1", self.repeat)
        for name, path in (("path", self.path), ("images", self.images)):
            if path is not None and not Path(path).exists():
                raise FileNotFoundError(f"recipe: {key}.{name}: there is no {path}")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adaptation of the language model (arXiv 2106.09685), through PEFT.

    Attributes:
        r: rank.
        alpha: the update is scaled by alpha / r.
        dropout: of the update's input.
        target_modules: the names of the linear maps that get an update, in every layer.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] = dataclasses.field(default_factory=lambda: ["q_proj", "v_proj", "o_proj", "up_proj"])

    def check(self, key: str) -> None:
        _require(self.r >= 1, f"{key}.r", "must be at least 1", self.r)
        _require(0 <= self.dropout < 1, f"{key}.dropout", "must be at least 0 and below 1", self.dropout)
        _require(bool(self.target_modules), f"{key}.target_modules", "must name a module", self.target_modules)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One run of the optimiser, AdamW.

    Attributes:
        name: of its folder below the output.
        train: which parts: ``"text"``, ``"vision"``, ``"projector"`` and ``"moda"``.
        lora: low-rank updates of the language model, instead of ``"text"``. At the stage's end they are merged into
            its weights, which are float32 from then on.
        lr: learning rate of the language model or its updates.
        vision_lr: of the vision tower.
        projector_lr: by default ``lr``.
        moda_lr: of MODA's low-rank maps, by default ``lr``.
        fast_lr: of MODA's gates, priors and pseudo scores, see
            :func:`moda_ext.integrations.transformers.optimizer_groups`.
        balance: the weight of :class:`moda_ext.diagnostics.AttentionBalanceLoss`, mean over layers; 0 for none.
        epochs: how often to go through the data.
        steps: of the optimiser, instead of ``epochs``.
        batch_size: conversations in a forward pass of a process.
        gradient_accumulation: forward passes of a process in a step.
        warmup: the share of the steps in which the learning rates rise from 0; none of a single step, and none where
            the schedule is ``"constant"``.
        schedule: of the learning rates: ``"cosine"``, ``"linear"``, ``"constant"`` or ``"constant_with_warmup"``.
        weight_decay: of everything but MODA's fast parameters.
        max_grad_norm: to which gradients are scaled down.
        betas: of AdamW.
        gradient_checkpointing: compute layers again in the backward pass instead of keeping them.
        autocast: ``"bf16"``, or ``"none"``, for which all weights must be float32.
        max_length: tokens of a conversation, of which more are an error; None for no limit.
        workers: processes that load images.
        save_every: steps between checkpoints to resume from; 0 for none but the stage's end.
        log_every: steps between entries of the log.
        deficit_every: steps between measurements of AvgDiff and MDI; 0 for none.
        data: the stage's own, instead of the recipe's.
    """

    name: str
    train: list[str]
    lora: Lora | None = None
    lr: float = 2e-5
    vision_lr: float = 2e-6
    projector_lr: float | None = None
    moda_lr: float | None = None
    fast_lr: float = 1e-2
    balance: float = 0.0
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 1
    gradient_accumulation: int = 1
    warmup: float = 0.03
    schedule: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.999])
    gradient_checkpointing: bool = False
    autocast: str = "bf16"
    max_length: int | None = None
    workers: int = 0
    save_every: int = 500
    log_every: int = 10
    deficit_every: int = 0
    data: list[Source] | None = None

    @property
    def trains_language(self) -> bool:
        """Whether it trains anything that text alone goes through."""
        return self.lora is not None or bool({"text", "moda"} & set(self.train))

    def check(self, key: str) -> None:
        """Raises what :func:`read_recipe` raises; ``key`` is the stage's place in the recipe."""
        right = bool(re.fullmatch(r"[\w-]+", self.name)) and self.name != UNFINISHED
        must = f"must be a folder's name, of letters, digits, _ and -, and not {UNFINISHED}"
        _require(right, f"{key}.name", must, self.name)
        wrong = [part for part in self.train if part not in PARTS]
        _require(not wrong, f"{key}.train", f"must be a list of {', '.join(PARTS)}", self.train)
        _require(bool(self.train or self.lora), f"{key}.train", "must name a part, as there is no lora", self.train)
        alone = self.lora is None or "text" not in self.train
        _require(alone, f"{key}.train", "must not have text, which has lora", self.train)
        for name in ("lr", "vision_lr", "projector_lr", "moda_lr", "fast_lr", "balance", "weight_decay"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"{key}.{name}", "must not be negative", value)
        for name in ("epochs", "steps", "max_grad_norm", "max_length"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{key}.{name}", "must be positive", value)
        for name in ("batch_size", "gradient_accumulation", "log_every"):
            _require(getattr(self, name) >= 1, f"{key}.{name}", "must be at least 1", getattr(self, name))
        for name in ("workers", "save_every", "deficit_every"):
            _require(getattr(self, name) >= 0, f"{key}.{name}", "must not be negative", getattr(self, name))
        _require(0 <= self.warmup < 1, f"{key}.warmup", "must be at least 0 and below 1", self.warmup)
        right = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(right, f"{key}.betas", "must be two numbers, at least 0 and below 1", self.betas)
        known = self.schedule in SCHEDULES
        _require(known, f"{key}.schedule", f"must be one of {', '.join(SCHEDULES)}", self.schedule)
        _require(self.autocast in AUTOCAST, f"{key}.autocast", f"must be one of {', '.join(AUTOCAST)}", self.autocast)
        if self.lora is not None:
            self.lora.check(f"{key}.lora")
        for i, source in enumerate(self.data or []):
            source.check(f"{key}.data.{i}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a checkpoint is made of another one.

    Attributes:
        model: a checkpoint directory, or an id on the Hugging Face hub.
        output: where the new checkpoint goes, and below it a folder for each stage.
        stages: one after another.
        data: of the stages that have none of their own.
        moda: settings of MODA (:class:`moda_ext.integrations.transformers.MODAConfig`), which the model gets first;
            None to leave the model as it is.
        dtype: of frozen weights, and the one that the new checkpoint is loaded with. Those that are trained are
            float32, and are stored so.
        seed: of the order of the data, of new weights and of dropout.
    """

    model: str
    output: str
    stages: list[Stage]
    data: list[Source] = dataclasses.field(default_factory=list)
    moda: dict | None = None
    dtype: str = "bfloat16"
    seed: int = 0

    def check(self) -> None:
        """Raises what :func:`read_recipe` raises."""
        if not Path(self.model).is_dir() and (self.model.count("/") != 1 or self.model.startswith((".", "/", "~"))):
            raise FileNotFoundError(f"recipe: model: there is no directory {self.model}, and it is no id on the hub")
        _require(self.dtype in DTYPES, "dtype", f"must be one of {', '.join(DTYPES)}", self.dtype)
        _require(bool(self.stages), "stages", "must not be empty", self.stages)
        names = [stage.name for stage in self.stages]
        _require(len(set(names)) == len(names), "stages", "must have different names", names)
        if self.moda is not None:
            try:
                MODAConfig(**self.moda)
            except (TypeError, ValueError) as error:
                raise ValueError(f"recipe: moda: {error}") from error
        for i, source in enumerate(self.data):
            source.check(f"data.{i}")
        for stage in self.stages:
            key = f"stages.{stage.name}"
            stage.check(key)
            _require(bool(self.data or stage.data), f"{key}.data", "must not be empty, as the recipe has no data", [])
            fits = stage.autocast == "bf16" or self.dtype == "float32"
            _require(fits, f"{key}.autocast", f"must be bf16, as dtype is {self.dtype}", stage.autocast)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of a YAML file.

    Args:
        path: the file.
        overrides: ``key=value`` with a dotted key and a YAML value, such as ``stages.instruct.lr=1e-4``. A member of a
            list goes by its name or by its number, from 0.

    Raises:
        FileNotFoundError: there is no such file, or none of those that it names.
        ValueError: what is not YAML, unknown, of a wrong type or out of range, by its dotted key.
        ImportError: pyyaml is not installed.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals:
                raise ValueError(f"recipe: an override must be key=value, got {override!r}")
            _put(values, key, yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise ValueError(f"recipe: {path} or an override is not YAML: {error}") from error
    recipe = parse(Recipe, values, "")
    recipe.check()
    return recipe


def _put(values: Any, key: str, value: Any) -> None:
    *places, last = key.split(".")
    for depth, place in enumerate(places):
        below = ".".join(places[: depth + 1])
        if isinstance(values, list):
            values = values[_member(values, place, below)]
        elif isinstance(values, dict):
            if values.get(place) is None:
                values[place] = {}
            values = values[place]
    if isinstance(values, list):
        values[_member(values, last, key)] = value
    elif isinstance(values, dict):
        values[last] = value
    else:
        raise ValueError(f"recipe: {key}: there is nothing of that kind in the recipe")


def _member(values: list, name: str, key: str) -> int:
    for i, member in enumerate(values):
        if name == str(i) or (isinstance(member, dict) and member.get("name") == name):
            return i
    raise ValueError(f"recipe: {key}: there is no {name}")


Made = TypeVar("Made")


def parse(kind: type[Made], values: Any, key: str) -> Made:
    """An object of a dataclass from plain values, whose place in the recipe is ``key``."""
    if not isinstance(values, Mapping):
        raise ValueError(f"recipe: {key or 'the file'} must be a mapping, got {values!r}")
    hints = typing.get_type_hints(kind)
    prefix = f"{key}." if key else ""
    for name in values:
        if name not in hints:
            raise ValueError(f"recipe: {prefix}{name} is unknown; known are {', '.join(hints)}")
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]  # a dataclass
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in values:
            raise ValueError(f"recipe: {prefix}{field.name} is missing")
    return kind(**{name: _convert(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, key: str) -> Any:
    """``value`` as what a dataclass's field is annotated with."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is list:
        (member,) = typing.get_args(hint)
        if not isinstance(value, list):
            raise ValueError(f"recipe: {key} must be a list, got {value!r}")
        return [_convert(member, item, f"{key}.{_name(item, i)}") for i, item in enumerate(value)]
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, key)  # type: ignore[arg-type]  # a class
    if hint is float and isinstance(value, str):  # YAML takes 1e-3, without a point, for a string
        with contextlib.suppress(ValueError):  # said below
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value) and hint is float:
        raise ValueError(f"recipe: {key} must be a finite number, got {value}")
    if type(value) is not hint:
        raise ValueError(f"recipe: {key} must be {hint.__name__}, got {value!r}")
    return value


def _name(item: Any, index: int) -> str:
    return str(item.get("name", index)) if isinstance(item, Mapping) else str(index)


def differing_keys(one: Any, other: Any, key: str = "") -> list[str]:
    """The dotted keys whose values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        members = [(name, one.get(name), other.get(name)) for name in {**one, **other}]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        members = [(_name(a, i), a, b) for i, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        return [] if one == other else [key]
    return [found for name, a, b in members for found in differing_keys(a, b, f"{key}.{name}" if key else str(name))]


def _require(right: bool, key: str, must: str, value: Any) -> None:
    if not right:
        raise ValueError(f"recipe: {key} {must}, got {value!r}")
