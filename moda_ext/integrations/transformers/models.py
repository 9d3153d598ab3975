"""The model families, and how MODA gets into a model and out of a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from moda_ext._ops.limits import accumulation_dtype
from moda_ext.integrations.recording import Recorder, refuse_replicas
from moda_ext.integrations.settings import FAMILIES, SUFFIX, MODAConfig, token_modalities
from moda_ext.integrations.transformers.attention import NAME, MODAAttention
from moda_ext.integrations.transformers.engines import (
    head_mesh,
    make_replicas_equal,
    refuse_sharded_weights,
    split_over_model,
)
from moda_ext.integrations.transformers.hooks import BaseModelHook, TextStackHook, cache_argument
from moda_ext.integrations.transformers.parts import SelfAttention, TextStack
from moda_ext.integrations.transformers.proof import TINY, prove
from moda_ext.integrations.transformers.versions import beyond_tested, versions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from moda_ext.integrations.transformers.parts import GenerativeModel

__all__ = ["FAMILIES", "apply_moda", "attention_modules", "check_identity", "recording", "text_stack"]

COMPUTING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes that a layer computes in
# The Auto classes that know a family's class for generation know its MODA class too; AutoModel knows the base model.
AUTO_CLASSES = (
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForCausalLM",
    "AutoModelForPreTraining",
)


Model = TypeVar("Model", bound=nn.Module)
if TYPE_CHECKING:
    _Generative = GenerativeModel
else:
    _Generative = object


class MODAModelMixin(_Generative):
    """What the generated ``...MODAForConditionalGeneration`` and ``...MODAModel`` classes add to their families'."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        requested = config.text_config._attn_implementation
        super().__init__(config, *args, **kwargs)
        settings = _settings(config) or MODAConfig()
        config.text_config.moda = settings.values()
        _attach(self, *_prepare(self, settings))
        _switch(self, NAME)
        if requested not in (None, NAME):
            self.set_attn_implementation({"text_config": requested})

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        chosen = self.config.text_config._attn_implementation
        if chosen != NAME:
            warnings.warn(
                f"set_attn_implementation({attn_implementation!r}) switches MODA off: the text stack now runs plain "
                f"{chosen!r} attention and its MODA parameters have no effect. Switch it on again with "
                f"set_attn_implementation({{'text_config': '{NAME}'}})",
                stacklevel=2,
            )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        if self.config.text_config._attn_implementation == NAME:
            raise NotImplementedError(
                "MODA has no continuous batching (generate_batch) yet: its paged cache keeps no modalities and no "
                "Gram. Use generate(), or switch MODA off with set_attn_implementation('sdpa')"
            )
        return super().init_continuous_batching(*args, **kwargs)

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> None:
        super()._initialize_missing_keys(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, MODAAttention):
                module.reset_parameters()
                make_replicas_equal(self, module)
                if module.mask is not None:
                    module.mask.take_infinities_out()  # of a checkpoint of before

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _rename_as_in_checkpoints(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _make_classes(model_type: str, base_model: type[PreTrainedModel]) -> tuple[type, type, type]:
    """The config, model and base model class of one family with MODA, known to the Auto classes."""
    prefix, base_config, moda_type = FAMILIES[model_type], base_model.config_class, model_type + SUFFIX
    assert base_config is not None, "every model has its config class"
    config_class = type(
        f"{prefix}MODAConfig",
        (base_config,),
        {"model_type": moda_type, "__module__": __name__, "__doc__": f"{prefix}Config of a model with MODA."},
    )
    AutoConfig.register(moda_type, config_class, exist_ok=True)  # the plugin for vLLM has some too
    model_class = _make_class(f"{prefix}MODAForConditionalGeneration", config_class, base_model)
    for name in AUTO_CLASSES:
        auto = getattr(transformers, name)
        if auto._model_mapping.get(base_config, None) is base_model:
            auto.register(config_class, model_class)
    base_class = _make_class(f"{prefix}MODAModel", config_class, getattr(transformers, f"{prefix}Model"))
    transformers.AutoModel.register(config_class, base_class)
    # By class too (see _make_class): a config that is read from a checkpoint without MODA keeps that one's model type.
    mapping = _conversion_mapping(base_model)
    if mapping is not None:
        register_checkpoint_conversion_mapping(moda_type, mapping)
    return config_class, model_class, base_class


def _make_class(name: str, config_class: type, plain_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    description = f"{plain_class.__name__} whose text stack has MODA, see ``apply_moda``."
    members = {"config_class": config_class, "__module__": __name__, "__doc__": description}
    model_class = type(name, (MODAModelMixin, plain_class), members)
    # Without it weights under the names of older checkpoints, such as lm_head, would come out random.
    mapping = _conversion_mapping(plain_class)
    if mapping is not None:
        register_checkpoint_conversion_mapping(name, mapping)
    return model_class


def _conversion_mapping(plain_class: type[PreTrainedModel]) -> list | None:
    by_class = get_checkpoint_conversion_mapping(plain_class.__name__)
    if by_class or plain_class.config_class is None:
        return by_class
    return get_checkpoint_conversion_mapping(plain_class.config_class.model_type)


def _rename_as_in_checkpoints(model: PreTrainedModel, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Gives the weights of a checkpoint the names that they have in the model, in place.

    ``save_pretrained`` writes the names of older releases of a family, which ``from_pretrained`` translates and
    ``load_state_dict`` does not: a Trainer that resumes would go on with the weights that the model has, and say so in
    a warning only.

    Raises:
        RuntimeError: there are weights of MODA for a layer that the model does not have, or that has no MODA.
    """
    own = {
        prefix + name: tensor
        for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    }
    unknown = [name for name in state_dict if name.startswith(prefix) and name not in own]
    if not unknown:
        return
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    names = {name.removeprefix(prefix): tensor for name, tensor in own.items()}
    for name in unknown:
        renamed, _ = rename_source_key(name.removeprefix(prefix), renamings, [], model.base_model_prefix, names)
        if prefix + renamed in own and prefix + renamed not in state_dict:
            state_dict[prefix + renamed] = state_dict.pop(name)
    places = {name.split(".moda.")[0] for name in own if ".moda." in name}
    lost = [n for n in state_dict if n.startswith(prefix) and ".moda." in n and n.split(".moda.")[0] not in places]
    if lost:
        raise RuntimeError(
            f"{type(model).__name__}.load_state_dict: the state dict has weights of MODA that would be lost, the model "
            f"has no MODA there: {', '.join(sorted(lost))}. Make the model with the settings of the checkpoint"
        )


def _find_models() -> tuple[dict[str, type[GenerativeModel]], dict[str, str]]:
    """The families that this Transformers has, and why it lacks the others: these cost themselves only."""
    models, missing = {}, {}
    for model_type, prefix in FAMILIES.items():
        try:
            getattr(transformers, f"{prefix}Model")
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
    def wrapped(self: GenerativeModel, *args: Any, **kwargs: Any) -> Any:
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


def apply_moda(model: Model, config: MODAConfig | None = None) -> Model:
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
        NotImplementedError: the model is sharded by FSDP already.
        RuntimeError: with a Transformers that came later than the tested ones: MODA does not work with it; or a text
            stack whose attention Transformers does not switch.

    Example:
        >>> from transformers import AutoModelForImageTextToText
        >>> model = AutoModelForImageTextToText.from_pretrained("llava-hf/llava-1.5-7b-hf")  # doctest: +SKIP
        >>> apply_moda(model, MODAConfig(aligner={"rank": 16}))  # doctest: +SKIP
    """
    if isinstance(model, MODAModelMixin):
        raise ValueError("apply_moda: this model has MODA already")
    inner = _pretrained(model, "apply_moda")
    family = _family(inner, "apply_moda")
    config_class, model_class, _ = _CLASSES[family]
    if type(model) is not _MODELS[family]:
        raise ValueError(
            f"apply_moda: model must be a {_MODELS[family].__name__}, got {type(model).__name__}"
            + (f" around a {type(inner).__name__}; apply MODA first, then wrap" if inner is not model else "")
        )
    refuse_sharded_weights(inner, "apply_moda")
    if config is None:
        config = _settings(inner.config) or MODAConfig()
    _prove(family)
    modules, hooks = _prepare(inner, config)  # raises before anything changes, and so does the next
    _switch(inner, NAME)
    inner.config.text_config.moda = config.values()
    inner.config.__class__, inner.__class__ = config_class, model_class
    _attach(inner, modules, hooks)
    return model


def text_stack(model: nn.Module) -> TextStack:
    """The decoder of a vision-language model, also of one inside of wrappers (PEFT, data parallelism, ...)."""
    return _pretrained(model, "text_stack").get_decoder()


def has_moda(model: nn.Module, caller: str) -> bool:
    """Whether ``apply_moda`` was called on the model, or on the one inside of wrappers."""
    return isinstance(_pretrained(model, caller), MODAModelMixin)


def attention_modules(model: nn.Module) -> list[SelfAttention]:
    """``self_attn`` of every layer of the text stack."""
    return [layer.self_attn for layer in text_stack(model).layers]


@contextlib.contextmanager
def recording(model: nn.Module, recorder: Recorder, modalities: dict[str, int] | None = None) -> Iterator[None]:
    """Calls ``recorder`` after every attention call of the text stack, within a ``with`` block.

    A model without MODA runs the attention "moda" in its plain form meanwhile, which equals ``sdpa``, and is as it was
    afterwards. Sliding-window and bidirectional layers are recorded too, by N x N scores.

    Args:
        model: a model of one of the ``FAMILIES``, with MODA or without, also inside of wrappers: PEFT, data
            parallelism, ``torch.compile``, averaging.
        recorder: called with an :class:`moda_ext.integrations.recording.AttentionRecord`.
        modalities: as in :class:`MODAConfig`, for a model without MODA.

    Raises:
        ValueError: a model of another family, or one that is recorded already.
        NotImplementedError: a model in ``DataParallel`` on several devices, which calls copies of it in threads.
        RuntimeError: with a Transformers that came later than the tested ones: recording does not work with it.
    """
    refuse_replicas(model)
    inner = _pretrained(model, "recording")
    _prove(_family(inner, "recording"))
    modules = attention_modules(inner)
    if any(hasattr(module, "moda_recorder") for module in modules):
        raise ValueError("recording: this model is being recorded already")
    mesh = head_mesh(inner, text_stack(inner))
    with knowing_modalities(inner, modalities, "recording"):
        try:
            for module in modules:
                # Not by setattr: a recorder may be a module itself.
                module.__dict__.update(moda_recorder=recorder, moda_head_mesh=mesh)
            yield
        finally:
            for module in modules:
                module.__dict__.pop("moda_recorder", None)
                module.__dict__.pop("moda_head_mesh", None)


@contextlib.contextmanager
def knowing_modalities(inner: PreTrainedModel, modalities: dict[str, int] | None, caller: str) -> Iterator[None]:
    """Every layer of the text stack runs the attention "moda" and gets a ``ModalityContext``, within a ``with`` block.

    A model without MODA runs it in its plain form meanwhile, and is as it was afterwards.

    Raises:
        ValueError: ``modalities`` for a model with MODA, or MODA is off.
    """
    text_config = inner.config.text_config
    before, settings = text_config._attn_implementation, getattr(text_config, "moda", None)
    if isinstance(inner, MODAModelMixin):
        if modalities is not None:
            raise ValueError(f"{caller}: modalities belong to a model without MODA; this one has its own")
        if before != NAME:
            raise ValueError(f"{caller}: MODA is off, the text stack runs {before!r} attention")
        yield
        return
    plain = MODAConfig.plain() if modalities is None else MODAConfig.plain(modalities=modalities)
    handles = _register(_hooks(inner, plain.modalities))
    try:
        text_config.moda = plain.values()
        _switch(inner, NAME)
        yield
    finally:
        for handle in handles:
            handle.remove()
        PreTrainedModel.set_attn_implementation(inner, {"text_config": before})
        if settings is None:
            del text_config.moda
        else:
            text_config.moda = settings


@torch.no_grad()
def check_identity(model: nn.Module, inputs: dict, tolerance: float | None = None, *, new_tokens: int = 4) -> float:
    """Compares a model's logits with those of plain ``sdpa`` attention, to make sure that attaching MODA moved nothing.

    The logits of one forward pass over ``inputs``, and those of the next ``new_tokens`` tokens as ``generate`` makes
    them with a cache: ``sdpa`` chooses them, greedily, and MODA is given the same. The model computes in evaluation
    mode meanwhile, and its generation settings have no part in it; all is as it was afterwards.

    Args:
        model: a model with MODA, also inside of wrappers.
        inputs: arguments of its ``forward``, as a processor gives them. Padding is left out of the comparison. Without
            ``input_ids``, with ``modality_ids`` or with a mask of pairs the forward pass is all, as ``generate`` takes
            no others.
        tolerance: the largest difference that passes, relative to the largest logit. By default what rounding explains:
            4 roundings of the logits' dtype (84 of float32, which is 1e-5, and of float64), or four times as much as
            ``eager`` and ``sdpa`` attention differ on this model and these inputs, if that is more.
        new_tokens: how many tokens to decode; 0 for none.

    Returns:
        The largest difference found, relative to the largest logit.

    Raises:
        ValueError: a larger one: MODA changes this model, because it is trained, or its prior or pseudo scores are on.
    """
    inner = _pretrained(model, "check_identity")
    if not isinstance(inner, MODAModelMixin):
        raise ValueError("check_identity: this model has no MODA")
    if not inner.can_generate():
        raise ValueError(
            f"check_identity: {type(inner).__name__} has no logits; check the model for generation that it belongs to"
        )
    # Sharded by FullyShardedDataParallel, a model has its weights in the wrapper's forward pass only. Other wrappers
    # may synchronise processes there, or run copies.
    fsdp = torch.distributed.is_available() and isinstance(model, torch.distributed.fsdp.FullyShardedDataParallel)
    pairs = inputs.get("attention_mask") is not None and inputs["attention_mask"].dim() != 2
    if fsdp or pairs or inputs.get("input_ids") is None or inputs.get("modality_ids") is not None:
        new_tokens = 0
    run = functools.partial(_logits, inner, model if fsdp else inner, inputs, new_tokens)
    plain, tokens = run("sdpa", None)
    dtype = plain[0].dtype
    exact = accumulation_dtype(dtype)
    largest = torch.stack([logits.abs().max() for logits in plain]).max().item() or 1.0

    def difference(implementation: str) -> float:
        logits, _ = run(implementation, tokens)
        differences = [(a.to(exact) - b.to(exact)).abs().max() for a, b in zip(logits, plain, strict=True)]
        return torch.stack(differences).max().item() / largest  # NaN if one of them is

    moved = difference(NAME)
    if tolerance is None:
        tolerance = (84 if dtype == exact else 4) * torch.finfo(dtype).eps
        if not moved <= tolerance:
            tolerance = max(tolerance, 4 * difference("eager"))
    if not moved <= tolerance:
        raise ValueError(
            f"check_identity: MODA moves this model's logits by {moved:.3g} of the largest one, more than "
            f"{tolerance:.3g}: it is trained, or its prior or pseudo scores are on"
        )
    return moved


class _Forced(LogitsProcessor):
    """Makes ``generate`` choose given tokens, or the best ones but for ``banned``, which it collects."""

    def __init__(self, tokens: list[Tensor] | None, banned: list[int]):
        self.given, self.banned = tokens, banned
        self.tokens: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.given is None:
            token = scores.index_fill(-1, torch.tensor(self.banned, device=scores.device), -torch.inf).argmax(dim=-1)
        else:
            token = self.given[len(self.tokens)]
        self.tokens.append(token)
        return torch.full_like(scores, -torch.inf).scatter(-1, token[:, None], 0.0)


def _logits(
    inner: GenerativeModel,
    call: Callable,
    inputs: dict,
    new_tokens: int,
    implementation: str,
    tokens: list[Tensor] | None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Logits of ``inputs`` without padding, (tokens, V), and of each new token (rows, V), under one attention; and the
    new tokens, which are ``tokens`` if they are given."""
    before, settings = inner.config.text_config._attn_implementation, inner.generation_config
    training = [module for module in inner.modules() if module.training]
    mask = inputs.get("attention_mask")
    mask = None if mask is None or mask.dim() != 2 else mask != 0
    try:
        inner.eval()
        _switch(inner, implementation)
        whole = call(**{**inputs, "use_cache": False}).logits
        logits = [whole.flatten(0, 1) if mask is None else whole[mask.to(whole.device)]]
        if not new_tokens:
            return logits, None
        inner.generation_config = greedy = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,  # no end-of-sequence token, so that none is needed
        )
        forced = _Forced(tokens, list(token_modalities(inner.config, inner.config.text_config.moda["modalities"])))
        arguments = {name: value for name, value in inputs.items() if name not in ("labels", "use_cache")}
        result = inner.generate(**arguments, generation_config=greedy, logits_processor=LogitsProcessorList([forced]))
        for step, new in enumerate(result.logits):
            # The first is computed where the prompt ends, which may be padding.
            logits.append(new if mask is None or step else new[mask[:, -1].to(new.device)])
        return [part for part in logits if part.numel()], forced.tokens
    finally:
        inner.generation_config = settings
        PreTrainedModel.set_attn_implementation(inner, {"text_config": before})
        for module in training:
            module.training = True


def _settings(config: PreTrainedConfig) -> MODAConfig | None:
    """Those in a model's config."""
    settings = getattr(config.text_config, "moda", None)
    return None if settings is None else MODAConfig.from_dict(settings)


def _prepare(model: PreTrainedModel, config: MODAConfig) -> tuple[dict[int, MODAAttention], list]:
    """The module of each layer that gets one, and the hooks of :func:`_hooks`."""
    layers = _check_layers(model, config)
    modules: dict[int, MODAAttention] = {}
    if config.mode == "release" or config.aligner is not None or config.mask is not None:
        for attention in attention_modules(model):
            if attention.layer_idx in layers:
                moda = MODAAttention(config, attention.config.num_attention_heads, attention.head_dim)
                modules[attention.layer_idx] = moda.to(*_execution(model, attention))
    return modules, _hooks(model, config.modalities)


def _execution(model: PreTrainedModel, attention: SelfAttention) -> tuple[torch.device | int | str, torch.dtype]:
    """Where a layer's attention computes, and in which dtype.

    Both are those of its projections' weights, if these are there and of a dtype that computes. Else (quantised, by
    float8 too) the dtype is that of the layer's other weights, such as its norms', and then of the model's; and the
    device is the one that Accelerate loads offloaded weights to.
    """
    layer = next(layer for layer in text_stack(model).layers if layer.self_attn is attention)
    modules = (attention.q_proj, *layer.children(), model.get_input_embeddings())
    found = [getattr(module, "weight", None) for module in modules]
    weights = [weight for weight in found if isinstance(weight, Tensor)]  # dynamic quantisation makes it a method
    dtypes = [dtype for dtype in (*(w.dtype for w in weights), model.config.text_config.dtype) if dtype in COMPUTING]
    dtype = dtypes[0] if dtypes else torch.get_default_dtype()
    for module in (attention.q_proj, attention, layer):
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):  # of a sequence of hooks
            device = getattr(part, "execution_device", None)
            if device is not None:
                return device, dtype
    return weights[0].device, dtype


def _attach(model: PreTrainedModel, modules: dict[int, MODAAttention], hooks: list) -> None:
    for attention in attention_modules(model):
        if attention.layer_idx in modules:
            attention.moda = modules[attention.layer_idx]
    # A checkpoint without MODA lacks nothing that the settings give.
    fixed = (re.escape(name) for name, _ in model.named_buffers() if ".moda." in name)
    model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *fixed}
    # One of before has the base of pseudo scores that are off, which is a setting.
    if any(moda.mask is not None and not moda.mask.has_base for moda in modules.values()):
        off = {r"\.moda\.mask\.base$"}
        model._keys_to_ignore_on_load_unexpected = off | set(model._keys_to_ignore_on_load_unexpected or ())
    split_over_model(model, text_stack(model), modules.values())
    _register(hooks)


def _switch(model: PreTrainedModel, implementation: str) -> None:
    """The attention of the text stack, without a warning.

    Raises:
        RuntimeError: it stays what it was. Transformers only logs where it does not know how a stack chooses.
    """
    PreTrainedModel.set_attn_implementation(model, {"text_config": implementation})
    for attention in attention_modules(model):
        chosen = attention.config._attn_implementation
        if chosen != implementation:
            raise RuntimeError(
                f"MODA: {type(text_stack(model)).__name__} keeps its {chosen!r} attention where {implementation!r} is "
                f"asked for, so MODA would have no effect {versions()}. Its attention must be chosen as that of "
                "Transformers' own models is, by ALL_ATTENTION_FUNCTIONS.get_interface"
            )


def _hooks(model: PreTrainedModel, modalities: dict[str, int]) -> list:
    """Pairs of a module and its forward pre-hook."""
    tokens, num_modalities = token_modalities(model.config, modalities), len(set(modalities.values()))
    stack = text_stack(model)
    stack_hook = TextStackHook(tokens, num_modalities, cache_argument(type(stack)))
    return [(model.base_model, BaseModelHook(tokens)), (stack, stack_hook)]


def _register(hooks: list) -> list:
    return [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]


def layer_types(model: PreTrainedModel) -> list[str]:
    """The kind of attention of each layer of the text stack, "full_attention" for one without a window."""
    text_config = model.config.text_config
    types: list[str] | None = getattr(text_config, "layer_types", None)
    if types is None:
        sliding = getattr(text_config, "sliding_window", None) is not None
        types = ["sliding_attention" if sliding else "full_attention"] * text_config.num_hidden_layers
    return types


def _check_layers(model: PreTrainedModel, config: MODAConfig) -> list[int]:
    """Indices of the layers that get MODA."""
    types = layer_types(model)
    count = len(types)
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
    """The Transformers model itself, inside of what wraps it: PEFT, data parallelism, compilation, averaging, ...

    Raises:
        ValueError: there is none of a known family, or there are several.
    """
    found: list[PreTrainedModel] = []

    def search(module: nn.Module) -> None:
        if not isinstance(module, PreTrainedModel):
            for child in module.children():
                search(child)
        elif not any(module is other for other in found):
            found.append(module)

    search(model)
    known = [inner for inner in found if inner.config.model_type.removesuffix(SUFFIX) in FAMILIES]
    if len(known) > 1:
        names = ", ".join(type(inner).__name__ for inner in known)
        raise ValueError(
            f"{caller}: there are {len(known)} models in {type(model).__name__} ({names}); pass one of them"
        )
    if not known:
        _family(found[0] if found else model, caller)  # raises
    return known[0]
