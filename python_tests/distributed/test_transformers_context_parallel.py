"""Whole models under context parallelism, on ranks that are threads: equal to one process, or refused."""

import copy

import pytest
import torch
import torch.distributed as dist
from rank_threads import run_threads
from torch.distributed.device_mesh import DeviceMesh

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from vision_language import FAMILIES, make_inputs, make_model  # noqa: E402

from moda_ext.integrations.transformers import (  # noqa: E402
    MODAConfig,
    apply_moda,
    context_parallel,
    recording,
    text_stack,
)

NINE = [family for family in FAMILIES if family != "gemma3"]  # which has sliding windows
WHOLE = {"base": -2.0, "learn_base": True, "learn_decay": True, "length": 64}  # every parameter of a mask


def mesh_of_all() -> DeviceMesh:
    return DeviceMesh("cpu", list(range(dist.get_world_size())))


def make(family: str, config: MODAConfig | None) -> torch.nn.Module:
    model = make_model(family)
    if config is not None:
        apply_moda(model, config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".moda." in name:  # away from the start, so that each of them matters
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.train().double()


def inputs_for(family: str, world: int, padding: str = "left") -> dict:
    """Inputs with images, padding and labels whose length can be cut."""
    for text in range(5, 40):
        inputs = make_inputs(family, padding=padding, text=text)
        if inputs["input_ids"].shape[1] % (2 * world) == 0:
            break
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def hold_to_one_process(model, inputs: dict, world: int, **options) -> None:
    model.zero_grad()
    whole = model(**inputs, use_cache=False)
    whole.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def rank() -> None:
        own = copy.deepcopy(model)
        own.zero_grad()
        with context_parallel(own, mesh_of_all(), **options) as shards:
            result = own(**inputs)
            result.loss.backward()
        shown = shards.shard(inputs["attention_mask"], 1) != 0
        logits = shards.shard(whole.logits, 1)
        assert result.logits.shape == logits.shape
        assert_close("logits", result.logits[shown], logits[shown])
        loss = result.loss.detach().clone()
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / world, whole.loss, rtol=1e-6, atol=0)  # which is made in float32
        found = {name: p.grad for name, p in own.named_parameters()}
        for name, gradient in expected.items():
            total = torch.zeros_like(gradient) if found[name] is None else found[name].clone()
            dist.all_reduce(total)
            assert_close(name, total / world, gradient)

    run_threads(rank, world)


def assert_close(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    assert error <= 2e-7, f"{name} differs by {error:.1e}"  # the loss is made in float32, the rest in float64


@pytest.mark.parametrize("family", NINE)
def test_a_model_equals_one_process(family):
    hold_to_one_process(make(family, MODAConfig(mask=WHOLE)), inputs_for(family, 4), 4)


@pytest.mark.parametrize("family", ("llava", "qwen3_vl"))
@pytest.mark.parametrize("padding", ("left", "right"))
def test_a_plain_model_equals_one_process(family, padding):
    model, inputs = make(family, None), inputs_for(family, 2, padding)
    hold_to_one_process(model, inputs, 2)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert getattr(model.config.text_config, "moda", None) is None


@pytest.mark.parametrize("options", ({"scheme": "allgather"}, {"scheme": "ulysses"}, {"zigzag": False}), ids=str)
def test_schemes_and_layouts(options):
    hold_to_one_process(make("llava", MODAConfig(mask=WHOLE)), inputs_for("llava", 2), 2, **options)


def test_split_softmax_and_layers_without_moda():
    config = MODAConfig(layers=[1], mask={**WHOLE, "softmax": "split"})
    hold_to_one_process(make("llava", config), inputs_for("llava", 2), 2)


def test_gradient_checkpointing():
    model = make("llava", MODAConfig(mask=WHOLE))
    model.gradient_checkpointing_enable()
    hold_to_one_process(model, inputs_for("llava", 2), 2)


def test_the_number_of_items_of_a_larger_batch():
    """As Trainer accumulates: the sum over the ranks is the loss."""
    model, inputs = make("llava", None), inputs_for("llava", 2)
    whole = model(**inputs, num_items_in_batch=torch.tensor(50)).loss

    def rank() -> None:
        own = copy.deepcopy(model)
        with context_parallel(own, mesh_of_all()):
            loss = own(**inputs, num_items_in_batch=torch.tensor(50)).loss.detach().clone()
        dist.all_reduce(loss)
        torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)

    run_threads(rank, 2)


def test_afterwards_the_model_is_as_before():
    model, inputs = make("llava", MODAConfig(mask=WHOLE)), inputs_for("llava", 2)
    before = model(**inputs).logits

    def rank() -> None:
        own = copy.deepcopy(model)
        with pytest.raises(KeyError), context_parallel(own, mesh_of_all()):
            raise KeyError
        assert torch.equal(own(**inputs).logits, before)
        assert own.generate(input_ids=torch.ones(1, 4).long(), max_new_tokens=2).shape == (1, 6)

    run_threads(rank, 2)


def refused(error, message: str, call, family: str = "llava", config: MODAConfig | None = None) -> None:
    model, inputs = make(family, config), inputs_for(family, 2)

    def rank() -> None:
        own = copy.deepcopy(model)
        with pytest.raises(error, match=f"^context_parallel: {message}"), context_parallel(own, mesh_of_all()):
            call(own, dict(inputs))

    run_threads(rank, 2)


def test_ranks_with_different_batches_are_told_everywhere():
    def call(model, inputs):
        inputs["input_ids"] = inputs["input_ids"].clone()
        inputs["input_ids"][0, 0] += dist.get_rank()
        model(**inputs)

    def see(model, inputs):
        inputs["pixel_values"] = inputs["pixel_values"] + 1e-3 * dist.get_rank()  # such as a crop by chance
        model(**inputs)

    for given in (call, see):
        refused(ValueError, "the ranks of a sequence were given different batches", given)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_position_embeddings_that_depend_on_the_length_are_refused(kind):
    """A rank has its own positions alone, and so would have frequencies of its own."""
    model = make("llava", None)
    text_stack(model).rotary_emb.rope_type = kind

    def rank() -> None:
        with (
            pytest.raises(ValueError, match=f"position embeddings of type '{kind}'"),
            context_parallel(copy.deepcopy(model), mesh_of_all()),
        ):
            pass

    run_threads(rank, 2)


def test_lengths_that_cannot_be_cut():
    def call(model, inputs):
        ids = torch.ones(1, 7).long()
        model(input_ids=ids, attention_mask=torch.ones_like(ids))

    refused(ValueError, "the sequence must have .* multiple of 4 .* pad with 1 tokens", call)


def test_generation_and_caches():
    refused(NotImplementedError, r"generate\(\) needs every token", lambda model, inputs: model.generate(**inputs))
    cache = {"past_key_values": transformers.DynamicCache()}
    refused(NotImplementedError, "a cache is for decoding", lambda model, inputs: model(**inputs, **cache))


def test_packed_sequences():
    def call(model, inputs):
        ids = torch.ones(1, 8).long()
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))

    refused(NotImplementedError, "position_ids describe packed sequences", call)


def test_masks_of_pairs():
    def call(model, inputs):
        length = inputs["input_ids"].shape[1]
        inputs["attention_mask"] = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
        model(**inputs)

    refused(NotImplementedError, "attention_mask must have shape .B, N.", call)


def test_logits_to_keep():
    refused(NotImplementedError, "logits_to_keep", lambda model, inputs: model(**inputs, logits_to_keep=1))


def test_recording():
    def call(model, inputs):
        with recording(model, print):
            model(**inputs)

    refused(NotImplementedError, "a rank sees a part of the rows", call, config=MODAConfig())


def test_a_context_in_a_context():
    def call(model, inputs):
        with context_parallel(model, mesh_of_all()):
            pass

    refused(ValueError, "this model is in a context already", call)


def test_release_mode():
    message = "mode='release' aligns a prompt as a whole"
    refused(NotImplementedError, message, lambda model, inputs: model(**inputs), config=MODAConfig(mode="release"))


def test_sliding_windows():
    model = make_model("gemma3")

    def rank() -> None:
        context = context_parallel(copy.deepcopy(model), mesh_of_all())
        with pytest.raises(ValueError, match="^context_parallel: layers .* have a sliding window"), context:
            pass

    run_threads(rank, 2)
