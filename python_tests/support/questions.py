"""Question files, pictures, and a model that answers some questions right."""

import json

import torch

COLOURS = ("red", "green", "blue", "grey")


def record(name, asked, answer, **fields):
    """A line of a question file; ``image`` is one of its fields."""
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns, **fields}


def picture(path, colour="red", size=(40, 30)):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write_questions(folder, hints=True):
    """A ``test.jsonl`` of four questions about colours, each in the three forms, and four about words."""
    lines = []
    for i, colour in enumerate(COLOURS):
        picture(folder / f"{colour}.png", colour)
        about = {"image": f"{colour}.png", "task": "colour", "group": "perception", "question": colour}
        lines.append(record(f"c{i}", "What colour?", colour, choices=list(COLOURS), **about))
        for hint, hinted in (("right", colour), ("wrong", COLOURS[i - 1])) if hints else ():
            hint_first = f"Hint: {hinted}. What colour?"
            lines.append(record(f"c{i} {hint}", hint_first, colour, hint=hint, hinted=hinted, **about))
        lines.append(record(f"w{i}", f"Word {i}?", f"w{i}", task="word", group="cognition"))
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "test.jsonl"


def write_mmrole(folder):
    """The layout of MMRole, with one sample in each file."""
    for part in ("in-distribution", "out-of-distribution"):
        for kind in ("comment", "human-role", "inter-role"):
            sample = {
                "id": f"{part} {kind}",
                "system": "Play the character.",
                "image": "COCO/1.jpg",
                "conversations": [{"from": "user", "value": "Speak!"}, {"from": "assistant", "value": "Ahoy."}],
                "role": "Ann",
                "script": "The Sea",
                "other_role": "a curious human",
            }
            path = folder / "data" / "test" / part / f"{kind}_test.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps([sample]))
    picture(folder / "images" / "COCO" / "1.jpg")


def trained_llava(conversations):
    """``(model, processor)``: a tiny Llava that has learnt the answers of some conversations by heart."""
    from moda_ext.diagnostics.tiny import tiny_llava
    from moda_ext.training.collator import Collator

    model, processor = tiny_llava(layers=2)
    batches = [[c for c in conversations if bool(c.images) is pictured] for pictured in (True, False)]
    inputs = [Collator(processor)(batch) for batch in batches if batch]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(300):
        losses = [model(**batch).loss for batch in inputs]
        if max(losses) < 0.02:
            return model.eval(), processor
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    raise AssertionError(f"the answers were not learnt, losses {losses}")
