"""What a model answers: generated, or forced along the expected answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from moda_ext.conversations import GREEDY, Conversation, encode, render
from moda_ext.training.collator import IGNORED, Collator

__all__ = ["forced_matches", "generate_answers", "normalize"]

Progress = Callable[[Iterable], Iterable]


def normalize(answer: str) -> str:
    """An answer as exact match compares it: without case, surrounding space and a full stop at its end."""
    return " ".join(answer.split()).casefold().removesuffix(".").rstrip()


def batches(conversations: Sequence[Conversation], processor: Any, batch_size: int) -> list[list[int]]:
    """Indices of conversations that go together: all with pictures or all without, of about the same length."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    lengths = [len(render(processor, c)) for c in conversations]
    found = []
    for pictured in (True, False):
        order = [i for i, c in enumerate(conversations) if bool(c.images) is pictured]
        order.sort(key=lengths.__getitem__)
        found += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return found


@torch.no_grad()
def generate_answers(
    model: Any,
    processor: Any,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    progress: Progress = iter,
    **generate: Any,
) -> list[str]:
    """The answer to the last turn of each conversation, decoded greedily.

    Args:
        model, processor: as :func:`moda_ext.diagnostics.load_model` gives them.
        conversations: those that end with an answer are asked again, without it.
        max_new_tokens: of an answer; a longer one is cut.
        batch_size: conversations at a time.
        progress: wraps the list of batches, for a progress bar.
        **generate: more arguments of ``model.generate``.

    Returns:
        The answers in order, without special tokens and surrounding space.

    Raises:
        ValueError: a checkpoint without a chat template, or a batch size below 1.
        OSError: a picture that cannot be read.
    """
    asked = [c.prompt for c in conversations]
    answers = [""] * len(asked)
    tokenizer = processor.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for batch in progress(batches(asked, processor, batch_size)):
        inputs, _ = encode(processor, [asked[i] for i in batch], padding_side="left")
        inputs = inputs.to(model.device, model.dtype)
        options = {"max_new_tokens": max_new_tokens, "pad_token_id": pad, **GREEDY, **generate}
        tokens = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        for i, answer in zip(batch, processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
            answers[i] = answer.strip()
    return answers


@torch.no_grad()
def forced_matches(
    model: Any,
    processor: Any,
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 8,
    progress: Progress = iter,
    **forward: Any,
) -> list[bool]:
    """Whether the model, led along the last answer of each conversation, would write every token of it.

    That is whether greedy decoding writes that answer and ends there, in one forward pass. Where the chat template has
    no token that ends an answer, it is whether it begins with that answer.

    Args:
        model, processor, batch_size, progress: as in :func:`generate_answers`.
        conversations: with answers.
        **forward: more arguments of the model.

    Raises:
        ValueError: a conversation without an answer.
    """
    collate = Collator(processor, needs_end=False)
    matches = [False] * len(conversations)
    for conversation in conversations:
        conversation.answer  # noqa: B018  raises before anything runs
    for batch in progress(batches(conversations, processor, batch_size)):
        logits, labels = forced_logits(model, collate, [conversations[i] for i in batch], **forward)
        right = (logits.argmax(dim=-1).cpu() == labels) | (labels == IGNORED)
        for i, match in zip(batch, right.all(dim=1).tolist(), strict=True):
            matches[i] = match
    return matches


def forced_logits(
    model: Any, collate: Collator, conversations: Sequence[Conversation], **forward: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(logits, labels)`` of a model that is led along the last answers: each logit beside the token that comes next.

    Args:
        model: in evaluation mode.
        collate: of its processor.
        conversations: a batch, with answers.
        **forward: more arguments of the model.

    Returns:
        (B, n, V) on the model's device and (B, n) on the CPU, from the first token of an answer in the batch on. A
        label that is no token of a last answer is ``IGNORED``.
    """
    inputs = collate(conversations)
    labels = only_last(inputs.pop("labels"))[:, 1:]
    inputs = {k: v.to(model.device) for k, v in inputs.items()}
    inputs |= {k: v.to(model.dtype) for k, v in inputs.items() if v.is_floating_point()}
    first = int((labels != IGNORED).any(dim=0).nonzero()[0])
    kept = labels.shape[1] - first + 1  # and the last one, after which nothing comes
    logits = model(**inputs, use_cache=False, logits_to_keep=kept, **forward).logits
    return logits[:, :-1], labels[:, first:]


def only_last(labels: torch.Tensor) -> torch.Tensor:
    """(B, N) labels of the last answer of each row alone."""
    kept = torch.full_like(labels, IGNORED)
    for row, line in enumerate(labels):
        places = (line != IGNORED).nonzero()[:, 0]
        gaps = (places.diff() > 1).nonzero()
        start = places[int(gaps[-1]) + 1] if len(gaps) else places[0]
        kept[row, start:] = line[start:]
    return kept
