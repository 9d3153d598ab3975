"""Trainer whose ranks share sequences: losses, steps and evaluation of a Trainer in one process."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from test_transformers_context_parallel import WHOLE, assert_close, inputs_for, make  # noqa: E402
from vision_language import make_inputs, make_model  # noqa: E402

from moda_ext.integrations.transformers import (  # noqa: E402
    ContextParallelTrainerMixin,
    MODAConfig,
    apply_moda,
    context_parallel,
    text_stack,
)


class ContextParallelTrainer(ContextParallelTrainerMixin, transformers.Trainer):
    pass


def dataset() -> list[dict]:
    """Ten rows of unequal numbers of labels: the last batch of two steps of four has half of the rows."""
    rows = []
    for i in range(10):
        inputs = make_inputs("llava", rows=2, text=5 + 4)
        row = {name: tensor[i % 2] for name, tensor in inputs.items()}
        row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
        row["labels"][: i % 4] = -100
        rows.append(row)
    return rows


def train(folder: Path, name: str) -> None:
    transformers.logging.set_verbosity_error()
    model = apply_moda(make_model("llava"), MODAConfig(mask={"base": -2.0, "learn_base": True}))
    arguments = transformers.TrainingArguments(
        str(folder / name),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=1e-2,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        prediction_loss_only=True,
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = dataset()
    given = {"model": model, "args": arguments, "train_dataset": rows, "eval_dataset": rows}
    world = arguments.world_size
    if world == 1:
        trainer = transformers.Trainer(**given)
    else:
        trainer = ContextParallelTrainer(**given, context_mesh=init_device_mesh("cpu", (world,)))
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    logs = [(log["loss"], float(log["grad_norm"])) for log in trainer.state.log_history if "loss" in log]
    if not dist.is_initialized() or dist.get_rank() == 0:
        state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
        torch.save((logs, evaluated, state), folder / f"{name}.pt")


def check_fully_sharded() -> None:
    """FSDP takes the mean over the ranks of a sequence for that over data ranks."""
    mesh = init_device_mesh("cpu", (2,))
    model, inputs = make("llava", MODAConfig(mask=WHOLE)), inputs_for("llava", 2)
    model(**inputs, use_cache=False).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for scheme in ("regather", "ulysses", "ring"):
        sharded = make("llava", MODAConfig(mask=WHOLE))
        for layer in text_stack(sharded).layers:
            for part in (layer.self_attn.moda.aligner, layer.self_attn.moda.mask, layer):
                fully_shard(part, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        with context_parallel(sharded, mesh, scheme=scheme):
            sharded(**inputs).loss.backward()
        for name, parameter in sharded.named_parameters():
            if name in expected:
                assert_close(f"{scheme}: {name}", parameter.grad.full_tensor(), expected[name])


def train_on_ranks(folder: str) -> None:
    check_fully_sharded()
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    train(Path(folder), "two")


def test_trainer_and_fsdp_equal_one_process(tmp_path):
    run_ranks(train_on_ranks, 2, tmp_path / "rendezvous", str(tmp_path))
    train(tmp_path, "one")
    (logs, evaluated, state), (found_logs, found_evaluated, found) = (
        torch.load(tmp_path / f"{name}.pt") for name in ("one", "two")
    )
    assert len(logs) == 4  # two epochs of two steps, the second of half the rows
    torch.testing.assert_close(torch.tensor(found_logs), torch.tensor(logs), rtol=1e-5, atol=0)
    assert found_evaluated == pytest.approx(evaluated, rel=1e-5)
    start = apply_moda(make_model("llava"), MODAConfig(mask={"base": -2.0, "learn_base": True})).state_dict()
    assert state.keys() == found.keys()
    for name, tensor in state.items():
        moved = (tensor - start[name]).abs().max()
        assert (found[name] - tensor).abs().max() <= 1e-4 * moved + 1e-7, name


def test_ranks_must_follow_each_other():
    class Mesh:
        ndim, mesh = 1, torch.tensor([0, 2])

        def size(self) -> int:
            return 2

    with pytest.raises(ValueError, match="context_mesh must be of one dimension, of 2 ranks that follow each other"):
        ContextParallelTrainer(context_mesh=Mesh())
