"""The demo: its metrics, its timing partners and a run of seconds."""

import json

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from rich.console import Console
from typer.testing import CliRunner

from fairkernels import functional as FK
from fairkernels.app import report, speed
from fairkernels.app.cli import main
from fairkernels.app.demo import BASE, CONTROL, run_demo
from fairkernels.app.experiment import QUICK, Method, Outcome, train
from fairkernels.app.json_file import write_json
from fairkernels.app.report import Fairness, fairness
from fairkernels.compat import syfar

PNG = b"\x89PNG\r\n\x1a\n"


def judged(counts: list[list[int]]) -> Fairness:
    return fairness(Outcome(clean=torch.tensor(counts), robust=torch.tensor(counts)))


# --- metrics ------------------------------------------------------------------------------------------------------


def test_metrics_of_a_matrix_worked_out_by_hand():
    found = judged([[8, 2, 0], [0, 20, 0], [1, 1, 2]])  # rates .8 .2 0 | 0 1 0 | .25 .25 .5
    assert found.clean_accuracy == found.robust_accuracy == pytest.approx(2.3 / 3)
    assert found.worst_class_accuracy == pytest.approx(0.5)
    assert found.source_gap == pytest.approx(0.5)
    assert found.symmetry_gap == pytest.approx(sum(rate**2 / (rate + 1 / 3) for rate in (0.2, 0.25, 0.25)))
    assert found.largest_asymmetry == pytest.approx(0.25)
    assert found.largest_asymmetry_pair in {(2, 0), (2, 1)}
    assert found.target_share_gap == pytest.approx(0.45 / 0.7)


def test_a_perfect_classifier_is_fair():
    found = judged([[5, 0], [0, 7]])
    assert found.worst_class_accuracy == 1
    assert (found.source_gap, found.symmetry_gap, found.largest_asymmetry, found.target_share_gap) == (0, 0, 0, 0)


def test_a_symmetric_matrix_may_have_unequal_accuracies():
    found = judged([[9, 1, 0], [1, 8, 1], [0, 1, 9]])
    assert found.symmetry_gap == 0
    assert found.source_gap == pytest.approx(0.1)


def test_the_symmetry_floor_vanishes_with_the_number_of_images():
    counts = torch.tensor([[8, 1, 1], [3, 6, 1], [1, 1, 8]])
    floors = [report.symmetry_floor([counts * times]) for times in (1, 10, 1000)]
    assert floors == sorted(floors, reverse=True)
    assert floors[0] > 10 * floors[-1]


def test_the_choice_keeps_the_accuracy_of_the_control():
    control = [judged([[8, 2], [2, 8]])]
    candidates = {
        "fair but weak": [judged([[5, 5], [5, 5]])],
        "fair": [judged([[8, 2], [2, 8]])],
        "unfair": [judged([[10, 0], [4, 6]])],
    }
    assert report.choose(candidates, control, "symmetry_gap", 0.01) == "fair"
    del candidates["fair"], candidates["unfair"]
    assert report.choose(candidates, control, "symmetry_gap", 0.01) == "fair but weak"


def test_a_comparison_knows_which_direction_is_better():
    lower, higher = judged([[8, 2], [2, 8]]), judged([[10, 0], [2, 8]])
    better = {one.metric: one.better for one in report.compare([higher], [lower])}
    assert better["robust_accuracy"] == 1
    assert better["worst_class_accuracy"] == better["source_gap"] == better["symmetry_gap"] == 0


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "demo.json"
    write_json({"rows": [[1, 2], [3, 4]]}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"rows": float("nan")}, path)
    assert json.loads(path.read_text()) == {"rows": [[1, 2], [3, 4]]}
    assert list(tmp_path.iterdir()) == [path]


# --- training -----------------------------------------------------------------------------------------------------


def test_training_repeats_itself():
    method = Method("both", sym_weight=1.0, temperature=0.5, spec_weight=1.0)
    start = train(QUICK, BASE, 0)
    first, second, other = (train(QUICK, method, seed, start) for seed in (0, 0, 1))
    assert all((first[name] == second[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)
    assert all((start[name] != first[name]).any() for name in first)


# --- timing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [0, 2])
def test_the_timed_losses_agree(missing):
    logits = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(40) % (6 - missing)
    ours = speed.with_gradient(lambda z, y: FK.symmetry_loss(z, y, absent="zero"), logits, labels)
    for loss in (speed.eager_loss, speed.double_loop_loss, lambda z, y: syfar.symmetry_penalty(z, y, 6)):
        torch.testing.assert_close(speed.with_gradient(loss, logits, labels), ours)


def test_nothing_is_timed_that_is_wrong(monkeypatch):
    monkeypatch.setattr(speed, "double_loop_loss", lambda logits, labels: 2 * speed.eager_loss(logits, labels))
    with pytest.raises(AssertionError):
        speed.measure(16, 4, seconds=0.0)


# --- the whole ----------------------------------------------------------------------------------------------------


def test_a_quick_run_writes_everything(tmp_path):
    console = Console(record=True, width=80, force_terminal=False)
    content = run_demo(tmp_path, seeds=2, quick=True, console=console)

    assert {path.name for path in tmp_path.iterdir()} == {"demo.json", "confusion.png", "speed.png"}
    assert json.loads((tmp_path / "demo.json").read_text()) == json.loads(json.dumps(content))
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in ("confusion.png", "speed.png"))

    methods = list(content["test"])
    assert methods[:2] == [BASE.name, CONTROL.name]
    assert len(methods) == 5
    images = content["images"]["test"]
    for found in content["test"].values():
        assert set(found["mean"]) == set(found["std"]) == set(report.HEADINGS)
        assert [torch.tensor(seed["robust_confusion"]).sum() for seed in found["seeds"]] == [images] * 2
    assert content["machine"]["processor"]

    printed = console.export_text()
    for heading in report.HEADINGS.values():
        assert heading in printed
    assert "…" not in printed
    for implementation in speed.implementations():
        assert implementation in printed


def test_the_command_runs_with_one_seed(tmp_path):
    result = CliRunner().invoke(main, ["demo", "--quick", "--seeds", "1", "--output", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "new" / "demo.json").read_text())
    assert content["test"][CONTROL.name]["std"]["robust_accuracy"] is None


def test_no_seeds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        run_demo(tmp_path, seeds=0)
