"""Recipes: what is read from YAML, and what is refused before anything is loaded."""

from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="pyyaml is missing: moda_ext[train]")
import yaml
from conversations import write_data, write_recipe

from moda_ext.training import Lora, Source, Stage, read_recipe
from moda_ext.training.recipe import differing_keys

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def path(tmp_path):
    (tmp_path / "model").mkdir()
    return write_recipe(tmp_path, tmp_path / "model", write_data(tmp_path / "data", 1))


def test_overrides_and_defaults(path, tmp_path):
    recipe = read_recipe(
        path,
        ["stages.instruct.lr=1e-4", "stages.0.lora.r=2", "seed=3", "moda=null", "stages.instruct.betas=[0, 0.5]"],
    )
    (stage,) = recipe.stages
    assert (stage.lr, stage.betas, recipe.seed, recipe.moda) == (1e-4, [0.0, 0.5], 3, None)
    assert stage.lora == Lora(r=2, alpha=8, dropout=0.2)
    assert stage.vision_lr == Stage("s", ["text"]).vision_lr == 2e-6
    assert recipe.data == [Source(path=str(tmp_path / "data/data.jsonl"))]
    other = read_recipe(path, ["stages.instruct.lora=null", "data.0.fraction=0.5"])
    assert other.stages[0].lora is None and other.data[0].fraction == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.instruct.learning_rate=1", "stages.instruct.learning_rate is unknown; known are name, train"),
        ("stages.instruct.lora.rank=1", "stages.instruct.lora.rank is unknown"),
        ("stages.instruct.lr=fast", "stages.instruct.lr must be float, got 'fast'"),
        ("stages.instruct.lr=true", "stages.instruct.lr must be float, got True"),
        ("stages.instruct.lr=.nan", "stages.instruct.lr must be a finite number, got nan"),
        ("stages.instruct.lr=null", "stages.instruct.lr must be float, got None"),
        ("stages.instruct.lr=-1", "stages.instruct.lr must not be negative"),
        ("stages.instruct.steps=1.5", "stages.instruct.steps must be int, got 1.5"),
        ("stages.instruct.steps=0", "stages.instruct.steps must be positive"),
        ("stages.instruct.train=projector", "stages.instruct.train must be a list"),
        ("stages.instruct.train=[eyes]", "stages.instruct.train must be a list of text, vision, projector, moda"),
        ("stages.instruct.train=[text]", "stages.instruct.train must not have text, which has lora"),
        ("stages.instruct.autocast=fp8", "stages.instruct.autocast must be one of bf16, none"),
        ("stages.instruct.schedule=zigzag", "stages.instruct.schedule must be one of "),
        ("stages.instruct.name=../x", "stages.../x.name must be a folder's name, of letters, digits, _ and -"),
        ("stages.instruct.name=a.b", "stages.a.b.name must be a folder's name"),
        ("stages.instruct.name=unfinished", "stages.unfinished.name must be a folder's name"),
        ("stages.align.lr=1", "stages.align: there is no align"),
        ("stages.instruct.lr.x=1", "stages.instruct.lr.x: there is nothing"),
        ("stages.instruct.lora.r=0", "stages.instruct.lora.r must be at least 1"),
        ("dtype=bfloat16", "stages.instruct.autocast must be bf16, as dtype is bfloat16"),
        ("dtype=int8", "dtype must be one of float32, bfloat16"),
        ("moda.aligner.scope=full", "moda: MODAConfig: aligner scope"),
        ("moda.mode=old", "moda: MODAConfig: mode"),
        ("moda.colour=1", "moda: "),
        ("data=[]", "stages.instruct.data must not be empty"),
        ("data=[{}]", "data.0 must have a path or a dataset"),
        ("data.0.fraction=2", "data.0.fraction must lie between 0 and 1"),
        ("stages=[]", "stages must not be empty"),
        ("model=null", "model must be str, got None"),
        ("seed", "an override must be key=value, got 'seed'"),
        ("seed=[", "is not YAML"),
    ],
)
def test_what_is_wrong_is_named(path, override, message):
    with pytest.raises(ValueError) as caught:
        read_recipe(path, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=build/no/model", "model: there is no directory build/no/model"),
        ("data.0.path=no.jsonl", "data.0.path: there is no no.jsonl"),
        ("data.0.images=nowhere", "data.0.images: there is no nowhere"),
    ],
)
def test_what_is_missing_is_named(path, override, message):
    with pytest.raises(FileNotFoundError) as caught:
        read_recipe(path, [override])
    assert message in str(caught.value)


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_recipe(tmp_path / "no.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="the file must be a mapping"):
        read_recipe(tmp_path / "list.yaml")
    (tmp_path / "short.yaml").write_text("model: a/b")
    with pytest.raises(ValueError, match="recipe: output is missing"):
        read_recipe(tmp_path / "short.yaml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_come_with_it(path, tmp_path):
    (tmp_path / "model").mkdir()
    data = f"[{{path: {write_data(tmp_path / 'data', 1)}}}]"
    stages = yaml.safe_load(path.read_text())["stages"]
    own = [f"stages.{stage['name']}.data={data}" for stage in stages if "data" in stage]
    recipe = read_recipe(path, [f"model={tmp_path / 'model'}", f"data={data}", *own])
    assert recipe.stages[-1].name == "instruct" and recipe.moda is not None
    assert ("full" in path.stem) == (recipe.stages[-1].lora is None)


def test_differing_keys():
    one = {"a": 1, "stages": [{"name": "x", "lr": 1, "lora": None}], "data": [1]}
    other = {"a": 1, "stages": [{"name": "x", "lr": 2, "lora": {"r": 1}}], "data": [1, 2], "b": 0}
    assert differing_keys(one, other) == ["stages.x.lr", "stages.x.lora", "data", "b"]
    assert differing_keys(one, one) == []
