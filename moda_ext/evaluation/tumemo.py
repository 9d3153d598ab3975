"""TumEmo: the emotion of a Tumblr post with a picture (Yang et al., IEEE Trans. Multimedia 2021)."""

from __future__ import annotations

from pathlib import Path

from moda_ext.evaluation.tasks import Task, draw_test, locate, picture_folder, question

LABELS = ("Angry", "Bored", "Calm", "Fear", "Happy", "Love", "Sad")
INDEX = "all_data_id_and_label.txt"
PROMPT = (
    "This picture was posted with the text: {text}\nWhich emotion does the post show? Answer with one word: {labels}."
)


def read(data: Path) -> list[Task]:
    """The test set: a tenth of all posts, drawn with a fixed seed, as no split is published.

    The folder holds ``all_data_id_and_label.txt`` (a header, then an id and a label in each line), and ``{id}.txt`` and
    ``{id}.jpg``, below ``all_data`` or ``data`` or beside it.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: a line in another layout.
    """
    folder = locate(data, (INDEX,), ("TumEmo",))
    posts = picture_folder(folder, ("all_data", "data"))
    labels = read_labels(folder / INDEX)
    drawn, note = draw_test(sorted(labels), "TumEmo")
    names = f"{', '.join(LABELS[:-1])} or {LABELS[-1]}"
    asked = []
    for post in drawn:
        text = (posts / f"{post}.txt").read_text(encoding="utf-8", errors="replace").strip()
        asked.append(
            question(post, posts / f"{post}.jpg", PROMPT.format(text=text, labels=names), labels[post], LABELS)
        )
    return [Task("tumemo", tuple(asked), "emotion", labels=LABELS, notes=(note,))]


def read_labels(path: Path) -> dict[str, str]:
    """The label of each post by its id.

    Raises:
        ValueError: a line that is no id and label.
    """
    labels = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], start=2):
        if not line.strip():
            continue
        parts = line.split()
        if len(parts) != 2 or parts[1] not in LABELS:
            raise ValueError(f"{path}, line {number}: must be an id and one of {', '.join(LABELS)}, got {line!r}")
        labels[parts[0]] = parts[1]
    return labels
