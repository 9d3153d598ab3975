"""What cuts tokens or heads over processes unseen by MODA is an error in every process, never a wrong result."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from moda_ext.attention import ModularDuplexAttention

transformers = pytest.importorskip("transformers", minversion="5.23", reason="moda_ext[transformers] is missing")
from trained_models import make_trained  # noqa: E402  transformers is checked first
from transformers.distributed import DistributedConfig  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from vision_language import make_inputs, make_model  # noqa: E402

from moda_ext.integrations.transformers import (  # noqa: E402
    MODAConfig,
    apply_moda,
    attention_modules,
    moda_state_dict,
    recording,
)

SETTINGS = {
    "aligner and mask": MODAConfig(),
    "aligner alone": MODAConfig(mask=None),
    "fixed prior": MODAConfig.fixed_prior([[0.0, 0.5], [0.0, 0.0]]),
}
PROJECTIONS = {
    "q_proj": ColwiseParallel(),
    "k_proj": ColwiseParallel(),
    "v_proj": ColwiseParallel(),
    "o_proj": RowwiseParallel(),
}
INSTEAD = r"Use moda_ext\.integrations\.transformers\.context_parallel\(model, mesh\)"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("models") / "llava")
    make_model("llava").save_pretrained(path)
    return path


# Heads


def check_heads_of_a_layer():
    mesh = init_device_mesh("cpu", (2,))
    for options in (
        {},
        {"mask": False},
        {"aligner": False, "mask": {"variant": "fix"}},
        {"aligner": False, "mask": False},
    ):
        layer = parallelize_module(ModularDuplexAttention(32, 4, 2, **options), mesh, PROJECTIONS)
        with pytest.raises(RuntimeError, match=r"projections made 2 query heads.*split_heads\(model, mesh"):
            layer(torch.randn(1, 5, 32), torch.tensor([[0, 1, 1, 0, 0]]))


def test_heads_of_a_layer_that_are_split_unseen_are_refused(two_ranks):
    two_ranks.run(check_heads_of_a_layer)


def check_heads_of_a_model():
    mesh = init_device_mesh("cpu", (2,))
    for settings in SETTINGS.values():
        model = apply_moda(make_model("llava"), settings)
        for attention in attention_modules(model):
            parallelize_module(attention, mesh, PROJECTIONS)
        with pytest.raises(RuntimeError, match=r"MODA: the projections made 2 query heads.*split_heads\(model, mesh\)"):
            model(**make_inputs("llava"))


def test_heads_of_a_model_that_are_split_unseen_are_refused(two_ranks):
    two_ranks.run(check_heads_of_a_model)


# Tokens


@contextlib.contextmanager
def torch_cuts_tokens(ids):
    """As a user has it; the sequence is cut in place."""
    with context_parallel(init_device_mesh("cpu", (dist.get_world_size(),)), buffers=[ids], buffer_seq_dims=[1]):
        yield


def check_tokens_under_torch():
    layer, x, ids = ModularDuplexAttention(32, 4, 2), torch.randn(1, 8, 32), torch.zeros(1, 8, dtype=torch.int32)
    with torch_cuts_tokens(ids), pytest.raises(NotImplementedError, match="Use moda_ext.distributed.context_parallel_"):
        layer(x[:, :4], ids)
    for settings in SETTINGS.values():
        model, inputs = apply_moda(make_model("llava"), settings), make_inputs("llava", padding=None)
        with torch_cuts_tokens(inputs["input_ids"]), pytest.raises(NotImplementedError, match=INSTEAD):
            model(input_ids=inputs["input_ids"], use_cache=False)
        with torch_cuts_tokens(inputs["input_ids"]), pytest.raises(NotImplementedError, match=INSTEAD):
            model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], use_cache=False)  # no rank waits
        inputs = make_inputs("llava", padding=None)
        assert model(**inputs).logits.isfinite().all()  # it is off again
    plain, inputs = make_model("llava"), make_inputs("llava", padding=None)
    with (
        torch_cuts_tokens(inputs["input_ids"]),
        recording(plain, print),
        pytest.raises(NotImplementedError, match=INSTEAD),
    ):
        plain(input_ids=inputs["input_ids"], use_cache=False)


def test_torch_context_parallelism_is_refused(two_ranks):
    two_ranks.run(check_tokens_under_torch)


def test_torch_context_parallelism_by_handlers_is_refused():
    """What torch.distributed.tensor.experimental.context_parallel does besides, for modules that are wrapped."""
    from torch.distributed.tensor import experimental

    torch_cp = getattr(experimental, "_context_parallel", None)
    if not hasattr(torch_cp, "_enable_context_parallel_dispatcher"):
        pytest.skip("this torch has no such switch")
    layer, x = ModularDuplexAttention(32, 4, 2), torch.randn(1, 4, 32)
    torch_cp._enable_context_parallel_dispatcher()
    try:
        with pytest.raises(NotImplementedError, match="torch's context_parallel is on"):
            layer(x, torch.zeros(1, 4, dtype=torch.int32))
    finally:
        torch_cp._disable_context_parallel_dispatcher()
    assert layer(x, torch.zeros(1, 4, dtype=torch.int32)).isfinite().all()


def test_compiled_models_refuse_torch_context_parallelism():
    import torch.nn.functional as F

    def changed(*args, **kwargs):
        raise AssertionError("MODA runs no scaled_dot_product_attention")

    changed.__module__ = context_parallel.__module__
    layer = torch.compile(ModularDuplexAttention(32, 4, 2), backend="eager")
    x, modality = torch.randn(1, 4, 32), torch.zeros(1, 4, dtype=torch.int32)
    layer(x, modality)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(NotImplementedError, match="context_parallel is on"):
        patch.setattr(F, "scaled_dot_product_attention", changed)
        layer(x, modality)


@pytest.mark.parametrize("sizes", [{"cp_size": 2}, {"sp_size": 2}], ids=["cp", "sp"])
def test_accelerate_is_refused(sizes, monkeypatch):
    state = pytest.importorskip("accelerate.state")
    from accelerate.parallelism_config import ParallelismConfig

    model, inputs = make_trained("llava"), make_inputs("llava")
    monkeypatch.setitem(state.AcceleratorState._shared_state, "parallelism_config", ParallelismConfig())
    assert model(**inputs).logits.isfinite().all()
    monkeypatch.setitem(state.AcceleratorState._shared_state, "parallelism_config", ParallelismConfig(**sizes))
    with pytest.raises(NotImplementedError, match=rf"Accelerate's .*{next(iter(sizes))} > 1.*{INSTEAD}"):
        model(**inputs)
    with pytest.raises(NotImplementedError, match="Accelerate's"):
        model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize("core", ["sdpa", "moda"])
def test_deepspeed_is_refused(core, monkeypatch):
    """DeepSpeed puts a function of its own in the place of one that Transformers has."""

    def uattn_wrapper(module, *args, **kwargs):
        return before(module, *args, **kwargs)

    before = ALL_ATTENTION_FUNCTIONS[core]
    uattn_wrapper.__module__ = "deepspeed.runtime.sequence_parallel.ulysses_sp"
    model, inputs = make_trained("llava"), make_inputs("llava")
    expected = model(**inputs).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, core, uattn_wrapper)
    with pytest.raises(NotImplementedError, match=f"DeepSpeed's sequence parallelism.*{INSTEAD}"):
        model(**inputs)
    monkeypatch.undo()
    assert torch.equal(model(**inputs).logits, expected)


# Sharded weights


def check_new_parameters_of_a_sharded_model(path):
    """Rank by rank the seeds differ; the sharded parameters are those of one rank."""
    config = transformers.AutoConfig.from_pretrained(path)
    config.text_config.moda = MODAConfig(mask={"base": -1.0}).to_dict()
    torch.manual_seed(dist.get_rank())
    sharded = transformers.AutoModelForImageTextToText.from_pretrained(
        path, config=config, attn_implementation="moda", distributed_config=DistributedConfig(fsdp_size=2)
    )
    state = moda_state_dict(sharded)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert state["layers.0.moda.aligner.a1"].std() > 0.1 and not state["layers.0.moda.aligner.b1"].any()
    whole = transformers.AutoModelForImageTextToText.from_pretrained(
        path, config=config, attn_implementation="moda"
    ).eval()
    inputs = make_inputs("llava")
    with torch.no_grad():
        torch.testing.assert_close(sharded(**inputs).logits, whole(**inputs).logits, atol=1e-5, rtol=0)


def test_new_parameters_of_a_sharded_model_are_set(two_ranks, checkpoint):
    two_ranks.run(check_new_parameters_of_a_sharded_model, checkpoint)


def check_moda_after_sharding():
    model = make_model("llava")
    for attention in attention_modules(model):
        fully_shard(attention, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(NotImplementedError, match="apply_moda: the model is sharded by FSDP already.*Apply MODA first"):
        apply_moda(model)
    assert not hasattr(model.config.text_config, "moda")


def test_moda_after_sharding_is_refused(two_ranks):
    two_ranks.run(check_moda_after_sharding)
