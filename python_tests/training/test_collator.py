"""Batches for training: the labels are on the answers."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")
from PIL import Image

from moda_ext.conversations import Conversation
from moda_ext.diagnostics.tiny import tiny_llava
from moda_ext.training import Collator

PATCHES = 64


@pytest.fixture(scope="module")
def processor():
    return tiny_llava(1)[1]


def conversation(*turns, images=0, name="7"):
    roles = ("user", "assistant")
    messages = tuple((roles[i % 2], turn) for i, turn in enumerate(turns))
    return Conversation(name, messages, tuple(Image.new("RGB", (9, 5)) for _ in range(images)))


def spell(processor, text):
    """The template of the tiny model writes bytes, and <image> as many times as there are patches."""
    parts = text.split("<image>")
    ids = [processor.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    return sum(([image] * PATCHES * (i > 0) + part for i, part in enumerate(ids)), [])


def expected(processor, *pieces):
    """(ids, labels) of texts, of which every second one is an answer."""
    ids, labels = [], []
    for i, piece in enumerate(pieces):
        spelt = spell(processor, piece)
        ids += spelt
        labels += spelt if i % 2 else [-100] * len(spelt)
    return ids, labels


def test_labels_of_one_turn_and_padding(processor):
    some = [conversation("<image>\nWhat?", "A cat.", images=1), conversation("<image>\nWho is it?", "Me", images=1)]
    batch = Collator(processor)(some)
    rows = [
        expected(processor, "user: <image>What?\nassistant: ", "A cat.\n"),
        expected(processor, "user: <image>Who is it?\nassistant: ", "Me\n"),
    ]
    length = max(len(ids) for ids, _ in rows)
    for i, (ids, labels) in enumerate(rows):
        rest = length - len(ids)
        assert batch["input_ids"][i].tolist() == ids + [processor.tokenizer.pad_token_id] * rest
        assert batch["labels"][i].tolist() == labels + [-100] * rest
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + [0] * rest
    assert batch["pixel_values"].shape[0] == 2


def test_every_answer_is_learnt_and_pictures_may_come_late(processor):
    batch = Collator(processor)(
        [conversation("Hello", "Hi", "<image>\nAnd <image> this?", "Two.", "Sure?", "Yes", images=2)]
    )
    pieces = ["user: Hello\nassistant: ", "Hi\n", "user: <image>And <image> this?\nassistant: ", "Two.\n"]
    ids, labels = expected(processor, *pieces, "user: Sure?\nassistant: ", "Yes\n")
    (text_ids,), (text_labels,) = batch["input_ids"].tolist(), batch["labels"].tolist()
    assert (text_ids, text_labels) == (ids, labels)


def test_an_answer_ends_with_its_end_and_not_with_what_the_template_adds(processor):
    import copy

    other = copy.deepcopy(processor)
    other.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text }}{% endfor %}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    batch = Collator(other)([conversation("a", "b")])
    answer = batch["input_ids"][batch["labels"] != -100]
    assert other.tokenizer.decode(answer) == "b</s>"
    assert torch.equal(answer, batch["labels"][batch["labels"] != -100])


def test_errors(processor):
    long = conversation("<image>\nWhat?", "A cat.", images=1)
    length = Collator(processor)([long])["input_ids"].shape[1]
    assert Collator(processor, length)([long])["labels"].shape == (1, length)
    with pytest.raises(ValueError, match=rf"conversation 7: {length} tokens, and max_length is {length - 1}"):
        Collator(processor, length - 1)([long])
    with pytest.raises(ValueError, match="conversation 7: has no answer"):
        Collator(processor)([conversation("What?")])
    with pytest.raises(ValueError, match="with pictures and without"):
        Collator(processor)([long, conversation("a", "b")])
