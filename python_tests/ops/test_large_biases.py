"""A number common to a row changes nothing in a softmax: out, mass and all gradients are those without it.

Each problem is compared with its *ordinary* one, in which biases and sink are relative to the largest of them that has
a part in the row. What has no weight beside it is cut at -500, and what the row does not meet is 0 at most.
"""

import pytest
import torch
from problems import cotangents_for, dense, evaluate, make_problem, ours
from processes import ORDER, TIERS, python
from test_duplex_attention import in_one, inputs
from test_varlen import pack
from tolerance import assert_close, assert_within_rule, finite_max

import moda_ext
from moda_ext import attention, reference

LOWEST, LARGEST = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
NUMBERS = {
    "1e3": 1e3,
    "-1e3": -1e3,
    "1e6": 1e6,
    "-1e6": -1e6,
    "1e9": 1e9,
    "-1e9": -1e9,
    "1e30": 1e30,
    "-1e30": -1e30,
    "lowest": LOWEST,
    "largest": LARGEST,
}
MIXED = (0.0, 1.0, -1e3, 1e3, -1e9, 1e9, -1e10, 1e30, -1e30, LOWEST, LARGEST)

SHAPES = {
    "causal": {"queries": 90, "keys": 90, "is_causal": True, "heads": 4, "runs": "long runs", "num_modalities": 3},
    "padding": {"queries": 33, "keys": 70, "padding": "left", "runs": "runs of one"},
    "hidden": {"queries": 40, "keys": 70, "bias": "hidden entries", "sink": "partly off", "is_causal": True},
    "one modality": {"queries": 40, "keys": 50, "num_modalities": 1, "sink": None},
    "views": {"queries": 70, "keys": 300, "views": True, "num_modalities": 3, "is_causal": True, "heads": 8},
    "no bias": {"queries": 20, "keys": 40, "bias": None},
    "decode": {"queries": 1, "keys": 1500, "is_causal": True, "heads": 8, "num_modalities": 3, "runs": "long runs"},
    "longer than a tile": {"queries": 150, "keys": 700, "is_causal": True, "num_modalities": 3, "runs": "long runs"},
    "negative scale": {"queries": 40, "keys": 50, "scale": -0.5, "is_causal": True},
}


def build(shape, numbers, dtype=torch.float32, seed=0, device="cpu"):
    """A problem whose finite biases and sinks are `numbers`: one that a row has in common, or several to draw from."""
    problem = make_problem(head_size=32, dtype=dtype, seed=seed, device=device, **{"runs": "mixed runs", **shape})
    generator = torch.Generator().manual_seed(seed)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("modality_bias", "sink"):
        given = getattr(problem, name)
        if given is None:
            continue
        drawn = torch.randint(0, 12, given.shape, generator=generator)
        if isinstance(numbers, tuple):
            changed = torch.tensor(numbers, dtype=sums)[drawn % len(numbers)]
        else:  # towards zero, in steps that the number can be told apart by
            number = torch.tensor(numbers, dtype=sums)
            step = (number.nextafter(torch.zeros_like(number)) - number).abs().clamp(min=0.25)
            changed = number - number.sign() * step * (drawn % 4)
        changed = torch.where(given.isinf(), given.to(sums), changed.to(device))
        setattr(problem, name, changed.detach().requires_grad_())
    return problem


def without_common_numbers(problem):
    """The ordinary problem in float64 (it always has biases), and what was taken off each row."""
    batch, heads, rows = problem.query.shape[-4:-1]
    keys = problem.key.shape[2]
    device = problem.query.device
    zeros = torch.zeros(batch, heads, rows, problem.num_modalities, dtype=torch.float64, device=device)
    bias = zeros if problem.modality_bias is None else problem.modality_bias.detach().double()
    sink = zeros[..., 0] - torch.inf if problem.sink is None else problem.sink.detach().double()
    last = torch.arange(rows, device=device)[:, None] + (keys - rows if problem.is_causal else keys)
    visible = torch.arange(keys, device=device) <= last
    members = problem.key_modality[..., None] == torch.arange(problem.num_modalities, device=device)  # (B, Nk, M)
    met = (visible[..., None] & members[:, None]).any(2)[:, None]  # (B, 1, Nq, M)
    base = torch.maximum(bias.masked_fill(~met, -torch.inf).amax(-1), sink)
    base = base.masked_fill(base == -torch.inf, 0.0)

    def relative(numbers, base):
        return torch.where(numbers.isinf(), numbers, (numbers - base).clamp(min=-500.0, max=0.0))

    ordinary = problem.to(torch.float64)
    ordinary.modality_bias = relative(bias, base[..., None]).requires_grad_()
    if problem.sink is not None:
        ordinary.sink = relative(sink, base).requires_grad_()
    return ordinary, base


def check(problem, run=ours, which=("out", "lse", "mass")):
    """out, mass and the gradients of `run` by the rule of tolerance.py; lse row by row, as rows differ in size."""
    ordinary, base = without_common_numbers(problem)
    cotangents = cotangents_for(problem, torch.Generator().manual_seed(1), which)
    result = evaluate(run, problem, cotangents)
    exact = evaluate(dense, problem.to(torch.float64), cotangents)
    oracle = evaluate(dense, ordinary, cotangents)
    yardstick = evaluate(dense, ordinary.to(problem.query.dtype), cotangents)
    single = evaluate(dense, ordinary.to(result["mass"].dtype), cotangents)
    numbers = [problem.query, problem.key, problem.value, *(c for c in cotangents if c is not None)]
    magnitude = max(finite_max(t.detach()) for t in numbers) * max(1.0, finite_max(oracle["lse"]))
    for name in result:
        if name == "lse":
            assert_lse(exact[name], oracle[name], base, magnitude)
            assert_lse(result[name], oracle[name], base, magnitude)
            continue
        assert_within_rule(f"float64 {name}", exact[name], oracle[name], oracle[name], magnitude)
        near = single if name == "mass" else yardstick
        assert_within_rule(name, result[name], oracle[name], near[name], magnitude)


def assert_lse(lse, relative, base, magnitude):
    """lse is base + relative, rounded once; relative has the error of a few roundings of the magnitude that goes in."""
    eps = torch.finfo(lse.dtype).eps
    expected = base + relative
    assert torch.equal(lse.isinf(), relative.isinf())
    error = (lse.detach().double() - expected).abs()
    assert (error <= eps * (expected.abs() + 2 * magnitude))[~relative.isinf()].all(), error.max()


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_number_common_to_a_row_changes_nothing(device, shape, number):
    check(build(shape, number, device=device))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_numbers_of_every_size_in_one_row(device, shape, seed):
    check(build(shape, MIXED, seed=seed, device=device))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("numbers", (-1e9, LARGEST, MIXED), ids=("-1e9", "largest", "mixed"))
def test_every_dtype(device, dtype, numbers):
    for shape in ("causal", "padding", "views", "decode"):
        check(build(SHAPES[shape], numbers, dtype, device=device))


@pytest.mark.parametrize(
    "numbers",
    (1e300, -1e300, -torch.finfo(torch.float64).max, torch.finfo(torch.float64).max, (0.0, -1e300, 1e300, 1e9)),
    ids=("1e300", "-1e300", "lowest", "largest", "mixed"),
)
def test_float64_has_room_for_more(numbers):
    for shape in ("causal", "hidden", "views", "decode"):
        check(build(SHAPES[shape], numbers, torch.float64))


@pytest.mark.parametrize("which", ("out", "lse", "mass"))
def test_gradients_of_one_result_alone(device, which):
    check(build(SHAPES["causal"], -1e9, device=device), which=(which,))


@pytest.mark.parametrize("number", (-1e9, -1e10, LOWEST, 3e38))
def test_one_number_on_every_key_sums_to_one_per_row(number):
    """The gradient of a value is the weight that its key has: 64 rows hand out 64."""
    query, key, value = torch.randn(3, 1, 1, 64, 64).requires_grad_().unbind()
    value.retain_grad()
    key_modality = torch.zeros(1, 64, dtype=torch.int64)
    bias = torch.full((1,), number)
    out, mass = attention.modular_attention(
        query, key, value, key_modality, num_modalities=1, modality_bias=bias, return_mass=True
    )
    assert_close(mass, torch.ones_like(mass))
    (grad,) = torch.autograd.grad(out[..., 0].sum(), value)
    assert grad.sum().item() == pytest.approx(64, rel=1e-5)


def test_a_large_bias_that_a_row_does_not_meet():
    """Modality 1 comes later (causal) or not at all; rows that see -1e9 alone are as if it was 0."""
    problem = make_problem(queries=40, keys=40, num_modalities=3, is_causal=True, runs="one run", sink=None)
    problem.key_modality = (torch.arange(40) >= 20).long().expand(2, 40)
    problem.modality_bias = torch.tensor([-1e9, 0.0, LARGEST]).repeat(2, 2, 40, 1).requires_grad_()
    check(problem)


def test_lse_of_the_largest_number_is_finite():
    """finfo.max + log of a sum is finfo.max, rounded; it takes numbers of 1e31 to be infinite."""
    problem = build({"queries": 8, "keys": 8, "bias": "per modality", "sink": None}, LARGEST)
    problem.modality_bias = torch.full((2,), LARGEST).requires_grad_()
    _, lse, _ = ours(problem)
    assert (lse == LARGEST).all()


# The other ways in.


@pytest.mark.parametrize("numbers", (-1e9, LARGEST, MIXED), ids=("-1e9", "largest", "mixed"))
@pytest.mark.parametrize("views", (False, True))
def test_packed_sequences(numbers, views):
    problems = []
    for i, length in enumerate((70, 1, 130)):
        shape = {"batch": 1, "queries": length, "keys": length + 5, "heads": 4, "views": views, "is_causal": True}
        problems.append(build(shape, numbers, seed=i))
    arguments, keywords = pack(problems)
    result = attention.modular_attention_varlen(*arguments, **keywords, return_lse=True, return_mass=True)
    leaves = [*arguments[:3], keywords["modality_bias"], keywords["sink"]]
    grads = torch.autograd.grad([r.sin().sum() for r in (result[0], result[2])], leaves)
    outs, alone = [], []
    for problem in problems:
        outs.append(ours(problem))
        losses = [outs[-1][0].sin().sum(), outs[-1][2].sin().sum()]
        alone.append(torch.autograd.grad(losses, list(problem.leaves().values())))
    start = 0
    for problem, (out, lse, mass) in zip(problems, outs, strict=True):
        rows = slice(start, start + problem.query.shape[-2])
        assert_close(result[0][rows].transpose(0, 1), out[0])
        torch.testing.assert_close(result[1][rows].mT, lse[0], rtol=1e-6, atol=1e-5)
        assert_close(result[2][rows].transpose(0, 1), mass[0])
        start = rows.stop
    for i in range(4):
        parts = [grads_of[i].select(-4, 0).transpose(-3, -2) for grads_of in alone]
        assert_close(grads[i], torch.cat(parts, dim=-3))
    assert_close(grads[4], torch.cat([grads_of[4][0].mT for grads_of in alone]))


@pytest.mark.parametrize("number", (-1e9, 1e9, LOWEST, LARGEST))
@pytest.mark.parametrize("queries", (1, 150))
def test_fused_duplex_attention(native, queries, number):
    arguments, terms = inputs(queries=queries)
    del terms["condition"]
    terms["modality_bias"] = terms["modality_bias"].clamp(min=0, max=0)  # -inf stays
    terms["modality_bias"] = torch.where(terms["modality_bias"].isinf(), -torch.inf, 0.0)
    terms["sink"] = torch.zeros_like(terms["sink"])
    expected = in_one(*arguments, **terms)
    moved = in_one(*arguments, **{name: term + number for name, term in terms.items()})
    assert_close(moved[0], expected[0])
    assert_lse(moved[1], expected[1].double(), number, 10)
    assert_close(moved[2], expected[2])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("numbers", (-1e9, 1e9, LOWEST, MIXED), ids=("-1e9", "1e9", "lowest", "mixed"))
def test_the_reference_in_the_precision_of_a_model(numbers, dtype):
    """It is the fallback without the native library, and what attends under a mask of the model's own."""

    def run(problem):
        options = {"return_lse": True, "return_mass": True}
        return reference.modular_attention(*problem.positional(), **problem.keywords(), **options)

    for shape in SHAPES.values():
        check(build(shape, numbers, dtype), run)


def test_the_reference_under_a_mask():
    """What a mask hides has no part in a row: its bias may be any larger."""
    problem = build({"queries": 12, "keys": 30, "heads": 2, "sink": None}, -1e9)
    problem.key_modality = (torch.arange(30) >= 20).long().expand(2, 30)
    bias = torch.tensor([-1e9, 0.0])
    tokens = [t.detach() for t in problem.positional()]
    visible = torch.arange(30) < 20
    out, lse, mass = reference.dense_attention(*tokens, modality_bias=bias, visible=visible)
    expected = reference.dense_attention(*tokens, visible=visible)
    assert_close(out, expected[0])
    assert_close(mass, expected[2])
    assert_lse(lse, expected[1].double(), -1e9, 10)


@pytest.mark.parametrize("numbers", (-1e9, LARGEST, MIXED), ids=("-1e9", "largest", "mixed"))
def test_the_merge_of_modalities(numbers):
    problem = build(SHAPES["causal"], numbers)
    merged = reference.merged_attention(*problem.positional(), **problem.keywords())
    for result, expected in zip(merged, dense(problem), strict=True):
        if result.shape[-1] == expected.shape[-1] and result.dim() == 4:
            assert_close(result, expected)


# Instruction sets

ON_EVERY_TIER = """
import torch, moda_ext
from test_large_biases import MIXED, NUMBERS, SHAPES, build, check
torch.set_num_threads(1)
many_rows = dict(batch=1, heads=8, kv_heads=1, queries=70, keys=300, is_causal=True, num_modalities=3)
for shape in (*SHAPES.values(), many_rows, many_rows | dict(views=True, runs="runs of one")):
    for numbers in (-1e9, 1e9, *list(NUMBERS.values())[-2:], MIXED):
        check(build(shape, numbers))
    check(build(shape, MIXED, torch.bfloat16))
print(moda_ext.info()["isa"])
"""


@pytest.mark.parametrize("capability", TIERS)
def test_every_instruction_set_of_this_machine(native, capability):
    if ORDER.index(TIERS[capability]) > ORDER.index(moda_ext.info()["isa"]):
        pytest.skip(f"this machine has {moda_ext.info()['isa']} at most")
    assert python(ON_EVERY_TIER, ATEN_CPU_CAPABILITY=capability).split() == [TIERS[capability]]
