"""Conversations about pictures, in LLaVA's format: what is trained on, asked, and calibrated with.

One JSON object for each conversation, a JSON list of them or one a line::

    {"id": "7", "image": "photo.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                        {"from": "gpt", "value": "A cat."}]}

``image``, or ``images``, is a path, below the file's folder or the one that is named, or a list of paths, one for each
``<image>``.
``{"from": "system", ...}`` may come first. All other keys are kept as :attr:`Conversation.fields`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature

__all__ = ["Conversation", "encode", "load_picture", "read_conversations", "render", "write_conversations"]

PLACEHOLDER = "<image>"
HINTS = ("none", "right", "wrong")  # what the field "hint" of a question may be
# Options of generate for the likeliest token, whatever the checkpoint's generation_config says: a penalty on repetition
# would be one on hints.
GREEDY: dict[str, Any] = {
    "num_beams": 1,
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Some turns about some pictures.

    Attributes:
        id: of the conversation.
        messages: ``(role, text)`` of each turn: ``"system"`` may come first, then ``"user"`` and ``"assistant"`` in
            turns. Each ``<image>`` in a text is the place of a picture.
        images: a file or a PIL image for each ``<image>``, in their order.
        fields: what else is known of it, such as ``task``.
    """

    id: str
    messages: tuple[tuple[str, str], ...]
    images: tuple[Path | Image, ...] = ()
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        roles = [role for role, _ in self.messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if not turns or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
            raise ValueError(f"conversation {self.id}: user and assistant must take turns, the user first, got {roles}")
        places = sum(text.count(PLACEHOLDER) for _, text in self.messages)
        if places != len(self.images):
            raise ValueError(f"conversation {self.id}: {places} times {PLACEHOLDER} and {len(self.images)} images")

    @classmethod
    def from_record(cls, record: Mapping[str, Any], folder: str | Path = ".") -> Conversation:
        """Of one JSON object.

        Args:
            record: the object. ``image`` may hold PIL images too, as those of Hugging Face datasets do. Where no text
                has the placeholder, the pictures come first in the user's first turn.
            folder: of its images.

        Raises:
            ValueError: what is missing or does not go together.
        """
        name = str(record.get("id", "without id"))
        turns = record.get("conversations")
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
            raise ValueError(f"conversation {name}: 'conversations' must be a list of turns, got {turns!r}")
        messages = []
        for turn in turns:
            speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
            if speaker not in ROLES or not isinstance(text, str):
                raise ValueError(
                    f"conversation {name}: a turn must be {{'from': one of {', '.join(ROLES)}, 'value': text}}, got "
                    f"{turn!r}"
                )
            messages.append((ROLES[speaker], text))
        both = [picture for key in ("image", "images") if (picture := record.get(key)) is not None]
        if len(both) > 1:
            raise ValueError(f"conversation {name}: has 'image' and 'images'; one must hold all of its pictures")
        pictures = both[0] if both else None
        pictures = [] if pictures is None else pictures if isinstance(pictures, list) else [pictures]
        images = tuple(Path(folder, picture) if isinstance(picture, (str, Path)) else picture for picture in pictures)
        if images and not any(PLACEHOLDER in text for _, text in messages):
            first = next((i for i, (role, _) in enumerate(messages) if role == "user"), 0)
            role, text = messages[first]
            messages[first] = (role, "\n".join([*[PLACEHOLDER] * len(images), text]))
        known = ("id", "conversations", "image", "images")
        fields = {key: value for key, value in record.items() if key not in known}
        return cls(name, tuple(messages), images, fields)

    @property
    def prompt(self) -> Conversation:
        """Without the last answer."""
        if self.messages[-1][0] != "assistant":
            return self
        return dataclasses.replace(self, messages=self.messages[:-1])

    @property
    def answer(self) -> str:
        """The last answer.

        Raises:
            ValueError: the last turn is the user's.
        """
        role, text = self.messages[-1]
        if role != "assistant":
            raise ValueError(f"conversation {self.id}: has no answer")
        return text

    def chat(self) -> list[dict]:
        """Messages for ``processor.apply_chat_template``."""
        return [{"role": role, "content": _parts(text)} for role, text in self.messages]

    def pictures(self) -> list[Image]:
        """The images, as RGB and upright (:func:`load_picture`).

        Raises:
            FileNotFoundError: there is no such file.
            OSError: a file that is no image.
        """
        return [load_picture(image) for image in self.images]


def load_picture(image: str | Path | Image) -> Image:
    """A file or a PIL image as RGB, upright: a camera notes in EXIF how it was held.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: a file that is no image.
    """
    from PIL import Image, ImageOps

    with Image.open(image) if isinstance(image, (str, Path)) else contextlib.nullcontext(image) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


def _parts(text: str) -> list[dict]:
    """The pictures and the texts of one turn. A line break between them is the template's business."""
    parts: list[dict] = []
    for i, piece in enumerate(text.split(PLACEHOLDER)):
        if i:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


def read_conversations(path: str | Path, folder: str | Path | None = None) -> list[Conversation]:
    """The conversations of a file: JSON lines, or one JSON list of objects as LLaVA publishes them.

    Args:
        path: the file.
        folder: of the images; by default that of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is no conversation, by its number, or a file without any.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    records: list[tuple[str, Any]]
    try:
        if text.lstrip().startswith("["):
            records = [(f"entry {i + 1}", record) for i, record in enumerate(json.loads(text))]
        else:
            lines = enumerate(text.split("\n"))  # and at no other line break of Unicode: it may be in a text
            records = [(f"line {i + 1}", json.loads(line)) for i, line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not records:
        raise ValueError(f"{path}: no conversations")
    found = []
    for place, record in records:
        try:
            if not isinstance(record, Mapping):
                raise ValueError(f"a conversation must be a JSON object, got {record!r}")
            found.append(Conversation.from_record(record, path.parent if folder is None else folder))
        except ValueError as error:
            raise ValueError(f"{path}, {place}: {error}") from error
    return found


def write_conversations(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines of records as :meth:`Conversation.from_record` reads them."""
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def encode(
    processor: Any, conversations: Sequence[Conversation], *, padding_side: str
) -> tuple[BatchFeature, list[str]]:
    """``(inputs, texts)``: what a model takes, and each conversation as the processor's chat template writes it.

    A conversation that ends with the user's turn gets the words that begin an answer.

    Args:
        processor: of a checkpoint.
        conversations: all with pictures, or all without.
        padding_side: ``"left"`` to generate, ``"right"`` to train.

    Raises:
        ValueError: a processor without a chat template, or conversations of both kinds.
    """
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            "the processor of this checkpoint has no chat template, so no conversation can be written for it"
        )
    if len({bool(c.images) for c in conversations}) > 1:
        raise ValueError("encode: conversations with pictures and without cannot be in one batch")
    texts = [render(processor, c) for c in conversations]
    options: dict[str, Any] = {"images": [c.pictures() for c in conversations]} if conversations[0].images else {}
    if begins_itself(processor, texts[0]):
        options["add_special_tokens"] = False
    # As an argument: some processors have a side of their own, which wins over the tokenizer's.
    inputs = processor(text=texts, padding=True, padding_side=padding_side, return_tensors="pt", **options)
    return inputs, texts


def begins_itself(processor: Any, text: str) -> bool:
    """Whether a chat template has written the token that begins a text, which a tokenizer would write once more."""
    first = processor.tokenizer.bos_token
    return bool(first) and text.startswith(first)


def render(processor: Any, conversation: Conversation) -> str:
    """The text of a conversation, by the processor's chat template.

    Raises:
        ValueError: the template refuses it, such as one with a system turn.
    """
    from jinja2 import TemplateError

    unanswered = conversation.messages[-1][0] == "user"
    try:
        return processor.apply_chat_template(conversation.chat(), tokenize=False, add_generation_prompt=unanswered)
    except TemplateError as error:
        raise ValueError(f"conversation {conversation.id}: the chat template refuses it: {error}") from error
