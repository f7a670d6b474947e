"""How much of an attack is not the model: PGD-10 of this library, torchattacks and foolbox, in one run.

    python benchmarks/attacks.py --output benchmarks/results

The share is ``1 - 10 * pass / attack``, ``pass`` a bare forward and backward down to the images. Each library is timed
between two rows of ten bare passes, of which the mean counts, so that a slow moment falls on both; the libraries take
turns in another order each round. The median share is reported with its quartiles: of a small share on a busy machine
they say what it is worth. Beside it stands what passed outside the model and autograd while the attack ran, which no
slow moment changes, but which does not see what a library has the model or autograd do in vain.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Annotated, Any
from unittest import mock

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fairkernels import attacks
from fairkernels.app import machine
from fairkernels.app.json_file import write_json

EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 10

Attack = Callable[[Tensor, Tensor], Any]


# --- models -------------------------------------------------------------------------------------------------------


def small_cnn() -> nn.Module:
    """Three convolutions for 32×32 colour images: 57 thousand weights."""

    def block(before: int, after: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    layers = [*block(3, 32, 1), *block(32, 64, 2), *block(64, 64, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Residual(nn.Module):
    """Two convolutions and a way around them (He et al., arXiv 1512.03385, Fig. 2)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.straight = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        same = stride == 1 and before == after
        around = [] if same else [nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)]
        self.around = nn.Sequential(*around)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.straight(images) + self.around(images))


def resnet18() -> nn.Module:
    """ResNet-18 for 32×32 images: the first convolution 3×3, no pooling behind it; 11 million weights."""
    widths, strides = (64, 64, 64, 128, 128, 256, 256, 512, 512), (1, 1, 2, 1, 2, 1, 2, 1)
    blocks = [Residual(*shape) for shape in zip(widths[:-1], widths[1:], strides, strict=True)]
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


MODELS = {"small CNN": small_cnn, "ResNet-18": resnet18}


# --- what is timed ------------------------------------------------------------------------------------------------


def libraries(model: nn.Module) -> dict[str, Attack]:
    """PGD-10 from a random start, of everybody who is installed."""
    found: dict[str, Attack] = {"fairkernels": attacks.PGD(model, EPS, ALPHA, STEPS)}
    if next(model.parameters()).is_cuda:
        found["fairkernels, captured"] = attacks.PGD(model, EPS, ALPHA, STEPS, capture=True)
    try:
        import torchattacks

        found["torchattacks"] = torchattacks.PGD(model, EPS, ALPHA, STEPS)
    except ImportError:
        pass
    try:
        import foolbox

        attack = foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=STEPS)
        wrapped = foolbox.PyTorchModel(model, (0, 1), device=next(model.parameters()).device)
        # run(), not the call itself: that would judge the result with one forward more
        found["foolbox"] = lambda images, labels: attack.run(wrapped, images, labels, epsilon=EPS)
    except ImportError:
        pass
    return found


def bare(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    for _ in range(STEPS):
        point = images.detach().requires_grad_()
        loss = F.cross_entropy(model(point), labels, reduction="sum")
        torch.autograd.grad(loss, point)


class Clock:
    """Seconds on the CPU, or on the GPU's stream, where nothing is waited for until they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def span(self) -> Iterator[None]:
        began = self.now()
        yield
        self.spans.append((began, self.now()))

    def seconds(self) -> float:
        if not self.cuda:
            return sum(ended - began for began, ended in self.spans)
        torch.cuda.synchronize()
        return sum(began.elapsed_time(ended) for began, ended in self.spans) / 1e3


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    clock = Clock(device)
    with clock.span():
        call()
    return clock.seconds()


@contextmanager
def passes_watched(model: nn.Module, clock: Clock) -> Iterator[None]:
    """The clock gets a span for every call of the model and of autograd."""

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with clock.span():
                return call(*args, **kwargs)

        return watched

    with (
        mock.patch.object(model, "forward", timed(model.forward)),
        mock.patch.object(torch.autograd, "grad", timed(torch.autograd.grad)),
        mock.patch.object(torch.autograd, "backward", timed(torch.autograd.backward)),
    ):
        yield


@dataclass(frozen=True)
class Share:
    """Medians over the rounds; ``seconds`` of the attack, ``passes`` of ten bare passes, ``share`` not the model's.

    ``outside`` is the share outside the model and autograd during the attack itself; None where a graph is replayed.
    """

    model: str
    batch: int
    library: str
    seconds: float
    passes: float
    share: float
    quartiles: tuple[float, float]
    outside: float | None
    rounds: int


@dataclass(frozen=True)
class Round:
    attack: float
    passes: float
    inside: float


def measure(name: str, batch: int, device: torch.device, seconds: float, most: int) -> list[Share]:
    torch.manual_seed(0)
    model = MODELS[name]().eval().to(device)
    images, labels = torch.rand(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    calls = libraries(model)
    seen: dict[str, list[Round]] = {library: [] for library in calls}

    def passes() -> float:
        return seconds_of(lambda: bare(model, images, labels), device)

    few = slice(None if device.type == "cuda" else 1)
    for attack in calls.values():  # warm; graphs are captured for their size
        attack(images[few], labels[few])
    model(images)

    turns = random.Random(0)
    began = time.perf_counter()
    before = passes()
    for number in range(most):
        if number > 0 and time.perf_counter() - began > seconds:
            break
        for library in turns.sample(list(calls), len(calls)):
            inside = Clock(device)
            with passes_watched(model, inside):
                taken = seconds_of(lambda attack=calls[library]: attack(images, labels), device)
            after = passes()
            seen[library].append(Round(taken, mean((before, after)), inside.seconds()))
            before = after
    return [summary(name, batch, library, rounds) for library, rounds in seen.items()]


def summary(model: str, batch: int, library: str, rounds: list[Round]) -> Share:
    shares = [1 - one.passes / one.attack for one in rounds]
    low, _, high = quantiles(shares, n=4, method="inclusive") if len(shares) > 1 else (shares[0],) * 3
    outside = [1 - one.inside / one.attack for one in rounds]
    return Share(
        model,
        batch,
        library,
        seconds=median(one.attack for one in rounds),
        passes=median(one.passes for one in rounds),
        share=median(shares),
        quartiles=(low, high),
        outside=median(outside) if all(one.inside for one in rounds) else None,
        rounds=len(rounds),
    )


# --- the command --------------------------------------------------------------------------------------------------


def main(
    output: Annotated[Path | None, typer.Option(help="Folder of the JSON file; none is written without.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="small CNN, ResNet-18; both by default.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="8, 128 and 512 by default.")] = None,
    seconds: Annotated[float, typer.Option(help="For each model and batch; at least one round.")] = 60.0,
    rounds: Annotated[int, typer.Option(min=1, help="At most, likewise.")] = 51,
    threads: Annotated[int, typer.Option(min=1)] = torch.get_num_threads(),
) -> None:
    """Time every library on every model and batch, print the shares, write them."""
    unknown = [name for name in model or () if name not in MODELS]
    if unknown:
        raise typer.BadParameter(f"must be one of {', '.join(MODELS)}, got {unknown[0]}", param_hint="--model")
    torch.set_num_threads(threads)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    console, found = Console(), []
    for name in model or MODELS:
        for size in batch or (8, 128, 512):
            shares = measure(name, size, device, seconds, rounds)
            found += shares
            console.print(
                f"{name}, B={size}: "
                + ", ".join(f"{one.library} {one.share:.1%}, outside {percent(one.outside)}" for one in shares)
            )

    about = machine.describe()
    console.print(shown(found, about))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        where = about["gpu"] or about["processor"]
        words = "-".join("".join(c if c.isalnum() else " " for c in where).lower().split())
        today = datetime.now(timezone.utc).date()
        content = {
            "what": f"share of PGD-{STEPS} that is not the model",
            "machine": about,
            "eps": EPS,
            "alpha": ALPHA,
            "image": [3, 32, 32],
            "shares": [asdict(share) for share in found],
        }
        path = output / f"attacks-{words}-{today}.json"
        write_json(content, path)
        console.print(f"wrote {path}")


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"


def shown(found: list[Share], about: dict[str, Any]) -> Table:
    table = Table(title=f"PGD-{STEPS}, {about['gpu'] or about['processor']}, {about['threads']} threads")
    headings = (
        "model",
        "B",
        "library",
        "attack, ms",
        "10 passes, ms",
        "not the model",
        "quartiles",
        "outside",
        "rounds",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("model", "library") else "right")
    for one in found:
        low, high = one.quartiles
        table.add_row(
            one.model,
            str(one.batch),
            one.library,
            f"{one.seconds * 1e3:.1f}",
            f"{one.passes * 1e3:.1f}",
            f"{one.share:.1%}",
            f"{low:.1%} … {high:.1%}",
            percent(one.outside),
            str(one.rounds),
        )
    return table


if __name__ == "__main__":
    typer.run(main)
