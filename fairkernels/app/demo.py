"""``fairkernels demo``: fair adversarial training on scikit-learn's digits, and the time of its loss.

Adversarial training makes a small CNN robust, but not equally for all classes. From there each method trains on with
its penalty; the control merely trains on for as long. The weight of a penalty (λ of Sy-FAR, α of the spectral loss) is
chosen on the validation images, and the test images are used once, for the table. The fair methods start warm because
from scratch a large λ collapses: a model that always predicts the same class is symmetric in nearly all pairs.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fairkernels.app import figures, machine, report, speed
from fairkernels.app.experiment import QUICK, Method, Outcome, Settings, Weights, evaluate, load_data, train
from fairkernels.app.json_file import write_json
from fairkernels.app.report import Fairness, fairness

R = TypeVar("R")

BASE = Method("adversarial training")
CONTROL = Method("control: trained on")


@dataclass(frozen=True)
class Family:
    """A method for every weight tried, and the validation metric that chooses among them."""

    candidates: tuple[Method, ...]
    target: str


def families(settings: Settings) -> list[Family]:
    """Sy-FAR as published; with a sharper softmax, nearer to the hard decisions that are judged; the spectral loss."""
    weights, sharp = settings.weights, settings.temperature
    published = (Method(f"Sy-FAR λ={w:g}", sym_weight=w) for w in weights)
    sharpened = (Method(f"Sy-FAR τ={sharp:g} λ={w:g}", sym_weight=w, temperature=sharp) for w in weights)
    spectral = (Method(f"spectral loss α={w:g}", spec_weight=w) for w in weights)
    return [
        Family(tuple(published), "symmetry_gap"),
        Family(tuple(sharpened), "symmetry_gap"),
        Family(tuple(spectral), "worst_class_accuracy"),
    ]


# --- the work, in parallel ----------------------------------------------------------------------------------------


class Workers:
    """Runs jobs in other processes, or in this one without an executor, and shows how far they are."""

    def __init__(self, executor: Executor | None, progress: Progress) -> None:
        self.executor, self.progress = executor, progress

    def map(self, what: str, function: Callable[..., R], jobs: Iterable[tuple[Any, ...]]) -> list[R]:
        jobs = list(jobs)
        start = self.executor.map if self.executor else map
        results = start(function, *zip(*jobs, strict=True))
        return list(self.progress.track(results, total=len(jobs), description=what))


@contextmanager
def workers(count: int, console: Console) -> Iterator[Workers]:
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        if count == 1:
            yield Workers(None, progress)
            return
        context = multiprocessing.get_context("spawn")  # a fork would inherit the locks of torch's threads
        with ProcessPoolExecutor(count, context) as executor:
            yield Workers(executor, progress)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- the experiment -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    validation: dict[Method, list[Fairness]]
    test: dict[Method, list[Outcome]]


def run_experiment(settings: Settings, seeds: int, pool: Workers) -> Results:
    """Trains everything for every seed, chooses on validation, and looks at the test images once."""
    bases = pool.map(BASE.name, train, [(settings, BASE, seed) for seed in range(seeds)])

    candidates = [CONTROL, *(method for family in families(settings) for method in family.candidates)]
    runs = list(product(candidates, range(seeds)))
    trained = pool.map("every method and weight from there", train, [(settings, m, s, bases[s]) for m, s in runs])
    weights: dict[Method, list[Weights]] = {BASE: bases}
    for (method, _), result in zip(runs, trained, strict=True):
        weights.setdefault(method, []).append(result)

    outcomes = judge(settings, weights, "validation", pool)
    validation = {method: [fairness(outcome) for outcome in found] for method, found in outcomes.items()}
    chosen = [
        report.choose(
            {method: validation[method] for method in family.candidates},
            validation[CONTROL],
            family.target,
            settings.tolerance,
        )
        for family in families(settings)
    ]
    finalists = {method: weights[method] for method in (BASE, CONTROL, *chosen)}
    return Results(validation, judge(settings, finalists, "test", pool))


def judge(
    settings: Settings, models: dict[Method, list[Weights]], part: str, pool: Workers
) -> dict[Method, list[Outcome]]:
    jobs = [(settings, weights, part) for runs in models.values() for weights in runs]
    found = iter(pool.map(f"PGD-{settings.test_steps} on the {part} images", evaluate, jobs))
    return {method: [next(found) for _ in runs] for method, runs in models.items()}


# --- the command --------------------------------------------------------------------------------------------------


def run_demo(output: Path, seeds: int = 3, quick: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run the experiment, print its tables, write ``demo.json``, ``confusion.png`` and ``speed.png``.

    Args:
        output: folder of the files, made if it does not exist.
        seeds: how many times everything is trained.
        quick: a run of seconds that shows that everything works; its numbers mean nothing.
        console: where to print.

    Returns:
        The content of ``demo.json``.

    Raises:
        ValueError: if ``seeds`` is not positive.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    console = console or Console()
    settings = QUICK if quick else Settings()
    output.mkdir(parents=True, exist_ok=True)

    began = time.perf_counter()
    with workers(1 if quick else cores(), console) as pool:
        results = run_experiment(settings, seeds, pool)
        shapes = speed.SHAPES[:1] if quick else speed.SHAPES
        seconds = 0.05 if quick else 1.0
        measured = pool.progress.track(shapes, description="time of the loss")
        times = [one for shape in measured for one in speed.measure(*shape, seconds=seconds)]

    data = load_data()
    test = {method.name: outcomes for method, outcomes in results.test.items()}
    content = {
        "what": "fairkernels demo" + (" --quick: the numbers mean nothing" if quick else ""),
        "machine": machine.describe(),
        "settings": asdict(settings),
        "images": {part: len(getattr(data, part)) for part in ("train", "validation", "test")},
        "validation": {
            method.name: {metric: report.mean_of(runs, metric) for metric in report.HEADINGS}
            for method, runs in results.validation.items()
        },
        "test": report.results_json(test),
        "symmetry_floor": report.symmetry_floor([outcome.robust for outcome in test[CONTROL.name]]),
        "speed": [asdict(one) for one in times],
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(content, output / "demo.json")
    draw(content, results, times, output)
    show(content, test, times, output, console)
    return content


def draw(content: dict[str, Any], results: Results, times: list[speed.Time], output: Path) -> None:
    settings, seeds = content["settings"], len(results.test[BASE])
    mean_rates = {method.name: report.rates(sum_of(outcomes)).numpy() for method, outcomes in results.test.items()}
    title = (
        f"Digits, {content['images']['test']} test images under PGD-{settings['test_steps']}, "
        f"l∞ radius {settings['radius']:g}: robust confusion in percent, mean of {seeds} seeds"
    )
    figures.save_confusions(mean_rates, title, output / "confusion.png")
    figures.save_speed(times, machine_line(content), output / "speed.png")


def sum_of(outcomes: list[Outcome]) -> torch.Tensor:
    return torch.stack([outcome.robust for outcome in outcomes]).sum(0)


def machine_line(content: dict[str, Any]) -> str:
    about = content["machine"]
    return f"{about['processor']}, one thread, torch {about['torch']}"


def show(
    content: dict[str, Any],
    test: dict[str, list[Outcome]],
    times: list[speed.Time],
    output: Path,
    console: Console,
) -> None:
    settings = content["settings"]
    found = {name: [fairness(outcome) for outcome in outcomes] for name, outcomes in test.items()}
    title = (
        f"Digits, {content['images']['test']} test images, PGD-{settings['test_steps']}, l∞ radius "
        f"{settings['radius']:g}\nmean±std of {len(found[BASE.name])} seeds, rates in percent"
    )
    console.print(report.results_table(found, title))
    console.print(
        f"[bold]{content['symmetry_floor']:.2f}[/] is the symmetry gap of a classifier with the control's errors made "
        "perfectly symmetric: chance alone, on so few images.\n"
    )
    fair = {name: runs for name, runs in found.items() if name != BASE.name}
    console.print(report.paired_table(fair, CONTROL.name))
    for name, runs in fair.items():
        if name != CONTROL.name:
            console.print(report.verdict(name, report.compare(runs, found[CONTROL.name])))
    console.print()
    console.print(report.speed_table(times))
    console.print(machine_line(content))
    console.print(f"{content['seconds']:.0f} s; wrote demo.json, confusion.png and speed.png into {output}")
