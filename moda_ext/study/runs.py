"""The runs of the study: each trains one variant with one seed, and asks it the questions of the test."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from moda_ext.conversations import HINTS, encode, read_conversations
from moda_ext.diagnostics import AttentionMeter, load_model
from moda_ext.evaluation.evaluate import evaluate
from moda_ext.evaluation.tasks import Task, read_questions
from moda_ext.integrations.transformers import moda_parameters
from moda_ext.study.variants import VARIANTS, Variant
from moda_ext.training import Lora, Stage, train_stage
from moda_ext.training.trainer import TRAINED, deficits, write_json

__all__ = ["Plan", "Run", "read_runs", "run_study"]

BASE = "base"  # the folder of the aligned model
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
MEASURED = 4  # questions of each task, without hints, on which deficit disorder attention is measured


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all runs have in common.

    Attributes:
        small: the folder of ``moda-ext assemble``.
        align_steps: of the alignment, once for all runs: LoRA and the projector on descriptions, no MODA.
        align_lr: of LoRA in the alignment.
        steps: of each run's training.
        batch_size: of both.
        lr: of LoRA and MODA's low-rank maps in it.
        projector_lr: of the projector.
        fast_lr: of MODA's priors and conditions.
        prior: the calibrated value that the variant ``prior`` starts at.
        prior_layers: the first and the last that have it; None for all.
        limit: questions of each task and hint.
        hints: which are asked; following needs ``"wrong"``.
        questions: ``"test"``, or ``"dev"`` to choose a learning rate by.
    """

    small: str
    align_steps: int = 30
    align_lr: float = 2e-3
    steps: int = 100
    batch_size: int = 6
    lr: float = 2e-3
    projector_lr: float = 1e-4
    fast_lr: float = 1e-2
    prior: float = 1.0
    prior_layers: list[int] | None = None
    limit: int = 40
    hints: list[str] = dataclasses.field(default_factory=lambda: list(HINTS))
    questions: str = "test"

    def stage(self, variant: Variant | None) -> Stage:
        """The training of a variant, or the alignment."""
        return Stage(
            "align" if variant is None else "instruct",
            ["projector"] if variant is None or variant.moda is None else ["projector", "moda"],
            lora=Lora(target_modules=TARGETS),
            lr=self.align_lr if variant is None else self.lr,
            projector_lr=self.projector_lr,
            fast_lr=self.fast_lr,
            betas=[0.9, 0.98],
            balance=0.0 if variant is None else variant.balance,
            steps=self.align_steps if variant is None else self.steps,
            batch_size=self.batch_size,
            save_every=0,
            log_every=1,
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """What came out of a run.

    Attributes:
        variant, seed, plan: which it was.
        outcomes: {task and hint: a character for each question: "1" right, "h" wrong and the answer that a wrong hint
            suggests (or would, in a question without one), "0" otherwise}.
        groups: {task: its group}.
        chance: {task: the accuracy of the best blind answer}.
        loss: mean over the last tenth of the steps.
        deficit: AvgDiff and MDI, each with what uniform attention gives; {} where the modalities are not the real ones.
        prior: mean over layers and heads of the prior of text rows for image keys, None without one.
        trained: numbers.
        seconds: of training, of the processor.
    """

    variant: str
    seed: int
    plan: dict[str, Any]
    outcomes: dict[str, str]
    groups: dict[str, str]
    chance: dict[str, float]
    loss: float
    deficit: dict[str, float]
    prior: float | None
    trained: int
    seconds: float

    def accuracy(self, hint: str) -> float:
        """Mean over the tasks with that hint."""
        found = [o.count("1") / len(o) for name, o in self.outcomes.items() if name.endswith(f"/{hint}")]
        return sum(found) / len(found)

    def following(self, hint: str = "wrong") -> float:
        """How often the answer is what a wrong hint suggests, mean over tasks; ``"none"``: where nobody suggests it."""
        found = [o.count("h") / len(o) for name, o in self.outcomes.items() if name.endswith(f"/{hint}")]
        return sum(found) / len(found)

    def correct(self, hint: str) -> list[bool]:
        """Whether each question is answered right, task after task."""
        return [c == "1" for name, o in sorted(self.outcomes.items()) if name.endswith(f"/{hint}") for c in o]


def run_study(
    folder: str | Path,
    plan: Plan,
    variants: Sequence[str],
    seeds: Sequence[int],
    *,
    jobs: int = 1,
    report: Callable[[str], Any] = print,
) -> list[Run]:
    """Does the runs that have no file in the folder yet, seed after seed, and returns all.

    Args:
        folder: of a file for each run, ``<variant>-<seed>.json``, made if need be.
        plan: of all runs.
        variants: names in ``VARIANTS``.
        seeds: of each variant. Runs of one seed see the same conversations in the same order.
        jobs: processes, which share the processor's cores.
        report: gets a line when a run is done.

    Raises:
        ValueError: an unknown variant, none that is the baseline, or a folder of another plan or other data.
    """
    unknown = set(variants) - VARIANTS.keys()
    if unknown:
        raise ValueError(f"study: unknown variants {', '.join(sorted(unknown))}; known are {', '.join(VARIANTS)}")
    lonely = {VARIANTS[variant].against for variant in variants} - {None, *variants}
    if lonely:
        raise ValueError(f"study: variants must have {', '.join(map(str, lonely))} too, which others are compared with")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, plan)
    wanted = [(variant, seed) for seed in seeds for variant in variants]
    missing = [run for run in wanted if not _path(folder, *run).exists()]
    if missing:
        make_base(folder / BASE, plan)
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with concurrent.futures.ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        futures = {pool.submit(_run_to_file, folder, plan, *run): run for run in missing}
        for future in concurrent.futures.as_completed(futures):
            try:
                found = future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # not after all the others
                raise
            accuracy, following = 100 * found.accuracy("none"), 100 * found.following()
            report(
                f"{found.variant}, seed {found.seed}: {accuracy:.1f} % right without hints, follows {following:.1f} % "
                f"of wrong hints, {found.seconds:.0f} s of training"
            )
    return [read_run(_path(folder, *run)) for run in wanted]


def claim(folder: Path, plan: Plan) -> None:
    """Notes the plan and the data in the folder, or compares them with what is noted there."""
    values = dataclasses.asdict(plan)
    small = Path(values.pop("small"))
    values["data"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((small / "data").glob("*.jsonl"))
    }
    path = folder / "plan.json"
    if not path.exists():
        write_json(path, values)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    keys = [key for key in {**before, **values} if before.get(key) != values.get(key)]
    if keys:
        raise ValueError(f"study: {folder} was begun with another {', '.join(keys)}: take another folder, or the same")


def read_runs(folder: str | Path) -> list[Run]:
    """All runs of a folder."""
    return [read_run(path) for path in sorted(Path(folder).glob("*-*.json"))]


def read_run(path: Path) -> Run:
    return Run(**json.loads(path.read_text(encoding="utf-8")))


def _path(folder: Path, variant: str, seed: int) -> Path:
    return folder / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}.json"


def _run_to_file(folder: Path, plan: Plan, variant: str, seed: int) -> Run:
    run = do_run(folder, plan, variant, seed)
    write_json(_path(folder, variant, seed), dataclasses.asdict(run))
    return run


def make_base(folder: Path, plan: Plan) -> None:
    """The aligned model that all runs begin with. Where it has been trained already, it is only written again."""
    small = Path(plan.small)
    model: Any
    model, processor = load_model(str(small / "model"), device="cpu", dtype="float32")
    remember_pictures(model.model.vision_tower)
    conversations = read_conversations(small / "data" / "align.jsonl")
    model = train_stage(model, processor, plan.stage(None), conversations, folder / "align", progress=False)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)


def do_run(folder: Path, plan: Plan, variant: str, seed: int) -> Run:
    """One run."""
    chosen, small = VARIANTS[variant], Path(plan.small)
    model: Any
    model, processor = load_model(str(folder / BASE), device="cpu", dtype="float32")
    torch.manual_seed(seed)
    chosen.attach(model, plan.prior, plan.prior_layers)
    remember_pictures(model.model.vision_tower)
    conversations, stage = read_conversations(small / "data" / chosen.data), plan.stage(chosen)
    place = folder / "training" / f"{_path(folder, variant, seed).stem}"
    begin, cost = time.process_time(), place / "seconds.json"
    if not cost.exists():
        shutil.rmtree(place, ignore_errors=True)  # of a run that was killed: what it cost is not known
    model = train_stage(model, processor, stage, conversations, place, seed=seed, progress=False)
    if not cost.exists():
        write_json(cost, time.process_time() - begin)
    log = json.loads((place / "log.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in log if "loss" in entry][-max(1, plan.steps // 10) :]
    asked = read_questions(small / "data" / f"{plan.questions}.jsonl")
    tasks = [task.limited(plan.limit) for task in asked if task.hint in plan.hints]
    with torch.autocast(model.device.type, torch.bfloat16):
        results = [evaluate(model, processor, task, batch_size=20, max_new_tokens=6) for task in tasks]
        deficit = {} if chosen.blind else measure_deficit(model, processor, tasks)
    outcomes = {
        f"{result.name}/{result.hint}": "".join(
            "1" if answer.correct else "h" if answer.follows(str(answer.hinted)) else "0" for answer in result.answers
        )
        for result in results
    }
    priors = [p[:, 0, 1].mean() for name, p in moda_parameters(model).items() if name.endswith(".prior")]
    return Run(
        variant,
        seed,
        dataclasses.asdict(plan),
        outcomes,
        {task.name: task.group for task in tasks},
        {result.name: result.chance for result in results if result.chance is not None},
        sum(losses) / len(losses),
        deficit,
        float(torch.stack(priors).mean()) if priors else None,
        sum(tensor.numel() for tensor in load_file(place / TRAINED).values()),
        json.loads(cost.read_text(encoding="utf-8")),
    )


@torch.no_grad()
def measure_deficit(model: Any, processor: Any, tasks: Sequence[Task]) -> dict[str, float]:
    """AvgDiff and MDI of the first questions of each task without hints, with uniform attention's."""
    asked = [c.prompt for task in tasks if task.hint == "none" for c in task.conversations[:MEASURED]]
    with AttentionMeter(model) as meter:
        for conversation in asked:
            inputs, _ = encode(processor, [conversation], padding_side="right")
            model(**inputs.to(model.device, model.dtype), use_cache=False, logits_to_keep=1)
    return deficits(meter.result())


def remember_pictures(tower: torch.nn.Module) -> None:
    """A frozen tower computes each picture once in a process."""
    plain, memory = tower.forward, _memory()

    @functools.wraps(plain)
    def forward(pixel_values: Tensor, **options: Any) -> Any:
        keys = [hashlib.sha256(picture.float().cpu().numpy().tobytes()).digest() for picture in pixel_values]
        new = [i for i, key in enumerate(keys) if key not in memory]
        if new:
            layers = plain(pixel_values[new], **options).hidden_states
            memory.update((keys[i], [layer[row] for layer in layers]) for row, i in enumerate(new))
        layers = tuple(torch.stack(cells) for cells in zip(*(memory[key] for key in keys), strict=True))
        return BaseModelOutput(last_hidden_state=layers[-1], hidden_states=layers)

    tower.forward = forward


@functools.cache
def _memory() -> dict[bytes, list[Tensor]]:
    return {}
