"""How a model fares under attacks, class by class."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from fairkernels import functional as FK

from . import hygiene
from .objective import check_logits

CLEAN = "clean"

Run = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """Predictions under one attack.

    ``confusion`` int64 ``[K, K]`` counts, rows the true class, on the CPU; ``largest_change`` of a pixel; ``seconds``
    that the attack took.
    """

    confusion: Tensor
    largest_change: float
    seconds: float

    @property
    def accuracy(self) -> float:
        return (self.confusion.diagonal().sum() / self.confusion.sum()).item()

    @property
    def class_accuracy(self) -> Tensor:
        """float64 ``[K]``; NaN for a class that did not occur."""
        return self.confusion.diagonal().double() / self.confusion.sum(-1)

    @property
    def worst_class(self) -> int:
        return int(self.class_accuracy.nan_to_num(torch.inf).argmin())

    @property
    def worst_class_accuracy(self) -> float:
        return self.class_accuracy[self.worst_class].item()


def evaluate(
    model: Callable[..., Any],
    loader: Iterable[Sequence[Tensor]],
    attacks: Any,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Outcome]:
    """Confusion counts of a model without and under attacks.

    Args:
        model: images to logits ``[N, K]``; in eval mode meanwhile, afterwards as before.
        loader: gives ``(images [N, C, H, W], labels int [N], ...)``.
        attacks: one, a list, or a dictionary by name, of anything called with images and labels, such as ours or
            torchattacks'; of pairs ``(foolbox attack, radius)``; of ``AutoAttack`` objects.
        bounds: of the pixels, for foolbox.
        device: where batches are moved; by default that of the model's parameters.
        progress: show it, on standard error.

    Returns:
        An :class:`Outcome` for ``"clean"`` and for every attack, by name: the class of an attack that has none.

    Raises:
        TypeError, ValueError: for something that is no attack, two of one name, a loader without images.
    """
    runs = {name: runner(attack, model, bounds) for name, attack in named(attacks).items()}
    where = torch.device(device) if device is not None else device_of(model)
    tallies = {name: Tally() for name in (CLEAN, *runs)}
    batches = len(loader) if isinstance(loader, Sized) else None

    with hygiene.evaluating(model), bar(progress) as shown:
        task = shown.add_task("attacking", total=None if batches is None else batches * len(tallies))
        for images, labels, *_ in loader:
            images, labels = images.to(where), labels.to(where)
            for name, tally in tallies.items():
                shown.update(task, description=name)
                began = time.perf_counter()
                attacked = images if name == CLEAN else runs[name](images, labels)
                tally.add(model, images, attacked, labels, began)
                shown.advance(task)
    return {name: tally.outcome() for name, tally in tallies.items()}


class Tally:
    """Counts of one attack, which grow batch by batch."""

    def __init__(self) -> None:
        self.confusion: Tensor | None = None
        self.change, self.seconds = torch.zeros((), dtype=torch.float64), 0.0

    def add(self, model: Callable[..., Any], images: Tensor, attacked: Tensor, labels: Tensor, began: float) -> None:
        if attacked.shape != images.shape:
            raise ValueError(f"an attack must return images like its own, {list(images.shape)}, got {attacked.shape}")
        with torch.no_grad(), hygiene.evaluating(model):  # a peer may have put it back into training mode
            if len(images):
                change = (attacked - images).abs().max().to(self.change)  # waits for the attack
                self.change = torch.maximum(self.change, change)  # which, unlike max, does not pass over NaN
            self.seconds += time.perf_counter() - began
            logits = model(attacked)
        check_logits(logits, len(images))
        counts = FK.confusion_counts(logits.argmax(-1), labels, num_classes=logits.shape[-1]).cpu()
        self.confusion = counts if self.confusion is None else self.confusion + counts

    def outcome(self) -> Outcome:
        if self.confusion is None:
            raise ValueError("loader must give at least one batch, got none")
        return Outcome(self.confusion, self.change.item(), self.seconds)


def named(attacks: Any) -> dict[str, Any]:
    if isinstance(attacks, Mapping):
        result = dict(attacks)
    else:
        several = isinstance(attacks, Sequence) and not is_pair(attacks)
        listed = list(attacks) if several else [attacks]
        names = [type(attack[0] if is_pair(attack) else attack).__name__ for attack in listed]
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise ValueError(f"attacks need names, as a dictionary: there are several {', '.join(sorted(repeated))}")
        result = dict(zip(names, listed, strict=True))
    if CLEAN in result:
        raise ValueError(f"no attack can be called {CLEAN!r}")
    return result


def runner(attack: Any, model: Callable[..., Any], bounds: tuple[float, float]) -> Run:
    """The attack as a function of images and labels, whosever it is."""
    if is_pair(attack):
        import foolbox

        its, radius = attack
        return lambda images, labels: its(
            foolbox.PyTorchModel(model, bounds=bounds, device=images.device), images, labels, epsilons=radius
        )[1]
    if hasattr(attack, "run_standard_evaluation"):  # AutoAttack
        return lambda images, labels: attack.run_standard_evaluation(images, labels, bs=len(images))
    if type(attack).__module__.partition(".")[0] == "foolbox":
        raise TypeError(f"a foolbox attack does not know its radius: pass the pair ({type(attack).__name__}(), radius)")
    if not callable(attack):
        raise TypeError(f"an attack must be called with images and labels, got {type(attack).__name__}")
    return attack


def is_pair(attack: Any) -> bool:
    return isinstance(attack, tuple) and len(attack) == 2 and isinstance(attack[1], Real)


def device_of(model: Callable[..., Any]) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
