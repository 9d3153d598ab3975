"""What to say next? A picture and a situation are described, then analysed, and then come some ways to go on.

python examples/plan_conversation.py                                         a tiny random model, a drawn scene
python examples/plan_conversation.py --model llava-hf/llava-1.5-7b-hf --image friend.jpg --dialogue chat.txt \\
    --situation "My friend sent me this after her exam." --json plan.json

An application of MODA's paper (arXiv 2507.04635). The dialogue until now, if any, is text, lines of "speaker: words",
or JSON, a list of {"speaker": ..., "text": ...}. Each step is asked beside the answers before it.
"""

import argparse
import json

from PIL import Image, ImageDraw

from moda_ext.chat import ChatSession, model_notes, read_dialogue
from moda_ext.diagnostics import load_model

SITUATION = "My friend sent me this picture of her desk at midnight. Her exam is tomorrow."


def plan_conversation(
    session: ChatSession, image, situation: str, dialogue: list[tuple[str, str]] | None = None, options: int = 3
) -> dict:
    """``{"description": text, "analysis": text, "options": [text, ...]}`` for a conversation about a picture.

    Args:
        session: a new one, or one that has been reset.
        image: a file or a PIL image.
        situation: who is who, and what happened.
        dialogue: (speaker, words) of what was said until now.
        options: how many ways to go on.
    """

    def ask(text: str, images: tuple = ()) -> str:
        return "".join(session.ask(text, images)).strip()

    said = "".join(f"\n{speaker}: {words}" for speaker, words in dialogue or [])
    context = f"{situation}\n" + (f"Until now we said:{said}\n" if said else "")
    describe = "Describe what the picture shows that matters in this situation, in two sentences."
    analyse = "How does the other person probably feel, what do they need from me, and what should I avoid to say?"
    first = "Write one thing that I could say next: a single sentence in my words, without quotes."
    other = "Write another one that leads the conversation elsewhere: again a single sentence."
    return {
        "description": ask(context + describe, (image,)),
        "analysis": ask(analyse),
        "options": [ask(other if number else first) for number in range(options)],
    }


def desk() -> Image.Image:
    image = Image.new("RGB", (112, 112), "midnightblue")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 80, 112, 112), fill="saddlebrown")
    draw.polygon([(30, 20), (10, 80), (66, 80), (46, 20)], fill="khaki")  # the light of a lamp
    draw.rectangle((30, 14, 46, 22), fill="firebrick")
    for row in range(4):  # books
        draw.rectangle((70, 72 - 8 * row, 104, 79 - 8 * row), fill=("seagreen", "white", "orange", "steelblue")[row])
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random", help="checkpoint directory or hub id")
    parser.add_argument("--image", help="a file; a drawn desk without")
    parser.add_argument("--situation", default=SITUATION)
    parser.add_argument("--dialogue", help="a file with what was said until now")
    parser.add_argument("--options", type=int, default=3, help="how many ways to go on")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--json", help="where to write the plan")
    args = parser.parse_args()
    if args.options < 1:
        parser.error(f"--options must be at least 1, got {args.options}")
    dialogue = read_dialogue(args.dialogue) if args.dialogue else None

    model, processor = load_model(args.model)
    for sentence in model_notes(model, args.model):
        print(f"note: {sentence}")
    session = ChatSession(model, processor, max_new_tokens=args.max_new_tokens)
    plan = plan_conversation(session, args.image or desk(), args.situation, dialogue, args.options)
    print(f"description: {plan['description']}\nanalysis: {plan['analysis']}")
    for number, option in enumerate(plan["options"], 1):
        print(f"option {number}: {option}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(plan, file, ensure_ascii=False, indent=2)


if __name__ == "__main__":
    main()
