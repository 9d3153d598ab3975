"""Conversations to the tensors that a model is trained on, with labels on the answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moda_ext.conversations import PLACEHOLDER, Conversation, encode, render

__all__ = ["Collator"]

IGNORED = -100  # a label that no loss counts
TURN_ENDS = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<end_of_utterance>"]  # beside eos_token


class Collator:
    """Batches of conversations for training: ``data_collator`` of a Trainer.

    The loss is on the assistant's turns, up to and with the token that ends a turn: what a model is to write when it
    answers, and nothing else. So no answer is a label of itself, and none is seen before it is asked for.

    Args:
        processor: of the checkpoint.
        max_length: in tokens, pictures included: longer conversations are an error, as cutting one would cut a picture
            or an answer. None for no limit.
        needs_end: whether a chat template that ends no answer with an end token, such as that of LLaVA-1.5, is an
            error, as a model would not learn to stop. Otherwise an answer ends there before the template's white space.

    Raises:
        ValueError: in a call, by the id of the conversation: one that is too long, has no answer or an empty one, or a
            picture in an answer; or a chat template that ends no answer, or writes the beginning of a conversation in
            another way once it goes on.
    """

    def __init__(self, processor: Any, max_length: int | None = None, *, needs_end: bool = True):
        self.processor, self.max_length, self.needs_end = processor, max_length, needs_end
        tokenizer = processor.tokenizer
        known = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(TURN_ENDS)}
        self._ends = known - {None, tokenizer.unk_token_id}

    def __call__(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        inputs, texts = encode(self.processor, conversations, padding_side="right")
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for row, (conversation, text) in enumerate(zip(conversations, texts, strict=True)):
            ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
            if self.max_length is not None and len(ids) > self.max_length:
                raise ValueError(
                    f"conversation {conversation.id}: {len(ids)} tokens, and max_length is {self.max_length}: shorten "
                    "it, or raise max_length"
                )
            spans = self.answer_spans(conversation, text, ids)
            if not spans or any(start == end for start, end in spans):
                raise ValueError(f"conversation {conversation.id}: has no answer to learn")
            places = inputs["attention_mask"][row].nonzero()[:, 0]
            for start, end in spans:
                labels[row, places[start:end]] = ids[start:end]
        return {**inputs, "labels": labels}

    def answer_spans(self, conversation: Conversation, text: str, ids: Tensor) -> list[tuple[int, int]]:
        """``(start, end)`` of each answer among the tokens of its conversation.

        Args:
            conversation: one.
            text: as its chat template writes it.
            ids: (N,), its tokens, without padding.
        """
        spans, whole = [], self._tokens(text)
        for turn, (role, answer) in enumerate(conversation.messages):
            if role != "assistant":
                continue
            if not answer.strip():
                raise ValueError(f"conversation {conversation.id}: an answer is empty: there is nothing to learn")
            if PLACEHOLDER in answer:
                raise ValueError(
                    f"conversation {conversation.id}: an answer has {PLACEHOLDER} in it, and a model cannot learn to "
                    "write a picture"
                )
            start = self._beginning(conversation, turn, text, whole, ids)
            end = self._beginning(conversation, turn + 1, text, whole, ids)
            stops = [i for i in range(start, end) if int(ids[i]) in self._ends]
            if not stops and self.needs_end:
                raise ValueError(
                    f"conversation {conversation.id}: the chat template does not end an answer with an end token, so a "
                    f"model would not learn to stop: let it write {self.processor.tokenizer.eos_token} there"
                )
            if stops:
                end = stops[-1] + 1
            while not stops and end > start and not self.processor.tokenizer.decode(ids[end - 1 : end]).strip():
                end -= 1
            spans.append((start, end))
        return spans

    def _beginning(self, conversation: Conversation, turns: int, text: str, whole: list[int], ids: Tensor) -> int:
        """How many tokens the first turns of a conversation have; ``whole`` are those of its text."""
        first = Conversation(
            conversation.id,
            conversation.messages[:turns],
            conversation.images[: sum(text.count(PLACEHOLDER) for _, text in conversation.messages[:turns])],
        )
        start = render(self.processor, first)
        if not text.startswith(start):
            raise ValueError(
                f"conversation {conversation.id}: the chat template writes its first {turns} turns in another way once "
                "it goes on, so its answers cannot be told apart"
            )
        if len(first.images) == len(conversation.images):  # what follows is text: no picture is cut into tokens again
            cut = self._tokens(start)
            count = len(ids) - (len(whole) - len(cut))
            same = whole[: len(cut)] == cut and whole[len(cut) :] == ids[count:].tolist()
        else:
            cut = encode(self.processor, [first], padding_side="right")[0]["input_ids"][0].tolist()
            count = len(cut)
            same = ids[:count].tolist() == cut
        if not same:
            raise ValueError(f"conversation {conversation.id}: a token lies across the end of turn {turns}")
        return count

    def _tokens(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
