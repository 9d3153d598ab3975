"""The study's comparisons, by runs whose figures are known, and what its variants do to a model."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy", reason="scipy is not installed")
pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")

from moda_ext.conversations import Conversation, encode
from moda_ext.diagnostics import load_model
from moda_ext.integrations.transformers import attention_modules, recording
from moda_ext.study import VARIANTS, Run, read_runs
from moda_ext.study.tables import by_variant, differences, write_tables
from moda_ext.study.variants import BASELINE

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(variant, seed, right, follows, **changes):
    """Ten questions of one task: so many right without a hint, and so many wrong hints followed."""
    outcomes = {
        "object/none": "1" * right + "0" * (10 - right),
        "object/right": "1" * 10,
        "object/wrong": "h" * follows + "0" * (10 - follows),
    }
    deficit = {"mdi/vision": 4.0, "mdi/vision_uniform": 1.0}
    values = {"loss": 0.5, "deficit": deficit, "prior": None, "trained": 7, "seconds": 9.0, **changes}
    groups, chance = {"object": "perception"}, {"object": values.pop("chance", 0.2)}
    return Run(variant, seed, {"small": f"{variant}", "steps": 3}, outcomes, groups, chance, **values)


RUNS = [
    *(run("lora", seed, right, 8) for seed, right in enumerate((4, 5, 6))),
    *(run("moda", seed, right, 5, prior=0.25) for seed, right in enumerate((5, 6, 8))),
    *(run("prior", seed, right, 1, prior=1.5) for seed, right in enumerate((5, 6, 8))),
]


def test_figures_of_a_run():
    one = run("lora", 0, 3, 6)
    assert (one.accuracy("none"), one.accuracy("right"), one.accuracy("wrong")) == (0.3, 1.0, 0.0)
    assert (one.following(), one.following("none")) == (0.6, 0.0)
    assert one.correct("none") == [True] * 3 + [False] * 7


def test_each_variant_is_compared_with_the_one_that_it_changes():
    """moda gains 10, 10 and 20 points on lora; prior gains nothing on moda, and follows 40 points less."""
    assert (VARIANTS["moda"].against, VARIANTS["prior"].against, VARIANTS[BASELINE].against) == ("lora", "moda", None)
    found = differences(RUNS, lambda run: run.accuracy("none"))
    assert list(found) == ["moda", "prior"]
    assert found["moda"].mean == pytest.approx(0.4 / 3)
    half = 4.302653 * (0.01 / 3 / 3) ** 0.5  # standard deviation sqrt(0.01 / 3), three seeds
    assert found["moda"].interval == pytest.approx((0.4 / 3 - half, 0.4 / 3 + half), abs=1e-5)
    assert found["prior"].mean == 0
    followed = differences(RUNS, lambda run: run.following())
    assert followed["moda"].mean == pytest.approx(-0.3) and followed["prior"].mean == pytest.approx(-0.4)


def test_tables():
    tables = write_tables(list(reversed(RUNS)))
    lines = tables.splitlines()
    assert (
        "| lora | 3 | 50.0 ± 10.0 | 100.0 ± 0.0 | 0.0 ± 0.0 | 80.0 ± 0.0 | 0.0 ± 0.0 | 0.500 ± 0.000 | 7 | 9 |" in lines
    )
    moda = next(line for line in lines if line.startswith("| moda against lora |"))
    # p = 0.0572 of the accuracies becomes twice that; the seeds agree about hints without any spread
    assert "| +13.3 (-1.0 to +27.7) | no significant difference | -30.0 (-30.0 to -30.0) | p < 0.001 |" in moda
    below = write_tables([run("lora", seed, right=0, follows=0, chance=0.5) for seed in (0, 1)])
    assert "| object (perception) | 50 | 0 (0 to 28, below chance) |" in below
    assert "| object (perception) | 20 | 50 (24 to 76) | 63 (31 to 83) | 63 (31 to 83) |" in lines
    assert "| moda | 4.000 ± 0.000 (1.000) | 0.250 ± 0.000 |" in lines
    assert list(by_variant(RUNS)) == ["lora", "moda", "prior"]


def test_runs_that_cannot_be_compared():
    assert "no comparison" in write_tables([run("lora", 0, 4, 8), run("moda", 0, 4, 8)])
    with pytest.raises(ValueError, match="no runs"):
        write_tables([])
    other = run("moda", 0, 4, 8)
    other.plan["steps"] = 4
    with pytest.raises(ValueError, match="of 2 plans"):
        write_tables([run("lora", 0, 4, 8), other])


def conversation(name, *texts):
    roles = ("user", "assistant", "user", "assistant")
    return Conversation(name, tuple(zip(roles, texts, strict=False)))


def test_the_control_knows_places_and_no_pictures():
    """The modalities of every token are the same in one pass, padded on the right, and while decoding, on the left."""
    model, processor = load_model("random", device="cpu")
    VARIANTS["blind"].attach(model, prior=1.0)
    asked = [conversation("a", "Hi"), conversation("b", "What is this, and where?")]
    seen = []
    with torch.no_grad(), recording(model, lambda record: seen.append(record)):
        inputs, _ = encode(processor, asked, padding_side="left")
        length = inputs["input_ids"].shape[1]
        written = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    decoded = [record for record in seen if record.layer == seen[0].layer]
    assert len(decoded) == 3
    for row in range(2):
        number = int(inputs["attention_mask"][row].sum())
        prompt = decoded[0].query_modality[row, length - number :]
        new = [record.query_modality[row, -1] for record in decoded[1:]]
        found = [int(modality) for modality in (*prompt, *new)]
        assert found == [(place + 1) % 2 for place in range(number + 2)]
    seen.clear()
    with torch.no_grad(), recording(model, lambda record: seen.append(record)):
        inputs, _ = encode(processor, asked, padding_side="right")
        model(**inputs)
    assert seen[0].query_modality[0, :4].tolist() == [1, 0, 1, 0] and seen[0].query_modality[0, -1] == -1
    assert written.shape[1] == length + 3


def test_the_gate_is_a_bias_of_each_pair():
    """With a trained gate, scores of image keys change by (q A B) . k, those of text keys do not."""
    model, processor = load_model("random", device="cpu")
    VARIANTS["gate"].attach(model, prior=1.0, rank=2)
    from PIL import Image

    image = Image.radial_gradient("L").convert("RGB")
    asked = Conversation("a", (("user", "<image>\nWhat?"),), (image,))
    inputs, _ = encode(processor, [asked], padding_side="right")
    with torch.no_grad():
        plain = model(**inputs).logits
        expected, _ = load_model("random", device="cpu")
        assert torch.allclose(plain, expected(**inputs).logits, atol=1e-5)  # B is 0
        for module in attention_modules(model):
            module.moda.aligner.b1.normal_(generator=torch.Generator().manual_seed(0))
        records = []
        with recording(model, records.append):
            changed = model(**inputs).logits
    assert not torch.allclose(changed, plain, atol=1e-3)
    views, gate = records[0].query, attention_modules(model)[0].moda.aligner
    text, vision = views[0], views[1]
    assert torch.allclose(vision, text + text @ gate.a1 @ gate.b1, atol=1e-5)


def test_a_prior_starts_where_it_is_told():
    model, _ = load_model("random", device="cpu")
    VARIANTS["prior"].attach(model, prior=1.5)
    for module in attention_modules(model):
        assert torch.equal(module.moda.mask.prior[:, 0, 1], torch.full((4,), 1.5))
        assert module.moda.mask.prior.requires_grad
        assert module.moda.mask.prior.count_nonzero() == 4


def test_a_prior_of_some_layers():
    model, _ = load_model("random", device="cpu")
    VARIANTS["prior"].attach(model, prior=1.5, layers=[1, 1])
    started = [int(module.moda.mask.prior.count_nonzero()) for module in attention_modules(model)]
    assert started == [0, 4, *[0] * (len(started) - 2)]
    with pytest.raises(ValueError, match="prior_layers 1-9 are not among"):
        VARIANTS["prior"].attach(load_model("random", device="cpu")[0], prior=1.5, layers=[1, 9])


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="not in a checkout")
def test_the_published_tables_are_those_of_the_published_runs():
    text = (BENCHMARKS / "STUDY.md").read_text(encoding="utf-8")
    plans = sorted((BENCHMARKS / "study").iterdir())
    assert plans
    for plan in plans:
        for table in write_tables(read_runs(plan)).strip().split("\n\n"):
            assert table in text
