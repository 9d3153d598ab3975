"""The CUDA translation units of `cuda_units` in csrc/sources.json: one for each family of kernels and head size.

A unit includes the family's header and instantiates its templates. A unit of its own for each head size keeps the build
parallel, and its peak of memory low.
"""

from pathlib import Path

FOLDER = "build/generated/cuda"


def unit_text(family: dict, head_size: int) -> str:
    names = [f"moda_ext::cuda::{family['arch']}::{name}<{head_size}>" for name in family["templates"]]
    instances = "".join(f"template struct {name};\n" for name in names)
    return f'#include "cuda/{family["arch"]}/{family["header"]}"\n\n{instances}'


def write_cuda_units(root: Path, table: dict) -> list[str]:
    """Writes the units into FOLDER; returns their paths from `root`. A file with equal text is left as it is: newer,
    it would be compiled again."""
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    units = {
        f"{family['arch']}_{Path(family['header']).stem}_{head_size}.cu": unit_text(family, head_size)
        for family in table["families"]
        for head_size in table["head_sizes"]
    }
    for old in folder.glob("*.cu"):
        if old.name not in units:
            old.unlink()
    for name, text in units.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    return [f"{FOLDER}/{name}" for name in units]
