"""The report of a diagnosis: one HTML file that needs nothing else, no script and no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from moda_ext.diagnostics import figures
from moda_ext.diagnostics.results import VARIANTS, Diagnosis, RowOptions
from moda_ext.diagnostics.runner import Picture
from moda_ext.reports import chart, escape, write_page

__all__ = ["write_report"]

LABELS = {
    "avg_diff": ("AvgDiff, |s − c| / max(s, c)", "%"),
    "avg_diff_sum": ("AvgDiff, |s − c| / (s + c)", "%"),
    "avg_diff_self": ("AvgDiff, |s − c| / s", "%"),
    "decay": ("slope of log c by layer", ""),
    "self": ("self weight s", ""),
    "cross": ("cross weight c", ""),
    "score": ("weight a token receives", ""),
    "mdi": ("text token / token of this modality (MDI)", ""),
    "aei": ("share of attention / share of tokens (AEI)", ""),
    "sink": ("share that goes to no key", "%"),
}
HOW_TO_READ = (
    "Read every figure beside <em>uniform attention</em>: what it would be if each row spread its attention evenly "
    "over the keys it sees. What uniform attention shows too is a matter of layout, not of the model. Unless it says "
    "otherwise, a figure is about rows that see every modality of their sequence."
)
MEANING = (
    "s and c are the mean attention weights of a pair (row, key) within a modality and across, averaged over heads and "
    "pooled over everything measured; AvgDiff is the mean over layers of their difference, divided as stated. MODA "
    "(arXiv 2507.04635) prints AvgDiff of 57 % (text) and 62 % (vision) for its baseline and 50 % and 41 % with MODA, "
    "without a formula: these are our reading of it. MDI compares the attention of a text token with that of a token "
    "of another modality, AEI a modality's share of attention with its share of tokens, both as text rows see them. As "
    "published (arXiv 2508.10552) they are about rows of generated tokens and keys of the prompt, with rows normalised "
    "over those, in the early, middle and late layers; it prints MDI of 1.58, 10.23 and 17.37 for LLaVA-1.5-7B. Both "
    "depend on how many tokens an image has."
)
ROWS = {
    "both": "rows that see every modality",
    "all": "all rows",
    "generated": "rows of generated tokens, keys of their prompts",
}
DOMINANCE = (
    "MDI of each layer, and of the early, middle and late layers (broad lines): above 1, a text token of the prompt "
    "gets more attention from the generated tokens than a token of the other modality."
)
THIRDS = ("early layers", "middle layers", "late layers")


def write_report(
    path: str | Path,
    diagnoses: Sequence[Diagnosis],
    pictures: Sequence[tuple[str, Picture]] = (),
    notes: Sequence[str] = (),
    versions: dict[str, str] | None = None,
) -> None:
    """Writes the report.

    Args:
        path: of the HTML file.
        diagnoses: one, or several over the same modalities, the first being the one that others are compared with.
        pictures: (model name, picture) pairs.
        notes: sentences for the reader.
        versions: software, for the last line.

    Raises:
        ValueError: no diagnosis, or modalities that differ.
        ImportError: matplotlib is not installed.
    """
    charts = [
        (
            figures.disparity_by_layer(diagnoses),
            "Disparity of each layer: 0 when a pair within a modality and a pair across get the same weight, 1 when "
            "one of them gets all (as Fig. 4 of the paper).",
        ),
        (
            figures.token_scores(diagnoses),
            "The weight that one token of each modality receives from a row that sees it (as Fig. 2a).",
        ),
        *(
            (figures.attention_by_layer(d), f"{d.name}: weights within and across modalities by depth (as Fig. 2c).")
            for d in diagnoses
        ),
    ]
    if all(d.similarity is not None for d in diagnoses):
        charts.append((figures.similarity(diagnoses), "Attention collapse: how alike the tokens become with depth."))
    for d in diagnoses:
        if len({layer.flow.shape[2] for layer in d.layers}) == 1:
            charts.append((figures.heads(d), f"{d.name}: disparity of every head."))
    undefined = list(dict.fromkeys(sentence for d in diagnoses for sentence in d.undefined()))
    names = " and ".join(d.name for d in diagnoses)
    parts = [
        f"<h1>Attention between modalities: {escape(names)}</h1>",
        *(f"<p>{escape(sentence)}</p>" for d in diagnoses for sentence in (_measured(d), *_findings(d))),
        *(f'<p class="note">{escape(sentence)}</p>' for sentence in (*undefined, *notes)),
        f"<p>{HOW_TO_READ}</p>",
        "<h2>Figures</h2>",
        *(chart(figure, caption) for figure, caption in charts),
    ]
    if pictures:
        parts.append("<h2>Where the text looks in the image</h2>")
        for name, picture in pictures:
            drawn = figures.image_attention(
                picture.image, picture.scores, picture.grid, uniform=picture.uniform, title=picture.title
            )
            caption = f"{name}. {picture.title} Mean over layers, heads and text rows after the image."
            parts.append(chart(drawn, caption, "png"))
    measured = any(d.generated_tokens for d in diagnoses)
    if measured:
        parts.append("<h2>What the generated tokens look at in their prompts</h2>")
        parts.append(chart(figures.dominance_by_layer(diagnoses), DOMINANCE))
        parts += [_thirds_table(diagnoses, first_token) for first_token in (True, False)]
    parts.append("<h2>Numbers</h2>")
    for rows, first_token in VARIANTS:
        if rows == "generated" and not measured:
            continue
        title = f"{ROWS[rows]}, {'all keys' if first_token else 'without the first token as a key'}"
        table = _summary_table(diagnoses, rows, first_token)
        opened = " open" if (rows, first_token) == VARIANTS[0] else ""
        parts.append(f"<details{opened}><summary>{title[0].upper() + title[1:]}</summary>{table}</details>")
    for d in diagnoses:
        parts.append(f"<details><summary>{escape(d.name)} by layer</summary>{_layer_table(d)}</details>")
    parts.append(f"<h2>What the numbers mean</h2><p>{MEANING}</p>")
    if versions:
        parts.append(f"<p class='null'>{escape(', '.join(f'{k} {v}' for k, v in versions.items()))}</p>")
    write_page(path, f"Attention of {names}", parts)


def _measured(d: Diagnosis) -> str:
    tokens = ", ".join(f"{count} {name}" for name, count in d.tokens.items())
    return (
        f"{d.name}: {len(d.layers)} layers, {d.sequences} sequences, rows measured: {tokens}; {d.generated_tokens} of "
        "them are generated tokens."
    )


def _findings(d: Diagnosis) -> list[str]:
    """The main figures in words."""
    found, null = d.summary(), d.summary(null=True)
    sentences = []
    for name in d.modalities:
        value, uniform = found["avg_diff"][name], null["avg_diff"][name]
        if math.isfinite(value):
            sentences.append(f"AvgDiff of {name} is {100 * value:.1f} % (uniform attention: {100 * uniform:.1f} %).")
    for name in d.modalities[1:]:
        value, uniform = found["mdi"][name], null["mdi"][name]
        if math.isfinite(value):
            sentences.append(
                f"Seen from the text, a text token gets {value:.2f} times the attention of a {name} token (uniform "
                f"attention: {uniform:.2f})."
            )
        early, middle, late = (values[d.modalities.index(name)] for values in d.thirds("mdi").tolist())
        if math.isfinite(early + middle + late):
            sentences.append(
                f"Seen from the generated tokens, a text token of the prompt gets {early:.2f} times the attention of a "
                f"{name} token in the early layers, {middle:.2f} in the middle and {late:.2f} in the late ones (MDI)."
            )
    return [" ".join(sentences)] if sentences else []


def _summary_table(diagnoses: Sequence[Diagnosis], rows: str, first_token: bool) -> str:
    options: RowOptions = {"rows": rows, "first_token": first_token}
    columns = [(d.name, d.summary(**options, null=null), null) for d in diagnoses for null in (False, True)]
    modalities = diagnoses[0].modalities
    head = "".join(
        f"<th{' class=null' if null else ''}>{escape('uniform' if null else name)}</th>" for name, _, null in columns
    )
    lines = []
    for measure, (label, unit) in LABELS.items():
        for name in modalities:
            if measure == "mdi" and name == modalities[0]:
                continue
            cells = "".join(
                f"<td{' class=null' if null else ''}>{_number(summary[measure][name], unit)}</td>"
                for _, summary, null in columns
            )
            lines.append(f"<tr><td>{escape(label)}: {escape(name)}</td>{cells}</tr>")
    return f'<div class="scroll"><table><tr><th>mean over layers</th>{head}</tr>{"".join(lines)}</table></div>'


def _thirds_table(diagnoses: Sequence[Diagnosis], first_token: bool) -> str:
    """MDI and AEI of generated rows."""
    head = "".join(f"<th>{third}</th><th class=null>uniform</th>" for third in THIRDS)
    lines = []
    for measure in ("mdi", "aei"):
        for d in diagnoses:
            found, null = (d.thirds(measure, first_token=first_token, null=null).T.tolist() for null in (False, True))
            for m, name in enumerate(d.modalities):
                if measure == "mdi" and m == 0:
                    continue
                cells = "".join(
                    f"<td>{_number(value, '')}</td><td class=null>{_number(uniform, '')}</td>"
                    for value, uniform in zip(found[m], null[m], strict=True)
                )
                label = f"{d.name}: {measure.upper()} of {name}"
                lines.append(f"<tr><td>{escape(label)}</td>{cells}</tr>")
    title = "all keys" if first_token else "without the first token as a key"
    return f'<div class="scroll"><table><tr><th>{title}</th>{head}</tr>{"".join(lines)}</table></div>'


def _layer_table(d: Diagnosis) -> str:
    measures = ("self", "cross", "disparity", "score")
    head = "".join(f"<th>{measure}: {escape(name)}</th>" for measure in measures for name in d.modalities)
    values = [d.figure(measure) for measure in measures]
    lines = []
    for i, layer in enumerate(d.layer_ids):
        cells = "".join(f"<td>{_number(v, '')}</td>" for table in values for v in table[i].tolist())
        lines.append(f"<tr><td>{layer}</td>{cells}</tr>")
    return f'<div class="scroll"><table><tr><th>layer</th>{head}</tr>{"".join(lines)}</table></div>'


def _number(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "not defined"
    return f"{round(100 * value, 2) + 0.0:.2f} %" if unit == "%" else f"{value:.4g}"  # + 0.0: no "-0.00"
