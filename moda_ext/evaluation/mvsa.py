"""MVSA-Single and MVSA-Multiple: the sentiment of a tweet with a picture (Niu et al., MMM 2016)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from moda_ext.evaluation.tasks import Task, draw_test, locate, picture_folder, question

LABELS = ("positive", "neutral", "negative")  # in the order of the numbers in the split of CLMLF
FOLDERS = {  # by the number of annotators
    1: ("MVSA_Single", "MVSA-single", "MVSA-Single"),
    3: ("MVSA", "MVSA_Multiple", "MVSA-multiple", "MVSA-Multiple"),
}
SPLIT = Path("10-flod-1", "test.json")  # so it is spelt there
PROMPT = (
    "This picture was posted with the text: {text}\nWhat is the sentiment of the post? Answer with one word: positive, "
    "neutral or negative."
)


def read(data: Path, *, annotators: int) -> list[Task]:
    """The test set of MVSA-Single (1 annotator) or MVSA-Multiple (3).

    The folder holds ``labelResultAll.txt`` and ``data/{id}.txt`` and ``{id}.jpg`` as published. Where it also has the
    split of CLMLF (Li et al., Findings of NAACL 2022, arXiv 2204.05515), ``10-flod-1/test.json``, that is the test set,
    with its texts and labels.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: a line in another layout.
    """
    name = "MVSA-Single" if annotators == 1 else "MVSA-Multiple"
    folder = locate(data, (str(SPLIT), "labelResultAll.txt"), FOLDERS[annotators])
    check_set(folder, annotators, name)
    if (folder / SPLIT).exists():
        samples, notes = read_split(folder / SPLIT), [f"{name}: test set and labels of CLMLF's split 10-flod-1."]
    else:
        samples, notes = draw_samples(folder, annotators, name)
    pictures = picture_folder(folder, ("dataset_image", "data"))
    asked = [question(i, pictures / f"{i}.jpg", PROMPT.format(text=text), label, LABELS) for i, text, label in samples]
    return [Task(name.lower(), tuple(asked), "emotion", labels=LABELS, notes=tuple(notes))]


def check_set(folder: Path, annotators: int, name: str) -> None:
    """Refuses the folder of the other set, whose split has the same layout: told by the labels, or else by its name.

    Raises:
        ValueError: it is the other's, or nothing says whose it is.
    """
    labels = folder / "labelResultAll.txt"
    if labels.exists():
        read_labels(labels, annotators)
    elif folder.resolve().name not in FOLDERS[annotators]:
        names = " or ".join(FOLDERS[annotators])
        raise ValueError(
            f"{folder}: nothing says that it is {name}: it must have labelResultAll.txt, or the name {names}"
        )


def draw_samples(folder: Path, annotators: int, name: str) -> tuple[list[tuple[str, str, str]], list[str]]:
    """``(samples, notes)``: the id, text and label of each post of a test set that is drawn here."""
    labels, dropped = read_labels(folder / "labelResultAll.txt", annotators)
    posts = folder / "data"
    whole = [i for i in labels if all((posts / f"{i}{end}").stat().st_size for end in (".txt", ".jpg"))]
    drawn, note = draw_test(whole, name)
    left_out = (
        f"{name}: {dropped} posts without a joint label and {len(labels) - len(whole)} with an empty file are left out."
    )
    texts = {i: (posts / f"{i}.txt").read_text(encoding="utf-8", errors="replace").strip() for i in drawn}
    return [(i, texts[i], labels[i]) for i in drawn], [left_out, note]


def read_split(path: Path) -> list[tuple[str, str, str]]:
    """``(id, text, label)`` of each post in a file of CLMLF.

    Raises:
        ValueError: a label that is not 0, 1 or 2.
    """
    posts = json.loads(path.read_text(encoding="utf-8"))
    for post in posts:
        if post["emotion_label"] not in range(len(LABELS)):
            raise ValueError(f"{path}, post {post['id']}: emotion_label must be 0 to 2, got {post['emotion_label']!r}")
    return [(str(post["id"]), post["text"], LABELS[post["emotion_label"]]) for post in posts]


def read_labels(path: Path, annotators: int) -> tuple[dict[str, str], int]:
    """``(labels, dropped)``: the joint label of each post by its id, and how many posts have none.

    Lines are ``id<TAB>text,image`` with such a pair for each annotator, after a header.

    Raises:
        ValueError: a line that is not so.
    """
    labels, dropped = {}, 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], start=2):
        if not line.strip():
            continue
        post, *pairs = line.strip().split("\t")
        votes = [pair.strip().split(",") for pair in pairs]
        if len(votes) != annotators or not all(len(v) == 2 and set(v) <= set(LABELS) for v in votes):
            raise ValueError(f"{path}, line {number}: must be an id and {annotators} 'text,image' labels, got {line!r}")
        label = joint_label(majority([text for text, _ in votes]), majority([image for _, image in votes]))
        if label is None:
            dropped += 1
        else:
            labels[post] = label
    return labels, dropped


def majority(votes: Sequence[str]) -> str | None:
    """What more than half of the annotators say, or None."""
    label, count = Counter(votes).most_common(1)[0]
    return label if 2 * count > len(votes) else None


def joint_label(text: str | None, image: str | None) -> str | None:
    """The label of a post from those of its text and picture (Xu and Mao, CIKM 2017).

    Equal ones are it; beside a neutral one it is the other; positive and negative, or one that is missing, give None.
    """
    if text is None or image is None or {text, image} == {"positive", "negative"}:
        return None
    return image if text == "neutral" else text
