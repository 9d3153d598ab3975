"""A photograph and a sentence through one modular attention layer: ``python -m moda_ext.demo [--out moda_demo.png]``.

The layer has the size of one in LLaVA-NeXT-8B (embedding 4096, 32 query heads, 8 key/value heads of size 128, RoPE).
There are no trained weights in it. So that the picture shows something one can check by eye, tokens are embedded by
colour:

- a patch becomes random Fourier features of its mean colour, so the product of two patch embeddings falls with their
  colour difference (a Gaussian kernel of width COLOUR_WIDTH in RGB);
- a word that names a CSS colour ("steelblue") is embedded as a patch of that colour, any other word at random;
- projections are random; the query projection is mostly the key projection, so a token looks at its like.

What is printed and drawn therefore shows what the operators compute and what prior, pseudo scores and aligner do to it.
The aligner is trained here for a few steps, on this one sequence, to move attention. None of it is a statement about a
trained model.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import moda_ext
from moda_ext import reference
from moda_ext.alignment import DuplexAligner, modality_gram
from moda_ext.attention import modular_attention, pseudo_score_sink
from moda_ext.diagnostics import measures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure
    from matplotlib.gridspec import SubplotSpec

Step = TypeVar("Step")


class Progress(Protocol):
    """Shows how far a loop is."""

    def __call__(self, steps: Sequence[Step], description: str) -> Iterable[Step]: ...


TEXT, VISION = 0, 1
EMBEDDING, QUERY_HEADS, KEY_HEADS, HEAD_DIM = 4096, 32, 8, 128  # LLaVA-NeXT-8B
ROPE_BASE = 500_000.0
GRID = 24  # 24 x 24 = 576 patches, as a 336-pixel image in CLIP's 14-pixel patches
COLOUR_WIDTH = 0.15
QUERY_LIKE_KEY, QUERY_OWN = 0.65, 0.3  # how much of the query projection is the key projection, how much its own

BEFORE = "This is a photograph of Rear Admiral Grace Hopper in uniform :"
AFTER = "Which parts of the picture are steelblue , which are darkred and which are black ?"
SHOWN = ("steelblue", "darkred", "black")

UNIFORM = "uniform attention"
PRIOR = 1.5  # added to the scores between modalities: exp(1.5) = 4.5 times the weight
TOLERANCE = 1e-5  # of the largest value; float32 rounds at 6e-8, and a backward pass adds large numbers that cancel
DECAY, BASE, MAX_LENGTH = 0.5, 5.0, 8192  # pseudo scores; the paper's base for training from scratch is 0
ALIGNER, TARGET, STEPS, LEARNING_RATE = "aligner, trained here", 0.5, 24, 0.01  # text rows shall give the picture half
CROPS = 2  # LLaVA-NeXT sees the picture once whole and once in 2 x 2 crops: 5 x 576 patches


# Tokens ---------------------------------------------------------------------------------------------------------------
@dataclass
class Tokens:
    """One sequence [text][image][text]."""

    photo: Tensor  # (S, S, 3) in [0, 1]
    colours: Tensor  # (patches, 3): mean colour of each patch
    before: list[str]
    after: list[str]
    embedding: Tensor  # (1, N, EMBEDDING)
    modality: Tensor  # (1, N) int32

    @property
    def after_start(self) -> int:
        return len(self.before) + len(self.colours)

    def row_of(self, word: str) -> int:
        return self.after_start + self.after.index(word)


def load_photo(size: int = 14 * GRID) -> Tensor:
    """The square around the face of matplotlib's sample photograph, resized to ``size`` x ``size``."""
    import numpy as np
    from matplotlib import cbook, image

    file = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    pixels = torch.from_numpy(np.array(image.imread(file, format="jpg"))).float() / 255
    width = pixels.shape[1]
    square = pixels[20 : 20 + width].permute(2, 0, 1)[None]
    return F.interpolate(square, size=(size, size), mode="area")[0].permute(1, 2, 0)


def crop_colours() -> Tensor:
    """(CROPS^2 * 576, 3): mean colours of the patches of the crops, one crop after the other."""
    fine = F.adaptive_avg_pool2d(load_photo(14 * GRID * CROPS).permute(2, 0, 1), GRID * CROPS)
    return fine.unflatten(1, (CROPS, GRID)).unflatten(3, (CROPS, GRID)).permute(1, 3, 2, 4, 0).reshape(-1, 3)


def make_tokens(with_crops: bool = False) -> Tokens:
    from matplotlib.colors import CSS4_COLORS, to_rgb

    photo = load_photo()
    colours = F.adaptive_avg_pool2d(photo.permute(2, 0, 1), GRID).flatten(1).T  # (576, 3)
    colours = torch.cat([colours, crop_colours()]) if with_crops else colours
    generator = torch.Generator().manual_seed(0)
    frequency = torch.randn(3, EMBEDDING, generator=generator) / COLOUR_WIDTH
    phase = 2 * torch.pi * torch.rand(EMBEDDING, generator=generator)

    def embed_colour(rgb: Tensor) -> Tensor:
        return 2**0.5 * torch.cos(rgb @ frequency + phase)

    def embed_word(word: str) -> Tensor:
        if word in CSS4_COLORS:
            return embed_colour(torch.tensor(to_rgb(word)))
        return torch.randn(EMBEDDING, generator=torch.Generator().manual_seed(zlib.crc32(word.lower().encode())))

    before, after = (re.findall(r"\w+|[^\w\s]", text) for text in (BEFORE, AFTER))
    rows = [*map(embed_word, before), *embed_colour(colours), *map(embed_word, after)]
    modality = [TEXT] * len(before) + [VISION] * len(colours) + [TEXT] * len(after)
    return Tokens(
        photo, colours, before, after, torch.stack(rows)[None], torch.tensor(modality, dtype=torch.int32)[None]
    )


# The layer ------------------------------------------------------------------------------------------------------------
def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of (B, N, H, D)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * ROPE_BASE ** (-torch.arange(half) / half)  # (N, D / 2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x.split(half, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def project(embedding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query (1, Hq, N, D), key and value (1, Hkv, N, D) with RoPE, from seeded random projections."""
    generator = torch.Generator().manual_seed(1)

    def weight(heads: int) -> Tensor:
        return torch.randn(EMBEDDING, heads, HEAD_DIM, generator=generator) * EMBEDDING**-0.5

    to_key, to_value = weight(KEY_HEADS), weight(KEY_HEADS)
    shared = to_key.repeat_interleave(QUERY_HEADS // KEY_HEADS, dim=1)
    to_query = QUERY_LIKE_KEY * shared + QUERY_OWN * weight(QUERY_HEADS)
    query, key, value = (torch.einsum("bne,ehd->bnhd", embedding, w) for w in (to_query, to_key, to_value))
    return rotate(query).transpose(1, 2), rotate(key).transpose(1, 2), value.transpose(1, 2)


@dataclass
class Setting:
    """One row of the mass table: what is added to plain attention."""

    name: str
    bias: Tensor | None = None  # broadcastable to (B, Hq, N, M)
    sink: Tensor | None = None  # broadcastable to (B, Hq, N)
    views: Tensor | None = None  # (M, B, Hq, N, D): in place of the query


def make_settings(modality: Tensor) -> list[Setting]:
    n = modality.shape[1]
    cross = modality[0, :, None] != torch.arange(2)  # (N, M): is this key modality the other one?
    prior = PRIOR * cross.float()[None, None]
    sink = pseudo_score_sink(n, MAX_LENGTH, DECAY, base=BASE)[None, None]
    return [Setting("plain"), Setting("prior", prior), Setting("prior + pseudo scores", prior, sink)]


class Layer:
    """Projected tokens, and the attention over them in each setting."""

    def __init__(self, tokens: Tokens):
        self.modality = tokens.modality
        self.query, self.key, self.value = project(tokens.embedding)

    def query_of(self, setting: Setting) -> Tensor:
        return self.query if setting.views is None else setting.views

    def attend(
        self,
        setting: Setting,
        function: Callable = modular_attention,
        dtype: torch.dtype = torch.float32,
        leaves: Sequence[Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(out, lse, mass) of ``function`` in ``dtype``; ``leaves`` replaces query, key, value, bias, sink."""
        if leaves is None:
            leaves = [self.query_of(setting), self.key, self.value, setting.bias, setting.sink]
        query, key, value, bias, sink = (None if t is None else t.to(dtype) for t in leaves)
        return function(
            query,
            key,
            value,
            self.modality,
            modality_bias=bias,
            sink=sink,
            is_causal=True,
            return_lse=True,
            return_mass=True,
        )

    def attention_of_rows(self, setting: Setting, rows: list[int]) -> Tensor:
        """Attention weights of single rows over all keys, averaged over heads: (len(rows), N).

        No N x N matrix: dv_j = sum_i p_ij dO_i, so an incoming gradient that is 1 in channel c of row r, and 0
        elsewhere, leaves p_rj, summed over the query heads of a group, in channel c of the gradient of value j.
        """
        value = self.value.detach().requires_grad_()
        out, _, _ = self.attend(setting, leaves=[self.query_of(setting), self.key, value, setting.bias, setting.sink])
        upstream = torch.zeros_like(out)
        for channel, row in enumerate(rows):
            upstream[:, :, row, channel] = 1.0
        (grad,) = torch.autograd.grad(out, value, upstream)  # (1, Hkv, N, D)
        return grad[0, :, :, : len(rows)].sum(dim=0).T / QUERY_HEADS


def train_aligner(layer: Layer, rows: slice, progress: Progress) -> tuple[list[Setting], list[float]]:
    """A new aligner, and the same after a few steps: its loss asks that ``rows`` give the picture TARGET on average.

    Returns both as settings, and the share of the picture before each step and after the last.
    """
    torch.manual_seed(3)
    aligner = DuplexAligner(HEAD_DIM)
    optimizer = torch.optim.Adam(aligner.parameters(), lr=LEARNING_RATE)

    def views() -> Tensor:
        return aligner(layer.query, layer.key, layer.modality, layer.modality)

    def share() -> Tensor:
        return layer.attend(Setting("", views=views()))[2][0, :, rows, VISION].mean()

    with torch.no_grad():
        new = views()
    shares = []
    for _ in progress(range(STEPS), "training the aligner"):
        now = share()
        optimizer.zero_grad()
        (now - TARGET).square().backward()
        optimizer.step()
        shares.append(now.item())
    with torch.no_grad():
        shares.append(share().item())
        return [Setting("new aligner", views=new), Setting(ALIGNER, views=views())], shares


@dataclass
class Spectrum:
    """Of one modality's trace-normalised Gram: eigenvalues, and those of as many keys without any structure."""

    name: str
    keys: int
    eigenvalues: Tensor  # (D,), falling, mean over the key heads; they add up to 1
    null: Tensor  # (D,): the same for random keys

    @staticmethod
    def dimensions(eigenvalues: Tensor) -> float:
        """How many dimensions of equal weight would be as spread out: 1 / sum of squares."""
        return 1 / eigenvalues.square().sum().item()


def make_spectra(layer: Layer) -> list[Spectrum]:
    generator = torch.Generator().manual_seed(4)
    random = torch.randn(layer.key.shape, generator=generator)
    grams = [modality_gram(key, layer.modality).double() for key in (layer.key, random)]  # (1, Hkv, M, D, D)
    found, null = (torch.linalg.eigvalsh(gram)[0].mean(dim=0).flip(-1) for gram in grams)  # (M, D)
    counts = [int((layer.modality == m).sum()) for m in (TEXT, VISION)]
    names = ("text", "vision")
    return [Spectrum(name, *rest) for name, *rest in zip(names, counts, found, null, strict=True)]


def uniform_mass(modality: Tensor) -> Tensor:
    """(N, M): the mass of uniform attention over the visible keys."""
    return measures.uniform_mass(measures.key_counts(modality, modality)[0])


# Checks and figures ---------------------------------------------------------------------------------------------------
NAMES = ("out", "lse", "mass", "grad query", "grad key", "grad value", "grad bias", "grad sink")


def outputs_and_gradients(layer: Layer, setting: Setting, function: Callable, dtype: torch.dtype) -> list[Tensor]:
    """Everything the operator computes, in NAMES' order, for one fixed random incoming gradient."""
    assert setting.bias is not None and setting.sink is not None, "everything is on"
    generator = torch.Generator().manual_seed(2)
    rows = (1, QUERY_HEADS, layer.query.shape[2])
    bias, sink = setting.bias.expand(*rows, 2), setting.sink.expand(*rows)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (layer.query, layer.key, layer.value, bias, sink)]
    results = layer.attend(setting, function, dtype, leaves)
    upstream = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    return [t.detach().double() for t in (*results, *torch.autograd.grad(results, leaves, upstream))]


def print_check(layer: Layer, setting: Setting, progress: Progress) -> None:
    """Raises SystemExit if anything is further from float64 than TOLERANCE of its largest value."""
    by_reference: Callable = reference.modular_attention
    by_operator: Callable = modular_attention
    runs = [(by_reference, torch.float64), (by_reference, torch.float32), (by_operator, torch.float32)]
    exact, dense, ours = (outputs_and_gradients(layer, setting, *run) for run in progress(runs, "checking"))
    print("\nCheck against the float64 reference: largest error over largest value")
    print(f"  {'':12}{'modular_attention':>20}{'dense float32':>16}{'tolerance':>12}")
    wrong = []
    for name, a, b, c in zip(NAMES, ours, dense, exact, strict=True):
        error, dense_error = ((x - c).abs().max().item() / c.abs().max().item() for x in (a, b))
        print(f"  {name:12}{error:20.1e}{dense_error:16.1e}{TOLERANCE:12.0e}")
        wrong += [] if error <= TOLERANCE else [name]
    if wrong:
        raise SystemExit(f"moda_ext.demo: {', '.join(wrong)} beyond tolerance")


def print_mass(tokens: Tokens, masses: dict[str, Tensor]) -> None:
    """``masses``: name -> (N, M). Rows before the image see no patch and are left out."""
    rows = {"text rows": slice(tokens.after_start, None), "vision rows": slice(len(tokens.before), tokens.after_start)}
    print("\nWhere attention goes, mean over heads and over the rows that see both modalities, in %")
    print(f"  {'':26}" + "".join(f"{'from ' + name:>26}" for name in rows))
    print(f"  {'':26}" + "".join(f"{'text':>10}{'vision':>8}{'pseudo':>8}" for _ in rows))
    for name, mass in masses.items():
        line = f"  {name:26}"
        for part in rows.values():
            text, vision = (100 * mass[part].mean(dim=0)).tolist()
            line += f"{text:10.1f}{vision:8.1f}{abs(100 - text - vision):8.1f}"
        print(line)


def print_words(tokens: Tokens, maps: dict[str, Tensor]) -> None:
    """How far each shown word finds the patches of its colour; the null is the share of such patches."""
    from matplotlib.colors import to_rgb

    print("\nOf the attention that a word gives to the picture: share on the patches of its colour, in %")
    print(f"  {'':26}" + "".join(f"{word:>12}" for word in SHOWN))
    near = [(tokens.colours - torch.tensor(to_rgb(word))).norm(dim=1) < 1.2 * COLOUR_WIDTH for word in SHOWN]
    print(f"  {UNIFORM:26}" + "".join(f"{100 * part.float().mean():12.1f}" for part in near))
    for name, weights in maps.items():
        shares = [100 * w[part].sum() / w.sum() for w, part in zip(weights, near, strict=True)]
        print(f"  {name:26}" + "".join(f"{share:12.1f}" for share in shares))


def print_aligner(start: Setting, layer: Layer, shares: list[float], spectra: list[Spectrum]) -> None:
    assert start.views is not None, "of an aligner"
    same = all(torch.equal(view, layer.query) for view in start.views)
    identity = "the identity, bit for bit" if same else "NOT THE IDENTITY"
    print(
        f"\nAligner (causal scope, trace-normalised Grams, rank 16): a new one is {identity}. {STEPS} Adam\n"
        f"steps on this one sequence, with a loss that asks that the question give the picture {100 * TARGET:.0f} %,\n"
        f"take that from {100 * shares[0]:.1f} to {100 * shares[-1]:.1f} %."
    )
    print(
        "\nThe Gram matrices of the keys at LLaVA-NeXT's size (the picture whole and in 4 crops), mean over key heads"
    )
    print(f"  {'':10}{'keys':>6}{'largest eigenvalue':>22}{'dimensions':>12}{'of random keys':>18}")
    for s in spectra:
        sizes = (s.dimensions(s.eigenvalues), s.dimensions(s.null))
        print(f"  {s.name:10}{s.keys:6}{s.eigenvalues[0]:22.3f}{sizes[0]:12.1f}{sizes[1]:18.1f}")
    print("  Eigenvalues add up to 1; dimensions = 1 / sum of squares; the head size is the most.")


def print_times(layer: Layer, setting: Setting, progress: Progress) -> None:
    """Ours with everything on, beside SDPA without any of it and beside the dense way to get the same."""
    assert setting.bias is not None and setting.sink is not None, "everything is on"
    n = layer.query.shape[2]
    rows = (1, QUERY_HEADS, n)
    leaves = [layer.query, layer.key, layer.value, setting.bias.expand(*rows, 2), setting.sink.expand(*rows)]
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in leaves]
    query, key, value, bias, sink = leaves
    is_vision = (layer.modality == VISION)[:, None, None]
    causal = torch.zeros(n, n).masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    onehot = F.pad(F.one_hot(layer.modality.long(), 2).float(), (0, 6))[:, None].expand(-1, KEY_HEADS, -1, -1)

    def ours() -> tuple[Tensor, ...]:
        return layer.attend(setting, leaves=leaves)[::2]

    def sdpa() -> tuple[Tensor, ...]:
        return (F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),)

    def dense() -> tuple[Tensor, ...]:
        mask = torch.where(is_vision, bias[..., 1:], bias[..., :1]) + causal
        mask = torch.cat([mask, sink[..., None]], dim=-1)
        q, k = F.pad(query, (0, 8)), F.pad(key, (0, 8, 0, 1))  # equal head sizes: the only fast kernel wants them
        v = F.pad(torch.cat([value, onehot], dim=-1), (0, 0, 0, 1))
        both = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=HEAD_DIM**-0.5)
        return both[..., :HEAD_DIM], both[..., HEAD_DIM : HEAD_DIM + 2]

    calls = {"modular_attention": ours, "torch SDPA, causal only": sdpa, "SDPA, dense mask, one-hot V": dense}

    def forward(call: Callable[[], tuple[Tensor, ...]]) -> None:
        with torch.no_grad():
            call()

    def train(call: Callable[[], tuple[Tensor, ...]]) -> None:
        results = call()
        torch.autograd.grad(results, leaves[: 3 if call is sdpa else 5], [torch.ones_like(r) for r in results])

    print(f"\nTime of this attention (N = {n}, {torch.get_num_threads()} threads), median in ms")
    print(f"  {'':28}{'forward':>10}{'forward + backward':>22}")
    seconds: dict[tuple[str, Callable], list[float]] = {}
    for step in progress(range(8), "timing"):
        for run in (forward, train):
            for name, call in calls.items():
                start = time.perf_counter()
                run(call)
                if step:  # the first round is warm-up
                    seconds.setdefault((name, run), []).append(time.perf_counter() - start)
    for name in calls:
        print(
            f"  {name:28}"
            + "".join(
                f"{1e3 * statistics.median(seconds[name, run]):{w}.1f}" for run, w in ((forward, 10), (train, 22))
            )
        )


# The picture ----------------------------------------------------------------------------------------------------------
LINE_COLOURS = {
    UNIFORM: "0.55",
    "plain": "#0072b2",
    "prior": "#d55e00",
    "prior + pseudo scores": "#009e73",
    ALIGNER: "#cc79a7",
}
SPECTRUM_COLOURS = ("#0072b2", "#d55e00")


CAPTION = f"""\
Weights are random, not trained. A patch is embedded by its mean colour, a colour word by that colour, any other
word at random; a token looks at its like. The prior adds {PRIOR} to every score between text and picture: more
attention crosses over, and inside the picture its pattern stays (in each head). Pseudo scores take a part of each
row's attention and give it to no token. Uniform attention is the null: every visible token weighs the same. Mean
over {QUERY_HEADS} heads; the weight of each patch is read from the operator's gradient, without an N x N matrix. The
stripes come from rotary positions. The aligner starts as the identity and is trained for {STEPS} steps on this one
sequence; its loss asks that the words of the question give, on average, half of their attention to the picture."""


def draw_maps(figure: SubFigure, tokens: Tokens, maps: dict[str, Tensor]) -> None:
    """The photograph, and over it what each word looks at in each setting, on one colour scale."""
    import matplotlib.pyplot as plt

    grid = figure.add_gridspec(2, 4)
    square = (0, GRID, GRID, 0)

    def image(cell: SubplotSpec, picture: Tensor, title: str) -> Axes:
        axes = figure.add_subplot(cell)
        axes.imshow(picture.numpy(), extent=square)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=12)
        return axes

    axes = image(grid[0, 0], tokens.photo, f"The photograph,\ncut into {GRID} x {GRID} patches")
    for line in range(1, GRID):
        axes.axhline(line, color="white", lw=0.4, alpha=0.6)
        axes.axvline(line, color="white", lw=0.4, alpha=0.6)
    image(grid[1, 0], tokens.colours.view(GRID, GRID, 3), "What the layer gets of it:\none colour for each patch")

    grey = (0.5 + 0.5 * tokens.photo.mean(dim=-1, keepdim=True)).expand(-1, -1, 3)
    top = torch.cat(list(maps.values())).quantile(0.995).item()
    overlays, colour = [], plt.get_cmap("YlOrRd")
    for line, (name, weights) in enumerate(maps.items()):
        for column, word in enumerate(SHOWN):
            weight = weights[column].view(GRID, GRID)
            title = f"the word “{word}”, {name}\n{weight.sum():.0f} % of its attention is here"
            overlays.append(image(grid[line, column + 1], grey, title))
            opacity = (weight / top).clamp(0, 1).sqrt().numpy()
            overlays[-1].imshow(weight.numpy(), cmap=colour, vmin=0, vmax=top, alpha=opacity, extent=square)
    scale = plt.cm.ScalarMappable(plt.Normalize(0, top), colour)
    bar = figure.colorbar(scale, ax=overlays, shrink=0.6, pad=0.02, extend="max")
    bar.set_label("attention on one patch, % of the word's total")


def draw_curves(figure: SubFigure, tokens: Tokens, masses: dict[str, Tensor]) -> None:
    """Mass on the other modality, by row: patches on the left, words of the question on the right."""
    left, right = figure.subplots(1, 2)
    for name, mass in masses.items():
        style = {"color": LINE_COLOURS[name], "lw": 1.8}
        style |= {"ls": "--"} if name == UNIFORM else {"marker": "o", "ms": 5}
        patches = mass[len(tokens.before) : tokens.after_start, TEXT].view(GRID, GRID).mean(dim=1)
        left.plot(range(1, GRID + 1), 100 * patches.numpy(), **style)
        right.plot(100 * mass[tokens.after_start :, VISION].numpy(), label=name, **style)
    left.set_title("What patches give to the text before the picture")
    left.set_xlabel("row of the picture, from the top (mean of its 24 patches)")
    left.set(ylabel="% of attention on text", ylim=(0, 25))
    right.set_title("What each word of the question gives to the picture")
    right.set_xticks(range(len(tokens.after)), tokens.after, rotation=60, ha="right", rotation_mode="anchor")
    right.set(ylabel="% of attention on the picture", ylim=(0, 100))
    figure.legend(loc="outside upper center", ncol=5, frameon=False)


def draw_aligner(figure: SubFigure, spectra: list[Spectrum], shares: list[float]) -> None:
    """Eigenvalues of the Gram of each modality, and what training the aligner does to the mass."""
    left, right = figure.subplots(1, 2)
    index = range(1, HEAD_DIM + 1)
    for s, colour in zip(spectra, SPECTRUM_COLOURS, strict=True):
        left.plot(index, s.eigenvalues, color=colour, lw=1.8, label=f"{s.keys} {s.name} keys")
        left.plot(index, s.null, color=colour, lw=1.4, ls=":", label=f"{s.keys} random keys")
    left.set(yscale="log", ylim=(1e-5, 1), xlim=(0, HEAD_DIM + 1), ylabel="eigenvalue (they add up to 1)")
    left.set_xlabel("eigenvalues of the Gram of the keys, mean over key heads")
    left.set_title("The space of each modality: spectrum of its Gram,\npicture whole and in 4 crops, as in LLaVA-NeXT")
    left.legend(frameon=False)
    right.axhline(100 * TARGET, color="0.55", ls="--", lw=1.4)
    right.text(STEPS, 100 * TARGET + 6, "what the loss asks for", color="0.35", ha="right")
    right.plot([100 * share for share in shares], color=LINE_COLOURS[ALIGNER], marker="o", ms=5, lw=1.8)
    right.text(0, 100 * shares[0] - 4, "a new aligner\nchanges nothing", color="0.35", va="top")
    right.set_title("Training the aligner moves attention\nbetween the modalities")
    right.set(ylim=(0, 100), ylabel="% of attention on the picture", xlabel="step; mean over words of the question")


def save_picture(
    tokens: Tokens,
    maps: dict[str, Tensor],
    masses: dict[str, Tensor],
    spectra: list[Spectrum],
    shares: list[float],
    path: str,
) -> None:
    """``maps``: setting -> (words, patches) attention in %; ``masses``: name -> (N, M)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(14, 18.5), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.05))
    figure.suptitle("One attention layer reads a photograph and a question about it", fontsize=18, weight="bold")
    upper, middle, lower = figure.subfigures(3, 1, squeeze=False, height_ratios=[2, 1.15, 1.05])[:, 0]
    draw_maps(upper, tokens, maps)
    draw_curves(middle, tokens, masses)
    draw_aligner(lower, spectra, shares)
    figure.supxlabel(CAPTION, fontsize=11, color="0.25")
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moda_ext.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="moda_demo.png", help="where the picture goes (default moda_demo.png)")
    args = parser.parse_args(argv)
    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            f"moda_ext.demo: {error.name} is missing. Fix: python -m pip install 'moda_ext[demo]'"
        ) from error
    try:
        from tqdm import tqdm
    except ImportError:

        def progress(steps: Sequence[Step], description: str) -> Iterable[Step]:
            return steps
    else:

        def progress(steps: Sequence[Step], description: str) -> Iterable[Step]:
            return tqdm(steps, desc=description, leave=False, disable=None)

    info = moda_ext.info()
    print(f"moda_ext {info['version']}, {info['build']}, instruction set {info['isa'] or '-'}, torch {info['torch']}")
    tokens = make_tokens()
    layer = Layer(tokens)
    settings = make_settings(tokens.modality)
    n = layer.query.shape[2]
    print(
        f"Layer: {n} tokens = {len(tokens.before)} text + {GRID * GRID} patches + {len(tokens.after)} text, embedding "
        f"{EMBEDDING}, {QUERY_HEADS} query heads, {KEY_HEADS} key/value heads, head size {HEAD_DIM}, float32.\n"
        "The weights are random, not trained: a token looks at tokens of its colour, or at the same word; see "
        "help(moda_ext.demo)."
    )
    print_check(layer, settings[-1], progress)
    (new, trained), shares = train_aligner(layer, slice(tokens.after_start, None), progress)
    masses = {UNIFORM: uniform_mass(tokens.modality)}
    for setting in [*settings, new, trained]:
        masses[setting.name] = layer.attend(setting)[2][0].mean(dim=0)
    print_mass(tokens, masses)
    spectra = make_spectra(Layer(make_tokens(with_crops=True)))
    print_aligner(new, layer, shares, spectra)
    del masses[new.name]  # the line of "plain"

    rows = [tokens.row_of(word) for word in SHOWN]
    vision = tokens.modality[0] == VISION
    maps = {s.name: 100 * layer.attention_of_rows(s, rows)[:, vision] for s in [*settings[:2], trained]}
    print_words(tokens, maps)
    del maps[trained.name]
    print_times(layer, settings[-1], progress)
    save_picture(tokens, maps, masses, spectra, shares, args.out)
    print(f"\nPicture: {args.out}")


if __name__ == "__main__":
    main()
