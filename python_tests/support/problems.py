"""Inputs of modular attention for the tests, and the ways to run them: ours, the oracle and the dense yardstick."""

from dataclasses import dataclass, replace

import hypothesis.strategies as st
import torch
from tolerance import assert_within_rule, finite_max
from torch import Tensor

from moda_ext import attention, reference

GRADIENTS = ("query", "key", "value", "modality_bias", "sink")
LOW_PRECISION = (torch.bfloat16, torch.float16)

RUNS = ("one run", "long runs", "mixed runs", "runs of one", "alternating", "absent modality")
PADDINGS = ("none", "left", "right", "middle", "scattered", "everything")
LAYOUTS = ("contiguous", "tokens first", "fused", "expanded heads", "expanded batch", "padded rows", "strided last")
BIASES = (None, "full", "per modality", "per head", "hidden entries", "hidden rows", "large")
SINKS = (None, "full", "per head", "partly off", "off", "large")


@dataclass(repr=False)
class Problem:
    """One call of modular_attention; query, key, value, modality_bias and sink are leaves that require a gradient."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_modality: Tensor
    num_modalities: int = 2
    modality_bias: Tensor | None = None
    sink: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None

    def __repr__(self) -> str:
        parts = []
        for name in ("query", "key", "value", "key_modality", "modality_bias", "sink"):
            t = getattr(self, name)
            parts.append(f"{name}={None if t is None else (str(t.dtype)[6:], tuple(t.shape), t.stride())}")
        return f"Problem({', '.join(parts)}, M={self.num_modalities}, {self.is_causal=}, {self.scale=})"

    def _repr_pretty_(self, printer, cycle) -> None:  # hypothesis would print the numbers
        printer.text(repr(self))

    def keywords(self) -> dict:
        names = ("num_modalities", "modality_bias", "sink", "is_causal", "scale")
        return {name: getattr(self, name) for name in names}

    def positional(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.key_modality

    def map(self, function) -> "Problem":
        """The problem with ``function`` applied to the floating-point tensors, which become leaves again."""
        changed = {
            name: function(getattr(self, name)).detach().requires_grad_()
            for name in GRADIENTS
            if getattr(self, name) is not None
        }
        return replace(self, **changed)

    def to(self, dtype: torch.dtype) -> "Problem":
        return self.map(lambda t: t.to(dtype))

    def leaves(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in GRADIENTS if getattr(self, name) is not None}


def ours(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return attention.modular_attention(*problem.positional(), **problem.keywords(), return_lse=True, return_mass=True)


def dense(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch in the dtype of the query, also if that is a low precision."""
    dtype = problem.query.dtype
    keywords = problem.keywords()
    for name in ("modality_bias", "sink"):
        if keywords[name] is not None:
            keywords[name] = keywords[name].to(dtype)
    return reference.dense_attention(*problem.positional(), **keywords)


def evaluate(run, problem: Problem, cotangents) -> dict[str, Tensor]:
    """out, lse, mass and, for the given (grad_out, grad_lse, grad_mass), the gradient of every input."""
    outputs = run(problem)
    results = dict(zip(("out", "lse", "mass"), outputs, strict=True))
    pairs = [(output, c.to(output)) for output, c in zip(outputs, cotangents, strict=True) if c is not None]
    leaves = problem.leaves()
    grads = torch.autograd.grad(
        [output for output, _ in pairs], list(leaves.values()), [c for _, c in pairs], materialize_grads=True
    )
    results.update({f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)})
    return results


def gradients_by_formula(problem: Problem, cotangents) -> dict[str, Tensor]:
    """The same results as ``evaluate(dense, ...)``, with the gradients as the kernels make them.

    That is from D_i = dO_i . o_i + sum_m g_im mass_im - dL_i, where autograd's softmax sums p_ij dp_ij. The two differ
    in rounding, most where a row sees few keys: the errors of the one cancel there, those of the other do not.
    """
    leaves, num_modalities = problem.leaves(), problem.num_modalities
    with torch.no_grad():
        results = dict(zip(("out", "lse", "mass"), dense(problem), strict=True))
        out, lse, mass = results.values()
        grad_out, grad_lse, grad_mass = (
            torch.zeros_like(o) if c is None else c.to(o) for o, c in zip((out, lse, mass), cotangents, strict=True)
        )
        views = problem.query if problem.query.dim() == 5 else problem.query.expand(num_modalities, -1, -1, -1, -1)
        group = views.shape[2] // problem.key.shape[1]
        key, value = (t.repeat_interleave(group, dim=1) for t in (problem.key, problem.value))
        scale = views.shape[-1] ** -0.5 if problem.scale is None else problem.scale
        offset = key.shape[2] - views.shape[3]
        seen = problem.key_modality[:, None, None] >= 0
        if problem.is_causal:
            seen = seen & torch.ones(views.shape[3], key.shape[2], dtype=torch.bool, device=key.device).tril(offset)
        delta = (grad_out * out).sum(-1) + (grad_mass * mass).sum(-1) - grad_lse
        products = grad_out @ value.mT
        grad_views, grad_bias = torch.zeros_like(views), torch.zeros_like(mass)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for m in range(num_modalities):
            scores = scale * (views[m] @ key.mT)
            if problem.modality_bias is not None:
                scores = scores + problem.modality_bias[..., m].expand(lse.shape)[..., None]
            members = seen & (problem.key_modality[:, None, None] == m)
            weights = torch.where(members, (scores - lse[..., None]).exp(), 0.0)
            grad_scores = weights * (products + (grad_mass[..., m] - delta)[..., None])
            grad_views[m] = scale * (grad_scores @ key)
            grad_key += scale * (grad_scores.mT @ views[m])
            grad_value += weights.mT @ grad_out
            grad_bias[..., m] = grad_scores.sum(-1)
        per_group = problem.key.shape[1], group
        gradients = {
            "query": grad_views if problem.query.dim() == 5 else grad_views.sum(0),
            "key": grad_key.unflatten(1, per_group).sum(2),
            "value": grad_value.unflatten(1, per_group).sum(2),
            "modality_bias": grad_bias,
        }
        if problem.sink is not None:
            gradients["sink"] = -(problem.sink - lse).exp() * delta
    return results | {f"gradient of {n}": gradients[n].sum_to_size(leaf.shape) for n, leaf in leaves.items()}


def yardsticks(problem: Problem, cotangents) -> dict[str, list[Tensor]]:
    """What dense PyTorch makes of a problem in its precision, in four ways: two derivations, two orders of D."""
    grad_out, *rest = cotangents
    flipped = replace(
        problem, **{n: getattr(problem, n).detach().flip(-1).requires_grad_() for n in ("query", "key", "value")}
    )
    ways = [evaluate(dense, problem, cotangents), gradients_by_formula(problem, cotangents)]
    for way in (lambda *arguments: evaluate(dense, *arguments), gradients_by_formula):
        results = way(flipped, [None if grad_out is None else grad_out.flip(-1), *rest])
        along = ("out", "gradient of query", "gradient of key", "gradient of value")
        ways.append({name: result.flip(-1) if name in along else result for name, result in results.items()})
    return {name: [way[name] for way in ways] for name in ways[0]}


def compare(problem: Problem, cotangents, fuzzed: bool = False, part: float = 1.0) -> None:
    """Ours against the float64 oracle, by the error that dense PyTorch makes in the same precision."""
    result = evaluate(ours, problem, cotangents)
    oracle = evaluate(dense, problem.to(torch.float64), cotangents)
    one_way = fuzzed or problem.query.dtype != torch.float32  # the others have a wide margin
    yardstick = evaluate(dense, problem, cotangents) if one_way else yardsticks(problem, cotangents)
    if problem.query.dtype in LOW_PRECISION:
        # lse and mass are float32 even then, so dense PyTorch in float32 is what they are measured by.
        single = evaluate(dense, problem.to(torch.float32), cotangents)
        yardstick.update(lse=single["lse"], mass=single["mass"])
    numbers = [*problem.leaves().values(), *(c for c in cotangents if c is not None)]
    # A rounding of the scores, which are as large as lse, is a relative error of every probability.
    magnitude = max(finite_max(t.detach()) for t in numbers) * max(1.0, finite_max(oracle["lse"])) if fuzzed else 0.0
    for name in result:
        assert_within_rule(name, result[name], oracle[name], yardstick[name], magnitude, part)


def cotangents_for(problem: Problem, generator: torch.Generator, which=("out", "lse", "mass")):
    shape = problem.query.shape[-4:]
    shapes = {"out": shape, "lse": shape[:3], "mass": (*shape[:3], problem.num_modalities)}
    return [_randn(s, generator) if name in which else None for name, s in shapes.items()]


def make_problem(
    *,
    batch=2,
    heads=2,
    kv_heads=2,
    queries=5,
    keys=5,
    head_size=8,
    num_modalities=2,
    views=False,
    dtype=torch.float32,
    runs="mixed runs",
    padding="none",
    bias="full",
    sink="full",
    is_causal=False,
    scale=None,
    layouts=("contiguous", "contiguous", "contiguous"),
    peak=1.0,
    device="cpu",
    seed=0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    query = _randn(((num_modalities,) if views else ()) + (batch, heads, queries, head_size), generator) * peak
    key = _randn((batch, kv_heads, keys, head_size), generator)
    value = _randn((batch, kv_heads, keys, head_size), generator)
    rows = [modalities(keys, num_modalities, runs, padding, generator) for _ in range(batch)]
    key_modality = torch.stack(rows) if rows else torch.zeros(0, keys, dtype=torch.int64)
    problem = Problem(
        query=lay_out(query.to(device, dtype), layouts[0]),
        key=lay_out(key.to(device, dtype), layouts[1]),
        value=lay_out(value.to(device, dtype), layouts[2]),
        key_modality=key_modality.to(device),
        num_modalities=num_modalities,
        modality_bias=_bias(bias, (batch, heads, queries, num_modalities), generator, device, dtype),
        sink=_sink(sink, (batch, heads, queries), generator, device, dtype),
        is_causal=is_causal,
        scale=scale,
    )
    return problem.map(lambda t: t)


@st.composite
def problems(draw, device="cpu", max_tokens=40, **fixed) -> Problem:
    """Shapes, structure of the modalities, dtypes and layouts that meet every branch of a kernel."""
    kv_heads = draw(st.sampled_from((1, 1, 2, 3)))
    queries = draw(st.integers(0, max_tokens))
    choices = {
        "batch": draw(st.sampled_from((1, 1, 2, 3, 0))),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from((1, 2, 8))),
        "queries": queries,
        "keys": draw(st.one_of(st.just(queries), st.integers(0, max_tokens))),
        "head_size": draw(st.one_of(st.sampled_from((8, 16, 64)), st.integers(1, 32).map(lambda n: 8 * n))),
        "num_modalities": draw(st.one_of(st.integers(1, 4), st.integers(1, 16))),
        "views": draw(st.booleans()),
        "dtype": draw(st.sampled_from((torch.float32,) * 5 + (torch.float64, torch.bfloat16, torch.float16))),
        "runs": draw(st.sampled_from(RUNS)),
        "padding": draw(st.sampled_from(PADDINGS[:1] * 3 + PADDINGS)),
        "bias": draw(st.sampled_from(BIASES)),
        "sink": draw(st.sampled_from(SINKS)),
        "is_causal": draw(st.booleans()),
        "scale": draw(st.sampled_from((None, None, None, 0.25, 1.0, 0.0, -0.5))),
        "layouts": tuple(draw(st.sampled_from(LAYOUTS[:2] * 2 + LAYOUTS)) for _ in range(3)),
        "peak": draw(st.sampled_from((1.0, 1.0, 8.0))),
        "seed": draw(st.integers(0, 2**16)),
    }
    choices.update(fixed)
    return make_problem(device=device, **choices)


def modalities(length: int, num: int, runs: str, padding: str, generator: torch.Generator) -> Tensor:
    """(length,) modality ids with the given run structure, some of them overwritten by -1."""

    def random(high: int) -> int:
        return int(torch.randint(max(high, 1), (), generator=generator))

    if runs == "runs of one":
        ids = torch.randint(num, (length,), generator=generator)
    elif runs == "alternating":
        ids = torch.arange(length) % num
    else:
        longest = {"one run": length, "long runs": length // 2, "mixed runs": 7, "absent modality": length // 2}[runs]
        present = [random(num)] if runs == "absent modality" else list(range(num))
        ids = torch.empty(0, dtype=torch.int64)
        while len(ids) < length:
            run = length if runs == "one run" else 1 + random(longest)
            ids = torch.cat([ids, torch.full((run,), present[random(len(present))])])
        ids = ids[:length]
    third = length // 3
    start, end = {
        "none": (0, 0),
        "left": (0, third),
        "right": (length - third, length),
        "middle": (third, 2 * third),
        "scattered": (0, 0),
        "everything": (0, length),
    }[padding]
    ids[start:end] = -1
    if padding == "scattered":
        ids[torch.rand(length, generator=generator) < 0.3] = -1
    return ids


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The values of ``tensor`` (..., H, N, D) in another memory layout; the expanded ones repeat the first slice."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "tokens first":  # (B, N, H, D) seen as (B, H, N, D)
        return tensor.transpose(-2, -3).contiguous().transpose(-2, -3)
    if layout == "fused":  # one of three slices of a (B, N, 3, H, D) projection
        tokens_first = tensor.transpose(-2, -3)
        fused = torch.stack([torch.full_like(tokens_first, float("nan")), tokens_first, tokens_first], dim=-3)
        return fused.select(-3, 1).transpose(-2, -3)
    if layout == "expanded heads":
        return tensor[..., :1, :, :].expand_as(tensor)
    if layout == "expanded batch":
        return tensor[..., :1, :, :, :].expand_as(tensor)
    if layout == "padded rows":  # rows further apart than they are long, starting off any alignment
        wide = torch.nn.functional.pad(tensor, (3, 5), value=float("nan"))
        return wide[..., 3:-5]
    assert layout == "strided last"
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def _randn(shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _bias(kind, shape, generator, device, dtype) -> Tensor | None:
    if kind is None:
        return None
    batch, heads, rows, num = shape
    bias = _randn({"per modality": (num,), "per head": (heads, 1, num)}.get(kind, shape), generator)
    if kind == "large":
        bias = bias * 20
    if kind in ("hidden entries", "hidden rows"):
        bias = bias.masked_fill(torch.rand(shape, generator=generator) < 0.3, -torch.inf)
    if kind == "hidden rows":
        bias = bias.masked_fill(torch.rand(*shape[:3], 1, generator=generator) < 0.3, -torch.inf)
    return bias.to(device, dtype)


def _sink(kind, shape, generator, device, dtype) -> Tensor | None:
    if kind is None:
        return None
    sink = _randn((shape[1], 1) if kind == "per head" else shape, generator)
    if kind == "large":
        sink = sink * 20
    if kind == "partly off":
        sink = sink.masked_fill(torch.rand(shape, generator=generator) < 0.5, -torch.inf)
    if kind == "off":
        sink = torch.full_like(sink, -torch.inf)
    return sink.to(device, dtype)
