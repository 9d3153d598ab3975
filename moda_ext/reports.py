"""What the reports share: an HTML file that needs nothing else, no script and no network, and the look of figures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "chart", "escape", "legend_below", "new_figure", "write_page"]

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e5e5e5; }
th:first-child, td:first-child { text-align: left; } .null { color: #777; }
.note { background: #fff6e0; border-left: 4px solid #e69f00; padding: .5rem 1rem; }
details { margin: .7rem 0; } summary { cursor: pointer; }
"""
# Okabe and Ito: safe for colour-blind eyes
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def new_figure(columns: int, width: float, height: float = 3.5) -> tuple[Figure, list[Axes]]:
    """A figure with one row of axes; sizes in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib, which is not installed; install it with: pip install 'moda_ext[diagnostics]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False).flatten().tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend_below(axis: Axes, columns: int = 1) -> None:
    """A legend under an axis."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, frameon=False, fontsize=8)


def chart(figure: Figure, caption: str, form: str = "svg") -> str:
    """A figure as HTML with its caption, drawn as ``"svg"`` or ``"png"``."""
    file = io.BytesIO()
    figure.savefig(file, format=form, dpi=110, metadata={"Date": None} if form == "svg" else None)
    kind = "image/svg+xml" if form == "svg" else "image/png"
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img src="data:{kind};base64,{data}" alt="{escape(caption)}"><figcaption>{escape(caption)}'
        "</figcaption></figure>"
    )


def write_page(path: str | Path, title: str, parts: Sequence[str]) -> None:
    """Writes an HTML page.

    Args:
        path: of the file.
        title: plain text.
        parts: of its body, HTML.
    """
    document = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    Path(path).write_text(document, encoding="utf-8")


def escape(value: str) -> str:
    """Text as HTML."""
    return html.escape(value)
