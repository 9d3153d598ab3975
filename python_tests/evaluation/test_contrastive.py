"""The peers of the benchmark: without strength they are plain decoding, with it what their equations say."""

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from moda_ext.conversations import (
    encode,  # noqa: E402
    read_conversations,  # noqa: E402  needs nothing, but the rest does
)
from moda_ext.evaluation.answers import generate_answers  # noqa: E402


@pytest.fixture
def contrastive(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2])
    import benchmarks.contrastive as contrastive

    return contrastive


@pytest.fixture
def loaded(believer):
    from moda_ext.diagnostics import load_model

    return load_model(str(believer / "model"), device="cpu")


@pytest.fixture
def asked(believer):
    """Prompts of different lengths, so that batches are padded."""
    return [c.prompt for c in read_conversations(believer / "dev.jsonl")[:9]]


def test_without_strength_they_are_plain_greedy_decoding(contrastive, loaded, asked):
    model, processor = loaded
    tokens = {"max_new_tokens": 8, "batch_size": 4, "eos_token_id": None}
    plain = generate_answers(model, processor, asked, **tokens)
    assert len(set(plain)) > 1
    for decoder in (contrastive.VCD(model, 0.0), contrastive.PAI(model, 0.0, [0, 1])):
        assert generate_answers(decoder, processor, asked, **tokens) == plain
    for make in (lambda a: contrastive.VCD(model, a, beta=1e-12), lambda a: contrastive.PAI(model, a, [0, 1])):
        changed = [generate_answers(make(a), processor, asked, **tokens) != plain for a in (8.0, 100.0, 1e4)]
        assert any(changed)  # how much it takes depends on what the model has learned
    assert generate_answers(model, processor, asked, **tokens) == plain  # and nothing stays behind
    assert model.config.text_config._attn_implementation == "sdpa"


def logits_after(model, inputs, tokens):
    """Of the last row of each sequence by itself, without padding and cache: (B, V)."""
    found = []
    for row in range(len(inputs["input_ids"])):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        ids = torch.cat([ids, tokens[row]])[None]
        pixels = inputs["pixel_values"][row][None] if "pixel_values" in inputs else None
        found.append(model(input_ids=ids, pixel_values=pixels, use_cache=False).logits[0, -1])
    return torch.stack(found)


def steps_of(decoder, inputs, number=3):
    """(tokens, scores) of each step of ``generate``."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": number}
    found = decoder.generate(**inputs, **options, output_scores=True, return_dict_in_generate=True)
    tokens = found.sequences[:, inputs["input_ids"].shape[1] :]
    return [(tokens[:, :i], scores) for i, scores in enumerate(found.scores)]


@torch.no_grad()
def test_vcd_is_its_equation_at_every_step(contrastive, loaded, asked):
    model, processor = loaded
    inputs = dict(encode(processor, asked[:4], padding_side="left")[0])
    decoder = contrastive.VCD(model, alpha=0.7, steps=500, beta=0.2, seed=5)
    noisy = {**inputs, "pixel_values": contrastive.VCD(model, 1.0, 500, seed=5).noisy(inputs["pixel_values"])}
    for tokens, scores in steps_of(decoder, inputs):
        own, other = logits_after(model, inputs, tokens), logits_after(model, noisy, tokens)
        expected = 1.7 * own - 0.7 * other
        likely = own.softmax(-1) >= 0.2 * own.softmax(-1).max(dim=-1, keepdim=True).values
        assert torch.equal(scores.isfinite(), likely)
        torch.testing.assert_close(scores[likely], expected[likely], rtol=1e-4, atol=1e-4)


def test_vcd_noise_is_that_of_so_many_steps(contrastive, loaded):
    """Step by step: v_t = sqrt(1 - a_t) v_(t-1) + sqrt(a_t) noise has this mean and variance."""
    kept, variance = 1.0, 0.0
    for step in range(301):  # the first is step 0
        a = 1e-5 + (5e-3 - 1e-5) / (1 + math.exp(6 - 12 * step / 999))
        kept, variance = kept * math.sqrt(1 - a), variance * (1 - a) + a
    decoder = contrastive.VCD(loaded[0], 1.0, steps=300)
    noisy = decoder.noisy(torch.full((200_000,), 3.0))
    assert noisy.mean().item() == pytest.approx(3 * kept, abs=0.01)
    assert noisy.var().item() == pytest.approx(variance, rel=0.02)
    assert not torch.equal(decoder.noisy(torch.zeros(4)), decoder.noisy(torch.zeros(4)))


def test_pai_attention_raises_the_last_row_on_image_keys(contrastive, loaded):
    """By hand: key by key, with two query heads to a key head."""
    pai = contrastive.PAI(loaded[0], 0.5, [0])
    pai.is_image = torch.tensor([[False, True, True, False]])
    query, key, value = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    mask = torch.zeros(1, 1, 3, 5)
    mask[:, :, :2, 3:] = -1e30
    module = torch.nn.Module()
    module.pai = pai
    out, _ = contrastive.pai_attention(module, query, key, value, mask, scaling=0.5)
    assert out.shape == (1, 3, 2, 4)
    for head in range(2):
        for row in range(3):
            weights = []
            for j in range(5):
                score = 0.5 * (query[0, head, row] @ key[0, 0, j]).item()
                if row == 2 and j in (1, 2):
                    score += 0.5 * abs(score)
                weights.append(math.exp(score) if mask[0, 0, row, j] == 0 else 0.0)
            expected = sum(w / sum(weights) * value[0, 0, j] for j, w in enumerate(weights))
            torch.testing.assert_close(out[0, row, head], expected)


@torch.no_grad()
def test_pai_refines_by_the_text_alone(contrastive, loaded, asked):
    """gamma log p(image, text) - (gamma - 1) log p(text); the second pass sees no image token and raises nothing."""
    model, processor = loaded
    inputs = dict(encode(processor, asked[:4], padding_side="left")[0])
    kept = inputs["attention_mask"].bool() & (inputs["input_ids"] != model.config.image_token_index)
    text = [ids[mask] for ids, mask in zip(inputs["input_ids"], kept, strict=True)]
    raised = steps_of(contrastive.PAI(model, 0.6, [1]), inputs)
    refined = 0
    for gamma in (1.0, 1.3):
        decoder = contrastive.PAI(model, 0.6, [1], gamma)
        for step, (tokens, scores) in enumerate(steps_of(decoder, inputs)):
            if gamma == 1.0:
                assert torch.equal(scores, raised[step][1])
                continue
            if step and not torch.equal(tokens, raised[step][0]):
                break  # the passes have come to other tokens
            refined += 1
            own = raised[step][1].log_softmax(-1)
            ids = [torch.cat([t, new])[None] for t, new in zip(text, tokens, strict=True)]
            other = torch.stack([model(input_ids=i, use_cache=False).logits[0, -1] for i in ids]).log_softmax(-1)
            likely = scores.isfinite()
            assert torch.equal(likely, own >= own.max(dim=-1, keepdim=True).values + math.log(0.1))
            torch.testing.assert_close(scores[likely], (1.3 * own - 0.3 * other)[likely], rtol=1e-4, atol=1e-4)
    assert refined > 1  # with the cache too


def test_wrong_options_are_refused(contrastive, loaded):
    from moda_ext.integrations.transformers import apply_moda

    model, _ = loaded
    for options in ({"alpha": -1.0}, {"alpha": 1.0, "steps": 1000}, {"alpha": 1.0, "beta": 0.0}):
        with pytest.raises(ValueError, match="VCD: alpha at least 0"):
            contrastive.VCD(model, **options)
    for options in ({"alpha": -1.0}, {"alpha": 1.0, "gamma": 0.9}):
        with pytest.raises(ValueError, match="PAI: alpha must be at least 0"):
            contrastive.PAI(model, layers=[0], **options)
    with pytest.raises(ValueError, match="VCD decodes Llava models without MODA, got LlavaMODA"):
        contrastive.VCD(apply_moda(model), 1.0)


def test_the_table_has_every_method(contrastive, believer, tmp_path, capsys, monkeypatch):
    import benchmarks.calibration as bench

    monkeypatch.setattr(bench, "PAI_ALPHAS", (0.5,))
    monkeypatch.setattr(bench, "VCD_ALPHAS", (1.0,))
    out = tmp_path / "rows.json"
    options = ["--doses", "3", "4", "--tolerance", "5", "--batch-size", "54", "--device", "cpu", "--json", str(out)]
    written = []
    tune = bench.Bench.tune

    def watched(self, name, *arguments):
        written.append([row["name"] for row in json.loads(out.read_text())])
        return tune(self, name, *arguments)

    monkeypatch.setattr(bench.Bench, "tune", watched)
    assert bench.main([str(believer / f) for f in ("model", "dev.jsonl", "test.jsonl")] + options) == 0
    rows = json.loads(out.read_text())
    assert [row["name"] for row in rows] == ["plain", "prior, layers", "prior, heads", "PAI", "VCD"]
    assert written == [[row["name"] for row in rows[:number]] for number in (1, 2, 3, 4)]  # before the next is tuned
    printed = capsys.readouterr().out
    assert all(row["name"].split(",")[0] in printed for row in rows)
    for row in rows:
        assert (row["test"] is None) == (row["setting"] == "none within tolerance")
        assert row["test"] is None or (row["test"]["following"]["n"] == 12 and row["seconds_per_step"] > 0)
    assert rows[1]["test"]["following"]["count"] < rows[0]["test"]["following"]["count"]


def test_a_folder_that_is_not_there_is_refused_first(contrastive, monkeypatch, capsys):
    import benchmarks.calibration as bench

    monkeypatch.setattr(bench, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit):
        bench.main(["model", "dev.jsonl", "test.jsonl", "--json", "nowhere/rows.json"])
    assert "--json: no such directory: nowhere" in capsys.readouterr().err


def test_time_is_of_the_steps_of_a_batch(contrastive, loaded, asked):
    """Which are no more where its rows are more."""
    from benchmarks.calibration import Timed

    model, processor = loaded
    for batch_size, batches in ((9, 1), (3, 3)):
        timed = Timed(model)
        generate_answers(timed, processor, asked, max_new_tokens=5, batch_size=batch_size, eos_token_id=None)
        assert timed.steps == 5 * batches and timed.seconds > 0
