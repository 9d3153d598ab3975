"""Makes the bank of pictures in moda_ext/small/pictures from the npm packages that publish them.

npm pack emoji-datasource-google@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
python tools/pictures.py emoji-datasource-google-16.0.0.tgz lobehub-fluent-emoji-3d-1.1.0.tgz

Needs pillow. Each style is one WebP file: tiles of 112 x 112 pixels in the order of index.json, 12 in a row.
"""

import json
import sys
import tarfile
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "moda_ext" / "small" / "pictures"
SIDE, COLUMNS = 112, 12
FILES = {"noto": "package/img/google/64/{}.png", "fluent": "package/assets/{}.webp"}


def fitted(picture: Image.Image) -> Image.Image:
    """Cropped to what is drawn, and scaled into a tile."""
    picture = picture.convert("RGBA")
    picture = picture.crop(picture.getbbox())
    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    tile = Image.new("RGBA", (SIDE, SIDE))
    tile.paste(picture.resize(size, Image.LANCZOS), tuple((SIDE - side) // 2 for side in size))
    return tile


def tiles(package: tarfile.TarFile, pattern: str, codes: list[str]) -> list[Image.Image]:
    """The pictures of some code points; some files have the selector of the picture form in their names."""
    names = set(package.getnames())
    found = []
    for code in codes:
        tried = [pattern.format(name) for name in (code.lower(), f"{code.lower()}-fe0f")]
        found.append(fitted(Image.open(package.extractfile(next(name for name in tried if name in names)))))
    return found


def main() -> None:
    index = json.loads((FOLDER / "index.json").read_text())
    codes = [code for kinds in index.values() for names in kinds.values() for code in names]
    for path, (style, pattern) in zip(sys.argv[1:], FILES.items(), strict=True):
        with tarfile.open(path) as package:
            pictures = tiles(package, pattern, codes)
        atlas = Image.new("RGBA", (COLUMNS * SIDE, -(-len(pictures) // COLUMNS) * SIDE))
        for i, tile in enumerate(pictures):
            atlas.paste(tile, (i % COLUMNS * SIDE, i // COLUMNS * SIDE))
        atlas.save(FOLDER / f"{style}.webp", quality=88, method=6)
        print(style, len(pictures), "tiles", (FOLDER / f"{style}.webp").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
