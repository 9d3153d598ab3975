"""The conversations of a recipe, and the order in which a model sees them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from moda_ext.conversations import Conversation, read_conversations
from moda_ext.training.recipe import Source

if TYPE_CHECKING:
    import datasets

__all__ = ["draw_order", "fingerprints", "load_conversations"]


class Dataset(Sequence[Conversation]):
    """The rows of a Hugging Face dataset as conversations, read when they are asked for.

    Args:
        rows: with the columns ``conversations`` and perhaps ``image`` or ``images``.
        folder: of images that are named by their paths.

    Raises:
        ValueError: there is no column ``conversations``; in a call, a row that is no conversation, by its number.
    """

    def __init__(self, rows: datasets.Dataset, folder: str | Path = "."):
        if "conversations" not in rows.column_names:
            raise ValueError(f"the dataset must have a column 'conversations', got {', '.join(rows.column_names)}")
        self.rows, self.folder = rows, folder

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | Sequence[Conversation]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = {"id": str(index), **self.rows[index]}
        try:
            return Conversation.from_record(row, self.folder)
        except ValueError as error:
            raise ValueError(f"row {index} of the dataset: {error}") from error

    def have_images(self) -> list[bool]:
        """Whether each conversation has one, without decoding any."""
        found, columns = [False] * len(self), self.rows.with_format("arrow")
        if "image" in self.rows.column_names:
            found = columns["image"][:].is_valid().to_pylist()
        if "images" in self.rows.column_names:
            counts = columns["images"][:].combine_chunks().value_lengths().to_pylist()
            found = [before or bool(count) for before, count in zip(found, counts, strict=True)]
        return found


@dataclasses.dataclass(frozen=True)
class Selection(Sequence[Conversation]):
    """Some conversations of several sources, one after another.

    Attributes:
        parts: the sources.
        places: (source, index in it) of each conversation.
    """

    parts: Sequence[Sequence[Conversation]]
    places: Sequence[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | Sequence[Conversation]:
        if isinstance(index, slice):
            return Selection(self.parts, self.places[index])
        part, place = self.places[index]
        return self.parts[part][place]

    def have_images(self) -> list[bool]:
        """Whether each conversation has one."""
        found = [have_images(part) for part in self.parts]
        return [found[part][place] for part, place in self.places]


def have_images(conversations: Sequence[Conversation]) -> list[bool]:
    """Whether each conversation has an image, as cheaply as can be told."""
    if isinstance(conversations, (Dataset, Selection)):
        return conversations.have_images()
    return [bool(conversation.images) for conversation in conversations]


def load_conversations(sources: Sequence[Source], seed: int = 0) -> Selection:
    """The conversations of all sources, each as often and as much of it as it says.

    Args:
        sources: files, or Hugging Face datasets, whose rows are read when they are asked for.
        seed: draws the fractions.

    Raises:
        FileNotFoundError, ValueError: see :func:`moda_ext.conversations.read_conversations`.
        ImportError: ``datasets`` is not installed, and a source needs it.
    """
    parts = [_load(source) for source in sources]
    places = []
    for number, (source, part) in enumerate(zip(sources, parts, strict=True)):
        chosen = list(range(len(part)))
        if source.fraction < 1:
            drawn = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed + number))
            chosen = sorted(drawn[: max(1, round(source.fraction * len(part)))].tolist())
        places += [(number, index) for index in chosen] * source.repeat
    return Selection(parts, places)


def fingerprints(sources: Sequence[Source], selection: Selection) -> dict[str, str]:
    """By which a change of the data is seen: a file's SHA-256, or how many rows a Hugging Face dataset has.

    Args:
        sources: some.
        selection: what :func:`load_conversations` made of them.
    """
    found = {}
    for source, part in zip(sources, selection.parts, strict=True):
        if source.path is not None:
            found[source.path] = hashlib.sha256(Path(source.path).read_bytes()).hexdigest()
        else:
            found[f"{source.dataset}, {source.split}"] = f"{len(part)} rows"
    return found


def _load(source: Source) -> Sequence[Conversation]:
    if source.path is not None:
        return read_conversations(source.path, source.images)
    import datasets

    assert source.dataset is not None, "one of both, see Source.check"
    name: Any = source.dataset
    on_disk = (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file()
    if on_disk:  # what save_to_disk wrote
        rows = datasets.load_from_disk(name)
        rows = rows[source.split] if isinstance(rows, dict) else rows
    else:
        rows = datasets.load_dataset(name, split=source.split)
    return Dataset(rows, source.images or ".")


def draw_order(with_image: Sequence[bool], batch_size: int, batches: int, seed: int) -> list[int]:
    """The indices of the conversations in the order in which they are trained on.

    Epoch after epoch in an order of its own, without a break in between. Conversations with images and those without
    come in batches of their own, as processors want them: the ones that do not fill a batch wait for the next of their
    kind. It depends on the arguments alone, not on how many processes share the batches.

    Args:
        with_image: of each conversation, whether it has an image.
        batch_size: of a forward pass.
        batches: how many.
        seed: of the order.

    Returns:
        ``batches * batch_size`` indices.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting: dict[bool, list[int]] = {True: [], False: []}
    order: list[int] = []
    while len(order) < batches * batch_size:
        for index in torch.randperm(len(with_image), generator=generator).tolist():
            batch = waiting[with_image[index]]
            batch.append(index)
            if len(batch) == batch_size:
                order += batch
                batch.clear()
    return order[: batches * batch_size]
