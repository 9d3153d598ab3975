"""MODA's parameters: which to train and how fast, one file for them, and the authors' checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import is_available
from transformers import PreTrainedModel

from moda_ext.integrations.settings import PSEUDO_SCORES_ARE_OFF, MODAConfig
from moda_ext.integrations.transformers.attention import MODAAttention
from moda_ext.integrations.transformers.engines import sharded_like
from moda_ext.integrations.transformers.models import apply_moda, attention_modules, has_moda, text_stack
from moda_ext.release import split_release_state_dict

if TYPE_CHECKING or is_available():
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.tensor import DTensor
else:
    FSDP = DTensor = ()  # the type of nothing

__all__ = [
    "load_moda",
    "load_moda_state_dict",
    "load_release",
    "moda_parameters",
    "moda_state_dict",
    "optimizer_groups",
    "save_moda",
    "train_only_moda",
]

# Gates, priors and pseudo scores start at 0 or far away and have a scale of their own; the low-rank maps are ordinary
# weights.
SLOW = (".a1", ".b1", ".a2", ".b2", "pfuser_v.weight", "pfuser_t.weight")


def moda_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The MODA parameters that ``model`` computes with, under their names in it.

    Under PEFT with ``modules_to_save=["moda"]`` these are the active adapter's, or the model's own where the active
    adapter has none or adapters are disabled.
    """
    used = {id(parameter) for module in _moda_modules(model).values() for parameter in module.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in used}


def train_only_moda(model: nn.Module) -> list[nn.Parameter]:
    """Freezes everything but aligner and mask; returns their parameters, see :func:`moda_parameters`.

    Raises:
        ValueError: the model has no MODA parameter.
    """
    parameters = moda_parameters(model)
    if not parameters:
        raise ValueError("train_only_moda: this model has no MODA parameters; see apply_moda")
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return list(parameters.values())


def optimizer_groups(
    model: nn.Module, lr: float, *, moda_lr: float | None = None, fast_lr: float = 1e-2, weight_decay: float = 0.0
) -> list[dict]:
    """Parameter groups of an optimiser, with learning rates that fit: trainable parameters only, none left out.

    Args:
        model: a model with MODA.
        lr: learning rate of the model's own parameters.
        moda_lr: of the aligners' low-rank maps, by default ``lr``.
        fast_lr: of gates, priors and pseudo scores, which must move far from 0: much larger than ``lr``. They have no
            weight decay.
        weight_decay: of the others.

    Returns:
        Groups named ``"model"``, ``"moda"`` and ``"moda_fast"``, those that have parameters.

    Example:
        >>> groups = optimizer_groups(model, lr=1e-5, fast_lr=1e-2)  # doctest: +SKIP
        >>> optimizer = torch.optim.AdamW(groups)  # doctest: +SKIP
    """
    settings = {
        "model": {"lr": lr, "weight_decay": weight_decay},
        "moda": {"lr": lr if moda_lr is None else moda_lr, "weight_decay": weight_decay},
        "moda_fast": {"lr": fast_lr, "weight_decay": 0.0},
    }
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in settings}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # ".moda.", not "moda": multi_modal_projector has that in its name. Of whichever adapter, used or not.
            group = "model" if ".moda." not in name else "moda" if name.endswith(SLOW) else "moda_fast"
            groups[group].append(parameter)
    return [{"name": name, "params": groups[name], **settings[name]} for name in settings if groups[name]]


def _moda_modules(model: nn.Module) -> dict[str, MODAAttention]:
    """{"layers.3.moda": module}; under PEFT the copy that the layer computes with."""
    result = {}
    for attention in attention_modules(model):
        moda = getattr(attention, "moda", None)
        if moda is not None:
            result[f"layers.{attention.layer_idx}.moda"] = _in_use(moda)
    return result


def _in_use(moda: Any) -> MODAAttention:
    """The module itself: of those in PEFT's wrapper of modules to save the one that it calls."""
    copies = getattr(moda, "modules_to_save", None)
    if copies is not None:
        active = [] if moda.disable_adapters else moda.active_adapters
        used = active and all(name in copies for name in active)
        moda = copies[active[0]] if used else moda.original_module
    return next(module for module in moda.modules() if isinstance(module, MODAAttention))


def moda_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """MODA's parameters and buffers alone, under names that do not depend on the family, on wrappers or on PEFT.

    Those that the model computes with, see :func:`moda_parameters`. Offloaded ones are loaded, and sharded ones are
    gathered: then every process must call this.
    """
    with _unsharded(model) as sharded:
        state = {
            f"{prefix}.{name}": tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for prefix, module in _moda_modules(model).items()
            for name, tensor in _loaded_state_dict(module).items()
        }
        return {name: tensor.clone() for name, tensor in state.items()} if sharded else state


@contextlib.contextmanager
def _unsharded(model: nn.Module) -> Iterator[bool]:
    """A block in which FullyShardedDataParallel has whole parameters, which change with it; says if there is any."""
    sharded = any(isinstance(module, FSDP) for module in model.modules())
    with FSDP.summon_full_params(model) if sharded else contextlib.nullcontext():
        yield sharded


def _loaded_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module, with what Accelerate has offloaded to the CPU or the disk."""
    state = module.state_dict()
    for place, part in module.named_modules():
        hook = getattr(part, "_hf_hook", None)
        for name in part._parameters.keys() | part._buffers.keys():
            full = f"{place}.{name}" if place else name
            offloaded = getattr(hook, "weights_map", None)
            if full in state and state[full].is_meta and offloaded is not None:
                state[full] = offloaded[name]
    return state


def load_moda_state_dict(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Copies what :func:`moda_state_dict` gave into a model with the same settings.

    Raises:
        ValueError: a name is missing or unknown, a shape differs, or the model's weights are offloaded. Nothing is
            copied then.
    """
    with _unsharded(model):
        _copy(dict(state_dict), _moda_modules(model))


@torch.no_grad()
def _copy(state_dict: dict[str, Tensor], modules: dict[str, MODAAttention]) -> None:
    masks = {f"{prefix}.mask.": module.mask for prefix, module in modules.items() if module.mask is not None}
    if any(mask.is_off_unlike(state_dict, prefix) for prefix, mask in masks.items()):
        raise ValueError(f"load_moda_state_dict: {PSEUDO_SCORES_ARE_OFF}")
    # Files of before have infinities in them.
    lacking = {prefix: mask.upgrade_state_dict(state_dict, prefix) for prefix, mask in masks.items()}
    own = {f"{prefix}.{name}": t for prefix, module in modules.items() for name, t in module.state_dict().items()}
    names = own.keys() | {prefix + name for prefix, buffers in lacking.items() for name in buffers}
    missing, unknown = sorted(names - state_dict.keys()), sorted(state_dict.keys() - names)
    if missing or unknown:
        raise ValueError(f"load_moda_state_dict: state_dict lacks {missing} and has {unknown}, which the model lacks")
    for name, tensor in own.items():
        if tensor.shape != state_dict[name].shape:
            raise ValueError(
                f"load_moda_state_dict: {name} must have shape {tuple(tensor.shape)}, got "
                f"{tuple(state_dict[name].shape)}"
            )
        if tensor.is_meta:
            raise ValueError(
                f"load_moda_state_dict: {name} of the model is offloaded, or on the meta device. Load MODA's weights "
                "before the model is dispatched"
            )
    for prefix, mask in masks.items():
        mask.make_room(lacking[prefix])
    for prefix, module in modules.items():
        for name, tensor in module.state_dict().items():
            tensor.copy_(sharded_like(state_dict[f"{prefix}.{name}"], tensor))


def save_moda(model: nn.Module, path: str | os.PathLike) -> None:
    """Saves MODA's parameters and settings as one safetensors file, without the model's own weights.

    Those that the model computes with, see :func:`moda_parameters`. Of a sharded model every process must call this.

    Raises:
        ValueError: the model has no MODA, or its weights are on the meta device.
    """
    state = moda_state_dict(model)
    if not state:
        raise ValueError("save_moda: this model has no MODA parameters; see apply_moda")
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError("save_moda: this model's MODA parameters are on the meta device and have no values")
    settings = _own_settings(model).to_json()
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    save_file(tensors, os.fspath(path), metadata={"format": "pt", "moda": settings})


def _own_settings(model: nn.Module) -> MODAConfig:
    """Those of the layers, which several models with one config object would overwrite in it; or else the config's."""
    modules = list(_moda_modules(model).values())
    return modules[0].config if modules else MODAConfig.from_dict(text_stack(model).config.moda)


def load_moda(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Loads a file of :func:`save_moda` into a model of the same sizes, with MODA or without; returns the model.

    Raises:
        ValueError: not such a file, or made with other settings than the model's.
    """
    with safe_open(os.fspath(path), framework="pt") as file:
        settings = (file.metadata() or {}).get("moda")
        if settings is None:
            raise ValueError(f"load_moda: {os.fspath(path)} was not written by save_moda")
        config = MODAConfig.from_json(settings)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    if has_moda(model, "load_moda"):
        own = _own_settings(model)
        if own != config:
            raise ValueError(f"load_moda: the model's settings are {own}, those of the file {config}")
    else:
        apply_moda(model, config)
    load_moda_state_dict(model, tensors)
    return model


def load_release(model: PreTrainedModel, state_dict: dict[str, Tensor]) -> list[str]:
    """Loads a checkpoint of the authors' release into a plain model of the family, in ``release`` mode, in place.

    The aligners and the language model (names ``model.*`` and ``lm_head.*``) are loaded; the release has a vision tower
    and projector of its own, which have no counterpart here. See :mod:`moda_ext.release` for what is wrong with its
    alignment: compare with it, and train with ``mode="moda"``.

    Args:
        model: a ``...ForConditionalGeneration`` model whose text stack has the release's sizes.
        state_dict: the release's, see :func:`moda_ext.release.split_release_state_dict`.

    Returns:
        Names of ``state_dict`` that were not loaded.

    Raises:
        ValueError: there is no aligner in it, one is incomplete, it lacks a weight of the text stack, or its output
            head is none that the model can have.
        RuntimeError: a shape differs.
    """
    aligners, rest = split_release_state_dict(state_dict)
    stack = text_stack(model)
    count = stack.config.num_hidden_layers
    if max(aligners) >= count:
        raise ValueError(f"load_release: state_dict has an aligner for layer {max(aligners)}, the model {count} layers")
    own = stack.state_dict().keys()
    language = {name.removeprefix("model."): name for name in rest if name.removeprefix("model.") in own}
    missing = sorted(own - language.keys())
    if missing:
        raise ValueError(f"load_release: state_dict lacks weights of the language model: {', '.join(missing)}")
    head, of_release = model.get_output_embeddings(), rest.get("lm_head.weight")
    if head is not None:
        tied = head.weight is model.get_input_embeddings().weight
        if of_release is None and not tied:
            raise ValueError("load_release: state_dict lacks lm_head.weight, and the model's head is not tied")
        if of_release is not None and tied and not torch.equal(of_release, rest[language["embed_tokens.weight"]]):
            raise ValueError(
                "load_release: state_dict has an lm_head.weight of its own, and the model's head is tied to its "
                "embeddings; set tie_word_embeddings=False in its config"
            )
    stack.load_state_dict({name: rest[source] for name, source in language.items()})
    loaded = set(language.values())
    if "lm_head.weight" in rest and head is not None:
        head.load_state_dict({"weight": rest["lm_head.weight"]}, strict=False)
        loaded.add("lm_head.weight")
    config = MODAConfig(aligner=None, mask=None, mode="release", layers=sorted(aligners))
    apply_moda(model, config)
    modules = _moda_modules(model)
    for layer, weights in aligners.items():
        aligner = modules[f"layers.{layer}.moda"].aligner
        assert aligner is not None, "of mode='release'"
        aligner.load_state_dict(weights)
    return sorted(rest.keys() - loaded)
