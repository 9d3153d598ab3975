"""MODA under PEFT with several adapters."""

import copy
import math

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")
import transformers
from moved_models import logits_of, lora, same
from tolerance import assert_close
from trained_models import labels_of, make_trained, randomize
from vision_language import make_inputs, make_model

from moda_ext.integrations.transformers import (
    apply_moda,
    check_identity,
    load_moda,
    load_moda_state_dict,
    moda_parameters,
    moda_state_dict,
    optimizer_groups,
    recording,
    save_moda,
    train_only_moda,
)


def with_adapters(family="llava"):
    """ "first" with MODA, "second" with MODA of its own, "plain" without."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_trained(family), lora(modules_to_save=["moda"]), "first")
    randomize(model, 4)
    model.add_adapter("second", lora(modules_to_save=["moda"]))
    model.set_adapter("second")
    randomize(model, 5)
    model.add_adapter("plain", lora())
    model.set_adapter("first")
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


MODA_OF = {"first": 4, "second": 5, "plain": 3}  # the seed of the MODA that an adapter computes with


@pytest.mark.parametrize("adapter", MODA_OF)
def test_moda_of_the_active_adapter_is_what_is_saved_and_loaded(adapter, tmp_path):
    model, inputs = with_adapters(), make_inputs("llava")
    model.set_adapter(adapter)
    expected = moda_state_dict(randomize(make_trained("llava"), MODA_OF[adapter]))
    assert same(moda_state_dict(model), expected)
    save_moda(model, tmp_path / "moda.safetensors")
    assert same(moda_state_dict(load_moda(make_model("llava"), tmp_path / "moda.safetensors")), expected)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = randomize(make_trained("llava"), 9)
    load_moda_state_dict(model, moda_state_dict(other))
    assert same(moda_state_dict(model), moda_state_dict(other))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    place = "original_module" if adapter == "plain" else f"modules_to_save.{adapter}"
    assert changed and all(f".moda.{place}." in name for name in changed)
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, other(**inputs).logits)  # LoRA is on


@pytest.mark.parametrize("adapter", MODA_OF)
def test_train_only_moda_trains_what_the_model_computes_with(adapter):
    model, inputs = with_adapters(), make_inputs("llava")
    model.set_adapter(adapter)
    trained = train_only_moda(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    place = "original_module" if adapter == "plain" else f"modules_to_save.{adapter}"
    assert names == list(moda_parameters(model)) and len(names) == len(trained)
    assert names and all(f".moda.{place}." in name for name in names)
    groups = optimizer_groups(model, lr=0.1)
    assert {group["name"] for group in groups} == {"moda", "moda_fast"}
    before = moda_state_dict(randomize(make_trained("llava"), MODA_OF[adapter]))
    model(**inputs, labels=labels_of(inputs), use_cache=False).loss.backward()
    torch.optim.SGD(groups).step()
    assert all(p.grad is not None for p in trained)
    assert not same(moda_state_dict(model), before)


def test_every_trainable_parameter_has_a_group_with_several_adapters():
    model = with_adapters()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    groups = {group["name"]: group["params"] for group in optimizer_groups(model, lr=0.1)}
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names) == sorted(id(p) for group in groups.values() for p in group)
    assert all((".moda." in names[id(p)]) == (group != "model") for group in groups for p in groups[group])


@pytest.mark.parametrize("adapter", MODA_OF)
def test_adapters_are_disabled_merged_unloaded_and_deleted(adapter):
    """What is saved is always what the model computes with."""
    model, inputs = with_adapters(), make_inputs("llava")
    base, own = (
        moda_state_dict(make_trained("llava")),
        moda_state_dict(randomize(make_trained("llava"), MODA_OF[adapter])),
    )
    model.set_adapter(adapter)
    expected = logits_of(model, inputs)
    with model.disable_adapter():
        assert same(moda_state_dict(model), base)
        assert torch.equal(logits_of(model, inputs), logits_of(make_trained("llava"), inputs))
    assert torch.equal(logits_of(model, inputs), expected) and same(moda_state_dict(model), own)
    model.merge_adapter()
    assert same(moda_state_dict(model), own)
    assert_close(logits_of(model, inputs), expected)
    model.unmerge_adapter()
    unused = "second" if adapter != "second" else "first"
    model.delete_adapter(unused)
    assert same(moda_state_dict(model), own)
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged) is type(make_trained("llava"))
    assert same(moda_state_dict(merged), own)
    assert_close(logits_of(merged, inputs), expected)
    check_identity(merged, inputs, tolerance=math.inf)
    model.delete_adapter(adapter)  # the last one with MODA, or the one without
    state, records = moda_state_dict(model), []
    with torch.no_grad(), recording(model, records.append):
        model(**inputs)
    assert len(records) == 2 and same(state, moda_state_dict(make_trained("llava")) if adapter != "plain" else state)


@pytest.mark.parametrize("adapter", MODA_OF)
def test_adapters_are_saved_and_loaded_with_their_moda(adapter, tmp_path):
    peft = pytest.importorskip("peft")
    model, inputs = with_adapters(), make_inputs("llava")
    model.set_adapter(adapter)
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path)
    for names in ((adapter,), tuple(MODA_OF)):
        loaded = peft.PeftModel.from_pretrained(make_trained("llava"), tmp_path / names[0], names[0])
        for name in names[1:]:
            loaded.load_adapter(tmp_path / name, name)
        loaded.set_adapter(adapter)
        assert torch.equal(logits_of(loaded.eval(), inputs), expected)
        assert same(moda_state_dict(loaded), moda_state_dict(model))


def test_adapters_of_before_load(tmp_path):
    """With the base -inf of pseudo scores that are off."""
    peft, safetensors = pytest.importorskip("peft"), pytest.importorskip("safetensors.torch")
    model, inputs = (
        peft.get_peft_model(apply_moda(make_model("llava")), lora(modules_to_save=["moda"])),
        make_inputs("llava"),
    )
    expected = logits_of(randomize(model).eval(), inputs)
    model.save_pretrained(tmp_path)
    state = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    for name in [name for name in state if name.endswith("mask.fixed_decay")]:
        state[name.replace("fixed_decay", "base")] = torch.full_like(state[name], -math.inf)
    safetensors.save_file(state, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    loaded = peft.PeftModel.from_pretrained(apply_moda(make_model("llava")), tmp_path).eval()
    assert torch.equal(logits_of(loaded, inputs), expected)


def test_a_model_has_an_adapter_without_a_wrapper():
    """``add_adapter`` of Transformers itself."""
    pytest.importorskip("peft", minversion=transformers.integrations.peft.MIN_PEFT_VERSION)
    model, inputs = make_trained("llava"), make_inputs("llava")
    before = moda_state_dict(model)
    model.add_adapter(lora(modules_to_save=["moda"]), "first")
    assert same(moda_state_dict(model), before)
    randomize(model, 4)
    assert same(moda_state_dict(model), moda_state_dict(randomize(make_trained("llava"), 4)))
    model.disable_adapters()
    assert same(moda_state_dict(model), before)
    assert torch.equal(logits_of(model, inputs), logits_of(make_trained("llava"), inputs))
