"""The benchmark programs on tiny cases: every contender keeps the gate, and the goals find their figures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

TINY = {
    "runs": ((0, 40), (1, 70), (0, 40)),
    "query_heads": 4,
    "key_heads": 2,
    "head_dim": 16,
    "rank": 4,
    "embedding": 32,
}
GOALS = {"small-cpu": 2, "aligned": 2, "aligner-batch": 2, "gram": 1, "module": 0}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2])
    import benchmarks.__main__ as bench

    return bench


@pytest.mark.parametrize("workload", GOALS)
def test_every_contender_is_right_and_timed(bench, monkeypatch, tmp_path, native, workload):
    monkeypatch.setattr("benchmarks.aligner.PRODUCT", (32, 32))
    monkeypatch.setattr("benchmarks.workloads.PRODUCT", (32, 32))
    monkeypatch.setitem(bench.WORKLOADS, workload, [replace(bench.WORKLOADS[workload][0], **TINY)])
    peers = [c.name for kind in bench.CONTENDERS.values() for c in kind if not c.ours and c.name != "flex"]
    path = tmp_path / "figures.json"
    options = ["--workload", workload, "--peers", ",".join(peers), "--quick", "--seconds", "0", "--json", str(path)]
    assert bench.main(options) == 0
    record = json.loads(path.read_text())
    for row in record["results"]:
        excused = (row["reason"] or "").startswith("n/a")
        assert excused or (row["ok"] and row["samples"]), row
    figures = [v["figures"] for v in bench.goals.judge(record["results"], {}, {}) if v["figures"]]
    assert len(figures) >= GOALS[workload]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("workload", "mode"),
    [("llava-next", "forward"), ("llava-next", "train"), ("decode", "forward"), ("aligner-batch", "forward")],
)
def test_contenders_of_a_gpu_agree_on_a_cpu(bench, monkeypatch, native, workload, mode):
    import benchmarks.cuda as cuda

    monkeypatch.setattr("benchmarks.peers.fused_kernels_are_strict", lambda case: True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(cuda, "free_memory", lambda: 1e12)
    monkeypatch.setattr(cuda, "extra_bytes", lambda call: len(call()))
    monkeypatch.setattr(cuda, "measure", lambda calls, rounds: {name: [1.0] * rounds for name in calls})
    case = replace(cuda.CASES[workload][0], **TINY)
    rows = cuda.run_case(case, mode, rounds=2)
    only_there = {"cudnn", "fa4", "flex-fa4"} | ({"flex", "ours-flex"} if mode == "train" else set())
    for row in rows:
        excused = row["contender"] in only_there or (row["reason"] or "").startswith("n/a")
        assert excused or (row["ok"] and row["samples"] == [1.0, 1.0]), row
    cuda.print_rows(rows, rate=1e12)
    verdicts = bench.goals.judge(rows, {}, {}, bench.goals.CUDA_GOALS)
    found = sum(bool(verdict["figures"]) for verdict in verdicts)
    assert found == {"llava-next": 5, "decode": 5, "aligner-batch": 2}[workload] if mode == "forward" else found <= 1


def test_gate_finds_a_wrong_view(bench, native):
    from benchmarks.gate import Gate

    case = replace(bench.WORKLOADS["aligned"][0], **TINY)
    inputs = bench.make_inputs(case)
    inputs.require_grad(False)
    gate = Gate(case, inputs, "forward")
    views, indicator = bench.ALIGNER.build(case, inputs)()
    assert gate.check(bench.ALIGNER, lambda: (views, indicator)).excess <= 1
    views[1, 0, 0, -1, 0] += 0.01
    assert gate.check(bench.ALIGNER, lambda: (views, indicator)).excess > 10


def test_goal_per_flop_compares_rates(bench):
    ours = {"case": "gram", "mode": "forward", "contender": "ours", "samples": [2.0], "gflop": 1.0}
    peer = {**ours, "contender": "mm", "samples": [4.0], "gflop": 4.0}
    figures = [v["figures"]["gram"] for v in bench.goals.judge([ours, peer], {}, {}) if v["figures"]]
    assert figures == [2.0]  # half of the rate


def test_growth_of_the_aligner_is_reported(bench, monkeypatch, native):
    monkeypatch.setattr(bench, "keep_memory", lambda: None)
    monkeypatch.setitem(bench.goals.GROWTH_LENGTHS, "aligner", {"forward": [128, 256]})
    monkeypatch.setattr(bench, "interleave", lambda calls, **_: {n: [float(n)] for n in calls})
    table = bench.run_growth(["aligner"], quick=True)
    assert table["aligner, forward"] == pytest.approx({128: 1.0, 256: 1.0}, rel=1e-6)  # linear time, linear work
    assert torch.get_num_threads() == 1
