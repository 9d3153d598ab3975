"""Docstrings for the documentation: the roles and directives of Sphinx that ours use, as Markdown (mkdocs.yml).

``:func:`name``` becomes a link where docs/api.md documents the name, else code; ``:math:`` and ``.. math::`` become
equations, ``.. code-block::`` a fenced block, ``Example:`` the section that the site knows as ``Examples:``, and a
citation of the mathematics a link.
"""

import re
import textwrap
from pathlib import Path

import griffe

DOCS = Path(__file__).resolve().parents[1] / "docs"
SECTIONS = {  # number -> anchor of the heading
    number: f"{number}-{re.sub('[^a-z0-9]+', '-', title.lower())}"
    for number, title in re.findall(r"^## (\d)\. (.+)$", (DOCS / "mathematics.md").read_text(), re.MULTILINE)
}
CITATION = re.compile(r"docs/(?:mathematics)\.md\s+(sections?\s+(\d)(?: and \d)?)")
ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([^`]+)`")
RETURNS = re.compile(r"^Returns:\n((?: +.*(?:\n|$)|\n)+)", re.MULTILINE)
DIRECTIVE = re.compile(r"^( *)\.\. (math|code-block):: ?(.*)\n((?:\1 +.*(?:\n|$)|\n)*)", re.MULTILINE)


def documented() -> dict[str, str]:
    """Last part of a name, and the name itself -> the name under which docs/api.md documents it."""
    names = re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), re.MULTILINE)
    return {name.rpartition(".")[2]: name for name in names} | {name: name for name in names}


def as_markdown(text: str, known: dict[str, str]) -> str:
    def role(match: re.Match) -> str:
        name = match[1]
        target = known.get(name) or known.get(name.rpartition(".")[2])
        shown = f"`{name.rpartition('.')[2] if '.' in name and target else name}`"
        return f"[{shown}][{target}]" if target else shown

    def directive(match: re.Match) -> str:
        indent, kind, argument, body = match.groups()
        lines = textwrap.dedent(body).strip("\n")
        if kind == "math":
            block = "\n".join(filter(None, ["$$", argument, lines, "$$"]))  # an empty line would end the equation
        else:
            block = f"```{argument}\n{lines}\n```"
        return "\n" + textwrap.indent(block, indent) + "\n\n"

    text = DIRECTIVE.sub(directive, text)
    text = RETURNS.sub(lambda match: f"**Returns:**\n\n{textwrap.dedent(match[1])}", text)  # prose, not types
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = text.replace("``", "`")
    text = ROLE.sub(role, text)
    text = CITATION.sub(lambda match: f"[Mathematics, {match[1]}][{SECTIONS[match[2]]}]", text)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


class MarkdownDocstrings(griffe.Extension):
    """Rewrites every docstring of the package when it is read."""

    def __init__(self):
        self.known = documented()

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value, self.known)
