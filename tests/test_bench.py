"""The benchmark: what it measures is right, nothing is left out without a reason, its file and texts are made."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("typer")

from rich.console import Console
from typer.testing import CliRunner

from fairkernels.app import bench, bench_cases, bench_measure, bench_rivals
from fairkernels.app.bench import BOTH, COLUMNS, FORWARD, Settings, Task, WrongResult, implementations, run_bench, save
from fairkernels.app.bench_cases import CASES, OURS, Case, every_case
from fairkernels.app.bench_measure import interleaved, peak_beyond
from fairkernels.app.bench_rivals import EAGER, Problem, Rival, elements
from fairkernels.app.cli import main
from fairkernels.ops.samples import Maker
from fairkernels.ops.schema import OPERATORS

ROOT = Path(__file__).resolve().parent.parent
QUICK = Settings(threads=(1,), budget=0.0, largest=100, compile=False)

names = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def logits(rows: int, classes: int, kind: str = "normal") -> Problem:
    return Problem(kind, (("B", rows), ("K", classes)))


@pytest.fixture(scope="module")
def content():
    return run_bench(QUICK, Console(quiet=True))


# --- the grid -----------------------------------------------------------------------------------------------------


def test_every_operator_has_a_case():
    assert {case.operator for case in CASES} == OPERATORS.keys()


def test_an_operator_without_a_case_gets_a_plain_one(monkeypatch):
    monkeypatch.setattr(bench_cases, "CASES", tuple(case for case in CASES if case.operator != "trades_kl"))
    (added,) = [case for case in every_case() if case.operator == "trades_kl"]
    cells = run_bench(replace(QUICK, cases=(added,)), Console(quiet=True))["cells"]
    assert {cell["sizes"]["N"] for cell in cells} == {16}
    assert all(isinstance(cell["found"][EAGER], list) for cell in cells)


def test_the_grid_is_the_declared_one():
    problems = case_of("fair_cross_entropy").problems
    shapes = {(p["B"], p["K"]) for p in problems}
    assert shapes == {
        (b, k) for b in bench_cases.BATCHES for k in bench_cases.CLASSES if b * k <= bench_cases.MOST_LOGITS
    }
    assert len(problems) == 2 * len(shapes)
    sizes = [elements(p) for p in problems]
    assert sizes == sorted(sizes)


def test_trained_logits_are_sure_and_mostly_right():
    values, labels = bench_cases.batch(logits(8192, 10, "trained"))
    assert 0.88 < (values.argmax(1) == labels).double().mean() < 0.94
    assert values.softmax(1).amax(1).median() > 0.99


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda operator: operator.name)
def test_traffic_grows_with_the_input_and_is_no_less_than_it(operator):
    small, large = (operator.sized(Maker(), size) for size in (8, 16))
    least = [operator.traffic(*sample.args, **sample.kwargs) for sample in (small, large)]
    assert all(a < b for a, b in zip(*least, strict=True)) or least[0].backward == least[1].backward == 0
    assert least[0].forward >= small.args[0].numel() * small.args[0].element_size()
    assert (least[0].backward > 0) == bool(operator.differentiable)


# --- checks -------------------------------------------------------------------------------------------------------


@names
def test_implementations_agree(case):
    """Each computes what ours does, or says why it is not held against it."""
    for problem in [p for p in case.problems if case.why_not(p) is None and elements(p) <= 8000][:3]:
        task = Task.of(case, problem)
        for name, rival in implementations(case).items():
            if rival.warms_up or rival.why_not(problem) or (rival.python_loop and rival.work(problem) > 500):
                continue
            for which in case.passes:
                if rival.takes_part(which, case.passes):
                    error, gradient_error = task.check(name, rival, task.call(rival, which)())
                    assert (error is None) == (rival.scale or rival.other_numbers)
                    assert rival.inexact is None or error < 1e-3 or "power" in rival.inexact
                    if error is not None and which == BOTH:
                        assert gradient_error is not None


@pytest.mark.parametrize(
    "name", ["symmetry_loss", "spectral_loss", "fair_cross_entropy", "fair_cross_entropy (spec_weight=1)"]
)
def test_the_narrow_forms_are_the_reference(name):
    """They stand in for it where a K x K matrix is too large."""
    case = case_of(name)
    for problem in (logits(6, 40), logits(6, 40, "trained"), logits(40, 6)):
        task = Task.of(case, problem)
        args = tuple(bench.widen(value, torch.float64, place < 1) for place, value in enumerate(task.sample.args))
        narrow = bench.differentiating(lambda args=args: case.exact(*args), args[:1], None)()
        wide = task.exact({}).result
        torch.testing.assert_close(narrow.value, wide.value)
        torch.testing.assert_close(narrow.gradients, wide.gradients, rtol=1e-6, atol=1e-9)


def test_a_wrong_result_stops_the_run():
    for change in (lambda value: value * 1.001, lambda value: value + value.detach() * torch.nan):
        wrong = Rival(lambda name, sample, change=change: lambda: change(bench_rivals.eager(name, sample)()))
        case = replace(
            case_of("symmetry_loss"),
            problems=(logits(8, 4),),
            rivals={EAGER: Rival(bench_rivals.eager), "wrong": wrong},
        )
        with pytest.raises(WrongResult, match=r"wrong, symmetry_loss, B=8, K=4, normal"):
            run_bench(replace(QUICK, cases=(case,)), Console(quiet=True))


def test_a_wrong_gradient_stops_the_run():
    def lost(name, sample):
        forward = bench_rivals.eager(name, sample)
        return lambda: forward().detach() + 0 * sample.args[0].sum()

    case = replace(
        case_of("symmetry_loss"),
        problems=(logits(8, 4),),
        rivals={EAGER: Rival(bench_rivals.eager), "lost": Rival(lost)},
    )
    with pytest.raises(WrongResult, match="lost"):
        run_bench(replace(QUICK, cases=(case,)), Console(quiet=True))


def test_errors_are_relative_in_length_piece_by_piece():
    exact = torch.ones(3, bench.PIECE, dtype=torch.float64)
    assert bench.relative(exact.float() * 1.25, exact) == 0.25
    assert bench.relative(exact, exact.where(exact > 1, torch.nan)) == float("inf")
    assert bench.relative(exact[:2], exact) == float("inf")


def test_what_can_not_be_compiled_is_tried_once():
    tried = []

    def fails(name, sample):
        tried.append(name)
        raise RuntimeError("no such instruction")

    case = replace(
        case_of("trades_kl"), rivals={EAGER: Rival(bench_rivals.eager), "compiler": Rival(fails, warms_up=True)}
    )
    run = bench.Bench(replace(QUICK, compile=True))
    for classes in (4, 5):
        run.measure(case, logits(8, classes))
    assert tried == ["trades_kl"]
    assert {cell["found"]["compiler"] for cell in run.cells} == {"left out: RuntimeError: no such instruction"}


def test_python_loops_are_timed_on_the_fewest_threads():
    run = bench.Bench(replace(QUICK, threads=(1, 2)))
    run.measure(case_of("symmetry_loss"), logits(8, 4))
    found = {cell["threads"]: cell["found"]["double loop (Sy-FAR's way)"] for cell in run.cells if cell["pass"] == BOTH}
    assert isinstance(found[1], list)
    assert "any number of threads" in found[2]


# --- measuring ----------------------------------------------------------------------------------------------------


def test_calls_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    interleaved(calls, {"a": 0.1, "b": 0.1}, budget=0.0)
    assert order == list("ababab")


def test_a_call_too_long_for_rounds_keeps_the_time_it_took():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = interleaved(calls, {"a": 1.0, "b": 0.1}, budget=0.0)
    assert order == list("bbb")
    assert found["a"] == bench_measure.Timing(1.0, 1.0, 1)
    assert found["b"].rounds == 3
    assert found["b"].seconds == found["b"].first


def test_a_short_call_is_repeated_in_every_round_though_its_first_one_was_slow():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = interleaved(calls, {"a": 1e-3, "b": 0.1}, budget=0.0)
    assert found["a"].rounds == found["b"].rounds == 3
    blocks = "".join(order[bench_measure.WARM :]).split("b")
    assert len(blocks) == 4
    assert all(len(block) > 2 for block in blocks[:3])


def test_the_first_call_of_a_round_is_timed_by_itself(monkeypatch):
    """On a clock by which a call right behind another one takes 5 units, and one right behind itself 1."""
    clock, last = [0.0], [""]

    def call(name):
        clock[0] += 1e-4 if last[0] == name else 5e-4
        last[0] = name

    monkeypatch.setattr(bench_measure, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    calls = {name: (lambda name=name: call(name)) for name in "ab"}
    for timing in interleaved(calls, {"a": 1e-3, "b": 1e-3}, budget=0.1).values():
        assert (timing.seconds, timing.first) == (pytest.approx(1e-4), pytest.approx(5e-4))


@pytest.mark.skipif(peak_beyond(lambda: None) is None, reason="only Linux counts the peak")
def test_peak_memory_is_seen_though_it_is_given_back():
    size = 64 << 20
    assert 0.9 * size <= peak_beyond(lambda: torch.ones(size // 4).sum()) <= 1.2 * size
    assert peak_beyond(lambda: None) < size / 8


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with bench_measure.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


# --- the run ------------------------------------------------------------------------------------------------------


def test_every_cell_has_a_time_or_a_reason(content):
    assert {cell["operator"] for cell in content["cells"]} >= {"fair_cross_entropy", "spectral_norm", "kl_dro_weights"}
    for cell in content["cells"]:
        if "left_out" in cell:
            assert cell["left_out"]
            continue
        assert cell["pass"] in (FORWARD, BOTH)
        assert cell["bytes"] > 0
        assert len(cell["found"]) > 1
        for name, found in cell["found"].items():
            if isinstance(found, str):
                assert found.startswith("left out: ")
                assert len(found) > len("left out: ")
                assert name != OURS
            else:
                assert len(found) == len(COLUMNS)
                assert found[0] > 0
                assert found[COLUMNS.index("first_microseconds")] > 0


def test_what_takes_too_long_or_too_much_is_left_out_with_a_number():
    case = case_of("symmetry_loss")
    patient = bench.Bench(replace(QUICK, limit=1e-9))
    patient.measure(case, logits(8, 4))
    patient.measure(case, logits(8, 5))
    assert "would take about" in patient.cells[-1]["found"][EAGER]
    huge = replace(case.rivals[EAGER], memory=lambda _: 1e15)
    patient.measure(replace(case, rivals={**case.rivals, EAGER: huge}), logits(8, 4))
    assert patient.cells[-1]["found"][EAGER] == "left out: needs about 1000000 GB"


def test_when_the_time_is_over_the_rest_is_left_out():
    cells = run_bench(replace(QUICK, minutes=0.0), Console(quiet=True))["cells"]
    assert {cell["left_out"] for cell in cells} == {"the run had taken its 0 minutes"}
    assert {cell["operator"] for cell in cells} >= {"fair_cross_entropy", "spectral_norm", "kl_dro_weights"}


def test_what_is_not_installed_is_left_out(monkeypatch):
    reason = bench_rivals.without("no_such_package")(logits(1, 1))
    assert reason == "no_such_package is not installed"
    case = case_of("confusion_counts")
    problem = case.problems[0]
    missing = replace(case.rivals["torchmetrics"], why_not=lambda _: reason)
    run = bench.Bench(QUICK)
    run.measure(replace(case, rivals={**case.rivals, "torchmetrics": missing}), problem)
    assert run.cells[0]["found"]["torchmetrics"] == f"left out: {reason}"


def test_what_an_error_says_names_no_folder(tmp_path):
    error = RuntimeError(f"g++ {tmp_path}/main.cpp: 1/2 failed\nCommand:\ng++ {tmp_path}/main.cpp")
    assert bench.said(error) == "RuntimeError: g++ main.cpp: 1/2 failed"
    assert bench.said(KeyError()) == "KeyError: "


def test_the_file_is_written_whole(content, tmp_path):
    path = save(content, tmp_path / "new")
    assert json.loads(path.read_text()) == json.loads(json.dumps(content))
    assert path.name.endswith(f"-cores-{content['date']}.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        save({**content, "seconds": float("nan")}, tmp_path / "new")
    assert list(path.parent.iterdir()) == [path]
    assert {"machine", "commit", "settings", "copy_gigabytes_per_second"} <= content.keys()


def test_the_command_runs(tmp_path):
    result = CliRunner().invoke(main, ["bench", "--largest", "4", "--no-compile", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    assert path.name in "".join(result.output.split())


def test_chosen_operators_only(tmp_path):
    def run(*options):
        return CliRunner().invoke(main, ["bench", "--largest", "4", "--no-compile", *options])

    two = ("--operator", "trades_kl", "--operator", "spectral_loss")
    result = run(*two, "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert {cell["operator"] for cell in content["cells"]} == {"trades_kl", "spectral_loss"}
    assert content["partial"][0] == "only spectral_loss, trades_kl"
    assert path.name.startswith("partial-only-spectral_loss-trades_kl-")


def test_chosen_operators_are_written_nowhere_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["bench", "--largest", "4", "--no-compile", "--operator", "trades_kl"])
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_operator_is_refused():
    result = CliRunner().invoke(main, ["bench", "--operator", "no_such"], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert "no operator no_such" in result.output


def test_only_the_whole_grid_is_whole():
    assert Settings().partial == []
    assert Settings(minutes=0.0).partial == []  # its cells say so
    assert Settings(compile=False).partial == ["without torch.compile"]
    assert QUICK.partial == ["only inputs up to 100 elements", "without torch.compile"]


def test_a_partial_run_is_not_reported(content, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    save(content, tmp_path)
    with pytest.raises(SystemExit, match=r"partial-.*json: a partial run \(only inputs up to 100 elements; .*\)"):
        report.newest(report.BENCH_FILES)
    (path,) = tmp_path.iterdir()
    path.unlink()
    save({**content, "partial": []}, tmp_path)
    assert report.newest(report.BENCH_FILES)["cells"]


def test_a_file_without_first_calls_is_reported_without_them(content, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_report

    heading = "## The first call"
    assert heading in bench_report.document(content)
    old = json.loads(json.dumps(content))
    for cell in old["cells"]:
        cell["found"] = {name: row if isinstance(row, str) else row[:-1] for name, row in cell.get("found", {}).items()}
    old["cells"] = [cell for cell in old["cells"] if cell["found"]]
    assert heading not in bench_report.document(old)


def test_texts_and_pictures_are_made_of_a_file(content, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_report

    text = bench_report.document(content)
    for case in CASES:
        if any(elements(problem) <= QUICK.largest for problem in case.problems):
            assert f"## {bench_report.title(case.operator, case.variant)}" in text
    assert content["machine"]["processor"] in bench_report.readme_part(content)
    for draw in (bench_report.draw_roofline, bench_report.draw_scaling):
        draw(content, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_pytest_benchmark_runs_over_the_cases():
    pytest.importorskip("pytest_benchmark")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable", "-k",
         "symmetry_gap and not compile", "benchmarks"],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
