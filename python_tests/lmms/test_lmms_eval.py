"""Models in lmms-eval answer what they answer without it, and what cannot be answered is an error."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: python3 tools/dev.py lmms")

from asked import ASKED, PRIOR  # noqa: E402  lmms-eval may be missing

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "lmms-eval.md"
TASK = "moda_ext_local"


def evaluate(checkpoint, folder, batch_size: int = 4, **options) -> tuple[list[str], float]:
    """(answers, their score) by lmms-eval in this process, of a checkpoint for the questions in a folder."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    arguments = ",".join(f"{name}={value}" for name, value in {"pretrained": checkpoint.path, **options}.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        results = simple_evaluate(
            model="moda_ext",
            model_args=arguments,
            tasks=[TASK],
            batch_size=batch_size,
            device="cpu",
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
            cli_args=None,
        )
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples], results["results"][TASK]["same,none"]


def command(checkpoint, folder, *launcher: str) -> tuple[subprocess.CompletedProcess, dict | None]:
    """The command line of lmms-eval, with the results that it wrote, None without any."""
    words = [*(launcher or ["-m"]), "lmms_eval", "--model", "moda_ext", "--model_args", f"pretrained={checkpoint.path}"]
    words += ["--tasks", TASK, "--include_path", ".", "--batch_size", "4", "--device", "cpu", "--output_path", "out"]
    words += ["--log_samples", "--verbosity", "DEBUG"]  # without it every error ends with status 0
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, env=os.environ)
    written = list(Path(folder, "out").rglob("*results.json"))
    return done, json.loads(written[0].read_text()) if written else None


@pytest.fixture
def copy(tmp_path):
    """A folder with a task of one's own."""

    def make(checkpoint) -> Path:
        return Path(shutil.copytree(checkpoint.folder, tmp_path / "task"))

    return make


@pytest.mark.parametrize("batch_size", (1, 4))
@pytest.mark.parametrize("name", ("plain", "moda"))
def test_answers_are_those_without_lmms_eval(checkpoints, name, batch_size):
    checkpoint = checkpoints[name]
    assert evaluate(checkpoint, checkpoint.folder, batch_size) == (checkpoint.answers, 1.0)


def test_the_answers_of_the_models_differ(checkpoints):
    """What the other tests compare is not decided by the question alone."""
    plain, moda, prior = (checkpoints[name].answers for name in ("plain", "moda", "prior"))
    assert len(set(plain)) == len(ASKED)
    assert sum(a != b for a, b in zip(plain, moda, strict=True)) >= 4
    pictured = [bool(images) for images, _ in ASKED]
    assert [a != b for a, b in zip(plain, prior, strict=True)] == pictured
    assert evaluate(checkpoints["plain"], checkpoints["moda"].folder)[1] < 0.5


def test_a_cross_prior_rebalances_a_plain_checkpoint(checkpoints):
    checkpoint = checkpoints["prior"]
    assert evaluate(checkpoint, checkpoint.folder, cross_prior=PRIOR) == (checkpoint.answers, 1.0)


def test_the_command_line(checkpoints, copy):
    folder = copy(checkpoints["moda"])
    done, results = command(checkpoints["moda"], folder)
    assert done.returncode == 0, done.stderr[-4000:]
    assert results["results"][TASK]["same,none"] == 1.0


def test_two_processes_share_the_questions(checkpoints, copy):
    folder = copy(checkpoints["moda"])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done, results = command(checkpoints["moda"], folder, *launcher)
    assert done.returncode == 0, done.stderr[-4000:]
    assert results["results"][TASK]["same,none"] == 1.0
    assert results["n-samples"][TASK]["effective"] == len(ASKED)


def test_a_missing_picture_is_an_error(checkpoints, copy):
    folder = copy(checkpoints["plain"])
    (folder / "2.png").unlink()
    done, results = command(checkpoints["plain"], folder)
    assert done.returncode != 0
    assert "No such file or directory: '2.png'" in done.stderr
    assert results is None


# Without the evaluator


@pytest.fixture(scope="module")
def model(checkpoints):
    from lmms_eval.models import get_model

    return get_model("moda_ext")(str(checkpoints["plain"].path), device="cpu", max_new_tokens=8)


def request(messages, **generation):
    from lmms_eval.api.instance import Instance

    if isinstance(messages, str):
        messages = [{"role": "user", "content": [{"type": "text", "text": messages}]}]
    return Instance(
        request_type="generate_until",
        arguments=("", lambda doc: messages, generation, 0, "local", "test"),
        idx=0,
        metadata={"task": "local", "doc_id": 0, "repeats": 1},
    )


def answers(model, *requests) -> list[str]:
    model.task_dict = {"local": {"test": [None]}}
    return model.generate_until(list(requests))


def test_an_answer_ends_before_the_first_of_the_strings(model):
    from moda_ext.evaluation.lmms_eval.model import endings

    (whole,) = answers(model, request("Why?"))
    assert len(whole) > 4
    middle, late = whole[2:4], whole[-2:]
    assert (
        answers(model, request("Why?", until=[late, middle]), request("Why?", until=middle))
        == [whole[: whole.index(middle)].rstrip()] * 2
    )
    # A blank line is what lmms-eval adds where a task says nothing, and ends no answer.
    assert endings(request("Why?", until=["\n\n", "Q:"])) == ["Q:"] and endings(request("Why?", until="\n\n")) == []
    assert answers(model, request("Why?", until=None), request("Why?", until=["", "never written"])) == [whole] * 2


def test_options_of_tasks_reach_generate(model, monkeypatch):
    """Requests with other options are of another batch."""
    seen = []
    generate = model.model.generate

    def watched(*args, **kwargs):
        names = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "max_new_tokens")
        seen.append({name: kwargs[name] for name in names if kwargs.get(name) is not None})
        return generate(*args, **kwargs)

    monkeypatch.setattr(model.model, "generate", watched)
    plain = {"num_beams": 1, "max_new_tokens": 8}
    greedy, sampled = {**plain, "do_sample": False}, {**plain, "do_sample": True}
    for wanted, expected in (
        ({}, greedy),
        ({"temperature": 0, "top_p": 1.0, "num_beams": 2}, {**greedy, "num_beams": 2}),
        ({"temperature": 0, "do_sample": True}, greedy),
        ({"temperature": 0.5, "do_sample": False, "image_aspect_ratio": "original"}, greedy),
        ({"temperature": 0.5, "top_k": 3}, {**sampled, "temperature": 0.5, "top_k": 3}),
        ({"do_sample": True, "max_new_tokens": 2}, {**sampled, "max_new_tokens": 2}),
    ):
        seen.clear()
        answers(model, request("Why?", **wanted))
        assert seen == [expected]
    seen.clear()
    answers(model, request("Why?"), request("Why?", max_new_tokens=2), request("Who?"))
    assert sorted(options["max_new_tokens"] for options in seen) == [2, 8, 8]  # the batch size is 1


def test_an_option_that_generate_lacks_is_refused_before_anything_runs(model, monkeypatch):
    monkeypatch.setattr(model.model, "generate", lambda **kwargs: pytest.fail("it ran"))
    with pytest.raises(ValueError, match="local: generation_kwargs visual_cot are none of Transformers"):
        answers(model, request("Why?"), request("Why?", visual_cot=True))


@pytest.mark.parametrize(
    ("content", "error", "reason"),
    [
        ([("user", {"type": "video", "url": "film.mp4"})], NotImplementedError, "local 0: .* pictures, not video"),
        ([("user", {"type": "image", "url": "none.png"})], FileNotFoundError, "none.png"),
        ([("user", {"type": "text", "text": "an <image>"})], ValueError, "1 times <image> and 0 images"),
        (
            [("user", {"type": "text", "text": "Why?"}), ("assistant", {"type": "text", "text": "Because"})],
            ValueError,
            "local 0: the last message must be the user's",
        ),
    ],
    ids=["video", "missing picture", "placeholder", "answer"],
)
def test_questions_that_are_refused(model, content, error, reason):
    with pytest.raises(error, match=reason):
        answers(model, request([{"role": role, "content": [part]} for role, part in content]))


def test_kinds_of_requests_that_are_refused(model):
    with pytest.raises(NotImplementedError, match="no likelihood of given ones, which local wants"):
        model.loglikelihood([request("Why?")])
    with pytest.raises(NotImplementedError, match="answers one round, and local has several"):
        model.generate_until_multi_round([request("Why?")])


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("plain", {"batch_size": "auto"}, "batch_size must be a number from 1, got 'auto'"),
        ("plain", {"batch_size": 0}, "batch_size must be a number from 1, got 0"),
        ("plain", {"max_new_tokens": 0}, "max_new_tokens must be a number from 1, got 0"),
        ("plain", {"dtype": "int8"}, "dtype must be auto, float32, bfloat16 or float16, got 'int8'"),
        ("plain", {"cross_prior": "much"}, "cross_prior must be a finite number, got 'much'"),
        ("plain", {"cross_prior": float("-inf")}, "cross_prior must be a finite number, got -inf"),
        ("moda", {"cross_prior": 0.5}, "cross_prior is for a checkpoint without MODA, and .*moda has MODA"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(checkpoints, name, options, reason):
    from lmms_eval.models import get_model

    with pytest.raises(ValueError, match=reason):
        get_model("moda_ext")(str(checkpoints[name].path), device="cpu", **options)


def test_an_unknown_argument_is_refused(checkpoints):
    with pytest.raises(TypeError, match="attention"):
        evaluate(checkpoints["plain"], checkpoints["plain"].folder, attention="moda")


def test_the_tasks_of_the_documentation_exist():
    from lmms_eval.tasks import TaskManager

    rows = re.findall(r"^\| [^|]+ \| `([a-z0-9_]+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    assert len(rows) == 16
    assert set(rows) <= set(TaskManager().all_tasks)
