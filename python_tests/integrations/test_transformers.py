"""MODA in vision-language models of Transformers: tiny random models of every family.

A "trained" model has random MODA parameters of a size that moves the logits, a finite pseudo-score length and a finite
base, so that a cache that forgets anything gives other logits.
"""

import contextlib
import copy
import functools
import pickle
import warnings

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")

import transformers
from tolerance import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    StaticCache,
)
from transformers.cache_utils import Cache, DynamicIndexedLayer
from vision_language import END, FAMILIES, IMAGE, START, TEXT, VIDEO, make_config, make_inputs, make_model

from moda_ext.alignment import DuplexAligner
from moda_ext.integrations.transformers import FAMILIES as KNOWN
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
    optimizer_groups,
    recording,
    save_moda,
    text_stack,
    train_only_moda,
)
from moda_ext.integrations.transformers.cache import prepare_cache
from moda_ext.integrations.transformers.hooks import placeholder, token_modalities
from moda_ext.integrations.transformers.proof import TRAINED
from moda_ext.release import ReleaseAligner

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SPECIAL = [60, 61, 62, 63]
NEW = 6  # tokens that are generated
SPLIT = 9  # where a prompt is cut in two
PRIOR = [[0.0, 1.5], [0.0, 0.0]]  # text looks more at images
CACHES = {"dynamic": DynamicCache, "static": lambda: StaticCache(config=make_config("llava"), max_cache_len=32)}
both_caches = pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
family = pytest.mark.parametrize("family", FAMILIES)


def make_trained(name, **settings):
    model = apply_moda(make_model(name), MODAConfig(**{**TRAINED, **settings}))
    torch.manual_seed(3)
    for parameter_name, parameter in moda_parameters(model).items():
        if not parameter_name.endswith("base"):
            torch.nn.init.normal_(parameter, std=0.7)
    return model


def positions_of(name, mask):
    """Positions that leave padding out, as generate() counts them. The Qwen families make their own."""
    return {} if "qwen" in name else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
def logits_of(name, model, inputs, **arguments):
    arguments = {**inputs, **positions_of(name, inputs["attention_mask"]), **arguments}
    return model(**{"use_cache": False, **arguments}).logits


def labels_of(inputs):
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def one_row(name):
    return make_inputs(name, rows=1)


def extended(name, inputs, sequences):
    """The inputs of one forward pass over the prompt and what was generated."""
    mask = inputs["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(mask.shape[0], sequences.shape[1] - mask.shape[1])], dim=1)
    return {**inputs, "input_ids": sequences, "attention_mask": mask, **FAMILIES[name].extra(sequences)}


# Attaching


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


# Generation: every way gives the logits, or tokens, of a full forward pass


def check_generation(name, model, inputs, **options):
    result = model.generate(
        **copy.deepcopy(inputs),
        max_new_tokens=NEW,
        do_sample=False,
        suppress_tokens=SPECIAL,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    full = logits_of(name, model, extended(name, inputs, result.sequences))[:, -NEW - 1 : -1]
    assert torch.equal(full[..., :60].argmax(-1), result.sequences[:, -NEW:])
    if "assistant_model" not in options and "prompt_lookup_num_tokens" not in options:
        assert_close(torch.stack(result.logits, dim=1), full)
    return result


@family
@pytest.mark.parametrize("cache", ("dynamic", "static"))
@pytest.mark.parametrize("chunk", (None, 10), ids=("whole", "chunked"))  # 10: Gemma 3 must not cut an image
def test_generation_with_a_cache(family, cache, chunk):
    model = make_trained(family)
    options = {"prefill_chunk_size": chunk} if chunk else {}
    check_generation(family, model, make_inputs(family), cache_implementation=cache, **options)


@family
def test_beam_search(family):
    model, inputs = make_trained(family), make_inputs(family)
    options = {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False, "suppress_tokens": SPECIAL}
    expected = model.generate(**copy.deepcopy(inputs), **options, use_cache=False)
    for cache in ("dynamic", "static"):
        assert torch.equal(model.generate(**copy.deepcopy(inputs), **options, cache_implementation=cache), expected)


@family
@pytest.mark.parametrize("way", ("assisted", "lookup"))
def test_speculative_decoding(family, way):
    model, inputs = make_trained(family), one_row(family)
    options = {"prompt_lookup_num_tokens": 3}
    if way == "assisted":
        assistant = make_trained(family)
        with torch.no_grad():
            assistant.lm_head.weight.add_(0.02 * torch.randn_like(assistant.lm_head.weight))  # errs now and then
        options = {"assistant_model": assistant}
    check_generation(family, model, inputs, **options)


@family
@pytest.mark.parametrize("make_cache", (DynamicCache, functools.partial(StaticCache, max_cache_len=48)), ids=CACHES)
def test_a_cache_is_used_again_in_the_next_turn(family, make_cache):
    model, inputs = make_trained(family), make_inputs(family)
    cache = make_cache(config=model.config)
    first = check_generation(family, model, inputs, past_key_values=cache)
    answer = torch.cat([first.sequences, torch.tensor([[5, 9, 2]] * len(first.sequences))], dim=1)
    turn = extended(family, inputs, answer)
    without_images = {key: value for key, value in turn.items() if not key.startswith(("pixel", "image"))}
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": SPECIAL}
    again = model.generate(**copy.deepcopy(without_images), past_key_values=cache, **options)
    assert torch.equal(again, model.generate(**copy.deepcopy(turn), use_cache=False, **options))


def two_passes(name, model, inputs, cache, between=lambda cache: None, order=(0, 1)):
    """Logits of the tokens from ``SPLIT`` on, after the ones before went into ``cache`` in a pass of their own.

    The second pass has the rows in another order.
    """
    positions = positions_of(name, inputs["attention_mask"])
    first = {"input_ids": inputs["input_ids"][:, :SPLIT], "attention_mask": inputs["attention_mask"][:, :SPLIT]}
    second = {"input_ids": inputs["input_ids"][:, SPLIT:], "attention_mask": inputs["attention_mask"]}
    if positions:
        first["position_ids"], second["position_ids"] = positions["position_ids"].tensor_split([SPLIT], dim=1)
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        model(**first, **rest, past_key_values=cache)
        between(cache)
        return model(**{key: value[list(order)] for key, value in second.items()}, past_key_values=cache).logits


@both_caches
def test_chunked_prefill_equals_one_pass(make_cache):
    model, inputs = make_trained("llava"), make_inputs("llava")
    assert_close(two_passes("llava", model, inputs, make_cache()), logits_of("llava", model, inputs)[:, SPLIT:])


@pytest.mark.parametrize("drafts", (3, 80), ids=("within the window", "beyond the window"))
def test_cropped_tokens_are_forgotten(drafts):
    model, inputs = make_trained("llava"), make_inputs("llava")

    def draft_and_crop(cache):
        ids = torch.full((2, drafts), 7)
        mask = torch.cat([inputs["attention_mask"][:, :SPLIT], torch.ones_like(ids)], dim=1)
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        cache.crop(-drafts)
        assert (cache.layers[0].gram is None) == (drafts == 80)

    assert_close(
        two_passes("llava", model, inputs, DynamicCache(), between=draft_and_crop),
        logits_of("llava", model, inputs)[:, SPLIT:],
    )


def test_rows_of_a_cache_are_repeated_selected_and_reordered():
    model, inputs = make_trained("llava"), make_inputs("llava")

    def swap(cache):
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([False, True, True, False]))  # the rows 0 and 1
        cache.reorder_cache(torch.tensor([1, 0]))

    swapped = two_passes("llava", model, inputs, DynamicCache(), between=swap, order=(1, 0))
    assert_close(swapped, logits_of("llava", model, inputs)[[1, 0], SPLIT:])


@both_caches
def test_a_cache_that_is_reset_is_empty(make_cache):
    model, inputs, cache = make_trained("llava"), make_inputs("llava"), make_cache()
    check_generation("llava", model, inputs, past_key_values=cache)
    cache.reset()
    check_generation("llava", model, inputs, past_key_values=cache)


SETTINGS = {
    "added, frobenius": {"aligner": {"rank": 4, "fusion": "add", "normalize": "frobenius"}},
    "raw keys": {"aligner": {"rank": 4, "key_norm": None}},
    "split softmax": {"mask": {"softmax": "split", "base": -1.0}},
    "learned sink": {"mask": {"variant": "learned", "base": 0.0}},
    "learned decay": {"mask": {"learn_decay": True, "learn_base": True, "base": 0.0, "length": 40}},
    "no mask": {"mask": None},
    "no aligner": {"aligner": None, "mask": {"variant": "fix", "learn_prior": True, "base": -1.0}},
    "one layer": {"layers": [1]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("cache", ("dynamic", "static"))
def test_generation_with_other_settings(settings, cache):
    model = make_trained("llava", **settings)
    check_generation("llava", model, make_inputs("llava"), cache_implementation=cache)


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


# Saving and loading


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


# Recording and priors


@family
def test_recording_a_plain_model_equals_its_eager_attention(family):
    model, inputs, records = make_model(family), make_inputs(family), []
    before = logits_of(family, model, inputs)
    with recording(model, records.append):
        measured = logits_of(family, model, inputs)
    assert torch.equal(logits_of(family, model, inputs), before)  # all as it was
    kept = inputs["attention_mask"] == 1
    assert (measured - before)[kept].abs().max() < 1e-5

    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        positions = positions_of(family, inputs["attention_mask"])
        attentions = model(**inputs, **positions, output_attentions=True, use_cache=False).attentions
    assert [record.layer for record in records] == list(range(len(attentions)))
    ids = (inputs["input_ids"] == IMAGE).int().masked_fill(~kept, -1)
    for record, attention in zip(records, attentions, strict=True):
        assert torch.equal(record.query_modality, ids) and torch.equal(record.key_modality, ids)
        rows = kept[:, None].expand(record.mass.shape[:3])
        expected = torch.stack([(attention * (ids == m)[:, None, None]).sum(-1) for m in (0, 1)], dim=-1)
        assert_close(record.mass[rows], expected[rows])
        assert_close(record.weights()[rows], attention[rows])
        assert torch.equal(record.weights(2, 7), record.weights()[:, :, 2:7])
        seen = torch.stack([((attention[:, 0] > 0) & (ids == m)[:, None]).sum(-1) for m in (0, 1)], dim=-1)
        assert torch.equal(record.key_counts()[kept], seen[kept])


@pytest.mark.parametrize("name", ("llava", "gemma3"))
def test_recording_a_model_with_moda(name):
    model, inputs, records = make_trained(name), make_inputs(name), []
    with recording(model, records.append), pytest.raises(ValueError, match="being recorded already"):
        recording(model, records.append).__enter__()
    before = logits_of(name, model, inputs)
    with recording(model, records.append):
        recorded = logits_of(name, model, inputs)
    assert_close(recorded[inputs["attention_mask"] == 1], before[inputs["attention_mask"] == 1])
    rows = (inputs["attention_mask"] == 1)[:, None].expand(records[-1].mass.shape[:3])
    for record in records:
        mass = torch.stack(
            [(record.weights() * (record.key_modality == m)[:, None, None]).sum(-1) for m in (0, 1)], dim=-1
        )
        assert_close(mass[rows], record.mass[rows])
        assert record.mass.sum(-1)[rows].max() < 1 + 1e-6
    assert records[-1].query.dim() == 5 and records[-1].bias is not None


def test_recording_while_decoding_with_a_static_cache():
    model, inputs, records = make_model("llava"), make_inputs("llava"), []
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    with recording(model, records.append):
        model.generate(**inputs, **options)
    for record in records:
        assert_close(record.mass.sum(-1)[0], torch.ones_like(record.mass.sum(-1)[0]))
    assert int(records[-1].key_counts()[0].sum()) == inputs["input_ids"].shape[1] + 2


def test_recording_sliding_windows_while_decoding():
    model, inputs, records = make_model("gemma3"), make_inputs("gemma3"), []
    options = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": SPECIAL}
    with recording(model, records.append):
        measured = model.generate(**copy.deepcopy(inputs), **options)
    assert torch.equal(measured, model.generate(**copy.deepcopy(inputs), **options))
    for record in records:
        assert_close(record.mass.sum(-1)[0], torch.ones_like(record.mass.sum(-1)[0]))
    last = records[-3]  # the window of the last step: 8 of the tokens, none of them of the image
    assert last.layer == 0 and last.key_counts()[0].tolist() == [[8, 0]]
    with recording(model, records.append), pytest.raises(NotImplementedError, match="static sliding-window cache"):
        model.generate(**inputs, **options, cache_implementation="static")


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


# Training


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


# Compilation


# Gemma 3 is not among them: Transformers' static sliding-window layers count in Python, so that it recompiles without
# MODA too.
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma3"])
def test_decoding_with_a_static_cache_is_one_graph(family):
    model, inputs = make_trained(family), make_inputs(family)
    rows, length = inputs["input_ids"].shape
    full_mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)

    @torch.no_grad()
    def decode(compiled):
        cache = StaticCache(config=model.config, max_cache_len=length + NEW)
        stack, forward = text_stack(model), text_stack(model).forward
        model(**inputs, past_key_values=cache)
        if compiled:
            stack.forward = torch.compile(forward, fullgraph=True, backend="eager")
        logits = []
        for step in range(NEW):
            stance = "fail_on_recompile" if compiled and step else "default"
            mask = full_mask * (torch.arange(length + NEW) <= length + step)
            positions = mask.sum(1, keepdim=True) - 1
            if "qwen" in family:
                positions = (positions + model.model.rope_deltas).expand(3, -1, -1)
            arguments = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            with torch.compiler.set_stance(stance):
                logits.append(model(input_ids=torch.full((rows, 1), 5 + step), **arguments).logits)
        stack.forward = forward
        return torch.stack(logits)

    expected = decode(compiled=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert_close(decode(compiled=True), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


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


# FSDP


def fsdp_step(rank, world, rendezvous, result):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
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
    dist.destroy_process_group()


def test_a_step_on_two_fsdp_processes_equals_one_process(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch.distributed has no gloo")
    model, inputs = make_trained("llava").train(), make_inputs("llava", padding=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs, labels=labels_of(inputs), use_cache=False).loss.backward()
    optimizer.step()
    arguments = 2, str(tmp_path / "rendezvous"), str(tmp_path / "state")
    torch.multiprocessing.spawn(fsdp_step, arguments, nprocs=2)
    state = torch.load(tmp_path / "state")
    untrained = make_trained("llava").state_dict()
    for name, tensor in model.state_dict().items():
        assert_close(state[name], tensor)
    assert any(not torch.equal(untrained[name], state[name]) for name in state if ".moda.aligner" in name)


# The authors' release


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


# Errors and warnings


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
