"""A tiny checkpoint and conversations to train it on."""

import json
from pathlib import Path

import yaml


def write_data(folder: Path, count: int = 12, *, text_only: bool = True) -> Path:
    """JSON lines of conversations, a third of them without a picture where ``text_only``."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    colours = ("red", "green", "blue")
    for colour in colours:
        Image.new("RGB", (30, 20), colour).save(folder / f"{colour}.png")
    records = []
    for i in range(count):
        colour = colours[i % 3]
        pictured = not text_only or i % 3 > 0
        question = "<image>\nWhat?" if pictured else "Say it."
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": colour}]
        records.append({"id": str(i), "conversations": turns, **({"image": f"{colour}.png"} if pictured else {})})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def save_tiny_llava(folder: Path, layers: int = 2) -> Path:
    from moda_ext.diagnostics.tiny import tiny_llava

    for part in tiny_llava(layers):
        part.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, model: Path, data: Path, **stage: object) -> Path:
    """A recipe of one stage: LoRA with dropout, projector and MODA, in float32."""
    settings = {
        "name": "instruct",
        "train": ["projector", "moda"],
        "lora": {"r": 4, "alpha": 8, "dropout": 0.2},
        "lr": 0.01,
        "steps": 6,
        "batch_size": 2,
        "autocast": "none",
        "save_every": 2,
        "log_every": 1,
        **stage,
    }
    recipe = {
        "model": str(model),
        "output": str(folder / "out"),
        "dtype": "float32",
        "data": [{"path": str(data)}],
        "moda": {},
        "stages": [settings],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
