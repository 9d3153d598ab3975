"""Answers of a model, what is counted of them, and models compared."""

import dataclasses
import json
import re

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")

from questions import COLOURS, trained_llava, write_questions  # noqa: E402

from moda_ext.evaluation import (  # noqa: E402
    Answer,
    Evaluation,
    TaskResult,
    compare,
    evaluate,
    forced_matches,
    generate_answers,
    language_bias,
    read_questions,
    summarize,
)
from moda_ext.training.collator import IGNORED, Collator  # noqa: E402


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return read_questions(write_questions(tmp_path_factory.mktemp("questions")))


@pytest.fixture(scope="module")
def trained(tasks):
    """A model that was taught half of the questions of each task."""
    return trained_llava([c for task in tasks for c in task.conversations[::2]])


@pytest.fixture(scope="module")
def results(trained, tasks):
    return [evaluate(*trained, task, batch_size=3, max_new_tokens=12) for task in tasks]


def test_generated_answers_match_as_forced_ones_do(trained, tasks, results):
    """On every question, right and wrong ones."""
    for task, result in zip(tasks, results, strict=True):
        correct = [answer.correct for answer in result.answers]
        assert correct == forced_matches(*trained, task.conversations, batch_size=2)
        assert correct[::2] == [True, True], task.title
    assert not all(answer.correct for result in results for answer in result.answers)


def test_forced_matches_are_those_of_all_logits(trained, tasks, monkeypatch):
    """Computed for the answers alone, of which a batch has shorter and longer ones."""
    model, processor = trained
    asked = [c for task in tasks for c in task.conversations]
    expected = []
    for conversation in asked:
        inputs = Collator(processor)([conversation])
        labels = inputs.pop("labels")[0, 1:]
        with torch.no_grad():
            chosen = model(**inputs).logits[0, :-1].argmax(dim=-1)
        expected.append(torch.equal(chosen[labels != IGNORED], labels[labels != IGNORED]))
    kept, forward = [], model.forward

    def watched(*args, **kwargs):
        found = forward(*args, **kwargs)
        kept.append(found.logits.shape[1] / kwargs["input_ids"].shape[1])
        return found

    monkeypatch.setattr(model, "forward", watched)
    assert forced_matches(model, processor, asked, batch_size=3) == expected
    assert set(expected) == {True, False}
    assert max(kept) < 0.5


def test_decoding_is_greedy_whatever_the_checkpoint_says(trained, tasks, results, monkeypatch):
    model, processor = trained
    asked, given = tasks[0].conversations, [answer.given for answer in results[0].answers]
    changed = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 3, "do_sample": True}
    assert generate_answers(model, processor, asked, max_new_tokens=12, repetition_penalty=5.0) != given
    for name, value in changed.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert generate_answers(model, processor, asked, max_new_tokens=12) == given


def test_equal_models_do_not_differ(results):
    before, after = Evaluation("a", tuple(results)), Evaluation("b", tuple(results))
    overall, by_task = compare([before], [after])
    assert overall.difference == 0 and not overall.significant
    assert [c.title for c in by_task] == [
        "colour",
        "colour, right hint",
        "colour, wrong hint",
        "colour, wrong hint: follows it",
        "word",
    ]
    assert not any(c.significant for c in by_task)
    sentences = summarize([before], [after])
    assert "b less a, all questions without a hint: +0.0 points" in sentences[-2]
    assert "no significant difference" in sentences[-2]


def test_an_evaluation_is_the_same_from_json(results):
    evaluation = Evaluation("a", tuple(results))
    assert Evaluation.from_dict(json.loads(json.dumps(evaluation.to_dict()))) == evaluation
    assert TaskResult.from_dict(json.loads(json.dumps(results[0].to_dict()))) == results[0]


def test_answers_say_what_was_asked(tasks, results):
    answer = results[2].answers[1]
    assert (answer.id, answer.question, answer.expected) == ("c1 wrong", "Hint: red. What colour?", "green")
    assert (answer.hinted, answer.key) == ("red", "green")
    assert answer.images == (str(tasks[2].conversations[1].images[0]),)


def test_a_model_in_training_mode_is_refused(trained, tasks):
    model, processor = trained
    model.train()
    try:
        with pytest.raises(ValueError, match="is in training mode"):
            evaluate(model, processor, tasks[0])
    finally:
        model.eval()


def result(given, expected=None, **options):
    """A task result with these answers."""
    expected = expected or ["yes"] * len(given)
    choices = options.pop("choices", options.get("labels", ()))
    hinted, keys = options.pop("hinted", None), options.pop("keys", [None] * len(given))
    answers = (
        Answer(str(i), "?", e, g, g == e, choices, hinted, key)
        for i, (e, g, key) in enumerate(zip(expected, given, keys, strict=True))
    )
    return TaskResult(options.pop("name", "t"), tuple(answers), **options)


def test_chance_is_the_best_blind_answer():
    expected = ["a"] * 6 + ["b"] * 3 + ["c"]
    assert result(expected, expected).chance == 0.6
    assert result(expected[5:], expected[5:]).chance == 0.6  # three of five are b
    assert result(["a", "b"], ["a", "b"], choices=("a", "b")).chance == 0.5
    assert result(["a", "b", "c", "d"], ["a", "b", "c", "d"], choices=("a", "b")).chance == 0.5  # larger than 1 in 4
    hinted = result(["a", "b"], ["a", "b"], hint="right", hinted="a")
    assert hinted.chance is None and not hinted.at_chance


def test_at_chance_is_an_interval_that_reaches_it():
    """Of 40 answers of which half are yes: 26 right have an interval from 0.495, 27 from 0.521."""
    expected = ["yes", "no"] * 20
    for right, at_chance in ((26, True), (27, False), (5, True)):
        given = expected[:right] + ["?"] * (40 - right)
        assert result(given, expected).at_chance is at_chance


def test_f1_is_of_the_labels():
    """By hand: a is 2 of 3 given and 2 of 2 expected, so 4/5; b 0 of 1 and 0 of 2; one answer is none of them."""
    found = result(["a", "A.", "a", "maybe", "b"], ["a", "a", "b", "b", "c"], labels=("a", "b", "c"))
    assert found.f1() == pytest.approx({"macro": 0.8 / 3, "weighted": 0.8 * 2 / 5})
    assert found.not_a_choice == 1
    two = dataclasses.replace(found, labels=("a", "b"), positive="a")
    assert two.f1() == pytest.approx({"binary": 0.8, "macro": 0.4})
    assert result(["x"]).f1() == {} and result(["x"]).not_a_choice is None


def test_language_bias_and_its_null():
    keys = ["p", "q", "r", "s"]
    plain = result(["yes", "no", "yes", "no"], keys=keys)
    wrong = result(["no", "no", "no", "yes"], hint="wrong", hinted="No.", keys=["q", "r", "s", "other"])
    (bias,) = language_bias([plain, result(["yes"], hint="right", hinted="yes"), wrong])
    assert (bias.follows.count, bias.follows.n) == (3, 4)
    assert (bias.null.count, bias.null.n) == (2, 3)  # q and s, of those that are asked without a hint too
    assert {hint: share.value for hint, share in bias.accuracy.items()} == {"none": 0.5, "right": 1, "wrong": 0.25}
    (alone,) = language_bias([wrong])
    assert alone.null is None and set(alone.accuracy) == {"wrong"}


def test_a_hint_and_its_null_are_told_of_the_same_tasks():
    """Two of three follow where one of two would anyway; a task without a null is in no such sentence."""
    plain = result(["yes", "no"], keys=["p", "q"])
    hinted = result(["no", "no", "yes"], hint="wrong", hinted="no", keys=["p", "q", "other"])
    alone = result(["no"] * 5, hint="wrong", hinted="no", name="u")
    (sentence,) = summarize([evaluation("m", plain, hinted, alone)])
    assert re.search(r"A wrong hint is followed in 66\.7 % \([^)]*\) of 3 questions; without a hint,", sentence)
    assert re.search(r"that answer is given in 50\.0 % \([^)]*\) of 2\.$", sentence)
    (sentence,) = summarize([evaluation("m", alone)])
    assert re.search(r"A wrong hint is followed in 100\.0 % \([^)]*\) of 5 questions\.$", sentence)


def evaluation(name, *results):
    return Evaluation(name, results)


def test_tasks_are_corrected_for_their_number():
    """Six questions gained and none lost have p = 1/32: significant alone, but not among two tasks."""
    before, after = (result(answers + ["yes"] * 4) for answers in (["no"] * 6, ["yes"] * 6))
    _, (alone,) = compare([evaluation("a", before)], [evaluation("b", after)])
    assert alone.p == alone.corrected == pytest.approx(1 / 32) and alone.significant
    same = result(["yes"], name="u")
    _, (first, second) = compare([evaluation("a", before, same)], [evaluation("b", after, same)])
    assert (first.corrected, second.corrected) == (pytest.approx(1 / 16), 1)
    assert not first.significant
    sentences = summarize([evaluation("a", before)], [evaluation("b", after)])
    assert "these differ: t (+60.0 points)" in sentences[-1]


def test_several_seeds_must_agree():
    """Gains of 20 and 2 of 40 are significant by McNemar's test, but not over two seeds."""
    before = [evaluation(f"a{i}", result(["no"] * 40)) for i in range(2)]
    after = [evaluation(f"b{i}", result(["yes"] * gained + ["no"] * (40 - gained))) for i, gained in enumerate((20, 2))]
    overall, _ = compare(before, after)
    assert overall.questions.p < 1e-5 and overall.seeds.p > 0.05
    assert overall.p == overall.seeds.p and not overall.significant
    assert overall.difference == pytest.approx((0.5 + 0.05) / 2)
    assert overall.interval[0] < 0 and overall.interval[1] == 1


def test_copies_of_a_pair_prove_no_more_than_the_pair():
    """Five questions gained and none lost have p = 1/16, however often they are asked."""
    before, after = (
        evaluation(name, result([answer] * 5 + ["yes"] * 9)) for name, answer in (("a", "no"), ("b", "yes"))
    )
    (one, _), (three, _) = compare([before], [after]), compare([before] * 3, [after] * 3)
    assert one.p == three.p == pytest.approx(1 / 16)
    assert three.questions.interval == one.interval and not three.significant


def test_overall_is_over_questions_without_a_hint():
    with_hint = result(["no"] * 5, hint="wrong", hinted="no")
    one = evaluation("a", result(["yes", "no"]), with_hint)
    assert one.overall() == [True, False]
    overall, _ = compare([evaluation("a", with_hint)], [evaluation("b", with_hint)])
    assert overall is None


def test_models_with_other_questions_are_not_compared():
    one, other = evaluation("a", result(["yes"])), evaluation("b", result(["yes"], name="u"))
    with pytest.raises(ValueError, match="not asked the same questions"):
        compare([one], [other])
    with pytest.raises(ValueError, match="got 1 and 2"):
        compare([one], [one, one])


@pytest.mark.parametrize(
    "changed", [{"expected": "no"}, {"hinted": "no"}, {"choices": ("yes",)}, {"images": ("a/y.png",)}]
)
def test_questions_of_one_name_may_differ(changed):
    """The id and the text are the same, and something else is not, such as in a file that has been mended."""
    one = result(["yes"])
    same, other = (
        dataclasses.replace(one, answers=(dataclasses.replace(one.answers[0], **{"images": ("a/x.png",), **more}),))
        for more in ({}, changed)
    )
    moved = dataclasses.replace(same, answers=(dataclasses.replace(same.answers[0], images=("b/x.png",)),))
    assert compare([evaluation("a", same)], [evaluation("b", moved)])[0].difference == 0
    with pytest.raises(ValueError, match="not asked the same questions"):
        compare([evaluation("a", same)], [evaluation("b", other)])


def test_colours_are_told_apart_only_by_the_picture(results):
    """The question is the same for all, so that what was learnt is in the picture."""
    assert {answer.question for answer in results[0].answers} == {"What colour?"}
    assert [answer.given for answer in results[0].answers][::2] == list(COLOURS)[::2]
