"""HFM: sarcasm in tweets with pictures (Cai et al., ACL 2019)."""

from __future__ import annotations

import ast
from pathlib import Path

from moda_ext.evaluation.tasks import Task, locate, picture_folder, question

LABELS = ("no", "yes")  # by the number of the label
# Posts with one of these words give their label away, and the authors' loader leaves them out.
TELLING = frozenset(
    ("sarcasm", "sarcastic", "reposting", "<url>", "joke", "jokes", "humour", "humor", "irony", "ironic", "exgag")
)
PROMPT = "This picture was posted with the text: {text}\nIs the post sarcastic? Answer with one word: yes or no."


def read(data: Path) -> list[Task]:
    """The published test set: ``text/test2.txt``, and ``{id}.jpg`` below ``dataset_image`` or the folder itself.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: a line in another layout.
    """
    folder = locate(data, ("text/test2.txt",), ("HFM", "data-of-multimodal-sarcasm-detection"))
    posts, dropped = read_posts(folder / "text" / "test2.txt")
    pictures = picture_folder(folder, ("dataset_image", "images"))
    asked = [
        question(post, pictures / f"{post}.jpg", PROMPT.format(text=text), LABELS[label], LABELS)
        for post, text, label in posts
    ]
    note = f"HFM: the published test set; {dropped} posts whose words give the label away are left out, as published."
    return [Task("hfm", tuple(asked), "emotion", labels=LABELS, positive="yes", notes=(note,))]


def read_posts(path: Path) -> tuple[list[tuple[str, str, int]], int]:
    """``(posts, dropped)``: the id, text and label of each post of a file, and how many are left out.

    A line is a Python list ``[id, text, label]``, or ``[id, text, label of the hashtag, label of a person]``, of which
    the last counts.

    Raises:
        ValueError: a line that is not so.
    """
    posts, dropped = [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            post, text, *labels = ast.literal_eval(line)
            label = int(labels[-1])
        except (SyntaxError, ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{path}, line {number}: must be a list of id, text and labels, got {line!r}") from error
        if label not in (0, 1):
            raise ValueError(f"{path}, line {number}: a label must be 0 or 1, got {label}")
        if TELLING & set(text.split()):
            dropped += 1
        else:
            posts.append((str(post), text, label))
    return posts, dropped
