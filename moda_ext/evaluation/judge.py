"""A judge of long answers: another model that scores an answer beside a reference."""

from __future__ import annotations

import base64
import dataclasses
import http.client
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
from typing import Any, Protocol

from moda_ext.conversations import PLACEHOLDER, Conversation
from moda_ext.evaluation.answers import Progress
from moda_ext.evaluation.evaluate import Answer, TaskResult
from moda_ext.evaluation.tasks import Task

__all__ = ["ASPECTS", "Judge", "MalformedVerdict", "OpenAIJudge", "judge_answers", "parse_scores"]

ASPECTS = {  # MMRole's (arXiv 2408.04203, section 4), in our words
    "Instruction Adherence": "Does it speak as the character and say nothing that the character would not, such as a "
    "remark about the task?",
    "Fluency": "Is it grammatical, and easy to read?",
    "Coherency": "Does it hold together, and contradict neither itself nor what was said before?",
    "Image-Text Relevance": "Is it about what the picture shows?",
    "Response Accuracy": "Does it answer what was said, or open a fitting talk about the picture, correctly?",
    "Personality Consistency": "Does it show the character's personality?",
    "Knowledge Consistency": "Does it agree with what the character knows: their life, abilities and relations?",
    "Tone Consistency": "Does it sound like the character, and not like an assistant?",
}
SYSTEM = "You compare answers of role-playing models. Judge only what you are asked about, and without favour."
PROMPT = """\
Two models play {role} from {script} in a talk with {other_role} about the picture above.

The talk so far:
<talk>
{talk}
</talk>

Answer A:
<answer>
{answer}
</answer>

Answer B:
<answer>
{reference}
</answer>

Judge one aspect of both answers, {aspect}: {question}
Their order means nothing. Compare them in one or two sentences. Then end with one line that holds a score from 1 (poor)
to 10 (excellent) for each answer, A first, in exactly this form:
[Scores]: (a, b)"""
SCORES = re.compile(r"\[Scores\]:\s*\(\s*(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)\s*\)")


class MalformedVerdict(ValueError):
    """A judge's answer that holds no scores."""


class Judge(Protocol):
    """Whoever scores an answer beside a reference."""

    def score(self, conversation: Conversation, answer: str, aspect: str) -> tuple[float, float]:
        """``(answer, reference)``, each from 1 to 10, on one of :data:`ASPECTS`.

        Args:
            conversation: ends with the reference.
            answer: to be scored.
            aspect: one of them.

        Raises:
            MalformedVerdict: no scores came back.
        """
        ...


@dataclasses.dataclass
class OpenAIJudge:
    """A model behind an endpoint with OpenAI's interface, which is sent the picture too.

    Attributes:
        url: of the interface, such as ``"http://localhost:8000/v1"``.
        model: name of the model there.
        key: sent as bearer token, by default the environment variable ``OPENAI_API_KEY``; None for none.
        attempts: how often a request is sent where the answer is 429 or 5xx, or there is none.
        timeout: of a request, in seconds.
        wait: seconds before the second attempt, doubled for each further one.
    """

    url: str
    model: str
    key: str | None = dataclasses.field(default_factory=lambda: os.environ.get("OPENAI_API_KEY"), repr=False)
    attempts: int = 5
    timeout: float = 120.0
    wait: float = 1.0

    def score(self, conversation: Conversation, answer: str, aspect: str) -> tuple[float, float]:
        """As :meth:`Judge.score`.

        Raises:
            MalformedVerdict: no scores came back.
            ConnectionError: the endpoint refuses the request, or gave no answer in all attempts.
        """
        content = [
            *map(_picture, conversation.pictures()),
            {"type": "text", "text": _prompt(conversation, answer, aspect)},
        ]
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        reply = self._post({"model": self.model, "messages": messages, "temperature": 0})
        try:
            verdict = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise MalformedVerdict(f"no chat completion: {reply[:200]!r}") from error
        return parse_scores(verdict)

    def _post(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return response.read().decode()
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}: {error.read(200).decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    raise ConnectionError(f"the judge at {address} refuses: {reason}") from error
            except (OSError, http.client.HTTPException) as error:  # no connection, a timeout, half of an answer
                reason = str(error)
        raise ConnectionError(f"the judge at {address} gave no answer in {self.attempts} attempts: {reason}")


def parse_scores(verdict: object) -> tuple[float, float]:
    """The two scores of a verdict.

    Raises:
        MalformedVerdict: not exactly one ``[Scores]: (a, b)``, or a score that is not within 1 and 10.
    """
    found = SCORES.findall(verdict) if isinstance(verdict, str) else []
    if len(found) != 1:
        raise MalformedVerdict(f"{len(found)} times [Scores]: (a, b) in {str(verdict)[-200:]!r}")
    a, b = map(float, found[0])
    if not (1 <= a <= 10 and 1 <= b <= 10):
        raise MalformedVerdict(f"scores must be within 1 and 10, got {a:g} and {b:g}")
    return a, b


def judge_answers(result: TaskResult, task: Task, judge: Judge, *, progress: Progress = iter) -> TaskResult:
    """The result with the judge's scores: of each aspect, evaluated / reference, or why there is none.

    Args:
        result: of a judged task.
        task: the same, with the references.
        judge: asked once for each answer and aspect.
        progress: wraps the list of answers, for a progress bar.

    Raises:
        ValueError: a result of other questions.
        ConnectionError: the judge cannot be reached for the first verdict. Later failures are among the errors.
    """
    if [a.id for a in result.answers] != [c.id for c in task.conversations]:
        raise ValueError(f"judge_answers: the result is not of the questions of task {task.name}")
    judged: list[Answer] = []
    for answer, conversation in progress(list(zip(result.answers, task.conversations, strict=True))):
        scores, errors = {}, {}
        for aspect in ASPECTS:
            try:
                evaluated, reference = judge.score(conversation, answer.given, aspect)
                scores[aspect] = evaluated / reference
            except MalformedVerdict as error:
                errors[aspect] = str(error)
            except ConnectionError as error:
                if not (judged or scores or errors):
                    raise  # it was never reached
                errors[aspect] = str(error)
        judged.append(dataclasses.replace(answer, scores=scores, errors=errors))
    return dataclasses.replace(result, answers=tuple(judged))


def _prompt(conversation: Conversation, answer: str, aspect: str) -> str:
    talk = "\n".join(
        text.replace(PLACEHOLDER, "").strip() for role, text in conversation.prompt.messages if role != "system"
    )
    fields = conversation.fields
    return PROMPT.format(
        role=fields["role"],
        script=fields["script"],
        other_role=fields["other_role"],
        talk=talk,
        answer=answer,
        reference=conversation.answer,
        aspect=aspect,
        question=ASPECTS[aspect],
    )


def _picture(image: Any) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, format="JPEG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
