"""The bank of pictures: things and faces in two artists' styles, each with its name and kind."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["KINDS", "STYLES", "Entry", "entries", "faces", "picture", "things"]

FOLDER = Path(__file__).parent / "pictures"
SIDE, COLUMNS = 112, 12  # of a tile, and tiles in a row: tools/pictures.py makes the files
STYLES = ("noto", "fluent")
KINDS = ("animal", "food", "vehicle", "object")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A picture of the bank, in one of its styles.

    Attributes:
        name: what it shows, or how a face feels.
        style: the artist's.
        place: among the tiles.
    """

    name: str
    style: str
    place: int


@functools.cache
def _index() -> dict[str, dict[str, list[int]]]:
    """{kind: {name: places}}."""
    codes, places, count = json.loads((FOLDER / "index.json").read_text(encoding="utf-8")), {}, 0
    for kind, names in codes.items():
        places[kind] = {}
        for name, variants in names.items():
            places[kind][name] = list(range(count, count + len(variants)))
            count += len(variants)
    return places


@functools.cache
def things() -> dict[str, str]:
    """{name: kind} of everything that is no face."""
    return {name: kind for kind in KINDS for name in _index()[kind]}


@functools.cache
def faces() -> dict[str, list[int]]:
    """{feeling: places}."""
    return _index()["face"]


def entries(name: str) -> list[Entry]:
    """The pictures of a thing or of a feeling."""
    places = faces()[name] if name in faces() else _index()[things()[name]][name]
    return [Entry(name, style, place) for style in STYLES for place in places]


@functools.cache
def _atlas(style: str) -> Image:
    from PIL import Image

    with Image.open(FOLDER / f"{style}.webp") as file:
        return file.convert("RGBA")


def picture(entry: Entry) -> Image:
    """112 x 112 pixels, RGBA."""
    x, y = entry.place % COLUMNS * SIDE, entry.place // COLUMNS * SIDE
    return _atlas(entry.style).crop((x, y, x + SIDE, y + SIDE))
