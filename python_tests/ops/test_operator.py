"""A declaration of an operator: everything follows from names, wherever the arguments stand in the schema."""

import itertools

import pytest
import torch

from moda_ext._ops import library, operator, operators
from moda_ext._ops.operator import Operator

pytestmark = pytest.mark.skipif(not library.native_loaded, reason="no native library")

# out = scale * query * key + offset, with an argument that may be anywhere, and a gradient that may not be asked for.
FORWARD = ("Tensor query", "Tensor key", "Tensor? offset", "float scale")
EXTRA = "int extra"
ORDERS = [(*FORWARD[:i], EXTRA, *FORWARD[i:]) for i in range(len(FORWARD) + 1)] + [FORWARD[::-1]]
_numbers = itertools.count()


def names(arguments) -> list[str]:
    return [argument.split()[-1] for argument in arguments]


def declare(arguments, **changes) -> Operator:
    """The toy operator with its arguments in this order, in the namespace of the others, kernels in Python."""
    name = f"toy_{next(_numbers)}"
    fragment = torch.library.Library("moda_ext", "FRAGMENT")
    declare.kept.append(fragment)
    backward = ("Tensor grad_out", *arguments, "bool need_offset")
    fragment.define(f"{name}({', '.join(arguments)}) -> (Tensor out)")
    fragment.define(
        f"{name}_backward({', '.join(backward)}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_offset)"
    )

    def forward_kernel(*inputs):
        given = dict(zip(names(arguments), inputs, strict=True))
        assert given["query"].stride(-1) == 1
        out = given["scale"] * given["query"] * given["key"]
        return out if given["offset"] is None else (out + given["offset"]).to(out.dtype)

    def backward_kernel(*inputs):
        given = dict(zip(names(backward), inputs, strict=True))
        grad = given["grad_out"] * given["scale"]
        offset = given["grad_out"] * 1.0 if given["need_offset"] else given["query"].new_empty(0)
        return grad * given["key"], grad * given["query"], offset

    fragment.impl(name, forward_kernel, "CPU")
    fragment.impl(f"{name}_backward", backward_kernel, "CPU")
    declaration = {
        "tokens": ("query", "key"),
        "sums": ("offset",),
        "batch": {"query": -4, "key": -4, "offset": -4, "out": -4},
    }
    return Operator(name, lambda given: torch.empty_like(given.query), **(declaration | changes))


declare.kept = []


@pytest.fixture(params=ORDERS, ids=lambda order: "-".join(names(order)))
def order(request):
    return request.param


def arguments_of(order, dtype=torch.float64):
    torch.manual_seed(0)
    query, key, offset = (torch.randn(2, 3, 4, 8, dtype=dtype) for _ in range(3))
    given = {"query": query, "key": key, "offset": offset, "scale": 0.5, "extra": 7}
    return {name: given[name] for name in names(order)}


def test_gradient(order):
    op, given = declare(order), arguments_of(order)
    for tensors in (("query", "key", "offset"), ("query",), ("offset",)):
        leaves = {n: given[n].clone().requires_grad_(n in tensors) for n in ("query", "key", "offset")}
        op(**(given | leaves)).square().sum().backward()
        expected = {n: given[n].clone().requires_grad_(n in tensors) for n in leaves}
        (0.5 * expected["query"] * expected["key"] + expected["offset"]).square().sum().backward()
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, expected[name].grad)
    query = given["query"].clone().requires_grad_()
    op(**(given | {"query": query, "offset": None})).sum().backward()
    torch.testing.assert_close(query.grad, 0.5 * given["key"])


def test_vmap(order):
    op, given = declare(order), arguments_of(order)
    stacked = torch.stack([given["key"], 2 * given["key"]], dim=-1)  # mapped over the last dimension

    def call(key):
        return op(**(given | {"key": key}))

    expected = torch.stack([call(given["key"]), call(2 * given["key"])])
    torch.testing.assert_close(torch.vmap(call, in_dims=-1)(stacked), expected)
    grads = torch.vmap(torch.func.grad(lambda key: call(key).square().sum()), in_dims=-1)(stacked)
    assert grads.shape == expected.shape
    one_by_one = declare(order, batch=None)
    torch.testing.assert_close(
        torch.vmap(lambda key: one_by_one(**(given | {"key": key})), in_dims=-1)(stacked), expected
    )


def test_autocast(order):
    op, given = declare(order), arguments_of(order, torch.float32)
    direct = getattr(torch.ops.moda_ext, op.name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = direct(*(given | {"offset": given["offset"].bfloat16()}).values())
    assert out.dtype == torch.bfloat16
    expected = 0.5 * given["query"].bfloat16() * given["key"].bfloat16() + given["offset"].bfloat16().float()
    torch.testing.assert_close(out, expected.bfloat16())


def test_fake_and_export(order):
    op, given = declare(order), arguments_of(order)
    rest = {name: value for name, value in given.items() if name != "query"}
    compiled = torch.compile(lambda query: op(query=query, **rest).sum(), backend="aot_eager", fullgraph=True)
    query = given["query"].clone().requires_grad_()
    compiled(query).backward()
    torch.testing.assert_close(query.grad, 0.5 * given["key"])
    meta = op(**{n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in given.items()})
    assert (meta.shape, meta.device.type) == (given["query"].shape, "meta")


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": ("query", "keys")},
        {"sums": ("bias",)},
        {"batch": {"query": -4, "key": -4, "out": -4}},
        {"batch": {"query": -4, "key": -4, "offset": -4, "out": -4, "lse": -3}},
    ],
)
def test_a_declaration_that_does_not_fit_its_schema_is_an_error(changes):
    with pytest.raises(RuntimeError, match="declaration and schema differ in (bias|keys|lse|offset)"):
        declare(FORWARD, **changes)


def test_calls_are_by_name():
    given = arguments_of(FORWARD)
    given.pop("extra", None)
    with pytest.raises(TypeError, match="has no argument extra"):
        declare(FORWARD)(**given, extra=7)
    with pytest.raises(KeyError, match="key"):
        declare(FORWARD)(**{name: value for name, value in given.items() if name != "key"})


def test_every_operator_of_the_library_is_declared():
    registered = {
        schema.name.removeprefix("moda_ext::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("moda_ext::") and not schema.name.startswith("moda_ext::toy_")
    }
    forward = {name for name in registered if not name.endswith("_backward")}
    assert forward == set(operators.DECLARED)
    assert registered - forward == {op.backward.name for op in operators.DECLARED.values() if op.backward}
    mutating = {name for name, op in operators.DECLARED.items() if op.mutates}
    assert set(operator.FUNCTIONS) >= registered - mutating and mutating == {
        "paged_cache_update",
        "paged_attention_step",
    }
