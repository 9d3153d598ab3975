"""Models with MODA are found inside of wrappers."""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")
from moved_models import logits_of, same
from processes import run_ranks
from tolerance import assert_close
from torch import nn
from trained_models import labels_of, make_trained, randomize
from vision_language import make_inputs, make_model

from moda_ext.diagnostics import AttentionBalanceLoss, AttentionMeter
from moda_ext.integrations.transformers import (
    apply_moda,
    attention_modules,
    check_identity,
    load_moda,
    load_moda_state_dict,
    moda_parameters,
    moda_state_dict,
    optimizer_groups,
    recording,
    save_moda,
    text_stack,
    train_only_moda,
)


class Student(nn.Module):
    """A module of a user's own."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, nn.Linear(4, 4)

    def forward(self, **inputs):
        return self.model(**inputs)


@pytest.fixture
def process_group(tmp_path):
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch.distributed has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(model, way):
    if way == "accelerate":
        accelerate = pytest.importorskip("accelerate")
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer's of another test
        return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    if way == "fsdp":
        return torch.distributed.fsdp.FullyShardedDataParallel(
            model, use_orig_params=True, device_id=torch.device("cpu")
        )
    return {
        "distributed": lambda: nn.parallel.DistributedDataParallel(model, find_unused_parameters=True),
        "data parallel": lambda: nn.DataParallel(model),
        "compiled": lambda: torch.compile(model, backend="eager"),
        "averaged": lambda: torch.optim.swa_utils.AveragedModel(model),
        "module": lambda: Student(model),
        "several": lambda: nn.DataParallel(Student(torch.optim.swa_utils.AveragedModel(model))),
    }[way]()


WAYS = ("distributed", "data parallel", "compiled", "averaged", "module", "several", "accelerate", "fsdp")


@pytest.mark.parametrize("way", WAYS)
def test_models_are_found_inside_of_wrappers(way, process_group, tmp_path):
    with torch.compiler.set_stance("force_eager"):  # what is tested is the wrapper
        check_wrapper(way, tmp_path)


def check_wrapper(way, tmp_path):
    inputs = make_inputs("llava")
    plain = wrapped(apply_moda(make_model("llava")), way)
    check_identity(plain, inputs)

    trained = make_trained("llava")
    state, expected = moda_state_dict(trained), logits_of(trained, inputs)
    with AttentionMeter(trained) as meter:
        logits_of(trained, inputs)
    measured = meter.result()
    model = wrapped(trained, way)
    assert len(attention_modules(model)) == 2 and text_stack(model).config.num_hidden_layers == 2
    assert same(moda_state_dict(model), state) and len(moda_parameters(model)) == len(moda_parameters(trained))
    save_moda(model, tmp_path / "moda.safetensors")
    assert same(moda_state_dict(load_moda(make_model("llava"), tmp_path / "moda.safetensors")), state)
    with AttentionMeter(model) as meter, torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[inputs["attention_mask"] == 1]
    if way != "accelerate":  # which rounds
        assert_close(logits, expected)
        for figure in ("self", "cross", "score"):
            assert_close(*(result.figure(figure).nan_to_num() for result in (meter.result(), measured)))
    if way != "averaged":
        model.train()
        with AttentionBalanceLoss().collect(model) as penalties:
            (model(**inputs, labels=labels_of(inputs), use_cache=False).loss + torch.stack(penalties).mean()).backward()
        assert len(penalties) == 2
        assert any(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if ".moda." in name)
        train_only_moda(model)
        assert {group["name"] for group in optimizer_groups(model, lr=1e-3)} == {"moda", "moda_fast"}


def sharded_steps(folder):
    """Of both kinds of FSDP: what is saved is whole, and what is loaded is what the model computes with."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    rank, world = dist.get_rank(), dist.get_world_size()
    inputs, cpu = make_inputs("llava"), torch.device("cpu")
    for kind in (1, 2):
        model = make_trained("llava")
        state, expected = moda_state_dict(copy.deepcopy(model)), logits_of(randomize(copy.deepcopy(model), 4), inputs)
        other = moda_state_dict(randomize(make_trained("llava"), 4))
        if kind == 1:
            model = FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
        else:
            for layer in text_stack(model).layers:
                fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
        save_moda(model, f"{folder}/{kind}-{rank}.safetensors")
        assert same(moda_state_dict(model), state)
        load_moda_state_dict(model, other)
        assert same(moda_state_dict(model), other)
        assert_close(logits_of(model, inputs), expected)


def test_sharded_models_are_saved_whole(process_group, tmp_path):
    run_ranks(sharded_steps, 2, tmp_path / "of two", str(tmp_path))
    expected = moda_state_dict(make_trained("llava"))
    for file in tmp_path.glob("*.safetensors"):
        assert same(moda_state_dict(load_moda(make_model("llava"), file)), expected)


def test_wrappers_of_none_or_of_several_models_are_refused():
    with pytest.raises(ValueError, match="text_stack: unknown model family 'Linear'; known are llava"):
        text_stack(nn.Linear(2, 2))
    both = nn.ModuleList([make_model("llava"), make_model("qwen2_vl")])
    with pytest.raises(ValueError, match="there are 2 models in ModuleList .*; pass one of them"):
        text_stack(both)
    with pytest.raises(
        ValueError,
        match="model must be a LlavaForConditionalGeneration, got DataParallel around a Llava.*; apply MODA first",
    ):
        apply_moda(nn.DataParallel(make_model("llava")))


def test_recording_in_several_replicas_is_refused():
    model = nn.DataParallel(make_model("llava"))
    model.device_ids = [0, 1]
    with pytest.raises(NotImplementedError, match="Run model.module while it is recorded"):
        recording(model, print).__enter__()
