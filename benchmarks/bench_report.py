"""The benchmark in words and pictures: docs/benchmarks.md, the table of README.md and two plots, from one JSON file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fairkernels.app.bench import BOTH, COLUMNS, FORWARD, duration
from fairkernels.app.bench_cases import CASES, OURS
from fairkernels.app.bench_measure import LEAST, PATIENCE
from fairkernels.app.bench_rivals import COMPILE, EAGER
from fairkernels.ops.schema import OPERATORS

RED = "🔴"
CROSS_ENTROPY = "F.cross_entropy"

Cell = dict[str, Any]


# --- why ours loses, where it does ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reason:
    """Why ours is slower than others in some cells."""

    operator: str
    text: str
    applies: Callable[[Cell], bool] = lambda _: True


def elements(cell: Cell) -> int:
    return math.prod(cell["sizes"].values())


REASONS = (
    *(
        Reason(name, "no kernel yet: the reference runs, through our checks and dispatch")
        for name, operator in OPERATORS.items()
        if not operator.kernels
    ),
    Reason("fair_cross_entropy", "the call itself: Python, checks, dispatch", lambda cell: elements(cell) <= 10**4),
    Reason(
        "fair_cross_entropy",
        "every step of the iteration reads the rates again, a row of all classes for each that occurs",
        lambda cell: cell["variant"] != "",
    ),
    Reason(
        "fair_cross_entropy",
        "memory: exponentials are written, read and written again",
        lambda cell: elements(cell) >= 2**22,
    ),
    Reason(
        "fair_cross_entropy",
        "pairs of the classes that occur, columns gathered for them, and on two threads the order of the samples",
        lambda cell: cell["sizes"]["K"] >= 100,
    ),
    Reason("fair_cross_entropy", "the call, and rows that are few numbers each"),
    Reason("confusion_counts", "the call itself: Python, checks, dispatch", lambda cell: cell["sizes"]["K"] < 1000),
    Reason("confusion_counts", "both clear a result of 8 MB; ours then looks for samples that do not count"),
    Reason("soft_confusion", "pages of a new K x K result", lambda cell: cell["sizes"]["K"] ** 2 >= 2**22),
    Reason(
        "soft_confusion",
        "rows are read in the order of their classes, by the backward once more, and memory waits for them",
        lambda cell: elements(cell) >= 2**22,
    ),
    Reason("pgd_step", "pages of a new result", lambda cell: cell["variant"] == "linf, new result"),
    Reason(
        "spectral_norm", "one step on a stored vector, not converged", lambda cell: cell["rival"].startswith("param")
    ),
)
"""The first that applies is given; the others are not known yet."""


def reason(cell: Cell, rival: str) -> str:
    cell = {**cell, "rival": rival}
    found = (r.text for r in REASONS if r.operator == cell["operator"] and r.applies(cell))
    return next(found, "not known yet")


# --- cells ----------------------------------------------------------------------------------------------------------


def measured(cell: Cell, name: str) -> bool:
    return isinstance(cell["found"].get(name), list)


def microseconds(cell: Cell, name: str = OURS) -> float:
    return cell["found"][name][0]


def first_microseconds(cell: Cell, name: str = OURS) -> float | None:
    """Of the call right behind another implementation; None in a file from before it was recorded."""
    found = dict(zip(COLUMNS, cell["found"][name], strict=False))
    return found.get("first_microseconds")


def ratio(cell: Cell, name: str) -> float:
    """How many times as long as ours it takes."""
    return microseconds(cell, name) / microseconds(cell)


def for_scale(operator: str) -> set[str]:
    """Rivals that compute something else; what cross-entropy takes is the mark for the fair one."""
    cases = [case for case in CASES if case.operator == operator]
    other = {name for case in cases for name, rival in case.rivals.items() if rival.scale}
    return set() if operator == "fair_cross_entropy" else other


def contestants(cell: Cell) -> Iterator[str]:
    """Rivals with a time that ours is compared with."""
    scale = for_scale(cell["operator"])
    return (name for name in cell["found"] if name != OURS and name not in scale and measured(cell, name))


def spaced(size: int) -> str:
    return f"{size:,}".replace(",", " ")


def where(cell: Cell) -> str:
    sizes = ", ".join(f"{name}={spaced(size)}" for name, size in cell["sizes"].items())
    threads = f"{cell['threads']} thread" + "s" * (cell["threads"] > 1)
    return f"{sizes}, {cell['kind']}, {threads}, {cell['pass']}"


def title(operator: str, variant: str) -> str:
    return f"`{operator}` ({variant})" if variant else f"`{operator}`"


def by_operator(content: dict[str, Any]) -> dict[tuple[str, str], list[Cell]]:
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in content["cells"]:
        if "found" in cell:
            groups.setdefault((cell["operator"], cell["variant"]), []).append(cell)
    return groups


def table(header: list[str], rows: Iterable[list[str]], left: int = 1) -> str:
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])


def times(value: float) -> str:
    """A ratio for a table; red if ours loses."""
    text = f"{value:.2f}" if value < 10 else f"{value:,.0f}".replace(",", " ")
    return f"{RED} {text} ×" if value < 1 else f"{text} ×"


def machine_line(content: dict[str, Any]) -> str:
    machine = content["machine"]
    return f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, {content['date']}"


# --- README ---------------------------------------------------------------------------------------------------------


def readme_part(content: dict[str, Any]) -> str:
    rows = []
    for (operator, variant), cells in by_operator(content).items():
        found = [title(operator, variant)]
        for name in (EAGER, COMPILE, CROSS_ENTROPY):
            ratios = [ratio(cell, name) for cell in cells if measured(cell, name)]
            found.append(times(geometric_mean(ratios)) if ratios else "–")
        worst, name = worst_of(cells)
        found.append(f"{times(ratio(worst, name))} {name}")
        rows.append(found)
    header = ["", EAGER, COMPILE, CROSS_ENTROPY, "nearest or fastest rival anywhere"]
    caption = (
        f"How many times as long as ours they take: geometric mean over the whole grid, float32, 1 and 2 threads; "
        f"{RED}: somebody is faster. {machine_line(content)}."
    )
    return f"{table(header, rows)}\n\n{caption}"


def worst_of(cells: list[Cell]) -> tuple[Cell, str]:
    """The cell and the rival with the smallest ratio."""
    return min(((cell, name) for cell in cells for name in contestants(cell)), key=lambda pair: ratio(*pair))


# --- docs/benchmarks.md ---------------------------------------------------------------------------------------------


METHOD = """\
Times are medians of rounds in which all implementations take turns in one process, {dtype}, on the same inputs. Every
result was checked before it was timed, against the reference in float64 (in float32 on large inputs). “2 ×” beside a
rival: it takes twice as long as ours; {red}: it is faster. A rival whose call would take longer than {limit:g} s or
half of the free memory is left out; what it would take stands in its place. `torch.compile` compiles with
`dynamic=True`, for the smallest input first, which its compiler takes for a hint whether several threads are worth it.

GB/s are the bytes that the operator must move at least (`fairkernels/ops/traffic.py`) by its time; “of copy” is the
share of what `copy_` reaches between two tensors of 256 MiB on as many threads, so that inputs that fit the caches may
exceed 100 %. “MB beyond” is the largest growth of the process, results included, in whole pages. The raw numbers, with
rounds and errors: [benchmarks/results](../benchmarks/results)."""

GROWTH = """\
Exponents of the time, fitted through the cells of normal logits on one thread: with the batch at K = 100 from B = 1024,
with the classes at B = 128 from K = 100. A dash: fewer than three cells."""


FIRST_CALLS = """\
All other tables: a short call is timed in a block of calls in a row, each of which finds in the caches what the one
before left there; one of {once:.1g} s or more is timed once. Here also the first call of each block, which comes right
behind another implementation, as a loss in training comes behind the network. Inputs of up to {most} logits, normal
ones, forward and backward, one thread."""

FEW = 10**4
"""Elements of an input beside which what a call itself needs (code, small tables) counts."""


def document(content: dict[str, Any]) -> str:
    machine, copies = content["machine"], content["copy_gigabytes_per_second"]
    groups = by_operator(content)
    settings = content["settings"]
    copy = ", ".join(f"{speed:.1f} GB/s on {count} thread{'s' * (count != '1')}" for count, speed in copies.items())
    parts = [
        "# Benchmarks",
        "Written by `benchmarks/report.py` from the newest file of `fairkernels bench` in `benchmarks/results`; "
        "`make bench` makes it anew on your machine.",
        table(
            ["", ""],
            [
                ["processor", f"{machine['processor']}, {machine['cores']} cores"],
                ["system", f"{machine['system']}, Python {machine['python']}"],
                ["versions", f"fairkernels {machine['fairkernels']}, torch {machine['torch']}"],
                ["commit", f"`{content['commit']}`" + " (`+`: changed since)" * str(content["commit"]).endswith("+")],
                ["date, duration", f"{content['date']}, {content['seconds']:.0f} s"],
                ["copy", copy],
            ],
            left=2,
        ),
        METHOD.format(red=RED, limit=settings["longest_call_seconds"], dtype=settings["dtype"]),
        "![Roofline](images/roofline.png)",
        "![Growth with batch and classes](images/scaling.png)",
        "## Where it is worst",
        "Per operator, over all sizes, kinds and threads of the grid: the rival that comes nearest, or is ahead.",
        worst_table(groups),
        "## Growth",
        GROWTH,
        growth_table(groups),
        *first_calls(groups.get(("fair_cross_entropy", ""), [])),
    ]
    for (operator, variant), cells in groups.items():
        parts += section(content, operator, variant, cells)
    return "\n\n".join(parts) + "\n"


def worst_table(groups: dict[tuple[str, str], list[Cell]]) -> str:
    rows = []
    for key, cells in groups.items():
        cell, name = worst_of(cells)
        value = ratio(cell, name)
        losses = sum(any(ratio(c, n) < 1 for n in contestants(c)) for c in cells)
        why = reason(cell, name) if value < 1 else ""
        rows.append([title(*key), times(value), name, where(cell), f"{losses} of {len(cells)}", why])
    return table(["", "worst ratio", "rival", "where", "cells lost", "reason"], rows)


def first_calls(cells: list[Cell]) -> Iterator[str]:
    """What a small fair loss and cross-entropy take in a row and by themselves; nothing if that was not recorded."""
    small = [
        cell
        for cell in cells
        if elements(cell) <= FEW
        and (cell["kind"], cell["threads"], cell["pass"]) == ("normal", 1, BOTH)
        and measured(cell, CROSS_ENTROPY)
        and first_microseconds(cell) is not None
    ]
    if not small:
        return
    yield "## The first call"
    yield FIRST_CALLS.format(most=spaced(FEW), once=PATIENCE / LEAST)
    yield table(
        ["B", "K", *(f"{name}, {which}" for which in ("in a row", "first") for name in (OURS, CROSS_ENTROPY, "ratio"))],
        [[*map(spaced, cell["sizes"].values()), *both_ways(cell)] for cell in small],
        left=0,
    )


def both_ways(cell: Cell) -> Iterator[str]:
    """Times of ours and of cross-entropy with their ratio, in a row and by themselves."""
    for time in (microseconds, first_microseconds):
        ours, others = time(cell, OURS), time(cell, CROSS_ENTROPY)
        yield from (duration(ours), duration(others), times(others / ours))


def growth_table(groups: dict[tuple[str, str], list[Cell]]) -> str:
    rows = []
    for key, cells in groups.items():
        if cells[0]["sizes"].keys() != {"B", "K"} or cells[0]["kind"] == "predictions":
            continue
        for name in dict.fromkeys(name for cell in cells for name in cell["found"]):
            in_batch = exponent(line(cells, name, "B", "K", 100, least=1024), "B", name)
            in_classes = exponent(line(cells, name, "K", "B", 128, least=100), "K", name)
            if in_batch or in_classes:
                rows.append([title(*key), name, in_batch or "–", in_classes or "–"])
    return table(["", "implementation", "in B", "in K"], rows, left=2)


def line(cells: list[Cell], name: str, axis: str, fixed: str, at: int, least: int = 0) -> list[Cell]:
    """The cells along one axis that have a time."""
    return [
        cell
        for cell in cells
        if cell["sizes"][fixed] == at
        and cell["sizes"][axis] >= least
        and (cell["kind"], cell["threads"], cell["pass"]) == ("normal", 1, BOTH)
        and measured(cell, name)
    ]


def exponent(cells: list[Cell], axis: str, name: str) -> str:
    """Slope of the logarithm of the time; empty if there are too few cells."""
    if len(cells) < 3:
        return ""
    sizes, seconds = [cell["sizes"][axis] for cell in cells], [microseconds(cell, name) for cell in cells]
    return f"{np.polyfit(np.log(sizes), np.log(seconds), 1)[0]:.2f}"


def section(content: dict[str, Any], operator: str, variant: str, cells: list[Cell]) -> Iterator[str]:
    """Tables of one operator, those of one thread and plain inputs open, the others folded."""
    yield f"## {title(operator, variant)}"
    left_out = [c for c in content["cells"] if "left_out" in c and (c["operator"], c["variant"]) == (operator, variant)]
    for text, found in groupby(left_out, key=lambda c: c["left_out"]):
        yield f"Left out: {'; '.join(dict.fromkeys(sizes_of(c) for c in found))}: {text}."

    key = lambda c: (c["pass"] == FORWARD, c["threads"])  # noqa: E731
    for number, (_, group) in enumerate(groupby(sorted(cells, key=key), key=key)):
        shown = list(group)
        head = f"{shown[0]['pass'].capitalize()}, {shown[0]['threads']} thread{'s' * (shown[0]['threads'] > 1)}"
        text = cell_table(content, shown)
        yield f"**{head}**\n\n{text}" if number == 0 else f"<details><summary>{head}</summary>\n\n{text}\n\n</details>"

    notes = {
        (name, found)
        for c in cells
        for name, found in c["found"].items()
        if isinstance(found, str) and not brief(found) and "not timed" not in found
    }
    lines = [f"- {name}: {found.removeprefix('left out: ')}" for name, found in sorted(notes)]
    losses = {(n, reason(c, n)) for c in cells for n in contestants(c) if ratio(c, n) < 1}
    lines += [f"- {RED} {name}: {text}" for name, text in sorted(losses)]
    if lines:
        yield "\n".join(lines)


def sizes_of(cell: Cell) -> str:
    return ", ".join(f"{name}={size}" for name, size in cell["sizes"].items()) + f" ({cell['kind']})"


def cell_table(content: dict[str, Any], cells: list[Cell]) -> str:
    names = [
        name
        for name in cells[0]["found"]
        if name != OURS and any(measured(c, name) or brief(c["found"][name]) for c in cells)
    ]
    sizes = list(cells[0]["sizes"])
    sigma = cells[0]["operator"] == "spectral_norm"
    header = [*sizes, "", OURS, "GB/s", "of copy", "MB beyond", *(["error"] if sigma else []), *names]
    rows = []
    for cell in cells:
        speed = cell["bytes"] / microseconds(cell) / 1e3
        share = speed / content["copy_gigabytes_per_second"][str(cell["threads"])]
        peak, error = cell["found"][OURS][2], cell["found"][OURS][3]
        memory = "–" if peak is None else f"{peak / 1e6:.1f}"
        rows.append(
            [
                *map(spaced, cell["sizes"].values()),
                cell["kind"],
                duration(microseconds(cell)),
                f"{speed:.2g}" if speed < 10 else f"{speed:.0f}",
                f"{share:.0%}",
                memory,
                *([error_text(error)] if sigma else []),
                *(rival_text(cell, name, sigma) for name in names),
            ]
        )
    return table(header, rows, left=0)


def rival_text(cell: Cell, name: str, sigma: bool) -> str:
    found = cell["found"][name]
    if isinstance(found, str):
        return brief(found) or "–"
    value = found[0] / microseconds(cell)
    text = times(value).removeprefix(f"{RED} ") if name in for_scale(cell["operator"]) else times(value)
    return f"{text} ({error_text(found[3])})" if sigma and found[3] is not None else text


def error_text(error: float | None) -> str:
    return "–" if error is None else f"{error:.0e}"


def brief(found: Any) -> str:
    """What a rival would take, of the reason why it was left out."""
    if not isinstance(found, str):
        return ""
    _, about, amount = found.partition(" about ")
    return f"≈ {amount}" if about else ""


# --- pictures -------------------------------------------------------------------------------------------------------


def draw_roofline(content: dict[str, Any], path: Path) -> None:
    """Every operator on its largest input, one thread: operations a byte, operations a second, the roof of the copy."""
    copy = content["copy_gigabytes_per_second"]["1"]
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axis = figure.subplots()
    peak = content["matrix_product_gigaops_per_second"]["1"]
    corner = peak / copy
    axis.plot([0.05, corner], [0.05 * copy, peak], color="black", label=f"memory: copy at {copy:.1f} GB/s")
    axis.plot([corner, 10 * corner], [peak, peak], "k--", label=f"arithmetic: matrix product at {peak:.0f} Gop/s")
    for number, ((operator, variant), cells) in enumerate(by_operator(content).items()):
        single = [
            c for c in cells if c["threads"] == 1 and (c["pass"] == BOTH or OPERATORS[operator].differentiable == 0)
        ]
        if not single:
            continue
        largest = max(single, key=lambda c: (elements(c), c["kind"] != "trained"))
        intensity = largest["operations"] / largest["bytes"]
        speed = largest["operations"] / microseconds(largest) / 1e3
        marker = "osD^vP*X<>hdp"[number % 13]
        label = f"{operator} ({variant})" if variant else operator
        axis.plot(
            intensity,
            speed,
            marker,
            markersize=8,
            linestyle="none",
            label=f"{label}, {speed / min(intensity * copy, peak):.0%} of the roof",
        )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte that must be moved",
        ylabel="10⁹ operations per second",
        title=f"Roofline: largest input of each operator, float32, one thread\n{machine_line(content)}",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=110)


SCALED = ("symmetry_loss", "spectral_loss", "fair_cross_entropy")


def draw_scaling(content: dict[str, Any], path: Path) -> None:
    """Time against batch and against classes; a row per loss."""
    groups = by_operator(content)
    figure = Figure(figsize=(11, 10), layout="constrained")
    axes = figure.subplots(len(SCALED), 2, squeeze=False)
    for row, operator in zip(axes, SCALED, strict=True):
        cells = groups.get((operator, ""), [])
        for axis, (along, fixed, at) in zip(row, (("B", "K", 100), ("K", "B", 128)), strict=True):
            if any(line(cells, OURS, along, fixed, at)):
                draw_lines(axis, content, cells, along, fixed, at)
            axis.set_title(f"{operator}, {fixed} = {at}")
    figure.suptitle(f"Forward + backward, normal logits, float32, one thread — {machine_line(content)}")
    figure.savefig(path, dpi=100)


def draw_lines(axis: Axes, content: dict[str, Any], cells: list[Cell], along: str, fixed: str, at: int) -> None:
    names = dict.fromkeys(name for cell in cells for name in cell["found"])
    for number, name in enumerate(names):
        shown = line(cells, name, along, fixed, at)
        if not shown:
            continue
        colour = "tab:red" if name == OURS else f"C{[0, 0, 1, 2, 4, 5][min(number, 5)]}"
        style = {"linewidth": 2.2, "zorder": 3} if name == OURS else {"linewidth": 1.2}
        sizes, seconds = [c["sizes"][along] for c in shown], [microseconds(c, name) / 1e6 for c in shown]
        axis.plot(sizes, seconds, "o-", markersize=4, color=colour, label=name, **style)
    shown = line(cells, OURS, along, fixed, at)
    floor = [c["bytes"] / content["copy_gigabytes_per_second"]["1"] / 1e9 for c in shown]
    axis.plot([c["sizes"][along] for c in shown], floor, "k:", linewidth=1, label="bytes at the speed of a copy")
    unit = "samples in the batch" if along == "B" else "classes"
    axis.set(xscale="log", yscale="log", xlabel=f"{along}, {unit}", ylabel="median time, s")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
