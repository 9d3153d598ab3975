"""Batches for training: the labels are on the answers."""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="transformers 5.23 is missing: moda_ext[transformers]")
from PIL import Image

from moda_ext.conversations import Conversation, encode
from moda_ext.diagnostics.tiny import tiny_llava
from moda_ext.training import Collator, collator

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
        expected(processor, "user: <image>What?\nassistant: ", "A cat.</s>", "\n"),
        expected(processor, "user: <image>Who is it?\nassistant: ", "Me</s>", "\n"),
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
    pieces = ["user: Hello\nassistant: ", "Hi</s>", "\nuser: <image>And <image> this?\nassistant: ", "Two.</s>"]
    ids, labels = expected(processor, *pieces, "\nuser: Sure?\nassistant: ", "Yes</s>", "\n")
    (text_ids,), (text_labels,) = batch["input_ids"].tolist(), batch["labels"].tolist()
    assert (text_ids, text_labels) == (ids, labels)


def changed(processor, old, new):
    """The processor with another chat template."""
    other = copy.deepcopy(processor)
    assert old in other.chat_template
    other.chat_template = other.chat_template.replace(old, new)
    return other


def learnt(processor, batch, row=0):
    """The text of the labels, which are the tokens where they are."""
    there = batch["labels"][row] != -100
    assert torch.equal(batch["labels"][row][there], batch["input_ids"][row][there])
    return processor.tokenizer.decode(batch["labels"][row][there])


def test_any_known_token_ends_a_turn(processor):
    other = changed(processor, "</s>", "<end_of_turn>")
    with pytest.raises(ValueError, match="does not end an answer"):
        Collator(other)([conversation("a", "b")])
    other.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<end_of_turn>"]})
    assert learnt(other, Collator(other)([conversation("a", "b")])) == "b<end_of_turn>"


def test_a_template_without_an_end_is_refused_or_ends_before_its_white_space(processor):
    other = changed(processor, "</s>", " ")
    asked = conversation("<image>\nWho?", "A cat. ", "Sure?", "Yes", images=1, name="42")
    with pytest.raises(ValueError, match="conversation 42: the chat template does not end .* let it write </s> there"):
        Collator(other)([asked])
    assert learnt(other, Collator(other, needs_end=False)([asked])) == "A cat.Yes"
    assert learnt(processor, Collator(processor, needs_end=False)([asked])) == "A cat. </s>Yes</s>"


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_processor_with_a_padding_side_of_its_own(processor, side):
    class Sided(type(processor)):  # as that of InternVL
        text_kwargs = {"padding_side": side}

    other = Sided(
        processor.image_processor,
        processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        chat_template=processor.chat_template,
    )
    some = [conversation("a", "b"), conversation("a much longer one", "and its answer")]
    batch, plain = Collator(other)(some), Collator(processor)(some)
    assert batch["attention_mask"][0].tolist() == sorted(batch["attention_mask"][0].tolist(), reverse=True)
    assert all(torch.equal(batch[key], plain[key]) for key in ("input_ids", "attention_mask", "labels"))
    assert [learnt(other, batch, row) for row in (0, 1)] == ["b</s>", "and its answer</s>"]


def test_labels_where_rows_are_padded_on_the_left(processor, monkeypatch):
    """Whatever a processor makes of the argument."""
    monkeypatch.setattr(collator, "encode", lambda *args, padding_side: encode(*args, padding_side="left"))
    some = [conversation("a", "b"), conversation("a much longer one", "and its answer")]
    batch = Collator(processor)(some)
    assert batch["attention_mask"][0, 0] == 0
    assert [learnt(processor, batch, row) for row in (0, 1)] == ["b</s>", "and its answer</s>"]


@pytest.mark.parametrize("images", [0, 1])
def test_one_token_begins_a_row(processor, images):
    """Where the template writes it, and where the tokenizer does."""
    from tokenizers import processors

    adding = copy.deepcopy(processor)
    adding.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", adding.tokenizer.bos_token_id)]
    )
    writing = copy.deepcopy(adding)
    writing.chat_template = "{{ bos_token }}" + writing.chat_template
    place = "<image>\n" * images
    some = [
        conversation(f"{place}a", "b", images=images),
        conversation(f"{place}Who is it?", "Me", "Sure?", "Yes", images=images),
    ]
    batches = [Collator(one)(some) for one in (adding, writing)]
    for batch in batches:
        first = batch["input_ids"] == adding.tokenizer.bos_token_id
        assert first[:, 0].all() and first.sum() == 2
        assert [learnt(adding, batch, row) for row in (0, 1)] == ["b</s>", "Me</s>Yes</s>"]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])


def test_errors(processor):
    long = conversation("<image>\nWhat?", "A cat.", images=1)
    length = Collator(processor)([long])["input_ids"].shape[1]
    assert Collator(processor, length)([long])["labels"].shape == (1, length)
    with pytest.raises(ValueError, match=rf"conversation 7: {length} tokens, and max_length is {length - 1}"):
        Collator(processor, length - 1)([long])
    with pytest.raises(ValueError, match="conversation 7: has no answer"):
        Collator(processor)([conversation("What?")])
    for needs_end in (True, False):
        with pytest.raises(ValueError, match="conversation 7: an answer is empty"):
            Collator(processor, needs_end=needs_end)([conversation("a", "b", "c", " ")])
    with pytest.raises(ValueError, match="conversation 7: an answer has <image> in it"):
        Collator(processor)([conversation("Draw!", "<image>\nHere.", images=1)])
    with pytest.raises(ValueError, match="with pictures and without"):
        Collator(processor)([long, conversation("a", "b")])
