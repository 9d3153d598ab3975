"""A prior without training beside its peers, on one model: ``python -m benchmarks.calibration MODEL DEV TEST``.

Every method has about 30 settings, tried on all of DEV under one constraint (:func:`moda_ext.evaluation.calibration
.choose`), and its best is judged on TEST.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import rich
import torch
from rich.progress import track
from rich.table import Table

from moda_ext.conversations import read_conversations
from moda_ext.diagnostics import load_model
from moda_ext.evaluation.calibration import (
    PriorDial,
    Scores,
    apply_prior,
    check_examples,
    choose,
    head_gradients,
    head_places,
    layer_places,
    measure,
    search,
)
from moda_ext.integrations.transformers import attention_modules

from .contrastive import PAI, VCD, Decoder

PAI_ALPHAS = (0.1, 0.2, 0.5, 1.0, 2.0)
VCD_ALPHAS = (0.25, 0.5, 1.0, 2.0, 4.0)


class Timed:
    """A model, or a decoder around one, and what its ``generate`` took."""

    def __init__(self, model):
        self.model, self.device, self.dtype = model, model.device, model.dtype
        self.seconds, self.tokens = 0.0, 0

    def generate(self, input_ids, *, pad_token_id, **options):
        begin = time.perf_counter()
        found = self.model.generate(input_ids=input_ids, pad_token_id=pad_token_id, **options)
        if found.is_cuda:
            torch.cuda.synchronize(found.device)
        self.seconds += time.perf_counter() - begin
        self.tokens += int((found[:, input_ids.shape[1] :] != pad_token_id).sum())
        return found


class Bench:
    """DEV and TEST on one checkpoint, and a row of the table for each method."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rows = args, []
        self.dev, self.test = (read_conversations(path) for path in (args.dev, args.test))
        for examples in (self.dev, self.test):
            check_examples(examples)
        self.model, self.processor = self.load()
        Decoder(self.model)  # refuses a model that the peers do not know
        self.plain = self.measure(self.model, self.dev)
        self.judge("plain", "", self.model, tried=0)

    def load(self):
        return load_model(self.args.model, device=self.args.device, dtype=self.args.dtype)

    def measure(self, model, examples) -> Scores:
        return measure(model, self.processor, examples, self.args.batch_size)

    def judge(self, name: str, setting: str, model, tried: int) -> None:
        timed = Timed(model)
        scores = self.measure(timed, self.test)
        rate = timed.tokens / timed.seconds
        self.rows.append({"name": name, "setting": setting, "tried": tried, "tokens_per_second": rate, "test": scores})

    def tune(self, name: str, places, doses, decoder, final=None) -> None:
        """Adds the row of the best setting: ``decoder`` makes a model of place and dose, ``final`` the one judged."""
        trials = search(
            list(places),
            lambda place, dose: self.measure(decoder(place, dose), self.dev),
            self.plain,
            self.args.tolerance,
            doses,
            lambda pairs: track(pairs, description=name),
        )
        best = choose(self.plain, trials, self.args.tolerance)
        if best is None:
            self.rows.append({"name": name, "setting": "none within tolerance", "tried": len(trials), "test": None})
            return
        model = (final or decoder)(best.place, best.dose)
        self.judge(name, f"{best.place}, {best.dose:g}", model, len(trials))

    def peers(self) -> None:
        """PAI and VCD, around the model without MODA; their dose is alpha."""
        count = len(attention_modules(self.model))
        starts = dict.fromkeys((0, count // 3, 2 * count // 3))
        of_pai = {f"layers {start} up, gamma {g:g}": (start, g) for start in starts for g in (1.0, 1.1)}
        of_vcd = {f"T {steps}, beta {beta:g}": (steps, beta) for steps in (500, 700, 999) for beta in (0.1, 0.25)}

        def pai(place: str, alpha: float) -> PAI:
            start, gamma = of_pai[place]
            return PAI(self.model, alpha, range(start, count), gamma)

        def vcd(place: str, alpha: float) -> VCD:
            return VCD(self.model, alpha, *of_vcd[place])

        self.tune("PAI", of_pai, PAI_ALPHAS, pai)
        self.tune("VCD", of_vcd, VCD_ALPHAS, vcd)

    def priors(self) -> None:
        """Ours, in ranges of layers and in heads. The best is judged as its checkpoint has it."""
        dial = PriorDial(self.load()[0])
        heads = head_places(*head_gradients(dial, self.processor, self.dev, self.args.batch_size))
        places = {**layer_places(dial), **heads}

        def turned(place: str, dose: float):
            dial.set(dose * places[place])
            return dial.model

        def saved(place: str, dose: float):
            model, _ = self.load()
            apply_prior(model, dose * places[place])
            return model

        self.tune("prior, layers", [place for place in places if place not in heads], self.args.doses, turned, saved)
        self.tune("prior, heads", list(heads), self.args.doses, turned, saved)


def table_of(rows: list[dict]) -> Table:
    """A line for each method, and its cost: the time of a token as a multiple of plain decoding's."""
    table = Table(title="on TEST: % of examples (95 % interval); time a token against plain decoding")
    names = list(rows[0]["test"].proportions())
    for column in ("method", "setting", "tried", *names, "time"):
        table.add_column(column, justify="left" if column in ("method", "setting") else "right")
    for row in rows:
        cells = ["-"] * (len(names) + 1)
        if row["test"] is not None:
            bounds = [(share.value, *share.interval) for share in row["test"].proportions().values()]
            cells = [f"{100 * value:.1f} ({100 * low:.0f}-{100 * high:.0f})" for value, low, high in bounds]
            cells.append(f"{rows[0]['tokens_per_second'] / row['tokens_per_second']:.2f}")
        table.add_row(row["name"], row["setting"], str(row["tried"]), *cells)
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("model", help="a Llava checkpoint without MODA")
    parser.add_argument("dev", type=Path, help="examples to choose on, see docs/calibration.md")
    parser.add_argument("test", type=Path, help="examples to judge on")
    parser.add_argument("--tolerance", type=float, default=1.0, help="points of accuracy without hints (1)")
    parser.add_argument("--doses", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0, 3.0], help="of the prior")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, help="where to write the table's numbers")
    args = parser.parse_args(argv)
    bench = Bench(args)
    bench.priors()
    bench.peers()
    rich.print(table_of(bench.rows))
    if args.json:
        rows = [{**row, "test": row["test"] and row["test"].to_dict()} for row in bench.rows]
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
