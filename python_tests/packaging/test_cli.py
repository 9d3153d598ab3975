"""The command line, as a user calls it: exit codes, what it prints, and the report in a browser."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from commands import Page, call

import moda_ext
from moda_ext.diagnostics import Diagnosis

pytest.importorskip("typer", reason="typer is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_info():
    code, output = call("info", "--json")
    assert code == 0
    assert json.loads(output) == json.loads(json.dumps(moda_ext.info()))
    code, output = call("info")
    assert code == 0
    assert moda_ext.__version__ in output


def test_help_lists_the_commands():
    code, output = call("--help")
    assert code == 0
    assert all(name in output for name in ("info", "demo", "bench", "diagnose", "verify"))


def test_demo_passes_its_path_on(monkeypatch, tmp_path):
    import moda_ext.demo

    called = []
    monkeypatch.setattr(moda_ext.demo, "main", called.append)
    assert call("demo", "--out", tmp_path / "x.png")[0] == 0
    assert called == [["--out", str(tmp_path / "x.png")]]


def test_bench():
    code, output = call("bench", "--lengths", "32,64", "--head-dim", "8", "--heads", "4", "--seconds", "0.01")
    assert code == 0
    assert output.count("forward + backward") == 2
    code, output = call("bench", "--heads", "6")
    assert code == 2
    assert "must be a multiple of 4, got 6" in output


@pytest.mark.parametrize("missing", ["typer", "matplotlib", "PIL", "transformers"])
def test_without_a_library_the_command_says_what_to_install(missing):
    program = f"import sys; sys.modules['{missing}'] = None; from moda_ext.__main__ import main; main()"
    arguments = ["diagnose", "--model", "random", "--images", "x.jpg", "--prompts", "Hello"]
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip() == f"moda-ext needs {missing}: pip install 'moda_ext[cli]'"


def test_as_a_module():
    result = subprocess.run([sys.executable, "-m", "moda_ext", "info", "--json"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["version"] == moda_ext.__version__


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two photographs: matplotlib's sample, and a mirrored part of it."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib import cbook
    from PIL import Image, ImageOps

    folder = tmp_path_factory.mktemp("photographs")
    with cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        image.save(folder / "hopper.jpg")
        ImageOps.mirror(image.crop((0, 0, 300, 300))).save(folder / "flag.png")
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A tiny Llava checkpoint directory, and one of the same weights with a prior for the image."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from moda_ext.diagnostics.tiny import tiny_llava
    from moda_ext.integrations.transformers import MODAConfig, apply_moda

    folder = tmp_path_factory.mktemp("checkpoints")
    model, processor = tiny_llava(layers=2)
    model.save_pretrained(folder / "plain")
    apply_moda(model, MODAConfig.fixed_prior([[0.0, 2.0], [0.0, 0.0]])).save_pretrained(folder / "rebalanced")
    for name in ("plain", "rebalanced"):
        processor.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def report(checkpoints, photographs, tmp_path_factory):
    """The path of a report that compares both, and what the command printed."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    prompts = out.parent / "prompts.txt"
    prompts.write_text("What is in the picture?\n\nWhich colours <b>are there</b>?\n")
    images = photographs / "hopper.jpg", photographs / "flag.png"
    models = "--model", checkpoints / "plain", "--compare", checkpoints / "rebalanced"
    code, output = call("diagnose", *models, "--images", *images, "--prompts", prompts, "--pictures", "3", "--out", out)
    assert code == 0, output
    return out, output


class TestDiagnose:
    def test_numbers_are_those_of_the_meter(self, report, checkpoints, photographs):
        from moda_ext.diagnostics.runner import diagnose, load_model

        data = json.loads(report[0].with_suffix(".json").read_text())
        before, after = Diagnosis.from_dict(data["before"]), Diagnosis.from_dict(data["after"])
        assert (before.name, after.name) == ("plain", "rebalanced")
        assert before.sequences == after.sequences == 4
        images = [photographs / "hopper.jpg", photographs / "flag.png"]
        prompts = ["What is in the picture?", "Which colours <b>are there</b>?"]
        expected, pictures, notes = diagnose(*load_model(str(checkpoints / "plain")), images, prompts, num_pictures=9)
        torch.testing.assert_close(before.figure("self"), expected.figure("self"))
        assert len(pictures) == 4
        assert notes == []

    def test_the_prior_shows(self, report):
        data = json.loads(report[0].with_suffix(".json").read_text())
        line = next(
            line
            for line in data["lines"]["both rows, with first token"]
            if (line["measure"], line["modality"]) == ("mdi", "vision")
        )
        assert line["after"] < 0.3 * line["before"]  # e^-2 before the softmax
        assert line["uniform_after"] == pytest.approx(line["uniform_before"])
        assert f"{line['before']:.2f}" in report[1]
        assert f"{line['after']:.2f}" in report[1]

    def test_the_report_needs_no_script_and_no_network(self, report):
        page = Page(report[0].read_text())
        assert all(value.startswith("data:") for value in page.loads)
        assert not {"script", "iframe", "object"} & set(page.tags)
        assert "<b>are there</b>" not in report[0].read_text()  # a prompt is text, not markup
        assert "&lt;b&gt;are there&lt;/b&gt;" in report[0].read_text()

    def test_every_figure_is_there_and_described(self, report):
        from PIL import Image

        page = Page(report[0].read_text())
        assert len(page.images) == 7 + 2 * 3  # 2 for both, 2 + 2 for each, similarity; 3 pictures for each model
        for image in page.images:
            kind, data = re.match("data:(.+);base64,(.+)", image["src"]).groups()
            content = base64.b64decode(data)
            if kind == "image/png":
                assert Image.open(io.BytesIO(content)).size[0] > 500
            else:
                assert content.count(b"<path") > 10
            assert len(image["alt"]) > 20

    def test_a_model_of_random_weights_says_so(self, photographs, tmp_path):
        out = tmp_path / "r.html"
        options = {"--images": photographs, "--prompts": "Hello", "--new-tokens": 2, "--out": out}
        code, output = call("diagnose", "--model", "random", *(x for pair in options.items() for x in pair))
        assert code == 0, output
        assert "say nothing about any real model" in output
        assert "say nothing about any real model" in out.read_text()
        diagnosis = Diagnosis.from_json(out.with_suffix(".json").read_text())
        assert diagnosis.sequences == 2  # the directory holds two
        assert len(diagnosis.token_scores) == 2

    def test_new_tokens_show_what_generated_tokens_look_at(self, photographs, tmp_path):
        out = tmp_path / "r.html"
        options = {"--images": photographs / "hopper.jpg", "--prompts": "Hello", "--new-tokens": 4, "--out": out}
        code, output = call("diagnose", "--model", "random", *(x for pair in options.items() for x in pair))
        assert code == 0, output
        data = json.loads(out.with_suffix(".json").read_text())
        assert data["generated_tokens"] == 3
        thirds = data["thirds"]["generated rows, with first token"]
        page = Page(out.read_text())
        for third, (_, mdi) in zip(("early", "middle", "late"), thirds["mdi"], strict=True):
            assert f"{mdi:.4g}" in out.read_text() and f"{mdi:.2f}" in output
            assert f"{third} layers, text over vision" in output
        assert all(f"{aei:.4g}" in out.read_text() for values in thirds["aei"] for aei in values)
        (chart,) = [image for image in page.images if image["alt"].startswith("MDI of each layer")]
        assert base64.b64decode(chart["src"].partition(",")[2]).count(b"<path") > 10

    def test_without_new_tokens_the_report_says_what_is_missing(self, report):
        missing = "No generated token was measured"
        assert missing in report[0].read_text() and missing in report[1]
        assert "What the generated tokens look at" not in report[0].read_text()

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"--images": "nowhere.jpg"}, "no such image: nowhere.jpg"),
            ({"--out": "report.pdf"}, "must end in .html, got report.pdf"),
            ({"--out": "nowhere/report.html"}, "no such directory: nowhere"),
            ({"--prompts": "nowhere.txt"}, "nowhere.txt"),
            ({"--model": "./nowhere"}, "cannot load the checkpoint ./nowhere"),
        ],
    )
    def test_errors(self, photographs, changed, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        options = {
            "--model": "random",
            "--images": photographs,
            "--prompts": "Hello",
            "--out": "report.html",
            **changed,
        }
        code, output = call("diagnose", *(x for pair in options.items() for x in pair))
        assert code == 2
        assert message in output

    def test_a_checkpoint_without_its_processor_is_refused_before_anything_is_measured(
        self, checkpoints, photographs, tmp_path, monkeypatch
    ):
        import moda_ext.diagnostics.runner as runner

        shutil.copytree(checkpoints / "plain", tmp_path / "bare")
        for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "bare" / name).unlink()
        options = ["--model", checkpoints / "plain", "--images", photographs, "--prompts", "Hello", "--compare"]
        monkeypatch.setattr(runner, "load_model", lambda *_, **__: pytest.fail("the first model was loaded"))
        code, output = call("diagnose", *options, tmp_path / "bare", "--out", tmp_path / "r.html")
        assert code == 2
        assert "cannot load the checkpoint" in output and "/bare" in output

        def needs_torchvision(name):
            raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

        monkeypatch.setattr(runner, "load_processor", needs_torchvision)
        code, output = call("diagnose", *options, checkpoints / "plain", "--out", tmp_path / "r.html")
        assert code == 2
        assert "requires the Torchvision library" in output

    def test_an_empty_directory_has_no_images(self, tmp_path):
        code, output = call("diagnose", "--model", "random", "--images", tmp_path, "--prompts", "Hello")
        assert code == 2
        assert "no images (.jpg" in output


@pytest.mark.skipif(BROWSER is None, reason="no Chromium installed (Debian package: chromium)")
class TestInABrowser:
    @staticmethod
    def open(path):
        """(the page's HTML after loading, what the browser logged)."""
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
        arguments += ["--virtual-time-budget=5000", f"--user-data-dir={path.parent / 'profile'}", path.as_uri()]
        environment = {**os.environ, "HOME": str(path.parent)}
        result = subprocess.run([BROWSER, *arguments], capture_output=True, text=True, timeout=120, env=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout, result.stderr

    def test_no_console_message(self, report):
        dom, log = self.open(report[0])
        assert "Where the text looks in the image" in dom
        assert "CONSOLE" not in log

    def test_every_figure_renders(self, report, tmp_path):
        """In a copy that reports the size of its images, and a message to the console that the log must show."""
        probe = """<script>addEventListener("load", () => {
            document.body.dataset.widths = [...document.images].map(image => image.naturalWidth).join();
            console.error("probe"); });</script></body>"""
        copy = tmp_path / "copy.html"
        copy.write_text(report[0].read_text().replace("</body>", probe))
        dom, log = self.open(copy)
        widths = re.search('data-widths="([0-9,]+)"', dom)[1].split(",")
        assert len(widths) == len(Page(report[0].read_text()).images)
        assert all(int(width) > 200 for width in widths)
        assert "CONSOLE" in log and "probe" in log
