"""Question files, and the published data sets in their layouts, on samples made by hand."""

import json
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="pillow is not installed")

from questions import picture, record, write_mmrole, write_questions  # noqa: E402

from moda_ext.conversations import write_conversations  # noqa: E402
from moda_ext.evaluation import Task, hfm, mvsa, read_questions, read_tasks  # noqa: E402
from moda_ext.evaluation.tasks import draw_test, question  # noqa: E402


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


class TestQuestionFiles:
    def test_a_task_for_each_name_and_hint(self, tmp_path):
        path = write_questions(tmp_path)
        tasks = read_questions(path)
        assert [(t.title, t.group, len(t.conversations)) for t in tasks] == [
            ("colour", "perception", 4),
            ("colour, right hint", "perception", 4),
            ("colour, wrong hint", "perception", 4),
            ("word", "cognition", 4),
        ]
        assert tasks[0].choices(tasks[0].conversations[0]) == ("red", "green", "blue", "grey")
        assert tasks[3].choices(tasks[3].conversations[0]) == ()
        assert read_questions(tmp_path) == read_tasks(["small"], tmp_path) == read_tasks([str(path)]) == tasks

    def test_limit_is_of_each_task_and_said(self, tmp_path):
        tasks = read_tasks([str(write_questions(tmp_path))], limit=2)
        assert [len(task.conversations) for task in tasks] == [2, 2, 2, 2]
        assert tasks[0].notes == ("The first 2 of 4 questions.",)

    def test_of_a_task_with_labels_the_limited_questions_are_drawn(self):
        """A data set may be sorted by its labels: the first ones would be of one label."""
        asked = [question(str(i), Path("a.jpg"), "?", "no" if i < 50 else "yes", ("no", "yes")) for i in range(100)]
        task = Task("t", tuple(asked), labels=("no", "yes"))
        few = task.limited(40)
        assert {c.answer for c in few.conversations} == {"no", "yes"} and len(few.conversations) == 40
        assert few == task.limited(40) and few.notes == ("40 of 100 questions, drawn with the seed 0.",)
        assert [int(c.id) for c in few.conversations] == sorted(int(c.id) for c in few.conversations)
        assert task.limited(100) == task.limited(None) == task

    def test_a_file_without_names_is_a_task_of_its_own_name(self, tmp_path):
        write(tmp_path / "mine.jsonl", json.dumps(record("1", "What?", "this")))
        (task,) = read_tasks([str(tmp_path / "mine.jsonl")])
        assert (task.name, task.group, task.hint) == ("mine", "", "none")

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ([{"hint": "maybe"}], "'hint' must be none, right, wrong, got 'maybe'"),
            ([{"hint": "wrong"}], "'hinted' must be the answer it suggests"),
            ([{"hint": "wrong", "hinted": "Yes."}], "'Yes.' is no wrong hint where the answer is 'yes'"),
            ([{"hint": "right", "hinted": "no"}], "'no' is no right hint where the answer is 'yes'"),
            ([{"choices": ["no", "maybe"]}], "'yes' is none of the choices"),
            ([{"choices": "yes or no"}], "'choices' must be a list of texts"),
            ([{"task": 3}], "'task' must be text, got 3"),
            ([{"group": "a"}, {"group": "b"}], "is in two groups, 'a' and 'b'"),
            ([{"question": "q"}, {"question": "q"}], "two of its lines have the same 'question'"),
            ([{"question": 3}, {"question": "3"}], "two of its lines have the same 'question'"),
            ([{"question": ["q"]}], r"conversation 0: 'question' must be text or a number, got \['q'\]"),
            ([{"hint": ["wrong"]}], r"conversation 0: 'hint' must be none, right, wrong, got \['wrong'\]"),
        ],
    )
    def test_what_does_not_go_together_is_an_error(self, tmp_path, lines, message):
        records = [record(str(i), "Is it?", "yes", **fields) for i, fields in enumerate(lines)]
        write(tmp_path / "q.jsonl", "\n".join(map(json.dumps, records)))
        with pytest.raises(ValueError, match=message):
            read_questions(tmp_path / "q.jsonl")

    def test_a_question_without_an_answer(self, tmp_path):
        line = record("7", "Is it?", "yes")
        line["conversations"].pop()
        write(tmp_path / "q.jsonl", json.dumps(line))
        with pytest.raises(ValueError, match="q.jsonl: conversation 7: has no answer"):
            read_questions(tmp_path / "q.jsonl")

    @pytest.mark.parametrize("answer", ["", " ", "."])
    def test_an_empty_answer(self, tmp_path, answer):
        write(tmp_path / "q.jsonl", json.dumps(record("7", "Is it?", answer)))
        with pytest.raises(ValueError, match="q.jsonl: conversation 7: its answer is empty"):
            read_questions(tmp_path / "q.jsonl")

    @pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0c"])
    def test_a_text_keeps_the_line_breaks_of_unicode(self, tmp_path, end):
        write_conversations(tmp_path / "q.jsonl", [record(str(i), f"Is{end}it?", "yes") for i in range(2)])
        (task,) = read_questions(tmp_path / "q.jsonl")
        assert [c.messages[0][1] for c in task.conversations] == [f"Is{end}it?"] * 2

    def test_names_that_are_none(self, tmp_path):
        with pytest.raises(ValueError, match="'mvsa' is no file of questions and none of small, mvsa-single"):
            read_tasks(["mvsa"], tmp_path)
        with pytest.raises(ValueError, match="the tasks 'hfm' need the folder of their data"):
            read_tasks(["hfm"])
        with pytest.raises(FileNotFoundError, match="no all_data_id_and_label.txt in"):
            read_tasks(["tumemo"], tmp_path)
        path = str(write_questions(tmp_path))
        with pytest.raises(ValueError, match="there are two tasks 'colour'"):
            read_tasks([path, path])
        with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
            read_tasks([path], limit=0)

    def test_a_missing_picture(self, tmp_path):
        path = write_questions(tmp_path)
        (tmp_path / "blue.png").unlink()
        with pytest.raises(FileNotFoundError, match="conversation c2: no such image: .*blue.png"):
            read_tasks([str(path)])
        read_tasks([str(path)], limit=2)  # it is not asked about


class TestMVSA:
    @pytest.mark.parametrize(
        ("text", "image", "joint"),
        [
            ("positive", "positive", "positive"),
            ("neutral", "neutral", "neutral"),
            ("negative", "negative", "negative"),
            ("neutral", "positive", "positive"),
            ("positive", "neutral", "positive"),
            ("neutral", "negative", "negative"),
            ("negative", "neutral", "negative"),
            ("positive", "negative", None),
            ("negative", "positive", None),
            (None, "positive", None),
            ("positive", None, None),
        ],
    )
    def test_joint_label(self, text, image, joint):
        assert mvsa.joint_label(text, image) == joint

    def test_labels_of_one_annotator(self, tmp_path):
        write(tmp_path / "l.txt", "ID\ttext,image\n1\tpositive,neutral\n2\tpositive,negative\n3\tneutral,neutral\n")
        assert mvsa.read_labels(tmp_path / "l.txt", 1) == ({"1": "positive", "3": "neutral"}, 1)

    def test_labels_of_three_are_the_majority_of_each_part(self, tmp_path):
        lines = [
            "ID\ttext,image\ttext,image\ttext,image",
            "1\tpositive,neutral\tpositive,neutral\tnegative,positive",  # positive, neutral
            "2\tpositive,neutral\tneutral,neutral\tnegative,neutral",  # no majority for the text
            "3\tneutral,positive\tneutral,neutral\tneutral,negative",  # none for the picture
            "4\tneutral,negative\tneutral,negative\tpositive,negative",  # neutral, negative
            "5\tpositive,negative\tpositive,negative\tpositive,positive",  # positive, negative
        ]
        write(tmp_path / "l.txt", "\n".join(lines))
        assert mvsa.read_labels(tmp_path / "l.txt", 3) == ({"1": "positive", "4": "negative"}, 3)

    @pytest.mark.parametrize("line", ["1\tpositive", "1\tpositive,happy", "1\tpositive,neutral\tneutral,neutral"])
    def test_another_layout_is_an_error(self, tmp_path, line):
        write(tmp_path / "l.txt", f"ID\ttext,image\n{line}\n")
        with pytest.raises(ValueError, match="l.txt, line 2: must be an id and 1 'text,image' labels"):
            mvsa.read_labels(tmp_path / "l.txt", 1)

    def test_without_a_split_a_tenth_is_drawn_and_the_report_says_so(self, tmp_path):
        folder = tmp_path / "MVSA_Single"
        names = ("positive", "neutral", "negative")
        write(
            folder / "labelResultAll.txt",
            "ID\ttext,image\n" + "".join(f"{i}\t{names[i % 3]},neutral\n" for i in range(31)),
        )
        for i in range(31):
            write(folder / "data" / f"{i}.txt", f"post {i}")
            picture(folder / "data" / f"{i}.jpg")
        (folder / "data" / "4.jpg").write_bytes(b"")
        (task,) = read_tasks(["mvsa-single"], tmp_path)
        assert task.labels == ("positive", "neutral", "negative") and task.group == "emotion"
        assert "0 posts without a joint label and 1 with an empty file" in task.notes[0]
        assert "tenth drawn with the seed 0" in task.notes[1]
        assert len(task.conversations) == 3
        for conversation in task.conversations:
            assert conversation.answer == names[int(conversation.id) % 3]
            assert f"with the text: post {conversation.id}\n" in conversation.messages[0][1]
            assert conversation.images == (folder / "data" / f"{conversation.id}.jpg",)
        assert read_tasks(["mvsa-single"], folder) == [task]

    def test_the_split_of_clmlf(self, tmp_path):
        """The folder as that repository has it, with pictures in dataset_image."""
        folder = tmp_path / "MVSA-multiple"
        posts = [{"id": str(i), "text": f"t{i}", "emotion_label": i} for i in range(3)]
        write(folder / "10-flod-1" / "test.json", json.dumps(posts))
        for i in range(3):
            picture(folder / "dataset_image" / f"{i}.jpg")
        (task,) = read_tasks(["mvsa-multiple"], tmp_path)
        assert [c.answer for c in task.conversations] == ["positive", "neutral", "negative"]
        assert task.conversations[0].images == (folder / "dataset_image" / "0.jpg",)
        assert task.notes == ("MVSA-Multiple: test set and labels of CLMLF's split 10-flod-1.",)

    @pytest.mark.parametrize("label", [-1, 3, None, "1"])
    def test_a_label_that_the_split_does_not_have(self, tmp_path, label):
        path = tmp_path / "MVSA-single" / "10-flod-1" / "test.json"
        write(path, json.dumps([{"id": "1", "text": "naïve", "emotion_label": label}]))
        with pytest.raises(ValueError, match=f"post 1: emotion_label must be 0 to 2, got {label!r}"):
            read_tasks(["mvsa-single"], tmp_path)

    def test_the_other_set_is_no_test_set_of_this_one(self, tmp_path):
        """Its own folder is named, which has a split of the same layout: told by its labels, or by its name."""
        single = tmp_path / "MVSA-single"
        write(single / "10-flod-1" / "test.json", json.dumps([{"id": "1", "text": "t", "emotion_label": 1}]))
        picture(single / "dataset_image" / "1.jpg")
        with pytest.raises(ValueError, match="nothing says that it is MVSA-Multiple"):
            read_tasks(["mvsa-multiple"], single)
        assert read_tasks(["mvsa-single"], single) == read_tasks(["mvsa-single"], tmp_path)
        with pytest.raises(FileNotFoundError, match="no 10-flod-1/test.json or labelResultAll.txt in"):
            read_tasks(["mvsa-multiple"], tmp_path)
        other = single.rename(tmp_path / "mine")
        with pytest.raises(ValueError, match="nothing says that it is MVSA-Single"):
            read_tasks(["mvsa-single"], other)
        write(other / "labelResultAll.txt", "ID\ttext,image\n1\tneutral,neutral\n")
        assert read_tasks(["mvsa-single"], other)[0].conversations[0].answer == "neutral"
        with pytest.raises(ValueError, match="must be an id and 3 'text,image' labels"):
            read_tasks(["mvsa-multiple"], other)


class TestTumEmo:
    def test_read(self, tmp_path):
        labels = ("Angry", "Bored", "Calm", "Fear", "Happy", "Love", "Sad")
        write(
            tmp_path / "all_data_id_and_label.txt", "id label\n" + "".join(f"{i} {labels[i % 7]}\n" for i in range(20))
        )
        for i in range(20):
            write(tmp_path / "all_data" / f"{i}.txt", f"post {i}")
            picture(tmp_path / "all_data" / f"{i}.jpg")
        (task,) = read_tasks(["tumemo"], tmp_path)
        assert len(task.conversations) == 2 and task.labels == labels
        for conversation in task.conversations:
            assert conversation.answer == labels[int(conversation.id) % 7]
        assert "Love or Sad" in task.conversations[0].messages[0][1]
        assert "seed 0" in task.notes[0]

    def test_an_unknown_label(self, tmp_path):
        write(tmp_path / "all_data_id_and_label.txt", "id label\n1 Happy\n2 Joy\n")
        with pytest.raises(ValueError, match="line 3: must be an id and one of Angry, .* got '2 Joy'"):
            read_tasks(["tumemo"], tmp_path)


class TestHFM:
    POSTS = """['11', 'what a lovely day', 0, 1]
['12', "isn't it sarcastic ?", 1, 1]
['13', '# sarcasms are fine', 1, 0]
['14', 'see <url>', 0, 0]
"""

    @pytest.mark.parametrize("relative", [False, True])
    def test_read(self, tmp_path, monkeypatch, relative):
        monkeypatch.chdir(tmp_path.parent)
        data = Path(tmp_path.name) if relative else tmp_path
        write(tmp_path / "text" / "test2.txt", self.POSTS)
        for i in (11, 13):
            picture(tmp_path / "dataset_image" / f"{i}.jpg")
        (task,) = read_tasks(["hfm"], data)
        assert task.conversations[0].images == (data / "dataset_image" / "11.jpg",)
        assert [(c.id, c.answer) for c in task.conversations] == [("11", "yes"), ("13", "no")]  # the last label counts
        assert (task.labels, task.positive) == (("no", "yes"), "yes")
        assert "2 posts whose words give the label away" in task.notes[0]

    @pytest.mark.parametrize(
        "word",
        ["sarcasm", "sarcastic", "reposting", "<url>", "joke", "jokes", "humour", "humor", "irony", "ironic", "exgag"],
    )
    def test_words_that_give_the_label_away(self, tmp_path, word):
        """As words of their own alone."""
        write(tmp_path / "p.txt", f"['1', 'so # {word} !', 1]\n['2', 'so {word}s5', 1]\n")
        posts, dropped = hfm.read_posts(tmp_path / "p.txt")
        assert (posts, dropped) == ([("2", f"so {word}s5", 1)], 1)

    @pytest.mark.parametrize("line", ["no list", "['1', 'text']", "['1', 'text', 'yes']", "['1', 'text', 2]", "7"])
    def test_another_layout_is_an_error(self, tmp_path, line):
        write(tmp_path / "p.txt", f"['1', 'text', 1]\n{line}\n")
        with pytest.raises(ValueError, match="p.txt, line 2: "):
            hfm.read_posts(tmp_path / "p.txt")


class TestMMRole:
    def test_read(self, tmp_path):
        write_mmrole(tmp_path / "MMRole_dataset")
        tasks = read_tasks(["mmrole"], tmp_path)
        assert [(t.name, len(t.conversations), t.judged) for t in tasks] == [
            ("mmrole in-distribution", 3, True),
            ("mmrole out-of-distribution", 3, True),
        ]
        assert tasks[0].notes == ("MMRole: 6 samples, not the 294 that were published.",)
        conversation = tasks[0].conversations[0]
        assert conversation.messages == (
            ("system", "Play the character."),
            ("user", "<image>\nSpeak!"),
            ("assistant", "Ahoy."),
        )
        assert conversation.images == (tmp_path / "MMRole_dataset" / "images" / "COCO" / "1.jpg",)

    def test_a_sample_without_a_character(self, tmp_path):
        write_mmrole(tmp_path)
        path = tmp_path / "data" / "test" / "in-distribution" / "comment_test.json"
        write(path, json.dumps([{"id": "1", "conversations": []}]))
        with pytest.raises(ValueError, match="sample 1: has no role, script, other_role"):
            read_tasks(["mmrole"], tmp_path)


def test_a_drawn_test_set_is_the_same_each_time():
    drawn, note = draw_test(range(100), "X")
    assert drawn == draw_test(range(100), "X")[0] == sorted(drawn)
    assert len(set(drawn)) == 10 and drawn != list(range(90, 100))
    assert note.startswith("X: no official split")
