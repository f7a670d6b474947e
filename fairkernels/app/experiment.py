"""The experiment of the demo: training and evaluation of one model.

A trained model is passed around as plain arrays (``Weights``), so that a process pool can carry it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairkernels import functional as FK
from fairkernels.app.data import Images, digits
from fairkernels.app.models import digits_cnn
from fairkernels.attacks import PGD
from fairkernels.attacks.hygiene import evaluating

Weights = dict[str, np.ndarray]

load_data = cache(digits)


@dataclass(frozen=True)
class Settings:
    """All there is to choose, the same for every method; chosen on the training and validation data."""

    radius: float = 0.2  # l-infinity, pixels in [0, 1]
    train_steps: int = 7  # of PGD, of size radius / 3
    test_steps: int = 20  # of size radius / 4
    epochs: int = 80  # of adversarial training
    tune_epochs: int = 15  # of every method that starts from it
    batch: int = 128
    learning_rate: float = 0.01
    tune_learning_rate: float = 0.005
    clean_weight: float = 0.1
    weights: tuple[float, ...] = (0.3, 1.0, 3.0)  # tried for λ and for the spectral weight
    temperature: float = 0.5  # of the sharpened Sy-FAR
    tolerance: float = 0.01  # robust accuracy that fairness may cost on validation


QUICK = Settings(train_steps=2, test_steps=2, epochs=2, tune_epochs=1, weights=(1.0,))
"""Shows that everything runs; its numbers mean nothing."""


@dataclass(frozen=True)
class Method:
    """What is added to the cross-entropy of the adversarial images; nothing in adversarial training."""

    name: str
    sym_weight: float = 0.0
    temperature: float = 1.0
    spec_weight: float = 0.0

    def penalty(self, logits: Tensor, labels: Tensor) -> Tensor:
        penalty = logits.new_zeros(())
        if self.sym_weight:
            penalty = penalty + self.sym_weight * FK.symmetry_loss(logits, labels, temperature=self.temperature)
        if self.spec_weight:
            penalty = penalty + self.spec_weight * FK.spectral_loss(logits, labels, surrogate="kl")
        return penalty


@contextmanager
def one_thread() -> Iterator[None]:
    """More of them would only wait for each other on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- training -----------------------------------------------------------------------------------------------------


@one_thread()
def train(settings: Settings, method: Method, seed: int, start: Weights | None = None) -> Weights:
    """Adversarial training from scratch, or of ``start`` with the method's penalty.

    The loss is ``clean_weight * CE(clean) + CE(adversarial) + penalty(adversarial)`` as in Sy-FAR (arXiv 2509.12939,
    Eq. 4). Methods with the same seed see the same batches and the same starts of the attack.
    """
    torch.manual_seed(seed)
    model = digits_cnn() if start is None else restore(start)
    epochs = settings.epochs if start is None else settings.tune_epochs
    rate = settings.learning_rate if start is None else settings.tune_learning_rate

    batches = list(shuffled(len(load_data().train), settings.batch, epochs, seed))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(batches))
    attack = PGD(model, settings.radius, settings.radius / 3, settings.train_steps, seed=seed)
    for rows in batches:
        images, labels = load_data().train[rows]
        adversarial = attack(images, labels)
        clean_logits, logits = model(torch.cat([images, adversarial])).chunk(2)
        loss = settings.clean_weight * F.cross_entropy(clean_logits, labels)
        loss = loss + F.cross_entropy(logits, labels) + method.penalty(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: value.numpy() for name, value in model.state_dict().items()}


def shuffled(size: int, batch: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Rows of every batch of every epoch; what does not fill a batch waits for another epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(size, generator=generator)
        yield from order[: size // batch * batch].split(batch)


def restore(weights: Weights) -> nn.Module:
    model = digits_cnn()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model


# --- evaluation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Confusion counts ``[K, K]`` on clean and on attacked images, rows the true class."""

    clean: Tensor
    robust: Tensor


@one_thread()
def evaluate(settings: Settings, weights: Weights, part: str) -> Outcome:
    """The model against PGD on ``"validation"`` or ``"test"``; one random start, the same for every model."""
    data: Images = getattr(load_data(), part)
    model = restore(weights)
    attack = PGD(model, settings.radius, settings.radius / 4, settings.test_steps, seed=0)
    adversarial = attack(data.images, data.labels)
    return Outcome(confusion(model, data.images, data.labels), confusion(model, adversarial, data.labels))


def confusion(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad(), evaluating(model):
        logits = model(images)
    return FK.confusion_counts(logits.argmax(-1), labels, num_classes=logits.shape[-1])
