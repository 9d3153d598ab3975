"""Duplex attention of a sequence that is spread over ranks, beside that of one process."""

import copy
import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moda_ext.alignment import DuplexAligner
from moda_ext.distributed import SequenceShards, context_parallel_attention
from moda_ext.mask import ModularMask
from moda_ext.nn.attention import Tokens, align_and_attend

LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6}
WHOLE = {"base": -1.0, "learn_base": True, "learn_decay": True, "length": 80}  # every parameter of a mask
PRIOR = torch.tensor([[0.0, 0.5], [0.2, 0.0]])

# Keywords of make_problem. Between them every variant of the mask and every setting of the aligner.
SETTINGS = {
    "defaults": {},
    "three modalities": {"num_modalities": 3},
    "infinite length": {"mask": {"base": -1.0, "learn_base": True}},
    "frobenius": {"aligner": {"normalize": "frobenius"}},
    "keys as they are": {"aligner": {"key_norm": None}},
    "add": {"aligner": {"fusion": "add"}},
    "no aligner": {"aligner": None, "mask": {**WHOLE, "variant": "fix", "prior": PRIOR, "learn_prior": True}},
    "no mask": {"mask": None},
    "nothing": {"aligner": None, "mask": None},
    "inf": {"mask": {"variant": "inf"}},
    "learned sink": {"mask": {"variant": "learned", "base": -0.5}},
    "no pseudo scores": {"mask": {"base": -torch.inf}},
    "some heads without pseudo scores": {"mask": {"base": torch.tensor([-torch.inf, -1.0] * 4), "length": 60}},
    "hidden modality": {"mask": {**WHOLE, "prior": torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])}},
    "split": {"mask": {**WHOLE, "softmax": "split"}},
    "context": {"aligner": {"scope": "context"}},
    "context, add, rows": {"aligner": {"scope": "context", "fusion": "add", "normalize": "row"}},
    "a key head": {"kv_heads": 1},
    "as many key heads": {"kv_heads": 8},
    "left": {"padding": "left"},
    "right": {"padding": "right"},
    "mixed": {"padding": "mixed"},
    "a sequence of padding": {"padding": "all"},
    "one modality": {"present": 1},
    "not causal, full": {"is_causal": False, "aligner": {"scope": "full"}, "padding": "mixed"},
    "not causal, full, rows": {"is_causal": False, "aligner": {"scope": "full", "normalize": "row"}},
    "not causal, causal Gram": {"is_causal": False, "padding": "left"},
    "not causal, split": {"is_causal": False, "mask": {**WHOLE, "softmax": "split"}, "aligner": {"scope": "full"}},
}


@dataclasses.dataclass
class Problem:
    aligner: DuplexAligner | None
    mask: ModularMask | None
    tokens: tuple[Tensor, Tensor, Tensor]  # query, key, value
    modality: Tensor
    context: Tensor | None
    is_causal: bool
    num_modalities: int
    grad_out: Tensor
    grad_mass: Tensor

    def to(self, dtype: torch.dtype, of_modules: torch.dtype | None = None) -> "Problem":
        modules = (None if m is None else copy.deepcopy(m).to(of_modules or dtype) for m in (self.aligner, self.mask))
        tokens = tuple(t.to(dtype) for t in self.tokens)
        aligner, mask = modules
        return dataclasses.replace(self, aligner=aligner, mask=mask, tokens=tokens)

    def parameters(self) -> dict[str, nn.Parameter]:
        modules = {"aligner": self.aligner, "mask": self.mask}
        return {f"{m}.{n}": p for m, module in modules.items() if module for n, p in module.named_parameters()}


def make_problem(
    *,
    tokens=48,
    heads=8,
    kv_heads=4,
    head_dim=16,
    num_modalities=2,
    present=None,
    padding="none",
    aligner=(),
    mask=(),
    is_causal=True,
) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    torch.manual_seed(0)  # of a new aligner's weights: the same on every rank
    modules = (
        None if aligner is None else DuplexAligner(head_dim, num_modalities, **dict(aligner)).double(),
        None if mask is None else ModularMask(heads, num_modalities, **(mask or WHOLE)).double(),
    )
    for module in filter(None, modules):
        for parameter in module.parameters():  # away from the start, so that each of them matters
            parameter.data += 0.3 * randn(*parameter.shape)
    modality = torch.randint(present or num_modalities, (2, tokens), generator=generator)
    if padding == "left":
        modality[1, : tokens // 3] = -1
    if padding == "right":
        modality[1, -(tokens // 3) :] = -1
    if padding == "mixed":
        modality[0, torch.randperm(tokens, generator=generator)[: tokens // 4]] = -1
        modality[1, tokens // 4 : tokens // 2] = -1
    if padding == "all":
        modality[1] = -1
    context = None
    if modules[0] is not None and modules[0].scope == "context":
        context = torch.rand(2, tokens, generator=generator) < 0.4
    return Problem(
        *modules,
        (randn(2, heads, tokens, head_dim), *(randn(2, kv_heads, tokens, head_dim) for _ in range(2))),
        modality,
        context,
        is_causal,
        num_modalities,
        randn(2, heads, tokens, head_dim),
        randn(2, heads, tokens, num_modalities),
    )


def alone(problem: Problem) -> dict[str, Tensor]:
    """Results and gradients of one process."""
    leaves = [t.clone().requires_grad_() for t in problem.tokens]
    query, key, value = leaves
    modality, scale = problem.modality.int(), query.shape[-1] ** -0.5
    got = align_and_attend(
        problem.aligner,
        problem.mask,
        Tokens(query, key, value, modality, modality, key, modality, scale),
        problem.num_modalities,
        context=problem.context,
        is_causal=problem.is_causal,
    )
    return _with_gradients(problem, leaves, got.out, got.mass, problem.grad_out, problem.grad_mass)


def on_ranks(
    problem: Problem, shards: SequenceShards, scheme: str, attention: Callable = context_parallel_attention
) -> dict[str, Tensor]:
    """The same on the ranks of ``shards``: their results put together, and sums of parameters' gradients."""
    leaves = [shards.shard(t, 2).requires_grad_() for t in problem.tokens]
    out, mass = attention(
        problem.aligner,
        problem.mask,
        *leaves,
        problem.modality,
        problem.num_modalities,
        shards=shards,
        scheme=scheme,
        context=problem.context,
        is_causal=problem.is_causal,
        return_mass=True,
    )
    weights = shards.shard(problem.grad_out, 2), shards.shard(problem.grad_mass, 2)
    found = _with_gradients(problem, leaves, out, mass, *weights)
    for name, tensor in found.items():
        if name in problem.parameters():
            dist.all_reduce(tensor, group=shards.mesh.get_group())
        else:
            found[name] = shards.gather(tensor, 2)
    return found


def _with_gradients(
    problem: Problem, leaves: list[Tensor], out: Tensor, mass: Tensor, grad_out: Tensor, grad_mass: Tensor
) -> dict[str, Tensor]:
    parameters = problem.parameters()
    for parameter in parameters.values():
        parameter.grad = None
    ((out.to(grad_out) * grad_out).sum() + (mass.to(grad_mass) * grad_mass).sum()).backward()
    found = {"out": out.detach(), "mass": mass.detach()}
    found |= {f"grad_{name}": leaf.grad for name, leaf in zip(("query", "key", "value"), leaves, strict=True)}
    return found | {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()}


def worst_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference, relative to the largest number of its tensor, and of which tensor it is."""
    assert found.keys() == expected.keys()
    return max(
        (
            ((found[name] - tensor).abs().max() / tensor.abs().max().clamp(min=0.1)).nan_to_num(nan=torch.inf).item(),
            name,
        )
        for name, tensor in expected.items()
    )
