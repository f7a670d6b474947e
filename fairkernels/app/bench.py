"""``fairkernels bench``: every operator on its whole grid beside whatever a user would otherwise call."""

from __future__ import annotations

import math
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import fairkernels
from fairkernels import functional as FK
from fairkernels.app import bench_cases, machine
from fairkernels.app.bench_cases import OURS, THREADS, Case, every_case, only_normal_ones, thread_counts
from fairkernels.app.bench_measure import (
    Call,
    Timing,
    available_memory,
    copy_bandwidth,
    interleaved,
    peak_beyond,
    product_speed,
    seconds_of,
    threads,
)
from fairkernels.app.bench_rivals import EAGER, Prepared, Problem, Rival, elements, first, handed_on
from fairkernels.app.json_file import write_json
from fairkernels.ops.samples import Sample
from fairkernels.ops.schema import OPERATORS

if TYPE_CHECKING:  # what is measured and checked here, `make gpu` needs too, where there may be no rich
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

FORWARD, BOTH = "forward", "forward+backward"

COLUMNS = ("microseconds", "rounds", "peak_bytes", "error", "gradient_error", "first_microseconds")
"""Of an implementation in the file; what does not exist is null. ``microseconds`` is the time of one of many calls in a
row, ``first_microseconds`` that of a call right behind another implementation (see ``bench_measure.Timing``)."""

VALUE_LIMIT, GRADIENT_LIMIT, ROUNDING = 1e-4, 3e-3, 3e-5
"""Largest relative error of a sound result in float32. A gradient's is that of its length: where two rates nearly tie,
rounding decides the sign of a single entry. A value may always be wrong by ``ROUNDING``: however small it is itself, it
comes from rates of size 1, for which plain PyTorch adds up to 65536 rows one after the other."""

LONG = 0.05
"""Seconds from which a call needs no warming up, unless it loaded or compiled something."""

SMALL = 2**20
"""Inputs up to here are checked in float64, larger ones in float32."""

PIECE = 2**18
"""Elements whose error is computed at once."""


@dataclass(frozen=True)
class Settings:
    """How much is run.

    ``budget`` is for the rounds of one call in seconds, ``limit`` the longest call that is waited for, ``largest`` the
    number of elements of the largest input, ``forward_largest`` of the largest one that is timed forward only, too.
    """

    cases: tuple[Case, ...] = field(default_factory=every_case)
    threads: tuple[int, ...] = THREADS
    budget: float = 0.03
    limit: float = 0.8
    largest: int = bench_cases.MOST_LOGITS
    forward_largest: int = 2**20
    compile: bool = True
    minutes: float = float("inf")
    """When they are over, what is left of the grid, its largest inputs, is left out."""

    @property
    def partial(self) -> list[str]:
        """What is not asked for, of the whole grid; empty if everything is."""
        chosen = sorted({case.operator for case in self.cases})
        missing = {
            f"only {', '.join(chosen)}": len(chosen) < len({case.operator for case in every_case()}),
            f"only inputs up to {self.largest} elements": self.largest < bench_cases.MOST_LOGITS,
            "without torch.compile": not self.compile,
        }
        return [text for text, applies in missing.items() if applies]


def cases_of(operators: Sequence[str]) -> tuple[Case, ...]:
    """The cases of these operators.

    Raises:
        ValueError: if there is no such operator.
    """
    unknown = [name for name in operators if name not in OPERATORS]
    if unknown:
        raise ValueError(f"no operator {', '.join(unknown)}; there are {', '.join(OPERATORS)}")
    return tuple(case for case in every_case() if case.operator in operators)


class WrongResult(AssertionError):
    """An implementation does not compute what it is timed for."""


def said(error: Exception) -> str:
    """An error in one line, without the folders of this machine."""
    line = next(iter(str(error).splitlines()), "")
    return re.sub(r"(?<![\w.])/(?:[^\s/]+/)+", "", f"{type(error).__name__}: {line}")[:200]


# --- calls --------------------------------------------------------------------------------------------------------


OUR_OWN = Rival(lambda name, sample: partial(getattr(FK, name), *sample.args, **sample.kwargs), memory=lambda _: 0)


class Result(NamedTuple):
    value: Tensor
    gradients: tuple[Tensor, ...]


def differentiating(forward: Prepared, leaves: Sequence[Tensor], upstream: Tensor | None) -> Callable[[], Result]:
    """The call with its gradients; a result that is a scalar needs no upstream gradient."""

    def both() -> Result:
        value = first(forward())
        return Result(value, torch.autograd.grad(value, leaves, upstream))

    return both


def without_gradient(forward: Prepared, leaves: int) -> Callable[[], Result]:
    """The call alone; where nothing is differentiable, nothing has to be switched off, which takes microseconds."""

    def alone() -> Result:
        return Result(first(forward()), ())

    def switched_off() -> Result:
        with torch.no_grad():
            return alone()

    return switched_off if leaves else alone


# --- checks -------------------------------------------------------------------------------------------------------


def relative(actual: Tensor, exact: Tensor) -> float:
    """Length of the error by the length of the exact tensor; integers are right or wrong."""
    if actual.shape != exact.shape:
        return float("inf")
    if not exact.is_floating_point():
        return 0.0 if torch.equal(actual, exact) else float("inf")
    error = length(a.to(e.dtype) - e for a, e in zip(pieces(actual), pieces(exact), strict=True))
    error /= max(length(pieces(exact)), torch.finfo(torch.float32).tiny)
    return error if math.isfinite(error) else float("inf")


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """As a whole, a difference would take as much memory again, and longer to get it than to fill it."""
    return tensor.detach().flatten().split(PIECE)


def length(vector: Iterable[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(piece)) for piece in vector))


def sound(error: float, gradient_error: float | None, values: Tensor, accuracy: float) -> bool:
    """Whether rounding and an iteration of this accuracy explain the errors."""
    size = length(piece.double() for piece in pieces(values)) / max(values.numel(), 1) ** 0.5
    value_sound = error * size <= max(VALUE_LIMIT, 30 * accuracy) * size + ROUNDING  # not so if the error is infinite
    limit = max(GRADIENT_LIMIT, 3000 * accuracy)
    return value_sound and (gradient_error is None or gradient_error <= limit)


@dataclass(frozen=True)
class Exact:
    """What a result is held against, and in which way it was computed; ``None`` with the reason if it was not."""

    result: Result | None
    by: str
    unique: bool = True
    """Its gradient is the only one: among many classes singular values tie, any mixture of their vectors is right."""


def widen(value: Any, dtype: torch.dtype, leaf: bool = False) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_(leaf)


@dataclass
class Task:
    """A case on one problem: its inputs, made once for all passes, threads and implementations."""

    case: Case
    problem: Problem
    sample: Sample
    upstream: Tensor | None
    """Gradient of the result; of a scalar on the CPU there is none."""
    exacts: dict[str, Exact] = field(default_factory=dict)
    """By the options of ours with which a rival agrees."""

    @classmethod
    def of(cls, case: Case, problem: Problem, device: str = "cpu") -> Task:
        sample = case.call(problem, device)
        shape = first(OPERATORS[case.operator].fake(*handed_on(case.operator, sample))).shape
        upstream = None
        if shape:
            upstream = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
        elif device == "cuda":  # left to autograd, it would be one more launch
            upstream = torch.ones(shape, device=device)
        return cls(case, problem, sample, upstream)

    @property
    def leaves(self) -> int:
        return OPERATORS[self.case.operator].differentiable

    def call(self, rival: Rival, name: str) -> Callable[[], Result]:
        """What is timed: the forward pass, or both."""
        forward = rival.prepare(self.case.operator, self.sample)
        if name == FORWARD:
            return without_gradient(forward, self.leaves)
        return differentiating(forward, self.sample.args[: self.leaves], self.upstream)

    def check(self, implementation: str, rival: Rival, result: Result) -> tuple[float | None, float | None]:
        """Relative errors of the value and of the gradient.

        Raises:
            WrongResult: if one is larger than rounding explains.
        """
        if rival.scale or rival.other_numbers:
            return None, None
        exact = self.exact(rival.exact_options)
        if exact.result is None:
            return None, None
        error = relative(result.value, exact.result.value)
        pairs = zip(result.gradients, exact.result.gradients, strict=False)
        gradient_error = max((relative(actual, right) for actual, right in pairs), default=None)
        accuracy = OPERATORS[self.case.operator].allowed_error(torch.float32)
        judged = gradient_error if exact.unique else None
        if not rival.inexact and not sound(error, judged, exact.result.value, accuracy):
            raise WrongResult(
                f"{implementation}, {self.case.name}, {self.problem}: relative error {error:.2g}, of the gradient "
                f"{gradient_error}, by the {exact.by}"
            )
        return error, gradient_error

    def exact(self, options: dict[str, Any]) -> Exact:
        key = str(options)
        if key not in self.exacts:
            self.exacts[key] = self.compute_exact(options)
        return self.exacts[key]

    def compute_exact(self, options: dict[str, Any]) -> Exact:
        """The reference in float64 or, on large inputs, in float32; where it takes too much, its narrow form."""
        dtype = torch.float64 if elements(self.problem) <= SMALL else torch.float32
        by = f"reference in {str(dtype).removeprefix('torch.')}"
        args = tuple(widen(value, dtype, place < self.leaves) for place, value in enumerate(self.sample.args))
        kwargs = {**{name: widen(value, dtype) for name, value in self.sample.kwargs.items()}, **options}

        eager, case = self.case.rivals[EAGER], self.case
        forward: Prepared
        narrow = case.exact is not None and not options and self.problem["K"] > 1000
        reason = case.unchecked(self.problem) or only_normal_ones(self.problem)
        if reason is not None:
            return Exact(None, reason)
        if case.exact is not None and narrow:
            forward, by = partial(case.exact, *args), f"{by}, without the absent classes"
        elif 2 * eager.memory(self.problem) > available_memory(self.sample.args[0].device.type):
            return Exact(None, "not checked: the reference needs more memory")
        else:
            forward = eager.prepare(case.operator, Sample(self.sample.name, args, kwargs))
        if not self.leaves:
            return Exact(without_gradient(forward, 0)(), by)
        upstream = None if self.upstream is None else self.upstream.to(dtype)
        iterates = bool(OPERATORS[case.operator].accuracy)
        return Exact(differentiating(forward, args[: self.leaves], upstream)(), by, not (narrow and iterates))


# --- one cell -----------------------------------------------------------------------------------------------------


class Forecast:
    """How long the next call will take: its steps times the seconds that a step took last."""

    def __init__(self) -> None:
        self.per_step: dict[tuple[object, ...], float] = {}

    def seconds(self, key: tuple[object, ...], steps: float) -> float:
        return self.per_step.get(key, 0.0) * steps

    def learn(self, key: tuple[object, ...], steps: float, seconds: float) -> None:
        self.per_step[key] = seconds / steps


@dataclass(frozen=True)
class Ready:
    """A call to be timed, what it took and its errors."""

    call: Call
    seconds: float
    peak: int | None
    error: float | None
    gradient_error: float | None


@dataclass
class Bench:
    """A run: its settings, what it has learnt, its cells."""

    settings: Settings
    forecast: Forecast = field(default_factory=Forecast)
    cells: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[tuple[str, str], str] = field(default_factory=dict)
    """By case and implementation, what a compiler said that failed: it would take as long to fail again."""

    def measure(self, case: Case, problem: Problem) -> None:
        """All passes and thread counts of a case on a problem; results are checked before they are timed."""
        reason = case.why_not(problem)
        if reason is not None:
            self.leave_out(case, problem, reason)
            return
        task = Task.of(case, problem)
        traffic = OPERATORS[case.operator].traffic(*task.sample.args, **task.sample.kwargs)
        for name in case.passes:
            for count in thread_counts(problem, self.settings.threads):
                if len(case.passes) > 1 and name == FORWARD and not self.forward_too(problem, count):
                    continue
                with threads(count):
                    found = self.contest(task, name, count)
                cell = {
                    "pass": name,
                    "threads": count,
                    "bytes": traffic.forward + (traffic.backward if name == BOTH else 0),
                    "operations": traffic.operations,
                    "checked": task.exact({}).by,
                    "found": found,
                }
                self.cells.append({**head(case, problem), **cell})

    def leave_out(self, case: Case, problem: Problem, reason: str) -> None:
        self.cells.append({**head(case, problem), "left_out": reason})

    def forward_too(self, problem: Problem, count: int) -> bool:
        """Forward alone is timed where it is cheap: one thread, one kind of input, not the largest."""
        small = elements(problem) <= self.settings.forward_largest and all(
            size <= 1000 for _, size in problem.sizes[1:]
        )
        return count == 1 and problem.kind != "trained" and small

    def contest(self, task: Task, name: str, count: int) -> dict[str, Any]:
        """What every implementation took, or why it is not there."""
        rivals = implementations(task.case)
        entries = {implementation: self.enter(implementation, task, name, count) for implementation in rivals}
        ready = {implementation: entry for implementation, entry in entries.items() if isinstance(entry, Ready)}
        calls = {implementation: entry.call for implementation, entry in ready.items()}
        once = {implementation: entry.seconds for implementation, entry in ready.items()}
        timings = interleaved(calls, once, self.settings.budget)
        for implementation, timing in timings.items():
            key = (task.case.name, implementation, name, count)
            self.forecast.learn(key, rivals[implementation].work(task.problem), timing.seconds)
        return {
            implementation: row(timings[implementation], entry) if isinstance(entry, Ready) else f"left out: {entry}"
            for implementation, entry in entries.items()
        }

    def enter(self, implementation: str, task: Task, name: str, count: int) -> Ready | str:
        """A call that was made and whose result was checked, or why there is none."""
        rival = implementations(task.case)[implementation]
        foreseen = self.forecast.seconds((task.case.name, implementation, name, count), rival.work(task.problem))
        reason = self.why_not(implementation, task, name, count, foreseen)
        if reason is not None:
            return reason
        try:
            call = task.call(rival, name)
            peak, result, seconds = observed(call)
        except Exception as error:
            if rival is OUR_OWN:
                raise
            if rival.warms_up:
                self.failed[task.case.name, implementation] = said(error)
            return said(error)
        with threads(max(self.settings.threads)):
            errors = task.check(implementation, rival, result)
        del result
        if needs_warming(seconds, foreseen):
            peak, _, seconds = observed(call)
        return Ready(call, seconds, peak, *errors)

    def why_not(self, implementation: str, task: Task, name: str, count: int, foreseen: float) -> str | None:
        rival, problem = implementations(task.case)[implementation], task.problem
        if rival is OUR_OWN:
            return None
        if not rival.takes_part(name, task.case.passes):
            return f"not timed {name}"
        if rival.warms_up and not self.settings.compile:
            return "not asked for"
        if rival.python_loop and count != min(self.settings.threads):
            return "a Python loop takes as long on any number of threads: see the fewest"
        reason = rival.why_not(problem) or self.failed.get((task.case.name, implementation))
        if reason is not None:
            return reason
        needed = rival.memory(problem)
        if needed > available_memory() / 2:
            return f"needs about {needed / 1e9:.0f} GB"
        limit = self.settings.limit * (5 if rival.scale else 1)
        return f"would take about {foreseen:.{0 if foreseen >= 10 else 1}f} s" if foreseen > limit else None


def head(case: Case, problem: Problem) -> dict[str, Any]:
    """What a cell of the file begins with."""
    return {"operator": case.operator, "variant": case.variant, "kind": problem.kind, "sizes": dict(problem.sizes)}


def implementations(case: Case) -> dict[str, Rival]:
    return {OURS: OUR_OWN, **case.rivals}


def observed(call: Callable[[], Result]) -> tuple[int | None, Result, float]:
    """Peak memory, result and seconds of a call."""
    held: list[Result] = []
    seconds: list[float] = []
    peak = peak_beyond(lambda: seconds.append(seconds_of(lambda: held.append(call()))))
    return peak, held[0], seconds[0]


def needs_warming(seconds: float, foreseen: float) -> bool:
    """A short call does, and one that took longer than foreseen, perhaps because it loaded or compiled something."""
    return seconds < LONG or seconds > 2 * foreseen


def row(timing: Timing, entry: Ready) -> list[Any]:
    """In the order of ``COLUMNS``."""
    times = short(timing.seconds * 1e6), short(timing.first * 1e6)
    return [times[0], timing.rounds, entry.peak, short(entry.error), short(entry.gradient_error), times[1]]


def short(value: float | None) -> float | None:
    """Four digits are more than a measurement has."""
    return None if value is None else float(f"{value:.4g}")


# --- the run ------------------------------------------------------------------------------------------------------


def pairs(settings: Settings) -> Iterator[tuple[Problem, Case]]:
    """Every case on each of its problems, small ones first; those with the same input come together."""
    problems = dict.fromkeys(p for case in settings.cases for p in case.problems if elements(p) <= settings.largest)
    for problem in sorted(problems, key=elements):
        for case in settings.cases:
            if problem in case.problems:
                yield problem, case


def run_bench(settings: Settings, console: Console) -> dict[str, Any]:
    """Measure everything and return the content of the JSON file.

    Raises:
        WrongResult: if an implementation computes something else than the reference.
    """
    began = time.perf_counter()
    bandwidth = {str(count): round(copy_bandwidth(count) / 1e9, 2) for count in settings.threads}
    arithmetic = {str(count): round(product_speed(count) / 1e9, 1) for count in settings.threads}
    bench, todo = Bench(settings), list(pairs(settings))
    with progress(console) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile
        task = bar.add_task("", total=len(todo))
        for problem, case in todo:
            bar.update(task, description=f"{case.name}, {problem}")
            if time.perf_counter() - began < 60 * settings.minutes:
                bench.measure(case, problem)
            else:
                bench.leave_out(case, problem, f"the run had taken its {settings.minutes:g} minutes")
            bar.advance(task)
    return {
        "what": "fairkernels bench",
        "partial": settings.partial,
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": machine.describe(),
        "settings": {
            "dtype": "float32",
            "operators": list(dict.fromkeys(case.operator for case in settings.cases)),
            "threads": list(settings.threads),
            "batches": list(bench_cases.BATCHES),
            "classes": list(bench_cases.CLASSES),
            "most_logits": bench_cases.MOST_LOGITS,
            "longest_call_seconds": settings.limit,
        },
        "copy_gigabytes_per_second": bandwidth,
        "matrix_product_gigaops_per_second": arithmetic,
        "columns": list(COLUMNS),
        "cells": bench.cells,
        "seconds": round(time.perf_counter() - began, 1),
    }


def progress(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=console, transient=True)


def commit() -> str | None:
    """The commit of the tree that the package lies in, with a ``+`` if it was changed since."""
    tree = Path(fairkernels.__file__).resolve().parent

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=tree, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../csrc")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def file_name(content: dict[str, Any]) -> str:
    """Of the machine and the day; a partial run has one of its own, so that it replaces no whole one."""
    words = re.findall(r"[a-z0-9]+", content["machine"]["processor"].lower())
    about = re.findall(r"\w+", " ".join(["partial", *content["partial"]])) if content["partial"] else []
    return f"{'-'.join(about + words)}-{content['machine']['cores']}-cores-{content['date']}.json"


def save(content: dict[str, Any], output: Path) -> Path:
    """Write the file, whole or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / file_name(content)
    write_json(content, path)
    return path


def run_command(settings: Settings, output: Path | None, console: Console | None = None) -> Path | None:
    """Measure, print the table and write the file, if there is a folder for it."""
    from rich.console import Console

    console = console or Console()
    content = run_bench(settings, console)
    console.print(summary(content))
    path = save(content, output) if output else None
    console.print(f"{content['seconds']:.0f} s; {f'wrote {path}' if path else 'nothing was written'}")
    return path


# --- the table ----------------------------------------------------------------------------------------------------


def speedups(cell: dict[str, Any], rivals: Iterable[str]) -> dict[str, float]:
    """How many times as long as ours every rival took that ran."""
    found = cell.get("found", {})
    ours = found[OURS][0] if found else 0
    return {name: found[name][0] / ours for name in rivals if isinstance(found.get(name), list)}


def summary(content: dict[str, Any]) -> Table:
    """A row per operator: our range of times, of the share of the copy bandwidth, and the range of every ratio."""
    from rich.table import Table

    table = Table(title="Forward + backward where there is one, all sizes and threads, smallest … largest")
    for heading in ("operator", "cells", "time", "GB/s", "share of copy"):
        table.add_column(heading, justify="left" if heading == "operator" else "right")
    table.add_column("times as long as ours")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in content["cells"]:
        if "found" in cell:
            groups.setdefault((cell["operator"], cell["variant"]), []).append(cell)
    for (operator, variant), cells in groups.items():
        times = [cell["found"][OURS][0] for cell in cells]
        speeds = [cell["bytes"] / cell["found"][OURS][0] / 1e3 for cell in cells]
        shares = [
            speed / content["copy_gigabytes_per_second"][str(cell["threads"])]
            for speed, cell in zip(speeds, cells, strict=True)
        ]
        names = dict.fromkeys(name for cell in cells for name in cell["found"] if name != OURS)
        ratios = []
        for name in names:
            values = [ratio for cell in cells for ratio in speedups(cell, [name]).values()]
            if values:
                colour = "red" if min(values) < 1 else "green"
                ratios.append(f"{name} [{colour}]{min(values):.2f} … {max(values):.3g}[/]")
        table.add_row(
            f"{operator} ({variant})" if variant else operator,
            str(len(cells)),
            f"{duration(min(times))} … {duration(max(times))}",
            f"{min(speeds):.2g} … {max(speeds):.2g}",
            f"{min(shares):.0%} … {max(shares):.0%}",
            "; ".join(ratios),
        )
    return table


def duration(microseconds: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} µs"
