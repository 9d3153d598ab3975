"""A Transformers that works otherwise than those that were tested: right, or an error; never another token."""

import contextlib
import functools
import inspect
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")

import transformers
from tolerance import assert_close
from trained_models import CACHES, SPLIT, check_generation, family, logits_of, make_trained, two_passes
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import Cache, StaticLayer
from vision_language import make_inputs, make_model

import moda_ext
from moda_ext.integrations.transformers import (
    MODAConfig,
    apply_moda,
    attention_modules,
    recording,
    text_stack,
    versions,
)
from moda_ext.integrations.transformers import models as models_module
from moda_ext.integrations.transformers.attention import moda_attention, moda_mask
from moda_ext.integrations.transformers.cache import _refusing_unknown_methods
from moda_ext.integrations.transformers.hooks import cache_argument

FUTURE = "5.99.0"
NOT_SEEN = "keys came and the cache holds 0 tokens, .*premises do not hold.*was tested with transformers 5"


def call_stack_otherwise(monkeypatch, model, change, forward):
    """``change`` the arguments on their way to the text stack of a model's class, and take them by ``forward``."""
    stack_class = type(text_stack(model))
    original = stack_class.forward
    monkeypatch.setattr(stack_class, "__call__", lambda self, *a, **k: nn.Module.__call__(self, *a, **change(k)))
    monkeypatch.setattr(stack_class, "forward", forward(original))


def rename_the_cache(monkeypatch, model, annotation=Cache | None):
    """A Transformers in which text stacks take their cache as ``memory``."""
    old = cache_argument(type(text_stack(model)))

    def change(arguments):
        return {"memory" if name == old else name: value for name, value in arguments.items()}

    def forward(original):
        def renamed(self, *args, memory=None, **kwargs):
            return original(self, *args, **{old: memory}, **kwargs)

        parameters = [
            p.replace(name="memory", annotation=annotation) if p.name == old else p
            for p in inspect.signature(original).parameters.values()
        ]
        renamed.__signature__ = inspect.Signature(parameters)
        return renamed

    call_stack_otherwise(monkeypatch, model, change, forward)


def hide_the_cache(monkeypatch, model):
    """A Transformers in which the cache reaches the layers on a way of its own, past every argument."""
    old, hidden = cache_argument(type(text_stack(model))), []

    def change(arguments):
        hidden.append(arguments.get(old))
        return {name: value for name, value in arguments.items() if name != old}

    def forward(original):
        @functools.wraps(original)
        def hiding(self, *args, **kwargs):
            return original(self, *args, **{**kwargs, old: hidden[-1]})

        return hiding

    call_stack_otherwise(monkeypatch, model, change, forward)


@pytest.fixture
def future(monkeypatch):
    """The installed Transformers says that it came after the tested ones, and nothing is proven yet."""
    monkeypatch.setattr(versions, "found", lambda: FUTURE)
    monkeypatch.setattr(models_module, "_PROVEN", set())


# The cache argument


@family
@pytest.mark.parametrize("annotation", (Cache | None, "Cache | None", inspect.Parameter.empty), ids=str)
def test_a_renamed_cache_argument_gives_the_same_tokens(family, annotation, monkeypatch):
    model = make_trained(family)
    rename_the_cache(monkeypatch, model, annotation)
    check_generation(family, model, make_inputs(family), cache_implementation="dynamic")
    check_generation(family, make_trained(family), make_inputs(family), cache_implementation="static")


def test_a_cache_is_made_under_the_name_of_the_signature(monkeypatch):
    inputs = make_inputs("llava")
    rename_the_cache(monkeypatch, make_model("llava"))
    model = make_trained("llava")
    cache = text_stack(model)(input_ids=inputs["input_ids"], use_cache=True)
    assert next(value for value in cache.values() if isinstance(value, Cache)).get_seq_length() == 12


def test_a_cache_that_cannot_be_named_is_an_error(monkeypatch):
    rename_the_cache(monkeypatch, make_model("llava"), annotation=inspect.Parameter.empty)
    model, inputs = make_trained("llava"), make_inputs("llava")
    with pytest.raises(RuntimeError, match=r"which argument of LlamaModel.forward takes a cache \(transformers 5"):
        model(**inputs, use_cache=True)
    assert model(**inputs, use_cache=False).logits.isfinite().all()


@family
def test_a_cache_that_is_not_seen_is_an_error(family, monkeypatch):
    model = make_trained(family)
    hide_the_cache(monkeypatch, model)
    with pytest.raises(RuntimeError, match=NOT_SEEN):
        model.generate(**make_inputs(family), max_new_tokens=3, do_sample=False)
    plain = make_model(family)
    with recording(plain, lambda record: None), pytest.raises(RuntimeError, match=NOT_SEEN):
        plain.generate(**make_inputs(family), max_new_tokens=3, do_sample=False)


def test_two_caches_are_refused():
    model, inputs = make_trained("llava"), make_inputs("llava")
    with pytest.raises(NotImplementedError, match="got several caches"):
        text_stack(model)(input_ids=inputs["input_ids"], past_key_values=DynamicCache(), cache=DynamicCache())


# What the attention function sees of its premises


def test_keys_that_are_not_those_of_the_cache_are_an_error():
    model, inputs = make_trained("llava"), make_inputs("llava")
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        layer = cache.layers[1]

        def forget(*_):  # a token, in the middle of a pass
            layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]

        handle = attention_modules(model)[1].register_forward_pre_hook(forget)
        step = {"input_ids": torch.tensor([[1], [2]]), "past_key_values": cache}
        with pytest.raises(RuntimeError, match="12 keys came and the cache holds 12 tokens, where 12 came before"):
            model(**step)
        handle.remove()
        with pytest.raises(RuntimeError, match="the layers of the cache hold different numbers of tokens"):
            model(**step)


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
def test_a_pass_that_failed_is_not_repeated_with_its_cache(make_cache):
    model, inputs, cache = make_trained("llava"), make_inputs("llava"), make_cache()

    def fail(*_):
        raise KeyError("no memory")

    with torch.no_grad():
        handle = attention_modules(model)[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            model(**inputs, past_key_values=cache)
        handle.remove()
        mask = torch.cat([inputs["attention_mask"]] * 2, dim=1)
        with pytest.raises(RuntimeError, match="an earlier pass with it failed in the middle"):
            model(**{**inputs, "attention_mask": mask}, past_key_values=cache)


def test_compiled_packed_sequences_are_refused_as_in_eager_mode():
    stack, inputs = text_stack(make_trained("llava")), make_inputs("llava", padding=None)
    packed = torch.tensor([[*range(7), *range(5)]] * 2)
    compiled = torch.compile(stack, fullgraph=True, backend="eager")
    for run in (stack, compiled):
        with torch.no_grad(), pytest.raises((NotImplementedError, RuntimeError), match="hides earlier tokens"):
            run(input_ids=inputs["input_ids"], position_ids=packed, use_cache=False)


def test_placeholder_tokens_do_not_change_after_attaching():
    model, inputs = make_trained("llava"), make_inputs("llava")
    model.config.image_token_id = 59
    with pytest.raises(RuntimeError, match=r"placeholder tokens in the model's config are \[59\], and were \[60\]"):
        model(**inputs)


def test_the_release_aligns_a_prompt_in_one_piece():
    config = MODAConfig(aligner=None, mask=None, mode="release")
    model, inputs = apply_moda(make_model("llava"), config), make_inputs("llava", padding=None)
    for module in attention_modules(model):
        for parameter in module.moda.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    cache = CACHES["static"]()
    with torch.no_grad():
        first = model(**inputs, past_key_values=cache).logits
        cache.reset()
        assert_close(model(**inputs, past_key_values=cache).logits, first)
        with pytest.raises(NotImplementedError, match="aligns a prompt as a whole"):
            two_passes("llava", model, inputs, DynamicCache())


def test_a_gram_of_other_tokens_is_an_error():
    model, inputs = make_trained("llava"), make_inputs("llava")
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        for layer in cache.layers:  # as a method would that nobody has told of the Gram
            layer.keys, layer.values = layer.keys[:, :, :-2], layer.values[:, :, :-2]
        with pytest.raises(RuntimeError, match="the Gram of the cache is over 12 tokens, and 10 came before this pass"):
            model(input_ids=torch.tensor([[1], [2]]), past_key_values=cache)


def test_a_mask_that_is_not_seen_is_an_error(monkeypatch):
    model, masks = make_trained("llava"), []

    def change(arguments):
        masks.append(arguments.pop("attention_mask"))
        return arguments

    def forward(original):
        return lambda self, *args, **kwargs: original(self, *args, attention_mask=masks[-1], **kwargs)

    call_stack_otherwise(monkeypatch, model, change, forward)
    with pytest.raises(RuntimeError, match="a mask of padding came to the attention that did not come to"):
        model(**make_inputs("llava"), use_cache=False)


@pytest.mark.parametrize("name", ("position_bias", "s_aux", "softcap", "block_table"))
def test_options_of_attention_that_would_be_ignored_are_refused(name):
    stack, inputs = text_stack(make_trained("llava")), make_inputs("llava")
    with pytest.raises(NotImplementedError, match=f"attention 'moda' has no {name}"):
        stack(input_ids=inputs["input_ids"], **{name: torch.ones(())})


def test_a_layer_that_is_not_causal_is_refused():
    model, inputs = make_trained("llava"), make_inputs("llava")
    attention_modules(model)[0].is_causal = False
    with pytest.raises(NotImplementedError, match="is causal, and this layer is not"):
        model(**inputs)


def test_arguments_of_the_mask_function_have_no_defaults():
    with pytest.raises(TypeError, match="mask_function"):
        moda_mask(batch_size=1, q_length=2, kv_length=2, kv_offset=0, attention_mask=None, config=None, mask=None)


def test_the_context_must_be_of_this_pass():
    model, inputs = make_trained("llava"), make_inputs("llava")
    contexts = []
    for module in attention_modules(model):
        module.register_forward_pre_hook(lambda m, a, k: contexts.append(k["modality_context"]), with_kwargs=True)
    with torch.no_grad():
        model(**inputs, use_cache=False)
    query, key = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    with pytest.raises(RuntimeError, match=r"modalities came for \(2, 12\) tokens, queries for \(2, 5\)"):
        moda_attention(attention_modules(model)[0], query, key, key, None, modality_context=contexts[0])


# Caches


def test_continuous_batching_is_refused():
    """Not served yet: its first request had wrong tokens."""
    options = {"generation_config": GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1)}
    model = apply_moda(make_model("llava"), MODAConfig.fixed_prior([[0.0, 0.5], [0.0, 0.0]]))
    with pytest.raises(NotImplementedError, match="no continuous batching"):
        model.generate_batch(inputs=[[5, 6, 7], [3, 4]], **options)
    plain = make_model("llava")
    with recording(plain, lambda record: None):
        results = plain.generate_batch(inputs=[[5, 6, 7], [3, 4]], **options)
    assert all("cannot use a cache of PagedAttentionCache" in result.error for result in results.values())


@pytest.mark.parametrize("drafts", (1, 4))
@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
def test_tokens_taken_back_leave_nothing_behind(make_cache, drafts):
    """In a static cache too, which can be cropped since Transformers 5.24."""
    if not hasattr(StaticLayer, "crop") and isinstance(make_cache(), StaticCache):
        pytest.skip("this Transformers crops no static cache")
    model, inputs = make_trained("llava"), make_inputs("llava")

    def draft_and_crop(cache):
        ids = torch.full((2, drafts), 60)
        mask = torch.cat([inputs["attention_mask"][:, :SPLIT], torch.ones_like(ids)], dim=1)
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        cache.crop(-drafts)

    result = two_passes("llava", model, inputs, make_cache(), between=draft_and_crop)
    assert_close(result, logits_of("llava", model, inputs)[:, SPLIT:])
    cache = make_cache()

    def draft_and_crop_and_step(cache):
        draft_and_crop(cache)
        model(
            input_ids=torch.full((2, 1), 60),
            attention_mask=inputs["attention_mask"][:, : SPLIT + 1],
            past_key_values=cache,
        )
        cache.crop(-1)

    result = two_passes("llava", model, inputs, cache, between=draft_and_crop_and_step)
    assert_close(result, logits_of("llava", model, inputs)[:, SPLIT:])


def test_methods_that_a_later_cache_may_have_are_refused():
    layer_class = type("FutureLayer", (), {"rotate": lambda self: None, "get_seq_length": lambda self: 3})
    layer_class.__module__ = "transformers.cache_utils"
    layer = _refusing_unknown_methods(type("Ours", (layer_class,), {"append": lambda self: 1}))()
    with pytest.raises(NotImplementedError, match=r"does not know what rotate\(\) does to the tokens of a cache"):
        layer.rotate()
    assert layer.get_seq_length() == 3 and layer.append() == 1


# The proof under a release that nobody has tested


def test_a_tested_release_needs_no_proof(monkeypatch):
    monkeypatch.setattr(models_module, "prove", lambda *args: pytest.fail("proven"))
    apply_moda(make_model("llava"))


@family
def test_every_family_proves_itself_once(family, future, monkeypatch):
    proofs, prove = [], models_module.prove
    monkeypatch.setattr(models_module, "prove", lambda name, *args: (proofs.append(name), prove(name, *args)))
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    model = apply_moda(make_model(family))
    with recording(model, lambda record: None):
        pass
    assert proofs == [family] and torch.get_num_threads() == threads
    assert not torch.equal(state, torch.get_rng_state())  # the model is random; the proof leaves the generator alone
    torch.manual_seed(5)
    monkeypatch.setattr(models_module, "_PROVEN", set())
    models_module._prove(family)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("use", ("apply_moda", "recording"))
def test_a_release_that_does_not_hold_is_refused_with_both_versions(use, future, monkeypatch):
    model, before = make_model("llava"), type(make_model("llava"))
    hide_the_cache(monkeypatch, model)
    message = rf"does not work with this Transformers: on a tiny llava model, .*transformers {FUTURE}; moda_ext .*5\.23"
    for _ in range(2):  # nor the second time
        with pytest.raises(RuntimeError, match=message):
            if use == "apply_moda":
                apply_moda(model)
            else:
                recording(model, lambda record: None).__enter__()
    assert type(model) is before and not hasattr(model.config.text_config, "moda")


def test_a_release_that_renames_the_cache_holds(future, monkeypatch):
    rename_the_cache(monkeypatch, make_model("llava"))
    check_generation("llava", make_trained("llava"), make_inputs("llava"))


def test_info_tells_the_tested_range():
    info = moda_ext.info()
    assert info["transformers"] == transformers.__version__ and info["transformers_tested"].startswith(">=5.23,<")


# What an import does


def run(code):
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_an_import_changes_no_class_of_transformers():
    result = run(
        """
        import transformers
        from moda_ext.integrations.transformers import FAMILIES, MODAConfig, apply_moda
        classes = [getattr(transformers, f"{prefix}ForConditionalGeneration") for prefix in FAMILIES.values()]
        def ours():
            return [c.__name__ for c in classes if "moda_ext" in c.__init__.__code__.co_filename]
        MODAConfig()
        print(ours())
        MODAConfig().to_dict()  # settings for a config, which the models made of it are to apply
        print(len(ours()))
        """
    )
    assert result.split() == ["[]", "10"]


def test_a_family_that_is_not_there_costs_itself_only():
    result = run(
        """
        import transformers
        lazy = type(transformers)
        find = lazy.__getattr__
        def without_smolvlm(self, name):
            if name.startswith("SmolVLM"):
                raise AttributeError(f"module transformers has no attribute {name}")
            return find(self, name)
        lazy.__getattr__ = without_smolvlm
        from moda_ext.integrations.transformers import MODAConfig, apply_moda
        from moda_ext.integrations.transformers.proof import TINY
        config = transformers.AutoConfig.for_model("llava", **TINY["llava"])
        model = transformers.LlavaForConditionalGeneration(config)
        print(type(apply_moda(model)).__name__)
        model = transformers.LlavaForConditionalGeneration(config)
        model.config.model_type = "smolvlm"
        try:
            apply_moda(model)
        except ValueError as error:
            print(error)
        """
    )
    assert result.startswith("LlavaMODAForConditionalGeneration\n")
    assert "'smolvlm' is not in this Transformers (transformers 5" in result


def test_gradients_go_through_a_cache():
    """Two passes with one cache have the gradients of one pass, through the Gram too."""
    inputs, gradients = make_inputs("llava", padding=None), []
    first, second = inputs["input_ids"].tensor_split([SPLIT], dim=1)
    for passes in (1, 2):
        model = make_trained("llava")
        if passes == 1:
            logits = model(**inputs, use_cache=False).logits[:, SPLIT:]
        else:
            cache = DynamicCache()
            model(input_ids=first, pixel_values=inputs["pixel_values"], past_key_values=cache)
            logits = model(input_ids=second, past_key_values=cache).logits
        logits.square().mean().backward()
        layer = attention_modules(model)[0]
        gradients.append([layer.k_proj.weight.grad, layer.moda.aligner.a2.grad])
    for whole, cut in zip(*gradients, strict=True):
        assert_close(cut, whole, units=512)


def test_ids_of_a_pass_that_failed_are_not_seen():
    model, inputs = make_trained("llava"), make_inputs("llava", padding=None)
    cache, first, rest = CACHES["static"](), *inputs["input_ids"].tensor_split([SPLIT], dim=1)

    def fail(*_):
        raise KeyError("no memory")

    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits[:, SPLIT : SPLIT + 1]
        model(input_ids=first, pixel_values=inputs["pixel_values"], past_key_values=cache)
        handle = text_stack(model).layers[0].register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            model(input_ids=torch.full((2, 6), 5), past_key_values=cache)
        handle.remove()
        assert_close(model(input_ids=rest[:, :1], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("measured", (False, True), ids=("moda", "plain, measured"))
@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
def test_a_mask_that_changes_for_the_past_is_an_error(make_cache, measured):
    model = (make_model if measured else make_trained)("llava")
    inputs, cache = make_inputs("llava", padding=None), make_cache()
    with torch.no_grad(), recording(model, lambda record: None) if measured else contextlib.nullcontext():
        model(**inputs, past_key_values=cache)
        mask = torch.ones(2, 13, dtype=torch.long)
        mask[:, 2:4] = 0
        with pytest.raises(RuntimeError, match="attention_mask hides tokens of the cache that an earlier pass showed"):
            model(input_ids=torch.tensor([[1], [2]]), attention_mask=mask, past_key_values=cache)


def test_modality_ids_are_integers():
    model, inputs = make_trained("llava"), make_inputs("llava")
    with pytest.raises(TypeError, match="modality_ids must be integers, got torch.float32"):
        model(**inputs, modality_ids=torch.zeros(2, 12))


def test_a_static_cache_notices_tokens_that_were_not_recorded():
    model, inputs, cache = make_model("llava"), make_inputs("llava", padding=None), CACHES["static"]()
    step = {"input_ids": torch.tensor([[1], [2]]), "past_key_values": cache}
    with torch.no_grad():
        with recording(model, lambda record: None):
            model(**inputs, past_key_values=cache)
        model(**step)
        with recording(model, lambda record: None), pytest.raises(RuntimeError, match="filled while MODA was off"):
            model(**step)
