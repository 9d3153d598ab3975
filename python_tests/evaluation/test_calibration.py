"""Calibration: the halves, the choice, the gradient, and the command on a tiny model that believes what it is told."""

import dataclasses
import json

import pytest
import torch
from commands import call

from moda_ext.conversations import Conversation, read_conversations, write_conversations
from moda_ext.evaluation.calibration import (
    Calibration,
    PriorDial,
    Scores,
    Trial,
    apply_prior,
    calibrate,
    check_examples,
    choose,
    dose_response,
    halve,
    head_gradients,
    head_places,
    layer_places,
    measure,
    score,
    search,
)
from moda_ext.evaluation.statistics import Proportion

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")


def asked(number, hint="none", answer="yes", **fields):
    messages = (("user", "Is it?"), ("assistant", answer))
    return Conversation(f"{number}-{hint}", messages, (), {"question": number, "hint": hint, **fields})


def scores(none, following, right=5, wrong=5, of=10):
    shares = {"none": Proportion(none, of), "right": Proportion(right, of), "wrong": Proportion(wrong, of)}
    return Scores(shares, Proportion(following, of), {"all": Proportion(none, of)})


@pytest.fixture
def loaded(believer):
    from moda_ext.diagnostics import load_model

    return load_model(str(believer / "model"), device="cpu")


@pytest.fixture(scope="module")
def dev(believer):
    return read_conversations(believer / "dev.jsonl")


class TestExamples:
    @pytest.mark.parametrize(
        ("example", "message"),
        [
            (asked(1, "maybe"), "hint must be one of none, right, wrong, got 'maybe'"),
            (asked(1, "wrong"), "a wrong hint needs 'hinted'"),
            (asked(1, "wrong", hinted=3), "a wrong hint needs 'hinted'"),
            (asked(1, "wrong", hinted="Yes."), "its hint is wrong, and 'hinted' is its answer"),
            (asked(1, answer=" "), "its answer is empty"),
            (Conversation("7", (("user", "Is it?"),)), "conversation 7: has no answer"),
        ],
    )
    def test_what_cannot_be_calibrated_with_is_refused(self, example, message):
        with pytest.raises(ValueError, match=message):
            check_examples([asked(0), example])

    def test_a_missing_picture_and_no_example_without_a_hint(self, tmp_path):
        pictured = Conversation("8", (("user", "<image>?"), ("assistant", "a")), (tmp_path / "no.png",))
        with pytest.raises(FileNotFoundError, match="conversation 8: no such image"):
            check_examples([pictured])
        with pytest.raises(ValueError, match="no example is without a hint"):
            check_examples([asked(1, "right")])

    def test_halves_share_no_question_and_are_alike(self):
        examples = [asked(i, hint, hinted="no") for i in range(20) for hint in ("none", "right", "wrong")]
        examples += [asked(i) for i in range(20, 31)]
        halves = halve(examples, seed=3)
        questions = [{c.fields["question"] for c in half} for half in halves]
        assert not questions[0] & questions[1] and len(questions[0] | questions[1]) == 31
        assert [sum(c.fields["hint"] == "wrong" for c in half) for half in halves] == [10, 10]
        assert halve(examples, seed=3) == halves
        assert halve(examples, seed=4) != halves

    def test_examples_without_a_question_are_questions_of_their_own(self):
        for names in ("0123", ["without id"] * 4):
            examples = [Conversation(name, asked(0).messages) for name in names]
            assert [len(half) for half in halve(examples, seed=0)] == [2, 2]

    def test_one_question_cannot_be_halved(self):
        with pytest.raises(ValueError, match="examples of hint 'none' belong to one question"):
            halve([asked(1), asked(1, "wrong", hinted="no")], seed=0)
        with pytest.raises(ValueError, match="examples of hint 'wrong' belong to one question"):
            halve([asked(1), asked(2), asked(1, "wrong", hinted="no")], seed=0)

    def test_scores(self):
        examples = [asked(1, task="a"), asked(2, task="b"), asked(1, "right"), asked(3)]
        examples += [asked(i, "wrong", hinted="no") for i in range(3)]
        found = score(examples, ["Yes.", "no", "yes", "maybe", "No", "yes", "perhaps"])
        one, third, none = Proportion(1, 1), Proportion(1, 3), Proportion(0, 1)
        assert found.accuracy == {"none": third, "right": one, "wrong": third}
        assert found.following == third
        assert found.tasks == {"a": one, "b": none, "all": none}
        assert score(examples[:1], ["yes"]) == Scores({"none": one}, None, {"a": one})


class TestChoice:
    def test_the_constraint_is_kept(self):
        plain = scores(none=9, following=8)
        trials = [Trial("a", 1.0, scores(8, 1)), Trial("b", 1.0, scores(9, 5)), Trial("c", 1.0, scores(10, 6))]
        assert choose(plain, trials, tolerance=1.0).place == "b"
        assert choose(plain, trials, tolerance=10.0).place == "a"  # 9 to 8 of 10 are exactly 10 points
        assert choose(plain, trials[:1], tolerance=9.9) is None
        assert choose(plain, [Trial("d", 1.0, scores(10, 8))], tolerance=1.0) is None  # follows as much

    def test_among_equals_accuracy_and_then_the_smaller_dose(self):
        plain = scores(9, 8)
        trials = [Trial("a", 2.0, scores(9, 3)), Trial("b", 1.0, scores(9, 3)), Trial("c", 3.0, scores(9, 3, wrong=6))]
        assert choose(plain, trials, 1.0).place == "c"
        assert choose(plain, trials[:2], 1.0).place == "b"

    def test_without_wrong_hints_accuracy_counts(self):
        plain, better = (Scores({"none": Proportion(k, 10)}, None, {}) for k in (5, 6))
        assert choose(plain, [Trial("a", 1.0, plain), Trial("b", 1.0, better)], 1.0).place == "b"

    def test_the_search_goes_half_way_to_the_neighbours_of_the_best(self):
        def measured(place, dose):
            return scores(9, 8 - int(dose)) if place == "a" and dose <= 2 else scores(1, 0)

        trials = search(["a", "b"], measured, scores(9, 8), 1.0, doses=(1.0, 2.0, 3.0))
        assert [(t.place, t.dose) for t in trials[6:]] == [("a", 1.5), ("a", 2.5)]
        trials = search(["a", "b"], measured, scores(9, 8), 1.0, doses=(1.0, 2.0))
        assert [(t.place, t.dose) for t in trials[4:]] == [("a", 1.5)]  # none beyond the largest
        trials = search(["a", "b"], measured, scores(9, 0), 1.0, doses=(1.0, 2.0))
        assert [(t.place, t.dose) for t in trials[4:]] == [("a", 0.5), ("b", 0.5)]

    @pytest.mark.parametrize("doses", [(), (0.0, 1.0), (2.0, 1.0), (1.0, 1.0)])
    def test_doses_must_increase(self, doses):
        with pytest.raises(ValueError, match="doses must be above 0 and increase"):
            search(["a"], lambda place, dose: scores(9, 0), scores(9, 8), 1.0, doses)


class TestDial:
    def test_it_is_the_prior_of_text_on_images(self, loaded, dev):
        """As MODAConfig.fixed_prior computes it; back at 0 the model computes what it did."""
        from moda_ext.conversations import encode
        from moda_ext.diagnostics import load_model
        from moda_ext.integrations.transformers import MODAConfig, apply_moda

        model, processor = loaded
        inputs, _ = encode(processor, [c.prompt for c in dev[:6]], padding_side="left")
        with torch.no_grad():
            plain = model(**inputs).logits
            dial = PriorDial(model)
            torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-5, atol=1e-4)
            doses = torch.zeros(dial.shape)
            doses[1] = 1.5
            dial.set(doses)
            turned = model(**inputs).logits
            assert (turned - plain).abs().max() > 1e-2
            other = load_model(model.name_or_path, device="cpu")[0]
            apply_moda(other, MODAConfig.fixed_prior([[0.0, 1.5], [0.0, 0.0]], layers=[1]))
            torch.testing.assert_close(other(**inputs).logits, turned)
            dial.set(torch.zeros(dial.shape))
            torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-5, atol=1e-4)

    def test_gradient_is_that_of_finite_differences(self, loaded, dev):
        model, processor = loaded
        dial = PriorDial(model.double())
        examples = [(c, 0.25 + i % 3) for i, c in enumerate(dev[:7])]
        gradient = dial.gradient(processor, examples, batch_size=3)
        assert gradient.shape == (2, 4) and gradient.abs().min() > 1e-6

        def value(layer, head, dose):
            doses = torch.zeros(dial.shape, dtype=torch.float64)
            doses[layer, head] = dose
            dial.set(doses)
            return sum(weight * self.log_likelihood(model, processor, c) for c, weight in examples)

        step = 0.03  # the norms of the model compute in float32, so a smaller one would show their rounding
        for layer in range(2):
            for head in range(4):
                difference = (value(layer, head, step) - value(layer, head, -step)) / (2 * step)
                assert gradient[layer, head].item() == pytest.approx(difference, rel=2e-3, abs=1e-5)

    @staticmethod
    @torch.no_grad()
    def log_likelihood(model, processor, conversation):
        """log p of a one-letter answer and its end, token by token."""
        from moda_ext.conversations import encode

        inputs, _ = encode(processor, [conversation], padding_side="right")
        chances = model(**inputs.to(model.device, model.dtype)).logits[0].log_softmax(dim=-1)
        ids = inputs["input_ids"][0]
        assert processor.decode(ids[-2:]) == f"{conversation.answer}</s>"
        return sum(chances[i - 1, ids[i]].item() for i in (-2, -1))

    def test_gain_is_expected_over_hinted_and_keep_is_without_hints(self, loaded, dev):
        model, processor = loaded
        dial = PriorDial(model)
        none, wrong = ([c for c in dev if c.fields["hint"] == hint] for hint in ("none", "wrong"))
        gain, keep = head_gradients(dial, processor, dev)
        swapped = [
            dataclasses.replace(c, messages=(*c.messages[:-1], ("assistant", c.fields["hinted"]))) for c in wrong
        ]
        expected, hinted, kept = (dial.gradient(processor, [(c, 1 / 36) for c in cs]) for cs in (wrong, swapped, none))
        torch.testing.assert_close(gain, expected - hinted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(keep, kept)
        only = head_gradients(dial, processor, none)
        torch.testing.assert_close(only[0], keep)

    def test_places(self, loaded):
        dial = PriorDial(loaded[0])
        places = layer_places(dial, [(1, 1), (0, 1)])
        assert list(places) == ["layers 0-1", "layer 0", "layer 1"]
        assert places["layer 1"].tolist() == [[0] * 4, [1] * 4]
        with pytest.raises(ValueError, match="a range in 0 to 1 with full attention, got 1-2"):
            layer_places(dial, [(1, 2)])
        with pytest.raises(ValueError, match=r"doses must have shape \(2, 4\)"):
            dial.set(torch.zeros(4, 2))

    def test_heads_come_by_gain_for_their_cost(self):
        gain = torch.tensor([[3.0, 2.0, -1.0, 1e-6], [2.0, 0.5, -2.0, -3.0]])
        keep = torch.tensor([[-3.0, 0.0, 1.0, 1.0], [-1.0, 0.0, 0.0, 2.0]])  # the mean of |keep| is 1
        places = head_places(gain, keep)
        assert list(places) == ["1 head", "2 heads", "4 heads", "5 heads"]
        order = [table.flatten().nonzero()[:, 0].tolist() for table in places.values()]
        assert order == [[1], [1, 4], [0, 1, 4, 5], [0, 1, 3, 4, 5]]  # 2, 1, 0.75, 0.5 and 1e-6
        assert head_places(-gain.abs(), keep) == {}

    def test_a_fixed_prior_is_refused_and_a_learned_one_is_added_to(self, loaded, dev):
        from moda_ext.diagnostics import load_model
        from moda_ext.integrations.transformers import MODAConfig, apply_moda

        model, _ = loaded
        other = load_model(model.name_or_path, device="cpu")[0]
        with pytest.raises(ValueError, match="MODA without a learned prior"):
            PriorDial(apply_moda(other, MODAConfig.fixed_prior([[0.0, 1.0], [0.0, 0.0]])))
        apply_moda(model, MODAConfig(layers=[1]))
        dial = PriorDial(model)
        prior = dial.priors[1]
        with torch.no_grad():
            prior.fill_(0.5)
        dial = PriorDial(model)
        with pytest.raises(ValueError, match=r"be 0 outside of the layers \[1\]"):
            dial.set(torch.ones(dial.shape))
        for _ in range(2):  # from where it was, not from where it is
            dial.set(torch.tensor([[0.0] * 4, [1.0, 2.0, 0.0, 0.0]]))
        assert prior[:, 0, 1].tolist() == [1.5, 2.5, 0.5, 0.5]
        assert prior[:, 0, 0].tolist() == [0.5] * 4
        apply_prior(model, torch.tensor([[0.0] * 4, [0.25] * 4]))
        assert prior[:, 0, 1].tolist() == [1.75, 2.75, 0.75, 0.75]


@pytest.fixture(scope="module", params=["layers", "heads"])
def calibrated(request, believer, tmp_path_factory):
    """The directory that the command made, and what it printed."""
    pytest.importorskip("typer", reason="typer is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    out = tmp_path_factory.mktemp("calibrated") / "out"
    options = ["--model", believer / "model", "--data", believer / "dev.jsonl", "--out", out, "--doses", "3,4,5"]
    options += ["--device", "cpu", "--tolerance", "20", "--batch-size", "54", "--seed", "3"]
    code, output = call("calibrate", *options, *(["--per-head"] if request.param == "heads" else []))
    assert code == 0, output
    return out, output


class TestCommand:
    def test_the_checkpoint_answers_as_was_measured(self, calibrated, dev):
        from moda_ext.diagnostics import load_model

        out, _ = calibrated
        data = json.loads((out / "calibration.json").read_text())
        model, processor = load_model(str(out), device="cpu")
        selection, held_out = halve(dev, data["seed"])
        assert measure(model, processor, held_out).to_dict() == data["held_out"]["after"]
        place, dose = data["chosen"]["place"], data["chosen"]["dose"]
        (trial,) = (t for t in data["selection"]["trials"] if (t["place"], t["dose"]) == (place, dose))
        found = measure(model, processor, selection).to_dict()
        assert {"place": place, "dose": dose, **found} == trial
        assert found["following"]["count"] < data["selection"]["before"]["following"]["count"]

    def test_the_checkpoint_has_the_prior_and_nothing_else(self, calibrated, believer):
        from safetensors.torch import load_file

        from moda_ext.diagnostics import load_model

        out, _ = calibrated
        data = json.loads((out / "calibration.json").read_text())
        before, after = (load_file(folder / "model.safetensors") for folder in (believer / "model", out))
        added = {name for name in after if ".moda." in name}
        assert all(torch.equal(before[name], after[name]) for name in before) and after.keys() - before.keys() == added
        model, _ = load_model(str(out), device="cpu")
        priors = {n: t for n, t in model.state_dict().items() if n.endswith("moda.mask.prior")}
        doses = torch.tensor(data["chosen"]["doses"])
        layers = doses.any(dim=1).nonzero()[:, 0].tolist()
        assert len(priors) == len(layers)
        for layer, prior in zip(layers, priors.values(), strict=True):
            assert torch.equal(prior[:, 0, 1], doses[layer])
            assert not prior.sum(dim=(1, 2)).sub(doses[layer]).any()
        assert model.config.text_config.moda["layers"] == layers
        assert ("gradients" in data) is not data["chosen"]["place"].startswith("layer")

    def test_what_it_prints_and_draws(self, calibrated):
        out, output = calibrated
        data = json.loads((out / "calibration.json").read_text())
        share = data["held_out"]["after"]["following"]
        low, high = share["interval"]
        shown = f"{100 * share['count'] / share['n']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        assert data["complete"] is True
        assert f"{data['chosen']['place']}, dose {data['chosen']['dose']:g}" in output and shown in output
        assert (out / "calibration.png").stat().st_size > 20_000

    def test_an_error_loses_no_trial(self, believer, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        import moda_ext.evaluation.calibration as calibration

        measured = []

        def failing(*arguments):
            if len(measured) == 4:  # two halves without a prior, two trials
                raise RuntimeError("out of memory")
            measured.append(measure(*arguments))
            return measured[-1]

        monkeypatch.setattr(calibration, "measure", failing)
        options = ["--model", believer / "model", "--data", believer / "dev.jsonl", "--out", tmp_path / "out"]
        with pytest.raises(RuntimeError, match="out of memory"):
            call("calibrate", *options, "--doses", "1,3,5", "--device", "cpu", "--batch-size", "54")
        data = json.loads((tmp_path / "out" / "calibration.json").read_text())
        assert data["complete"] is False and data["chosen"] is None
        assert data["selection"]["before"] == measured[0].to_dict()
        assert data["held_out"] == {"before": measured[1].to_dict(), "after": None}
        assert [(t["place"], t["dose"]) for t in data["selection"]["trials"]] == [("layers 0-1", 1), ("layers 0-1", 3)]
        assert data["selection"]["trials"][1]["following"] == measured[3].to_dict()["following"]

    def test_what_the_half_held_out_does_not_keep_is_told(self, capsys):
        """Of 10 each: without hints from 9 to 7, with wrong ones from 5 to 3, and as many hints repeated."""
        pytest.importorskip("typer", reason="typer is not installed")
        from moda_ext.cli.calibrate import print_result

        before, after = scores(9, 4), scores(7, 4, wrong=3)
        found = Calibration(before, (), Trial("a", 1.0, after), torch.ones(1, 1), before, after, 1.0)
        print_result(found)
        printed = " ".join(capsys.readouterr().out.split())
        assert "accuracy without hints falls by 20.0 points, more than the tolerance of 1," in printed
        assert "accuracy with wrong hints falls by 20.0 points: what is answered instead" in printed
        assert "this prior is no better" in printed
        print_result(dataclasses.replace(found, after=scores(9, 2)))
        assert "note" not in capsys.readouterr().out
        print_result(dataclasses.replace(found, before=scores(8, 8), after=scores(5, 2), tolerance=30.0))
        assert "accuracy without hints" not in capsys.readouterr().out  # 100 * (0.8 - 0.5) is more than 30

    def test_where_none_is_better_nothing_is_saved(self, believer, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        options = ["--model", believer / "model", "--data", believer / "dev.jsonl", "--out", tmp_path / "out"]
        code, output = call("calibrate", *options, "--doses", "0.001", "--device", "cpu")
        assert code == 1
        assert "no prior is better within 1 points" in output
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["calibration.json", "calibration.png"]
        assert json.loads((tmp_path / "out" / "calibration.json").read_text())["chosen"] is None

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"--data": "nowhere.jsonl"}, "nowhere.jsonl"),
            ({"--data": "bad.jsonl"}, "hint must be one of none, right, wrong, got 'left'"),
            ({"--data": "one.jsonl"}, "belong to one question"),
            ({"--out": "nowhere/out"}, "no such directory: nowhere"),
            ({"--out": "full"}, "is there already, and no empty directory: full"),
            ({"--layers": "5-x"}, "must be a range such as 16-29, got '5-x'"),
            ({"--layers": "0-7"}, "must be a range in 0 to 3 with full attention, got 0-7"),
            ({"--layers": "0-1", "--per-head": None}, "goes without --per-head"),
            ({"--doses": "1,x"}, "must be numbers with commas, got '1,x'"),
            ({"--doses": "0,1"}, "must be above 0 and finite, got 0,1"),
            ({"--tolerance": "-1"}, "greater than or equal to 0"),
            ({"--model": "./nowhere"}, "cannot load the checkpoint ./nowhere"),
        ],
    )
    def test_errors(self, believer, tmp_path, monkeypatch, changed, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        records = [json.loads(line) for line in (believer / "dev.jsonl").read_text().splitlines()]
        write_conversations("bad.jsonl", [records[0], {**records[1], "hint": "left"}])
        write_conversations("one.jsonl", records[:3])
        options = {"--model": "random", "--data": believer / "dev.jsonl", "--out": "out", **changed}
        code, output = call("calibrate", *(word for pair in options.items() for word in pair if word is not None))
        assert code == 2
        assert message in output
        assert not (tmp_path / "out").exists()


def test_without_wrong_hints_accuracy_is_what_counts(loaded, dev):
    model, processor = loaded
    examples = [c for c in dev if c.fields["hint"] != "wrong"]
    dial = PriorDial(model)
    found = calibrate(dial, processor, examples, places=layer_places(dial), doses=(2.0,))
    assert found.plain.objective == found.plain.accuracy["none"].value == 1.0
    assert found.chosen is None and found.after is None  # nothing is better than all right
    assert not any(prior.any() for prior in dial.priors.values())
    with pytest.raises(ValueError, match="tolerance must be at least 0, got -1"):
        calibrate(dial, processor, examples, places={}, tolerance=-1)


def test_the_figure_shows_what_was_measured():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plain = scores(9, 8)
    trials = (Trial("a", 2.0, scores(8, 2)), Trial("a", 1.0, scores(9, 4)), Trial("b", 1.0, scores(7, 6)))
    found = Calibration(plain, trials, trials[1], torch.ones(1, 1), plain, plain, 1.0)
    figure = dose_response(found)
    assert [axis.get_title() for axis in figure.axes] == list(plain.proportions())
    first, second, ring = figure.axes[0].lines
    assert first.get_xydata().tolist() == [[0, 80], [1, 40], [2, 20]]
    assert second.get_xydata().tolist() == [[0, 80], [1, 60]]
    assert ring.get_xydata().tolist() == [[1, 40]]
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    low, high = Proportion(2, 10).interval
    assert band[band[:, 0] == 2][:, 1].min() == pytest.approx(100 * low)
    assert band[band[:, 0] == 2][:, 1].max() == pytest.approx(100 * high)


@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [1, 3]])
def test_a_saved_prior_is_loaded_exactly(loaded, dev, tmp_path, heads):
    """Whole layers become a setting without parameters, heads become weights; the answers are those of the dial."""
    from moda_ext.conversations import encode
    from moda_ext.diagnostics import load_model
    from moda_ext.evaluation.answers import generate_answers

    model, processor = loaded
    doses = torch.zeros(2, 4)
    doses[0, heads] = 3.75
    fresh = load_model(model.name_or_path, device="cpu")[0]
    apply_prior(fresh, doses)
    fresh.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    saved, _ = load_model(str(tmp_path), device="cpu")
    parameters = [name for name, _ in saved.named_parameters() if ".moda." in name]
    assert len(parameters) == (0 if len(heads) == 4 else 1)
    assert saved.config.text_config.moda["layers"] == [0]
    dial = PriorDial(model)
    plain = generate_answers(model, processor, dev)
    dial.set(doses)
    turned = generate_answers(model, processor, dev)
    assert turned != plain and generate_answers(saved, processor, dev) == turned
    inputs, _ = encode(processor, [c.prompt for c in dev[:6]], padding_side="left")
    with torch.no_grad():
        logits = [m(**inputs).logits for m in (fresh, saved, model)]
    assert torch.equal(logits[0], logits[1])
    torch.testing.assert_close(logits[0], logits[2])
