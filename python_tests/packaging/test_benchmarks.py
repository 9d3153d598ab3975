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
    verdicts = bench.goals.judge(record["results"], {}, {}, bench.goals.cpu_goals("avx512_bf16"))
    figures = [v["figures"] for v in verdicts if v["figures"]]
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


def test_scaling_times_both_beside_a_busy_process_and_without(bench, monkeypatch, tmp_path, native):
    import benchmarks.scaling as scaling

    path, started = tmp_path / "scaling.json", []
    popen = scaling.subprocess.Popen
    monkeypatch.setattr(scaling.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    monkeypatch.setattr(scaling, "SAMPLE", 0.0)
    monkeypatch.setitem(bench.WORKLOADS, "small-cpu", [replace(bench.WORKLOADS["small-cpu"][0], **TINY)])
    assert scaling.main(["--mode", "forward", "--seconds", "0", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]
    assert [(row["dtype"], row["state"]) for row in rows] == [
        (dtype, state) for dtype in ("float32", "bfloat16") for state in ("quiet", "busy")
    ]
    for row in rows:
        assert {name: len(t) for name, t in row["samples"].items()} == dict.fromkeys(
            ["ours 1", "sdpa 1", "ours 2", "sdpa 2"], scaling.FEWEST_ROUNDS
        )
        one, two = (row["samples"][f"ours {threads}"] for threads in (1, 2))
        assert row["speed-up of ours"] == sorted(a / b for a, b in zip(one, two, strict=True))[1]
    assert len(started) == 2 and all(child.returncode is not None for child in started)  # none is left


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


def test_goal_of_a_share_compares_rates(bench):
    ours = {"case": "gram", "mode": "forward", "contender": "ours", "samples": [2.0], "gflop": 1.0}
    peer = {**ours, "contender": "mm", "samples": [4.0], "gflop": 4.0}
    (found,) = [v for v in bench.goals.judge([ours, peer], {}, {}, bench.goals.cpu_goals(None)) if v["figures"]]
    assert found["figures"] == {"gram": 0.5}  # half of the rate
    assert found["limit"] == 0.6 and found["met"] is False


@pytest.mark.parametrize(
    ("isa", "met"),
    [
        ("amx", {"sdpa": False, "ours": True}),
        ("avx512_bf16", {"peak": True, "ours": False}),
        ("avx512", {"peak": True, "ours": True}),
        ("avx2", {"peak": True, "ours": True}),
        ("neon", {}),
        (None, {}),
    ],
)
def test_goals_are_those_of_the_instruction_set(bench, capsys, isa, met):
    row = {"case": "small-cpu N=2048 D=128", "mode": "forward", "samples": [1.0], "gflop": 1.0}
    times = {"ours": 1.0, "ours-bf16": 0.8, "sdpa": 1.5, "peak": 0.9}
    rows = [{**row, "contender": name, "samples": [time]} for name, time in times.items()]
    verdicts = [v for v in bench.goals.judge(rows, {}, {}, bench.goals.cpu_goals(isa)) if v["figures"]]
    assert {v["goal"].split(" / ")[1].split(",")[0]: v["met"] for v in verdicts} == met
    bench.goals.print_goals(verdicts)
    assert ("met    >= 0.85" in capsys.readouterr().out) == met.get("peak", False)


def test_rate_of_multiply_adds_is_of_all_threads(bench):
    from benchmarks.peak import multiply_adds

    (one, work), (two, double) = multiply_adds(1), multiply_adds(2)
    assert double == 2 * work > 1
    assert (one(), two()) == pytest.approx((one(), 2 * one()))
    assert one() > 0  # every sum tends to 2: nobody skipped the loop


def test_growth_of_the_aligner_is_reported(bench, monkeypatch, native):
    monkeypatch.setattr(bench, "keep_memory", lambda: None)
    monkeypatch.setitem(bench.goals.GROWTH_LENGTHS, "aligner", {"forward": [128, 256]})
    monkeypatch.setattr(bench, "interleave", lambda calls, **_: {n: [float(n)] for n in calls})
    table = bench.run_growth(["aligner"], quick=True)
    assert table["aligner, forward"] == pytest.approx({128: 1.0, 256: 1.0}, rel=1e-6)  # linear time, linear work
    assert torch.get_num_threads() == 1
