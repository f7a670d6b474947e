"""What compiled kernels need, held against what they needed before: tests/budget.json, a part for each compiler."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parent / "budget.json"

TARGETS = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that one program may have."""

MORE_REGISTERS, MORE_SHARED = 1.1, 1.1
"""By how much a kernel may exceed its budget: compilers of one version agree, this is for small changes."""

NOTE = "registers a thread, bytes of shared memory a program, spilled bytes"


@dataclass(frozen=True)
class Need:
    """What a compiled kernel needs: registers of a thread, bytes of shared memory of a program, spilled bytes."""

    registers: int
    shared: int
    spills: int


Key = tuple[str, str, int]
"""Kernel, specialisation and target."""

Needs = dict[Key, "Need | str"]
"""Or what is wrong with a kernel: it does not compile, say."""

Part = dict[str, Any]
"""``version`` of the compiler, and ``kernels``: by name, specialisation and target."""


def read(compiler: str) -> Part:
    parts = json.loads(PATH.read_text()) if PATH.exists() else {}
    return dict(parts.get(compiler, {"version": None, "kernels": {}}))


def write(compiler: str, version: str, needs: Needs) -> Part:
    """Renew one part of the file; what is wrong is left out."""
    kernels: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    for (name, text, target), need in needs.items():
        if isinstance(need, Need):
            kernels[name][text][f"sm_{target}"] = [need.registers, need.shared, need.spills]
    parts = json.loads(PATH.read_text()) if PATH.exists() else {}
    parts[compiler] = {"version": version, "kernels": kernels}
    PATH.write_text(as_json(parts))
    return read(compiler)


def as_json(parts: dict[str, Any]) -> str:
    """One line a specialisation."""
    blocks = [f' "": {json.dumps(NOTE)}']
    for compiler in sorted(parts.keys() - {""}):
        part = parts[compiler]
        kernels = [
            f"   {json.dumps(name)}: {{\n"
            + ",\n".join(f"    {json.dumps(text)}: {json.dumps(needs)}" for text, needs in found.items())
            + "\n   }"
            for name, found in part["kernels"].items()
        ]
        head = f' {json.dumps(compiler)}: {{\n  "version": {json.dumps(part["version"])},\n  "kernels": {{\n'
        blocks.append(head + ",\n".join(kernels) + "\n  }\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def complaints(needs: Needs, part: Part | None, version: str) -> Iterator[str]:
    """What is wrong; without a budget only what is wrong in any case."""
    same_compiler = part is not None and part["version"] == version
    for (name, text, target), need in needs.items():
        where = f"{name} [{text}] sm_{target}"
        if isinstance(need, str):
            yield f"{where} {need}"
            continue
        if need.spills:
            yield f"{where} spills {need.spills} bytes"
        if need.shared > SHARED_LIMIT[target]:
            yield f"{where} needs {need.shared} bytes of shared memory, there are {SHARED_LIMIT[target]}"
        if part is None:
            continue
        allowed = part["kernels"].get(name, {}).get(text, {}).get(f"sm_{target}")
        if allowed is None:
            yield f"{where} is not in the budget"
        elif same_compiler and need.registers > MORE_REGISTERS * allowed[0] + 8:
            yield f"{where} takes {need.registers} registers, its budget is {allowed[0]}"
        elif same_compiler and need.shared > MORE_SHARED * allowed[1]:
            yield f"{where} takes {need.shared} bytes of shared memory, its budget is {allowed[1]}"


def stale(needs: Needs, part: Part) -> Iterator[str]:
    current = {(name, text) for name, text, _ in needs}
    for name, found in part["kernels"].items():
        for text in found:
            if (name, text) not in current:
                yield f"{name} [{text}] is in the budget, but nothing asks for it"


def table(part: Part) -> str:
    """A line a kernel: how often it is compiled, least to most registers, most shared memory, spills."""
    lines = [
        "| kernel | compiled | " + " | ".join(f"sm_{target}" for target in TARGETS) + " | spills |",
        "| --- | ---: |" + " ---: |" * len(TARGETS) + " ---: |",
    ]
    for name, found in part["kernels"].items():
        cells = []
        for target in TARGETS:
            needs = [needs[f"sm_{target}"] for needs in found.values()]
            registers = f"{min(n[0] for n in needs)}–{max(n[0] for n in needs)}"
            cells.append(f"{registers}, {max(n[1] for n in needs) / 1024:.1f} KiB")
        spills = sum(need[2] for needs in found.values() for need in needs.values())
        lines.append(f"| `{name}` | {len(found)} | {' | '.join(cells)} | {spills} |")
    return "\n".join(lines)
