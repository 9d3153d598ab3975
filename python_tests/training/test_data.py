"""The conversations of a recipe, and their order."""

import json
from collections import Counter

import pytest
from conversations import write_data

from moda_ext.conversations import Conversation
from moda_ext.training import Source
from moda_ext.training.data import draw_order, have_images, load_conversations

pytest.importorskip("PIL", reason="pillow is missing")


def test_sources_with_fractions_and_repeats(tmp_path):
    one, two = write_data(tmp_path / "one", 10), write_data(tmp_path / "two", 4)
    sources = [Source(path=str(one), fraction=0.5), Source(path=str(two), repeat=2)]
    found = load_conversations(sources, seed=1)
    folders = Counter((c.images[0].parent.name if c.images else "none") for c in found)
    assert len(found) == 5 + 8 and folders["two"] == 2 * 2  # two of four have pictures
    halves = [[c.id for c in load_conversations(sources[:1], seed)] for seed in (1, 1, 2)]
    assert halves[0] == halves[1] != halves[2] and len(set(halves[0])) == 5
    assert have_images(found) == [bool(c.images) for c in found]


def test_the_order_depends_on_the_seed_and_not_on_who_shares_it():
    order = draw_order([True] * 10, 2, 10, seed=0)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    assert order == draw_order([True] * 10, 4, 5, seed=0) != draw_order([True] * 10, 2, 10, seed=1)
    few = draw_order([True] * 3, 4, 2, seed=0)  # one batch is more than an epoch
    assert sorted(few[:3]) == sorted(few[3:6]) == [0, 1, 2] and len(few) == 8


def test_conversations_with_images_and_without_are_not_in_one_batch():
    kinds = [True, True, False] * 7
    order = draw_order(kinds, 4, 21, seed=0)
    batches = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert all(len({kinds[i] for i in batch}) == 1 for batch in batches)
    assert max(Counter(order).values()) - min(Counter(order).values()) <= 1  # nobody waits for long


def test_where_a_conversation_has_its_pictures(tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A."}]
    for record in ({"image": "a.jpg"}, {"images": ["a.jpg"]}, {"image": None, "images": ["a.jpg"]}):
        found = Conversation.from_record({"conversations": turns, **record}, tmp_path)
        assert found.images == (tmp_path / "a.jpg",)
    with pytest.raises(ValueError, match="has 'image' and 'images'"):
        Conversation.from_record({"conversations": turns, "image": "a.jpg", "images": ["a.jpg"]})


def test_pictures_are_upright(tmp_path):
    """Orientation 6: the camera was turned, and the first row of the file is the right side of the scene."""
    from PIL import Image

    lying = Image.new("RGB", (40, 20), "red")
    lying.paste("blue", (0, 0, 40, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / "photo.png", exif=exif)
    turns = (("user", "<image><image>"),)
    for picture in (tmp_path / "photo.png", Image.open(tmp_path / "photo.png")):
        for found in Conversation("a", turns, (picture, picture)).pictures():
            assert found.size == (20, 40)
            assert (found.getpixel((2, 20)), found.getpixel((17, 20))) == ((255, 0, 0), (0, 0, 255))


@pytest.mark.parametrize("column", ["image", "images", "both"])
def test_hugging_face_datasets(column, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is missing: moda_ext[train]")
    path = write_data(tmp_path / "data", 6)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        image = record.pop("image", None)
        file = None if image is None else str(tmp_path / "data" / image)
        alone = column == "image" or (column == "both" and int(record["id"]) % 2 == 0)
        places = {"image": file if alone else None, "images": None if alone else [] if file is None else [file]}
        record |= places if column == "both" else {column: places[column]}
    kinds = {"image": datasets.Image(), "images": datasets.List(datasets.Image())}
    kinds = kinds if column == "both" else {column: kinds[column]}
    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    features = {"id": datasets.Value("string"), "conversations": datasets.List(turn), **kinds}
    rows = datasets.Dataset.from_list(records, features=datasets.Features(features))
    rows.save_to_disk(tmp_path / "saved")
    found = load_conversations([Source(dataset=str(tmp_path / "saved"), fraction=0.99)])
    expected = load_conversations([Source(path=str(path))])
    assert [c.messages for c in found] == [c.messages for c in expected]
    assert have_images(found) == have_images(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert [p.tobytes() for p in ours.pictures()] == [p.tobytes() for p in theirs.pictures()]
    rows.remove_columns("conversations").save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="must have a column 'conversations'"):
        load_conversations([Source(dataset=str(tmp_path / "none"))])
