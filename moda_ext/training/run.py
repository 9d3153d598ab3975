"""The stages of a recipe, one after another, from a checkpoint to a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import set_seed

from moda_ext.conversations import Conversation
from moda_ext.integrations.transformers import MODAConfig, apply_moda
from moda_ext.training.collator import Collator
from moda_ext.training.data import draw_order, have_images, load_conversations
from moda_ext.training.parts import prepare
from moda_ext.training.recipe import Recipe, Stage, differing_keys
from moda_ext.training.trainer import (
    LOG,
    TRAINED,
    UNFINISHED,
    ConversationTrainer,
    checkpoints,
    load_trained,
    save_trained,
    write_json,
)

__all__ = ["train", "train_stage"]

RECIPE = "recipe.json"
PROBE = 4  # conversations on which deficit disorder attention is measured


def train(recipe: Recipe, *, progress: bool = True) -> Path:
    """Runs a recipe, or what is left of it, and writes the checkpoint.

    What was interrupted goes on where its last checkpoint was, with the same result to the last bit; what is finished
    is not done again. Started by ``torchrun``, its processes share every step.

    Args:
        recipe: what to do.
        progress: show bars.

    Returns:
        The checkpoint directory, with the processor.

    Raises:
        ValueError: the output folder is of another recipe, by the keys that differ; or see :func:`train_stage`.
        FileNotFoundError, OSError: there is no such checkpoint or data.
        ImportError: a package is missing.
    """
    from moda_ext.diagnostics.runner import load_model

    recipe.check()
    output = Path(recipe.output)
    claim(output, recipe)
    if (output / "config.json").is_file():
        return output
    data = [load_conversations(stage.data or recipe.data, recipe.seed) for stage in recipe.stages]
    model: Any
    model, processor = load_model(recipe.model, device="cpu", dtype=recipe.dtype)
    if recipe.moda is not None:
        apply_moda(model, MODAConfig(**recipe.moda))
    for number, (stage, conversations) in enumerate(zip(recipe.stages, data, strict=True)):
        folder, seed = output / stage.name, recipe.seed + number
        model = train_stage(model, processor, stage, conversations, folder, seed=seed, progress=progress)
    if is_first_process():
        write_checkpoint(model, processor, output)
    wait_for_all()
    return output


def train_stage(
    model: Any,
    processor: Any,
    stage: Stage,
    conversations: Sequence[Conversation],
    folder: str | Path,
    *,
    seed: int = 0,
    collator: Any = None,
    progress: bool = True,
) -> Any:
    """Trains a loaded model for one stage. Seeds torch's, NumPy's and Python's random numbers.

    Where the folder holds the stage's end, it is loaded; where it holds a checkpoint, training goes on from there.

    Args:
        model: of one of the families, with MODA or without, without adapters. It is changed.
        processor: its processor.
        stage: what to train, and how.
        conversations: to train on.
        folder: of checkpoints, of the trained weights (``trained.safetensors``) and of the log (``log.json``).
        seed: of the order of the data, of new weights and of dropout.
        collator: makes a batch of a list of conversations: ``labels`` and what the model's ``forward`` takes; by
            default :class:`moda_ext.training.Collator`.
        progress: show a bar.

    Returns:
        The model in evaluation mode, with adapters merged. Weights that were trained are float32.

    Raises:
        ValueError: a stage that the model cannot have, no conversations, or one that the collator refuses.
        NotImplementedError: see :class:`moda_ext.training.trainer.ConversationTrainer`.
    """
    folder = Path(folder)
    stage.check(f"stages.{stage.name}")
    if not len(conversations):
        raise ValueError(f"stage {stage.name}: no conversations")
    set_seed(seed)
    model = prepare(model, stage)
    if (folder / TRAINED).is_file():
        load_trained(model, folder / TRAINED)
    else:
        collator = Collator(processor, stage.max_length) if collator is None else collator
        fit(model, stage, conversations, folder, seed=seed, collator=collator, progress=progress)
    if stage.lora is not None:
        model = model.merge_and_unload()
    return model.requires_grad_(False).eval()


def fit(
    model: Any,
    stage: Stage,
    conversations: Sequence[Conversation],
    folder: Path,
    *,
    seed: int,
    collator: Any,
    progress: bool,
) -> None:
    """Trains what requires gradients, from the last checkpoint on if there is one, and saves it."""
    passes = stage.gradient_accumulation * int(os.environ.get("WORLD_SIZE", 1))
    steps = stage.steps or math.ceil(stage.epochs * len(conversations) / (stage.batch_size * passes))
    order = draw_order(have_images(conversations), stage.batch_size, steps * passes, seed)
    batches: Any = Subset(conversations, order)  # type: ignore[arg-type]  # a sequence will do
    probe = None
    if stage.deficit_every:
        probe = collator([conversations[i] for i in order[: min(PROBE, stage.batch_size)]])
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    trainer = ConversationTrainer(
        model, stage, batches, steps, folder, collator=collator, seed=seed, probe=probe, progress=progress
    )
    wait_for_all()
    last = checkpoints(folder)[-1:]
    trainer.train(resume_from_checkpoint=str(last[0]) if last else None)
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    if is_first_process():
        write_json(folder / LOG, trainer.state.log_history)
        save_trained(model, folder / TRAINED)  # from now on the stage is finished
        for path in (folder / UNFINISHED, *checkpoints(folder)):
            shutil.rmtree(path, ignore_errors=True)
    wait_for_all()


def claim(output: Path, recipe: Recipe) -> None:
    """Notes the recipe in the output folder, or compares it with the one there. The first process does it for all."""
    if not is_first_process():
        return
    values = dataclasses.asdict(recipe)
    values["processes"] = int(os.environ.get("WORLD_SIZE", 1))
    del values["output"]  # a folder may be moved
    path = output / RECIPE
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        keys = differing_keys(before, json.loads(json.dumps(values)))
        if keys:
            raise ValueError(
                f"recipe: {output} was begun with another {', '.join(keys)}: take another output, or the same recipe"
            )
    elif output.is_dir() and any(output.iterdir()):
        raise ValueError(f"recipe: output: {output} is not empty, and was not begun with a recipe")
    else:
        output.mkdir(parents=True, exist_ok=True)
        write_json(path, values)


def write_checkpoint(model: Any, processor: Any, output: Path) -> None:
    """Saves model and processor; config.json comes last, and without it there is no checkpoint."""
    part = output / UNFINISHED
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    processor.save_pretrained(part)
    for path in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output / path.name)
    part.rmdir()


def is_first_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def wait_for_all() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
