"""Attention over a part of the keys at a time: parts merge to the whole row, and so do their gradients."""

import pytest
import torch
from problems import Problem, cotangents_for, dense, evaluate, make_problem, yardsticks
from tolerance import assert_close, assert_within_rule
from torch import Tensor

import moda_ext
from moda_ext._ops.limits import accumulation_dtype
from moda_ext.functional.attention import expand
from moda_ext.functional.parts import (
    Keys,
    Rows,
    Terms,
    attend_part,
    differentiate_part,
    finish_bias_gradient,
    merge,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CASES = {
    "plain": {"bias": None, "sink": None, "num_modalities": 1},
    "bias": {"sink": None},
    "bias and sink": {"padding": "scattered"},
    "views": {"views": True, "num_modalities": 3, "heads": 4, "kv_heads": 2},
    "hidden rows": {"bias": "hidden rows", "sink": "partly off", "padding": "left"},
    "a part of padding": {"padding": "middle", "sink": "off"},
    "causal": {"is_causal": True, "queries": 40, "keys": 96, "views": True, "heads": 4, "kv_heads": 1},
    "many rows": {"queries": 300, "keys": 330, "heads": 2, "kv_heads": 1},  # which tile instructions take
    "nothing seen": {"padding": "everything"},
}


def parts_of(problem: Problem) -> list[tuple[Keys, Terms]]:
    """Three parts of the keys, of unequal length. Under a causal mask the last has the queries' own keys."""
    query, last = problem.query, problem.key.shape[2] // 3
    own = problem.query.shape[-2] if problem.is_causal else problem.key.shape[2] - 2 * last - 5
    ends = [0, (problem.key.shape[2] - own) // 3, problem.key.shape[2] - own, problem.key.shape[2]]
    rows, parts = query.shape[-4:-1], []
    bias = expand(problem.modality_bias, (*rows, problem.num_modalities), query.dtype)
    sink = expand(problem.sink, rows, query.dtype)
    for begin, end in zip(ends, ends[1:], strict=False):
        of_last = end == ends[-1]
        keys = (t[:, :, begin:end].detach() for t in (problem.key, problem.value))
        terms = Terms(
            None if bias is None else bias.detach(),
            sink.detach() if sink is not None and of_last else None,
            problem.num_modalities,
            problem.is_causal and of_last,
            query.shape[-1] ** -0.5 if problem.scale is None else problem.scale,
        )
        parts.append((Keys(*keys, problem.key_modality[:, begin:end].int()), terms))
    return parts


def in_parts(problem: Problem, grad_out: Tensor | None, grad_mass: Tensor | None) -> dict[str, Tensor]:
    query, dtype = problem.query.detach(), accumulation_dtype(problem.query.dtype)
    grad_out = None if grad_out is None else grad_out.to(query.dtype)
    grad_mass = None if grad_mass is None else grad_mass.to(dtype)
    parts = parts_of(problem)
    rows: Rows | None = None
    for keys, terms in parts:
        part = attend_part(query, keys, terms)
        rows = part if rows is None else merge(rows, part)
    rows = rows._replace(out=rows.out.to(query.dtype))
    found = [
        differentiate_part(grad_out, grad_mass, query, keys, terms, rows, (True,) * 5, whole_rows=False)
        for keys, terms in parts
    ]
    results = {"out": rows.out, "lse": rows.lse, "mass": rows.mass}
    results["gradient of query"] = sum(part.query.to(dtype) for part in found).to(query.dtype)
    for name in ("key", "value"):
        results[f"gradient of {name}"] = torch.cat([getattr(part, name) for part in found], dim=2)
    if problem.modality_bias is not None:
        total = sum(part.modality_bias for part in found)
        sink = parts[-1][1].sink
        results["gradient of modality_bias"] = finish_bias_gradient(total, grad_out, grad_mass, rows, sink)
    if problem.sink is not None:
        results["gradient of sink"] = found[-1].sink
    leaves = problem.leaves()
    for name in ("modality_bias", "sink"):
        if name in leaves:
            gradient = results[f"gradient of {name}"].sum_to_size(leaves[name].shape)
            results[f"gradient of {name}"] = gradient.to(leaves[name].dtype)
    return results


def hold_to_rule(problem: Problem, which=("out", "mass")) -> None:
    cotangents = cotangents_for(problem, torch.Generator().manual_seed(1), which)
    found = in_parts(problem, cotangents[0], cotangents[2])
    oracle = evaluate(dense, problem.to(torch.float64), cotangents)
    yardstick = yardsticks(problem, cotangents)
    if problem.query.dtype in (torch.bfloat16, torch.float16):
        single = evaluate(dense, problem.to(torch.float32), cotangents)
        yardstick.update(lse=single["lse"], mass=single["mass"])
    for name, result in found.items():
        # Sums of float32 in another order: what is exact in one way of the dense ones is not in another.
        assert_within_rule(name, result, oracle[name], yardstick[name], magnitude=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_parts_make_the_whole(case, dtype, native):
    settings = {"queries": 50, "keys": 90, "heads": 4, "kv_heads": 2, "head_size": 16, **CASES[case]}
    hold_to_rule(make_problem(dtype=dtype, **settings))


@pytest.mark.parametrize("which", (("out",), ("mass",)), ids=str)
def test_gradients_of_one_result(which, native):
    hold_to_rule(make_problem(queries=50, keys=90, head_size=16), which)


def test_on_other_backends(flex):
    for name in ("flex", "reference"):
        with moda_ext.use_backend(name):
            for case in ("bias and sink", "views", "hidden rows", "causal"):
                hold_to_rule(make_problem(**{"queries": 50, "keys": 90, "head_size": 16, **CASES[case]}))


def test_the_bias_gradient_of_a_part_is_a_term_of_the_sum(native):
    """Without the flag the operator takes the keys that it sees for all, and the bias gradient is another's."""
    problem = make_problem(queries=30, keys=60, head_size=16, dtype=torch.float64)
    cotangents = cotangents_for(problem, torch.Generator().manual_seed(1), ("out",))
    expected = evaluate(dense, problem, cotangents)["gradient of modality_bias"]
    query, parts = problem.query.detach(), parts_of(problem)
    rows = merge(merge(attend_part(query, *parts[0]), attend_part(query, *parts[1])), attend_part(query, *parts[2]))
    sums = {
        whole: sum(
            differentiate_part(
                cotangents[0], None, query, *part, rows, (False,) * 3 + (True, False), whole_rows=whole
            ).modality_bias
            for part in parts
        )
        for whole in (False, True)
    }
    assert_close(sums[False], expected)
    assert (sums[True] - expected).abs().max() > 0.1 * expected.abs().max()


def test_rows_that_see_nothing_merge(native):
    problem = make_problem(queries=8, keys=30, padding="everything", sink=None)
    nothing = attend_part(problem.query.detach(), *parts_of(problem)[0])
    something = attend_part(problem.query.detach(), *parts_of(make_problem(queries=8, keys=30, sink=None))[0])
    assert (nothing.lse == -torch.inf).all()
    both = merge(nothing, nothing)
    assert (both.lse == -torch.inf).all()
    assert not both.out.any() and not both.mass.any() and not both.lse_residual.any()
    for merged in (merge(nothing, something), merge(something, nothing)):
        for tensor, expected in zip(merged, something, strict=True):
            assert torch.equal(tensor, expected)


def test_rows_merge_beside_large_numbers(native):
    """lse of 1e9 has no room for the logarithm of a sum: its residual has."""
    problem = make_problem(queries=20, keys=60, head_size=16)
    shifted = problem.map(lambda t: t)
    for term in (shifted.modality_bias, shifted.sink):
        term.data = (term.data * 64).round() / 64  # so that the sum is exact
    expected = in_parts(shifted, torch.ones_like(problem.query), None)
    for term in (shifted.modality_bias, shifted.sink):
        term.data += 2.0**17
    found = in_parts(shifted, torch.ones_like(problem.query), None)
    for name in expected.keys() - {"lse"}:
        assert_close(found[name], expected[name])
