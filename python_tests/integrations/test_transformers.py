"""MODA in vision-language models of Transformers: what attaching changes, how it is saved, which tokens it sees."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")
from tolerance import assert_close
from trained_models import (
    NEW,
    PRIOR,
    SPECIAL,
    check_generation,
    extended,
    family,
    labels_of,
    logits_of,
    make_trained,
    one_row,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from vision_language import END, FAMILIES, IMAGE, START, TEXT, VIDEO, make_config, make_inputs, make_model

from moda_ext.integrations.transformers import (
    MODAConfig,
    apply_moda,
    attention_modules,
    check_identity,
    load_moda,
    load_moda_state_dict,
    load_release,
    moda_parameters,
    moda_state_dict,
    recording,
    save_moda,
    text_stack,
)
from moda_ext.integrations.transformers.hooks import placeholder, token_modalities
from moda_ext.integrations.transformers.proof import TRAINED
from moda_ext.release import ReleaseAligner


@family
def test_attaching_changes_nothing(family):
    model, inputs = make_model(family), make_inputs(family)
    before = logits_of(family, model, inputs)
    assert apply_moda(model) is model
    kept = inputs["attention_mask"] == 1
    assert (logits_of(family, model, inputs) - before)[kept].abs().max() < 1e-5
    assert 0 < check_identity(model, inputs) < 1e-5  # 0 would mean that MODA did not run
    assert len(moda_parameters(model)) >= 2 * 6  # two layers with a1, b1, a2, b2, prior and condition


@family
def test_training_reaches_every_parameter_and_moves_the_logits(family):
    model, inputs = make_trained(family), make_inputs(family)
    with pytest.raises(ValueError, match="MODA moves this model's logits by"):
        check_identity(model, inputs)
    model(**inputs, labels=labels_of(inputs), use_cache=False).loss.backward()
    for name, parameter in moda_parameters(model).items():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@family
def test_later_tokens_change_nothing_before_them(family):
    model, inputs = make_trained(family), make_inputs(family)
    before = logits_of(family, model, inputs)
    ids = inputs["input_ids"].clone()
    ids[:, -2:] = (ids[:, -2:] + 7) % 50 + 1
    after = logits_of(family, model, {**inputs, "input_ids": ids})
    assert torch.equal(before[:, :-2], after[:, :-2])
    assert not torch.equal(before[:, -2:], after[:, -2:])


@family
def test_padding_changes_nothing(family):
    model = make_trained(family)
    left, right = (make_inputs(family, padding=side) for side in ("left", "right"))
    results = [logits_of(family, model, inputs)[inputs["attention_mask"] == 1] for inputs in (left, right)]
    assert_close(*results)


@pytest.mark.parametrize("layers", (None, [0]), ids=("all", "the first"))
def test_dense_attention_equals_the_operator(layers):
    """For masks of a model's own, here the causal one: the same logits and gradients as without it."""
    model, inputs = make_trained("llava", layers=layers), make_inputs("llava", padding="right")
    mask = inputs["attention_mask"].bool()
    visible = torch.ones(12, 12, dtype=torch.bool).tril() & mask[:, None, None]
    results = []
    for attention_mask in (mask.long(), visible):
        model.zero_grad()
        output = model(**{**inputs, "attention_mask": attention_mask}, labels=labels_of(inputs), use_cache=False)
        output.loss.backward()
        results.append([output.logits[mask], *(p.grad for p in moda_parameters(model).values())])
    for dense, operator in zip(*results, strict=True):
        assert_close(dense, operator)


@family
def test_save_and_load_through_the_auto_classes(family, tmp_path):
    prior = [[0.0, float("-inf")], [0.5, 0.0]]
    model = make_trained(family, mask={"variant": "fix", "prior": prior, "base": None})
    inputs = make_inputs(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert torch.equal(logits_of(family, loaded, inputs), logits_of(family, model, inputs))
    assert loaded.state_dict().keys() == model.state_dict().keys()


@family
def test_a_checkpoint_without_moda_loads_into_a_moda_class(family, tmp_path, poisoned_memory):
    plain, inputs = make_model(family), make_inputs(family)
    moda_class = type(apply_moda(make_model(family)))
    plain.save_pretrained(tmp_path)
    loaded = moda_class.from_pretrained(tmp_path).eval()
    kept = inputs["attention_mask"] == 1
    assert (logits_of(family, loaded, inputs) - logits_of(family, plain, inputs))[kept].abs().max() < 1e-5
    for name, parameter in moda_parameters(loaded).items():
        assert parameter.any() == name.endswith((".a1", ".a2")), name  # A random, all else 0


def test_moda_alone_in_one_file(tmp_path):
    model, inputs, path = make_trained("llava"), make_inputs("llava"), tmp_path / "moda.safetensors"
    save_moda(model, path)
    assert path.stat().st_size < 20_000
    plain = make_model("llava")
    assert load_moda(plain, path) is plain
    assert torch.equal(logits_of("llava", plain, inputs), logits_of("llava", model, inputs))
    with pytest.raises(ValueError, match="the model's settings are"):
        load_moda(apply_moda(make_model("llava")), path)
    state = moda_state_dict(model)
    assert all(name.startswith(("layers.0.moda.", "layers.1.moda.")) for name in state)
    del state["layers.1.moda.aligner.a1"]
    with pytest.raises(ValueError, match=r"lacks \['layers.1.moda.aligner.a1'\]"):
        load_moda_state_dict(plain, state)
    with pytest.raises(ValueError, match="no MODA parameters"):
        save_moda(make_model("llava"), path)
    plain.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="was not written by save_moda"):
        load_moda(make_model("llava"), tmp_path / "whole" / "model.safetensors")


def test_a_model_is_copied_and_pickled_with_moda():
    model, inputs = make_trained("llava"), make_inputs("llava")
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = logits_of("llava", model, inputs)
    for twin in twins:
        assert torch.equal(logits_of("llava", twin, inputs), expected)


def test_a_fixed_prior_moves_mass_without_parameters():
    plain, inputs, records = make_model("llava"), make_inputs("llava"), []
    with recording(plain, records.append):
        logits_of("llava", plain, inputs)
    model = apply_moda(make_model("llava"), MODAConfig.fixed_prior([[0.0, 1.5], [0.0, 0.0]]))
    assert not moda_parameters(model)
    with recording(model, records.append):
        logits_of("llava", model, inputs)
    before, after = records[0].mass, records[2].mass  # the first layer sees the same input
    text = (records[0].query_modality == 0)[:, None].expand(before.shape[:3])
    raised = before * torch.tensor([0.0, 1.5]).exp()
    assert_close(after[text], (raised / raised.sum(-1, keepdim=True))[text])
    image = (records[0].query_modality == 1)[:, None].expand(before.shape[:3])
    assert_close(after[image], before[image])


@family
def test_the_attention_moda_without_settings_is_sdpa_that_can_be_measured(family, tmp_path):
    """By ``attn_implementation`` of a plain class, in the vision tower too, and by ``set_attn_implementation``."""
    plain, inputs, records = make_model(family), make_inputs(family), []
    plain.save_pretrained(tmp_path)
    expected = logits_of(family, plain, inputs)
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": SPECIAL}
    caches = ("dynamic", "static")
    tokens = [plain.generate(**copy.deepcopy(inputs), **options, cache_implementation=cache) for cache in caches]
    for loaded in (
        type(plain).from_pretrained(tmp_path, attn_implementation="moda"),
        AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation={"text_config": "moda"}),
    ):
        assert type(loaded) is type(plain) and loaded.config.text_config._attn_implementation == "moda"
        assert torch.equal(logits_of(family, loaded, inputs), expected)
        for cache, answer in zip(caches, tokens, strict=True):
            again = loaded.generate(**copy.deepcopy(inputs), **options, cache_implementation=cache)
            assert torch.equal(again, answer)
        records.clear()
        with recording(loaded, records.append):
            measured = logits_of(family, loaded, inputs)
        assert_close(measured[inputs["attention_mask"] == 1], expected[inputs["attention_mask"] == 1])
        assert len(records) == loaded.config.text_config.num_hidden_layers
        assert torch.equal(logits_of(family, loaded, inputs), expected)  # all as it was
    plain.set_attn_implementation("moda")
    assert plain.config.vision_config._attn_implementation == "moda"
    assert torch.equal(logits_of(family, plain, inputs), expected)
    plain(**inputs, labels=labels_of(inputs), use_cache=False).loss.backward()
    assert attention_modules(plain)[0].q_proj.weight.grad.any()


def test_a_text_model_alone_runs_the_attention_moda_as_sdpa():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TEXT)).eval()
    ids = torch.arange(1, 10).view(1, -1)
    expected = model(ids).logits
    model.set_attn_implementation("moda")
    assert torch.equal(model(ids).logits, expected)


@family
def test_a_prior_in_the_config_needs_the_attentions_name_only(family, tmp_path):
    plain, inputs = make_model(family), make_inputs(family)
    plain.save_pretrained(tmp_path / "plain")
    config = AutoConfig.from_pretrained(tmp_path / "plain")
    config.text_config.moda = MODAConfig.fixed_prior(PRIOR).to_dict()
    options = {"config": config, "attn_implementation": "moda", "output_loading_info": True}
    model, loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain", **options)
    assert not loaded["missing_keys"]  # the prior is not reported as if it were an untrained weight
    assert type(model) is type(apply_moda(make_model(family), MODAConfig.fixed_prior(PRIOR)))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    expected = logits_of(family, apply_moda(make_model(family), MODAConfig.fixed_prior(PRIOR)), inputs)
    assert torch.equal(logits_of(family, model, inputs), expected)
    assert (expected - logits_of(family, plain, inputs))[inputs["attention_mask"] == 1].abs().max() > 1e-3
    check_generation(family, model.eval(), inputs)

    model.save_pretrained(tmp_path / "prior")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "prior", attn_implementation="moda")
    assert torch.equal(logits_of(family, again, inputs), expected)

    later = type(plain).from_pretrained(tmp_path / "plain", config=config)  # sdpa, as long as nobody says "moda"
    assert torch.equal(logits_of(family, later, inputs), logits_of(family, plain, inputs))
    later.set_attn_implementation({"text_config": "moda"})
    assert torch.equal(logits_of(family, later, inputs), expected)


def test_settings_in_the_config_are_the_default():
    model = make_model("llava")
    model.config.text_config.moda = MODAConfig(**TRAINED).to_dict()
    apply_moda(model)
    assert MODAConfig.from_dict(model.config.text_config.moda) == MODAConfig(**TRAINED)
    assert attention_modules(model)[0].moda.aligner.a1.shape[-1] == 4


def test_a_model_with_moda_that_is_loaded_for_sdpa_says_that_moda_is_off(tmp_path):
    model, inputs = make_trained("llava"), make_inputs("llava")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="switches MODA off"):
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert_close(logits_of("llava", loaded, inputs), logits_of("llava", make_model("llava"), inputs))
    loaded.set_attn_implementation({"text_config": "moda"})
    assert torch.equal(logits_of("llava", loaded, inputs), logits_of("llava", model, inputs))


@pytest.mark.parametrize("name", ("llava", "gemma3"))
def test_plain_settings_equal_sdpa(name):
    model, inputs = apply_moda(make_model(name), MODAConfig.plain()), make_inputs(name)
    assert not any(".moda." in key for key in model.state_dict())
    assert check_identity(model, inputs) < 1e-5
    check_generation(name, model, inputs)


def test_packed_sequences():
    """Several sequences in one row: with a prior as if apart, and refused where a Gram would mix them."""
    config = MODAConfig(aligner=None, mask={"variant": "fix", "prior": [[0.0, 1.5], [0.0, 0.0]], "base": -1.0})
    model, inputs = apply_moda(make_model("llava"), config), make_inputs("llava", padding=None)
    rows, length = inputs["input_ids"].shape
    packed = {"input_ids": inputs["input_ids"].view(1, -1), "pixel_values": inputs["pixel_values"]}
    packed["position_ids"] = torch.arange(length).repeat(rows)[None]
    with torch.no_grad():
        result = model(**packed, use_cache=False).logits.view(rows, length, -1)
    assert_close(result, logits_of("llava", model, inputs))
    with pytest.raises(NotImplementedError, match="packed sequences, where position_ids start again"):
        make_trained("llava")(**packed, use_cache=False)


VIDEOS = {  # of two frames: the tokens, and what the model gets
    "llava_onevision": ([VIDEO] * 3, {"pixel_values_videos": (1, 2, 3, 8, 8)}),  # one token a frame, and a new line
    "qwen2_vl": ([START, *[VIDEO] * 4, END], {"pixel_values_videos": (16, 24), "video_grid_thw": [[1, 4, 4]]}),
    "qwen2_5_vl": ([START, *[VIDEO] * 4, END], {"pixel_values_videos": (16, 24), "video_grid_thw": [[1, 4, 4]]}),
    "qwen3_vl": ([START, *[VIDEO] * 4, END], {"pixel_values_videos": (16, 24), "video_grid_thw": [[1, 4, 4]]}),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_a_modality_of_their_own(name):
    """In the families that have video tokens. InternVL and SmolVLM see a video's frames as images."""
    config = make_config(name)
    assert placeholder(config, "video") == VIDEO
    model = apply_moda(make_model(name), MODAConfig(modalities={"text": 0, "image": 1, "video": 2}))
    inputs, records = one_row(name), []
    tokens, video = VIDEOS[name]
    video = {key: torch.randn(value) if type(value) is tuple else torch.tensor(value) for key, value in video.items()}
    ids = torch.cat([inputs["input_ids"], torch.tensor([[*tokens, 4]])], dim=1)
    with recording(model, records.append):
        logits_of(name, model, {**extended(name, inputs, ids), **video})
    expected = torch.where(ids == IMAGE, 1, torch.where(ids == VIDEO, 2, 0))
    assert torch.equal(records[0].query_modality, expected.int()) and (expected == 2).sum() >= 3
    assert records[0].mass.shape[-1] == 3


def test_audio_tokens_are_a_modality_where_a_family_has_them():
    """None of the families has, yet; the rule is that of images and videos."""
    assert all(placeholder(make_config(name), "audio") is None for name in FAMILIES)
    config = make_config("llava")
    config.audio_token_id = 59
    assert token_modalities(config, {"text": 0, "image": 1, "audio": 2}) == {IMAGE: 1, 59: 2}
    with pytest.raises(ValueError, match="modalities must say what 'audio' is, which llava has"):
        token_modalities(config, {"text": 0, "image": 1})


TEXT_STACKS = {
    "llama": {},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
}


@pytest.mark.parametrize("stack", TEXT_STACKS)
def test_text_stacks(stack, monkeypatch):
    """Yi is a Llama."""
    config = {**FAMILIES["llava"].config, "text_config": {"model_type": stack, **TEXT, **TEXT_STACKS[stack]}}
    monkeypatch.setattr(FAMILIES["llava"], "config", config)
    assert 0 < check_identity(apply_moda(make_model("llava")), make_inputs("llava")) < 1e-5
    check_generation("llava", make_trained("llava"), make_inputs("llava"))


def test_release_checkpoint_is_converted():
    source = make_model("llava")
    head_dim = attention_modules(source)[0].head_dim
    aligners = {layer: ReleaseAligner(head_dim) for layer in range(2)}
    checkpoint = {f"model.{name}": tensor for name, tensor in text_stack(source).state_dict().items()}
    checkpoint |= {
        "lm_head.weight": source.lm_head.weight.detach().clone(),
        "model.mm_projector.0.weight": torch.ones(2),
    }
    for layer, aligner in aligners.items():
        torch.nn.init.normal_(aligner.ratio_v)
        prefix = f"model.layers.{layer}.self_attn."
        checkpoint |= {prefix + name: tensor for name, tensor in aligner.state_dict().items()}
        checkpoint[prefix + "pnorm.weight"] = torch.ones(head_dim)

    target = make_model("llava")
    for parameter in [*text_stack(target).parameters(), target.lm_head.weight]:
        parameter.data.zero_()
    assert load_release(target, checkpoint) == ["model.mm_projector.0.weight"]
    inputs, records = one_row("llava"), []
    with recording(target, records.append):
        assert logits_of("llava", target, inputs).isfinite().all()
    with recording(source, records.append):
        logits_of("llava", source, inputs)
    released, plain = records[0], records[2]  # the first layer sees the same keys, and aligns the image's
    text = released.key_modality[0] == 0
    assert torch.equal(released.key[:, :, text], plain.key[:, :, text])
    assert not torch.allclose(released.key[:, :, ~text], plain.key[:, :, ~text])
    with pytest.raises(ValueError, match="lacks weights of the language model: embed_tokens.weight"):
        load_release(make_model("llava"), {k: v for k, v in checkpoint.items() if k != "model.embed_tokens.weight"})
    with pytest.raises(ValueError, match="lacks lm_head.weight, and the model's head is not tied"):
        load_release(make_model("llava"), {k: v for k, v in checkpoint.items() if k != "lm_head.weight"})
    tied = make_model("llava")
    tied.lm_head.weight = tied.get_input_embeddings().weight
    before = tied.lm_head.weight.detach().clone()
    with pytest.raises(ValueError, match="an lm_head.weight of its own, and the model's head is tied"):
        load_release(tied, checkpoint)
    assert torch.equal(tied.lm_head.weight, before)
    load_release(tied, {**checkpoint, "lm_head.weight": checkpoint["model.embed_tokens.weight"]})
