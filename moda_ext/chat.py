"""A conversation with a vision-language model: turns with pictures, answers as they are written, where they looked."""

from __future__ import annotations

import dataclasses
import json
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moda_ext.conversations import GREEDY, PLACEHOLDER, Conversation, encode

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature

    from moda_ext.diagnostics import Picture

__all__ = ["AnswerAttention", "ChatSession", "Shares", "model_notes", "read_dialogue"]

SMALL = 1_000_000_000  # parameters


@dataclasses.dataclass(frozen=True)
class Shares:
    """How attention is shared out; pictures, text and sink sum to 1.

    Attributes:
        pictures: the part of each picture of the conversation, in their order.
        text: the part of all other tokens, those of the answer among them.
        sink: what goes to no token: the sink of MODA's pseudo scores. 0 in a plain model.
    """

    pictures: tuple[float, ...]
    text: float
    sink: float


@dataclasses.dataclass(frozen=True)
class AnswerAttention:
    """Where the tokens of an answer looked: mean over them, over heads and over layers.

    Attributes:
        shares: of the model.
        uniform: of uniform attention over what the same tokens see.
        maps: where in each picture, as :class:`moda_ext.diagnostics.Picture`; None where its tokens are not a grid.
        notes: sentences that say why.
    """

    shares: Shares
    uniform: Shares
    maps: tuple[Picture | None, ...]
    notes: tuple[str, ...]


class ChatSession:
    """Several turns with a model, each read from the start of the conversation.

    Args:
        model, processor: as :func:`moda_ext.diagnostics.load_model` gives them, with MODA or without.
        system: the system message, if any. It may be set later; an attribute, as are the next three.
        max_new_tokens: of an answer; a longer one is cut.
        temperature: of sampling; 0 takes the likeliest token, without the checkpoint's penalty on repetition if any.
        top_p: samples from the likeliest tokens that have this probability together.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> session = ChatSession(*load_model("random"))
        >>> for piece in session.ask("What is on the table?", [Path("photo.jpg")]):
        ...     print(piece, end="", flush=True)
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        system: str | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ):
        if max_new_tokens < 1:
            raise ValueError(f"ChatSession: max_new_tokens must be at least 1, got {max_new_tokens}")
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"ChatSession: temperature must be finite and at least 0, got {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"ChatSession: top_p must be above 0 and at most 1, got {top_p}")
        self.model, self.processor, self.system = model, processor, system
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        self.reset()

    def reset(self) -> None:
        """Forgets the turns, but not the system message."""
        self._turns: tuple[tuple[str, str], ...] = ()
        self._images: tuple[Path | Image, ...] = ()
        self._last: tuple[BatchFeature, Tensor] | None = None  # what the last answer was made from, and its tokens

    @property
    def conversation(self) -> Conversation:
        """What was said until now.

        Raises:
            ValueError: nothing was.
        """
        return self._conversation(self._turns, self._images)

    def record(self) -> dict[str, Any]:
        """The conversation as :func:`moda_ext.conversations.write_conversations` takes it; paths are absolute.

        Raises:
            ValueError: nothing was said, or a picture is not a file.
        """
        conversation = self.conversation
        files = [image for image in conversation.images if isinstance(image, Path)]
        if len(files) < len(conversation.images):
            raise ValueError("ChatSession.record: a picture of the conversation is not a file")
        speakers = {"user": "human", "assistant": "gpt", "system": "system"}
        turns = [{"from": speakers[role], "value": text} for role, text in conversation.messages]
        images = {"image": [str(file.resolve()) for file in files]} if files else {}
        return {"id": conversation.id, **images, "conversations": turns}

    def ask(self, text: str, images: Sequence[str | Path | Image] = ()) -> Generator[str, None, None]:
        """Asks, and gives the pieces of the answer as they are written: together what ``generate`` gives, decoded.

        The question and its answer are part of the conversation once the iteration ends. Ended early (``close()``, or
        an exception such as KeyboardInterrupt where a piece is waited for), it stops the model, and the answer stays as
        far as it was written. After an error nothing of the turn stays.

        Args:
            text: the question. Each ``<image>`` in it is the place of a picture; without one they come first.
            images: the new pictures, files or PIL images.

        Raises:
            ValueError: pictures that do not go with the text, a conversation that the chat template refuses or that
                with ``max_new_tokens`` is longer than the model's positions.
            OSError: a picture that cannot be read.
            Exception: while iterating, what the model raised.
        """
        new = tuple(Path(image) if isinstance(image, str) else image for image in images)
        if new and PLACEHOLDER not in text:
            text = "\n".join([*[PLACEHOLDER] * len(new), text])
        turns, pictures = (*self._turns, ("user", text)), (*self._images, *new)
        return self._answer(turns, pictures, self._encode(self._conversation(turns, pictures)))

    def attention(self) -> AnswerAttention:
        """Where the tokens of the last answer looked, measured by one more pass over the conversation up to its end.

        Its last token has no part in it: nothing was written from it, so it never looked.

        Raises:
            ValueError: there is no answer, or one of a single token; or the pictures' tokens cannot be told apart.
        """
        from moda_ext.diagnostics import AttentionMeter, Picture

        if self._last is None or len(self._last[1]) < 2:
            raise ValueError("no attention to show: it takes an answer of two tokens or more")
        inputs, tokens = self._last
        whole, length = _with_answer(inputs, tokens[:-1]), inputs["input_ids"].shape[1]
        places, grids, notes = self._places(whole["input_ids"][0])
        with (
            torch.no_grad(),
            AttentionMeter(self.model, token_scores=1, score_rows="generated") as meter,
            meter.generated_after(length),
        ):
            self.model(**whole, use_cache=False, logits_to_keep=1)
        (looks,) = meter.result().token_scores
        scores, uniform = looks.scores.double().mean(dim=0), looks.uniform.double()
        maps = [
            Picture(grid.title, grid.image, grid.shape, scores[grid.places], uniform[grid.places]) if grid else None
            for grid in grids
        ]
        return AnswerAttention(_shares(scores, places), _shares(uniform, places), tuple(maps), tuple(notes))

    def _conversation(self, turns: tuple[tuple[str, str], ...], images: tuple[Path | Image, ...]) -> Conversation:
        system = () if self.system is None else (("system", self.system),)
        return Conversation("chat", (*system, *turns), images)

    def _encode(self, conversation: Conversation) -> BatchFeature:
        inputs, _ = encode(self.processor, [conversation], padding_side="left")
        needed = inputs["input_ids"].shape[1] + self.max_new_tokens
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and needed > most:
            raise ValueError(
                f"the conversation and an answer of {self.max_new_tokens} tokens are {needed} tokens, and the model "
                f"has {most} positions: begin a new one, or ask for shorter answers"
            )
        return inputs.to(self.model.device, self.model.dtype)  # of these, floating-point ones only

    def _answer(
        self, turns: tuple[tuple[str, str], ...], images: tuple[Path | Image, ...], inputs: BatchFeature
    ) -> Generator[str, None, None]:
        written, stopped = _Written(), threading.Event()
        with ThreadPoolExecutor(1) as pool:
            generating = pool.submit(
                self.model.generate,
                **inputs,
                **self._options(),
                streamer=written,
                stopping_criteria=[lambda ids, scores: ids.new_full((len(ids),), stopped.is_set(), dtype=torch.bool)],
            )
            generating.add_done_callback(lambda _: written.end())  # after an error too, or nobody would wake up
            try:
                yield from self._pieces(written)
            finally:
                stopped.set()
                tokens = generating.result()[0, inputs["input_ids"].shape[1] :]  # raises what the model raised
                self._turns = (*turns, ("assistant", self._decode(tokens.tolist()).strip()))
                self._images, self._last = images, (inputs, tokens)

    def _options(self) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {
            "max_new_tokens": self.max_new_tokens,
            "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **(sampling if self.temperature > 0 else GREEDY),
            "num_beams": 1,  # beams cannot be streamed
        }

    def _pieces(self, written: _Written) -> Iterator[str]:
        """What each token adds to the text of all. A character is held back until its last byte has come."""
        tokens: list[int] = []
        shown = ""
        while new := written.get():
            tokens += new
            text = self._decode(tokens)
            if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}") and text != shown:
                yield text[len(shown) :]
                shown = text
        if rest := self._decode(tokens)[len(shown) :]:
            yield rest

    def _decode(self, tokens: list[int]) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _places(self, ids: Tensor) -> tuple[list[Tensor], list[_Grid | None], list[str]]:
        """The places of each picture among the tokens ``ids`` (N,), its grid, and why one has none.

        How many tokens a picture has, and which of them are a grid, shows where it is alone.
        """
        from moda_ext.diagnostics.runner import image_layout
        from moda_ext.integrations.settings import SUFFIX, placeholder

        token = placeholder(self.model.config, "image")
        alone = [self._encode(Conversation("", (("user", PLACEHOLDER),), (image,))) for image in self._images]
        own = [_places_of(token, inputs["input_ids"][0]) for inputs in alone]
        found = _places_of(token, ids)
        counts = [len(places) for places in own]
        if len(counts) > 1 and self.model.config.model_type.removesuffix(SUFFIX) == "llava_onevision":
            counts = [len(found) // len(counts)] * len(counts)  # of several pictures it cuts none into tiles
        if sum(counts) != len(found):
            raise ValueError(f"the {len(found)} tokens of the {len(counts)} pictures cannot be told apart")
        places = list(found.split(counts))
        grids: list[_Grid | None] = []
        notes = []
        for k, (image, inputs) in enumerate(zip(self._images, alone, strict=True)):
            title = image.name if isinstance(image, Path) else f"picture {k + 1}"
            seen = Conversation("", (("user", PLACEHOLDER),), (image,)).pictures()[0]
            drawn, grid, start, reason = image_layout(self.model, self.processor, inputs, seen)
            if drawn is None or grid is None or start is None:
                grids.append(None)
                notes.append(f"No map of {title}: {reason}.")
                continue
            first = int((own[k] < start).sum())
            grids.append(_Grid(title, drawn, grid, places[k][first : first + grid[0] * grid[1]]))
        return places, grids, notes


@dataclasses.dataclass
class _Grid:
    """The tokens of a picture that are a grid over all of it: its shape (h, w), and their places (h * w,)."""

    title: str
    image: Tensor
    shape: tuple[int, int]
    places: Tensor


class _Written:
    """Takes what ``generate`` gives its streamer, the prompt first, and hands on the new tokens from another thread."""

    def __init__(self) -> None:
        self._tokens: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        self._prompted = False

    def put(self, tokens: Tensor) -> None:
        if self._prompted:
            self._tokens.put(tokens.tolist())
        self._prompted = True

    def end(self) -> None:
        self._tokens.put([])

    def get(self) -> list[int]:
        """Waits for the next; nothing at the end."""
        return self._tokens.get()


def _with_answer(inputs: BatchFeature, tokens: Tensor) -> dict[str, Tensor]:
    """A model's inputs with more text after them: ids, mask, and the kinds of token where there are such."""
    shape = inputs["input_ids"].shape
    whole = dict(inputs)
    for name, value in inputs.items():
        if value.shape == shape:  # one number for each token: 1 in the mask, 0 for text in the others
            more = tokens[None] if name == "input_ids" else torch.full_like(tokens[None], name == "attention_mask")
            whole[name] = torch.cat([value, more.to(value)], dim=1)
    return whole


def _places_of(token: int | None, ids: Tensor) -> Tensor:
    return torch.tensor([place for place, found in enumerate(ids.tolist()) if found == token], dtype=torch.long)


def _shares(scores: Tensor, places: Sequence[Tensor]) -> Shares:
    """Of (N,) mean weights of the keys, with the places of each picture among them."""
    pictures = [scores[place].sum().item() for place in places]
    total = scores.sum().item()
    return Shares(tuple(pictures), total - sum(pictures), 1 - total)


def model_notes(model: Any, name: str) -> list[str]:
    """What to expect of the answers of a model, in sentences: of a small one, or one of random weights."""
    count = sum(parameter.numel() for parameter in model.parameters())
    if name == "random":
        return ["The weights of the model 'random' are random: its words mean nothing."]
    return [f"{count / 1e6:.3g}M parameters: expect the answers of a model of that size."] if count < SMALL else []


def read_dialogue(path: str | Path) -> list[tuple[str, str]]:
    """``(speaker, words)`` of each line of a dialogue.

    Args:
        path: JSON, a list of ``{"speaker": ..., "text": ...}``; or text, lines of ``speaker: words``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an entry or a line that is neither, by its number, or a file without any.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    lines: list[tuple[Any, Any]] = []
    if path.suffix.lower() == ".json":
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(entries, list):
            raise ValueError(f"{path}: a dialogue must be a JSON list, got {type(entries).__name__}")
        lines = [(e.get("speaker"), e.get("text")) if isinstance(e, dict) else (None, None) for e in entries]
    else:
        for line in filter(None, map(str.strip, text.splitlines())):
            speaker, colon, words = line.partition(":")
            lines.append((speaker.strip(), words.strip()) if colon else (None, None))
    for number, parts in enumerate(lines, 1):
        if not all(isinstance(part, str) and part for part in parts):
            raise ValueError(f"{path}, line {number}: must have a speaker and words")
    if not lines:
        raise ValueError(f"{path}: no dialogue")
    return lines
