"""Writes docs/operators.md from the operator table and the docstrings of ``fairkernels.functional``.

``python docs/generate.py`` rewrites it; with ``--check`` it fails if the file is not what they say.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fairkernels.functional as FK
from fairkernels.ops.schema import OPERATORS, Operator

TARGET = Path(__file__).resolve().parent / "operators.md"
SECTIONS = ("Args", "Returns", "Raises")

OPENING = """\
# Operators

Written by `docs/generate.py` from the operator table and the docstrings of `fairkernels.functional`. What they all
have in common:

"""


def document() -> str:
    conventions = doc(FK).partition("\n\n")[2]
    names = ", ".join(f"[`{name}`](#{name})" for name in OPERATORS)
    parts = [OPENING + markdown(conventions), names, *(entry(operator) for operator in OPERATORS.values())]
    return "\n\n".join(parts) + "\n"


def entry(operator: Operator) -> str:
    function = getattr(FK, operator.name)
    text, *sections = re.split(rf"^({'|'.join(SECTIONS)}):\n", doc(function), flags=re.MULTILINE)
    found = {name: textwrap.dedent(body).strip() for name, body in zip(sections[::2], sections[1::2], strict=True)}
    summary, _, rest = text.strip().partition("\n\n")
    parts = [
        f"## {operator.name}",
        inline(summary),
        f"```python\n{signature(operator.name, function)}\n```",
        markdown(rest),
        "**Arguments**",
        "\n".join(arguments(found["Args"])),
        f"**Returns** {inline(found['Returns'])}",
        "\n".join(f"- {name}: {value}" for name, value in facts(operator, function)),
    ]
    return "\n\n".join(filter(None, parts))


def doc(documented: Any) -> str:
    return inspect.getdoc(documented) or ""


def signature(name: str, function: Callable[..., Any]) -> str:
    parameters = [
        p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(function).parameters.values()
    ]
    text = name + str(inspect.Signature(parameters))
    return "\n".join(textwrap.wrap(text, 110, subsequent_indent=" " * (len(name) + 1)))


def arguments(section: str) -> Iterator[str]:
    for names, meaning in re.findall(r"^([\w, ]+): (.*(?:\n .*)*)", section, re.MULTILINE):
        quoted = ", ".join(f"`{name}`" for name in names.split(", "))
        yield f"- {quoted}: {inline(' '.join(meaning.split()))}"


def facts(operator: Operator, function: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    yield "Cost", operator.cost
    yield "Backends", ", ".join([*sorted(operator.kernels), "reference"])
    inputs = " and ".join(f"`{name}`" for name in operator.argument_names[: operator.differentiable])
    yield "Derivatives", f"first and second in {inputs}" if inputs else "none"
    if papers(function):
        yield "Source", "; ".join(papers(function))


def papers(function: Callable[..., Any]) -> list[str]:
    """Every paper that the docstring names, with the place in it."""
    found = re.findall(r"(\d{4}\.\d{5})(?:, ((?:Eq|Sec)\. [\d.]*\d))?", doc(function))
    places = dict(reversed(found))  # the first mention decides
    return [
        f"[arXiv {number}](https://arxiv.org/abs/{number})" + (f", {places[number]}" if places[number] else "")
        for number in dict.fromkeys(number for number, _ in found)
    ]


# --- from reStructuredText ----------------------------------------------------------------------------------------


def markdown(text: str) -> str:
    """Paragraphs, equations and code blocks of a docstring."""
    return "\n\n".join(block(part) for part in re.split(r"\n\n(?! )", text.strip()) if part)


def block(text: str) -> str:
    if text.startswith(".. math::"):
        equation = textwrap.dedent(text.removeprefix(".. math::").replace("\n          ", "\n"))
        return f"```math\n{equation.strip()}\n```"
    if "::\n\n" in text:
        heading, code = text.split("::\n\n")
        return f"{inline(heading)}:\n\n```python\n{textwrap.dedent(code)}\n```"
    return inline(text)


def inline(text: str) -> str:
    text = re.sub(r":func:`(?:fairkernels\.)?(\w+)`", link, text)
    text = re.sub(r":(?:mod|class):`([^`]+)`", r"``\1``", text)
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    return text.replace("``", "`")


def link(match: re.Match[str]) -> str:
    return f"[`{match[1]}`](#{match[1]})" if match[1] in OPERATORS else f"``{match[0].split('`')[1]}``"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check

    text = document()
    if check and (not TARGET.exists() or TARGET.read_text() != text):
        print("docs/operators.md is out of date: run `python docs/generate.py`", file=sys.stderr)
        return 1
    if not check:
        TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
