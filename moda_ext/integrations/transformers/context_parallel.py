"""One sequence over many devices, for a whole model: cut where embeddings enter the text stack."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from moda_ext.integrations.recording import refuse_replicas
from moda_ext.integrations.transformers.attention import ContextParallel, ModalityContext
from moda_ext.integrations.transformers.models import _pretrained, knowing_modalities, layer_types, text_stack

if TYPE_CHECKING:
    import transformers
    from torch.distributed.device_mesh import DeviceMesh

    from moda_ext.distributed.sequence import SequenceShards

    _Trainer = transformers.Trainer
else:
    _Trainer = object

__all__ = ["ContextParallelTrainerMixin", "context_parallel"]

CUT = "inputs_embeds", "position_ids", "attention_mask", "visual_pos_masks", "deepstack_visual_embeds"
MOVING_ROPE = ("dynamic", "longrope")  # of Transformers, whose frequencies depend on the longest position
OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PACKED = "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"  # what describes several sequences in a row


@contextlib.contextmanager
def context_parallel(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    scheme: str = "regather",
    zigzag: bool = True,
    modalities: dict[str, int] | None = None,
) -> Iterator[SequenceShards]:
    """Spreads the tokens of every sequence over the ranks of a mesh, within a ``with`` block. Training, and logits.

    Every rank is given the **same** whole batch. Embeddings and images are computed on every rank as ever; what enters
    the text stack is cut to this rank's tokens, and what leaves it stays cut: logits are those of this rank's tokens,
    in the order of the shards. Results are exactly those of one process.

    With ``labels`` the loss is scaled so that its **mean over the ranks** is the loss, and the mean of their gradients
    the gradient: what DDP and FSDP compute where they take the ranks for data ranks. With ``num_items_in_batch`` it is
    the sum of this rank's tokens over that number, so that the sum over the ranks is the loss.

    Args:
        model: a model of one of the ``FAMILIES`` but ``gemma3``, with MODA or without, also inside of wrappers.
        mesh: a ``DeviceMesh`` of one dimension.
        scheme, zigzag: as in :func:`moda_ext.distributed.context_parallel_attention` and
            :class:`moda_ext.distributed.SequenceShards`.
        modalities: as in :class:`MODAConfig`, for a model without MODA.

    Yields:
        The shards: ``shards.shard(labels, 1)`` are the labels of this rank's logits.

    Raises:
        ValueError: layers with a sliding window, position embeddings that depend on a sequence's length, MODA that is
            switched off, a length that cannot be cut (pad it), or batches that differ between the ranks.
        NotImplementedError: what a part of a sequence cannot have: a cache, ``generate``, a mask of pairs, packed
            sequences, ``logits_to_keep``, recording.

    Example:
        >>> mesh = init_device_mesh("cuda", (8,))  # doctest: +SKIP
        >>> with context_parallel(model, mesh) as shards:  # doctest: +SKIP
        ...     model(**inputs, labels=labels).loss.backward()
    """
    from moda_ext.distributed.context_parallel import SCHEMES  # needs a torch with distributed
    from moda_ext.distributed.sequence import SequenceShards

    refuse_replicas(model)
    inner = _pretrained(model, "context_parallel")
    if scheme not in SCHEMES:
        raise ValueError(f"context_parallel: scheme must be one of {SCHEMES}, got {scheme!r}")
    windows = [i for i, kind in enumerate(layer_types(inner)) if kind != "full_attention"]
    if windows:
        raise ValueError(
            f"context_parallel: layers {windows} have a sliding window; if your sequences are shorter than the window, "
            "set text_config.sliding_window=None before the model is made"
        )
    rope = getattr(getattr(text_stack(inner), "rotary_emb", None), "rope_type", "default")
    moving = [kind for kind in (rope.values() if isinstance(rope, dict) else (rope,)) if kind in MOVING_ROPE]
    if moving:
        raise ValueError(
            f"context_parallel: position embeddings of type {moving[0]!r} choose their frequencies by the last "
            "position of a pass, and ranks have different ones"
        )
    if "generate" in vars(inner):
        raise ValueError("context_parallel: this model is in a context already")
    shards = SequenceShards(mesh, zigzag)
    with knowing_modalities(inner, modalities, "context_parallel"):
        handles = [
            inner.register_forward_pre_hook(_ModelHook(shards), with_kwargs=True),
            text_stack(inner).register_forward_pre_hook(_StackHook(shards, scheme), with_kwargs=True),
        ]
        inner.__dict__["generate"] = _refuse_generate
        try:
            yield shards
        finally:
            del inner.__dict__["generate"]
            for handle in handles:
                handle.remove()


def _refuse_generate(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(
        "context_parallel: generate() needs every token on one rank; call it outside of the context"
    )


@dataclasses.dataclass
class _ModelHook:
    """What the whole model is given: refuses caches, cuts the labels, and compares the batch with that of others."""

    shards: SequenceShards

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        names = [
            n
            for n, p in inspect.signature(type(module).forward).parameters.items()
            if p.kind == p.POSITIONAL_OR_KEYWORD
        ]
        kwargs = {**dict(zip(names[1:], args, strict=False)), **kwargs}
        self._check_same_batch(kwargs)
        keep = kwargs.get("logits_to_keep")
        if keep is not None and not (isinstance(keep, int) and keep == 0):
            raise NotImplementedError(f"context_parallel: logits_to_keep is for whole sequences, got {keep}")
        kwargs["use_cache"] = False
        labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
        if shifted is None and labels is not None:
            shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        if shifted is not None:
            if kwargs.get("num_items_in_batch") is None:
                kwargs["num_items_in_batch"] = (shifted != -100).sum() / self.shards.size
            kwargs["shift_labels"] = self.shards.shard(shifted, 1)
            kwargs["labels"] = kwargs["shift_labels"] if labels is None else self.shards.shard(labels, 1)
        return (), kwargs

    def _check_same_batch(self, kwargs: dict) -> None:
        """Other tokens on one rank, as loaders for data ranks give them, would make all results wrong without an error.

        Ids, masks, labels and pictures of a batch are compared by a number made of their bits.
        """
        own = torch.zeros(2, dtype=torch.int64, device=self.shards.mesh.device_type)
        for _, tensor in sorted(kwargs.items()):
            if isinstance(tensor, Tensor):
                bits = tensor.detach().to(own.device)
                if bits.is_floating_point():
                    bits = bits.contiguous().view(OF_SIZE[bits.itemsize])
                numbers = bits.to(torch.int64).flatten()
                weights = torch.arange(len(numbers), device=own.device) % 65_521 + 1
                own = own * 31 + torch.stack([((numbers + 1) * weights).sum(), own.new_tensor(len(numbers))])
        every = self.shards.of_every_rank(own)
        if (every != every[:1]).any():
            raise ValueError(
                "context_parallel: the ranks of a sequence were given different batches; give each of them the same, "
                "as a sampler does that takes the ranks of the mesh for one"
            )


@dataclasses.dataclass
class _StackHook:
    """Cuts what enters the text stack to this rank's tokens. Runs after the hook that makes the modalities."""

    shards: SequenceShards
    scheme: str

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        context, embeds = kwargs.get("modality_context"), kwargs.get("inputs_embeds")
        if not isinstance(context, ModalityContext) or embeds is None or args:
            raise NotImplementedError(
                "context_parallel: call the whole model, whose text stack is given inputs_embeds as a keyword"
            )
        if context.cache is not None or any(isinstance(value, Cache) for value in kwargs.values()):
            raise NotImplementedError("context_parallel: a cache is for decoding, which needs every token on one rank")
        self._check_mask_and_packing(kwargs)
        length = embeds.shape[1]
        self.shards.check_length("context_parallel", "the sequence", length)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=embeds.device)[None]
        kwargs["inputs_embeds"] = self.shards.shard(embeds, 1)
        kwargs["position_ids"] = self.shards.shard(positions, positions.dim() - 1)  # (B, N), or 3 or 4 such
        # Padding is in the modalities. Without any mask, positions that jump from chunk to chunk would look packed.
        kwargs["attention_mask"] = torch.ones(kwargs["inputs_embeds"].shape[:2], dtype=torch.long, device=embeds.device)
        self._cut_deepstack(kwargs)
        self._refuse_the_unknown(kwargs, embeds.shape[:2])
        kwargs["modality_context"] = context._replace(parallel=ContextParallel(self.shards, self.scheme))
        return args, kwargs

    @staticmethod
    def _check_mask_and_packing(kwargs: dict) -> None:
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            kind = "masks of its own" if isinstance(mask, dict) else f"a mask of shape {tuple(mask.shape)}"
            raise NotImplementedError(
                f"context_parallel: attention_mask must have shape (B, N), and this model has {kind}"
            )
        packed = [name for name in PACKED if kwargs.get(name) is not None]
        if positions is not None and mask is None:  # where Transformers looks for sequences in a row
            of_text = positions if positions.dim() == 2 else positions[0] if len(positions) == 4 else None
            if of_text is not None and (of_text.diff(dim=-1) != 1).any():
                packed.append("position_ids")
        if packed:
            raise NotImplementedError(
                f"context_parallel: {', '.join(packed)} describe packed sequences; pad them instead, each in a row"
            )

    def _cut_deepstack(self, kwargs: dict) -> None:
        """Features of images that go into the first layers, one for each token of ``visual_pos_masks`` (B, N)."""
        seen, features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
        if seen is None:
            return
        index = (seen.flatten().cumsum(0) - 1).view_as(seen)  # of a token's feature
        own = self.shards.shard(seen, 1)
        kwargs["visual_pos_masks"] = own
        if features is not None:
            kwargs["deepstack_visual_embeds"] = [each[self.shards.shard(index, 1)[own]] for each in features]

    def _refuse_the_unknown(self, kwargs: dict, whole: torch.Size) -> None:
        """An argument with a number for every token, of which nobody here knows, would be that of other tokens."""
        for name, value in kwargs.items():
            if not isinstance(value, Tensor) or name in CUT or self.shards.size == 1:
                continue
            if whole[1] in (*value.shape[1:2], *value.shape[-1:]):
                raise NotImplementedError(
                    f"context_parallel: the text stack is given {name} of shape {tuple(value.shape)}, of the whole "
                    "sequence, and this does not know how to cut it"
                )


class ContextParallelTrainerMixin(_Trainer):
    """A ``Trainer`` whose ranks share sequences, as :func:`context_parallel` has them: ``class T(Mixin, Trainer)``.

    The ranks of a mesh get the same batches and count as one where tokens and batches are counted; DDP and FSDP take
    them for data ranks. Losses, gradients and steps are those of a Trainer with a process for each mesh. Pad to a
    multiple of the number of chunks (``pad_to_multiple_of`` of a collator). Evaluation gives the loss.

    Args:
        context_mesh: a ``DeviceMesh`` of one dimension, of ranks that follow each other: the innermost dimension of a
            larger mesh. Make it after the ``TrainingArguments``, which start the process group.
        context_options: the other keyword arguments of :func:`context_parallel`.
        args, kwargs: the Trainer's.

    Raises:
        ValueError: ranks that do not follow each other.
        NotImplementedError: a dataset without a length, or an evaluation that asks for more than the loss.

    Example:
        >>> class ContextParallelTrainer(ContextParallelTrainerMixin, Trainer):  # doctest: +SKIP
        ...     pass
        >>> args = TrainingArguments("out")  # doctest: +SKIP
        >>> mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "cp"))["cp"]  # doctest: +SKIP
        >>> ContextParallelTrainer(model, args, context_mesh=mesh, train_dataset=dataset).train()  # doctest: +SKIP
    """

    def __init__(
        self, *args: Any, context_mesh: DeviceMesh, context_options: dict[str, Any] | None = None, **kwargs: Any
    ):
        size, ranks = context_mesh.size(), context_mesh.mesh.flatten().tolist()
        if context_mesh.ndim != 1 or ranks != list(range(ranks[0], ranks[0] + size)) or ranks[0] % size:
            raise ValueError(
                f"ContextParallelTrainerMixin: context_mesh must be of one dimension, of {size} ranks that follow each "
                f"other from a multiple of {size}, as batches are dealt to ranks; got {context_mesh.mesh.tolist()}"
            )
        self._context_mesh, self._context_options, self._in_context = context_mesh, context_options or {}, False
        super().__init__(*args, **kwargs)

    def get_cp_size(self) -> int:
        return self._context_mesh.size()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self._entered():
            return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._entered():
            self.gather_function = self._gather_losses  # for this loop, which sets it back
            return super().evaluation_loop(*args, **kwargs)

    def _gather_losses(self, losses: Tensor) -> Tensor:
        """As Accelerate's ``gather_for_metrics``, of one rank of each mesh: the others have the same samples."""
        every = self.accelerator.gather(losses).unflatten(0, (-1, self._context_mesh.size(), len(losses)))
        state = self.accelerator.gradient_state
        last = state.end_of_dataloader and state.remainder > 0
        of_samples: Tensor = every[:, 0].flatten()[: state.remainder if last else None]
        return of_samples

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not prediction_loss_only:
            raise NotImplementedError(
                "ContextParallelTrainerMixin: a rank has the logits of its own tokens, and evaluation gives the loss "
                "alone; set prediction_loss_only=True in the TrainingArguments, without compute_metrics"
            )
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None:
            loss = loss.clone()
            torch.distributed.all_reduce(loss, group=self._context_mesh.get_group())
            loss /= self._context_mesh.size()
        return loss, logits, labels

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        dealt: Any = getattr(loader, "batch_sampler", None)
        if self.args.world_size > 1 and getattr(dealt, "num_processes", None) != self.args.world_size:
            raise NotImplementedError(
                "ContextParallelTrainerMixin: batches must be dealt by Accelerate's BatchSamplerShard, got "
                f"{type(dealt).__name__}: give a dataset with a length, and no batches that are balanced over the ranks"
            )
        if self.args.world_size > 1:
            size = self._context_mesh.size()
            dealt.num_processes, dealt.process_index = dealt.num_processes // size, dealt.process_index // size
            # Transformers seeds workers by rank, and those of one sequence would crop its pictures differently.
            seed = getattr(loader, "worker_init_fn", None)
            if isinstance(seed, functools.partial) and "rank" in seed.keywords:
                rank = seed.keywords["rank"] // size
                loader.worker_init_fn = functools.partial(seed.func, *seed.args, **{**seed.keywords, "rank": rank})
            if dealt.num_processes == 1:  # then the last batch needs no other of its size
                dealt.even_batches = False
        return loader

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        if self._in_context:  # an evaluation while training
            yield
            return
        assert isinstance(self.model, nn.Module), "a Trainer has made it"
        with context_parallel(self.model, self._context_mesh, **self._context_options):
            self._in_context = True
            try:
                yield
            finally:
                self._in_context = False
