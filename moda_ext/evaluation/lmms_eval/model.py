"""The model that lmms-eval asks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]  # it has no types
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import GenerationConfig

from moda_ext.conversations import PLACEHOLDER, Conversation
from moda_ext.diagnostics.runner import load_model
from moda_ext.evaluation.answers import generate_answers
from moda_ext.integrations.transformers import MODAConfig, apply_moda
from moda_ext.integrations.transformers.models import has_moda

__all__ = ["MODAExt"]

OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
# Not of generate: what ends an answer is cut off here, and how LLaVA's first code shapes an image is the processor's
# business in Transformers.
NOT_OF_GENERATE = ("until", "image_aspect_ratio")


class MODAExt(lmms):
    """``--model moda_ext``: any vision-language model of the families in :mod:`moda_ext.integrations.transformers`.

    Answers are those of :func:`moda_ext.evaluation.answers.generate_answers`. Errors are raised: a picture that cannot
    be read is no empty answer.

    Args:
        pretrained: a checkpoint directory, with MODA or without, or an id on the Hugging Face hub.
        device: where to, by default the accelerator if there is one. Of several processes (torchrun, accelerate) each
            takes its own with ``None`` and with ``"cuda"``.
        dtype: ``"auto"`` is that of the checkpoint, or ``"float32"``, ``"bfloat16"``, ``"float16"``.
        batch_size: questions at a time.
        cross_prior: rebalancing without training: what is added to the scores of text queries and image keys in every
            layer, natural logarithm. For a checkpoint without MODA.
        max_new_tokens: of an answer, where the task does not say.

    Raises:
        ValueError: an argument out of range, ``cross_prior`` for a checkpoint that has MODA, or a model of a family
            that is not known.
        OSError: there is no such checkpoint.
    """

    is_simple = False  # requests bring chat messages

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        cross_prior: float | None = None,
        max_new_tokens: int = 1024,
    ):
        super().__init__()
        name = str(pretrained)  # lmms-eval makes numbers of what looks like one
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number from 1, got {batch_size!r}")
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be a number from 1, got {max_new_tokens!r}")
        if cross_prior is not None and not (isinstance(cross_prior, (int, float)) and math.isfinite(cross_prior)):
            raise ValueError(f"cross_prior must be a finite number, got {cross_prior!r}")
        self.batch_size = int(batch_size)
        self.max_new_tokens = max_new_tokens
        self.accelerator = Accelerator()  # chooses the GPU of this process
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.model, self.processor = load_model(name, device=device, dtype=dtype)
        if cross_prior is not None:
            if has_moda(self.model, "MODAExt"):
                raise ValueError(f"cross_prior is for a checkpoint without MODA, and {name} has MODA")
            apply_moda(self.model, MODAConfig.fixed_prior([[0.0, float(cross_prior)], [0.0, 0.0]]))
        self.device = self.model.device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers, in order.

        Raises:
            ValueError: an option of a task that is not one of ``generate``, or messages that are no conversation.
            NotImplementedError: a question with a video or sound.
            OSError: a picture that cannot be read.
        """
        options = [generation_options(request, self.max_new_tokens) for request in requests]  # raises before any runs
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Answers") as bar:
            for batch in in_batches(requests, self.batch_size):
                asked = [self.conversation(requests[i]) for i in batch]  # pictures of one batch at a time
                found = generate_answers(
                    self.model, self.processor, asked, batch_size=self.batch_size, **options[batch[0]]
                )
                for i, answer in zip(batch, found, strict=True):
                    answers[i] = cut(answer, endings(requests[i]))
                bar.update(len(batch))
        return answers

    def conversation(self, request: Instance) -> Conversation:
        """What a request asks."""
        _, to_messages, _, number, task, split = request.args
        name = f"{task} {number}"
        turns: list[tuple[str, str]] = []
        images = []
        for message in ChatMessages(messages=to_messages(self.task_dict[task][split][number])).messages:
            text = ""
            for part in message.content:
                if part.type == "text":
                    text += part.text
                elif part.type == "image":
                    text += f"{PLACEHOLDER}\n"  # a conversation's own line break, which is not written
                    images.append(Path(part.url) if isinstance(part.url, str) else part.url)
                else:
                    raise NotImplementedError(f"{name}: moda_ext answers questions about pictures, not {part.type}")
            turns.append((message.role, text))
        if not turns or turns[-1][0] != "user":
            raise ValueError(f"{name}: the last message must be the user's, who is answered")
        return Conversation(name, tuple(turns), tuple(images))

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            f"moda_ext generates answers and has no likelihood of given ones, which {tasks_of(requests)} wants"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError(f"moda_ext answers one round, and {tasks_of(requests)} has several")


def tasks_of(requests: Sequence[Instance]) -> str:
    return ", ".join(sorted({request.task_name for request in requests}))


def in_batches(requests: Sequence[Instance], size: int) -> Iterator[list[int]]:
    """Indices of requests that go together: of the same generation_kwargs, and of about the same length.

    The longest come first, so that a batch that does not fit into memory fails at once.
    """

    def options(i: int) -> str:
        return repr(requests[i].args[2])

    order = sorted(range(len(requests)), key=lambda i: (options(i), -len(requests[i].args[0])))
    for _, group in itertools.groupby(order, key=options):
        same = list(group)
        yield from (same[i : i + size] for i in range(0, len(same), size))


def generation_options(request: Instance, max_new_tokens: int) -> dict[str, Any]:
    """A task's generation_kwargs as ``generate`` takes them.

    A temperature of 0 is greedy decoding, and greedy decoding has no use for the options of sampling.

    Raises:
        ValueError: an option that ``generate`` does not have.
    """
    wanted: Mapping[str, Any] = request.args[2]
    options = {name: value for name, value in wanted.items() if name not in NOT_OF_GENERATE}
    unknown = sorted(options.keys() - vars(GenerationConfig()).keys())
    if unknown:
        raise ValueError(f"{request.task_name}: generation_kwargs {', '.join(unknown)} are none of Transformers")
    temperature = options.get("temperature")
    sample = options.get("do_sample", temperature is not None) and temperature != 0
    if not sample:
        options = {name: value for name, value in options.items() if name not in OF_SAMPLING}
    return {"max_new_tokens": max_new_tokens, **options, "do_sample": bool(sample)}


def endings(request: Instance) -> list[str]:
    """The strings that end an answer.

    A blank line is none: lmms-eval puts it there where a task says nothing, and it would cut off what is reasoned
    before the answer.
    """
    until = request.args[2].get("until") or []
    return [end for end in ([until] if isinstance(until, str) else until) if end and end != "\n\n"]


def cut(answer: str, ends: Sequence[str]) -> str:
    """An answer up to the first of the strings that end it."""
    found = [answer.index(end) for end in ends if end in answer]
    return answer[: min(found, default=len(answer))].rstrip()
