"""``moda-ext evaluate`` as a user calls it, and its report."""

import base64
import json
import re

import pytest

pytest.importorskip("typer", reason="typer is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from commands import Page, call  # noqa: E402
from questions import write_mmrole, write_questions  # noqa: E402

from moda_ext.evaluation import Answer, Evaluation, TaskResult, evaluate, read_tasks, write_report  # noqa: E402


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    write_questions(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two checkpoints of the same weights, and one of others."""
    from moda_ext.diagnostics.tiny import tiny_llava

    folder = tmp_path_factory.mktemp("checkpoints")
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        model, processor = tiny_llava(layers=2, seed=seed)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def report(checkpoints, questions, tmp_path_factory):
    """The path of a report that compares equal models, and what the command printed."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    models = "--model", checkpoints / "one", "--compare", checkpoints / "same"
    code, output = call(
        "evaluate", *models, "--tasks", "small", "--data", questions, "--max-new-tokens", 3, "--out", out
    )
    assert code == 0, output
    return out, output


class TestReport:
    def test_equal_models_have_no_significant_difference(self, report):
        page, data = report[0].read_text(), json.loads(report[0].with_suffix(".json").read_text())
        assert "no significant difference" in report[1]
        assert page.count("1, no significant difference</td>") == 6  # overall, three accuracies by hint, follows, words
        assert data["overall"]["significant"] is False and data["overall"]["difference"] == 0
        assert [c["significant"] for c in data["by_task"]] == [False] * 5

    def test_answers_are_those_of_the_model(self, report, checkpoints, questions):
        from moda_ext.diagnostics.runner import load_model

        lines = [json.loads(line) for line in report[0].with_suffix(".jsonl").read_text().splitlines()]
        assert len(lines) == 2 * 16
        model = load_model(str(checkpoints / "one"))
        expected = [
            (task.name, task.hint, answer.id, answer.given)
            for task in read_tasks(["small"], questions)
            for answer in evaluate(*model, task, max_new_tokens=3).answers
        ]
        for name in ("one", "same"):
            assert [(x["task"], x["hint"], x["id"], x["given"]) for x in lines if x["model"] == name] == expected

    def test_it_needs_no_script_and_no_network(self, report):
        page = Page(report[0].read_text())
        assert all(value.startswith("data:") for value in page.loads)
        assert not {"script", "iframe", "object"} & set(page.tags)

    def test_figures_and_thumbnails(self, report):
        page = Page(report[0].read_text())
        charts = [image for image in page.images if image["src"].startswith("data:image/svg")]
        assert [image["alt"].split()[0] for image in charts] == ["Right", "Differences"]
        assert all(base64.b64decode(image["src"].partition(",")[2]).count(b"<path") > 10 for image in charts)
        assert len(page.images) - len(charts) == 3 * 2  # two wrong answers with a picture in each form

    def test_what_is_at_chance_is_said(self, report):
        data = json.loads(report[0].with_suffix(".json").read_text())
        tasks = [task for model in data["models"] for task in model["tasks"]]
        assert all(task["at_chance"] is (task["hint"] == "none") for task in tasks)
        assert all((task["chance"] is None) is (task["hint"] != "none") for task in tasks)
        assert report[0].read_text().count("<strong>at chance</strong>") == 2 * 2
        assert "at chance" in report[1]

    def test_language_bias(self, report):
        data = json.loads(report[0].with_suffix(".json").read_text())
        (bias,) = data["models"][0]["language_bias"]
        assert (bias["name"], bias["follows"]["n"], bias["null"]["n"]) == ("colour", 4, 4)
        assert "Language bias" in report[0].read_text()
        null = data["models"][0]["language_bias"][0]["null"]
        assert re.search(rf"<td>{100 * null['count'] / 4:.1f} % \([^)]*\) of 4</td></tr>", report[0].read_text())


def test_models_of_other_weights_and_seeds(checkpoints, questions, tmp_path):
    out = tmp_path / "r.html"
    models = [
        "--model",
        checkpoints / "one",
        checkpoints / "same",
        "--compare",
        checkpoints / "other",
        checkpoints / "one",
    ]
    tasks = ["--tasks", questions / "test.jsonl", "--limit", 2, "--max-new-tokens", 2, "--batch-size", 3]
    code, output = call("evaluate", *models, *tasks, "--out", out)
    assert code == 0, output
    data = json.loads(out.with_suffix(".json").read_text())
    assert [model["model"] for model in data["models"]] == ["one", "same", "other", "one (2)"]
    assert len(data["overall"]["pairs"]) == 2 and data["overall"]["seeds"]["mean"] == data["overall"]["difference"]
    assert [task["n"] for task in data["models"][0]["tasks"]] == [2] * 4
    assert "The first 2 of 4 questions." in out.read_text() and "t-test's p" in out.read_text()


def test_a_judge_scores_long_answers(checkpoints, tmp_path, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    write_mmrole(tmp_path)
    options = ["--model", checkpoints / "one", "--tasks", "mmrole", "--data", tmp_path, "--max-new-tokens", 2]
    out = tmp_path / "r.html"
    code, output = call("evaluate", *options, "--out", out)
    assert code == 0, output
    assert "there is no score, as no judge gave one" in out.read_text() and "no score" in output
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 6

    judge = ["--judge-url", server.url, "--judge-model", "j"]
    for scored in (0, 3):  # the judge is never reached, or not for the second task
        server.replies = ["[Scores]: (3, 4)"] * 8 * scored + [401]
        code, output = call("evaluate", *options, *judge, "--out", out)
        assert code == 2 and "refuses: 401" in output and "the answers are in" in output
        lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
        assert [len(line["scores"]) for line in lines] == [8] * scored + [0] * (6 - scored)

    server.requests.clear()
    server.replies = ["[Scores]: (3, 4)"] * 47 + ["none"]
    code, output = call(
        "evaluate", *options, "--limit", "3", "--judge-url", server.url, "--judge-model", "j", "--out", out
    )
    assert code == 0, output
    assert not server.replies and server.requests[0][1] == "Bearer secret"
    tasks = json.loads(out.with_suffix(".json").read_text())["models"][0]["tasks"]
    assert [task["judge_errors"] for task in tasks] == [0, 1]
    assert set(tasks[0]["scores"].values()) == {0.75}
    assert "right answers" not in output and "0.750 (24 of 24)" in output and "0.750 (23 of 24)" in output
    assert "mmrole out-of-distribution: 1 of 24 verdicts are missing and in no mean" in output
    page = out.read_text()
    assert page.count("<td>0.750 of 3</td>") == 15 and page.count("<td>0.750 of 2</td>") == 1 and "0.750" in output
    assert "secret" not in out.read_text()


def test_groups_of_several_tasks_have_a_line(tmp_path):
    """Of questions without a hint: 1 of 2, and 2 of 3."""
    outcomes = {("a", "none"): [True, False], ("b", "none"): [True, True, False], ("a", "right"): [True]}
    results = [
        TaskResult(
            name, tuple(Answer(str(i), "?", "x", "x", ok, hinted="x") for i, ok in enumerate(answers)), "sight", hint
        )
        for (name, hint), answers in outcomes.items()
    ]
    write_report(tmp_path / "r.html", [Evaluation("m", (*results, TaskResult("c", results[0].answers, "mind")))])
    page = (tmp_path / "r.html").read_text()
    assert re.findall(r"<td>all (.*?)</td><td>(\d+)</td><td></td><td>(.*?) %", page) == [
        ("sight, without a hint", "5", "60.0")
    ]


def test_an_answer_is_text_and_not_markup(tmp_path):
    answer = Answer("1", "<i>Why</i>?", "<b>", "<script>alert(1)</script>", False)
    write_report(tmp_path / "r.html", [Evaluation("<u>", (TaskResult("<t>", (answer,)),))])
    page = (tmp_path / "r.html").read_text()
    assert not {"script", "i", "b", "u", "t"} & set(Page(page).tags)
    assert "✗ &lt;script&gt;" in page


def test_a_class_of_labels_has_its_f1_in_the_report(tmp_path):
    given = ["yes", "no", "yes", "perhaps"]
    answers = [
        Answer(str(i), "?", e, g, e == g, ("no", "yes"))
        for i, (e, g) in enumerate(zip(["yes", "no"] * 2, given, strict=True))
    ]
    result = TaskResult("hfm", tuple(answers), labels=("no", "yes"), positive="yes")
    write_report(tmp_path / "r.html", [Evaluation("m", (result,))])
    row = re.search(r"<td>hfm: m</td>(.*?)</tr>", (tmp_path / "r.html").read_text())[1]
    assert row == "<td>binary 100.0 %, macro 83.3 %</td><td>1</td>"  # no: 1 right of 2 expected and 1 given, 2/3


class TestErrors:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"--tasks": "nothing"}, "'nothing' is no file of questions"),
            ({"--tasks": "hfm"}, "the tasks 'hfm' need the folder of their data"),
            ({"--out": "report.pdf"}, "must end in .html, got report.pdf"),
            ({"--out": "nowhere/report.html"}, "no such directory: nowhere"),
            ({"--model": "./nowhere"}, "cannot load the checkpoint ./nowhere"),
            ({"--batch-size": 0}, "--batch-size"),
            ({"--judge-url": "http://localhost"}, "one needs the other"),
        ],
    )
    def test_are_said_before_anything_runs(self, questions, changed, message, tmp_path, monkeypatch):
        import moda_ext.diagnostics.runner as runner

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(runner, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
        options = {"--model": "random", "--tasks": questions, "--out": "report.html", **changed}
        code, output = call("evaluate", *(x for pair in options.items() for x in pair))
        assert code == 2
        assert message in output

    @pytest.mark.parametrize("tasks", [["test.jsonl"], ["."], ["small", "--data", "."]])
    def test_a_report_does_not_overwrite_its_questions(self, questions, tasks, monkeypatch):
        monkeypatch.chdir(questions)
        before = (questions / "test.jsonl").read_bytes()
        code, output = call("evaluate", "--model", "random", "--tasks", *tasks, "--out", "test.html")
        assert code == 2 and "would overwrite the questions test.jsonl" in output
        assert (questions / "test.jsonl").read_bytes() == before

    @pytest.mark.parametrize("rest", [[], ["--tasks", "small"]])
    def test_an_option_without_a_value(self, rest):
        """As of a variable of the shell that is empty: the next option is no value."""
        code, output = call("evaluate", "--model", *rest)
        assert code == 2 and "Invalid value for --model: needs a value" in output

    def test_a_pair_needs_two(self, questions, tmp_path):
        models = ["--model", "random", "random", "--compare", "random"]
        code, output = call("evaluate", *models, "--tasks", questions, "--out", tmp_path / "r.html")
        assert code == 2 and "needs a checkpoint for each of --model, got 1 for 2" in output

    def test_a_processor_without_a_chat_template(self, questions, tmp_path):
        from moda_ext.diagnostics.tiny import tiny_llava

        model, processor = tiny_llava(layers=1)
        processor.chat_template = None
        model.save_pretrained(tmp_path / "bare")
        processor.save_pretrained(tmp_path / "bare")
        code, output = call(
            "evaluate", "--model", tmp_path / "bare", "--tasks", questions, "--out", tmp_path / "r.html"
        )
        assert code == 2 and "has no chat template" in output

    def test_one_value_stays_one(self, tmp_path):
        """Several are for options that take several: diagnose has one model."""
        code, output = call("diagnose", "--model", "random", "random", "--images", "x", "--prompts", "y")
        assert code == 2 and "unexpected extra argument" in output
