"""What came out of the demo: metrics of a confusion matrix, the choice among candidates, tables, the JSON file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, TypeVar

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import Tensor

from fairkernels import functional as FK
from fairkernels.app.experiment import Outcome
from fairkernels.app.speed import Time

T = TypeVar("T")


# --- metrics ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fairness:
    """Of one model under attack; all but ``clean_accuracy`` from the row-normalised robust confusion matrix.

    ``largest_asymmetry_pair`` is (true, predicted) in the direction that is mistaken more often.
    """

    clean_accuracy: float
    robust_accuracy: float
    worst_class_accuracy: float
    source_gap: float
    symmetry_gap: float
    largest_asymmetry: float
    largest_asymmetry_pair: tuple[int, int]
    target_share_gap: float


HEADINGS = {
    "clean_accuracy": "clean accuracy",
    "robust_accuracy": "robust accuracy",
    "worst_class_accuracy": "worst class",
    "source_gap": "source gap",
    "symmetry_gap": "symmetry gap",
    "largest_asymmetry": "largest asymmetry",
    "target_share_gap": "target share gap",
}
"""Of the tables; rates in percent, all but the symmetry gap."""

HIGHER_IS_BETTER = ("clean_accuracy", "robust_accuracy", "worst_class_accuracy")


def rates(counts: Tensor) -> Tensor:
    """Rows divided by their sums; a class without samples keeps a row of zeros."""
    return counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)


def fairness(outcome: Outcome) -> Fairness:
    """Accuracies are means of the per-class ones, as in Sy-FAR; its symmetry gap takes ε = 1/K in evaluation."""
    confusion = rates(outcome.robust)
    classes = len(confusion)
    correct = confusion.diagonal()
    wrong = confusion - correct.diag()
    asymmetry = (confusion - confusion.mT).triu(1)
    first, second = divmod(int(asymmetry.abs().argmax()), classes)
    share = wrong.sum(0) / wrong.sum().clamp(min=torch.finfo(wrong.dtype).tiny)
    return Fairness(
        clean_accuracy=float(rates(outcome.clean).diagonal().mean()),
        robust_accuracy=float(correct.mean()),
        worst_class_accuracy=float(correct.min()),
        source_gap=float(correct.max() - correct.min()),
        symmetry_gap=float(FK.symmetry_gap(confusion, eps=1 / classes)),
        largest_asymmetry=float(asymmetry.abs().max()),
        largest_asymmetry_pair=(first, second) if asymmetry[first, second] >= 0 else (second, first),
        target_share_gap=float(share.max() - share.min()),
    )


def symmetry_floor(counts: Sequence[Tensor], draws: int = 200) -> float:
    """Symmetry gap to be expected of a classifier with the same errors made perfectly symmetric.

    It is not 0: with some dozens of images per class the counts of ``i`` for ``j`` and ``j`` for ``i`` differ by
    chance. Drawn row by row from the symmetrised mean matrix.
    """
    mean = rates(torch.stack(list(counts)).sum(0))
    symmetric = ((mean + mean.mT) / 2).fill_diagonal_(0)
    symmetric = symmetric / symmetric.sum(1).max().clamp(min=1)
    right = (1 - symmetric.sum(1)).clamp(min=0)  # -1e-16 by rounding where a class is never right
    symmetric = symmetric + right.diag()
    generator = np.random.default_rng(0)
    sizes = counts[0].sum(1).tolist()
    drawn = [generator.multinomial(n, row, size=draws) for n, row in zip(sizes, symmetric.numpy(), strict=True)]
    sampled = torch.from_numpy(np.stack(drawn, axis=1))
    return float(FK.symmetry_gap(rates(sampled), eps=1 / len(mean)).mean())


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Over seeds; one seed has no deviation."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def mean_of(runs: Sequence[Fairness], metric: str) -> float:
    return fmean(getattr(run, metric) for run in runs)


def choose(candidates: Mapping[T, Sequence[Fairness]], control: Sequence[Fairness], target: str, tolerance: float) -> T:
    """The candidate with the best mean target among those that keep the control's mean robust accuracy.

    ``tolerance`` of it may be lost; if nobody keeps it, the one with the highest robust accuracy is chosen.
    """
    floor = mean_of(control, "robust_accuracy") - tolerance
    sign = 1 if target in HIGHER_IS_BETTER else -1
    kept = [name for name, runs in candidates.items() if mean_of(runs, "robust_accuracy") >= floor]
    if not kept:
        return max(candidates, key=lambda name: mean_of(candidates[name], "robust_accuracy"))
    return max(kept, key=lambda name: sign * mean_of(candidates[name], target))


# --- tables -------------------------------------------------------------------------------------------------------


def number(metric: str, mean: float, std: float | None, signed: bool = False) -> str:
    scale, digits = (1, 2) if metric == "symmetry_gap" else (100, 1)
    text = f"{scale * mean:{'+' if signed else ''}.{digits}f}"
    return text if std is None else f"{text}±{scale * std:.{digits}f}"


def plain_table(columns: Sequence[str], title: str) -> Table:
    """Narrow enough for 80 characters; the numbers stand to the right."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", min_width=min(11, len(column)))
    return table


def results_table(results: Mapping[str, Sequence[Fairness]], title: str) -> Table:
    """A column per method: mean ± standard deviation over seeds."""
    table = plain_table(list(results), title)
    for metric, heading in HEADINGS.items():
        table.add_row(
            heading,
            *(number(metric, *mean_and_std([getattr(run, metric) for run in runs])) for runs in results.values()),
        )
        if metric == "largest_asymmetry":
            table.add_row("  true→predicted", *map(usual_pair, results.values()))
    return table


def usual_pair(runs: Sequence[Fairness]) -> str:
    (true, predicted), _ = Counter(run.largest_asymmetry_pair for run in runs).most_common(1)[0]
    return f"{true}→{predicted}"


@dataclass(frozen=True)
class Comparison:
    """A metric of a method minus that of the control with the same seed."""

    metric: str
    differences: tuple[float, ...]

    @property
    def better(self) -> int:
        """In how many seeds it is for the better."""
        sign = 1 if self.metric in HIGHER_IS_BETTER else -1
        return sum(sign * difference > 0 for difference in self.differences)

    def __str__(self) -> str:
        text = number(self.metric, *mean_and_std(self.differences), signed=True)
        return f"{text}, {self.better}/{len(self.differences)}"


def compare(runs: Sequence[Fairness], control: Sequence[Fairness]) -> list[Comparison]:
    pairs = list(zip(runs, control, strict=True))
    return [Comparison(m, tuple(getattr(a, m) - getattr(b, m) for a, b in pairs)) for m in HEADINGS]


def paired_table(results: Mapping[str, Sequence[Fairness]], control: str) -> Table:
    """Each method against the control, seed by seed; green: better in every seed, red: in none."""
    compared = {name: compare(runs, results[control]) for name, runs in results.items() if name != control}
    table = plain_table(list(compared), f"Minus “{control}”, seed by seed; in how many seeds better")
    for heading, *cells in zip(HEADINGS.values(), *compared.values(), strict=True):
        table.add_row(heading, *(f"[{colour(cell)}]{cell}[/]" for cell in cells))
    return table


def colour(comparison: Comparison) -> str:
    every = comparison.better == len(comparison.differences)
    return "green" if every else "red" if comparison.better == 0 else "default"


def verdict(name: str, comparisons: Sequence[Comparison]) -> str:
    """What can be said of a method against the control, in words."""
    groups: dict[str, list[str]] = {"better in every seed": [], "mixed": [], "better in none": []}
    for one in comparisons:
        seeds = len(one.differences)
        group = "better in every seed" if one.better == seeds else "mixed" if one.better else "better in none"
        groups[group].append(HEADINGS[one.metric])
    return f"{name}: " + "; ".join(f"{group}: {', '.join(found)}" for group, found in groups.items() if found) + "."


def speed_table(times: Sequence[Time]) -> Table:
    title = "Symmetry loss, forward + backward on one thread, median"
    table = plain_table(["batch", "classes", "time", "relative"], title)
    for time in times:
        ours = next(other for other in times if (other.batch, other.classes) == (time.batch, time.classes))
        ratio = time.microseconds / ours.microseconds
        text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"
        table.add_row(time.name, str(time.batch), str(time.classes), str(time), text)
    return table


# --- file ---------------------------------------------------------------------------------------------------------


def results_json(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """Per method: mean and standard deviation over the seeds, metrics and robust confusion counts of every seed."""
    found = {}
    for name, runs in outcomes.items():
        per_seed = [fairness(run) for run in runs]
        summary = {metric: mean_and_std([getattr(run, metric) for run in per_seed]) for metric in HEADINGS}
        found[name] = {
            "mean": {metric: mean for metric, (mean, _) in summary.items()},
            "std": {metric: std for metric, (_, std) in summary.items()},
            "seeds": [
                {**asdict(run), "robust_confusion": outcome.robust.tolist()}
                for run, outcome in zip(per_seed, runs, strict=True)
            ],
        }
    return found
