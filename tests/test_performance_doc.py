"""docs/performance.md explains every kernel and holds no measured figure: those stand in docs/benchmarks.md."""

import re
from pathlib import Path

import pytest

from fairkernels.ops.schema import OPERATORS

DOCS = Path(__file__).resolve().parent.parent / "docs"

MEASURED = re.compile(
    r"""\d\s*(?:[µμu]s|[mn]s|s|[KMG]i?B/s|%|times)(?!\w)  # a time, a throughput, a share, a ratio in words
      | \d\s*×(?!\s*\w)                                    # 3.5 ×; not K × K, 32 × 32
      | \d\.\d | \de[-+]?\d                                # ratios, times without a unit, errors
      | \d\s*→                                             # before → after
    """,
    re.VERBOSE,
)
"""What a measured figure looks like. What is derived or chosen (bytes and operations an element, sizes of tiles and
chunks, limits such as K ≤ 64) is a whole number without such a unit, hence decimal points and exponents are refused
altogether: a figure belongs into a file that a command wrote, its meaning into words."""


def test_no_measured_figure_is_typed_by_hand():
    text = (DOCS / "performance.md").read_text()
    assert [match[0] for match in MEASURED.finditer(text)] == []


@pytest.mark.parametrize(
    "text",
    ["8 µs", "19 ns", "1,206 ms", "107 GB/s", "0.83-0.87", "2.4 ×", "5 times", "52 %", "10%", "6e-8", "780 →", "3\ns"],
)
def test_measured_figures_are_found(text):
    assert MEASURED.search(text)


@pytest.mark.parametrize(
    "text",
    ["16 bytes an element", "9 operations", "4/3 K³", "K × K", "32 × 32 bit", "256x3x32x32", "2²⁴", "K ≤ 64"],
)
def test_derived_figures_are_allowed(text):
    assert not MEASURED.search(text)


def test_every_native_operator_has_its_section():
    sections = re.findall(r"^## (\w+)$", (DOCS / "performance.md").read_text(), re.MULTILINE)
    assert sections == [name for name, operator in OPERATORS.items() if "native" in operator.kernels]


def test_linked_benchmarks_exist():
    headings = re.findall(r"^## (.+)$", (DOCS / "benchmarks.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    linked = set(re.findall(r"\(benchmarks\.md#([^)]+)\)", (DOCS / "performance.md").read_text()))
    assert linked - anchors == set()
