"""What a model is judged on: questions with expected answers, from a file of one's own or a published data set."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from moda_ext.conversations import HINTS, Conversation, read_conversations
from moda_ext.evaluation.answers import normalize

__all__ = ["Task", "read_questions", "read_tasks"]

SEED = 0  # of what is drawn
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions of one kind.

    Attributes:
        name: such as ``"object"`` or ``"mvsa-single"``.
        conversations: each ends with the answer that is expected.
        group: such as ``"perception"``, ``"cognition"`` or ``"emotion"``.
        hint: whether the questions hold a hint, ``"none"``, ``"right"`` or ``"wrong"``; a hint is the field ``hinted``
            of a conversation, and ``question`` is a key which the forms of one question share.
        labels: of a classification, else empty.
        positive: of two labels, the one that F1 is about.
        judged: the answers are long, and scored by a judge.
        max_new_tokens: of an answer.
        notes: sentences for the report, such as where a split comes from.

    Raises:
        ValueError: no questions, one without an answer, a hint that is none or does not suggest what it should, an
            answer that is not among the choices, or two questions with one key.
    """

    name: str
    conversations: tuple[Conversation, ...]
    group: str = ""
    hint: str = "none"
    labels: tuple[str, ...] = ()
    positive: str | None = None
    judged: bool = False
    max_new_tokens: int = 32
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.conversations:
            raise ValueError(f"task {self.name}: has no questions")
        if self.hint not in HINTS:
            raise ValueError(f"task {self.name}: 'hint' must be {', '.join(HINTS)}, got {self.hint!r}")
        keys = [str(key) for c in self.conversations if (key := c.fields.get("question")) is not None]
        if len(set(keys)) < len(keys):
            raise ValueError(f"task {self.title}: two of its lines have the same 'question'")
        for conversation in self.conversations:
            self._check(conversation)

    def _check(self, conversation: Conversation) -> None:
        choices, hinted = self.choices(conversation), conversation.fields.get("hinted")
        answer = normalize(conversation.answer)
        if not answer:
            raise ValueError(f"conversation {conversation.id}: its answer is empty")
        if choices and answer not in map(normalize, choices):
            raise ValueError(f"conversation {conversation.id}: the answer {answer!r} is none of the choices {choices}")
        if self.hint == "none":
            return
        if not isinstance(hinted, str):
            raise ValueError(f"conversation {conversation.id}: has a hint, so 'hinted' must be the answer it suggests")
        if (normalize(hinted) == answer) != (self.hint == "right"):
            raise ValueError(
                f"conversation {conversation.id}: {hinted!r} is no {self.hint} hint where the answer is {answer!r}"
            )

    @property
    def title(self) -> str:
        """The name, with the hint."""
        return self.name if self.hint == "none" else f"{self.name}, {self.hint} hint"

    def choices(self, conversation: Conversation) -> tuple[str, ...]:
        """The answers that a question leaves, or () where any text may be one."""
        return self.labels or tuple(conversation.fields.get("choices", ()))

    def limited(self, limit: int | None) -> Task:
        """So many of its questions: the first, or drawn where it has labels, by which a data set may be sorted."""
        number = len(self.conversations)
        if limit is None or limit >= number:
            return self
        if self.labels:
            kept = sorted(random.Random(SEED).sample(range(number), limit))
            note = f"{limit} of {number} questions, drawn with the seed {SEED}."
        else:
            kept, note = list(range(limit)), f"The first {limit} of {number} questions."
        return dataclasses.replace(
            self, conversations=tuple(self.conversations[i] for i in kept), notes=(*self.notes, note)
        )


def read_questions(path: str | Path) -> list[Task]:
    """The tasks of a file of conversations: one for each ``task`` and ``hint`` among its lines, in their order.

    A line may say ``task``, ``group``, ``hint``, ``hinted``, ``question`` and ``choices``; see :class:`Task`. Without
    ``task`` it belongs to one with the name of the file.

    Args:
        path: of the file (:func:`moda_ext.conversations.read_conversations`), or of a folder with a ``test.jsonl``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is no question, or a task in two groups.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "test.jsonl"
    found: dict[tuple[str, str], list[Conversation]] = {}
    groups: dict[str, str] = {}
    for conversation in read_conversations(path):
        fields = conversation.fields
        name, group, choices = fields.get("task", path.stem), fields.get("group", ""), fields.get("choices", [])
        hint, key, place = fields.get("hint", "none"), fields.get("question"), f"conversation {conversation.id}"
        for field, value in (("task", name), ("group", group)):
            if not isinstance(value, str):
                raise ValueError(f"{path}, {place}: {field!r} must be text, got {value!r}")
        if hint not in HINTS:
            raise ValueError(f"{path}, {place}: 'hint' must be {', '.join(HINTS)}, got {hint!r}")
        if key is not None and not isinstance(key, (str, int, float)):
            raise ValueError(f"{path}, {place}: 'question' must be text or a number, got {key!r}")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise ValueError(f"{path}, {place}: 'choices' must be a list of texts, got {choices!r}")
        if groups.setdefault(name, group) != group:
            raise ValueError(f"{path}: the task {name!r} is in two groups, {groups[name]!r} and {group!r}")
        found.setdefault((name, hint), []).append(conversation)
    try:
        return [Task(name, tuple(asked), groups[name], hint) for (name, hint), asked in found.items()]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def readers() -> dict[str, Callable[[Path], list[Task]]]:
    """How each set of tasks that has a name is read from the folder of its data."""
    from moda_ext.evaluation import hfm, mmrole, mvsa, tumemo  # which need what is above

    return {
        "small": read_questions,
        "mvsa-single": functools.partial(mvsa.read, annotators=1),
        "mvsa-multiple": functools.partial(mvsa.read, annotators=3),
        "tumemo": tumemo.read,
        "hfm": hfm.read,
        "mmrole": mmrole.read,
    }


def read_tasks(names: Sequence[str], data: str | Path | None = None, limit: int | None = None) -> list[Task]:
    """The tasks that are named, with their pictures in place.

    Args:
        names: ``"small"`` (a ``test.jsonl``), ``"mvsa-single"``, ``"mvsa-multiple"``, ``"tumemo"``, ``"hfm"``,
            ``"mmrole"``, or files of questions (:func:`read_questions`).
        data: folder of the named sets, or one that holds their folders.
        limit: how many questions of each task to keep (:meth:`Task.limited`).

    Raises:
        FileNotFoundError: a file that is missing, a picture included.
        ValueError: a name that is none, no ``data`` for it, or data in another layout than the published one.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    known, found = readers(), []
    for name in names:
        if name in known:
            if data is None:
                raise ValueError(f"the tasks {name!r} need the folder of their data")
            found += known[name](Path(data))
        elif Path(name).exists():
            found += read_questions(name)
        else:
            raise ValueError(f"{name!r} is no file of questions and none of {', '.join(known)}")
    titles = [task.title for task in found]
    for title in titles:
        if titles.count(title) > 1:
            raise ValueError(f"there are two tasks {title!r}")
    found = [task.limited(limit) for task in found]
    for task in found:
        check_pictures(task.conversations)
    return found


def check_pictures(conversations: Sequence[Conversation]) -> None:
    """Refuses conversations without their pictures.

    Raises:
        FileNotFoundError: a picture is missing.
    """
    for conversation in conversations:
        for image in conversation.images:
            if isinstance(image, Path) and not image.is_file():
                raise FileNotFoundError(f"conversation {conversation.id}: no such image: {image}")


def locate(data: Path, markers: Sequence[str], names: Sequence[str]) -> Path:
    """The folder that holds one of ``markers``: ``data``, or the first below it that is named so.

    Raises:
        FileNotFoundError: none does.
    """
    folders = [data, *(data / name for name in names)]
    for folder in folders:
        if any((folder / marker).exists() for marker in markers):
            return folder
    raise FileNotFoundError(f"no {' or '.join(markers)} in {', '.join(map(str, folders))}")


def picture_folder(folder: Path, names: Sequence[str]) -> Path:
    """Where a data set has its pictures: the first of these folders that is there, or itself."""
    return next((folder / name for name in names if (folder / name).is_dir()), folder)


def draw_test(items: Sequence[Item], name: str) -> tuple[list[Item], str]:
    """``(test, note)``: a tenth of the items, drawn with a fixed seed, where no split is published.

    The order is that of ``random.Random(SEED).shuffle``: the first 80 % would be for training, 10 % for validation.
    """
    order = list(range(len(items)))
    random.Random(SEED).shuffle(order)
    start = len(order) * 9 // 10
    note = (
        f"{name}: no official split was found, so the test set is a tenth drawn with the seed {SEED}; figures of other "
        "splits are not comparable one to one."
    )
    return [items[i] for i in sorted(order[start:])], note


def question(record_id: str, image: Path, prompt: str, answer: str, labels: Sequence[str]) -> Conversation:
    """A question about one picture, asked with the labels it may be answered with."""
    turns = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": answer}]
    return Conversation.from_record(
        {"id": record_id, "image": image.name, "conversations": turns, "choices": list(labels)}, folder=image.parent
    )
