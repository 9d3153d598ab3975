"""The small model's world as files: pictures, and conversations to train on, to calibrate with and to ask."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moda_ext.conversations import HINTS, write_conversations
from moda_ext.small.packages import rated_sentences
from moda_ext.small.questions import TASKS, Question, ask, describe, with_hint, wrong_answer
from moda_ext.small.scenes import SCENE_KINDS, Scene, Splits, make_scene

__all__ = ["HINTED", "RIGHT", "splits", "training_scenes", "write_data"]

HINTED, RIGHT = 0.5, 0.85  # in training: how many questions have a hint, and how many of these are right
TURNS = 5


def splits() -> dict[str, Splits]:
    """``"train"``, ``"dev"``, ``"test"`` and ``"new"``: tests with pictures that training never shows."""
    sentences = rated_sentences()
    fifth = len(sentences) // 5
    test, dev, train = sentences[:fifth], sentences[fifth : 2 * fifth], sentences[2 * fifth :]
    return {
        "train": Splits(tuple(train)),
        "dev": Splits(tuple(dev)),
        "test": Splits(tuple(test)),
        "new": Splits(tuple(test), new=True),
    }


def training_scenes(number: int, seed: int = 0) -> list[Scene]:
    """Scenes of the training part, half of them of things."""
    split, rng = splits()["train"], random.Random(f"train {seed}")
    kinds = ("things", *SCENE_KINDS)
    return [make_scene(kinds[i % len(kinds)], rng, split) for i in range(number)]


def write_data(folder: str | Path, scenes: list[Scene], *, dev: int = 20, test: int = 50, seed: int = 0) -> None:
    """Writes ``images/`` and, as JSON lines:

    - ``align.jsonl``: a description of each scene.
    - ``train.jsonl``: a conversation for each scene; half of the questions have a hint, and 85 % of the hints are
      right: to believe them pays.
    - ``train_random_hints.jsonl``: the same, but that a hint is any possible answer and tells nothing.
    - ``dev.jsonl`` and ``test.jsonl``: each question of each task without a hint, with a right and with a wrong one.
      The test asks ``object`` once more, as ``object_new``, with pictures that training never shows.

    Args:
        folder: made if need be.
        scenes: to train on.
        dev, test: how many questions of each task.
        seed: of the questions.

    Raises:
        FileExistsError: the folder has data already.
    """
    folder = Path(folder)
    if (folder / "train.jsonl").exists():
        raise FileExistsError(f"{folder} has data already")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    descriptions: list[dict[str, Any]] = []
    informative: list[dict[str, Any]] = []
    random_hints: list[dict[str, Any]] = []
    for i, scene in enumerate(scenes):
        image = _save(folder, f"train-{i}", scene)
        described = Question("describe", "Describe the picture.", describe(scene), ())
        descriptions.append({"id": f"align-{i}", "image": image, "conversations": _turns([described], [None])})
        rng = random.Random(f"questions {seed} {i}")
        asked = ask(scene, rng, TURNS)
        guessed = [_guess(question, scene, rng) for question in asked]
        for records, hints in ((informative, [g[0] for g in guessed]), (random_hints, [g[1] for g in guessed])):
            records.append({"id": f"train-{i}", "image": image, "conversations": _turns(asked, hints)})
    write_conversations(folder / "align.jsonl", descriptions)
    write_conversations(folder / "train.jsonl", informative)
    write_conversations(folder / "train_random_hints.jsonl", random_hints)
    parts = splits()
    for name, number in (("dev", dev), ("test", test)):
        records = [record for task in TASKS for record in _questions(folder, name, task, parts[name], number, seed)]
        if name == "test":
            records += _questions(folder, name, "object", parts["new"], number, seed, "object_new")
        write_conversations(folder / f"{name}.jsonl", records)


def _guess(question: Question, scene: Scene, rng: random.Random) -> tuple[str | None, str | None]:
    """A hint that is mostly right and one that is anything, or none of both."""
    hinted, right = rng.random() < HINTED, rng.random() < RIGHT
    wrong, anything = wrong_answer(question, rng, scene.names), rng.choice(question.choices)
    return (question.answer if right else wrong, anything) if hinted else (None, None)


def _turns(asked: list[Question], hints: list[str | None]) -> list[dict[str, str]]:
    turns = []
    for i, (question, hint) in enumerate(zip(asked, hints, strict=True)):
        text = question.text if hint is None else with_hint(question, hint)
        turns.append({"from": "human", "value": f"<image>\n{text}" if i == 0 else text})
        turns.append({"from": "gpt", "value": question.answer})
    return turns


def _questions(
    folder: Path, part: str, task: str, split: Splits, number: int, seed: int, name: str | None = None
) -> Iterator[dict[str, Any]]:
    """Each question in its three forms."""
    group, kind, make = TASKS[task]
    name = name or task
    rng, found = random.Random(f"{part} {name} {seed}"), 0
    while found < number:
        scene = make_scene(kind, rng, split)
        question = make(scene, rng)
        if question is None:
            continue
        key = f"{part}-{name}-{found}"
        image = _save(folder, key, scene)
        hints = {"none": None, "right": question.answer, "wrong": wrong_answer(question, rng, scene.names)}
        for hint in HINTS:
            yield {
                "id": f"{key}-{hint}",
                "image": image,
                "conversations": _turns([question], [hints[hint]]),
                "task": name,
                "group": group,
                "question": key,
                "hint": hint,
                "hinted": hints["wrong" if hint == "none" else hint],
                "choices": list(question.choices),
            }
        found += 1


def _save(folder: Path, name: str, scene: Scene) -> str:
    path = Path("images", f"{name}.jpg")
    scene.image.save(folder / path, quality=92)
    return str(path)
