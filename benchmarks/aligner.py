"""Contenders of the kinds of case that have an aligner: ``aligned``, ``aligner``, ``gram`` and ``module``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from moda_ext import reference
from moda_ext._ops import library
from moda_ext.alignment import DuplexAligner, duplex_query_views, modality_gram
from moda_ext.attention import ModularDuplexAttention, duplex_attention, modular_attention
from moda_ext.nn.attention import _rotate as rotate
from moda_ext.release import TEXT, VISION, ReleaseAligner

from .peers import OURS, PEERS, TERMS, TOKENS, Call, Contender, dense_attention
from .workloads import PRODUCT, Case, Inputs, make_layer

WEIGHTS = ("a1", "b1", "a2", "b2")
RELEASE_WEIGHTS = ("ratio_v", "pfuser_v.weight")


# The aligner alone, and the attention it is for -----------------------------------------------------------------------
def _align(case: Case, x: Inputs, **options):
    tokens = (x.query, x.key, x.key_modality, x.key_modality)
    return duplex_query_views(*tokens, *x.leaves(WEIGHTS), case.num_modalities, **options)


def build_aligner(case: Case, x: Inputs) -> Call:
    return lambda: _align(case, x, return_indicator=True)


def build_aligner_plain(case: Case, x: Inputs) -> Call:
    return lambda: (_align(case, x),)


def dense_aligner(case: Case, t: dict[str, Tensor], modality: Tensor) -> dict[str, Tensor]:
    rows = modality[:, modality.shape[1] - t["query"].shape[2] :]
    weights = (t[name] for name in WEIGHTS)
    tokens = (t["query"], t["key"], rows, modality)
    views, indicator = reference.duplex_query_views(*tokens, *weights, case.num_modalities, return_indicator=True)
    return {"views": views, "indicator": indicator}


def aligner_plain_work(case: Case) -> float:
    """A key enters its Gram; a row meets, for each modality, both fusers."""
    d, r = case.head_dim, case.rank
    row = case.query_heads * case.num_modalities * 8 * d * r
    return case.batch * (case.rows * row + case.num_keys * case.key_heads * 2 * d * d)


def aligner_work(case: Case) -> float:
    """For the indicator a row also meets the Gram of each modality."""
    form = 2 * case.head_dim**2
    return aligner_plain_work(case) + case.batch * case.rows * case.query_heads * case.num_modalities * form


def _attend(case: Case, x: Inputs, views: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    options = {"num_modalities": case.num_modalities, "modality_bias": bias, "sink": x.sink, "is_causal": True}
    return modular_attention(views, x.key, x.value, x.key_modality, **options, return_lse=True, return_mass=True)


def build_attention(case: Case, x: Inputs) -> Call:
    return lambda: _attend(case, x, x.extra["views"], x.bias)


def _duplex(case: Case, x: Inputs, condition: Tensor | None) -> Call:
    tokens = (x.query, x.key, x.value, x.key_modality, x.key_modality)
    options = {"modality_bias": x.bias, "condition": condition, "sink": x.sink, "return_lse": True, "return_mass": True}
    return lambda: duplex_attention(*tokens, *x.leaves(WEIGHTS), case.num_modalities, **options)


def build_aligned(case: Case, x: Inputs) -> Call:
    return _duplex(case, x, torch.ones((), device=case.device))


def build_aligned_plain(case: Case, x: Inputs) -> Call:
    return _duplex(case, x, None)


def dense_aligned(case: Case, t: dict[str, Tensor], modality: Tensor) -> dict[str, Tensor]:
    aligner = dense_aligner(case, t, modality)
    return dense_attention(case, {**t, "views": aligner["views"], "bias": t["bias"] + aligner["indicator"]}, modality)


def dense_aligned_plain(case: Case, t: dict[str, Tensor], modality: Tensor) -> dict[str, Tensor]:
    return dense_attention(case, {**t, "views": dense_aligner(case, t, modality)["views"]}, modality)


# Whole modules: the gate runs them on moda_ext.reference --------------------------------------------------------------
class KeyAligner(DuplexAligner):
    """The aligner in full scope, on the side of the keys."""

    def forward(self, key: Tensor, modality: Tensor) -> Tensor:
        return self._aligned(key, modality, None)  # align_keys itself would call this forward pass


class SdpaLayer(ModularDuplexAttention):
    """The layer without aligner and mask on torch's attention."""

    def forward(self, x: Tensor, modality: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = self._rotation(torch.arange(x.shape[1]), self.rope_base)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _key_aligner(case: Case) -> KeyAligner:
    return KeyAligner(case.head_dim, case.num_modalities, rank=case.rank, scope="full").to(case.device, case.dtype)


def _release_aligner(case: Case) -> ReleaseAligner:
    return ReleaseAligner(case.head_dim).to(case.device, case.dtype)


def _layer(cls: type, **options) -> Callable[[Case], torch.nn.Module]:
    return lambda case: make_layer(case, cls, **options)


def module(name, what, make, arguments, weights, output, **keywords) -> Contender:
    """``make(case)`` on the inputs ``arguments`` and the modality, with its weights from the inputs."""
    leaves = (*arguments, *weights)

    def run(layer: torch.nn.Module, t: dict[str, Tensor], modality: Tensor) -> Tensor:
        own = {name: t[name] for name in weights}
        return torch.func.functional_call(layer, own, (*(t[name] for name in arguments), modality))

    def build(case: Case, x: Inputs) -> Call:
        layer, t = make(case), dict(zip(leaves, x.leaves(leaves), strict=True))
        return lambda: (run(layer, t, x.key_modality),)

    def dense(case: Case, t: dict[str, Tensor], modality: Tensor) -> dict[str, Tensor]:
        with mock.patch.object(library, "native_loaded", False):
            return {output: run(make(replace(case, dtype=t[leaves[0]].dtype)), t, modality)}

    return Contender(name, what, build, (output,), leaves, dense, by_rows=False, **keywords)


def layer_contender(name: str, what: str, cls=ModularDuplexAttention, ours=True, **options) -> Contender:
    weights = tuple(n for n, _ in ModularDuplexAttention(8, 1, **options).named_parameters())
    return module(name, what, _layer(cls, **options), ("x",), weights, "hidden", ours=ours, work=layer_work)


def layer_work(case: Case) -> float:
    heads = 2 * case.query_heads + 2 * case.key_heads
    return 2 * case.batch * case.rows * case.embedding * heads * case.head_dim + case.useful_flops("forward")


# The authors' release -------------------------------------------------------------------------------------------------
def build_release_loop(case: Case, x: Inputs) -> Call:
    ratio, fuser = x.leaves(RELEASE_WEIGHTS)

    def call():
        aligned = []
        for key, value, modality in zip(x.key, x.value, x.key_modality, strict=True):  # (Hkv, N, D), (N,)
            text, vision = modality == TEXT, modality == VISION
            unit = key + 1e-6
            unit = unit / unit.norm(dim=-1, keepdim=True)
            gram = unit[:, text].mT @ value[:, text]
            gram = gram / gram.norm(dim=-1, keepdim=True)
            sample = key.clone()
            sample[:, vision] = (key[:, vision] + ratio * (unit[:, vision] @ gram)) @ fuser.mT
            aligned.append(sample)
        return (torch.stack(aligned),)

    return call


# Grams ----------------------------------------------------------------------------------------------------------------
def build_gram(case: Case, x: Inputs) -> Call:
    return lambda: (modality_gram(x.key, x.key_modality, case.num_modalities),)


def dense_gram(case: Case, t: dict[str, Tensor], modality: Tensor) -> dict[str, Tensor]:
    return {"gram": reference.modality_gram(t["key"], modality, case.num_modalities)}


def gram_work(case: Case) -> float:
    return 2 * case.batch * case.key_heads * case.num_keys * case.head_dim**2


def build_gram_eager(case: Case, x: Inputs) -> Call:
    """One layout for the whole batch: its index lists are made here."""
    index = [(x.key_modality[0] == m).nonzero().squeeze(-1) for m in range(case.num_modalities)]

    def call():
        unit = F.normalize(x.key, dim=-1, eps=1e-6)
        parts = [unit.index_select(2, tokens) for tokens in index]
        return (torch.stack([part.mT @ part / max(1, part.shape[2]) for part in parts], dim=2),)

    return call


def build_product(case: Case, x: Inputs) -> Call:
    return lambda: (torch.mm(x.extra["left"], x.extra["right"]),)


def dense_product(case: Case, t: dict[str, Tensor], modality: Tensor) -> dict[str, Tensor]:
    return {"product": t["left"] @ t["right"]}


def product_work(case: Case) -> float:
    return 2 * PRODUCT[0] ** 2 * PRODUCT[1]


OF_ALIGNER = (*TOKENS[:2], *WEIGHTS)
OF_GRAM = {"leaves": ("key",), "dense": dense_gram, "by_rows": False, "work": gram_work, "backward": 1.0}
ALIGNER = Contender(
    "aligner",
    "causal projection, query views and indicator, fused",
    build_aligner,
    ("views", "indicator"),
    OF_ALIGNER,
    dense_aligner,
    work=aligner_work,
    ours=True,
)
BATCHED_RELEASE = module(
    "release-batched",
    "the release's alignment without the loop",
    _release_aligner,
    ("key", "value"),
    RELEASE_WEIGHTS,
    "keys",
    work=gram_work,
)
# The first of each kind is what the others are compared with.
CONTENDERS = {
    "attention": OURS + PEERS,
    "aligned": [
        Contender(
            "ours",
            "aligner and attention, the indicator in the bias",
            build_aligned,
            ("out", "lse", "mass"),
            (*TOKENS, *TERMS, *WEIGHTS),
            dense_aligned,
            ours=True,
        ),
        Contender(
            "ours-plain",
            "the same without the indicator",
            build_aligned_plain,
            ("out", "lse", "mass"),
            (*TOKENS, *TERMS, *WEIGHTS),
            dense_aligned_plain,
            ours=True,
        ),
        ALIGNER,
        Contender(
            "aligner-plain",
            "the aligner without the indicator",
            build_aligner_plain,
            ("views",),
            OF_ALIGNER,
            dense_aligner,
            work=aligner_plain_work,
            ours=True,
        ),
        Contender(
            "attention",
            "attention alone, given the views",
            build_attention,
            ("out", "lse", "mass"),
            ("views", *TOKENS[1:], *TERMS),
            ours=True,
        ),
    ],
    "aligner": [
        ALIGNER,
        module(
            "align-keys",
            "full scope, key side: the paper's form of it",
            _key_aligner,
            ("key",),
            WEIGHTS,
            "keys",
            ours=True,
            work=gram_work,
        ),
        Contender(
            "release-loop",
            "the authors' loop over samples: vision keys, full scope",
            build_release_loop,
            ("keys",),
            (*TOKENS[1:], *RELEASE_WEIGHTS),
            BATCHED_RELEASE.dense,
            by_rows=False,
            work=gram_work,
        ),
        BATCHED_RELEASE,
    ],
    "gram": [
        Contender("ours", "modality_gram, fused", build_gram, ("gram",), **OF_GRAM, ours=True),
        Contender("gram-eager", "normalise, pick, multiply", build_gram_eager, ("gram",), **OF_GRAM),
        Contender(
            "mm",
            f"torch.mm of {PRODUCT[0]} x {PRODUCT[1]} matrices: the machine's rate",
            build_product,
            ("product",),
            ("left", "right"),
            dense_product,
            by_rows=False,
            work=product_work,
        ),
    ],
    "module": [
        layer_contender("ours", "the whole layer"),
        layer_contender("no-aligner", "with the mask (unconditioned)", aligner=False, mask={"variant": "fix"}),
        layer_contender("no-mask", "with the aligner", mask=False),
        layer_contender("neither", "projections, RoPE and attention", aligner=False, mask=False),
        layer_contender("sdpa-layer", "the same on torch SDPA", SdpaLayer, False, aligner=False, mask=False),
    ],
}
