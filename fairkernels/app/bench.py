"""``fairkernels bench``: every operator on its whole grid beside whatever a user would otherwise call."""

from __future__ import annotations

import re
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import fairkernels
from fairkernels import functional as FK
from fairkernels.app import bench_cases, machine
from fairkernels.app.bench_cases import OURS, THREADS, Case, every_case
from fairkernels.app.bench_measure import (
    Call,
    Timing,
    available_memory,
    copy_bandwidth,
    interleaved,
    peak_beyond,
    seconds_of,
    threads,
)
from fairkernels.app.bench_rivals import Problem, Rival, elements, first
from fairkernels.app.report import write_json
from fairkernels.ops.samples import Sample
from fairkernels.ops.schema import OPERATORS

FORWARD, BOTH = "forward", "forward+backward"

COLUMNS = ("microseconds", "rounds", "peak_bytes", "error", "gradient_error")
"""Of an implementation in the file; what does not exist is null."""

VALUE_LIMIT, GRADIENT_LIMIT, ROUNDING = 1e-4, 3e-3, 1e-6
"""Largest relative error of a sound result in float32. A gradient's is that of its length: where two rates nearly tie,
rounding decides the sign of a single entry. A value may always be wrong by ``ROUNDING``: it is made of numbers of size
1, however small it is itself."""

LONG = 0.2
"""Seconds from which a call needs no warming up."""

SMALL = 2**20
"""Inputs up to here are checked in float64, larger ones in float32."""


@dataclass(frozen=True)
class Settings:
    """How much is run.

    ``budget`` is for the rounds of one call in seconds, ``limit`` the longest call that is waited for, ``largest`` the
    number of elements of the largest input, ``forward_largest`` of the largest one that is timed forward only, too.
    """

    cases: tuple[Case, ...] = field(default_factory=every_case)
    threads: tuple[int, ...] = THREADS
    budget: float = 0.06
    limit: float = 0.8
    largest: int = bench_cases.MOST_LOGITS
    forward_largest: int = 2**20
    compile: bool = True


class WrongResult(AssertionError):
    """An implementation does not compute what it is timed for."""


# --- calls --------------------------------------------------------------------------------------------------------


OUR_OWN = Rival(lambda name, sample: lambda: first(getattr(FK, name)(*sample.args, **sample.kwargs)), memory=lambda _: 0)


@dataclass(frozen=True)
class Result:
    value: Tensor
    gradients: tuple[Tensor, ...]


def differentiating(forward: Callable[[], Tensor], leaves: Sequence[Tensor], upstream: Tensor | None) -> Callable[[], Result]:
    """The call with its gradients; a result that is a scalar needs no upstream gradient."""

    def both() -> Result:
        value = forward()
        return Result(value, torch.autograd.grad(value, leaves, upstream))

    return both


def without_gradient(forward: Callable[[], Tensor]) -> Callable[[], Result]:
    def alone() -> Result:
        with torch.no_grad():
            return Result(forward(), ())

    return alone


# --- checks -------------------------------------------------------------------------------------------------------


def relative(actual: Tensor, exact: Tensor) -> float:
    """Length of the error by the length of the exact tensor; integers are right or wrong."""
    if not exact.is_floating_point():
        return 0.0 if torch.equal(actual, exact) else float("inf")
    if actual.shape != exact.shape:
        return float("inf")
    wide = torch.float64 if exact.dtype == torch.float64 else torch.float32
    actual, exact = actual.detach().to(wide), exact.detach()
    length = torch.linalg.vector_norm(exact)
    error = torch.linalg.vector_norm(actual - exact) / length.clamp(min=torch.finfo(torch.float32).tiny)
    return float(error) if error.isfinite() else float("inf")


@dataclass(frozen=True)
class Exact:
    """What a result is held against, and in which way it was computed; ``None`` with the reason if it was not."""

    result: Result | None
    by: str


def exact_result(case: Case, problem: Problem, sample: Sample, options: dict[str, Any], upstream: Tensor | None) -> Exact:
    """The reference in float64 or, on large inputs, in float32; where it takes too much, its narrow form."""
    small = elements(problem) <= SMALL
    dtype = torch.float64 if small else torch.float32
    leaves = OPERATORS[case.operator].differentiable
    args = tuple(widen(argument, dtype, leaf=place < leaves) for place, argument in enumerate(sample.args))
    wide = Sample(sample.name, args, {**{k: widen(v, dtype) for k, v in sample.kwargs.items()}, **options})

    eager = case.rivals["eager PyTorch"]
    if case.exact is not None and not options and problem["K"] > 1000:
        forward = lambda: case.exact(*args)  # noqa: E731
        by = f"{str(dtype).removeprefix('torch.')}, absent classes in one"
    elif 2 * eager.memory(problem) > available_memory():
        return Exact(None, "not checked: the reference needs more memory")
    else:
        forward = eager.prepare(case.operator, wide)
        by = f"{str(dtype).removeprefix('torch.')} reference"
    if leaves == 0:
        return Exact(without_gradient(forward)(), by)
    return Exact(differentiating(forward, args[:leaves], None if upstream is None else upstream.to(dtype))(), by)


def widen(value: Any, dtype: torch.dtype, leaf: bool = False) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_(leaf)


def check(label: str, result: Result, exact: Exact, accuracy: float) -> tuple[float | None, float | None]:
    """Errors of value and gradient.

    Raises:
        WrongResult: if one is larger than rounding explains.
    """
    if exact.result is None:
        return None, None
    error = relative(result.value, exact.result.value)
    pairs = zip(result.gradients, exact.result.gradients, strict=False)
    gradient_error = max((relative(actual, right) for actual, right in pairs), default=None)
    values = exact.result.value
    size = float(torch.linalg.vector_norm(values)) / values.numel() ** 0.5 if values.is_floating_point() else 1.0
    sound = error * size <= max(VALUE_LIMIT, 30 * accuracy) * size + ROUNDING  # not so if the error is infinite
    if not sound or (gradient_error or 0.0) > GRADIENT_LIMIT:
        raise WrongResult(f"{label}: relative error {error:.2g}, of the gradient {gradient_error}, by the {exact.by}")
    return error, gradient_error


# --- one cell -----------------------------------------------------------------------------------------------------


class Forecast:
    """How long the next call will take: steps times the seconds that a step took last."""

    def __init__(self) -> None:
        self.per_step: dict[tuple[str, ...], float] = {}

    def seconds(self, key: tuple[str, ...], steps: float) -> float:
        return self.per_step.get(key, 0.0) * steps

    def learn(self, key: tuple[str, ...], steps: float, seconds: float) -> None:
        self.per_step[key] = seconds / steps


@dataclass
class Bench:
    """A run: its settings, what it has learnt, its cells."""

    settings: Settings
    forecast: Forecast = field(default_factory=Forecast)
    cells: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, case: Case, problem: Problem) -> None:
        """All passes and thread counts of a case on a problem; results are checked before they are timed."""
        operator = OPERATORS[case.operator]
        reason = case.why_not(problem)
        if reason is not None:
            self.cells.append({**self.head(case, problem), "left_out": reason})
            return
        sample = case.call(problem)
        traffic = operator.traffic(*sample.args, **sample.kwargs)
        with torch.no_grad():
            shape = OUR_OWN.prepare(case.operator, sample)()
        upstream = None if shape.dim() == 0 else torch.ones_like(shape) if not shape.is_floating_point() else shape.clone()
        del shape
        exacts: dict[str, Exact] = {}
        for name in case.passes:
            for count in self.settings.threads:
                if name == FORWARD and operator.differentiable and not self.forward_too(problem, count):
                    continue
                moved = traffic.forward + (traffic.backward if name == BOTH else 0)
                with threads(count):
                    found = self.contest(case, problem, sample, name, upstream, exacts)
                head = {**self.head(case, problem), "pass": name, "threads": count}
                checked = exacts["{}"].by
                self.cells.append(
                    {**head, "bytes": moved, "operations": traffic.operations, "checked": checked, "found": found}
                )

    def forward_too(self, problem: Problem, count: int) -> bool:
        """Forward alone is timed where it is cheap: one thread, one kind of input, not the largest."""
        small = elements(problem) <= self.settings.forward_largest and all(size <= 1000 for _, size in problem.sizes[1:])
        return count == 1 and problem.kind != "trained" and small

    @staticmethod
    def head(case: Case, problem: Problem) -> dict[str, Any]:
        return {
            "operator": case.operator,
            "variant": case.variant,
            "kind": problem.kind,
            "sizes": dict(problem.sizes),
        }

    def contest(
        self,
        case: Case,
        problem: Problem,
        sample: Sample,
        name: str,
        upstream: Tensor | None,
        exacts: dict[str, Exact],
    ) -> dict[str, Any]:
        """What every implementation took, or why it is not there."""
        found: dict[str, Any] = {}
        calls: dict[str, Call] = {}
        once: dict[str, float] = {}
        notes: dict[str, tuple[Any, ...]] = {}
        for rival_name, rival in {OURS: OUR_OWN, **case.rivals}.items():
            key = (case.name, rival_name, name, str(torch.get_num_threads()))
            reason = self.why_not(rival, problem, name, key) if rival_name != OURS else None
            if reason is not None:
                found[rival_name] = f"left out: {reason}"
                continue
            try:
                call = self.call_of(case, sample, rival.prepare(case.operator, sample), name, upstream)
                peak, result, seconds = observed(call)
            except Exception as error:
                if rival_name == OURS:
                    raise
                found[rival_name] = f"left out: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            errors = self.checked(case, problem, sample, rival_name, rival, result, upstream, exacts)
            if rival.warms_up or seconds < LONG:
                peak, result, seconds = observed(call)
            del result
            notes[rival_name] = (peak, *errors)
            self.forecast.learn(key, rival.work(problem), seconds)
            calls[rival_name], once[rival_name] = call, seconds
            notes[rival_name] = (peak, *notes[rival_name])
        for rival_name, timing in interleaved(calls, once, self.settings.budget).items():
            found[rival_name] = row(timing, *notes[rival_name])
        return {rival_name: found[rival_name] for rival_name in (OURS, *case.rivals)}

    def why_not(self, rival: Rival, problem: Problem, name: str, key: tuple[str, ...]) -> str | None:
        if name not in rival.passes:
            return f"not timed {name}"
        if rival.warms_up and not self.settings.compile:
            return "not asked for"
        reason = rival.why_not(problem)
        if reason is not None:
            return reason
        needed = rival.memory(problem)
        if needed > available_memory() / 2:
            return f"needs about {needed / 1e9:.0f} GB"
        seconds = self.forecast.seconds(key, rival.work(problem))
        if seconds > self.settings.limit:
            return f"would take about {seconds:.2g} s"
        return None

    def call_of(
        self, case: Case, sample: Sample, forward: Callable[[], Tensor], name: str, upstream: Tensor | None
    ) -> Callable[[], Result]:
        leaves = sample.args[: OPERATORS[case.operator].differentiable]
        return differentiating(forward, leaves, upstream) if name == BOTH else without_gradient(forward)

    def checked(
        self,
        case: Case,
        problem: Problem,
        sample: Sample,
        rival_name: str,
        rival: Rival,
        result: Result,
        upstream: Tensor | None,
        exacts: dict[str, Exact],
    ) -> tuple[float | None, float | None]:
        if rival.scale or rival.inexact and case.operator != "spectral_norm":
            return None, None
        key = str(rival.exact_options)
        if key not in exacts:
            exacts[key] = exact_result(case, problem, sample, rival.exact_options, upstream)
        exact = exacts[key]
        if rival.inexact:
            return (None if exact.result is None else relative(result.value, exact.result.value)), None
        accuracy = OPERATORS[case.operator].allowed_error(torch.float32)
        return check(f"{rival_name}, {case.name}, {problem}", result, exact, accuracy)


def observed(call: Callable[[], Result]) -> tuple[int | None, Result, float]:
    """Peak memory, result and seconds of a call."""
    held: list[Result] = []
    seconds: list[float] = []
    peak = peak_beyond(lambda: seconds.append(seconds_of(lambda: held.append(call()))))
    return peak, held[0], seconds[0]


def row(timing: Timing, peak: int | None, error: float | None, gradient_error: float | None) -> list[Any]:
    return [short(timing.seconds * 1e6), timing.rounds, peak, short(error), short(gradient_error)]


def short(value: float | None) -> float | None:
    """Four digits are more than a measurement has."""
    return None if value is None else float(f"{value:.4g}")


# --- the run ------------------------------------------------------------------------------------------------------


def pairs(settings: Settings) -> Iterator[tuple[Problem, Case]]:
    """Every case on each of its problems; those with the same input come together."""
    problems = dict.fromkeys(p for case in settings.cases for p in case.problems if elements(p) <= settings.largest)
    for problem in problems:
        for case in settings.cases:
            if problem in case.problems:
                yield problem, case


def run_bench(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Measure everything and return the content of the JSON file.

    Raises:
        WrongResult: if an implementation computes something else than the reference.
    """
    console = console or Console()
    began = time.perf_counter()
    bandwidth = {str(count): round(copy_bandwidth(count) / 1e9, 2) for count in settings.threads}
    bench, todo = Bench(settings), list(pairs(settings))
    with progress(console) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile
        task = bar.add_task("", total=len(todo))
        for problem, case in todo:
            bar.update(task, description=f"{case.name}, {problem}")
            bench.measure(case, problem)
            bar.advance(task)
    return {
        "what": "fairkernels bench",
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": machine.describe(),
        "settings": {
            "dtype": "float32",
            "threads": list(settings.threads),
            "batches": list(bench_cases.BATCHES),
            "classes": list(bench_cases.CLASSES),
            "most_logits": bench_cases.MOST_LOGITS,
            "longest_call_seconds": settings.limit,
        },
        "copy_gigabytes_per_second": bandwidth,
        "columns": list(COLUMNS),
        "cells": bench.cells,
        "seconds": round(time.perf_counter() - began, 1),
    }


def progress(console: Console) -> Progress:
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
    words = re.findall(r"[a-z0-9]+", content["machine"]["processor"].lower())
    return f"{'-'.join(words)}-{content['machine']['cores']}-cores-{content['date']}.json"


def save(content: dict[str, Any], output: Path) -> Path:
    """Write the file, whole or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / file_name(content)
    write_json(content, path)
    return path


def run_command(settings: Settings, output: Path, console: Console | None = None) -> Path:
    """Measure, print the table and write the file."""
    console = console or Console()
    content = run_bench(settings, console)
    console.print(summary(content))
    path = save(content, output)
    console.print(f"{content['seconds']:.0f} s; wrote {path}")
    return path


# --- the table ----------------------------------------------------------------------------------------------------


def speedups(cell: dict[str, Any], rivals: Iterable[str]) -> dict[str, float]:
    """How many times as long as ours every rival took that ran."""
    found = cell.get("found", {})
    ours = found[OURS][0] if found else 0
    return {name: found[name][0] / ours for name in rivals if isinstance(found.get(name), list)}


def summary(content: dict[str, Any]) -> Table:
    """A row per operator: our range of times, of the share of the copy bandwidth, and the range of every ratio."""
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
