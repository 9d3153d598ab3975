"""MMRole: playing a character in a talk about a picture (Dai et al., ICLR 2025, arXiv 2408.04203)."""

from __future__ import annotations

import json
from pathlib import Path

from moda_ext.conversations import Conversation
from moda_ext.evaluation.tasks import Task, locate

PARTS = ("in-distribution", "out-of-distribution")
KINDS = ("comment", "human-role", "inter-role")
PUBLISHED = 294  # samples


def read(data: Path) -> list[Task]:
    """The test samples of characters that were trained on, and of others, as two tasks that a judge scores.

    The folder holds ``data/test/{in,out-of}-distribution/{comment,human-role,inter-role}_test.json`` and ``images``.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: a sample in another layout.
    """
    folder = locate(data, ("data/test",), ("MMRole_dataset", "MMRole"))
    samples = {
        part: [
            sample
            for kind in KINDS
            for sample in read_samples(folder / "data" / "test" / part / f"{kind}_test.json", folder / "images")
        ]
        for part in PARTS
    }
    total = sum(map(len, samples.values()))
    notes = () if total == PUBLISHED else (f"MMRole: {total} samples, not the {PUBLISHED} that were published.",)
    return [
        Task(f"mmrole {part}", tuple(found), "cognition", judged=True, max_new_tokens=512, notes=notes)
        for part, found in samples.items()
    ]


def read_samples(path: Path, images: Path) -> list[Conversation]:
    """The conversations of one file, each with the character's instructions first.

    Raises:
        ValueError: a sample that is no conversation, or without its character.
    """
    found = []
    for number, sample in enumerate(json.loads(path.read_text(encoding="utf-8")), start=1):
        missing = [key for key in ("conversations", "role", "script", "other_role") if key not in sample]
        if missing:
            raise ValueError(f"{path}, sample {number}: has no {', '.join(missing)}")
        system = [{"from": "system", "value": sample["system"]}] if sample.get("system") else []
        try:
            found.append(
                Conversation.from_record({**sample, "conversations": [*system, *sample["conversations"]]}, images)
            )
        except ValueError as error:
            raise ValueError(f"{path}, sample {number}: {error}") from error
    return found
