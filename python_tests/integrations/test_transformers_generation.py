"""Generation with MODA equals full passes, with every cache and way of decoding."""

import copy
import functools

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")
from tolerance import assert_close
from trained_models import (
    CACHES,
    NEW,
    SPECIAL,
    SPLIT,
    check_generation,
    extended,
    family,
    logits_of,
    make_trained,
    one_row,
    two_passes,
)
from transformers import DynamicCache, StaticCache
from vision_language import FAMILIES, make_inputs

from moda_ext.integrations.transformers import text_stack

both_caches = pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)


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
