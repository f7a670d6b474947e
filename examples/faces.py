"""Who is this? Attacks on a small face classifier that could be worn: eyeglasses, a face mask, a sticker.

    python examples/faces.py faces.npz --picture faces.png

``faces.npz`` holds ``images``, uint8 ``[N, H, W]`` or ``[N, H, W, 3]``, and ``labels``, int ``[N]``: faces that fill
the image, several of each person. The AT&T faces (Samaria and Harter, 1994) train in a minute on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from fairkernels import attacks


def main(
    faces: Annotated[Path, typer.Argument(exists=True, help="The .npz file.")],
    picture: Annotated[Path, typer.Option(help="What is drawn.")] = Path("faces.png"),
    epochs: Annotated[int, typer.Option(min=1)] = 40,
    steps: Annotated[int, typer.Option(min=1, help="Of every attack.")] = 50,
) -> None:
    """Train a classifier, attack it, say how often it is right, and draw who it takes some of the faces for."""
    torch.manual_seed(0)
    (train_images, train_labels), (images, labels) = load(faces)
    model = classifier(images.shape[1], int(train_labels.max()) + 1)
    train(model, train_images, train_labels, epochs)

    side = images.shape[-2] // 3
    tried = {
        "eyeglasses": attacks.EyeglassAttack(model, steps=steps),
        "face mask": attacks.FaceMaskAttack(model, steps=steps),
        "rectangle": attacks.ROA(model, size=side, stride=max(side // 4, 1), alpha=0.05, steps=steps),
    }
    report(attacks.evaluate(model, [(images, labels)], tried))
    shown = first_of_each(labels, 5)
    draw(model, tried, images[shown], labels[shown], picture)


def load(path: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images in [0, 1] and labels: 70 % to train, 30 % to attack, of every person alike."""
    with np.load(path) as file:
        pixels, names = file["images"], file["labels"]
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    images, labels = torch.from_numpy(pixels).float() / 255, torch.from_numpy(np.unique(names, return_inverse=True)[1])
    parts = train_test_split(np.arange(len(labels)), test_size=0.3, stratify=labels, random_state=0)
    train, test = ((images[rows], labels[rows]) for rows in parts)
    return train, test


def classifier(channels: int, people: int) -> nn.Module:
    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]

    return nn.Sequential(
        *block(channels, 16),
        *block(16, 32),
        *block(32, 64),
        *block(64, 64),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 16, people),
    )


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Adam on slightly moved and mirrored faces."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in track(range(epochs), "training", console=Console(stderr=True)):
        for rows in torch.randperm(len(images)).split(20):
            down, right = (int(by) for by in torch.randint(-4, 5, (2,)))
            moved = images[rows].roll((down, right), (-2, -1))
            faces = moved.flip(-1) if torch.rand(()) < 0.5 else moved
            loss = F.cross_entropy(model(faces), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def report(outcomes: dict[str, attacks.Outcome]) -> None:
    table = Table("faces with", "recognised", "fewest of a person", "seconds")
    for name, outcome in outcomes.items():
        rates = f"{outcome.accuracy:.1%}", f"{outcome.worst_class_accuracy:.1%}"
        table.add_row("nothing" if name == "clean" else name, *rates, f"{outcome.seconds:.1f}")
    Console().print(table)


def first_of_each(labels: Tensor, count: int) -> list[int]:
    return [int((labels == person).nonzero()[0]) for person in labels.unique()[:count]]


@torch.no_grad()
def draw(model: nn.Module, tried: dict[str, attacks.Attack], images: Tensor, labels: Tensor, path: Path) -> None:
    """A row for every face: clean, then for every attack which pixels it has changed and the face with them."""
    columns: list[tuple[str, Tensor, bool]] = [("clean", images, True)]
    for name, attack in tried.items():
        adversarial = attack(images, labels)
        touched = (adversarial != images).any(1, keepdim=True)
        columns += [(f"{name}: where", touched.float(), False), (name, adversarial, True)]

    figure, axes = plt.subplots(len(images), len(columns), figsize=(1.5 * len(columns), 2.0 * len(images)))
    for column, (title, shown, judged) in enumerate(columns):
        axes[0, column].set_title(title, fontsize=9, pad=16)
        found = model(shown).argmax(-1) if judged else None
        for row, image in enumerate(shown):
            face = axes[row, column]
            face.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            face.set_axis_off()
            if found is not None:
                right = found[row] == labels[row]
                said = f"person {found[row]}" if right else f"person {found[row]}, is {labels[row]}"
                face.text(
                    0.5, 1.02, said, ha="center", transform=face.transAxes, fontsize=8, color="k" if right else "r"
                )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    Console().print(f"drew {path}")


if __name__ == "__main__":
    typer.run(main)
