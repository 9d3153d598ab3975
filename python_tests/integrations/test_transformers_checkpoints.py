"""MODA models as they are in use: half precision, quantised, offloaded, averaged, wrapped, with adapters, resumed."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")

import transformers
from tolerance import assert_close
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, GenerationConfig
from vision_language import FAMILIES, make_inputs, make_model

from moda_ext.diagnostics import AttentionBalanceLoss, AttentionMeter
from moda_ext.integrations.transformers import (
    MODAConfig,
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
from moda_ext.integrations.transformers.proof import TRAINED

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

HIDDEN = [[0.0, 1.5], [-math.inf, 0.0]]  # images do not see text
SETTINGS = {
    "concat": {},
    "add": {"aligner": {"rank": 4, "fusion": "add"}},
    "split": {"mask": {"softmax": "split", "base": -1.0}},
    "learned sink": {"mask": {"variant": "learned", "base": 0.0}},
    "learned decay": {"mask": {"learn_decay": True, "learn_base": True, "base": 0.0, "length": 40}},
    "hidden": {"mask": {"prior": HIDDEN}},
    "no aligner": {"aligner": None, "mask": {"variant": "fix", "prior": HIDDEN, "base": -1.0}},
    "release": {"mode": "release", "aligner": None, "mask": None},
}
every_family = pytest.mark.parametrize("family", FAMILIES)
two_families = pytest.mark.parametrize("family", ("llava", "qwen2_vl"))
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def randomize(model, seed=3):
    """Values for MODA's parameters that move the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in moda_parameters(model).items():
        if not name.endswith("base"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    return model


def make_trained(family, **settings):
    return randomize(apply_moda(make_model(family), MODAConfig(**{**TRAINED, **settings})))


def cast(inputs, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


@torch.no_grad()
def logits_of(model, inputs):
    """Without padding."""
    return model(**inputs, use_cache=False).logits[inputs["attention_mask"] == 1]


def labels_of(inputs):
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def greedy_of(model, inputs, tokens=4):
    options = {"max_new_tokens": tokens, "do_sample": False, "suppress_tokens": [60, 61, 62, 63]}
    return model.generate(**copy.deepcopy(inputs), **options)


# Half precision, and what an identity check sees


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@every_family
def test_identity_holds_in_the_precision_of_the_model(family, dtype):
    model, inputs = apply_moda(make_model(family).to(dtype)), cast(make_inputs(family), dtype)
    moved = check_identity(model, inputs)
    assert 0 < moved <= (84 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    # A prior that moves the attention by more than rounding does is found in any precision.
    for module in attention_modules(model):
        if hasattr(module, "moda"):
            module.moda.mask.prior.data[:, 0, 1] = 3.0
    with pytest.raises(ValueError, match="MODA moves this model's logits by"):
        check_identity(model, inputs)
    assert check_identity(model, inputs, tolerance=math.inf) > moved


def test_the_readme_flow_in_bfloat16(tmp_path):
    make_model("llava").to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    apply_moda(model, MODAConfig())
    check_identity(model, cast(make_inputs("llava"), torch.bfloat16))


def test_the_tolerance_of_an_identity_follows_what_eager_and_sdpa_differ_by():
    """Large scores in bfloat16: to round them otherwise, as every attention does, moves the logits."""
    model = apply_moda(make_model("qwen2_vl").to(torch.bfloat16))
    inputs = cast(make_inputs("qwen2_vl"), torch.bfloat16)
    tolerance, moved = 4 * torch.finfo(torch.bfloat16).eps, 0.0
    for _ in range(24):  # how far a rounding carries depends on the machine: until it is far enough
        for module in attention_modules(model):
            module.q_proj.weight.data.mul_(1.25)
            module.k_proj.weight.data.mul_(1.25)
        moved = check_identity(model, inputs)
        if moved > tolerance:
            break
    assert moved > tolerance
    with pytest.raises(ValueError, match="more than 0.0312"):
        check_identity(model, inputs, tolerance=tolerance)


@two_families
@pytest.mark.parametrize("padding", ("left", "right", None))
def test_an_identity_check_sees_what_is_wrong_in_decoding_only(family, padding):
    """As when a cache is not found: the forward pass over the prompt is right."""
    model, inputs = apply_moda(make_model(family)), make_inputs(family, padding=padding)
    assert check_identity(model, inputs) < 1e-5
    wrong = 0.1

    def wrong_while_decoding(module, args, kwargs, output):
        if module.config._attn_implementation == "moda" and kwargs["hidden_states"].shape[1] == 1:
            return (output[0] + wrong, *output[1:])

    handle = attention_modules(model)[0].register_forward_hook(wrong_while_decoding, with_kwargs=True)
    assert check_identity(model, inputs, new_tokens=0) < 1e-5
    with pytest.raises(ValueError, match="MODA moves this model's logits by"):
        check_identity(model, inputs)
    wrong = math.nan
    with pytest.raises(ValueError, match="MODA moves this model's logits by nan"):
        check_identity(model, inputs)
    handle.remove()
    assert check_identity(model, inputs) < 1e-5


def test_an_identity_check_leaves_the_model_as_it_was():
    model, inputs = apply_moda(make_model("llava")).train(), make_inputs("llava")
    text_stack(model).layers[1].eval()
    settings = GenerationConfig(
        do_sample=True, num_beams=2, max_new_tokens=3, eos_token_id=list(range(60)), pad_token_id=0
    )
    model.generation_config, before = settings, settings.to_dict()
    training = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="MODA moves this model's logits by"):
        check_identity(model, inputs, tolerance=0.0)
    assert check_identity(model, {**inputs, "labels": labels_of(inputs)}) < 1e-5
    assert model.generation_config is settings and settings.to_dict() == before
    assert [module.training for module in model.modules()] == training
    assert model.config.text_config._attn_implementation == "moda"
    embeddings = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    embeddings["modality_ids"] = (embeddings.pop("input_ids") == 60).int()
    del embeddings["pixel_values"]
    assert check_identity(model, embeddings) < 1e-5
    pairs = make_inputs("llava", padding="right")
    visible = torch.ones(12, 12, dtype=torch.bool).tril() & (pairs["attention_mask"] == 1)[:, None, None]
    assert check_identity(model, {**pairs, "attention_mask": visible}) < 1e-5


# Quantised and odd layers


class Packed(nn.Module):
    """A quantised linear layer of the kind of GPTQ, AWQ and HQQ: integers, scales, and nothing named weight."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scales", scale.half())
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales.to(x.dtype), self.bias)


class Float8(nn.Linear):
    """A linear layer of the kind of fine-grained float8: a scale in float32 beside each weight."""

    @classmethod
    def of(cls, linear):
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        weight = linear.weight.detach()
        scale = weight.abs().amax().float() / 448
        layer.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
        layer.weight = nn.Parameter((weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
        layer.bias = linear.bias
        return layer

    def forward(self, x):
        return nn.functional.linear(x, (self.weight.float() * self.weight_scale_inv).to(x.dtype), self.bias)


def quantized(model, kind):
    """The text stack's projections quantised, the rest as it is."""
    if kind == "dynamic":
        for layer in text_stack(model).layers:
            torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8, inplace=True)
        return model
    make = Packed if kind == "packed" else Float8.of
    for layer in text_stack(model).layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, make(child))
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", ("dynamic", "packed", "float8"))
@two_families
def test_quantised_layers_get_moda_in_the_dtype_they_compute_in(family, kind, dtype, tmp_path):
    if kind == "dynamic" and dtype != torch.float32:
        pytest.skip("dynamic quantisation computes in float32")
    model, inputs = quantized(make_model(family).to(dtype), kind), cast(make_inputs(family), dtype)
    apply_moda(model, MODAConfig(**{**TRAINED, "mask": {}}))
    assert {(p.dtype, p.device.type) for p in moda_parameters(model).values()} == {(dtype, "cpu")}
    check_identity(model, inputs)
    train_only_moda(model)
    if kind != "dynamic":  # which has no derivative
        model(**inputs, labels=labels_of(inputs), use_cache=False).loss.backward()
        assert any(p.grad.any() for p in moda_parameters(model).values())
    save_moda(randomize(model), tmp_path / "moda.safetensors")
    again = load_moda(quantized(make_model(family).to(dtype), kind), tmp_path / "moda.safetensors")
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))


def offload(model, way, folder):
    accelerate = pytest.importorskip("accelerate")
    if way == "cpu":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    if way == "disk":
        return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"), offload_buffers=True)
    names = {name: "disk" for name, _ in model.named_children()}  # a device map; lm_head stays
    names["lm_head"] = "cpu"
    return accelerate.dispatch_model(model, names, main_device="cpu", offload_dir=folder, force_hooks=True)


offloaded = pytest.mark.parametrize("way", ("cpu", "disk", "dispatch"))


@offloaded
@every_setting
def test_offloaded_models_compute_the_same(settings, way, tmp_path):
    model, inputs = make_trained("llava", **settings), make_inputs("llava")
    expected, tokens = logits_of(model, inputs), greedy_of(model, inputs)
    save_moda(model, tmp_path / "expected.safetensors")
    model = offload(model, way, tmp_path / "weights")
    assert all(p.is_meta for p in moda_parameters(model).values())
    for _ in range(2):
        assert torch.equal(logits_of(model, inputs), expected)
    assert torch.equal(greedy_of(model, inputs), tokens)
    records = []
    with torch.no_grad(), recording(model, records.append):
        model(**inputs, use_cache=False)
    assert len(records) == 2
    save_moda(model, tmp_path / "moda.safetensors")  # the values, not the place that they are not at
    assert torch.equal(logits_of(load_moda(make_model("llava"), tmp_path / "moda.safetensors"), inputs), expected)
    if moda_parameters(model):
        with pytest.raises(ValueError, match="is offloaded, or on the meta device"):
            load_moda(model, tmp_path / "moda.safetensors")


@offloaded
@two_families
def test_moda_in_an_offloaded_model_is_where_the_layer_computes(family, way, tmp_path):
    model, inputs = make_model(family), make_inputs(family)
    expected = logits_of(make_trained(family), inputs)
    model = apply_moda(offload(model, way, tmp_path / "weights"), MODAConfig(**TRAINED))
    assert attention_modules(model)[0].q_proj.weight.is_meta
    assert {p.device.type for p in moda_parameters(model).values()} == {"cpu"}
    assert torch.equal(logits_of(randomize(model), inputs), expected)


@every_setting
def test_checkpoints_load_with_a_device_map(settings, tmp_path):
    model, inputs = make_trained("llava", **settings), make_inputs("llava")
    model.save_pretrained(tmp_path / "model")
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "model.language_model": "disk"}
    loaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map={**places, "lm_head": "cpu"}, offload_folder=tmp_path / "offload"
    ).eval()
    assert all(p.is_meta for p in moda_parameters(loaded).values())
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
    for name, tensor in moda_state_dict(loaded).items():
        assert torch.equal(tensor, moda_state_dict(model)[name]), name


# What is switched off: averages and differences of whole models


OFF = {"default": MODAConfig(), "hidden": MODAConfig(mask={"prior": HIDDEN}), "fixed": MODAConfig.fixed_prior(HIDDEN)}
every_off = pytest.mark.parametrize("config", OFF.values(), ids=OFF)


@every_off
@two_families
def test_averaged_models_are_finite(family, config):
    """EMA over buffers too, and task vectors."""
    model, inputs = randomize(apply_moda(make_model(family), config)), make_inputs(family)
    swa = torch.optim.swa_utils
    average = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.5), use_buffers=True)
    others = [randomize(copy.deepcopy(model), seed) for seed in (4, 5)]
    for other in others:
        average.update_parameters(other)
    assert logits_of(average, inputs).isfinite().all()
    a, b = (other.state_dict() for other in others)
    model.load_state_dict({name: a[name] + 0.4 * (b[name] - a[name]) for name in a})
    assert logits_of(model, inputs).isfinite().all()
    assert torch.equal(logits_of(average.module, inputs), logits_of(average, inputs))


def as_before(model):
    """The state dict of a version that kept -inf in buffers."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in [name for name in state if name.endswith("_off")]:
        off = state.pop(name) > 0.5
        state[name.removesuffix("_off")].masked_fill_(off, -math.inf)
    for name in [name for name in state if name.endswith("mask.fixed_decay")]:
        base = name.replace("fixed_decay", "base")
        state.setdefault(base, torch.full_like(state[name], -math.inf))
    return state


@every_off
@pytest.mark.parametrize("way", ("load_state_dict", "from_pretrained", "load_moda_state_dict", "load_moda"))
def test_checkpoints_of_before_load(config, way, tmp_path):
    model, inputs = randomize(apply_moda(make_model("llava"), config)), make_inputs("llava")
    expected, old = logits_of(model, inputs), as_before(model)
    assert any(tensor.isinf().any() for tensor in old.values())
    loaded = apply_moda(make_model("llava"), config)
    moda = {
        name.split("language_model.")[1].replace(".self_attn", ""): t for name, t in old.items() if ".moda." in name
    }
    if way == "load_state_dict":
        loaded.load_state_dict(old)
    elif way == "load_moda_state_dict":
        load_moda_state_dict(loaded, moda)
    elif way == "load_moda":
        safetensors = pytest.importorskip("safetensors.torch")
        metadata = {"moda": json.dumps(config.to_dict())}  # with -Infinity in it
        safetensors.save_file(moda, tmp_path / "moda.safetensors", metadata)
        load_moda(loaded, tmp_path / "moda.safetensors")
        load_moda(make_model("llava"), tmp_path / "moda.safetensors")
    else:
        model.save_pretrained(tmp_path, state_dict=old)
        loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        loaded.eval()
    assert torch.equal(logits_of(loaded, inputs), expected)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(tensor.isfinite().all() for tensor in loaded.state_dict().values())


# Adapters


def lora(**settings):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(target_modules=r".*(language_model|text_model).*\.(q|v)_proj", r=2, **settings)


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


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


# Wrappers


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


def sharded_steps(rank, world, rendezvous, folder):
    """Of both kinds of FSDP: what is saved is whole, and what is loaded is what the model computes with."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
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
    dist.destroy_process_group()


def test_sharded_models_are_saved_whole(process_group, tmp_path):
    arguments = 2, str(tmp_path / "of two"), str(tmp_path)
    torch.multiprocessing.spawn(sharded_steps, arguments, nprocs=2)
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


# Trainer


def trainer_of(model, inputs, folder, steps, **settings):
    pytest.importorskip("accelerate")
    rows = [{key: value[i] for key, value in {**inputs, "labels": labels_of(inputs)}.items()} for i in range(2)]
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        lr_scheduler_type="constant",
        logging_steps=1,
        **settings,
    )
    optimizer = torch.optim.AdamW(optimizer_groups(model, lr=1e-2))
    return transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))


RESUMED = {
    "everything": lambda model: model,
    "only moda": lambda model: (train_only_moda(model), model)[1],
    "adapter": lambda model: pytest.importorskip("peft").get_peft_model(model, lora(modules_to_save=["moda"])),
    "adapter, only moda": lambda model: (
        model := pytest.importorskip("peft").get_peft_model(model, lora(modules_to_save=["moda"])),
        train_only_moda(model),
    )[0],
}


@pytest.mark.parametrize(
    ("family", "way"),
    [("llava", "everything"), ("gemma3", "everything"), *(("llava", way) for way in list(RESUMED)[1:])],
)
def test_a_trainer_that_resumes_goes_on_with_the_weights_of_the_checkpoint(family, way, tmp_path):
    """Four steps are two, and two more in another process with the weights from before the first."""
    inputs = make_inputs(family)

    def model():
        torch.manual_seed(7)
        return RESUMED[way](apply_moda(make_model(family), MODAConfig(**TRAINED)))

    whole = model()
    trainer_of(whole, inputs, tmp_path, steps=4).train()
    moved = {name for name, p in whole.named_parameters() if not torch.equal(p, model().state_dict()[name])}
    assert any(".moda." in name for name in moved)

    resumed = model()
    trainer_of(resumed, inputs, tmp_path, steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, whole.state_dict()[name]), name


def test_a_trainer_loads_its_best_checkpoint(tmp_path):
    inputs, model = make_inputs("llava"), apply_moda(make_model("llava"), MODAConfig(**TRAINED))
    trainer = trainer_of(model, inputs, tmp_path, steps=2)
    trainer.train()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    trainer._load_best_model()
    assert same(dict(model.state_dict()), expected)


@every_family
def test_what_save_pretrained_wrote_loads_as_a_state_dict(family, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = make_trained(family)
    model.save_pretrained(tmp_path)
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    loaded = apply_moda(make_model(family), MODAConfig(**TRAINED))
    for parameter in loaded.parameters():
        parameter.data.zero_()
    missing, unexpected = loaded.load_state_dict(saved, strict=False)
    assert not unexpected and missing in ([], ["lm_head.weight"])  # which is tied
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    wrapper = nn.ModuleDict({"inner": apply_moda(make_model(family), MODAConfig(**TRAINED))})
    wrapper.load_state_dict({f"inner.{name}": tensor for name, tensor in saved.items()}, strict=False)
    assert same(dict(wrapper.inner.state_dict()), dict(model.state_dict()))


def test_a_checkpoint_in_shards_loads_as_the_trainer_does(tmp_path):
    model, loaded = make_trained("llava"), apply_moda(make_model("llava"), MODAConfig(**TRAINED))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for parameter in loaded.parameters():
        parameter.data.zero_()
    transformers.trainer_utils.load_sharded_checkpoint(loaded, tmp_path, strict=False)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))


def test_weights_of_moda_that_would_be_lost_are_refused():
    state = make_trained("llava").state_dict()
    one = apply_moda(make_model("llava"), MODAConfig(layers=[1], **TRAINED))
    with pytest.raises(RuntimeError, match="weights of MODA that would be lost, .*layers.0.self_attn.moda.aligner.a1"):
        one.load_state_dict(state, strict=False)
    make_trained("llava").load_state_dict(make_model("llava").state_dict(), strict=False)  # nothing of MODA is lost


# Auto classes


@every_family
def test_auto_classes_load_what_they_load_of_the_plain_family(family, tmp_path):
    model, inputs = make_trained(family), make_inputs(family)
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole").eval()
    assert type(base).__name__ == type(model).__name__.replace("ForConditionalGeneration", "Model")
    with torch.no_grad():
        expected = model.base_model(**inputs).last_hidden_state
        assert torch.equal(base(**inputs).last_hidden_state, expected)
        plain = make_model(family).base_model(**inputs).last_hidden_state
        assert not torch.allclose(plain[inputs["attention_mask"] == 1], expected[inputs["attention_mask"] == 1])
        assert same(moda_state_dict(base), moda_state_dict(model))
        base.save_pretrained(tmp_path / "base")
        again = AutoModel.from_pretrained(tmp_path / "base").eval()
        assert torch.equal(again(**inputs).last_hidden_state, expected)
    assert pickle.loads(pickle.dumps(type(base))) is type(base)
    with pytest.raises(ValueError, match="has no logits"):
        check_identity(base, inputs)
    plain_config = type(make_model(family).config)
    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        auto = getattr(transformers, name)
        if auto._model_mapping.get(plain_config, None) is type(make_model(family)):
            assert torch.equal(
                logits_of(auto.from_pretrained(tmp_path / "whole").eval(), inputs), logits_of(model, inputs)
            )


def test_a_fixed_prior_is_there_in_the_base_model_too(tmp_path):
    model, inputs = apply_moda(make_model("llava"), MODAConfig.fixed_prior(HIDDEN)), make_inputs("llava")
    model.save_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)  # no Infinity, which is no JSON
    base = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


# Settings


def test_settings_become_plain_numbers_when_they_are_made(tmp_path):
    config = MODAConfig(
        modalities={"text": np.int64(0), "image": torch.tensor(1), "video": np.int32(1)},
        aligner={"rank": np.int16(4)},
        mask={
            "prior": torch.tensor([[0.0, -math.inf], [0.5, 0.0]], dtype=torch.bfloat16, requires_grad=True),
            "decay": np.array([0.5, 0.25, 0.5, 0.5]),
            "base": (torch.tensor(-1.0), np.float32(-math.inf), -2, np.float64(-3.0)),
            "length": np.int64(40),
            "learn_prior": np.bool_(True),
        },
        layers=np.arange(2),
    )
    assert config.mask["prior"] == [[0.0, -math.inf], [0.5, 0.0]] and config.layers == [0, 1]
    assert config.mask["base"] == [-1.0, -math.inf, -2, -3.0] and config.mask["decay"] == [0.5, 0.25, 0.5, 0.5]
    assert MODAConfig.from_dict(config.to_dict()) == config == MODAConfig.from_json(config.to_json())
    json.loads(config.to_json(), parse_constant=pytest.fail)

    model, inputs = randomize(apply_moda(make_model("llava"), config)), make_inputs("llava")
    model.save_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert MODAConfig.from_dict(loaded.config.text_config.moda) == config
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
    save_moda(model, tmp_path / "moda.safetensors")
    assert torch.equal(
        logits_of(load_moda(make_model("llava"), tmp_path / "moda.safetensors"), inputs), logits_of(model, inputs)
    )
    prior = np.array([[0.0, 0.5], [0.0, -np.inf]], dtype=np.float32)
    assert MODAConfig.fixed_prior(prior) == MODAConfig.fixed_prior(torch.from_numpy(prior))
    assert MODAConfig(mask={"base": -math.inf}) == MODAConfig()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mask": {"prior": [[0.0, math.nan], [0.0, 0.0]]}}, ValueError, r"mask.prior\[0\]\[1\] must be a finite"),
        ({"mask": {"prior": torch.full((2, 2), math.inf)}}, ValueError, r"mask.prior\[0\]\[0\] must be .* got inf"),
        ({"mask": {"decay": -math.inf}}, ValueError, "mask.decay must be a finite number, got -inf"),
        ({"mask": {"prior": [object()]}}, TypeError, r"mask.prior\[0\] must be a number, .* got object"),
        ({"mask": {"base": "-10"}}, TypeError, "mask.base must be a number"),
        ({"aligner": {"rank": 4j}}, TypeError, "aligner.rank must be a number, .* got complex"),
    ],
)
def test_settings_that_are_no_numbers_are_refused_when_they_are_made(settings, error, message):
    with pytest.raises(error, match="MODAConfig: " + message):
        MODAConfig(**settings)
