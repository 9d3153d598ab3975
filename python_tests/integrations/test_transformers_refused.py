"""What cannot work with MODA is refused with the reason."""

import contextlib
import copy
import warnings

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")
from tolerance import assert_close
from trained_models import PRIOR, logits_of, make_trained
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache
from transformers.cache_utils import Cache, DynamicIndexedLayer
from vision_language import FAMILIES, IMAGE, TEXT, make_config, make_inputs, make_model

from moda_ext.alignment import DuplexAligner
from moda_ext.integrations.transformers import FAMILIES as KNOWN
from moda_ext.integrations.transformers import (
    MODAConfig,
    apply_moda,
    attention_modules,
    load_moda,
    load_moda_state_dict,
    moda_state_dict,
    recording,
    save_moda,
    text_stack,
)
from moda_ext.integrations.transformers.cache import prepare_cache
from moda_ext.integrations.transformers.proof import TRAINED


def test_switching_the_attention_off_warns():
    model, inputs = make_trained("llava"), make_inputs("llava")
    expected = logits_of("llava", model, inputs)
    with pytest.warns(UserWarning, match="switches MODA off"):
        model.set_attn_implementation("sdpa")
    assert not torch.equal(logits_of("llava", model, inputs), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_attn_implementation({"text_config": "moda"})
    assert torch.equal(logits_of("llava", model, inputs), expected)
    model.set_attn_implementation("moda")  # the vision tower too: it computes what sdpa does
    assert_close(logits_of("llava", model, inputs), expected)


def test_families_that_are_unknown_are_refused_with_those_that_are_known():
    assert set(KNOWN) == set(FAMILIES)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TEXT))
    with pytest.raises(ValueError, match="unknown model family 'llama'; known are llava, llava_next, "):
        apply_moda(model)
    with pytest.raises(ValueError, match="model must be a LlavaForConditionalGeneration, got LlavaModel"):
        apply_moda(make_model("llava").model)
    with pytest.raises(ValueError, match="has MODA already"):
        apply_moda(apply_moda(make_model("llava")))


def test_sliding_window_layers_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"layers \[0\] cannot have MODA.*those are \[1, 2\]"):
        apply_moda(make_model("gemma3"), MODAConfig(layers=[0, 1]))
    config = copy.deepcopy(FAMILIES["llava_next"].config)
    config["text_config"]["sliding_window"] = 8
    monkeypatch.setattr(FAMILIES["llava_next"], "config", config)
    with pytest.raises(ValueError, match="set text_config.sliding_window=None"):
        apply_moda(make_model("llava_next"))


def test_tokens_without_a_modality_are_refused():
    model, inputs = make_trained("llava"), make_inputs("llava")
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="derives the modality of each token from input_ids"):
        model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
    with pytest.raises(ValueError, match="derives the modality of each token from input_ids"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=2)
    modality = (inputs["input_ids"] == IMAGE).int()
    result = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], modality_ids=modality)
    assert result.logits.isfinite().all()
    with pytest.raises(TypeError, match="call the text stack with keyword arguments"):
        text_stack(model)(inputs["input_ids"], inputs["attention_mask"])
    with pytest.raises(ValueError, match=r"modality_ids must have shape \(2, 12\), got \(2, 11\)"):
        model(inputs_embeds=embeddings, modality_ids=modality[:, 1:])
    plain = make_model("qwen2_vl")
    with pytest.raises(ValueError, match="modalities must say what 'video' is, which qwen2_vl has"):
        apply_moda(plain, MODAConfig(modalities={"text": 0, "image": 1}))
    assert type(plain) is type(make_model("qwen2_vl")) and not hasattr(plain.config.text_config, "moda")


class LayerWithoutKeys:
    """Of a cache, as Transformers' layers of linear attention are: no ``CacheLayerMixin``."""


def test_caches_that_cannot_work_are_refused():
    model, inputs = make_trained("llava"), make_inputs("llava")
    cache = DynamicCache()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        model.set_attn_implementation("sdpa")
        model(**inputs, past_key_values=cache)
        model.set_attn_implementation({"text_config": "moda"})
    step = {"input_ids": torch.tensor([[1], [2]]), "past_key_values": cache}
    with pytest.raises(ValueError, match="holds 12 tokens, but no modalities"):
        model(**step)
    with pytest.raises(NotImplementedError, match="cannot use a cache of DynamicIndexedLayer"):
        model(**inputs, past_key_values=Cache(layers=[DynamicIndexedLayer() for _ in range(2)]))
    with pytest.raises(NotImplementedError, match="cannot use a cache of LayerWithoutKeys"):
        prepare_cache(Cache(layers=[LayerWithoutKeys()]), 1)
    with pytest.raises(ValueError, match="attention_mask must cover the 12 tokens in the cache and the 1 new ones"):
        cache = model(**inputs).past_key_values
        model(input_ids=torch.tensor([[1], [2]]), attention_mask=torch.ones(2, 1), past_key_values=cache)
    with pytest.raises(NotImplementedError, match=r"an attention_mask of shape \(B, N\), or a boolean one"):
        model(**{**inputs, "attention_mask": torch.zeros(2, 1, 12, 12)})


def test_what_the_attention_function_cannot_do_is_refused():
    inputs, config = make_inputs("llava"), make_config("llava")
    config.text_config.moda = MODAConfig.fixed_prior(PRIOR).to_dict()
    with pytest.raises(RuntimeError, match="has settings .*, and nothing derives the modalities of the tokens"):
        AutoModel.from_config(config, attn_implementation="moda")(**inputs)
    model = make_trained("llava").train()
    for module in attention_modules(model):
        module.attention_dropout = 0.1
    with pytest.raises(NotImplementedError, match="no dropout, got 0.1"):
        model(**inputs)
    split = apply_moda(make_model("gemma3"), MODAConfig(mask={"softmax": "split"}))
    with pytest.raises(NotImplementedError, match="softmax='split' runs in layers with plain causal attention only"):
        split(**make_inputs("gemma3"))


def test_settings_that_do_not_go_together_are_refused():
    for modalities in ({"text": 0, "image": 2}, {"text": 1, "image": 0}, {"image": 0}):
        with pytest.raises(ValueError, match="must number the kinds of token from 0, which is 'text'"):
            MODAConfig(modalities=modalities)
    with pytest.raises(ValueError, match="aligner scope must be 'causal', got 'full'"):
        MODAConfig(aligner={"scope": "full"})
    with pytest.raises(ValueError, match="conditioned on the aligner's Gram"):
        MODAConfig(aligner=None)
    with pytest.raises(ValueError, match="mode must be one of"):
        MODAConfig(mode="sdpa")
    with pytest.raises(ValueError, match="'learned' needs a finite base"):
        MODAConfig(mask={"variant": "learned"})
    with pytest.raises(TypeError, match="ranks"):
        apply_moda(make_model("llava"), MODAConfig(aligner={"ranks": 4}))
    config = MODAConfig(**TRAINED)
    assert MODAConfig.from_dict(config.to_dict()) == config
    assert isinstance(attention_modules(make_trained("llava"))[0].moda.aligner, DuplexAligner)


def test_a_stack_that_keeps_its_own_attention_is_refused(monkeypatch):
    """Transformers only logs that it cannot switch a text stack whose source it does not recognise."""
    plain = make_model("llava")
    monkeypatch.setattr(type(text_stack(plain)), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(RuntimeError, match="keeps its 'sdpa' attention where 'moda' is asked for"):
        apply_moda(plain)
    assert type(plain) is type(make_model("llava")) and not text_stack(plain)._forward_pre_hooks  # nothing has changed
    assert not any(".moda." in name for name in plain.state_dict()) and not hasattr(plain.config.text_config, "moda")
    with (
        pytest.raises(RuntimeError, match="keeps its 'sdpa' attention"),
        recording(make_model("llava"), lambda record: None),
    ):
        pass


def test_a_mask_with_a_length_counts_the_tokens_of_one_sequence():
    """Of packed ones it would count those of the others: by their sum of pseudo scores a row would be wrong."""
    inputs = {**make_inputs("llava", padding=None), "use_cache": False}
    packed = {"input_ids": inputs["input_ids"].view(1, -1), "pixel_values": inputs["pixel_values"], "use_cache": False}
    packed["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).repeat(2)[None]
    for length in (None, 20):
        mask = {"variant": "fix", "base": 0.0, "decay": 0.05, "length": length}
        model = apply_moda(make_model("llava"), MODAConfig(aligner=None, mask=mask))
        if length is None:
            with torch.no_grad():
                assert_close(model(**packed).logits.view(2, -1, TEXT["vocab_size"]), model(**inputs).logits)
        else:
            with pytest.raises(
                NotImplementedError, match="a mask with a finite length cannot run under .* length=None"
            ):
                model(**packed)


def test_packed_sequences_with_a_cache_are_refused():
    """Transformers does not look for them there, and sdpa lets them see one another."""
    inputs = make_inputs("llava", padding=None)
    packed = {"input_ids": inputs["input_ids"].view(1, -1), "pixel_values": inputs["pixel_values"]}
    positions = torch.arange(inputs["input_ids"].shape[1])
    with pytest.raises(RuntimeError, match="position_ids start again"):
        make_trained("llava")(**packed, position_ids=positions.repeat(2)[None])
    make_trained("llava")(**packed, position_ids=torch.arange(2 * len(positions))[None])


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_mask_that_hides_what_an_earlier_pass_showed_is_refused(family):
    """Gemma 3 hands its text stack a mask for each kind of layer."""
    model, inputs = make_trained(family), make_inputs(family, rows=1, padding=None)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
        mask[:, :3] = 0
        with pytest.raises(RuntimeError, match="attention_mask hides tokens of the cache that an earlier pass showed"):
            model(input_ids=torch.tensor([[5]]), attention_mask=mask, past_key_values=cache)


def test_masks_of_each_head_are_refused():
    model, inputs = make_trained("llava"), make_inputs("llava", padding=None)
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(2, 4, length, length, dtype=torch.bool).tril()
    with pytest.raises(NotImplementedError, match=r"a boolean one of shape \(B, 1, Nq, Nk\), got \(2, 4, "):
        model(**{**inputs, "attention_mask": mask})
    shared = model(**{**inputs, "attention_mask": mask[:, :1]}, use_cache=False).logits
    assert_close(shared, model(**inputs, use_cache=False).logits)


def test_weights_with_pseudo_scores_are_refused_where_the_settings_have_none(tmp_path):
    """They would be on in this model, and off again once it is saved and loaded."""
    on = apply_moda(make_model("llava"), MODAConfig(mask={"base": -1.0, "learn_base": True}))
    off, inputs = apply_moda(make_model("llava")), make_inputs("llava")
    expected = logits_of("llava", off, inputs)
    with pytest.raises(ValueError, match="have a base of pseudo scores, which the model's settings switch off"):
        load_moda_state_dict(off, moda_state_dict(on))
    with pytest.raises(ValueError, match="have a base of pseudo scores, which the model's settings switch off"):
        off.load_state_dict(on.state_dict())
    assert torch.equal(logits_of("llava", off, inputs), expected)
    other = apply_moda(make_model("llava"), MODAConfig(aligner={"rank": 3}, mask={"prior": [[0.0, -torch.inf]] * 2}))
    with pytest.raises(ValueError, match="must have shape|lacks"):
        load_moda_state_dict(off, moda_state_dict(other))
    assert torch.equal(logits_of("llava", off, inputs), expected)  # nothing is copied, nor hidden
    assert not any(name.endswith("_off") for name in off.state_dict())


def test_settings_are_those_of_the_model_and_not_of_another_with_the_same_config(tmp_path):
    config = make_config("llava")
    models = [AutoModelForImageTextToText.from_config(config).eval() for _ in range(2)]
    for model, normalize in zip(models, ("frobenius", "trace"), strict=True):
        model.config = model.model.config = config
        model.model.language_model.config = config.text_config
        apply_moda(model, MODAConfig(aligner={"normalize": normalize}))
    save_moda(models[0], tmp_path / "moda.safetensors")
    loaded = load_moda(make_model("llava"), tmp_path / "moda.safetensors")
    assert attention_modules(loaded)[0].moda.aligner.normalize == "frobenius"
