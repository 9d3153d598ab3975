"""MODA in models of every precision and place: 16 bits, quantised, float8, offloaded."""

import copy
import itertools
import math

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")
from moved_models import every_family, every_setting, logits_of, offload, two_families
from torch import nn
from trained_models import labels_of, make_trained, randomize
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.models.qwen2_vl import modeling_qwen2_vl
from vision_language import make_inputs, make_model

from moda_ext.integrations.transformers import (
    MODAConfig,
    apply_moda,
    attention_modules,
    check_identity,
    load_moda,
    moda_parameters,
    recording,
    save_moda,
    text_stack,
    train_only_moda,
)
from moda_ext.integrations.transformers.proof import TRAINED


def cast(inputs, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def greedy_of(model, inputs, tokens=4):
    options = {"max_new_tokens": tokens, "do_sample": False, "suppress_tokens": [60, 61, 62, 63]}
    return model.generate(**copy.deepcopy(inputs), **options)


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


def test_the_tolerance_of_an_identity_follows_what_eager_and_sdpa_differ_by(monkeypatch):
    """A model that moves by rounding alone is one on which eager attention moves the logits as far, whatever it is."""
    model, inputs = randomize(apply_moda(make_model("qwen2_vl"))), make_inputs("qwen2_vl")
    for name, parameter in moda_parameters(model).items():
        if not name.endswith("base"):
            parameter.data.mul_(1e-2)
    moved = check_identity(model, inputs, tolerance=math.inf)
    assert 1e-4 < moved < 0.1
    with pytest.raises(ValueError, match="more than 1e-05"):
        check_identity(model, inputs)

    eager = modeling_qwen2_vl.eager_attention_forward
    for factor, passes in ((1.0 + 1e-5, False), (1.5, True)):

        def scaled(*arguments, factor=factor, **options):
            output, weights = eager(*arguments, **options)
            return factor * output, weights

        monkeypatch.setattr(modeling_qwen2_vl, "eager_attention_forward", scaled)
        if passes:
            assert check_identity(model, inputs) == moved
        else:
            with pytest.raises(ValueError, match="it is trained"):
                check_identity(model, inputs)
        with pytest.raises(ValueError, match="it is trained"):
            check_identity(model, inputs, tolerance=moved / 2)


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
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("dynamic", torch.float32), *itertools.product(("packed", "float8"), (torch.float32, torch.bfloat16))],
    ids=str,
)
@two_families
def test_quantised_layers_get_moda_in_the_dtype_they_compute_in(family, kind, dtype, tmp_path):
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


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_autocast_reaches_no_sum_of_attention(family):
    """Gemma 3's images see all of themselves, by a mask and scores of all pairs: no product of theirs is rounded."""
    model, inputs, records = make_trained(family), make_inputs(family, padding=None), []
    for attention in attention_modules(model):
        if getattr(attention, "moda", None) is not None:
            attention.moda.mask = None  # no sink: the mass of a row is 1
    with torch.no_grad(), recording(model, records.append), torch.autocast("cpu", torch.bfloat16):
        model(**inputs, use_cache=False)
    assert len(records) > 1
    for record in records:
        assert record.mass.dtype == record.lse.dtype == torch.float32
        assert (record.mass.sum(dim=-1) - 1).abs().max() < 1e-5
