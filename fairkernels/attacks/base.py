"""What all attacks share: options, checks, targets, restarts, and that nothing is left behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from fairkernels.ops import check

from . import hygiene, losses
from .capture import Graphs, compiled
from .inputs import Normalization, broadcasting, checked_images, checked_labels
from .loop import Step, Worst, iterate, per_sample
from .objective import Forward, Goal, Objective, check_logits, known

Keep = Literal["last", "best"]
Targets = bool | Literal["random", "least-likely"] | Callable[[Tensor, Tensor], Tensor]
KEEPS = get_args(Keep)
TARGETS = (False, True, "random", "least-likely")


@dataclass(frozen=True)
class PerClass:
    """A step size or radius for every class: ``values`` ``[K]``, of which a sample gets that of its label."""

    values: Tensor

    def __post_init__(self) -> None:
        check.floating(self.values, "values")
        if self.values.dim() != 1:
            raise ValueError(f"values must be [K], got {check.shape(self.values)}")


Size = float | Tensor | PerClass
"""In units of the images: a number, ``[N]`` (one per sample), what broadcasts to the images, or :class:`PerClass`."""


class CommonOptions(TypedDict, total=False):
    """Keyword arguments of every attack, see :class:`Attack`."""

    targeted: Targets
    restarts: int
    keep: Keep
    freeze: bool
    eot: int
    bounds: tuple[float, float]
    normalization: tuple[Any, Any] | None
    seed: int
    capture: bool
    compile: bool


class Options(CommonOptions, total=False):
    """And of those whose loss can be chosen."""

    loss: str | Callable[[Tensor, Tensor], Tensor]


class Problem(NamedTuple):
    """What stays the same from step to step."""

    x: Tensor
    goal: Goal
    alpha: float | Tensor  # tensors broadcast to the points
    eps: float | Tensor
    mask: Tensor | None
    natural: Tensor | None = None  # logits of x, where the loss compares with them


class Attack:
    """An attack: ``adversarial = attack(images, labels)``.

    A subclass says where it starts (:meth:`start`), what it raises (:meth:`raised`), how it steps (:meth:`step`) and,
    where its points are no images, how they are rendered (:meth:`render`).

    Args:
        model: images to logits ``[N, K]``, a module or any function.
        alpha: step size, in units of the images; see :data:`Size`.
        eps: radius of the ball, likewise.
        steps: how many.
        loss: what is raised, one value a sample: ``"ce"``, ``"margin"``, ``"dlr"`` or a function
            ``(logits, labels) -> [N]``.
        targeted: ``True``: the labels given are the classes to reach; ``"random"``, ``"least-likely"`` (of the other
            classes), or a function ``(images, labels) -> [N]``: they are the true ones, and targets are chosen so.
        restarts: starts tried for each sample; the worst end is kept: one that reaches the goal, then by loss.
        keep: ``"last"`` point or the ``"best"``, judged likewise, which takes one forward more.
        freeze: a sample that has reached its goal moves no further. Nothing is waited for, so this saves no time.
        eot: passes whose gradients are averaged, for a model that is random in eval mode.
        bounds: lowest and highest pixel.
        normalization: ``(mean, std)`` per channel: images given and returned are normalised so, and the model takes
            them so; step, radius and bounds stay those of the pixels.
        seed: of all that is drawn; each call draws on. The global generators are neither read nor moved.
        capture: replay the loop as a CUDA graph. The images must be on a GPU, see ``docs/attacks.md``.
        compile: run the model under ``torch.compile``.

    Called with images ``[N, C, H, W]`` in ``bounds`` and labels int ``[N]``; returns new images like them, outside the
    mask bit by bit. The model is in eval mode meanwhile; the mode of every submodule, all ``.grad``, the images and
    the global generators are afterwards as before, also after an exception.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected. On a GPU only the first call looks
            whether the images are in the bounds: looking waits for the device.
        IndexError: naming the first label that is no class (CPU; on a GPU such a sample stays where it starts).
        RuntimeError: if the model gives no gradient, or ``capture`` or ``compile`` is not safe, with the reason.
    """

    operator: ClassVar[str | None] = "pgd_step"
    """The fused operator that is its step."""

    norm: ClassVar[Literal["linf", "l2"]] = "linf"
    needs_labels: ClassVar[bool] = True
    mask: Tensor | None = None
    """Broadcasts to the images; where it is 0 nothing moves."""

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        alpha: Size,
        eps: Size,
        steps: int,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "ce",
        targeted: Targets = False,
        restarts: int = 1,
        keep: Keep = "last",
        freeze: bool = False,
        eot: int = 1,
        bounds: tuple[float, float] = (0.0, 1.0),
        normalization: tuple[Any, Any] | None = None,
        seed: int = 0,
        capture: bool = False,
        compile: bool = False,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a module or a function, got {type(model).__name__}")
        for name, size in (("alpha", alpha), ("eps", eps)):
            values = size.values if isinstance(size, PerClass) else size
            if not isinstance(values, Tensor):
                check.non_negative(values, name)
            elif not (values >= 0).all():
                raise ValueError(f"{name} must be >= 0, got {values.tolist()}")
        for name, count, least in (("steps", steps, 0), ("restarts", restarts, 1), ("eot", eot, 1)):
            check.integer(count, name)
            if count < least:
                raise ValueError(f"{name} must be >= {least}, got {count}")
        if not callable(targeted):
            check.option(targeted, "targeted", TARGETS)
            targeted = targeted if isinstance(targeted, str) else bool(targeted)
        check.option(keep, "keep", KEEPS)
        check.integer(seed, "seed")
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise ValueError(f"bounds must be (lowest, highest), got {bounds!r}")

        self.model, self.alpha, self.eps, self.steps = model, alpha, eps, steps
        self.loss, self.targeted, self.restarts, self.keep, self.freeze = loss, targeted, restarts, keep, freeze
        self.eot, self.bounds = eot, (float(bounds[0]), float(bounds[1]))
        self.normalization = None if normalization is None else Normalization(*normalization)
        self.random = random.Random(seed)
        self.compile, self.graphs = compile, Graphs() if capture else None
        self.called = compiled(model) if compile else model
        self.looked = False  # whether images were found in the bounds before
        losses.chosen(loss)

    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        checked_images(images)
        if labels is not None:
            labels = checked_labels(labels, images)
        elif self.needs_labels:
            raise TypeError("labels are missing: pass int64 [N], got None")
        with hygiene.differentiating():
            x, labels = hygiene.ordinary(images), None if labels is None else hygiene.ordinary(labels)
            pixels = x if self.normalization is None else self.normalization.pixels(x, self.bounds)
            self.look(pixels)
            if not len(x):
                return x.clone()
            with (
                hygiene.evaluating(self.model),
                hygiene.without_parameters(self.model, self.compile),
                hygiene.own_randomness(self.draw(), x.device),
            ):
                adversarial = self.attack(self.problem(pixels, labels))
        if self.normalization is None:
            return adversarial
        return torch.where(adversarial == pixels, x, self.normalization.normalized(adversarial))

    # --- what a subclass may say otherwise ------------------------------------------------------------------------

    def start(self, problem: Problem, restart: int) -> Tensor:
        """Where the loop begins; not written to."""
        return problem.x

    def step(self, problem: Problem) -> Step:
        """How the loop moves; every subclass has its own."""
        raise NotImplementedError

    def raised(self, problem: Problem) -> losses.Loss:
        return losses.chosen(self.loss)

    def render(self, problem: Problem) -> Forward | None:
        """Points to images, differentiable; None where points are images."""
        return None

    def problem(self, x: Tensor, labels: Tensor | None) -> Problem:
        """What the attack is about; ``labels`` are missing only where they need not be given."""
        assert labels is not None
        alpha, eps = (resolved(size, name, labels, x) for name, size in (("alpha", self.alpha), ("eps", self.eps)))
        mask = None if self.mask is None else broadcasting(self.mask, "mask", x)
        return Problem(x, self.goal(x, labels), alpha, eps, mask)

    # --- the attack -----------------------------------------------------------------------------------------------

    def attack(self, problem: Problem) -> Tensor:
        """The worst end of all restarts, as images."""
        ends = Worst()
        for restart in range(self.restarts):
            start = self.start(problem, restart)
            found = self.graphs(self, problem, start) if self.graphs else self.climb(problem, start)
            if self.restarts == 1:
                ends.point = found[0]
            else:
                ends.see(*found)
        assert ends.point is not None
        with torch.no_grad():
            render = self.render(problem)
            return render(ends.point) if render else ends.point

    def climb(self, problem: Problem, start: Tensor) -> tuple[Tensor, ...]:
        """One restart: the point where it ends and, where they are asked for, its losses and whether it has reached."""
        objective = self.objective(problem)
        worst = Worst() if self.keep == "best" else None
        point = iterate(objective, self.step(problem), start, self.steps, worst=worst, freeze=self.freeze)
        if worst is None:
            return (point, *objective.judge(point)) if self.restarts > 1 else (point,)
        worst.see(point, *objective.judge(point))
        assert worst.point is not None
        return worst.point, worst.losses, worst.reached

    def objective(self, problem: Problem) -> Objective:
        return Objective(self.logits, self.raised(problem), problem.goal, self.render(problem), self.eot)

    def logits(self, pixels: Tensor) -> Tensor:
        return self.called(pixels if self.normalization is None else self.normalization.normalized(pixels))

    @torch.no_grad()
    def clean_logits(self, x: Tensor) -> Tensor:
        logits = self.logits(x)
        check_logits(logits, len(x))
        return logits

    def goal(self, x: Tensor, labels: Tensor) -> Goal:
        if isinstance(self.targeted, bool):
            return Goal(labels, self.targeted)
        if callable(self.targeted):
            return Goal(checked_labels(self.targeted(x, labels), x, "targets"), True)
        return Goal(self.chosen_targets(self.clean_logits(x), labels, self.targeted), True)

    def chosen_targets(self, logits: Tensor, labels: Tensor, how: str) -> Tensor:
        classes = logits.shape[-1]
        if classes < 2:
            raise ValueError(f"targeted={how!r} needs at least 2 classes, got {classes}")
        labels, _ = known(labels, classes)
        if how == "least-likely":
            return logits.scatter(-1, labels.unsqueeze(-1), torch.inf).argmin(-1)
        generator = torch.Generator(logits.device).manual_seed(self.draw())
        ahead = torch.randint(1, classes, labels.shape, generator=generator, device=logits.device)
        return (labels + ahead) % classes

    def draw(self) -> int:
        """The next seed of this attack."""
        return self.random.getrandbits(63)

    def look(self, pixels: Tensor) -> None:
        """Whether the images are in the bounds; on a GPU at the first call only."""
        if not pixels.numel() or (self.looked and not pixels.is_cpu):
            return
        lowest, highest = (value.item() for value in pixels.aminmax())
        if not (self.bounds[0] <= lowest and highest <= self.bounds[1]):
            advice = "they must be normalised as said" if self.normalization else "normalised ones need normalization="
            raise ValueError(
                f"images must be in {list(self.bounds)}, got values from {lowest:g} to {highest:g}; {advice}"
            )
        self.looked = True


def resolved(size: Size, name: str, labels: Tensor, x: Tensor) -> float | Tensor:
    """A number, or what broadcasts to ``x``: one value a sample as ``[N, 1, 1, 1]``."""
    if isinstance(size, PerClass):
        classes, valid = known(labels, len(size.values))
        size = torch.where(valid, size.values.to(x.device)[classes], 0)
    if not isinstance(size, Tensor):
        return float(size)
    size = size.detach().to(x)
    return broadcasting(per_sample(size, x) if size.shape == x.shape[:1] else size, name, x)
