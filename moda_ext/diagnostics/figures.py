"""Figures of a diagnosis, after Fig. 2 and 4 of the paper. Each function returns a ``matplotlib.figure.Figure``.

Nothing is shown or written: ``figure.savefig(path)`` does. Every figure has uniform attention beside the model, dotted,
because a layout alone can look like a deficit. All need matplotlib, in the extra ``moda_ext[diagnostics]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from moda_ext.diagnostics.measures import split_in_thirds
from moda_ext.diagnostics.results import Diagnosis, RowOptions
from moda_ext.reports import COLOURS, legend_below, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator
    from PIL.Image import Image

__all__ = [
    "attention_by_layer",
    "disparity_by_layer",
    "dominance_by_layer",
    "heads",
    "image_attention",
    "similarity",
    "token_scores",
]

STYLES = ("-", "--", "-.", (0, (4, 1, 1, 1)))  # one for each diagnosis
HATCHES = ("", "///", "...", "xxx")


def token_scores(diagnoses: Diagnosis | Sequence[Diagnosis], *, rows: str = "both", first_token: bool = True) -> Figure:
    """Fig. 2a: the mean weight that a token of each modality receives, bars of the mean over layers.

    Args:
        diagnoses: one or several, over the same modalities.
        rows, first_token: as in :meth:`moda_ext.diagnostics.Diagnosis.figure`.

    Raises:
        ValueError: no diagnosis, or modalities that differ.
    """
    diagnoses = _sequence(diagnoses)
    figure, axes = new_figure(1, width=5.2)
    axis = axes[0]
    width = 0.8 / len(diagnoses)
    names = diagnoses[0].modalities
    for k, diagnosis in enumerate(diagnoses):
        score, null = (
            diagnosis.figure("score", rows=rows, first_token=first_token, null=null).mean(dim=0)
            for null in (False, True)
        )
        place = torch.arange(len(names)) + (k - (len(diagnoses) - 1) / 2) * width
        colours = [_colour(m) for m in range(len(names))]
        axis.bar(
            place.tolist(),
            score.tolist(),
            0.92 * width,
            color=colours,
            hatch=HATCHES[k % len(HATCHES)],
            edgecolor="white",
        )
        for x, y in zip(place.tolist(), null.tolist(), strict=True):
            axis.plot([x - width / 2, x + width / 2], [y, y], color="0.2", linestyle=":", linewidth=1.6)
    handles: list[Patch | Line2D] = [_patch("0.6", d.name, HATCHES[k % len(HATCHES)]) for k, d in enumerate(diagnoses)]
    handles.append(_line("0.2", ":", "uniform attention"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2), frameon=False, fontsize=8)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("mean weight a token receives")
    axis.set_title("Score of a token, by modality")
    return figure


def attention_by_layer(diagnosis: Diagnosis, *, rows: str = "both", first_token: bool = True) -> Figure:
    """Fig. 2c: self weight s_m and cross weight c_m by depth, one panel for each modality, logarithmic.

    Raises:
        ValueError: an unknown option.
    """
    names = diagnosis.modalities
    figure, axes = new_figure(len(names), width=4.2 * len(names))
    for m, (axis, name) in enumerate(zip(axes, names, strict=True)):
        options: RowOptions = {"rows": rows, "first_token": first_token}
        for measure, style, label in (("self", "-", f"{name} to {name}"), ("cross", "--", f"{name} to others")):
            for null in (False, True):
                values = diagnosis.figure(measure, **options, null=null)[:, m]
                if values.isnan().all():
                    continue
                kwargs: dict[str, Any] = (
                    {"color": "0.5", "linestyle": ":"} if null else {"color": _colour(m), "linestyle": style}
                )
                marker = ("o" if measure == "self" else "s") if not null else ("^" if measure == "self" else "v")
                text = f"{label}, uniform" if null else label
                axis.plot(diagnosis.layer_ids, values.tolist(), marker=marker, markersize=3.5, label=text, **kwargs)
        difference = diagnosis.summary(**options)["avg_diff"][name]
        if difference == difference:
            axis.set_title(f"{name}: AvgDiff {100 * difference:.1f} %")
            axis.set_yscale("log")
            legend_below(axis, columns=2)
        else:
            axis.set_title(f"{name}: not defined in this layout")
        axis.set_xlabel("layer")
        _integer_ticks(axis)
    axes[0].set_ylabel("mean weight of a pair")
    return figure


def disparity_by_layer(
    diagnoses: Diagnosis | Sequence[Diagnosis], *, rows: str = "both", first_token: bool = True
) -> Figure:
    """Fig. 4: disparity by depth, a panel for each modality, several models in one picture; AvgDiff in the legend.

    Raises:
        ValueError: no diagnosis, or modalities that differ.
    """
    diagnoses = _sequence(diagnoses)
    names = diagnoses[0].modalities
    figure, axes = new_figure(len(names), width=4.2 * len(names))
    for m, (axis, name) in enumerate(zip(axes, names, strict=True)):
        for k, diagnosis in enumerate(diagnoses):
            for null in (False, True):
                values = diagnosis.figure("disparity", rows=rows, first_token=first_token, null=null)[:, m]
                if values.isnan().all() or (null and k):
                    continue
                average = f"AvgDiff {100 * values.mean():.1f} %"
                label = f"uniform attention, {average}" if null else f"{diagnosis.name}, {average}"
                style: dict[str, Any] = {"color": "0.5", "linestyle": ":"}
                if not null:
                    style = {"color": _colour(m), "linestyle": STYLES[k % len(STYLES)], "marker": "o"}
                axis.plot(diagnosis.layer_ids, values.tolist(), markersize=3.5, label=label, **style)
        axis.set_title(name)
        axis.set_ylim(-0.02, 1.02)
        axis.set_xlabel("layer")
        _integer_ticks(axis)
        if axis.lines:
            legend_below(axis)
        else:
            axis.text(0.5, 0.5, "not defined in this layout", ha="center", transform=axis.transAxes)
    axes[0].set_ylabel("disparity |s - c| / max(s, c)")
    return figure


def dominance_by_layer(
    diagnoses: Diagnosis | Sequence[Diagnosis], *, rows: str = "generated", first_token: bool = True
) -> Figure:
    """MDI by depth, a panel for each modality but text, logarithmic, with the early, middle and late layers as steps.

    Args:
        diagnoses: one or several, over the same modalities.
        rows, first_token: as in :meth:`moda_ext.diagnostics.Diagnosis.figure`; by default as MDI was published.

    Raises:
        ValueError: no diagnosis, modalities that differ, or an unknown option.
    """
    diagnoses = _sequence(diagnoses)
    names = diagnoses[0].modalities
    options: RowOptions = {"rows": rows, "first_token": first_token}
    figure, axes = new_figure(len(names) - 1, width=5.2 * (len(names) - 1))
    for m, (axis, name) in enumerate(zip(axes, names[1:], strict=True), start=1):
        for k, diagnosis in enumerate(diagnoses):
            values, thirds = diagnosis.figure("mdi", **options)[:, m], diagnosis.thirds("mdi", **options)[:, m]
            if values.isfinite().any():
                style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "linestyle": STYLES[k % len(STYLES)]}
                axis.plot(
                    diagnosis.layer_ids, values.tolist(), marker="o", markersize=3.5, label=diagnosis.name, **style
                )
                for third, value in zip(split_in_thirds(len(values)), thirds.tolist(), strict=True):
                    layers = diagnosis.layer_ids[third]
                    if layers:
                        ends = [layers[0] - 0.4, layers[-1] + 0.4]
                        axis.plot(ends, [value, value], color=style["color"], alpha=0.35, linewidth=5)
        null = diagnoses[0].figure("mdi", **options, null=True)[:, m]
        if axis.lines:
            label = "uniform attention"
            axis.plot(diagnoses[0].layer_ids, null.tolist(), color="0.5", linestyle=":", label=label)
            axis.set_yscale("log")
            legend_below(axis)
        else:
            axis.text(0.5, 0.5, "not defined in this layout", ha="center", transform=axis.transAxes)
        axis.set_title(f"attention of a text token over a {name} token")
        axis.set_xlabel("layer")
        _integer_ticks(axis)
    axes[0].set_ylabel("MDI")
    return figure


def heads(diagnosis: Diagnosis, measure: str = "disparity", *, rows: str = "both", first_token: bool = True) -> Figure:
    """A measure by layer and head, a panel for each modality.

    Raises:
        ValueError: an unknown option, or layers with different numbers of heads.
    """
    values = diagnosis.figure(measure, rows=rows, first_token=first_token, per_head=True)
    names = diagnosis.modalities
    figure, axes = new_figure(len(names), width=4.2 * len(names))
    top = 1.0 if measure == "disparity" else None
    for m, (axis, name) in enumerate(zip(axes, names, strict=True)):
        image = axis.imshow(
            values[:, :, m].numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest"
        )
        axis.set_title(f"{name}: {measure} by head")
        axis.set_xlabel("head")
        axis.set_yticks(range(len(diagnosis.layer_ids)), list(map(str, diagnosis.layer_ids)))
        axis.yaxis.set_major_locator(_integer_locator())
        _integer_ticks(axis)
        figure.colorbar(image, ax=axis)
    axes[0].set_ylabel("layer")
    return figure


def image_attention(
    picture: Tensor | Image, scores: Tensor, grid: tuple[int, int], *, uniform: Tensor | None = None, title: str = ""
) -> Figure:
    """Where text looks in an image: the picture, and the picture under the scores of its tokens.

    Args:
        picture: (height, width, 3), a tensor, or a PIL image.
        scores: (h * w,), the scores of the image's tokens, row by row.
        grid: (h, w).
        uniform: (h * w,), what uniform attention gives: the map then is the ratio, 1 where text looks as often as by
            chance. None: the map is scores over their mean.
        title: above the picture.

    Raises:
        ValueError: a grid that does not have as many cells as there are scores.
    """
    height, width = grid
    if scores.shape != (height * width,):
        raise ValueError(
            f"image_attention: scores must have shape ({height * width},) for a {height} x {width} grid, got "
            f"{tuple(scores.shape)}"
        )
    ratio = (scores / (scores.mean() if uniform is None else uniform)).reshape(height, width)
    figure, axes = new_figure(2, width=8.0)
    for axis in axes:
        axis.imshow(picture.numpy() if isinstance(picture, Tensor) else picture)
        axis.set_axis_off()
    extent = (*axes[1].get_xlim(), *axes[1].get_ylim())
    top = max(2.0, ratio.max().item())
    style: dict[str, Any] = {"cmap": "magma", "alpha": 0.65, "interpolation": "nearest", "vmin": 0, "vmax": top}
    shown = axes[1].imshow(ratio.numpy(), extent=extent, **style)
    axes[0].set_title(title, fontsize=9)
    axes[1].set_title("attention from text, 1 = by chance", fontsize=9)
    figure.colorbar(shown, ax=axes[1], fraction=0.046)
    return figure


def similarity(diagnoses: Diagnosis | Sequence[Diagnosis]) -> Figure:
    """Attention collapse: mean cosine similarity of two tokens by depth.

    Raises:
        ValueError: a diagnosis that was not measured with ``similarity=True``.
    """
    diagnoses = _sequence(diagnoses)
    figure, axes = new_figure(1, width=5.2)
    for k, diagnosis in enumerate(diagnoses):
        if diagnosis.similarity is None:
            raise ValueError(f"similarity: {diagnosis.name} was not measured with AttentionMeter(similarity=True)")
        style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "linestyle": STYLES[k % len(STYLES)]}
        axes[0].plot(
            diagnosis.layer_ids,
            diagnosis.similarity.tolist(),
            marker="o",
            markersize=3.5,
            label=diagnosis.name,
            **style,
        )
    axes[0].set_xlabel("layer")
    axes[0].set_ylabel("mean cosine similarity of tokens")
    axes[0].set_title("Collapse: 1 means that all tokens are alike")
    legend_below(axes[0])
    _integer_ticks(axes[0])
    return figure


def _sequence(diagnoses: Diagnosis | Sequence[Diagnosis]) -> list[Diagnosis]:
    diagnoses = [diagnoses] if isinstance(diagnoses, Diagnosis) else list(diagnoses)
    if not diagnoses:
        raise ValueError("figures: give at least one Diagnosis")
    if any(d.modalities != diagnoses[0].modalities for d in diagnoses):
        raise ValueError(f"figures: the modalities differ: {', '.join(str(d.modalities) for d in diagnoses)}")
    return diagnoses


def _colour(modality: int) -> str:
    return COLOURS[modality % len(COLOURS)]


def _integer_locator() -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _integer_ticks(axis: Axes) -> None:
    axis.xaxis.set_major_locator(_integer_locator())


def _patch(colour: str, label: str, hatch: str) -> Patch:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor="white", hatch=hatch, label=label)


def _line(colour: str, style: Literal[":"], label: str) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=style, label=label)
