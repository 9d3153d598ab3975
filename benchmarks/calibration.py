"""A prior without training beside its peers, on one model: ``python -m benchmarks.calibration MODEL DEV TEST``.

Every method has about 30 settings, tried on all of DEV under one constraint (:func:`moda_ext.evaluation.calibration
.choose`), and its best is judged on TEST.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import rich
import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from moda_ext.conversations import read_conversations
from moda_ext.diagnostics import load_model
from moda_ext.evaluation.calibration import (
    DOSES,
    PriorDial,
    Scores,
    Trial,
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
    """A model, or a decoder around one, and how long its ``generate`` took for how many steps of a batch."""

    def __init__(self, model):
        self.model, self.device, self.dtype = model, model.device, model.dtype
        self.seconds, self.steps = 0.0, 0

    def generate(self, input_ids, **options):
        begin = time.perf_counter()
        found = self.model.generate(input_ids=input_ids, **options)
        if found.is_cuda:
            torch.cuda.synchronize(found.device)
        self.seconds += time.perf_counter() - begin
        self.steps += found.shape[1] - input_ids.shape[1]
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
        self.add(self.judged({"name": "plain", "setting": "", "tried": 0}, self.model))

    def load(self):
        return load_model(self.args.model, device=self.args.device, dtype=self.args.dtype)

    def measure(self, model, examples) -> Scores:
        return measure(model, self.processor, examples, self.args.batch_size)

    def judged(self, row: dict, model) -> dict:
        """The row with what a model gets on TEST, and its time."""
        timed = Timed(model)
        scores = self.measure(timed, self.test)
        return {**row, "seconds_per_step": timed.seconds / timed.steps, "test": scores}

    def add(self, row: dict) -> None:
        """Adds a row, and writes all there are: what comes later may fail, hours later."""
        self.rows.append(row)
        if self.args.json:
            rows = [{**row, "test": row["test"] and row["test"].to_dict()} for row in self.rows]
            self.args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")

    def tune(self, name: str, places, doses, decoder) -> tuple[dict, Trial | None]:
        """``(row, best)``, not judged yet: of the models that ``decoder`` makes of place and dose, None if none is."""
        trials = search(
            list(places),
            lambda place, dose: self.measure(decoder(place, dose), self.dev),
            self.plain,
            self.args.tolerance,
            doses,
            lambda pairs: track(pairs, description=name),
        )
        best = choose(self.plain, trials, self.args.tolerance)
        setting = "none within tolerance" if best is None else f"{best.place}, {best.dose:g}"
        return {"name": name, "setting": setting, "tried": len(trials), "test": None}, best

    def pai(self) -> None:
        """PAI, around the model without MODA; its dose is alpha."""
        count = len(attention_modules(self.model))
        starts = dict.fromkeys((0, count // 3, 2 * count // 3))
        settings = {f"layers {start} up, gamma {g:g}": (start, g) for start in starts for g in (1.0, 1.1)}

        def decoder(place: str, alpha: float) -> PAI:
            start, gamma = settings[place]
            return PAI(self.model, alpha, range(start, count), gamma)

        self.peer("PAI", settings, PAI_ALPHAS, decoder)

    def vcd(self) -> None:
        """VCD, likewise."""
        settings = {f"T {steps}, beta {beta:g}": (steps, beta) for steps in (500, 700, 999) for beta in (0.1, 0.25)}
        self.peer("VCD", settings, VCD_ALPHAS, lambda place, alpha: VCD(self.model, alpha, *settings[place]))

    def peer(
        self, name: str, settings: dict, alphas: tuple[float, ...], decoder: Callable[[str, float], Decoder]
    ) -> None:
        row, best = self.tune(name, settings, alphas, decoder)
        self.add(row if best is None else self.judged(row, decoder(best.place, best.dose)))

    def prior(self, name: str, places_of: Callable[[PriorDial], dict[str, Tensor]]) -> None:
        """Ours, in places of a model. The best is judged as its checkpoint has it."""
        row, doses = self.tuned_prior(name, places_of)  # whose model is gone, or there would be three at once
        if doses is not None:
            model, _ = self.load()
            apply_prior(model, doses)
            row = self.judged(row, model)
        self.add(row)

    def tuned_prior(self, name: str, places_of: Callable[[PriorDial], dict[str, Tensor]]) -> tuple[dict, Tensor | None]:
        """``(row, doses)`` of the best."""
        dial = PriorDial(self.load()[0])
        places = places_of(dial)

        def turned(place: str, dose: float):
            dial.set(dose * places[place])
            return dial.model

        row, best = self.tune(name, places, self.args.doses, turned)
        return row, None if best is None else best.dose * places[best.place]

    def best_heads(self, dial: PriorDial) -> dict[str, Tensor]:
        return head_places(*head_gradients(dial, self.processor, self.dev, self.args.batch_size))


METHODS: dict[str, Callable[[Bench], None]] = {
    "layers": lambda bench: bench.prior("prior, layers", layer_places),
    "heads": lambda bench: bench.prior("prior, heads", bench.best_heads),
    "pai": Bench.pai,
    "vcd": Bench.vcd,
}


def table_of(rows: list[dict]) -> Table:
    """A line for each method, and its cost: the time of a step of a batch as a multiple of plain decoding's."""
    table = Table(title="on TEST: % of examples (95 % interval); time of a step against plain decoding")
    names = list(rows[0]["test"].proportions())
    for column in ("method", "setting", "tried", *names, "time"):
        table.add_column(column, justify="left" if column in ("method", "setting") else "right")
    for row in rows:
        cells = ["-"] * (len(names) + 1)
        if row["test"] is not None:
            bounds = [(share.value, *share.interval) for share in row["test"].proportions().values()]
            cells = [f"{100 * value:.1f} ({100 * low:.0f}-{100 * high:.0f})" for value, low, high in bounds]
            cells.append(f"{row['seconds_per_step'] / rows[0]['seconds_per_step']:.2f}")
        table.add_row(row["name"], row["setting"], str(row["tried"]), *cells)
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("model", help="a Llava checkpoint without MODA")
    parser.add_argument("dev", type=Path, help="examples to choose on, see docs/calibration.md")
    parser.add_argument("test", type=Path, help="examples to judge on")
    parser.add_argument("--tolerance", type=float, default=1.0, help="points of accuracy without hints (1)")
    parser.add_argument("--doses", type=float, nargs="+", default=DOSES, help="of the prior")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="beside plain decoding")
    parser.add_argument("--json", type=Path, help="where to write the table's numbers")
    args = parser.parse_args(argv)
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: no such directory: {args.json.parent}")
    bench = Bench(args)
    for method in args.methods:
        METHODS[method](bench)
    rich.print(table_of(bench.rows))
    print("PAI computes N x N scores in all layers, as it changes them: its time is that of plain attention too.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
