"""Questions about scenes, with the one right answer, the others that might be, and hints."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from moda_ext.small.bank import KINDS, faces, things
from moda_ext.small.scenes import COLOURS, GLAD, PLACES, Scene, countable

__all__ = ["TASKS", "Question", "ask", "describe", "with_hint", "wrong_answer"]

NUMBERS = ("zero", "one", "two", "three", "four")
WHO = ("Mia", "Tom", "Zoe", "Max", "Eva", "Leo")
PLURALS = {
    "mouse": "mice",
    "strawberry": "strawberries",
    "cherry": "cherries",
    "butterfly": "butterflies",
    "bus": "buses",
    "octopus": "octopuses",
    "tomato": "tomatoes",
    "food": "food",
}
WITHOUT_ARTICLE = ("grapes", "scissors", "glasses", "bread", "cheese", "corn")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        task: which it is of.
        text: as it is asked.
        answer: the right one.
        choices: every answer that one could give without seeing the picture, the right one among them.
    """

    task: str
    text: str
    answer: str
    choices: tuple[str, ...]


def article(name: str) -> str:
    return name if name in WITHOUT_ARTICLE else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    return PLURALS.get(name, f"{name}s")


def object_(scene: Scene, rng: random.Random) -> Question | None:
    """Of a kind that only one of the four things is of."""
    kinds = [things()[name] for name in scene.names]
    lone = [name for name, kind in zip(scene.names, kinds, strict=True) if kinds.count(kind) == 1]
    if not lone:
        return None
    name = rng.choice(lone)
    kind = things()[name]
    same = tuple(other for other, of in things().items() if of == kind)
    return Question("object", f"Which {kind} is in the picture?", name, same)


def colour(scene: Scene, rng: random.Random) -> Question | None:
    painted = [item for item in scene.items if item.colour]
    if not painted:
        return None
    item = rng.choice(painted)
    assert item.colour is not None, "painted"
    return Question("colour", f"What colour is the {item.name}?", item.colour, tuple(COLOURS))


def count(scene: Scene, rng: random.Random) -> Question:
    name = scene.counted
    assert name is not None, "a scene to count in"
    if rng.random() < 0.15:
        name = rng.choice([other for other in things() if countable(other)])
    number = scene.names.count(name)
    return Question("count", f"How many {plural(name)} are there?", NUMBERS[number], NUMBERS)


def place(scene: Scene, rng: random.Random) -> Question:
    i = rng.randrange(len(scene.items))
    return Question("place", f"Where is the {scene.names[i]}?", PLACES[i], PLACES)


def caption(scene: Scene, rng: random.Random) -> Question:
    """True with one in two."""
    first, second = rng.sample(scene.names, 2)
    true = rng.random() < 0.5
    if not true:
        second = rng.choice([name for name in things() if name not in scene.names])
    if rng.random() < 0.5:
        first, second = second, first
    text = f"Caption: {article(first)} and {article(second)}. Is the caption true?"
    return yes_or_no("caption", text, true)


def persona(scene: Scene, rng: random.Random) -> Question | None:
    """A collector of one kind of thing, which is in the picture with one in two."""
    there = [kind for kind in KINDS if any(things()[name] == kind for name in scene.names)]
    lacking = [kind for kind in KINDS if kind not in there]
    if not lacking:
        return None
    wanted, who = rng.random() < 0.5, rng.choice(WHO)
    kind = rng.choice(there if wanted else lacking)
    text = f"{who} collects pictures of {plural(kind)} only. Does {who} want this picture?"
    return yes_or_no("persona", text, wanted)


def expression(scene: Scene, rng: random.Random) -> Question:
    return Question("expression", "How does the face feel?", scene.names[0], tuple(faces()))


def sentiment(scene: Scene, rng: random.Random) -> Question:
    """Answered by the text alone."""
    text = f"Text: {scene.sentence} Is the text positive or negative?"
    words = ("negative", "positive")
    return Question("sentiment", text, words[scene.positive], words)


def sarcasm(scene: Scene, rng: random.Random) -> Question:
    """A writer whose face does not feel as the text says."""
    sincere = scene.positive == (scene.names[0] in GLAD)
    text = f"Text: {scene.sentence} Is the writer sincere or sarcastic?"
    words = ("sarcastic", "sincere")
    return Question("sarcasm", text, words[sincere], words)


def yes_or_no(task: str, text: str, yes: bool) -> Question:
    words = ("no", "yes")
    return Question(task, text, words[yes], words)


# task: (its group, the kind of scene, how to ask)
Ask = Callable[[Scene, random.Random], "Question | None"]
TASKS: dict[str, tuple[str, str, Ask]] = {
    "object": ("perception", "things", object_),
    "colour": ("perception", "things", colour),
    "count": ("perception", "count", count),
    "place": ("perception", "things", place),
    "caption": ("cognition", "things", caption),
    "persona": ("cognition", "things", persona),
    "expression": ("emotion", "writer", expression),
    "sentiment": ("emotion", "writer", sentiment),
    "sarcasm": ("emotion", "writer", sarcasm),
}


def ask(scene: Scene, rng: random.Random, turns: int) -> list[Question]:
    """Different questions about a scene, at most so many."""
    tasks = [task for task, (_, kind, _) in TASKS.items() if kind == scene.kind]
    asked: dict[str, Question] = {}
    for _ in range(4 * turns):
        question = TASKS[rng.choice(tasks)][2](scene, rng)
        if question is not None:
            asked.setdefault(question.text, question)
        if len(asked) == turns:
            break
    return list(asked.values())


def describe(scene: Scene) -> str:
    """What is where in a scene, or whose face it is."""
    if scene.kind == "writer":
        return f"a {scene.names[0]} face"
    things_ = (f"{item.colour} {item.name}" if item.colour else item.name for item in scene.items)
    return "; ".join(f"{place}: {thing}" for place, thing in zip(PLACES, things_, strict=True))


def with_hint(question: Question, hinted: str) -> str:
    """The question after a hint, which is a guess at its answer."""
    return f"Hint: {hinted}. {question.text}"


def wrong_answer(question: Question, rng: random.Random, names: Sequence[str] = ()) -> str:
    """Another of its choices, and none that is in the picture."""
    return rng.choice([c for c in question.choices if c != question.answer and c not in names])
