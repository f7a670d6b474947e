"""The benchmark of ``make gpu``: a few cells of the grid on one GPU, every backend of ours beside its rivals.

Inputs, rivals and checks are those of ``fairkernels bench``. Without a GPU the same is measured on the CPU, to see that
it runs.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from fairkernels import functional as FK
from fairkernels.app import bench_measure
from fairkernels.app.bench import BOTH, FORWARD, Result, Task, WrongResult, head, said, short
from fairkernels.app.bench_cases import CASES, Case
from fairkernels.app.bench_rivals import (
    COMPILE,
    EAGER,
    Prepared,
    Problem,
    Rival,
    compiled_into_graphs,
)
from fairkernels.ops import dispatch
from fairkernels.ops.samples import Sample
from fairkernels.ops.schema import OPERATORS

OURS = ("native", "triton")
COMPILE_GRAPHS = "torch.compile, reduce-overhead"

COMPILER_WARMS = 4
"""Calls until a CUDA graph of the compiler's is replayed: one compiles, one warms up, one records."""

BUDGET = 0.15
"""Seconds for the rounds of one call."""

Line = dict[str, Any]


def logits(*shapes: tuple[int, int], kind: str = "normal") -> tuple[Problem, ...]:
    return tuple(Problem(kind, (("B", rows), ("K", classes))) for rows, classes in shapes)


def images(*shapes: tuple[int, int, int, int]) -> tuple[Problem, ...]:
    return tuple(Problem("images", tuple(zip("NCHW", shape, strict=True))) for shape in shapes)


def of_classes(kind: str, *sizes: int) -> tuple[Problem, ...]:
    return tuple(Problem(kind, (("K", size),)) for size in sizes)


FEW = ((128, 10), (256, 1000), (65536, 100))
MANY = ((8, 10), (128, 10), (256, 100), (1024, 100), (256, 1000), (1024, 1000), (8192, 1000), (65536, 100))
IMAGES = images((256, 3, 32, 32), (128, 3, 224, 224))

PROBLEMS: dict[str, tuple[Problem, ...]] = {
    "fair_cross_entropy": logits(*MANY),
    "pgd_step": IMAGES,
    "random_start": IMAGES,
    "spectral_norm": of_classes("softmax noise", 10, 100, 1000),
    "soft_confusion": logits(*FEW),
    "symmetry_loss": logits(*FEW),
    "spectral_loss": logits(*FEW),
    "symmetry_gap": of_classes("softmax noise", 10, 100, 1000),
    "trades_kl": logits(*FEW),
    "confusion_counts": logits(*FEW, kind="predictions"),
    "same_class_mixup": IMAGES,
    "kl_dro_weights": of_classes("losses", 10, 1000),
}
"""On what every operator is measured, the important ones first."""

DRY_RUN: dict[str, tuple[Problem, ...]] = {
    "fair_cross_entropy": logits((8, 10)),
    "pgd_step": images((2, 3, 8, 8)),
}


@dataclass
class GpuBench:
    """A run, of all but the compiler or of the compiler alone, whose minutes must not be those of the others."""

    device: str
    deadline: float
    """On the clock of ``time.time``."""
    compiler: bool = False
    problems: Mapping[str, tuple[Problem, ...]] = field(default_factory=lambda: PROBLEMS)
    copy: float = 0.0
    """Bytes a second."""

    def lines(self) -> Iterator[Line]:
        """The bandwidth, then every cell as soon as it is there."""
        on_gpu = self.device == "cuda"
        self.copy = bench_measure.gpu_copy_bandwidth() if on_gpu else bench_measure.copy_bandwidth(1, 16 << 20)
        yield {"copy_gigabytes_per_second": short(self.copy / 1e9)}
        for case, problem in self.pairs():
            yield from self.cells(case, problem, compiler_alone(case) if self.compiler else without_compiler(case))

    def pairs(self) -> Iterator[tuple[Case, Problem]]:
        for operator, problems in self.problems.items():
            for problem in problems:
                yield from ((case, problem) for case in CASES if case.operator == operator)

    def cells(self, case: Case, problem: Problem, rivals: Mapping[str, Rival]) -> Iterator[Line]:
        if not rivals:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.compile
            task = None
            for name in case.passes:
                if name == FORWARD and len(case.passes) > 1 and case.operator != "fair_cross_entropy":
                    continue
                cell = {**head(case, problem), "pass": name}
                if self.is_over():
                    yield {**cell, "found": dict.fromkeys(rivals, "left out: no time was left")}
                else:
                    task = task or Task.of(case, problem, self.device)
                    yield {**cell, "bytes": bytes_of(task, name), "found": self.contest(task, name, rivals)}

    def is_over(self) -> bool:
        return time.time() > self.deadline

    def contest(self, task: Task, name: str, rivals: Mapping[str, Rival]) -> dict[str, Any]:
        """What every implementation took, or why it is not there. A wrong result is not timed."""
        found: dict[str, Any] = {}
        calls, errors = {}, {}
        for implementation, rival in rivals.items():
            reason = self.why_not(task, name, rival)
            if reason is not None:
                found[implementation] = f"left out: {reason}"
                continue
            try:
                call = task.call(rival, name)
                result = warmed(call, COMPILER_WARMS if rival.warms_up else 1)
                errors[implementation] = task.check(implementation, rival, result)
                calls[implementation] = call
            except WrongResult as error:
                found[implementation] = f"WRONG: {error}"
            except Exception as error:
                found[implementation] = f"{'FAILED' if implementation in OURS else 'left out'}: {said(error)}"
            if self.device == "cuda":
                torch.cuda.synchronize()  # an error of the GPU is raised here, and ends the run: nothing works after it
        moved = bytes_of(task, name)
        for implementation, times in self.times(calls).items():
            speed = moved / (times["microseconds"] or 1e-3) * 1e6
            found[implementation] = {
                **{key: short(value) for key, value in times.items()},
                "gigabytes_per_second": short(speed / 1e9),
                "share_of_copy": short(speed / self.copy),
                "launches": self.launches(calls[implementation]),
                "error": finite(errors[implementation][0]),
                "gradient_error": finite(errors[implementation][1]),
            }
        return {implementation: found[implementation] for implementation in rivals}

    def why_not(self, task: Task, name: str, rival: Rival) -> str | None:
        if not rival.takes_part(name, task.case.passes):
            return f"not timed {name}"
        if self.is_over():
            return "no time was left"
        return rival.why_not(task.problem)

    def times(self, calls: Mapping[str, Callable[[], Result]]) -> dict[str, dict[str, float]]:
        if self.device == "cuda":
            return {
                name: {"microseconds": found.cold * 1e6, "wall_microseconds": found.wall * 1e6, "rounds": found.rounds}
                for name, found in bench_measure.on_gpu(calls, BUDGET).items()
            }
        once = {name: bench_measure.seconds_of(call) for name, call in calls.items()}
        return {
            name: {
                "microseconds": found.first * 1e6,
                "wall_microseconds": found.seconds * 1e6,
                "rounds": found.rounds,
            }
            for name, found in bench_measure.interleaved(calls, once, 0.0).items()
        }

    def launches(self, call: Callable[[], Result]) -> int | None:
        """None where there is no GPU, or a profiler that does not run there."""
        if self.device != "cuda":
            return None
        try:
            return sum(bench_measure.launches_of(call).values())
        except RuntimeError:
            torch.cuda.synchronize()
            return None


def bytes_of(task: Task, name: str) -> int:
    traffic = OPERATORS[task.case.operator].traffic(*task.sample.args, **task.sample.kwargs)
    return traffic.forward + (traffic.backward if name == BOTH else 0)


def finite(error: float | None) -> float | None:
    """JSON has no infinity; what has an infinite error and was not refused is not judged."""
    return short(error) if error is not None and math.isfinite(error) else None


def warmed(call: Callable[[], Result], times: int) -> Result:
    for _ in range(times - 1):
        call()
    return call()


def ours(backend: str, operator: str) -> Rival:
    def prepare(name: str, sample: Sample) -> Prepared:
        return partial(getattr(FK, name), *sample.args, **sample.kwargs, backend=backend)

    def why_not(_: Problem) -> str | None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return dispatch.can_run(backend, OPERATORS[operator], device, OPERATORS[operator].dtypes[0])

    return Rival(prepare, why_not=why_not)


def without_compiler(case: Case) -> dict[str, Rival]:
    """Ours, and all rivals that need no compiler and no loop of the interpreter."""
    others = {name: rival for name, rival in case.rivals.items() if not (rival.warms_up or rival.python_loop)}
    kept = {name: rival for name, rival in others.items() if name not in ON_THE_CPU}
    return {**{backend: ours(backend, case.operator) for backend in OURS}, **kept}


ON_THE_CPU = ("cvxpy", "loop over the classes")
"""Rivals that compute there, or look at the tensor for every class."""


def compiler_alone(case: Case) -> dict[str, Rival]:
    if COMPILE not in case.rivals:
        return {}
    plain = case.rivals[COMPILE]
    return {COMPILE: plain, COMPILE_GRAPHS: replace(plain, prepare=compiled_into_graphs)}


def merged(lines: list[Line]) -> list[Line]:
    """The cells of a run, those of the compiler joined to the others."""
    cells: dict[str, Line] = {}
    for line in lines:
        key = str({name: value for name, value in line.items() if name not in ("found", "bytes")})
        if key in cells:
            cells[key]["found"].update(line["found"])
        else:
            cells[key] = {**line, "found": dict(line["found"])}
    return list(cells.values())


def failures(cells: list[Line]) -> list[str]:
    """What was wrong or failed of ours."""
    return [
        f"{cell['operator']} {implementation}: {found}"
        for cell in cells
        for implementation, found in cell["found"].items()
        if isinstance(found, str) and found.startswith(("WRONG", "FAILED"))
    ]


def table(cells: list[Line]) -> str:
    """Plain text: a line a cell and implementation; ``×`` is how many times as long as eager PyTorch it took."""
    lines = [f"{'µs cold':>10} {'µs wall':>10} {'GB/s':>7} {'copy':>5} {'launches':>8} {'× eager':>8}"]
    for cell in cells:
        variant = f" ({cell['variant']})" if cell["variant"] else ""
        lines.append(f"{cell['operator']}{variant} {sizes_of(cell)}, {cell['pass']}")
        eager = cell["found"].get(EAGER)
        for implementation, found in cell["found"].items():
            if isinstance(found, str):
                lines += [f"{'':54}{implementation}: {found}"[:118]] * (not found.startswith("left out: not timed"))
                continue
            ratio = found["microseconds"] / eager["microseconds"] if isinstance(eager, dict) else float("nan")
            launches = "" if found["launches"] is None else found["launches"]
            lines.append(
                f"{found['microseconds']:10.1f} {found['wall_microseconds']:10.1f} "
                f"{found['gigabytes_per_second']:7.0f} {found['share_of_copy']:5.0%} {launches:>8} {ratio:8.2f} "
                f"{implementation}"
            )
    return "\n".join(lines)


def sizes_of(cell: Line) -> str:
    return "x".join(map(str, cell["sizes"].values()))


# --- goals --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """What each backend of ours is to reach with a cold cache, at every size and in every variant."""

    text: str
    operator: str
    variants: tuple[str, ...]
    timed: str
    """Forward, or both passes."""
    problems: tuple[Problem, ...]
    figure: Callable[[Line, str], float | None]
    """Of a backend in what was found; None where it was not measured."""
    limit: float
    at_least: bool

    def asks_for(self, cell: Line) -> bool:
        return (
            (cell["operator"], cell["pass"]) == (self.operator, self.timed)
            and cell["variant"] in self.variants
            and cell["sizes"] in [dict(problem.sizes) for problem in self.problems]
        )

    def is_reached(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else figure <= self.limit


def beside_cross_entropy(found: Line, backend: str) -> float | None:
    ours, theirs = found.get(backend), found.get("F.cross_entropy")
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return None
    return short(ours["microseconds"] / theirs["microseconds"])


def share_of_copy(found: Line, backend: str) -> float | None:
    ours = found.get(backend)
    return ours["share_of_copy"] if isinstance(ours, dict) else None


GOALS = (
    Goal(
        "fair_cross_entropy, forward+backward: at most 1.00 of the time of F.cross_entropy, at every size",
        "fair_cross_entropy",
        ("",),
        BOTH,
        PROBLEMS["fair_cross_entropy"],
        beside_cross_entropy,
        limit=1.0,
        at_least=False,
    ),
    Goal(
        "pgd_step, linf, 128x3x224x224: at least 0.90 of the copy bandwidth",
        "pgd_step",
        ("linf, into given memory", "linf, new result"),
        FORWARD,
        images((128, 3, 224, 224)),
        share_of_copy,
        limit=0.9,
        at_least=True,
    ),
)


def verdicts(cells: list[Line]) -> list[Line]:
    return [verdict(goal, backend, cells) for goal in GOALS for backend in OURS]


def verdict(goal: Goal, backend: str, cells: list[Line]) -> Line:
    """Of the worst figure. One that misses the goal is enough; for a goal to be reached all must have been measured."""
    asked = [cell for cell in cells if goal.asks_for(cell)]
    figures = [(figure, cell) for cell in asked if (figure := goal.figure(cell["found"], backend)) is not None]
    found = {"goal": goal.text, "backend": backend, "measured": len(figures)}
    found |= {"asked": len(goal.variants) * len(goal.problems), "verdict": "not measured"}
    if not figures:
        return found
    worst, cell = (min if goal.at_least else max)(figures, key=lambda pair: pair[0])
    found |= {"worst": worst, "at": ", ".join(filter(None, (cell["variant"], sizes_of(cell))))}
    if not goal.is_reached(worst):
        return {**found, "verdict": "not reached"}
    return {**found, "verdict": "reached" if found["measured"] == found["asked"] else "not measured"}


def told(verdicts: list[Line]) -> str:
    """Plain text: a line a goal and one for every backend."""
    lines = []
    for found in verdicts:
        lines += [found["goal"]] * (found["backend"] == OURS[0])
        worst = f", worst {found['worst']:.4g} at {found['at']}" if "worst" in found else ""
        measured = f"{found['measured']} of {found['asked']} measured"
        lines.append(f"    {found['backend']}: {found['verdict']}{worst} ({measured})")
    return "\n".join(lines)
