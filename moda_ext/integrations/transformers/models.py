"""The model families, and how MODA gets into a model and out of a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from moda_ext.integrations.recording import Recorder
from moda_ext.integrations.transformers.attention import NAME, MODAAttention
from moda_ext.integrations.transformers.config import MODAConfig
from moda_ext.integrations.transformers.hooks import BaseModelHook, TextStackHook, cache_argument, token_modalities
from moda_ext.integrations.transformers.proof import TINY, prove
from moda_ext.integrations.transformers.versions import beyond_tested, versions

__all__ = ["FAMILIES", "apply_moda", "attention_modules", "check_identity", "recording", "text_stack"]

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
SUFFIX = "_moda"


class MODAModelMixin:
    """What the generated ``...MODAForConditionalGeneration`` classes add to their families' classes."""

    def __init__(self, config, *args, **kwargs):
        requested = config.text_config._attn_implementation
        super().__init__(config, *args, **kwargs)
        settings = _settings(config) or MODAConfig()
        config.text_config.moda = settings.values()
        _attach(self, *_prepare(self, settings))
        if requested not in (None, NAME):
            self.set_attn_implementation({"text_config": requested})

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        chosen = self.config.text_config._attn_implementation
        if chosen != NAME:
            warnings.warn(
                f"set_attn_implementation({attn_implementation!r}) switches MODA off: the text stack now runs plain "
                f"{chosen!r} attention and its MODA parameters have no effect. Switch it on again with "
                f"set_attn_implementation({{'text_config': '{NAME}'}})",
                stacklevel=2,
            )

    def init_continuous_batching(self, *args, **kwargs):
        if self.config.text_config._attn_implementation == NAME:
            raise NotImplementedError(
                "MODA has no continuous batching (generate_batch) yet: its paged cache keeps no modalities and no "
                "Gram. Use generate(), or switch MODA off with set_attn_implementation('sdpa')"
            )
        return super().init_continuous_batching(*args, **kwargs)

    def _initialize_missing_keys(self, *args, **kwargs):
        super()._initialize_missing_keys(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, MODAAttention):
                module.reset_parameters()


def _make_classes(model_type: str, base_model: type[PreTrainedModel]) -> tuple[type, type]:
    """The config and model class of one family with MODA, known to the Auto classes."""
    prefix = FAMILIES[model_type]
    config_class = type(
        f"{prefix}MODAConfig",
        (base_model.config_class,),
        {"model_type": model_type + SUFFIX, "__module__": __name__, "__doc__": f"{prefix}Config of a model with MODA."},
    )
    model_class = type(
        f"{prefix}MODAForConditionalGeneration",
        (MODAModelMixin, base_model),
        {
            "config_class": config_class,
            "__module__": __name__,
            "__doc__": f"{prefix}ForConditionalGeneration whose text stack has MODA, see ``apply_moda``.",
        },
    )
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForImageTextToText.register(config_class, model_class)
    AutoModelForMultimodalLM.register(config_class, model_class)
    # Without it weights under the names of older checkpoints, such as lm_head, would come out random. By class too: a
    # config that is read from a checkpoint without MODA keeps that one's model type.
    mapping = get_checkpoint_conversion_mapping(base_model.__name__) or get_checkpoint_conversion_mapping(model_type)
    if mapping is not None:
        register_checkpoint_conversion_mapping(config_class.model_type, mapping)
        register_checkpoint_conversion_mapping(model_class.__name__, mapping)
    return config_class, model_class


def _find_models() -> tuple[dict[str, type[PreTrainedModel]], dict[str, str]]:
    """The families that this Transformers has, and why it lacks the others: these cost themselves only."""
    models, missing = {}, {}
    for model_type, prefix in FAMILIES.items():
        try:
            models[model_type] = getattr(transformers, f"{prefix}ForConditionalGeneration")
        except (AttributeError, ImportError) as error:
            missing[model_type] = str(error)
    return models, missing


_MODELS, _MISSING = _find_models()
_CLASSES = {model_type: _make_classes(model_type, base_model) for model_type, base_model in _MODELS.items()}
_PROVEN: set[str] = set()


def __getattr__(name: str) -> type:
    """The generated classes, which pickle looks up here by their names."""
    for made in _CLASSES.values():
        for generated in made:
            if generated.__name__ == name:
                return generated
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def apply_settings_in_configs() -> None:
    """Lets plain classes apply the settings in their config as soon as their text stack's attention is "moda".

    An attention function sees one layer. Where a model gets its attention is the only place that sees the token ids
    too, and Transformers lets nobody else in there: so the methods of its classes are wrapped. That happens when the
    first settings are made for a config (:meth:`MODAConfig.to_dict`) and not before.
    """
    for model_class in _MODELS.values():
        for method in ("__init__", "set_attn_implementation"):
            _apply_settings_after(model_class, method)


def _apply_settings_after(model_class: type, method: str) -> None:
    original = getattr(model_class, method)

    @functools.wraps(original)
    def wrapped(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if type(self) is model_class and self.config.text_config._attn_implementation == NAME:
            settings = _settings(self.config)
            if settings is not None:
                apply_moda(self, settings)
        return result

    setattr(model_class, method, wrapped)


def _prove(family: str) -> None:
    """With a Transformers that came later than the tested ones: raises RuntimeError unless MODA works with it."""
    if family in _PROVEN or not beyond_tested():
        return
    _PROVEN.add(family)  # first: the proof uses what asks for it
    try:
        make = functools.partial(AutoConfig.for_model, family, **TINY[family])
        prove(family, lambda: _MODELS[family](make()), apply_moda, recording)
    except BaseException:
        _PROVEN.discard(family)
        raise


def apply_moda(model: PreTrainedModel, config: MODAConfig | None = None) -> PreTrainedModel:
    """Puts MODA into the text stack of a loaded vision-language model, in place.

    The model keeps its weights and gets the family's MODA class: ``save_pretrained`` saves MODA with it, and
    ``AutoModelForImageTextToText.from_pretrained`` loads it again where this module is imported. With the default
    settings the logits stay as they were (see :func:`check_identity`).

    Args:
        model: a ``...ForConditionalGeneration`` model of one of the families in ``FAMILIES``. Wrap it with PEFT
            afterwards.
        config: the settings, by default those in ``model.config.text_config.moda`` if any, else ``MODAConfig()``.

    Returns:
        ``model``.

    Raises:
        ValueError: a model of another family, one that has MODA, or layers that cannot have it, such as those with a
            sliding window (the Gram of a window would have to forget).
        RuntimeError: with a Transformers that came later than the tested ones: MODA does not work with it.

    Example:
        >>> from transformers import AutoModelForImageTextToText
        >>> model = AutoModelForImageTextToText.from_pretrained("llava-hf/llava-1.5-7b-hf")  # doctest: +SKIP
        >>> apply_moda(model, MODAConfig(aligner={"rank": 16}))  # doctest: +SKIP
    """
    if isinstance(model, MODAModelMixin):
        raise ValueError("apply_moda: this model has MODA already")
    family = _family(model, "apply_moda")
    config_class, model_class = _CLASSES[family]
    if type(model) is not _MODELS[family]:
        raise ValueError(
            f"apply_moda: model must be a {_MODELS[family].__name__}, got {type(model).__name__}"
            + ("; apply MODA first, then PEFT" if hasattr(model, "peft_config") else "")
        )
    if config is None:
        config = _settings(model.config) or MODAConfig()
    _prove(family)
    modules, hooks = _prepare(model, config)  # raises before anything changes
    model.config.text_config.moda = config.values()
    model.config.__class__, model.__class__ = config_class, model_class
    _attach(model, modules, hooks)
    return model


def text_stack(model: nn.Module) -> nn.Module:
    """The decoder of a vision-language model, also of one wrapped by PEFT."""
    return _pretrained(model, "text_stack").get_decoder()


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """``self_attn`` of every layer of the text stack."""
    return [layer.self_attn for layer in text_stack(model).layers]


@contextlib.contextmanager
def recording(model: nn.Module, recorder: Recorder, modalities: dict[str, int] | None = None):
    """Calls ``recorder`` after every attention call of the text stack, within a ``with`` block.

    A model without MODA runs the attention "moda" in its plain form meanwhile, which equals ``sdpa``, and is as it was
    afterwards. Sliding-window and bidirectional layers are recorded too, by N x N scores.

    Args:
        model: a model of one of the ``FAMILIES``, with MODA or without, also wrapped by PEFT.
        recorder: called with an :class:`moda_ext.integrations.recording.AttentionRecord`.
        modalities: as in :class:`MODAConfig`, for a model without MODA.

    Raises:
        ValueError: a model of another family, or one that is recorded already.
        RuntimeError: with a Transformers that came later than the tested ones: recording does not work with it.
    """
    inner = _pretrained(model, "recording")
    _prove(_family(inner, "recording"))
    modules, text_config = attention_modules(inner), inner.config.text_config
    if any(hasattr(module, "moda_recorder") for module in modules):
        raise ValueError("recording: this model is being recorded already")
    handles, before, settings = [], text_config._attn_implementation, getattr(text_config, "moda", None)
    if isinstance(inner, MODAModelMixin):
        if modalities is not None:
            raise ValueError("recording: modalities belong to a model without MODA; this one has its own")
        if before != NAME:
            raise ValueError(f"recording: MODA is off, the text stack runs {before!r} attention")
    try:
        if not isinstance(inner, MODAModelMixin):
            plain = MODAConfig.plain() if modalities is None else MODAConfig.plain(modalities=modalities)
            handles = _register(_hooks(inner, plain.modalities))
            text_config.moda = plain.values()
            PreTrainedModel.set_attn_implementation(inner, {"text_config": NAME})
        for module in modules:
            module.__dict__["moda_recorder"] = recorder  # not by setattr: a recorder may be a module itself
        yield
    finally:
        for module in modules:
            module.__dict__.pop("moda_recorder", None)
        for handle in handles:
            handle.remove()
        if handles:
            PreTrainedModel.set_attn_implementation(inner, {"text_config": before})
            if settings is None:
                del text_config.moda
            else:
                text_config.moda = settings


@torch.no_grad()
def check_identity(model: nn.Module, inputs: dict, tolerance: float = 1e-5) -> float:
    """Compares a model's logits with those of plain ``sdpa`` attention, to make sure that attaching MODA moved nothing.

    Args:
        model: a model with MODA.
        inputs: arguments of its ``forward``, as a processor gives them. Padding is left out of the comparison.
        tolerance: the largest difference that passes, relative to the largest logit.

    Returns:
        The largest difference found, relative to the largest logit.

    Raises:
        ValueError: a larger one: MODA changes this model, because it is trained, or its prior or pseudo scores are on.
    """
    inner = _pretrained(model, "check_identity")
    if not isinstance(inner, MODAModelMixin):
        raise ValueError("check_identity: this model has no MODA")
    before = inner.config.text_config._attn_implementation
    logits = []
    try:
        for implementation in (NAME, "sdpa"):
            PreTrainedModel.set_attn_implementation(inner, {"text_config": implementation})  # without the warning
            logits.append(model(**inputs, use_cache=False).logits.float())
    finally:
        PreTrainedModel.set_attn_implementation(inner, {"text_config": before})
    with_moda, plain = logits
    mask = inputs.get("attention_mask")
    if mask is not None:
        with_moda, plain = with_moda[mask != 0], plain[mask != 0]
    difference = ((with_moda - plain).abs().max() / plain.abs().max()).item()
    if not difference <= tolerance:
        raise ValueError(
            f"check_identity: MODA moves this model's logits by {difference:.3g} of the largest one, more than "
            f"{tolerance:.3g}"
        )
    return difference


def _settings(config) -> MODAConfig | None:
    """Those in a model's config."""
    settings = getattr(config.text_config, "moda", None)
    return None if settings is None else MODAConfig.from_dict(settings)


def _prepare(model: PreTrainedModel, config: MODAConfig) -> tuple[dict[int, MODAAttention], list]:
    """The module of each layer that gets one, and the hooks of :func:`_hooks`."""
    layers, modules = _check_layers(model, config), {}
    if config.mode == "release" or config.aligner is not None or config.mask is not None:
        for attention in attention_modules(model):
            if attention.layer_idx in layers:
                weight = attention.q_proj.weight
                dtype = weight.dtype if weight.is_floating_point() else model.dtype  # quantised
                moda = MODAAttention(config, attention.config.num_attention_heads, attention.head_dim)
                modules[attention.layer_idx] = moda.to(weight.device, dtype)
    return modules, _hooks(model, config.modalities)


def _attach(model: PreTrainedModel, modules: dict[int, MODAAttention], hooks: list) -> None:
    for attention in attention_modules(model):
        if attention.layer_idx in modules:
            attention.moda = modules[attention.layer_idx]
    # A checkpoint without MODA lacks nothing that the settings give.
    fixed = (re.escape(name) for name, _ in model.named_buffers() if ".moda." in name)
    model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *fixed}
    _register(hooks)
    PreTrainedModel.set_attn_implementation(model, {"text_config": NAME})


def _hooks(model: PreTrainedModel, modalities: dict[str, int]) -> list:
    """Pairs of a module and its forward pre-hook."""
    tokens, num_modalities = token_modalities(model.config, modalities), len(set(modalities.values()))
    stack = text_stack(model)
    stack_hook = TextStackHook(tokens, num_modalities, cache_argument(type(stack)))
    return [(model.base_model, BaseModelHook(tokens)), (stack, stack_hook)]


def _register(hooks: list) -> list:
    return [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]


def _check_layers(model: PreTrainedModel, config: MODAConfig) -> list[int]:
    """Indices of the layers that get MODA."""
    text_config = model.config.text_config
    count = text_config.num_hidden_layers
    types = getattr(text_config, "layer_types", None)
    if types is None:
        sliding = getattr(text_config, "sliding_window", None) is not None
        types = ["sliding_attention" if sliding else "full_attention"] * count
    full = [index for index, kind in enumerate(types) if kind == "full_attention"]
    layers = full if config.layers is None else config.layers
    wrong = [index for index in layers if index not in full]
    if wrong or not layers:
        raise ValueError(
            f"apply_moda: layers {wrong if wrong else 'of this model'} cannot have MODA: they are not full-attention "
            f"layers of a text stack with {count} (those are {full}). The Gram of a sliding window would have to "
            "forget keys; if your sequences are shorter than the window, set text_config.sliding_window=None"
        )
    return layers


def _family(model: nn.Module, caller: str) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    family = model_type.removesuffix(SUFFIX)
    if family in _MISSING:
        raise ValueError(
            f"{caller}: the family {family!r} is not in this Transformers {versions()}: {_MISSING[family]}"
        )
    if family not in _MODELS:
        raise ValueError(f"{caller}: unknown model family {model_type!r}; known are {', '.join(_MODELS)}")
    return family


def _pretrained(model: nn.Module, caller: str) -> PreTrainedModel:
    """The Transformers model itself, inside of what wraps it."""
    _family(model, caller)
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))
