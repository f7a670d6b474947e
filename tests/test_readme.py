"""The figures of the README come from files, and its code runs."""

import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def test_tables_are_those_of_the_results():
    done = subprocess.run(
        [sys.executable, "benchmarks/report.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_examples_run():
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    logits, labels = torch.randn(16, 10, requires_grad=True), torch.arange(16) % 10
    names = {
        "K": 10,
        "zeros": torch.zeros(10),
        "adversarial_logits": logits,
        "logits": logits,
        "model": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)),
        "images": torch.rand(16, 3, 8, 8),
        "labels": labels,
        "x": torch.rand(2, 3, 8, 8),
        "grad": torch.randn(2, 3, 8, 8),
    }
    for example in examples:
        exec("import fairkernels\n" + example, names)
    torch.testing.assert_close(names["x_adv"].shape, names["x"].shape)


def test_every_linked_file_exists():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\((?!http)([^)]+)\)", text) + re.findall(r"`((?:fairkernels|csrc|tests)/[^`]*)`", text):
        assert (ROOT / path).exists(), path
