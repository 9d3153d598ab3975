"""Conversations to the tensors that a model is trained on, with labels on the answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moda_ext.conversations import PLACEHOLDER, Conversation, encode, render

__all__ = ["Collator"]

IGNORED = -100  # a label that no loss counts


class Collator:
    """Batches of conversations for training: ``data_collator`` of a Trainer.

    The loss is on the assistant's turns, up to and with the token that ends a turn: what a model is to write when it
    answers, and nothing else. So no answer is a label of itself, and none is seen before it is asked for.

    Args:
        processor: of the checkpoint.
        max_length: in tokens, pictures included: longer conversations are an error, as cutting one would cut a picture
            or an answer. None for no limit.

    Raises:
        ValueError: in a call, a conversation that is too long or without an answer, or a chat template that writes the
            beginning of a conversation in another way once it goes on, by the id of the conversation.
    """

    def __init__(self, processor: Any, max_length: int | None = None):
        self.processor = processor
        self.max_length = max_length
        tokenizer = processor.tokenizer
        ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>"), *self._turn_ends()}
        self._ends = ends - {None, tokenizer.unk_token_id}

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
            if not spans:
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
        spans = []
        for turn, (role, _) in enumerate(conversation.messages):
            if role != "assistant":
                continue
            asked = self._beginning(conversation, turn, text, ids)
            answered = self._beginning(conversation, turn + 1, text, ids)
            stops = [i for i in range(asked, answered) if int(ids[i]) in self._ends]
            spans.append((asked, stops[-1] + 1 if stops else answered))
        return spans

    def _beginning(self, conversation: Conversation, turns: int, text: str, ids: Tensor) -> int:
        """How many tokens the first turns of a conversation have."""
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
            whole, cut = (self._tokens(part) for part in (text, start))
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

    def _turn_ends(self) -> set[int]:
        """Tokens after which generation stops, as far as the tokenizer says."""
        ids = self.processor.tokenizer.convert_tokens_to_ids(
            ["<|eot_id|>", "<end_of_turn>", "<|end|>", "<end_of_utterance>"]
        )
        return {i for i in ids if i is not None}
