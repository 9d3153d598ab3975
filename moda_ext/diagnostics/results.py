"""What a meter found: sums over pairs, from which every figure is computed when asked for."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from moda_ext.diagnostics import measures

if TYPE_CHECKING:
    from types import ModuleType

    from pandas import DataFrame

__all__ = ["Comparison", "Diagnosis", "LayerSums", "TokenScores"]

ROWS = ("all", "both", "generated")
VARIANTS = tuple(itertools.product(("both", "all", "generated"), (True, False)))  # rows, first_token
MEASURES = ("self", "cross", "disparity", "disparity_sum", "disparity_self", "score", "mdi", "aei", "sink")
SUMMARY = ("avg_diff", "avg_diff_sum", "avg_diff_self", "decay", "self", "cross", "score", "mdi", "aei", "sink")


class RowOptions(TypedDict):
    """Which pairs a figure is about, see :meth:`Diagnosis.figure`."""

    rows: str
    first_token: bool


class FigureOptions(RowOptions):
    """The same, of the model or of uniform attention."""

    null: bool


@dataclasses.dataclass
class LayerSums:
    """The sums of :mod:`moda_ext.diagnostics.measures` for one layer, in float64.

    The first two dimensions of each are variants: rows (0 all of them, 1 those that see every modality, 2 generated
    tokens) and pairs (0 all of them, 1 without those whose key is the first token). The pairs of generated tokens are
    those with a key of their prompt, and their flow is made of :func:`moda_ext.diagnostics.measures.prompt_shares`.

    Attributes:
        flow: (3, 2, H, M, M). NaN without the first token where its weight cannot be told
            (:meth:`moda_ext.integrations.recording.AttentionRecord.weight_of`), and for generated tokens where the
            border of a prompt is unclear.
        null: (3, 2, M, M), the flow of uniform attention over the same pairs.
        pairs: (3, 2, M, M).
        rows: (3, 2, M), rows with at least one pair.
    """

    flow: Tensor
    null: Tensor
    pairs: Tensor
    rows: Tensor


@dataclasses.dataclass
class TokenScores:
    """Where the text of one sequence looks.

    Attributes:
        modality: (N,), int32.
        scores: (L, N), float32: the weight a key gets from a text row, mean over heads and over the text rows that see
            every modality of the sequence, or over those of generated tokens (``score_rows`` of the meter).
        uniform: (N,), float32: the same for uniform attention, mean over layers, of which some may have a window.
    """

    modality: Tensor
    scores: Tensor
    uniform: Tensor


@dataclasses.dataclass
class Diagnosis:
    """The result of an :class:`moda_ext.diagnostics.AttentionMeter`.

    Sums are pooled over everything that was measured, so a figure does not depend on the order or the batching of the
    data, and a long sequence counts for more than a short one. Figures are means over heads unless asked by head.

    Attributes:
        name: what was measured, for tables and figures.
        modalities: names, text first.
        layer_ids: the layers, in order of depth.
        layers: their sums.
        sequences: number of sequences.
        similarity: (L,), mean cosine similarity of two tokens at the output of each layer, or None if not asked for.
        token_scores: those of the first sequences, as many as asked for.
        unclear: sentences that say why figures of generated rows are not defined.

    Example:
        >>> diagnosis = meter.result()
        >>> diagnosis.figure("disparity").shape  # (L, M), on rows that see every modality
        torch.Size([32, 2])
        >>> diagnosis.figure("disparity", null=True)  # what uniform attention would give
        >>> diagnosis.thirds("mdi")  # (3, M), as published: generated rows, in early, middle and late layers
    """

    name: str
    modalities: tuple[str, ...]
    layer_ids: tuple[int, ...]
    layers: list[LayerSums]
    sequences: int = 0
    similarity: Tensor | None = None
    token_scores: list[TokenScores] = dataclasses.field(default_factory=list)
    unclear: list[str] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> dict[str, int]:
        """Number of measured rows of each modality."""
        return dict(zip(self.modalities, self.layers[0].rows[0, 0].long().tolist(), strict=True))

    @property
    def generated_tokens(self) -> int:
        """Number of measured rows of generated tokens."""
        return max(int(layer.rows[ROWS.index("generated"), 0].sum()) for layer in self.layers)

    def figure(
        self,
        measure: str,
        *,
        rows: str = "both",
        first_token: bool = True,
        null: bool = False,
        per_head: bool = False,
    ) -> Tensor:
        """One figure of each layer and modality.

        Args:
            measure: ``"self"`` s_m, ``"cross"`` c_m, ``"disparity"`` (normaliser max), ``"disparity_sum"``,
                ``"disparity_self"``, ``"score"`` r_m, ``"mdi"`` and ``"aei"`` (seen from text rows), or ``"sink"``: the
                share of the attention of rows of m that goes to no key (with ``first_token=False``: to no other key;
                not defined for generated rows, which are normalised). Formulas: :mod:`moda_ext.diagnostics.measures`.
            rows: ``"both"``: rows that see every modality of their sequence, the default for conclusions; ``"all"``; or
                ``"generated"``: rows of generated tokens and keys of their prompt, with rows normalised over those
                keys, as in MDI and AEI as published (arXiv 2508.10552). Which these are:
                :class:`moda_ext.diagnostics.AttentionMeter`.
            first_token: False leaves out the pairs whose key is the first token of its sequence, the usual sink.
            null: for uniform attention over the same pairs, instead of for the model.
            per_head: one figure for each head.

        Returns:
            (L, M), or (L, H, M) by head; float64, NaN where there is no pair.

        Raises:
            ValueError: an unknown option, or ``per_head`` with layers of different numbers of heads.
        """
        return self._measure(measure, rows, *self._sums(rows, first_token, null, per_head))

    def thirds(self, measure: str, *, rows: str = "generated", first_token: bool = True, null: bool = False) -> Tensor:
        """A figure of the early, the middle and the late layers, by default as MDI and AEI were published.

        Attention is pooled over the layers of a third (:func:`moda_ext.diagnostics.measures.split_in_thirds`) before
        the figure is made of it: a layer without attention to a modality does not outweigh all others.

        Args:
            measure, rows, first_token, null: as in :meth:`figure`.

        Returns:
            (3, M), float64, NaN where there is no pair.

        Raises:
            ValueError: an unknown option.
        """
        layers = measures.split_in_thirds(len(self.layers))
        sums = self._sums(rows, first_token, null, per_head=False)
        pooled = (torch.stack([values[third].sum(dim=0) for third in layers]) for values in sums)
        return self._measure(measure, rows, *pooled)

    @staticmethod
    def _measure(measure: str, rows: str, flow: Tensor, pairs: Tensor, count: Tensor) -> Tensor:
        """The figure that these sums make."""
        if measure not in MEASURES:
            raise ValueError(f"Diagnosis: measure must be one of {', '.join(MEASURES)}, got {measure!r}")
        if measure == "score":
            return measures.per_token_score(flow, pairs)
        if measure == "mdi":
            return measures.dominance_index(flow, pairs)
        if measure == "aei":
            return measures.attention_efficiency(flow, pairs)
        if measure == "sink":
            share = 1 - measures.mean_mass(flow, count).sum(dim=-1)
            return torch.full_like(share, torch.nan) if rows == "generated" else share
        s, c = measures.self_weight(flow, pairs), measures.cross_weight(flow, pairs)
        if measure in ("self", "cross"):
            return s if measure == "self" else c
        return measures.disparity(s, c, measure.partition("_")[2] or "max")

    def mass(
        self, *, rows: str = "both", first_token: bool = True, null: bool = False, per_head: bool = False
    ) -> Tensor:
        """The share of attention from rows of modality a to all keys of m; options as in :meth:`figure`.

        Returns:
            (L, M, M), or (L, H, M, M) by head.
        """
        flow, _, count = self._sums(rows, first_token, null, per_head)
        return measures.mean_mass(flow, count)

    @overload
    def summary(
        self, *, rows: str = ..., first_token: bool = ..., null: bool = ..., per_head: Literal[False] = ...
    ) -> dict[str, dict[str, float]]: ...

    @overload
    def summary(
        self, *, rows: str = ..., first_token: bool = ..., null: bool = ..., per_head: bool = ...
    ) -> dict[str, dict[str, float]] | dict[str, dict[str, list[float]]]: ...

    def summary(
        self, *, rows: str = "both", first_token: bool = True, null: bool = False, per_head: bool = False
    ) -> dict[str, dict[str, float]] | dict[str, dict[str, list[float]]]:
        """One number for the whole model: measure -> modality -> value. Options as in :meth:`figure`.

        ``avg_diff`` is AvgDiff (with the normaliser max; ``avg_diff_sum`` and ``avg_diff_self`` with the others),
        ``decay`` the slope of log c_m against depth, the rest the mean over layers. By head a value is a list.
        """
        options: FigureOptions = {"rows": rows, "first_token": first_token, "null": null}
        numbers: dict[str, dict[str, Any]] = {}
        for name in SUMMARY:
            if name == "decay":
                values = measures.decay_slope(self.figure("cross", **options, per_head=per_head))
            else:
                values = self.figure(name.replace("avg_diff", "disparity"), **options, per_head=per_head).mean(dim=0)
            numbers[name] = dict(zip(self.modalities, values.movedim(-1, 0).tolist(), strict=True))
        return numbers

    def undefined(self) -> list[str]:
        """What cannot be said about this data, in sentences; their figures are NaN."""
        said = []
        every, both, generated = torch.stack([layer.pairs[:, 0] for layer in self.layers]).amax(dim=0)
        for a, name in enumerate(self.modalities):
            if self.layers[0].rows[0, 0, a] == 0:
                said.append(f"No {name} token was measured.")
                continue
            others = [m for m in range(len(self.modalities)) if m != a]
            if every[a, others].sum() == 0:
                said.append(
                    f"No {name} row sees a key of another modality (in a causal sequence nothing of another kind comes "
                    f"before it): cross weight, disparity and decay of {name} are not defined."
                )
            elif both[a].sum() == 0:
                said.append(f"No {name} row sees every modality of its sequence: on such rows nothing is defined.")
        if any(layer.flow[0, 1].isnan().any() for layer in self.layers):
            said.append(
                "The weight of the first token alone cannot be told (a split softmax, or scores or biases that are too "
                "large): some figures without the first token are not defined."
            )
        said += self.unclear
        if self.generated_tokens == 0:
            said.append(
                "No generated token was measured (the last one has no row). MDI and AEI as published, "
                "rows='generated', need tokens generated after the prompt, or labels on the answer."
            )
        elif generated[0, 0] == 0 or (generated[0] > 0).sum() < 2:
            said.append("No prompt of a generated token has text and another modality: MDI and AEI are not defined.")
        elif len(self.layers) < 3:
            said.append(f"There are no thirds of {len(self.layers)} layers: those that are empty are not defined.")
        return said

    def to_dict(self) -> dict:
        """Plain numbers, lists and strings; None where a figure is not defined. :meth:`from_dict` reads it."""
        figures, summary, thirds = {}, {}, {}
        for (rows, first_token), null in itertools.product(VARIANTS, (False, True)):
            key = _variant_name(rows, first_token, null)
            options: FigureOptions = {"rows": rows, "first_token": first_token, "null": null}
            figures[key] = {measure: _plain(self.figure(measure, **options)) for measure in MEASURES}
            figures[key]["mass"] = _plain(self.mass(**options))
            thirds[key] = {measure: _plain(self.thirds(measure, **options)) for measure in MEASURES}
            summary[key] = {
                measure: {name: _plain(value) for name, value in values.items()}
                for measure, values in self.summary(**options).items()
            }
        return {
            "name": self.name,
            "modalities": list(self.modalities),
            "layers": list(self.layer_ids),
            "sequences": self.sequences,
            "tokens": self.tokens,
            "generated_tokens": self.generated_tokens,
            "undefined": self.undefined(),
            "unclear": self.unclear,
            "summary": summary,
            "figures": figures,
            "thirds": thirds,
            "similarity": None if self.similarity is None else _plain(self.similarity),
            "token_scores": [
                {field.name: _plain(getattr(scores, field.name)) for field in dataclasses.fields(TokenScores)}
                for scores in self.token_scores
            ],
            "sums": [
                {field.name: _plain(getattr(layer, field.name)) for field in dataclasses.fields(LayerSums)}
                for layer in self.layers
            ],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """:meth:`to_dict` as JSON (RFC 8259: null, not NaN); also written to ``path`` if given."""
        text = json.dumps(self.to_dict(), allow_nan=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_dict(cls, data: dict) -> Diagnosis:
        """The diagnosis that :meth:`to_dict` wrote, without loss (token scores: to float32)."""

        def tensor(values: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(_with_nan(values), dtype=dtype)

        def sums(values: list) -> Tensor:  # up to version 0.1 there were no generated rows
            found = tensor(values, torch.float64)
            return found if len(found) == len(ROWS) else torch.cat([found, torch.zeros_like(found[:1])])

        return cls(
            name=data["name"],
            modalities=tuple(data["modalities"]),
            layer_ids=tuple(data["layers"]),
            layers=[LayerSums(**{name: sums(values) for name, values in layer.items()}) for layer in data["sums"]],
            sequences=data["sequences"],
            similarity=None if data["similarity"] is None else tensor(data["similarity"], torch.float64),
            token_scores=[
                TokenScores(
                    torch.tensor(s["modality"], dtype=torch.int32),
                    tensor(s["scores"], torch.float32),
                    tensor(s["uniform"], torch.float32),
                )
                for s in data["token_scores"]
            ],
            unclear=data.get("unclear", []),
        )

    @classmethod
    def from_json(cls, text: str) -> Diagnosis:
        """The diagnosis that :meth:`to_json` wrote."""
        return cls.from_dict(json.loads(text))

    def to_dataframe(self, *, per_head: bool = False) -> DataFrame:
        """A ``pandas.DataFrame``, one line for each figure.

        Columns: name, layer, (head,) modality, rows, first_token, measure, value, uniform (the null).

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = _import_pandas()
        lines = []
        for rows, first_token in VARIANTS:
            options: RowOptions = {"rows": rows, "first_token": first_token}
            for measure in MEASURES:
                uniform = self.figure(measure, **options, null=True)
                values = self.figure(measure, **options, per_head=per_head)
                if not per_head:
                    values = values[:, None]
                for (i, head, m), value in zip(
                    torch.cartesian_prod(*map(torch.arange, values.shape)).tolist(),
                    values.flatten().tolist(),
                    strict=True,
                ):
                    lines.append(
                        {
                            "name": self.name,
                            "layer": self.layer_ids[i],
                            **({"head": head} if per_head else {}),
                            "modality": self.modalities[m],
                            "rows": rows,
                            "first_token": first_token,
                            "measure": measure,
                            "value": value,
                            "uniform": uniform[i, m].item(),
                        }
                    )
        return pandas.DataFrame(lines)

    def compare(self, other: Diagnosis) -> Comparison:
        """This diagnosis (before) beside another (after), over the same modalities.

        Raises:
            TypeError: ``other`` is not a Diagnosis.
            ValueError: the modalities differ.
        """
        if not isinstance(other, Diagnosis):
            raise TypeError(f"Diagnosis.compare: other must be a Diagnosis, got {type(other).__name__}")
        if other.modalities != self.modalities:
            raise ValueError(
                f"Diagnosis.compare: other must have the modalities {', '.join(self.modalities)}, got "
                f"{', '.join(other.modalities)}"
            )
        return Comparison(self, other)

    def _sums(self, rows: str, first_token: bool, null: bool, per_head: bool) -> tuple[Tensor, Tensor, Tensor]:
        """flow and pairs (L, [H,] M, M), rows (L, [H,] M)."""
        if rows not in ROWS:
            raise ValueError(f"Diagnosis: rows must be one of {', '.join(ROWS)}, got {rows!r}")
        at = ROWS.index(rows), int(not first_token)
        pairs = torch.stack([layer.pairs[at] for layer in self.layers])
        count = torch.stack([layer.rows[at] for layer in self.layers])
        if not per_head:
            flow = torch.stack([layer.null[at] if null else layer.flow[at].mean(dim=0) for layer in self.layers])
            return flow, pairs, count
        numbers = {layer.flow.shape[2] for layer in self.layers}
        if len(numbers) > 1:
            raise ValueError(f"Diagnosis: per_head needs layers of equal numbers of heads, got {sorted(numbers)}")
        (heads,) = numbers
        flow = torch.stack([layer.flow[at] for layer in self.layers])
        if null:
            flow = torch.stack([layer.null[at] for layer in self.layers])[:, None].expand_as(flow)
        return flow, pairs[:, None].expand_as(flow), count[:, None].expand(-1, heads, -1)


@dataclasses.dataclass
class Comparison:
    """Two diagnoses side by side."""

    before: Diagnosis
    after: Diagnosis

    def lines(self, *, rows: str = "both", first_token: bool = True) -> list[dict]:
        """One dict for each measure of :meth:`Diagnosis.summary` and modality.

        Keys: measure, modality, before, after, change (after - before), uniform_before, uniform_after. NaN where a
        figure is not defined.
        """
        options: RowOptions = {"rows": rows, "first_token": first_token}
        before, after = self.before.summary(**options), self.after.summary(**options)
        null_before, null_after = (d.summary(**options, null=True) for d in (self.before, self.after))
        return [
            {
                "measure": measure,
                "modality": name,
                "before": before[measure][name],
                "after": after[measure][name],
                "change": after[measure][name] - before[measure][name],
                "uniform_before": null_before[measure][name],
                "uniform_after": null_after[measure][name],
            }
            for measure in SUMMARY
            for name in self.before.modalities
        ]

    def to_dict(self) -> dict:
        """Plain numbers, lists and strings: both diagnoses, and the lines of each variant."""
        lines = {
            _variant_name(rows, first_token): [
                {key: _plain(value) for key, value in line.items()}
                for line in self.lines(rows=rows, first_token=first_token)
            ]
            for rows, first_token in VARIANTS
        }
        return {"before": self.before.to_dict(), "after": self.after.to_dict(), "lines": lines}

    def to_json(self, path: str | Path | None = None) -> str:
        """:meth:`to_dict` as JSON; also written to ``path`` if given."""
        text = json.dumps(self.to_dict(), allow_nan=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_dataframe(self, *, rows: str = "both", first_token: bool = True) -> DataFrame:
        """:meth:`lines` as a ``pandas.DataFrame``."""
        return _import_pandas().DataFrame(self.lines(rows=rows, first_token=first_token))


def _variant_name(rows: str, first_token: bool, null: bool = False) -> str:
    return f"{rows} rows, {'with' if first_token else 'without'} first token" + (", uniform attention" if null else "")


def _plain(value: Any) -> Any:
    """Tensors as nested lists, NaN as None."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value


def _import_pandas() -> ModuleType:
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "to_dataframe needs pandas, which is not installed; install it with: pip install 'moda_ext[diagnostics]'"
        ) from error
    return pandas
