"""A Trainer for conversations: the loss on answers, checkpoints of what is trained, and deficit disorder attention."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback, is_tensorboard_available

from moda_ext.conversations import Conversation
from moda_ext.diagnostics import AttentionBalanceLoss, AttentionMeter, Diagnosis
from moda_ext.training.collator import IGNORED
from moda_ext.training.parts import optimizer_groups, part_of
from moda_ext.training.recipe import UNFINISHED, Stage

__all__ = ["ConversationTrainer", "deficits", "load_trained", "save_trained"]

TRAINED = "trained.safetensors"
LOG = "log.json"


class ConversationTrainer(Trainer):
    """Trains the parameters of a model that require gradients, as a stage says.

    A checkpoint holds those parameters, not what stays as it is. The Trainer writes it
    into a folder of unfinished ones, from where it moves once all of it is there: what a killed process leaves behind
    is never resumed from.

    Args:
        model: on any device, perhaps with adapters of PEFT.
        stage: the settings.
        batches: every conversation of every step, in order.
        steps: of the optimiser.
        folder: of checkpoints and log.
        collator: makes a batch of conversations.
        seed: of dropout.
        probe: batches to measure deficit disorder attention on; none for no such measurement.
        progress: show a bar.

    Raises:
        NotImplementedError: several GPUs in one process, or an engine that shards weights.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        batches: Sequence[Conversation],
        steps: int,
        folder: Path,
        *,
        collator: Any,
        seed: int,
        probe: Sequence[Mapping[str, Tensor]],
        progress: bool,
    ):
        arguments = TrainingArguments(
            str(folder / UNFINISHED),
            max_steps=steps,
            per_device_train_batch_size=stage.batch_size,
            gradient_accumulation_steps=stage.gradient_accumulation,
            train_sampling_strategy="sequential",
            dataloader_num_workers=stage.workers,
            remove_unused_columns=False,
            lr_scheduler_type=stage.schedule,
            warmup_steps=0 if steps == 1 else stage.warmup,  # a single step at a rate of 0 would train nothing
            max_grad_norm=stage.max_grad_norm,
            activation_checkpointing=stage.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
            logging_steps=stage.log_every,
            logging_nan_inf_filter=False,  # a loss that is not a number shall be seen
            save_strategy="steps" if stage.save_every else "no",
            save_steps=stage.save_every or 1,
            report_to=[],
            seed=seed,
            use_cpu=not torch.accelerator.is_available(),
            ddp_find_unused_parameters=True,  # a batch without images does not reach the projector
            disable_tqdm=not progress,
        )
        if arguments.n_gpu > 1:
            raise NotImplementedError(
                f"{arguments.n_gpu} GPUs in one process: start one process for each, torchrun --nproc-per-node "
                f"{arguments.n_gpu} -m moda_ext train ..., or show one with CUDA_VISIBLE_DEVICES"
            )
        optimizer = torch.optim.AdamW(optimizer_groups(model, stage), betas=(stage.betas[0], stage.betas[1]))
        super().__init__(model, arguments, data_collator=collator, train_dataset=batches, optimizers=(optimizer, None))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise NotImplementedError("training with weights that are sharded by FSDP or DeepSpeed")
        self.model_accepts_loss_kwargs = True  # compute_loss wants to know how many labels a step has
        self.network, self.stage, self.folder, self.probe = model, stage, folder, probe
        self.still = still_modules(model)
        self.balance_loss = AttentionBalanceLoss() if stage.balance else None
        self._penalties: list[Tensor] = []
        self._loss = torch.zeros(())
        self._balances: list[Tensor] = []  # penalties since the last entry of the log
        self.remove_callback(ProgressCallback if progress else PrinterCallback)
        if progress:
            self.add_callback(Bar)
        if is_tensorboard_available() and self.is_world_process_zero():
            from torch.utils.tensorboard import SummaryWriter

            self.add_callback(TensorBoardCallback(SummaryWriter(str(folder / "tensorboard"))))
        self.add_callback(Keeper(self))

    def autocast(self) -> torch.autocast:
        """Of every forward pass."""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.stage.autocast == "bf16")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss on the answers alone, which is logged.

        The backward pass is in the block too: gradient checkpointing computes the layers once more in it.
        """
        with contextlib.ExitStack() as stack:
            if self.balance_loss is not None:
                self._penalties = stack.enter_context(self.balance_loss.collect(self.network))
            super().training_step(model, inputs, num_items_in_batch)
        return self._loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean over all labels of a step, of all its forward passes and processes, and the balance penalty.

        The logits are computed where there is a label, and nowhere else: they would be most of the memory.
        """
        for module in self.still:
            module.eval()  # training_step has put the whole model into training mode
        assert num_items_in_batch is not None, "the labels of a step, see model_accepts_loss_kwargs"
        labels = inputs["labels"][:, 1:]
        there = labels != IGNORED
        with self.autocast():
            outputs = model(
                **{key: value for key, value in inputs.items() if key != "labels"},
                logits_to_keep=F.pad(there, (0, 1)),
                use_cache=False,
            )
        loss = F.cross_entropy(outputs.logits.float(), labels[there], reduction="sum") / num_items_in_batch
        loss = loss * self.accelerator.num_processes  # whose gradients are averaged
        self._loss = loss.detach()
        if self.balance_loss is not None:
            penalty = torch.stack(self._penalties).mean()
            self._balances.append(penalty.detach())
            loss = loss + self.stage.balance * penalty / self.stage.gradient_accumulation
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the balance penalty, before its weight, and the deficits, where they are due."""
        if "loss" in logs and self._balances:
            logs["balance"] = self.accelerator.reduce(torch.stack(self._balances).mean(), "mean").item()
            self._balances.clear()
        if "loss" in logs and self.measures_now():
            logs |= self.measure_deficit()
        logs.pop("train_loss", None)  # of the steps since the last start alone
        super().log(logs, start_time)

    def measures_now(self) -> bool:
        """Whether deficit disorder attention is measured after this step."""
        return bool(self.probe) and self.state.global_step % self.stage.deficit_every == 0

    @torch.no_grad()
    def measure_deficit(self) -> dict[str, float]:
        """AvgDiff of each modality and MDI on the probe, with what uniform attention would give.

        See :class:`moda_ext.diagnostics.AttentionMeter`. A figure that is not defined is left out. The model, its mode
        and the random numbers stay as they are.
        """
        modes = [(module, module.training) for module in self.network.modules()]
        devices = [] if self.args.device.type == "cpu" else [self.args.device]
        meter = AttentionMeter(self.network.eval())
        with torch.random.fork_rng(devices, device_type=self.args.device.type), self.autocast(), meter:
            for batch in self.probe:
                inputs = self._prepare_inputs({key: value for key, value in batch.items() if key != "labels"})
                self.network(**inputs, logits_to_keep=1, use_cache=False)
        for module, mode in modes:
            module.training = mode
        return deficits(meter.result())

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            assert output_dir is not None, "of a checkpoint"
            os.makedirs(output_dir, exist_ok=True)
            save_trained(self.network, Path(output_dir) / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.network, Path(resume_from_checkpoint) / TRAINED)


class Keeper(TrainerCallback):
    """Moves whole checkpoints to where they are resumed from, and has the log written then and for deficits."""

    def __init__(self, trainer: ConversationTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0 and self.trainer.measures_now():
            self.trainer.log(self.trainer.measure_deficit())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # What a checkpoint does not hold is the loss since the last entry: with an entry before each, the log of a run
        # that was interrupted is that of one that was not.
        control.should_log |= self.trainer.measures_now() or control.should_save

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if args.should_save:
            name = f"checkpoint-{state.global_step}"
            os.replace(self.trainer.folder / UNFINISHED / name, self.trainer.folder / name)
            for old in checkpoints(self.trainer.folder)[:-1]:
                shutil.rmtree(old)
        self.trainer.accelerator.wait_for_everyone()


class Bar(ProgressCallback):
    """The Trainer's bar, with loss and deficits beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, str] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or self.training_bar is None:
            return
        if "loss" in logs:
            self.shown["loss"] = f"{logs['loss']:.3f}"
        for key, value in logs.items():
            measure, _, name = key.partition("/")
            if name and f"{key}_uniform" in logs:
                label = {"avg_diff": "AvgDiff", "mdi": "MDI"}[measure]
                self.shown[f"{label} {name}"] = f"{value:.3g} ({logs[f'{key}_uniform']:.3g})"
        self.training_bar.set_postfix(self.shown)


def still_modules(model: nn.Module) -> list[nn.Module]:
    """What stays in evaluation mode: a frozen vision tower, and batch norms, for whose statistics batches are small."""
    trained = any(part_of(name) == "vision" and p.requires_grad for name, p in model.named_parameters())
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or (part_of(name) == "vision" and not trained)
    ]


def checkpoints(folder: Path) -> list[Path]:
    """The whole ones, the oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def deficits(diagnosis: Diagnosis) -> dict[str, float]:
    """AvgDiff of each modality and MDI, with what uniform attention would give; without what is not defined."""
    found = {}
    for null in (False, True):
        summary = diagnosis.summary(null=null)
        for measure in ("avg_diff", "mdi"):
            for name in diagnosis.modalities[measure == "mdi" :]:
                found[f"{measure}/{name}{'_uniform' * null}"] = float(summary[measure][name])
    return {key: value for key, value in found.items() if not math.isnan(value)}


def save_trained(model: nn.Module, path: Path) -> None:
    """Writes the parameters that require gradients, or nothing at all. No buffer changes in training."""
    tensors = {name: p.detach().contiguous() for name, p in _trained(model).items()}
    part = path.with_suffix(".part")
    save_file(tensors, part)
    os.replace(part, path)


def load_trained(model: nn.Module, path: Path) -> None:
    """Copies what :func:`save_trained` wrote into a model that was prepared in the same way.

    Raises:
        ValueError: other parameters are trained in this model.
    """
    saved, own = load_file(path), _trained(model)
    shapes = [{(name, tuple(tensor.shape)) for name, tensor in tensors.items()} for tensors in (saved, own)]
    if shapes[0] != shapes[1]:
        other = sorted({name for name, _ in shapes[0] ^ shapes[1]})[:4]
        raise ValueError(f"{path} has other weights than the model trains: {', '.join(other)}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def write_json(path: Path, value: Any) -> None:
    """Writes the file, or nothing at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(part, path)
