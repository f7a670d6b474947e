"""PNG files of the demo. Figures are made without pyplot: nothing global is touched, no display is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from fairkernels.app.speed import Time

LEGIBLE = 0.015
"""Rates below this are drawn but not written out."""


def save_confusions(matrices: Mapping[str, np.ndarray], title: str, path: Path) -> None:
    """One heat map ``[K, K]`` of rates per method, off the diagonal; and the diagonals, class by class."""
    columns = 3
    rows = -(-(len(matrices) + 1) // columns)
    figure = Figure(figsize=(15, 4.7 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    figure.subplots_adjust(left=0.04, right=0.92, top=1 - 0.18 / rows, bottom=0.12 / rows, hspace=0.25, wspace=0.15)
    highest = max(float((matrix - np.diag(matrix.diagonal())).max()) for matrix in matrices.values())

    for axis, (name, matrix) in zip(axes, matrices.items(), strict=False):
        image = heat_map(axis, matrix, highest)
        axis.set_title(name)
    accuracies(axes[len(matrices)], matrices)
    for axis in axes[len(matrices) + 1 :]:
        axis.set_axis_off()
    bar = figure.colorbar(image, cax=figure.add_axes((0.94, 0.25, 0.012, 0.5)))
    bar.set_label("share of the true class, %")
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def heat_map(axis: Axes, matrix: np.ndarray, highest: float) -> AxesImage:
    """Confusions as colour and percent; the accuracies stand on the empty diagonal."""
    classes = len(matrix)
    wrong = np.ma.masked_where(np.eye(classes, dtype=bool), matrix)
    image = axis.imshow(100 * wrong, cmap="Reds", vmin=0, vmax=100 * highest)
    for true in range(classes):
        for predicted in range(classes):
            rate = matrix[true, predicted]
            if true == predicted:
                axis.text(predicted, true, f"{100 * rate:.0f}", ha="center", va="center", color="grey", fontsize=7)
            elif rate >= LEGIBLE:
                colour = "white" if rate > 0.6 * highest else "black"
                axis.text(predicted, true, f"{100 * rate:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axis.set(xlabel="predicted digit", ylabel="true digit", xticks=range(classes), yticks=range(classes))
    return image


def accuracies(axis: Axes, matrices: Mapping[str, np.ndarray]) -> None:
    """Accuracy of every class, the methods side by side."""
    classes = len(next(iter(matrices.values())))
    width = 0.8 / len(matrices)
    for place, (name, matrix) in enumerate(matrices.items()):
        offset = (place - (len(matrices) - 1) / 2) * width
        axis.bar(np.arange(classes) + offset, 100 * matrix.diagonal(), width, label=name)
    axis.set(xlabel="true digit", ylabel="robust accuracy, %", xticks=range(classes), yticks=range(0, 101, 20))
    axis.set_title("robust accuracy per class")
    axis.set_ylim(0, 135)  # room for the legend
    axis.set_box_aspect(1)
    axis.legend(fontsize=8, loc="upper center", ncols=2)


def save_speed(times: Sequence[Time], machine: str, path: Path) -> None:
    """Bars of the median times, one panel per problem size, on a logarithmic axis."""
    shapes = list(dict.fromkeys((time.batch, time.classes) for time in times))
    figure = Figure(figsize=(5.6 * len(shapes) + 1, 3.4), layout="constrained")
    axes = figure.subplots(1, len(shapes), squeeze=False, sharex=True, sharey=True)[0]
    for axis, (batch, classes) in zip(axes, shapes, strict=True):
        shown = [time for time in times if (time.batch, time.classes) == (batch, classes)]
        colours = ["tab:red", *["tab:grey"] * (len(shown) - 1)]
        bars = axis.barh([time.name for time in shown], [time.microseconds for time in shown], color=colours)
        axis.bar_label(bars, [str(time) for time in shown], padding=4, fontsize=9)
        axis.set(xscale="log", xlabel="median time, µs", title=f"batch {batch}, {classes} classes")
        axis.spines[["top", "right"]].set_visible(False)
    longest = max(time.microseconds for time in times)
    axes[0].set_xlim(10, 6 * longest)
    axes[0].invert_yaxis()
    figure.suptitle(f"Symmetry loss, forward + backward, float32 — {machine}")
    figure.savefig(path, dpi=110)
