"""Who is this, and what do they want? A profile of a character, from a picture and a dialogue.

python examples/understand_character.py                                      a tiny random model, a drawn face
python examples/understand_character.py --model llava-hf/llava-1.5-7b-hf --image scene.jpg --dialogue scene.txt \\
    --character Anna --json profile.json

An application of MODA's paper (arXiv 2507.04635). The dialogue is text, lines of "speaker: words", or JSON, a list of
{"speaker": ..., "text": ...}. The questions are asked in turn, each beside the answers before it.
"""

import argparse
import json

from PIL import Image, ImageDraw

from moda_ext.chat import ChatSession, model_notes, read_dialogue
from moda_ext.diagnostics import load_model

DIALOGUE = [
    ("Ben", "I finished the report last night, so you can stay in bed."),
    ("Anna", "You did all of it? That was my half."),
    ("Ben", "You were asleep at the desk. It was easier than waking you."),
    ("Anna", "Then lunch is on me, and do not argue."),
]
QUESTIONS = {
    "expression": "Describe the expression of {name}: the face, the posture, and the emotion that they show together.",
    "intent": "What does {name} want with the last words? Name the intent, and the words or looks that tell it.",
    "relation": "What is {name} to the others in this scene? Name the relation, and how close it is.",
}


def understand_character(session: ChatSession, image, dialogue: list[tuple[str, str]], name: str) -> dict[str, str]:
    """A profile: the answers about expression, intent and relation of a character.

    Args:
        session: a new one, or one that has been reset.
        image: a file or a PIL image of the character.
        dialogue: (speaker, words) of each line.
        name: of the character, one of the speakers.
    """
    script = "\n".join(f"{speaker}: {words}" for speaker, words in dialogue)
    context = f"The picture shows {name} in a scene. This is said:\n{script}\n\nAnswer in one sentence or two. "
    profile = {}
    for field, question in QUESTIONS.items():
        first = not profile
        text = (context if first else "") + question.format(name=name)
        profile[field] = "".join(session.ask(text, [image] if first else [])).strip()
    return profile


def face() -> Image.Image:
    image = Image.new("RGB", (112, 112), "lightsteelblue")
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 12, 92, 104), fill="bisque", outline="saddlebrown")
    for x in (42, 70):
        draw.ellipse((x - 4, 44, x + 4, 52), fill="saddlebrown")
    draw.arc((38, 56, 74, 86), 20, 160, fill="firebrick", width=3)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random", help="checkpoint directory or hub id")
    parser.add_argument("--image", help="a file; a drawn face without")
    parser.add_argument("--dialogue", help="a file; a short one of our own without")
    parser.add_argument("--character", help="a speaker; the last one without")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--json", help="where to write the profile")
    args = parser.parse_args()
    dialogue = read_dialogue(args.dialogue) if args.dialogue else DIALOGUE
    name = args.character or dialogue[-1][0]
    if name not in {speaker for speaker, _ in dialogue}:
        parser.error(f"--character: {name} says nothing in the dialogue")

    model, processor = load_model(args.model)
    for sentence in model_notes(model, args.model):
        print(f"note: {sentence}")
    session = ChatSession(model, processor, max_new_tokens=args.max_new_tokens)
    profile = understand_character(session, args.image or face(), dialogue, name)
    print(f"character: {name}")
    for field, answer in profile.items():
        print(f"{field}: {answer}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"character": name, **profile}, file, ensure_ascii=False, indent=2)


if __name__ == "__main__":
    main()
