"""The judge of long answers, against a local server that speaks as OpenAI's does."""

import base64
import io

import pytest

pytest.importorskip("PIL", reason="pillow is not installed")

from moda_ext.conversations import Conversation  # noqa: E402
from moda_ext.evaluation import (  # noqa: E402
    ASPECTS,
    Answer,
    MalformedVerdict,
    OpenAIJudge,
    Task,
    TaskResult,
    judge_answers,
)
from moda_ext.evaluation.judge import parse_scores  # noqa: E402


def judge(server, **options):
    return OpenAIJudge(server.url, "a-judge", key="secret", wait=0.0, **options)


@pytest.fixture
def task():
    from PIL import Image

    fields = {"role": "Ann", "script": "The Sea", "other_role": "a curious human"}
    turns = (("system", "Play."), ("user", "<image>\nWho are you?"), ("assistant", "Ann, of the sea."))
    pictures = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    conversations = tuple(Conversation(str(i), turns, (image,), fields) for i, image in enumerate(pictures))
    return Task("mmrole", conversations, judged=True)


@pytest.fixture
def result():
    answers = tuple(Answer(str(i), "Who are you?", "Ann, of the sea.", "A model.", None) for i in range(2))
    return TaskResult("mmrole", answers, judged=True)


class TestVerdicts:
    @pytest.mark.parametrize(
        ("verdict", "scores"),
        [
            ("A is dull. [Scores]: (4, 8)", (4, 8)),
            ("x\n[Scores]:(10,1)", (10, 1)),
            ("[Scores]: ( 7.5 , 9 )\n", (7.5, 9)),
        ],
    )
    def test_scores(self, verdict, scores):
        assert parse_scores(verdict) == scores

    @pytest.mark.parametrize(
        "verdict",
        ["", "A is 4, B is 8", "[Scores]: 4, 8", "[Scores]: (4, x)", "[Scores]: (4, 8) [Scores]: (5, 8)", None]
        + ["[Scores]: (0, 8)", "[Scores]: (4, 11)", "[Scores]: (-4, 8)", "[Scores]: (4, 8, 9)"],
    )
    def test_what_is_none(self, verdict):
        with pytest.raises(MalformedVerdict):
            parse_scores(verdict)


class TestRequests:
    def test_what_is_sent(self, server, task):
        from PIL import Image

        server.replies = ["Hm. [Scores]: (4, 8)"]
        assert judge(server).score(task.conversations[0], "A model.", "Fluency") == (4, 8)
        ((path, key, body),) = server.requests
        assert (path, key, body["model"], body["temperature"]) == (
            "/v1/chat/completions",
            "Bearer secret",
            "a-judge",
            0,
        )
        image, text = body["messages"][-1]["content"]
        kind, data = image["image_url"]["url"].split(",")
        assert kind == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (8, 6)
        for part in ("Ann", "The Sea", "a curious human", "Who are you?", "A model.", "Ann, of the sea.", "Fluency"):
            assert part in text["text"]
        assert "Play." not in text["text"] and "<image>" not in text["text"]

    def test_the_key_is_of_the_environment(self, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "from outside")
        one = OpenAIJudge("http://x", "m")
        assert one.key == "from outside" and "from outside" not in repr(one)
        monkeypatch.delenv("OPENAI_API_KEY")
        assert OpenAIJudge("http://x", "m").key is None

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_a_busy_server_is_asked_again(self, server, task, status):
        server.replies = [status, status, "[Scores]: (9, 9)"]
        assert judge(server).score(task.conversations[0], "x", "Fluency") == (9, 9)
        assert len(server.requests) == 3

    def test_but_not_for_ever(self, server, task):
        server.replies = [503] * 9
        with pytest.raises(ConnectionError, match="gave no answer in 3 attempts: 503"):
            judge(server, attempts=3).score(task.conversations[0], "x", "Fluency")
        assert len(server.requests) == 3

    def test_a_refusal_is_final(self, server, task):
        server.replies = [401] * 9
        with pytest.raises(ConnectionError, match="refuses: 401"):
            judge(server).score(task.conversations[0], "x", "Fluency")
        assert len(server.requests) == 1

    def test_nobody_there(self, task):
        with pytest.raises(ConnectionError, match="gave no answer in 2 attempts"):
            OpenAIJudge("http://127.0.0.1:9", "m", attempts=2, wait=0.0).score(task.conversations[0], "x", "Fluency")


def test_scores_are_ratios_and_errors_are_counted(server, task, result):
    server.replies = ["[Scores]: (4, 8)"] * 8 + ["[Scores]: (9, 9)"] * 7 + ["They are equal."]
    judged = judge_answers(result, task, judge(server))
    expected = dict.fromkeys(ASPECTS, 0.75)
    expected["Tone Consistency"] = 0.5  # of the one verdict that there is
    assert judged.judged_scores() == pytest.approx(expected)
    assert judged.judge_errors == 1
    assert "0 times [Scores]: (a, b) in 'They are equal.'" in judged.answers[1].errors["Tone Consistency"]
    assert judged.summary()["judge_errors"] == 1


def test_what_is_scored_before_the_judge_fails_is_kept(server, task, result):
    server.replies = ["[Scores]: (4, 8)"] * 3 + [401] * 13
    judged = judge_answers(result, task, judge(server))
    assert judged.judged_scores() == dict.fromkeys(list(ASPECTS)[:3], 0.5)
    assert [len(answer.errors) for answer in judged.answers] == [5, 8]
    assert "refuses: 401" in judged.answers[1].errors["Fluency"]
    server.replies = ["They are equal."] + [401] * 15  # reached, though no score came of it
    assert judge_answers(result, task, judge(server)).judge_errors == 16
    server.replies = [401]
    with pytest.raises(ConnectionError, match="refuses: 401"):
        judge_answers(result, task, judge(server))


def test_without_a_judge_there_is_no_score(result):
    assert result.judged_scores() == {}
    with pytest.raises(ValueError, match="is scored by a judge"):
        result.accuracy  # noqa: B018


def test_a_result_of_other_questions(task, result):
    other = Task("mmrole", task.conversations[:1], judged=True)
    with pytest.raises(ValueError, match="not of the questions"):
        judge_answers(result, other, None)
