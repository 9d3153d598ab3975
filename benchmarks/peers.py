"""Ours and every peer behind one interface: ``build(case, inputs)`` returns a call without arguments.

Every peer is written the way that is fastest for it on the case's device; what depends on the token layout alone
(causal masks, block masks, index lists) is made once, outside the timed call. What depends on bias and sink is made
inside it, because they are inputs of the operator. ``outputs`` names what the call returns, ``leaves`` the inputs it is
differentiated by.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from moda_ext import reference, use_backend
from moda_ext.attention import modular_attention

from .workloads import VISION, Case, Inputs

Call = Callable[[], tuple[torch.Tensor, ...]]
TOKENS, TERMS = ("query", "key", "value"), ("bias", "sink")


def dense_attention(case: Case, t: dict[str, torch.Tensor], modality: torch.Tensor) -> dict[str, torch.Tensor]:
    """Plain PyTorch, for the gate: the last rows of the keys, whose modalities are given."""
    terms = {"modality_bias": t["bias"], "sink": t["sink"]} if "bias" in t else {}
    options = {"num_modalities": case.num_modalities, "is_causal": True, **terms}
    query = t["views"] if "views" in t else t["query"]
    out, lse, mass = reference.dense_attention(query, t["key"], t["value"], modality, **options)
    return {"out": out, "lse": lse, "mass": mass}


@dataclass(frozen=True)
class Contender:
    name: str
    what: str
    build: Callable[[Case, Inputs], Call]
    outputs: tuple[str, ...] = ("out",)
    leaves: tuple[str, ...] = TOKENS + TERMS
    dense: Callable[..., dict[str, torch.Tensor]] = dense_attention  # the same in plain PyTorch
    by_rows: bool = True  # rows do not depend on one another: the gate may take a sample of them
    work: Callable[[Case], float] | None = None  # useful FLOPs forward; None: those of attention
    backward: float = 2.0  # FLOPs of the backward pass for one forward
    matrices: tuple[int, int] = (0, 0)  # dense score matrices alive at the peak: forward, train
    copies: int = 0  # copies it makes of key and value
    no_train: str | None = None  # why it cannot train
    ours: bool = False

    def useful_flops(self, case: Case, mode: str) -> float:
        if self.work is None:
            return case.useful_flops(mode)
        return self.work(case) * (1 + self.backward * (mode == "train"))

    def obstacle(self, case: Case, mode: str, memory: float) -> str | None:
        """Why this contender cannot run the case, or None."""
        if mode == "train" and self.no_train:
            return f"n/a: {self.no_train}"
        need = self.matrices[mode == "train"] * case.score_bytes() + self.copies * case.key_value_bytes()
        if need > memory:
            return (
                f"skipped: needs about {need / 1e9:.0f} GB for dense scores and copies, {memory / 1e9:.0f} GB are free"
            )
        if self.name == "flex" and case.dtype == torch.float64:
            return "n/a: FlexAttention has no float64"
        return None


def causal_mask(case: Case) -> torch.Tensor:
    """Additive (Nq, Nk) mask, bottom-right aligned."""
    visible = torch.ones(case.rows, case.num_keys, dtype=torch.bool, device=case.device)
    visible = visible.tril(case.num_keys - case.rows)
    return torch.zeros_like(visible, dtype=case.dtype).masked_fill(~visible, -math.inf)


# Ours -----------------------------------------------------------------------------------------------------------------
def build_ours(case: Case, x: Inputs) -> Call:
    def call():
        return modular_attention(
            x.query,
            x.key,
            x.value,
            x.key_modality,
            num_modalities=case.num_modalities,
            modality_bias=x.bias,
            sink=x.sink,
            is_causal=True,
            return_lse=True,
            return_mass=True,
        )

    return call


def build_ours_plain(case: Case, x: Inputs) -> Call:
    def call():
        out = modular_attention(
            x.query,
            x.key,
            x.value,
            x.key_modality,
            num_modalities=case.num_modalities,
            modality_bias=x.bias,
            sink=x.sink,
            is_causal=True,
        )
        return (out,)

    return call


def build_ours_on_flex(case: Case, x: Inputs) -> Call:
    """What a GPU runs where the kernels are not proven."""
    ours = build_ours(case, x)

    def call():
        with use_backend("flex"):
            return ours()

    return call


# Peers ----------------------------------------------------------------------------------------------------------------
def build_sdpa(case: Case, x: Inputs) -> Call:
    # torch aligns is_causal top-left: right for Nq = Nk, and a single last row sees everything.
    causal = case.rows > 1
    return lambda: (F.scaled_dot_product_attention(x.query, x.key, x.value, is_causal=causal, enable_gqa=True),)


def build_backend(backend: SDPBackend) -> Callable[[Case, Inputs], Call]:
    """``build_sdpa`` on one of torch's backends."""

    def build(case: Case, x: Inputs) -> Call:
        plain = build_sdpa(case, x)

        def call():
            with sdpa_kernel(backend):
                return plain()

        return call

    return build


def build_fa4(case: Case, x: Inputs) -> Call:
    from flash_attn.cute import flash_attn_func

    def call():
        tokens_first = (t.transpose(1, 2) for t in (x.query, x.key, x.value))
        result = flash_attn_func(*tokens_first, causal=True)
        out = result[0] if isinstance(result, tuple) else result  # some versions return the lse as well
        return (out.transpose(1, 2),)

    return call


def fused_kernels_are_strict(case: Case) -> bool:
    """On a GPU, the fused kernels that take a mask want its rows 16 bytes apart or a multiple, and equal heads."""
    return case.device != "cpu"


def masked_sdpa(case: Case, query, key, value, mask, **options) -> torch.Tensor:
    if fused_kernels_are_strict(case):
        key, value = (t.repeat_interleave(case.query_heads // case.key_heads, dim=1) for t in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True, **options)


def columns_beside(case: Case) -> int:
    """Keys that are none: one for the sink, and as many as make the mask's rows a multiple of 8 numbers."""
    return 8 - case.num_keys % 8 if fused_kernels_are_strict(case) else 1


def dense_mask(case: Case, x: Inputs, causal: torch.Tensor, is_vision: torch.Tensor) -> torch.Tensor:
    """(B, Hq, Nq, Nk + columns_beside): each key's bias, -inf above the diagonal, then the sink, then -inf."""
    bias = torch.where(is_vision, x.bias[..., 1:2], x.bias[..., 0:1]) + causal
    beside = F.pad(x.sink[..., None], (0, columns_beside(case) - 1), value=-math.inf)
    return torch.cat([bias, beside], dim=-1).to(case.dtype)


def _dense(case: Case, x: Inputs) -> Callable[[], torch.Tensor]:
    assert case.num_modalities == 2
    causal, is_vision = causal_mask(case), (x.key_modality == VISION)[:, None, None, :]
    return lambda: dense_mask(case, x, causal, is_vision)


def build_sdpa_mask(case: Case, x: Inputs) -> Call:
    mask, beside = _dense(case, x), columns_beside(case)

    def call():
        key, value = (F.pad(t, (0, 0, 0, beside)) for t in (x.key, x.value))  # the sink: a key and a value of zeros
        return (masked_sdpa(case, x.query, key, value, mask()),)

    return call


def build_sdpa_mask_given(case: Case, x: Inputs) -> Call:
    with torch.no_grad():
        mask, beside = _dense(case, x)(), columns_beside(case)

    def call():
        key, value = (F.pad(t, (0, 0, 0, beside)) for t in (x.key, x.value))
        return (masked_sdpa(case, x.query, key, value, mask),)

    return call


def build_onehot_v(case: Case, x: Inputs) -> Call:
    mask, m, d = _dense(case, x), case.num_modalities, case.head_dim
    onehot = F.one_hot(x.key_modality.long(), m).to(case.dtype)[:, None].expand(-1, case.key_heads, -1, -1)
    beside = columns_beside(case)
    extra = 8  # torch's flash kernel wants equal head sizes; without the padding the call is 5 to 20 times slower

    def call():
        value = F.pad(torch.cat([x.value, onehot], dim=-1), (0, extra - m, 0, beside))
        key = F.pad(x.key, (0, extra, 0, beside))
        query = F.pad(x.query, (0, extra))
        both = masked_sdpa(case, query, key, value, mask(), scale=d**-0.5)
        return both[..., :d], both[..., d : d + m]

    return call


def build_flex_lse(backend: str) -> Callable[[Case, Inputs], Call]:
    """FlexAttention where it returns its lse: the sink is one factor for each row."""

    def build(case: Case, x: Inputs) -> Call:
        from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

        offset, modality, bias = case.num_keys - case.rows, x.key_modality, x.bias

        def mask_mod(b, h, i, j):
            return j <= i + offset

        def score_mod(score, b, h, i, j):
            return score + bias[b, h, i, modality[b, j]]

        block_mask = create_block_mask(mask_mod, None, None, case.rows, case.num_keys, device=case.device)
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        options = {"block_mask": block_mask, "enable_gqa": True, "return_aux": AuxRequest(lse=True)}

        def call():
            kernel = {"kernel_options": {"BACKEND": backend}}
            out, aux = compiled(x.query, x.key, x.value, score_mod=score_mod, **options, **kernel)
            lse = torch.logaddexp(aux.lse, x.sink)
            return out * torch.exp(aux.lse - lse)[..., None].to(case.dtype), lse

        return call

    return build


def build_flex(case: Case, x: Inputs) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n, offset = case.num_keys, case.num_keys - case.rows
    modality, bias, sink = F.pad(x.key_modality, (0, 1)), x.bias, x.sink

    def mask_mod(b, h, i, j):
        return (j <= i + offset) | (j == n)

    # On CPU FlexAttention returns no lse, so the sink is one more key of zeros whose score is replaced.
    def score_mod(score, b, h, i, j):
        return torch.where(j == n, sink[b, h, i], score + bias[b, h, i, modality[b, j]])

    block_mask = create_block_mask(mask_mod, None, None, case.rows, n + 1, device=case.device)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call():
        key, value = F.pad(x.key, (0, 0, 0, 1)), F.pad(x.value, (0, 0, 0, 1))
        return (compiled(x.query, key, value, score_mod=score_mod, block_mask=block_mask, enable_gqa=True),)

    return call


def _plain_with_lse(query, key, value, *, is_causal=False, attn_mask=None):
    aten = torch.ops.aten
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, attn_mask=attn_mask)
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[:2]
    rows = query.shape[2]
    mask = F.pad(attn_mask, (0, -attn_mask.shape[-1] % 8))[..., : attn_mask.shape[-1]]  # rows at multiples of 16 bytes
    mask = mask.expand(query.shape[0], query.shape[1], rows, -1)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, mask, True)
    return out, lse[..., :rows]  # its rows are padded


def build_merge(case: Case, x: Inputs) -> Call:
    """M plain attentions, each over the keys of one modality under a causal mask, joined by the merge identity."""
    assert bool((x.key_modality == x.key_modality[:1]).all()), "one layout for the whole batch"
    causal = causal_mask(case)
    index = [(x.key_modality[0] == m).nonzero().squeeze(-1) for m in range(case.num_modalities)]
    masks = [causal[:, i].contiguous() for i in index]
    # torch gives a row that sees nothing the lse 0; it must be -inf.
    blind = [(mask == -math.inf).all(-1) for mask in masks]

    def call():
        parts, z = [], []
        for m, keys in enumerate(index):
            out, lse = _plain_with_lse(
                x.query, x.key.index_select(2, keys), x.value.index_select(2, keys), attn_mask=masks[m][None, None]
            )
            parts.append(out)
            z.append(lse.masked_fill(blind[m], -math.inf) + x.bias[..., m])
        z = torch.stack(z, dim=-1)
        lse = torch.logsumexp(torch.cat([z, x.sink[..., None]], dim=-1), dim=-1)
        mass = torch.exp(z - lse[..., None])
        out = sum(mass[..., m, None].to(case.dtype) * part for m, part in enumerate(parts))
        return out, lse, mass

    return call


def build_merge_runs(case: Case, x: Inputs) -> Call:
    """One causal square and one unmasked rectangle per run of keys: no mask anywhere, but tied to long runs."""
    assert case.rows in (1, case.num_keys)
    pieces, start = [], 0  # (rows, keys, modality, is_causal)
    for modality, length in case.runs:
        keys = slice(start, start + length)
        if case.rows == 1:
            pieces.append((slice(0, 1), keys, modality, False))
        else:
            pieces.append((keys, keys, modality, True))
            if keys.stop < case.rows:
                pieces.append((slice(keys.stop, case.rows), keys, modality, False))
        start += length

    def call():
        results = [
            _plain_with_lse(x.query[:, :, rows], x.key[:, :, keys], x.value[:, :, keys], is_causal=is_causal)
            for rows, keys, _, is_causal in pieces
        ]
        z = x.sink.new_full((*x.sink.shape, len(pieces)), -math.inf)
        for p, ((rows, _, modality, _), (_, lse)) in enumerate(zip(pieces, results, strict=True)):
            z[:, :, rows, p] = lse + x.bias[:, :, rows, modality]
        lse = torch.logsumexp(torch.cat([z, x.sink[..., None]], dim=-1), dim=-1)
        share = torch.exp(z - lse[..., None])
        out, mass = torch.zeros_like(x.query), torch.zeros_like(x.bias)
        for p, ((rows, _, modality, _), (part, _)) in enumerate(zip(pieces, results, strict=True)):
            out[:, :, rows] += share[:, :, rows, p, None].to(case.dtype) * part
            mass[..., modality] += share[..., p]
        return out, lse, mass

    return call


def build_eager(case: Case, x: Inputs) -> Call:
    causal, group = causal_mask(case), case.query_heads // case.key_heads
    index = x.key_modality.long()[:, None, None, :].expand(-1, case.query_heads, case.rows, -1)
    onehot = F.one_hot(x.key_modality.long(), case.num_modalities).to(x.bias.dtype)[:, None]

    def call():
        key, value = x.key.repeat_interleave(group, dim=1), x.value.repeat_interleave(group, dim=1)
        score = (x.query @ key.transpose(-1, -2)) * case.head_dim**-0.5 + causal
        score = torch.cat([score + x.bias.gather(-1, index), x.sink[..., None]], dim=-1)
        lse = torch.logsumexp(score, dim=-1)
        weight = torch.exp(score[..., :-1] - lse[..., None])
        return weight.to(case.dtype) @ value, lse, weight @ onehot

    return call


ALL = ("out", "lse", "mass")
_NO_LSE_GRADIENT = "torch's attention gives its lse no gradient"

OURS = [
    Contender("ours", "bias, sink, lse and mass", build_ours, ALL, ours=True),
    Contender("ours-plain", "bias and sink, only out returned", build_ours_plain, ours=True),
]
PEERS = [
    Contender("sdpa", "torch SDPA, causal, nothing else: less work", build_sdpa, leaves=TOKENS),
    Contender("sdpa-mask", "SDPA, dense mask made from bias and sink", build_sdpa_mask, matrices=(4, 8), copies=1),
    Contender(
        "sdpa-mask-given",
        "the same, mask made beforehand: less work",
        build_sdpa_mask_given,
        matrices=(4, 8),
        copies=1,
        no_train="a mask made beforehand has no gradient",
    ),
    Contender(
        "flex",
        "compiled FlexAttention, score_mod, no lse or mass",
        build_flex,
        copies=1,
        no_train="FlexAttention has no backward on CPU",
    ),
    Contender(
        "merge",
        "one SDPA per modality with a mask, merged",
        build_merge,
        ALL,
        copies=1,
        no_train=_NO_LSE_GRADIENT,
    ),
    Contender(
        "merge-runs",
        "two SDPA per run without a mask, merged",
        build_merge_runs,
        ALL,
        no_train=_NO_LSE_GRADIENT,
    ),
    Contender(
        "onehot-v",
        "sdpa-mask with one-hot columns in V: out and mass",
        build_onehot_v,
        ("out", "mass"),
        matrices=(4, 8),
        copies=2,
    ),
    Contender("eager", "dense PyTorch: everything", build_eager, ALL, matrices=(6, 9), copies=4),
]

# On a GPU: plain attention by every library, FlexAttention as it is there, and the same as above for the rest.
CUDA_PEERS = [
    Contender("ours-flex", "the same on FlexAttention, a call for each modality", build_ours_on_flex, ALL),
    Contender(
        "cudnn",
        "cuDNN through SDPA, causal, nothing else: less work",
        build_backend(SDPBackend.CUDNN_ATTENTION),
        leaves=TOKENS,
    ),
    Contender(
        "flash",
        "FlashAttention 2 through SDPA, causal, nothing else: less work",
        build_backend(SDPBackend.FLASH_ATTENTION),
        leaves=TOKENS,
    ),
    Contender("fa4", "flash-attn-4, causal, nothing else: less work", build_fa4, leaves=TOKENS),
    Contender("flex", "compiled FlexAttention, score_mod, sink by its lse: no mass", build_flex_lse("AUTO"), ALL[:2]),
    Contender("flex-fa4", "the same through flash-attn-4", build_flex_lse("FLASH"), ALL[:2]),
    *(peer for peer in PEERS if peer.name not in ("sdpa", "flex")),
]
