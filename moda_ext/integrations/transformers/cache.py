"""Cache layers that also hold what MODA needs of the past: the modality of every token and the layer's Gram.

The Gram is a function of the cached keys and their modalities. Whatever happens to a cache must happen to it too, or it
is dropped (None) and the next call makes it again from the keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from moda_ext.integrations.transformers.versions import versions
from moda_ext.nn.states import GramState

__all__ = [
    "MODADynamicLayer",
    "MODAStaticLayer",
    "check_agreement",
    "modality_layer",
    "prepare_cache",
    "refuse_cache",
]

# Methods of Transformers' cache layers that keep the tokens as they are or append new ones, and those that do more and
# that the layers below follow.
HARMLESS = {"lazy_initialization", "update", "offload", "prefetch", "activate_past_recording"}
FOLLOWED = {"reset", "crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"}
QUERIES = ("get_", "has_", "is_", "supports_")


def _refusing_unknown_methods(layer_class: type) -> type:
    """Makes a layer refuse what a later Transformers may do to its tokens, as nobody would do it to the Gram."""

    def refusal(name: str) -> Callable[..., None]:
        def refuse(self: CacheLayerMixin, *args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"MODA does not know what {name}() does to the tokens of a cache {versions()}")

        return refuse

    bases = [base for base in layer_class.__mro__ if base.__module__.startswith("transformers.")]
    for name in {name for base in bases for name, value in vars(base).items() if callable(value)}:
        known = name in HARMLESS | FOLLOWED or name.startswith(("_", *QUERIES))
        if not known:
            setattr(layer_class, name, refusal(name))
    return layer_class


if TYPE_CHECKING:
    _CacheLayer = CacheLayerMixin
else:
    _CacheLayer = object


class MODALayerMixin(_CacheLayer):
    """Modality ids (held by the first such layer of a cache, for all) and the Gram of one layer."""

    modality: Tensor | None = None  # (B, tokens seen), int32
    gram: GramState | None = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def _select(self, rows: Tensor) -> None:
        if self.modality is not None:
            self.modality = self.modality.index_select(0, rows.to(self.modality.device))
        if self.gram is not None:
            self.gram = self.gram.reorder(rows)

    def _select_of(self, pick: Callable[[Tensor], Tensor]) -> None:
        held = self.modality if self.gram is None else self.gram.gram
        if held is not None:
            self._select(pick(torch.arange(held.shape[0], device=held.device)))


@_refusing_unknown_methods
class MODADynamicLayer(MODALayerMixin, DynamicLayer):
    """A cache layer that grows."""

    def append(self, modality: Tensor) -> Tensor:
        """The modalities of all tokens, after these new ones: (B, N) -> (B, tokens seen + N)."""
        seen = self.get_seq_length()
        if seen and (self.modality is None or self.modality.shape[1] < seen):
            known = 0 if self.modality is None else self.modality.shape[1]
            raise ValueError(
                f"the cache holds {seen} tokens, but modalities of only {known}: it was filled while MODA was off. "
                "Start from an empty cache"
            )
        # More ids than keys: a forward pass that failed before it came to this layer.
        if seen and self.modality is not None:
            modality = torch.cat([self.modality[:, :seen], modality], dim=1)
        self.modality = modality
        return modality

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.modality is not None:
            self.modality = self.modality[:, : self.get_seq_length()]
        if self.gram is not None and tokens_to_remove != 0:
            removable = self.gram.key.shape[2] >= -tokens_to_remove
            self.gram = self.gram.crop(self.gram.length + tokens_to_remove) if removable else None

    def reset(self) -> None:
        super().reset()
        self.modality = self.gram = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select_of(lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_of(lambda rows: rows[indices.to(rows.device)])  # indices, or a mask


@_refusing_unknown_methods
class MODADynamicSlidingWindowLayer(MODADynamicLayer, DynamicSlidingWindowLayer):
    """A cache layer with a window of keys, and the modalities of all tokens. Such layers have no Gram."""


@_refusing_unknown_methods
class MODAStaticLayer(MODALayerMixin, StaticLayer):
    """A cache layer of fixed size: ids and Gram are buffers too, so that a compiled decoding step stays one graph."""

    gram_is_stale = False  # tokens were taken back: the Gram is to be made again of the keys that stay
    known: Tensor | None = None  # (), int64: how many tokens have ids; -1 among them may be padding

    def append(self, modality: Tensor) -> Tensor:
        """(B, N) new ones -> (B, max_cache_len), -1 where no token is yet."""
        if self.modality is None or self.known is None:
            if self.is_initialized and self.cumulative_length > 0:
                raise ValueError("the cache holds tokens without modalities: it was filled while MODA was off")
            self.modality = modality.new_full((modality.shape[0], self.max_cache_len), -1)
            self.known = torch.zeros((), dtype=torch.int64, device=modality.device)
            _mark_static(self.modality)
            _mark_static(self.known)
        seen = self.get_seq_length()
        torch._assert_async(  # on a GPU without waiting for the answer
            self.known >= seen,
            "the cache holds tokens without modalities: it was filled while MODA was off. Start from an empty one",
        )
        self.known.copy_(seen + torch.full_like(self.known, modality.shape[1]))
        # A pass that failed before its keys came here has left its ids.
        self.modality.masked_fill_(torch.arange(self.max_cache_len, device=modality.device) >= seen, -1)
        self.modality.index_copy_(1, torch.arange(modality.shape[1], device=modality.device) + seen, modality)
        return self.modality

    def crop(self, tokens_to_remove: int) -> None:  # Transformers 5.24 and later
        super().crop(tokens_to_remove)
        self.gram_is_stale = self.gram is not None and (self.gram_is_stale or tokens_to_remove != 0)
        if self.modality is not None and self.known is not None:
            places = torch.arange(self.max_cache_len, device=self.modality.device)
            self.modality.masked_fill_(places >= self.get_seq_length(), -1)
            self.known.clamp_(max=self.get_seq_length())

    def reset(self) -> None:
        super().reset()
        self.gram_is_stale = False
        if self.modality is not None and self.known is not None:
            self.modality.fill_(-1)
            self.known.zero_()
        if self.gram is not None:
            self.gram.gram.zero_()

    def store(self, state: GramState) -> None:
        """The Gram after this call. ``state`` has no recent keys, or it would grow."""
        self.gram_is_stale = False
        if self.gram is None:
            self.gram = state
            _mark_static(state.gram)
        else:
            self.gram.gram.copy_(state.gram)


def _mark_static(tensor: Tensor) -> None:
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)


def prepare_cache(cache: Cache, num_layers: int) -> None:
    """Makes the layers of an empty cache such as MODA needs, in place.

    Called by the model before every forward pass; call it yourself only to compile the first pass too.

    Args:
        cache: a ``DynamicCache`` or ``StaticCache``, empty or prepared before.
        num_layers: layers of the text stack.

    Raises:
        ValueError: the cache has tokens whose modalities nobody knows.
        NotImplementedError: another kind of cache layer.
    """
    if not hasattr(cache, "layers"):
        refuse_cache(type(cache))
    if cache.layer_class_to_replicate is not None:  # layers come as they are used
        if cache.layer_class_to_replicate is not DynamicLayer:
            refuse_cache(cache.layer_class_to_replicate)
        cache.layers.extend(DynamicLayer() for _ in range(num_layers - len(cache.layers)))
        cache.layer_class_to_replicate = None
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, MODALayerMixin | StaticSlidingWindowLayer):  # the latter's attention is plain
            continue
        if not isinstance(layer, CacheLayerMixin):
            refuse_cache(type(layer))
        if layer.is_initialized and layer.get_seq_length() > 0:
            raise ValueError(
                f"the cache holds {int(layer.get_seq_length())} tokens, but no modalities: it was filled while MODA "
                "was off. Start from an empty cache"
            )
        if type(layer) is DynamicLayer:
            cache.layers[index] = MODADynamicLayer()
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = windowed = MODADynamicSlidingWindowLayer(layer.sliding_window)
            if layer.record_past:
                windowed.activate_past_recording()
        elif type(layer) is StaticLayer:
            cache.layers[index] = MODAStaticLayer(layer.max_cache_len)
        else:
            refuse_cache(type(layer))


def modality_layer(cache: Cache) -> MODADynamicLayer | MODAStaticLayer:
    """The layer of a prepared cache that holds the modalities of all tokens.

    Raises:
        NotImplementedError: no layer can, all are static sliding windows.
    """
    for layer in cache.layers:
        if isinstance(layer, MODADynamicLayer | MODAStaticLayer):
            return layer
    raise NotImplementedError("MODA needs a cache with at least one layer that is not a static sliding window")


def check_agreement(cache: Cache, start: int | Tensor) -> None:
    """Raises RuntimeError unless all layers of a prepared cache hold ``start`` tokens."""
    message = (
        "the layers of the cache hold different numbers of tokens: an earlier pass with it failed in the middle. Start "
        "from an empty cache"
    )
    lengths = [layer.get_seq_length() for layer in cache.layers if isinstance(layer, MODALayerMixin)]
    if isinstance(start, Tensor):
        same = torch.stack([torch.as_tensor(length, device=start.device) for length in lengths]) == start
        torch._assert_async(same.all(), message)  # on a GPU without waiting for the answer
    elif any(length != start for length in lengths):
        raise RuntimeError(message)


def refuse_cache(cache_class: type) -> NoReturn:
    """Raises NotImplementedError: MODA cannot use this kind of cache, or of cache layer."""
    raise NotImplementedError(
        f"MODA cannot use a cache of {cache_class.__name__}: it needs the keys as they are, and the modality of each "
        "(so no quantised cache, no paged one as in generate_batch). Use a dynamic or a static cache "
        "(cache_implementation='dynamic' or 'static')"
    )
