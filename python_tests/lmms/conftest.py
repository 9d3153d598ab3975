"""Checkpoints and questions for lmms-eval, which has an environment of its own: ``python3 tools/dev.py lmms``."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from asked import ASKED, NEW_TOKENS, PRIOR

TASK = Path(__file__).with_name("task")


@pytest.fixture(scope="session", autouse=True)
def settings(tmp_path_factory):
    """Read when lmms-eval is imported: nothing is fetched, and nothing is left in the home directory."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: python3 tools/dev.py lmms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("LMMS_EVAL_HOME", str(tmp_path_factory.mktemp("lmms")))
        patch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
        yield


@dataclasses.dataclass
class Checkpoint:
    """A directory, what it answers to ``ASKED``, and a folder with the task in which these are the answers."""

    path: Path
    answers: list[str]
    folder: Path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Checkpoint]:
    """A tiny model as it is (``plain``), with MODA (``moda``) and, in the same directory as the first, with a prior
    for cross-modal attention (``prior``). What they answer comes from the library, without lmms-eval."""
    import numpy
    from PIL import Image

    from moda_ext.conversations import Conversation
    from moda_ext.diagnostics.runner import load_model
    from moda_ext.diagnostics.tiny import tiny_llava
    from moda_ext.evaluation.answers import generate_answers
    from moda_ext.integrations.transformers import MODAConfig, apply_moda, moda_parameters

    place = tmp_path_factory.mktemp("lmms_eval")
    pictures = place / "pictures"
    pictures.mkdir()
    for i, shape in enumerate([(60, 80, 3), (120, 40, 3), (64, 64, 3)]):
        noise = numpy.random.default_rng(i).integers(0, 256, shape, dtype=numpy.uint8)
        Image.fromarray(noise).convert("RGB" if i else "P").save(pictures / f"{i}.png")

    model, processor = tiny_llava()
    model.save_pretrained(place / "plain")
    apply_moda(model)
    with torch.no_grad():
        for parameter in moda_parameters(model).values():
            parameter.normal_(std=0.5)
    model.save_pretrained(place / "moda")
    for name in ("plain", "moda"):
        processor.save_pretrained(place / name)

    found = {}
    for name, directory in (("plain", "plain"), ("moda", "moda"), ("prior", "plain")):
        model, processor = load_model(str(place / directory), device="cpu")
        if name == "prior":
            apply_moda(model, MODAConfig.fixed_prior([[0.0, PRIOR], [0.0, 0.0]]))
        messages = ["<image>\n" * len(images) + question for images, question in ASKED]
        asked = [
            Conversation(str(i), (("user", message),), tuple(pictures / image for image in images))
            for i, (message, (images, _)) in enumerate(zip(messages, ASKED, strict=True))
        ]
        answers = generate_answers(model, processor, asked, max_new_tokens=NEW_TOKENS, batch_size=1)
        folder = place / f"task of {name}"
        shutil.copytree(TASK, folder)
        shutil.copytree(pictures, folder, dirs_exist_ok=True)
        lines = [
            json.dumps({"images": images, "question": question, "answer": answer}) + "\n"
            for (images, question), answer in zip(ASKED, answers, strict=True)
        ]
        (folder / "questions.jsonl").write_text("".join(lines))
        found[name] = Checkpoint(place / directory, answers, folder)
    return found
