"""README.md, docs/ and examples/: their code runs, their figures are within bounds, and what they cite exists."""

import ast
import importlib
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

import moda_ext

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "docs").exists():
    pytest.skip("the tests are not in a checkout", allow_module_level=True)

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
CHECKPOINT = "llava-hf/llava-1.5-7b-hf"  # what the pages call the model that they load


def code_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def names_of(paths: list[Path]):
    return {"argvalues": paths, "ids": [str(path.relative_to(ROOT)) for path in paths]}


def needs(code: str) -> None:
    """Skips where a package is missing that the code imports, or that what it imports does."""
    found = {node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)}
    found |= {name.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for name in node.names}
    packages = {module.partition(".")[0] for module in found} & {"PIL", "matplotlib", "peft", "transformers"}
    packages |= {"transformers"} if "load_model" in code or "integrations.transformers" in code else set()
    packages |= {"matplotlib"} if "figures" in code else set()
    packages |= {"matplotlib", "scipy"} if "moda_ext.evaluation" in code else set()
    for package in sorted(packages):
        pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A directory with a tiny checkpoint under the name of a real one, as a user has it."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from vision_language import save_llava_with_processor

    path = tmp_path_factory.mktemp("models")
    save_llava_with_processor(path / CHECKPOINT)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(page: Path, request, folder: Path) -> dict:
    """The variables that the blocks of a page leave, run in order, beside a photograph and a checkpoint if need be."""
    blocks = code_of(page)
    needs("".join(blocks))
    if "photo.jpg" in "".join(blocks):
        image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
        image.radial_gradient("L").convert("RGB").save(folder / "photo.jpg")
    if CHECKPOINT in "".join(blocks):
        (folder / CHECKPOINT).parent.mkdir()
        (folder / CHECKPOINT).symlink_to(request.getfixturevalue("checkpoint") / CHECKPOINT)
    variables = {"__name__": page.stem}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), variables)
    return variables


def check_readme(found: dict, folder: Path, printed: str) -> None:
    """The model of the README is trained, and what it saved gives its logits."""
    import transformers
    from vision_language import IMAGE

    from moda_ext.integrations.transformers import check_identity

    model, inputs = found["model"].eval(), found["inputs"]
    assert found["prior"].grad[1] < 0  # the loss asks for more of the image
    assert (inputs["input_ids"] == IMAGE).sum() == 4
    with pytest.raises(ValueError, match="MODA moves this model's logits"):
        check_identity(model, inputs, tolerance=1e-6)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained("llava-moda").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def check_transformers(found: dict, folder: Path, printed: str) -> None:
    """A prior in the config is a prior by apply_moda, and the saved directory has its processor."""
    import transformers

    from moda_ext.integrations.transformers import MODAConfig, apply_moda

    plain = transformers.AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
    expected = apply_moda(plain, MODAConfig.fixed_prior([[0.0, 0.5], [0.0, 0.0]]))
    with torch.no_grad():
        logits = [model.eval()(**found["inputs"]).logits for model in (found["rebalanced"], expected)]
    assert torch.equal(*logits)
    transformers.AutoProcessor.from_pretrained("llava-moda")
    assert [layer for layer, _ in found["records"]] == [0, 1]


def check_diagnosis(found: dict, folder: Path, printed: str) -> None:
    from moda_ext.diagnostics import Diagnosis

    assert "torch.Size([4, 4, 2])" in printed
    assert (folder / "disparity.png").stat().st_size > 10_000
    assert Diagnosis.from_json((folder / "diagnosis.json").read_text()).tokens["vision"] == 64
    assert found["generated"].generated_tokens == 3
    assert found["generated"].thirds("mdi").isfinite().all()


def check_evaluation(found: dict, folder: Path, printed: str) -> None:
    """The random model's answers are in the report, which compares it with itself."""
    assert (found["overall"].difference, found["overall"].significant) == (0, False)
    assert "no significant difference" in (folder / "evaluation.html").read_text()
    assert found["results"][0].answers[0].given in printed


CHECKS = {
    "README.md": check_readme,
    "transformers.md": check_transformers,
    "diagnosis.md": check_diagnosis,
    "evaluation.md": check_evaluation,
}


@pytest.mark.parametrize("page", **names_of([page for page in PAGES if code_of(page)]))
def test_the_code_of_a_page_runs(page, request, folder, capsys):
    found = run(page, request, folder)
    if page.name in CHECKS:
        CHECKS[page.name](found, folder, capsys.readouterr().out)


@pytest.mark.parametrize("example", **names_of(EXAMPLES))
def test_an_example_runs(example, folder, monkeypatch, capsys):
    needs(example.read_text())
    monkeypatch.setattr("sys.argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert {
        "decode": "decoding and one pass differ by",
        "replace_attention": "answers are equal: True",
        "finetune": "the logits are the same",
        "train_parallel": "saved moda.safetensors",
        "diagnose": "the model",
        "understand_character": "relation: ",
        "plan_conversation": "option 3: ",
    }[example.stem] in printed


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 900
    assert all(path.stat().st_size < 150_000 for path in (ROOT / "docs" / "images").iterdir())


def test_every_public_name_is_in_the_api_page():
    documented = re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    modules = [
        "moda_ext.attention",
        "moda_ext.alignment",
        "moda_ext.mask",
        "moda_ext.diagnostics",
        "moda_ext.evaluation",
    ]
    if torch.distributed.is_available():
        modules.append("moda_ext.distributed")
    if importlib.util.find_spec("transformers"):
        modules.append("moda_ext.integrations.transformers")
    public = {f"{name}.{item}" for name in modules for item in importlib.import_module(name).__all__}
    assert public <= set(documented)
    for name in documented:
        module, _, item = name.rpartition(".")
        if not name.startswith(("moda_ext.integrations", "moda_ext.distributed")) or module in modules:
            assert hasattr(importlib.import_module(module), item) or importlib.util.find_spec(name)  # or a module


def test_the_citation_names_this_version():
    assert f"\nversion: {moda_ext.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_continuous_integration_calls_dev_py():
    """And nothing else, so that anybody can run the same."""
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    commands = re.findall(r"\brun: (.*)", workflow)
    assert commands and all(re.fullmatch(r"python tools/dev\.py \w+( \$\{\{ matrix\.entry \}\})?", c) for c in commands)
    dev = (ROOT / "tools" / "dev.py").read_text()
    entries = re.search(r"entry: \[(.*)\]", workflow)[1].split(", ")
    assert all(f"def {command.split()[2]}(" in dev for command in commands)
    assert all(f'"{entry}":' in dev for entry in entries)


# What is cited

FOLDERS = ("benchmarks", "cmake", "csrc", "docs", "examples", "moda_ext", "python_tests", "tools")
PATH = re.compile(rf"(?<![\w./:-])(?:{'|'.join(FOLDERS)})/[\w./*<>-]*[\w*>]")  # csrc/<device>: any device
DOCUMENT = re.compile(r"(?<![\w./-])([\w-]+\.md)\b")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
SECTION = re.compile(r"mathematics\.md[\s/#]*sections?[\s/#]+(\d)(?:(?:,| and)[\s/#]+(\d))?")
HEADING = re.compile(r'(\w+\.md),[\s/#]+"([^"]+)"')


def tracked() -> list[Path]:
    """The text files of the repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    suffixes = {".py", ".md", ".h", ".cpp", ".cu", ".cmake", ".txt", ".toml", ".yml", ".json", ".cff", ".in", ""}
    paths = [ROOT / name for name in listed.stdout.splitlines() if Path(name).suffix in suffixes]
    return [path for path in paths if path.exists() and path != Path(__file__)]


def test_cited_files_exist():
    files = tracked()
    documents = {path.name for path in files}
    missing = []
    for path in files:
        text = path.read_text()
        cited = [name for name in PATH.findall(text) if not any(ROOT.glob(re.sub(r"<\w+>", "*", name)))]
        cited += [name for name in DOCUMENT.findall(text) if name not in documents]
        if path.suffix == ".md":
            cited += [name for name in LINK.findall(text) if not (path.parent / name).exists()]
        missing += [f"{path.relative_to(ROOT)}: {name}" for name in cited]
    assert not missing, "\n".join(missing)


def test_cited_sections_exist():
    """Comments cite sections of the mathematics by number, and of other pages by heading."""
    pages = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
    cited = set()
    for path in tracked():
        text = path.read_text()
        cited |= {("mathematics.md", f"{n}.") for match in SECTION.findall(text) for n in match if n}
        cited |= {match for match in HEADING.findall(text) if match[0] in pages}
    missing = [(page, start) for page, start in cited if not re.search(rf"^##+ {re.escape(start)}", pages[page], re.M)]
    assert {("mathematics.md", "1."), ("kernels.md", "Structure")} <= cited and not missing, missing


def test_cited_tests_exist():
    tests = "".join(path.read_text() for path in (ROOT / "python_tests").rglob("test_*.py"))
    cited = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert cited and all(f"def {name}(" in tests for name in cited)
