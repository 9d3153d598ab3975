"""The stages of a recipe, one after another, from a checkpoint to a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import set_seed

from moda_ext.conversations import Conversation
from moda_ext.integrations.transformers import MODAConfig, apply_moda
from moda_ext.training.collator import Collator
from moda_ext.training.data import Selection, draw_order, fingerprints, have_images, load_conversations
from moda_ext.training.parts import prepare
from moda_ext.training.recipe import UNFINISHED, Recipe, Stage, differing_keys
from moda_ext.training.trainer import (
    LOG,
    TRAINED,
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

    What was interrupted goes on where its last checkpoint was, with the same result to the last bit on the same device;
    what is finished is not done again. Started by ``torchrun``, its processes share every step.

    Args:
        recipe: what to do.
        progress: show bars.

    Returns:
        The checkpoint directory, with the processor. Its weights that were trained are float32, and its ``dtype``, with
        which it is loaded, is the recipe's.

    Raises:
        ValueError: the output folder is of another recipe or other data, by the keys that differ; or see
            :func:`train_stage`.
        FileNotFoundError, OSError: there is no such checkpoint or data.
        ImportError: a package is missing.
    """
    return run_stages(recipe, begin(recipe), progress=progress)


def begin(recipe: Recipe) -> list[Selection]:
    """The conversations of each stage, all of what can be wrong with a recipe and its data; then takes the output.

    Raises:
        FileNotFoundError, ValueError, ImportError: see :func:`train`.
    """
    recipe.check()
    sources = [tuple(stage.data or recipe.data) for stage in recipe.stages]
    loaded = {some: load_conversations(some, recipe.seed) for some in dict.fromkeys(sources)}
    claim(recipe, {name: mark for some, data in loaded.items() for name, mark in fingerprints(some, data).items()})
    return [loaded[some] for some in sources]


def run_stages(recipe: Recipe, data: Sequence[Sequence[Conversation]], *, progress: bool) -> Path:
    """What :func:`train` does with the conversations of each stage."""
    from moda_ext.diagnostics.runner import load_model

    output = Path(recipe.output)
    if (output / "config.json").is_file():
        return output
    model: Any
    model, processor = load_model(recipe.model, device="cpu", dtype=recipe.dtype)
    if recipe.moda is not None:
        set_seed(recipe.seed)  # of the aligners' maps
        apply_moda(model, MODAConfig(**recipe.moda))
    for number, (stage, conversations) in enumerate(zip(recipe.stages, data, strict=True)):
        folder, seed = output / stage.name, recipe.seed + number
        model = train_stage(model, processor, stage, conversations, folder, seed=seed, progress=progress)
    if is_first_process():
        write_checkpoint(model, processor, output, recipe.dtype)
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
        The model on the CPU in evaluation mode, with adapters merged. Weights that were trained, or have an adapter
        merged into them, are float32: in bfloat16 most of a small update would be rounded off.

    Raises:
        ValueError: a stage that the model cannot have, no conversations, some without images that would train nothing,
            or one that the collator refuses.
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
    model = model.cpu()  # float32 weights may have no room beside what training has left on a GPU
    if stage.lora is not None:
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.get_base_layer().float()
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
    steps = steps_of(stage, len(conversations), passes)
    with_image = have_images(conversations)
    if not stage.trains_language and not all(with_image):
        raise ValueError(
            f"stage {stage.name}: {with_image.count(False)} conversations have no image and teach it nothing, as it "
            f"trains {' and '.join(stage.train)} alone"
        )
    order = draw_order(with_image, stage.batch_size, steps * passes, seed)
    batches: Any = Subset(conversations, order)  # type: ignore[arg-type]  # a sequence will do
    probe = []
    if stage.deficit_every:
        some = [conversations[i] for i in list(dict.fromkeys(i for i in order if with_image[i]))[:PROBE]]
        if not some:
            raise ValueError(f"stage {stage.name}: deficit_every must be 0, as no conversation has an image")
        probe = [collator(some[i : i + stage.batch_size]) for i in range(0, len(some), stage.batch_size)]
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
        model.activation_checkpointing_disable()
    if is_first_process():
        write_json(folder / LOG, trainer.state.log_history)
        save_trained(model, folder / TRAINED)  # from now on the stage is finished
        for path in (folder / UNFINISHED, *checkpoints(folder)):
            shutil.rmtree(path, ignore_errors=True)
    wait_for_all()


def steps_of(stage: Stage, conversations: int, passes: int) -> int:
    """Steps of the optimiser, each of so many forward passes, of all processes."""
    seen = round(stage.epochs * conversations, 6)  # 0.07 * 100 is a little more than 7
    return stage.steps or math.ceil(seen / (stage.batch_size * passes))


def claim(recipe: Recipe, contents: Mapping[str, str]) -> None:
    """Notes recipe and data in the output folder, or compares them with those there. The first process does it for all.

    Before any stage has begun there is nothing to go on from, and another recipe may take the folder.
    """
    if not is_first_process():
        return
    output = Path(recipe.output)
    values = dataclasses.asdict(recipe)
    values |= {"processes": int(os.environ.get("WORLD_SIZE", 1)), "contents": dict(contents)}
    del values["output"]  # a folder may be moved
    path = output / RECIPE
    if path.is_file() and any(inside.is_dir() for inside in output.iterdir()):
        before = json.loads(path.read_text(encoding="utf-8"))
        keys = differing_keys(before, json.loads(json.dumps(values)))
        if keys:
            raise ValueError(
                f"recipe: {output} was begun with another {', '.join(keys)}: take another output, or the same recipe "
                "and data"
            )
    elif output.is_dir() and any(inside.name != RECIPE for inside in output.iterdir()):
        raise ValueError(f"recipe: output: {output} is not empty, and was not begun with a recipe")
    else:
        output.mkdir(parents=True, exist_ok=True)
        write_json(path, values)


def write_checkpoint(model: Any, processor: Any, output: Path, dtype: str) -> None:
    """Saves model and processor; config.json comes last, and without it there is no checkpoint.

    Args:
        model, processor: what to save.
        output: where to.
        dtype: that ``from_pretrained`` gives the weights by default. Of itself it would be that of the first parameter.
    """
    part = output / UNFINISHED
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    processor.save_pretrained(part)
    config = json.loads((part / "config.json").read_text(encoding="utf-8"))
    write_json(part / "config.json", {**config, "dtype": dtype})
    for path in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output / path.name)
    part.rmdir()


def is_first_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def wait_for_all() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
