"""The example on faces and the benchmark of the attacks run; the code of docs/attacks.md does."""

import importlib.util
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from attacked import batch, small_cnn

import fairkernels
from fairkernels import attacks
from fairkernels.attacks.steps import along_momentum

typer = pytest.importorskip("typer")
CliRunner = pytest.importorskip("typer.testing").CliRunner

ROOT = Path(__file__).resolve().parent.parent
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def program(monkeypatch):
    return partial(load, monkeypatch)


def load(monkeypatch, path):
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_program", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def run(module, *arguments):
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("colour", [False, True])
def test_the_example_runs_on_any_faces(program, tmp_path, colour):
    drawn = np.random.default_rng(0).integers(0, 256, (24, 30, 26, *([3] if colour else [])), dtype=np.uint8)
    np.savez(tmp_path / "faces.npz", images=drawn, labels=np.repeat([7, 3, 5], 8))
    picture = tmp_path / "faces.png"
    output = run(program("examples/faces.py"), tmp_path / "faces.npz", "--picture", picture, "--epochs=1", "--steps=2")
    assert picture.read_bytes().startswith(PNG)
    assert all(name in output for name in ("eyeglasses", "face mask", "rectangle"))


@pytest.mark.slow
def test_the_example_fools_a_classifier_that_knows_the_faces(program, tmp_path):
    faces = Path(os.environ.get("FAIRKERNELS_DATA", "")) / "orl_faces_s01_s20.npz"
    if not faces.is_file():
        pytest.skip("FAIRKERNELS_DATA names no folder with orl_faces_s01_s20.npz")
    output = run(program("examples/faces.py"), faces, "--picture", tmp_path / "faces.png", "--steps=20")
    rates = dict(re.findall(r"│ ([a-z ]+?) +│ ([\d.]+)%", output))
    assert float(rates["nothing"]) > 85
    assert all(float(rates[name]) < 60 for name in ("eyeglasses", "face mask", "rectangle"))


def test_the_benchmark_writes_what_it_measures_and_the_report_shows_it(program, monkeypatch, tmp_path, threads):
    threads(torch.get_num_threads())
    module = program("benchmarks/attacks.py")
    options = ("--model=small CNN", "--batch=2", "--seconds=60", "--rounds=3", "--threads=1")
    run(module, "--output", tmp_path, *options)
    (written,) = tmp_path.glob("attacks-*.json")
    assert not written.match("*-cores-*.json")  # by which the operators' results are found
    content = json.loads(written.read_text())
    ours = content["shares"][0]
    assert (ours["library"], ours["batch"], ours["rounds"]) == ("fairkernels", 2, 3)
    assert 0 < ours["outside"] < 1
    assert ours["seconds"] > 0
    assert content["machine"]["threads"] == 1

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = program("benchmarks/report.py")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    shown = report.attacks()
    assert all(f" {one['library']} |" in shown and f"| {one['outside']:.2%} (" in shown for one in content["shares"])
    assert content["machine"]["processor"] in shown


def test_the_code_of_the_docs_runs():
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "attacks.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    images, labels = batch()
    model = small_cnn()
    names = {"model": model, "images": images, "labels": labels, "loader": [(images, labels)]}
    names |= {"fairkernels": fairkernels, "along_momentum": along_momentum}
    for example in examples:
        exec(example, names)
    assert isinstance(names["SignMomentum"](model, steps=2), attacks.PGD)
    assert names["SignMomentum"](model, steps=2)(images, labels).shape == images.shape
