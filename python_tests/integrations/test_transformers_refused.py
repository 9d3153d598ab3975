"""What cannot work with MODA is refused with the reason."""

import contextlib
import copy
import warnings

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")
from tolerance import assert_close
from trained_models import PRIOR, logits_of, make_trained
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import Cache, DynamicIndexedLayer
from vision_language import FAMILIES, IMAGE, TEXT, make_config, make_inputs, make_model

from moda_ext.alignment import DuplexAligner
from moda_ext.integrations.transformers import FAMILIES as KNOWN
from moda_ext.integrations.transformers import MODAConfig, apply_moda, attention_modules, text_stack
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
    with pytest.raises(ValueError, match="must name 'text' and number the modalities from 0"):
        MODAConfig(modalities={"text": 0, "image": 2})
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
