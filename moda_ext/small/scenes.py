"""Scenes: pictures of the bank on a coloured ground, and what is true of them."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import TYPE_CHECKING

from moda_ext.small.bank import Entry, entries, faces, picture, things

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["COLOURS", "PLACES", "Item", "Scene", "Splits", "countable", "make_scene"]

SIDE, HALF = 224, 112
PLACES = ("top left", "top right", "bottom left", "bottom right")
COLOURS = {
    "red": (230, 26, 26),
    "green": (26, 179, 26),
    "blue": (38, 77, 242),
    "yellow": (242, 217, 26),
    "purple": (153, 38, 204),
}
GLAD, GLUM = ("happy", "loving"), ("sad", "angry", "scared", "sick")
NEW = 2  # one in NEW things has a picture that only tests show
USUAL = 0.85  # how often a coloured thing has its usual colour in training
SCENE_KINDS = ("things", "count", "writer")


@dataclasses.dataclass(frozen=True)
class Splits:
    """What a part of the data is made of. No two parts share a sentence, letter for letter.

    Attributes:
        sentences: (sentence, whether it is positive).
        new: whether its things are shown by the pictures that training never shows.
        usual: how often a coloured thing has its usual colour.
    """

    sentences: tuple[tuple[str, bool], ...]
    new: bool = False
    usual: float = USUAL


@dataclasses.dataclass(frozen=True)
class Item:
    """A thing or a face in a scene.

    Attributes:
        name: of it.
        colour: that it was painted in, if any.
        box: (left, top, right, bottom) in pixels.
    """

    name: str
    colour: str | None
    box: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture of 224 x 224 pixels and what is in it.

    Attributes:
        kind: ``"things"``: four different ones, one in each quarter; ``"count"``: one to four of the same, and others;
            ``"writer"``: one face, and a sentence of that writer.
        image: the picture.
        items: in the order of ``PLACES``; of a writer the face.
        counted: the name of what there may be several of.
        sentence, positive: of a writer.
    """

    kind: str
    image: Image
    items: tuple[Item, ...]
    counted: str | None = None
    sentence: str | None = None
    positive: bool = False

    @property
    def names(self) -> list[str]:
        return [item.name for item in self.items]


@functools.cache
def new_pictures() -> frozenset[Entry]:
    """The pictures that tests alone show: the second style of every other thing."""
    return frozenset(entries(name)[-1] for name in sorted(things())[::NEW])


def usual_colour(name: str) -> str:
    """What a painted thing usually is: a rule of this world that pictures may break."""
    return list(COLOURS)[sum(map(ord, name)) % len(COLOURS)]


def countable(name: str) -> bool:
    """Whether one can say how many there are."""
    return name not in ("bread", "cheese", "corn", "grapes", "scissors", "glasses", "sun", "moon", "sheep", "fish")


def make_scene(kind: str, rng: random.Random, split: Splits) -> Scene:
    """A scene of one of the ``SCENE_KINDS``."""
    from PIL import Image

    image = Image.new("RGB", (SIDE, SIDE), tuple(rng.randrange(190, 256) for _ in range(3)))
    names = sorted(things())
    if split.new:
        names = [entry.name for entry in sorted(new_pictures(), key=lambda entry: entry.name)]
    if kind == "things":
        chosen = rng.sample(names, 4)
        colours = [_colour(name, rng, split) for name in chosen]
        items = [_place(image, name, rng, split, i, colours[i]) for i, name in enumerate(chosen)]
        return Scene(kind, image, tuple(items))
    if kind == "count":
        counted, number = rng.choice([name for name in names if countable(name)]), rng.randrange(1, 5)
        chosen = [counted] * number + rng.sample([name for name in names if name != counted], 4 - number)
        rng.shuffle(chosen)
        return Scene(kind, image, tuple(_place(image, n, rng, split, i) for i, n in enumerate(chosen)), counted)
    sentence, positive = rng.choice(split.sentences)
    feeling = rng.choice(rng.choice((GLAD, GLUM)))
    return Scene(kind, image, (_place(image, feeling, rng, split),), None, sentence, positive)


def _colour(name: str, rng: random.Random, split: Splits) -> str | None:
    if rng.random() < 0.25:
        return None  # as it is
    usual = usual_colour(name)
    return usual if rng.random() < split.usual else rng.choice([colour for colour in COLOURS if colour != usual])


def _place(
    image: Image, name: str, rng: random.Random, split: Splits, quarter: int | None = None, colour: str | None = None
) -> Item:
    """Draws a thing somewhere in a quarter, or large a face anywhere."""
    from PIL import Image, ImageOps

    known = [e for e in entries(name) if (e in new_pictures()) is (split.new and name not in faces())]
    tile = picture(rng.choice(known))
    if colour is not None:
        shades = ImageOps.autocontrast(ImageOps.grayscale(tile.convert("RGB")), mask=tile.getchannel("A"))
        dark = tuple(channel // 3 for channel in COLOURS[colour])
        painted = ImageOps.colorize(shades, black=dark, mid=COLOURS[colour], white="white", midpoint=160)
        painted.putalpha(tile.getchannel("A"))
        tile = painted
    side, room = (rng.randrange(84, 106), HALF) if quarter is not None else (rng.randrange(140, 190), SIDE)
    left, top = (0, 0) if quarter is None else (quarter % 2 * HALF, quarter // 2 * HALF)
    x, y = left + rng.randrange(room - side + 1), top + rng.randrange(room - side + 1)
    tile = tile.resize((side, side), Image.Resampling.BILINEAR)
    image.paste(tile, (x, y), tile)
    return Item(name, colour, (x, y, x + side, y + side))
