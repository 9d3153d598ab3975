"""Training with MODA: checkpointing, PEFT, Trainer, autocast, compilation, FSDP."""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")
import transformers
from processes import run_ranks
from tolerance import assert_close
from trained_models import family, labels_of, logits_of, make_trained
from vision_language import make_inputs, make_model

from moda_ext.integrations.transformers import (
    MODAConfig,
    apply_moda,
    attention_modules,
    load_moda_state_dict,
    moda_parameters,
    moda_state_dict,
    optimizer_groups,
    text_stack,
    train_only_moda,
)
from moda_ext.integrations.transformers.proof import TRAINED
from moda_ext.integrations.transformers.versions import at_least


@family
def test_checkpointing_gives_the_same_gradients(family):
    model, inputs = make_trained(family).train(), make_inputs(family)

    def gradients():
        model.zero_grad()
        model(**inputs, labels=labels_of(inputs)).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    calls = []
    handle = attention_modules(model)[-1].moda.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradients()
    handle.remove()
    assert len(calls) == 2  # once forward, once recomputed
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        assert torch.equal(checkpointed[name], grad), name


@family
def test_lora_and_moda_through_peft(family, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=r".*(language_model|text_model).*\.(q|v)_proj", modules_to_save=["moda"])
    model = peft.get_peft_model(apply_moda(make_model(family), MODAConfig(**TRAINED)), settings)
    inputs = make_inputs(family)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(".moda." in name or "lora_" in name for name in trainable)
    optimizer = torch.optim.SGD(optimizer_groups(model, lr=1.0, fast_lr=1.0))
    for _ in range(2):  # B is 0 at first, and so is the gradient of A
        optimizer.zero_grad()
        model(**inputs, labels=labels_of(inputs), use_cache=False).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path)

    base = apply_moda(make_model(family), MODAConfig(**TRAINED))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected)
        with loaded.disable_adapter():
            assert not torch.equal(loaded(**inputs).logits, expected)
    alone = apply_moda(make_model(family), MODAConfig(**TRAINED))
    load_moda_state_dict(alone, moda_state_dict(loaded))
    trained = moda_state_dict(alone)
    assert any(trained[name].any() for name in trained if name.endswith(".b1"))


def test_only_moda_is_trained_and_groups_have_their_rates():
    model = apply_moda(make_model("llava"), MODAConfig(**TRAINED))
    groups = {group["name"]: group for group in optimizer_groups(model, lr=1e-5, moda_lr=1e-4, weight_decay=0.1)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "model": (1e-5, 0.1),
        "moda": (1e-4, 0.1),
        "moda_fast": (1e-2, 0.0),
    }
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    fast = {names[id(p)].rsplit(".", 1)[1] for p in groups["moda_fast"]["params"]}
    assert fast == {"prior", "condition", "base"}

    parameters = train_only_moda(model)
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in model.model.multi_modal_projector.parameters())
    assert [group["name"] for group in optimizer_groups(model, lr=1e-5)] == ["moda", "moda_fast"]
    with pytest.raises(ValueError, match="no MODA parameters"):
        train_only_moda(make_model("llava"))


def test_trainer_trains_moda(tmp_path):
    pytest.importorskip("accelerate")
    model, inputs = apply_moda(make_model("llava"), MODAConfig(**TRAINED)), make_inputs("llava")
    train_only_moda(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{key: value[i] for key, value in {**inputs, "labels": labels_of(inputs)}.items()} for i in range(2)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    optimizer = torch.optim.AdamW(optimizer_groups(model, lr=1e-2))
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    assert trainer.train().training_loss > 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (".moda." in name), name


@family
def test_bfloat16_autocast(family):
    model, inputs = make_trained(family), make_inputs(family)
    exact, kept = logits_of(family, model, inputs), inputs["attention_mask"] == 1
    with torch.autocast("cpu", torch.bfloat16):
        result = logits_of(family, model, inputs)
        model.generate(**copy.deepcopy(inputs), max_new_tokens=2, do_sample=False)
        model(**inputs, labels=labels_of(inputs), use_cache=False).loss.backward()
    assert result.dtype == torch.bfloat16
    assert (result[kept].float() - exact[kept]).abs().max() < 0.1
    for name, parameter in moda_parameters(model).items():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@family
def test_a_compiled_training_step_has_the_same_gradients(family):
    model, inputs = make_trained(family).train(), make_inputs(family)
    stack, gradients = text_stack(model), []
    for compiled in (False, True):
        model.zero_grad()
        if compiled:
            torch._dynamo.reset()
            stack.forward = torch.compile(stack.forward, fullgraph=True, backend="aot_eager")
        model(**inputs, labels=labels_of(inputs), use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in moda_parameters(model).items()})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)
    torch._dynamo.reset()


def fsdp_step(result):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    rank, world = dist.get_rank(), dist.get_world_size()
    model, inputs = make_trained("llava").train(), make_inputs("llava", padding=None)
    for layer in text_stack(model).layers:
        fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = {key: value[rank : rank + 1] for key, value in inputs.items()}
    model(**own, labels=labels_of(own), use_cache=False).loss.backward()
    optimizer.step()
    state = {name: getattr(tensor, "full_tensor", lambda t=tensor: t)() for name, tensor in model.state_dict().items()}
    if rank == 0:
        torch.save(state, result)


def test_a_step_on_two_fsdp_processes_equals_one_process(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch.distributed has no gloo")
    model, inputs = make_trained("llava").train(), make_inputs("llava", padding=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs, labels=labels_of(inputs), use_cache=False).loss.backward()
    optimizer.step()
    run_ranks(fsdp_step, 2, tmp_path / "rendezvous", str(tmp_path / "state"))
    state = torch.load(tmp_path / "state")
    untrained = make_trained("llava").state_dict()
    for name, tensor in model.state_dict().items():
        assert_close(state[name], tensor)
    assert any(not torch.equal(untrained[name], state[name]) for name in state if ".moda.aligner" in name)


@pytest.mark.skipif(not at_least((5, 24)), reason="Transformers before 5.24 drops the cache there, of any model")
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_generation_in_training_mode_with_checkpointing(family):
    """As in reinforcement learning. Where no gradient is wanted nothing is checkpointed, and the cache stays."""
    inputs = make_inputs(family)
    model = make_trained(family)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**copy.deepcopy(inputs), **options)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(model.generate(**copy.deepcopy(inputs), **options), expected)
    with torch.no_grad():
        without = model(**inputs).logits
    with_gradients = model(**inputs).logits
    assert_close(without, with_gradients)
