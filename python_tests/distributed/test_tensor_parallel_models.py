"""Whole models under tensor parallelism, with images and padding, against one process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel import EXACT, SINGLE, assert_equal_gradients, assert_replicas_equal, error, full
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

transformers = pytest.importorskip("transformers", minversion="5.23", reason="moda_ext[transformers] is missing")
from moved_models import SETTINGS  # noqa: E402  transformers is checked first
from safetensors.torch import load_file  # noqa: E402
from trained_models import NEW, labels_of, make_trained, randomize  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402
from vision_language import FAMILIES as EVERY_FAMILY  # noqa: E402
from vision_language import make_config, make_inputs, make_model  # noqa: E402

from moda_ext.diagnostics import AttentionBalanceLoss, AttentionMeter  # noqa: E402
from moda_ext.distributed import SplitHeads  # noqa: E402
from moda_ext.integrations.transformers import (  # noqa: E402
    MODAConfig,
    apply_moda,
    attention_modules,
    check_identity,
    context_parallel,
    load_moda,
    moda_parameters,
    moda_state_dict,
    save_moda,
)

FAMILIES = ("llava", "qwen2_vl", "gemma3")
# Transformers has these gradients of Gemma 3 in float32 in one pass, and sums them again in every further one.
NORMS = ("q_norm.weight", "k_norm.weight")
LEARNED = {"base": -2.0, "learn_base": True, "learn_decay": True, "length": 64}
GENERATIONS = {"greedy": {}, "beams": {"num_beams": 3}, "static cache": {"cache_implementation": "static"}}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """With every parameter that there is, and plain ones."""
    folder = tmp_path_factory.mktemp("models")
    for family in EVERY_FAMILY:
        make_trained(family, mask=LEARNED).save_pretrained(folder / family)
    for family in ("llava", "qwen3_vl"):
        make_model(family).save_pretrained(folder / f"plain {family}")
    return str(folder)


def load(path, **options):
    return transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64, **options)


def tensor_parallel(**sizes):
    return {"distributed_config": DistributedConfig(**(sizes or {"tp_size": dist.get_world_size()}))}


def double(inputs):
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def inputs_of(family):
    inputs = double(make_inputs(family))
    return inputs, labels_of(inputs)


# Computing


def check_generation(folder, family):
    path, inputs = f"{folder}/{family}", make_inputs(family)
    models = [
        transformers.AutoModelForImageTextToText.from_pretrained(path, **options) for options in (tensor_parallel(), {})
    ]
    assert attention_modules(models[0])[-1].moda.head_split.size == 2
    with torch.no_grad():
        assert error(*(model(**inputs).logits for model in models)) <= SINGLE
    for name, options in GENERATIONS.items():
        options = {"max_new_tokens": NEW, "do_sample": False, **options}
        assert torch.equal(*(model.generate(**copy.deepcopy(inputs), **options) for model in models)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens(two_ranks, checkpoints, family):
    two_ranks.run(check_generation, checkpoints, family)


def check_training(folder, family):
    """One pass, two that add up, and one under checkpointing, each from a step of AdamW on."""
    inputs, labels = inputs_of(family)
    models = load(f"{folder}/{family}", **tensor_parallel()).train(), load(f"{folder}/{family}").train()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False) for model in models]
    with torch.no_grad():
        assert error(*(model(**inputs).logits for model in models)) <= EXACT
    for passes, checkpointing in ((1, False), (2, False), (1, True)):
        for model, optimizer in zip(models, optimizers, strict=True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            optimizer.zero_grad()
            for _ in range(passes):
                model(**inputs, labels=labels, use_cache=False).loss.backward()
        assert_equal_gradients(*models, EXACT, but=NORMS)
        if family == "gemma3" and passes == 1:
            assert_equal_gradients(*models, SINGLE, names="q_norm.weight")
        own = moda_parameters(models[0])
        assert_replicas_equal([parameter.grad for parameter in own.values()])
    for optimizer in optimizers:
        optimizer.step()
    before = moda_parameters(load(f"{folder}/{family}"))
    assert all((full(own[name]) - before[name]).abs().max() > 1e-4 for name in own)
    assert_replicas_equal(own.values())


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_gradients_and_steps(two_ranks, checkpoints, family):
    two_ranks.run(check_training, checkpoints, family)


def check_adapters(folder, family):
    """PEFT copies the layer's MODA: the copy's gradients are whole too."""
    from peft import LoraConfig, get_peft_model

    inputs, labels = inputs_of(family)
    projections = r".*language_model.*\.(q|v)_proj"
    models = []
    for options in (tensor_parallel(), {}):
        lora = LoraConfig(r=2, target_modules=projections, modules_to_save=["moda"], init_lora_weights=False)
        models.append(get_peft_model(load(f"{folder}/{family}", **options), lora).train())
    split, whole = models
    for own, other in zip(split.parameters(), whole.parameters(), strict=True):
        value = other.detach()
        if isinstance(own, DTensor):
            value = distribute_tensor(value, own.device_mesh, own.placements)
        own.data.copy_(value)
    for _ in range(2):
        for model in models:
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        assert_equal_gradients(split, whole, names=".moda.")
    assert_replicas_equal([parameter.grad for parameter in moda_parameters(split).values()])
    layers = [attention for attention in attention_modules(split) if hasattr(attention, "moda")]
    assert layers and all(own.moda.modules_to_save["default"].head_split is not None for own in layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters(two_ranks, checkpoints, family):
    pytest.importorskip("peft")
    two_ranks.run(check_adapters, checkpoints, family)


# Ways to get there


def check_after_loading(folder):
    """MODA on a model that is tensor parallel: fresh values are those of one process; every setting."""
    inputs, labels = inputs_of("llava")
    for name, settings in SETTINGS.items():
        torch.manual_seed(dist.get_rank())  # fresh values that would differ
        split = apply_moda(load(f"{folder}/plain llava", **tensor_parallel()), MODAConfig(**settings))
        assert_replicas_equal(moda_state_dict(split).values())
        whole = apply_moda(load(f"{folder}/plain llava"), MODAConfig(**settings))
        state = moda_state_dict(split)
        for other, own in zip(moda_state_dict(whole).values(), state.values(), strict=True):
            other.copy_(own)
        if settings.get("mode") != "release" and settings.get("aligner", {}) is not None:
            assert check_identity(split, inputs, tolerance=1.0, new_tokens=2) < 1.0  # runs
        for model in (split, whole):
            randomize(model)
            model.train()(**inputs, labels=labels, use_cache=False).loss.backward()
        with torch.no_grad():
            assert error(split(**inputs).logits, whole(**inputs).logits) <= EXACT, name
        if moda_parameters(whole):
            assert_equal_gradients(split, whole)


def test_moda_on_a_tensor_parallel_model(two_ranks, checkpoints):
    two_ranks.run(check_after_loading, checkpoints)


def check_settings_in_the_config(folder):
    """A checkpoint without MODA, loaded with settings: the parameters are fresh, and equal in all processes."""
    config = transformers.AutoConfig.from_pretrained(f"{folder}/plain llava")
    config.text_config.moda = MODAConfig(mask=LEARNED).to_dict()
    torch.manual_seed(dist.get_rank())
    options = {"config": config, "attn_implementation": "moda"}
    model = load(f"{folder}/plain llava", **options, **tensor_parallel())
    assert model._tp_plan["model.language_model.layers.*.self_attn.moda"] == "moda_heads"
    state = moda_state_dict(model)
    assert_replicas_equal(state.values())
    assert state["layers.0.moda.aligner.a1"].std() > 0.1
    inputs, _ = inputs_of("llava")
    whole = load(f"{folder}/plain llava", **options)
    with torch.no_grad():
        assert error(model(**inputs).logits, whole(**inputs).logits) <= EXACT  # a new aligner changes nothing


def test_settings_in_the_config_of_a_plain_checkpoint(two_ranks, checkpoints):
    two_ranks.run(check_settings_in_the_config, checkpoints)


def check_auto_plan(folder):
    """``tp_plan="auto"``, as it was written before ``DistributedConfig``."""
    with pytest.warns(FutureWarning, match="tp_plan"):
        model = load(f"{folder}/llava", tp_plan="auto")
    inputs, _ = inputs_of("llava")
    with torch.no_grad():
        assert error(model(**inputs).logits, load(f"{folder}/llava")(**inputs).logits) <= EXACT


def test_the_plan_auto(two_ranks, checkpoints):
    two_ranks.run(check_auto_plan, checkpoints)


def check_whole_heads(folder):
    """Where a family's plan leaves attention whole, every process computes all heads, with equal parameters."""
    inputs, labels = inputs_of("qwen3_vl")
    torch.manual_seed(dist.get_rank())
    split = apply_moda(load(f"{folder}/plain qwen3_vl", **tensor_parallel()), MODAConfig(mask=LEARNED))
    assert not any("moda" in rule for rule in split._tp_plan) and attention_modules(split)[0].moda.head_split is None
    assert_replicas_equal(moda_state_dict(split).values())
    whole = apply_moda(load(f"{folder}/plain qwen3_vl"), MODAConfig(mask=LEARNED))
    for model in (randomize(split), randomize(whole)):
        model.train()(**inputs, labels=labels, use_cache=False).loss.backward()
    for own, other in zip(moda_parameters(split).values(), moda_parameters(whole).values(), strict=True):
        assert error(own.grad, other.grad) <= SINGLE or other.grad.abs().max() < 1e-7
    assert_replicas_equal([parameter.grad for parameter in moda_parameters(split).values()])


def test_a_plan_that_leaves_attention_whole(two_ranks, checkpoints):
    two_ranks.run(check_whole_heads, checkpoints)


def check_own_plan(folder):
    """A plan of a user's own that splits heads: with MODA's rule it is right, without it is refused."""
    inputs, labels = inputs_of("qwen3_vl")
    attention = "model.language_model.layers.*.self_attn"
    plan = {f"{attention}.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")}
    plan[f"{attention}.o_proj"] = "rowwise"
    refused = load(f"{folder}/qwen3_vl", **tensor_parallel(tp_size=2, tp_plan=plan))
    with pytest.raises(RuntimeError, match=r"MODA: the projections made 2 query heads.*split_heads\(model, mesh\)"):
        refused(**inputs)
    plan[f"{attention}.moda"] = "moda_heads"
    split = load(f"{folder}/qwen3_vl", **tensor_parallel(tp_size=2, tp_plan=plan)).train()
    whole = load(f"{folder}/qwen3_vl").train()
    for model in (split, whole):
        model(**inputs, labels=labels, use_cache=False).loss.backward()
    assert_equal_gradients(split, whole, names=".moda.")


def test_a_plan_of_ones_own(two_ranks, checkpoints):
    two_ranks.run(check_own_plan, checkpoints)


def test_rules_are_in_the_plans_that_split_heads():
    for family in FAMILIES:
        plan = apply_moda(make_model(family))._tp_plan
        assert plan["model.language_model.layers.*.self_attn.q_proj"] == "colwise"
        assert plan["model.language_model.layers.*.self_attn.moda"] == "moda_heads"
    plain = MODAConfig.plain()
    assert not any(
        "moda" in rule for rule in apply_moda(make_model("llava"), plain)._tp_plan
    )  # no layer has parameters
    with torch.device("meta"):
        base = transformers.AutoModel.from_config(apply_moda(make_model("llava")).config)
    assert base._tp_plan["language_model.layers.*.self_attn.moda"] == "moda_heads"
    assert not any("moda" in rule for rule in transformers.AutoModel.from_config(make_config("llava"))._tp_plan)


def check_torch_styles(folder):
    """PyTorch's own styles on the attention of a Transformers model, with ours."""
    inputs, labels = inputs_of("llava")
    whole, split = load(f"{folder}/llava"), load(f"{folder}/llava")
    columns = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel())
    plan = {**columns, "o_proj": RowwiseParallel(), "moda": SplitHeads()}
    for attention in attention_modules(split):
        parallelize_module(attention, init_device_mesh("cpu", (2,)), plan)
    for model in (split, whole):
        model.train()(**inputs, labels=labels, use_cache=False).loss.backward()
    assert_equal_gradients(split, whole)


def test_styles_of_torch(two_ranks, checkpoints):
    two_ranks.run(check_torch_styles, checkpoints)


# Measuring


def check_meter(folder, name):
    inputs, labels = inputs_of(name.split()[-1])
    labels[:, :-3] = -100  # an answer after a prompt: with labels from the first token on, no figure is defined
    results = []
    for options in (tensor_parallel(), {}):
        model = load(f"{folder}/{name}", **options)
        model.generation_config.eos_token_id = None
        with torch.no_grad(), AttentionMeter(model, token_scores=2, similarity=True) as meter:
            model(**inputs, labels=labels)
            model.generate(**copy.deepcopy(inputs), max_new_tokens=3, do_sample=False)
        results.append(meter.result())
    split, whole = results
    for figure in ("self", "cross", "score", "aei"):
        for rows in ("all", "generated") if figure == "aei" else ("all",):
            options = {"rows": rows} if figure == "aei" else {"per_head": True}
            own, expected = (result.figure(figure, **options) for result in results)
            assert torch.equal(own.isnan(), expected.isnan()) and not expected.isnan().all()
            assert error(own.nan_to_num(), expected.nan_to_num()) <= SINGLE
    assert split.figure("cross", per_head=True).shape[1] == 4
    for own, expected in zip(split.token_scores, whole.token_scores, strict=True):
        assert error(own.scores, expected.scores) <= SINGLE
    assert error(split.similarity, whole.similarity) <= SINGLE


@pytest.mark.parametrize("name", ["llava", "gemma3", "plain llava", "plain qwen3_vl"])
def test_the_meter_measures_all_heads(two_ranks, checkpoints, name):
    two_ranks.run(check_meter, checkpoints, name)


def check_unknown_heads():
    """A plain model that somebody else made tensor parallel: what a meter would call all heads would be some."""
    model = make_model("llava")
    columns = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel())
    for attention in attention_modules(model):
        parallelize_module(attention, init_device_mesh("cpu", (2,)), {**columns, "o_proj": RowwiseParallel()})
    with AttentionMeter(model), pytest.raises(RuntimeError, match="made 2 query heads and 1 key/value heads"):
        model(**make_inputs("llava"))


def test_the_meter_refuses_heads_that_it_knows_nothing_of(two_ranks):
    two_ranks.run(check_unknown_heads)


def check_loss(folder):
    inputs, labels = inputs_of("llava")
    models = load(f"{folder}/llava", **tensor_parallel()).train(), load(f"{folder}/llava").train()
    for checkpointing in (False, True):
        totals = []
        for model in models:
            model.zero_grad()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            with AttentionBalanceLoss().collect(model) as penalties:
                loss = model(**inputs, labels=labels, use_cache=False).loss
                (loss + 3.0 * torch.stack(penalties).mean()).backward()
            totals.append(torch.stack(penalties))
        assert error(*totals) <= EXACT
        assert_equal_gradients(*models)


def test_the_balance_loss_is_of_all_heads(two_ranks, checkpoints):
    two_ranks.run(check_loss, checkpoints)


# Sharded too, and saved


def check_two_dimensions(folder, family):
    """Tensor parallelism in two processes, FSDP2 in two, each with a row of the batch."""
    inputs, labels = inputs_of(family)
    model = load(f"{folder}/{family}", **tensor_parallel(tp_size=2, fsdp_size=2)).train()
    whole = load(f"{folder}/{family}").train()
    row = model._mesh_manager.get_mesh("fsdp").get_local_rank()
    own = {name: value.chunk(2)[row] for name, value in inputs.items()}
    count = (labels[:, 1:] != -100).sum()
    for passes in (1, 2):
        # FSDP takes the mean over its processes, so each divides by half of the tokens of all.
        for m, batch, target, items in (
            (model, own, labels.chunk(2)[row], count / 2),
            (whole, inputs, labels, count),
        ):
            m.zero_grad()
            for _ in range(passes):
                m(**batch, labels=target, use_cache=False, num_items_in_batch=items).loss.backward()
        assert_equal_gradients(model, whole, names=".moda.")
        assert_equal_gradients(model, whole, SINGLE, but=NORMS)  # Gemma 3's other norms are in float32 too
    model.eval()
    with torch.no_grad():
        assert error(model(**own).logits, whole.eval()(**inputs).logits.chunk(2)[row]) <= EXACT
    options = {"max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(model.generate(**own, **options), whole.generate(**inputs, **options).chunk(2)[row])


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallel_and_sharded(four_ranks, checkpoints, family):
    four_ranks.run(check_two_dimensions, checkpoints, family)


def check_with_context_parallelism(folder, family):
    """Heads over two processes, and tokens and weights over two: every process has the whole batch."""
    for text in range(5, 40):  # until the length can be cut
        inputs = double(make_inputs(family, text=text))
        if inputs["input_ids"].shape[1] % 4 == 0:
            break
    inputs["labels"] = labels_of(inputs)
    model = load(f"{folder}/{family}", **tensor_parallel(tp_size=2, fsdp_size=2)).train()
    whole = load(f"{folder}/{family}").train()
    expected = whole(**inputs, use_cache=False)
    expected.loss.backward()
    mesh = model._mesh_manager.get_mesh("fsdp")
    for scheme in ("regather", "allgather", "ring", "ulysses"):
        model.zero_grad()
        with context_parallel(model, mesh, scheme=scheme) as shards:
            result = model(**inputs)
            result.loss.backward()
        assert error(shards.gather(result.logits.detach(), 1), expected.logits) <= EXACT, scheme
        assert_equal_gradients(model, whole, names=".moda.")
        assert_equal_gradients(model, whole, SINGLE)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_tensor_and_context_parallel(four_ranks, checkpoints, family):
    four_ranks.run(check_with_context_parallelism, checkpoints, family)


def check_checkpoints(folder, out, sizes, others):
    """What is saved in one layout, in every way, is the same tensors in every other, and in one process."""
    inputs, labels = inputs_of("llava")
    model = load(f"{folder}/llava", **tensor_parallel(**sizes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    optimizer.step()
    before = load(f"{folder}/llava").state_dict()
    with torch.no_grad():
        expected = {name: full(tensor).clone() for name, tensor in model.state_dict().items()}
    assert all(not torch.equal(expected[name], before[name]) for name in expected if ".moda." in name)

    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{out}/dcp")
    model.save_pretrained(f"{out}/gathered")
    model.save_pretrained(f"{out}/sharded", distributed_checkpoint=True)
    save_moda(model, f"{out}/moda-{dist.get_rank()}.safetensors")
    dist.barrier()
    own, first = (load_file(f"{out}/moda-{rank}.safetensors") for rank in (dist.get_rank(), 0))
    assert first and own.keys() == first.keys() and all(torch.equal(own[name], first[name]) for name in first)
    for layout in others:
        options = tensor_parallel(**layout) if layout else {}
        assert_same_tensors(load(f"{out}/gathered", **options), expected)
        if layout:
            assert_same_tensors(load(f"{out}/sharded", **options), expected)
        other = load(f"{folder}/llava", **options)
        state = get_model_state_dict(other)
        dcp.load({"model": state}, checkpoint_id=f"{out}/dcp")
        set_model_state_dict(other, state)
        assert_same_tensors(other, expected)
        other = load_moda(load(f"{folder}/llava", **options), f"{out}/moda-0.safetensors")
        assert_same_tensors(other, {name: tensor for name, tensor in expected.items() if ".moda." in name})


def assert_same_tensors(model, expected):
    found = model.state_dict()
    assert expected and expected.keys() <= found.keys()
    for name in expected:
        assert torch.equal(full(found[name]), expected[name]), name


def test_checkpoints_of_tensor_parallel_models(two_ranks, checkpoints, tmp_path):
    sizes = {"tp_size": 2}
    two_ranks.run(check_checkpoints, checkpoints, str(tmp_path), sizes, [sizes, {"fsdp_size": 2}, {}], patience=120)


def test_checkpoints_of_sharded_tensor_parallel_models(four_ranks, checkpoints, tmp_path):
    sizes = {"tp_size": 2, "fsdp_size": 2}
    four_ranks.run(check_checkpoints, checkpoints, str(tmp_path), sizes, [sizes, {"fsdp_size": 4}, {}], patience=120)
