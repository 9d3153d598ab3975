"""Forward pre-hooks that find the modality of every token and hand it to the attention layers.

Two modules get a hook: the base model, which sees token ids, and its text stack, which sees embeddings. Hooks are
picklable objects, so a model with them can be copied and saved.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from moda_ext.integrations.settings import TOKEN_ID_NAMES, placeholder, token_modalities
from moda_ext.integrations.transformers.attention import NAME, ModalityContext
from moda_ext.integrations.transformers.cache import check_agreement, modality_layer, prepare_cache, refuse_cache
from moda_ext.integrations.transformers.engines import refuse_other_sequence_parallelism
from moda_ext.integrations.transformers.parts import TextStack
from moda_ext.integrations.transformers.versions import at_least, versions

if typing.TYPE_CHECKING:
    from transformers import PreTrainedModel

# Earlier ones drop the cache under checkpointing without gradients too.
DROPS_ALWAYS = not at_least((5, 24))

__all__ = ["BaseModelHook", "TextStackHook", "cache_argument", "placeholder", "token_modalities"]


def cache_argument(module_class: type[nn.Module]) -> str | None:
    """Name of the argument of a class's ``forward`` that takes a ``Cache``, None if not exactly one is annotated so.

    By type, as releases of Transformers give it different names (``past_key_values`` up to 5.23, then ``cache``).
    """

    def is_cache(annotation: object) -> bool:
        if isinstance(annotation, str):
            return re.search(r"\b\w*Cache\b", annotation) is not None
        types = (annotation, *typing.get_args(annotation))
        return any(isinstance(kind, type) and issubclass(kind, Cache) for kind in types)

    parameters = inspect.signature(module_class.forward).parameters.values()
    names = [parameter.name for parameter in parameters if is_cache(parameter.annotation)]
    return names[0] if len(names) == 1 else None


@dataclasses.dataclass
class BaseModelHook:
    """Adds ``modality_ids`` (B, N), made of the token ids, to a base model's arguments."""

    token_modality: dict[int, int]

    def __call__(self, module: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if module.config.get_text_config()._attn_implementation == NAME:
            refuse_other_sequence_parallelism()  # before the vision tower, in which processes might wait for others
        input_ids = args[0] if args else kwargs.get("input_ids")
        present = {token for kind in TOKEN_ID_NAMES if (token := placeholder(module.config, kind)) is not None}
        if present and present != self.token_modality.keys():  # the text stack's config has none
            raise RuntimeError(
                f"MODA: the placeholder tokens in the model's config are {sorted(present)}, and were "
                f"{sorted(self.token_modality)} when MODA was attached. Change them before apply_moda"
            )
        if kwargs.get("modality_ids") is None and input_ids is not None and not input_ids.is_floating_point():
            modality = torch.full_like(input_ids, 0, dtype=torch.int32)
            for token, m in self.token_modality.items():
                modality = modality.masked_fill(input_ids == token, m)
            kwargs = {**kwargs, "modality_ids": modality}
        return args, kwargs


@dataclasses.dataclass
class TextStackHook(BaseModelHook):
    """Replaces ``modality_ids`` by the :class:`ModalityContext` of this pass, with a cache that MODA can use."""

    num_modalities: int
    cache_name: str | None = None  # the argument in which a cache is handed to the text stack, if it is known

    def __call__(  # type: ignore[override]  # a hook is called by its own module alone
        self, module: TextStack, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        if len(args) > 1:
            raise TypeError("MODA: call the text stack with keyword arguments, all but input_ids")
        args, kwargs = super().__call__(module, args, kwargs)
        kwargs = dict(kwargs)
        modality = kwargs.pop("modality_ids", None)
        if module.config._attn_implementation != NAME:
            return args, kwargs
        if modality is None:
            raise ValueError(
                "MODA derives the modality of each token from input_ids, and got inputs_embeds only. Pass input_ids, "
                "or modality_ids (B, N) to the model's forward; generate() has no other way than input_ids"
            )
        tokens = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else modality
        if modality.shape != tokens.shape[:2]:
            raise ValueError(f"modality_ids must have shape {tuple(tokens.shape[:2])}, got {tuple(modality.shape)}")
        if modality.is_floating_point():
            raise TypeError(f"modality_ids must be integers, got {modality.dtype}")
        modality = modality.to(tokens.device, torch.int32)

        cache = self._cache(kwargs)
        checkpoints = module.training and any(
            getattr(layer, "gradient_checkpointing", False) for layer in module.layers
        )
        if checkpoints and (torch.is_grad_enabled() or DROPS_ALWAYS):
            cache = None  # Transformers drops it in every layer, and recomputing must not find a Gram
        elif cache is None and self._uses_cache(module, kwargs):
            if self.cache_name is None:
                raise RuntimeError(
                    f"MODA does not know which argument of {type(module).__name__}.forward takes a cache {versions()}. "
                    "Pass a cache of your own (DynamicCache), or use_cache=False"
                )
            cache = kwargs[self.cache_name] = DynamicCache(config=module.config)
        layer, start = None, 0
        if cache is not None:
            prepare_cache(cache, module.config.num_hidden_layers)
            layer = modality_layer(cache)
            start = layer.get_seq_length()
            if isinstance(start, Tensor):
                first = modality.shape[1] > 1 and not torch.compiler.is_compiling() and int(start) == 0
                start = 0 if first else start.clone()  # a static cache counts on in place
            check_agreement(cache, start)
        mask = kwargs.get("attention_mask")
        modality = _without_padding(modality, mask, start)
        key_modality = modality if layer is None else layer.append(modality)
        of_stack = _of_stack(mask)
        if layer is not None and of_stack is not None and of_stack.dim() == 2:
            _check_past_mask(of_stack, key_modality, start)
        if layer is not None and mask is None:
            _refuse_packed(kwargs.get("position_ids"), modality.shape, start)
        context = ModalityContext(modality, key_modality, start, self.num_modalities, cache, mask is not None)
        kwargs["modality_context"] = context
        return args, kwargs

    def _cache(self, kwargs: dict) -> Cache | None:
        """The cache among the arguments, whatever its name.

        Raises:
            NotImplementedError: it is of a kind that MODA cannot use, or there are several.
        """
        caches = [value for value in kwargs.values() if isinstance(value, Cache)]
        if any(cache is not caches[0] for cache in caches):
            raise NotImplementedError(f"MODA: the text stack got several caches {versions()}; pass one")
        for name, value in kwargs.items():
            # Something else that takes keys, such as the paged cache of continuous batching.
            keeps = callable(getattr(value, "update", None)) and not isinstance(value, (Cache, dict, set))
            if keeps or (name == self.cache_name and value is not None and not isinstance(value, Cache)):
                refuse_cache(type(value))
        return caches[0] if caches else None

    @staticmethod
    def _uses_cache(module: TextStack, kwargs: dict) -> bool:
        use_cache = kwargs.get("use_cache")
        return module.config.use_cache if use_cache is None else use_cache


def _check_past_mask(mask: Tensor, key_modality: Tensor, start: int | Tensor) -> None:
    """A mask must leave the tokens before as it had them when they came: their ids and the Gram are made.

    On a GPU this does not wait for the answer.
    """
    columns = min(mask.shape[1], key_modality.shape[1])
    past = torch.arange(columns, device=key_modality.device) < start
    changed = (mask[:, :columns].to(key_modality.device) != 0) != (key_modality[:, :columns] >= 0)
    torch._assert_async(
        ~(changed & past).any(),
        "attention_mask hides tokens of the cache that an earlier pass showed, or the other way round: MODA has their "
        "modalities and Gram as they came. Start from an empty cache",
    )


def _refuse_packed(position_ids: Tensor | None, shape: torch.Size, start: int | Tensor) -> None:
    """Transformers does not look for packed sequences where there is a cache, and would let them see one another."""
    if isinstance(start, Tensor) or start or position_ids is None or position_ids.shape[-1] != shape[1] or shape[1] < 2:
        return
    if position_ids.dim() == 2:  # others, of three axes, start again at every picture
        torch._assert_async(
            ~(position_ids.diff(dim=-1) < 0).any(),
            "position_ids start again (packed sequences) where a cache is in use, with which Transformers lets the "
            "sequences see one another: pass use_cache=False",
        )


def _of_stack(mask: Tensor | dict[str, Tensor] | None) -> Tensor | None:
    """The mask of the layers with full attention, where there is one for each kind of layer."""
    return mask.get("full_attention", next(iter(mask.values()))) if isinstance(mask, dict) else mask


def _without_padding(modality: Tensor, mask: Tensor | dict[str, Tensor] | None, start: int | Tensor) -> Tensor:
    """-1 for the tokens that the attention mask leaves out."""
    of_stack = _of_stack(mask)
    if of_stack is None:
        return modality
    rows, new = modality.shape
    shown = of_stack.to(modality.device)
    columns = torch.arange(new, device=modality.device) + start
    if shown.dim() == 4 and shown.shape[1] == 1 and shown.dtype == torch.bool:
        index = columns[:, None].expand(shown.shape[0], new, 1)
        visible = shown[:, 0].gather(2, index).squeeze(2)  # a token that does not see itself
    elif shown.dim() == 2:
        if not isinstance(start, Tensor) and shown.shape[1] < start + new:
            raise ValueError(
                f"attention_mask must cover the {start} tokens in the cache and the {new} new ones, got shape "
                f"{tuple(shown.shape)}"
            )
        visible = shown.index_select(1, columns) != 0
    else:
        raise NotImplementedError(
            "MODA takes an attention_mask of shape (B, N), or a boolean one of shape (B, 1, Nq, Nk), got "
            f"{tuple(shown.shape)} of {shown.dtype}"
        )
    return modality.masked_fill(~visible.expand(rows, new), -1)
