"""make gpu, as far as it goes without a GPU: the driver, its file, and what it does when something breaks down."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fairkernels.app import bench_gpu, bench_measure
from fairkernels.app.bench_rivals import EAGER

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"

WITHOUT = """
import sys

class Without:
    packages = "rich typer hypothesis torchmetrics sklearn scipy matplotlib cvxpy xdist expecttest".split()

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.packages else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


@pytest.fixture
def python(tmp_path):
    """Runs Python where packages are missing that a machine with a GPU may lack, in this process and its children."""
    folder = tmp_path / "python"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WITHOUT)

    def run(*command, **more):
        environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", **more}
        words = [sys.executable, *map(str, command)]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)

    return run


@pytest.fixture
def gpu(monkeypatch):
    """The driver."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


@pytest.fixture
def run(gpu, tmp_path):
    return gpu.Run(dry=True, folder=tmp_path, end=time.time() + 60)


# --- the whole ----------------------------------------------------------------------------------------------------


def test_a_dry_run_needs_little_and_writes_the_whole_file(python, gpu, tmp_path):
    done = python("benchmarks/gpu.py", "--dry-run", OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr

    (path,) = (tmp_path / "out").glob("*.json")
    content = json.loads(path.read_text())
    steps = content["steps"]
    assert path.name == f"dry-run-gpu-{content['date']}.json"
    assert content["ok"]
    assert "mean nothing" in content["what"]
    assert list(steps) == [step.name for step in gpu.STEPS]
    for step in steps.values():
        assert step["status"] in ("ok", "skipped")
        assert step["status"] == "ok" or step.get("reason") or "memcheck" in step
        assert step["seconds"] >= 0
    for name in ("suite", "gpu"):
        assert steps[name]["passed"] == steps[name]["collected"] > 0
    assert {run["operator"] for run in steps["selftest"]["runs"]} == {"pgd_step", "symmetry_gap"}
    assert steps["sanitizers"]["calls"] > 100
    assert steps["sanitizers"]["memcheck"] == {"status": "skipped", "reason": "no GPU"}
    for cell in steps["bench"]["cells"]:
        assert cell["found"]["native"]["microseconds"] > 0 or "left out" in cell["found"]["native"]
        assert cell["found"][EAGER]["microseconds"] > 0
        assert cell["bytes"] > 0
    assert [goal["backend"] for goal in content["goals"]] == [*bench_gpu.OURS] * len(bench_gpu.GOALS)
    assert all(goal["goal"] in done.stdout for goal in content["goals"])


def test_all_tests_are_collected_where_packages_are_missing(python):
    assert "No module named 'rich'" in python("-c", "import rich").stderr
    command = ["-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    done = python(*command, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0, done.stdout[-2000:]


# --- steps and their limits ---------------------------------------------------------------------------------------


def test_a_step_that_breaks_down_stays_alone(gpu, run):
    def broken(*_):
        raise RuntimeError("no such thing")

    found = gpu.take(run, gpu.Step("broken", broken, 1, 5), [])
    assert (found["status"], found["reason"]) == ("failed", "RuntimeError: no such thing")


def test_time_is_kept_for_what_comes_later(gpu, run):
    given = []
    step = gpu.Step("greedy", lambda _, until: given.append(until - time.time()) or {"status": "ok"}, 10, 1000)
    gpu.take(run, step, [gpu.Step("later", None, 40, 50)])
    assert given[0] == pytest.approx(20, abs=2)
    found = gpu.take(run, step, [gpu.Step("later", None, 58, 60)])
    assert (found["status"], found["reason"]) == ("skipped", "no time was left")


CHILD = "import time\nwhile True: print('alive', flush=True); time.sleep(0.02)"
PARENT = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {CHILD!r}])"


def test_a_process_is_ended_at_its_limit_with_all_it_has_started(gpu, tmp_path):
    log = tmp_path / "log"
    process = gpu.start([sys.executable, "-c", PARENT], log, os.environ)
    while not log.read_text():
        time.sleep(0.05)
    assert not gpu.wait(process, time.time())
    said = log.read_text()
    time.sleep(0.3)
    assert log.read_text() == said


# --- tests in several processes -----------------------------------------------------------------------------------

ODD_TESTS = """
import os, pytest

@pytest.mark.parametrize("n", range(6))
def test_good(n):
    pass

def test_bad():
    assert 1 == 2, "numbers differ"

def test_absent():
    pytest.skip("not here")

@pytest.mark.parametrize("how", ["crashes", "again"])
def test_process(how):
    os._exit(42)
"""


@pytest.mark.slow
def test_every_outcome_is_known_though_processes_break_down(gpu, run, tmp_path):
    (tmp_path / "test_odd.py").write_text(ODD_TESTS)
    run.end = time.time() + 100
    found = gpu.run_tests(run, "odd", run.end, 2, str(tmp_path / "test_odd.py"), "-c", os.devnull)
    assert (found["collected"], found["passed"], found["skipped"], found["not_run"]) == (10, 6, 1, 0)
    assert found["skip_reasons"] == {"not here": 1}
    messages = " ".join(found["failures"])
    assert found["failed"] == len(found["failures"]) == 3
    assert "numbers differ" in messages
    assert messages.count("the process ended, or was ended, in it") == 2


def test_what_did_not_begin_before_the_deadline_is_counted(gpu):
    lines = [{"collected": 5}, {"began": "a"}, {"test": "a", "outcome": "passed", "why": "", "seconds": 0.1}]
    found = gpu.summed(lines)
    assert (found["passed"], found["not_run"], found["status"]) == (1, 4, "ok")


def test_a_test_in_which_the_time_was_over_did_not_run(gpu, tmp_path):
    lines = [{"collected": 3}, {"began": "a"}, {"test": "a", "outcome": "passed", "why": ""}, {"began": "b"}]
    (tmp_path / "outcomes").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"began": "b')
    gpu.note(tmp_path / "outcomes", cut=gpu.began(tmp_path / "outcomes")[-1:])
    found = gpu.summed(gpu.lines_of(tmp_path / "outcomes"))
    assert (found["passed"], found["failed"], found["not_run"]) == (1, 0, 2)


def test_no_test_at_all_is_a_failure(gpu):
    assert gpu.summed([])["status"] == "failed"


# --- sanitizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "code", "ended", "status"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, True, "ok"),
        (
            "========= Invalid read\n=========     at fairkernels::f()\n========= ERROR SUMMARY: 1 error",
            9,
            True,
            "failed",
        ),
        ("========= Invalid read\n=========     at at::native::g()\n========= ERROR SUMMARY: 1 error", 9, True, "ok"),
        ("========= ERROR SUMMARY: 0 errors", 1, True, "failed"),
        ("========= Error: Device not supported", 1, True, "skipped"),
        ("========= COMPUTE-SANITIZER", 0, False, "cut short"),
        ("Traceback", 1, True, "failed"),
    ],
)
def test_what_a_sanitizer_says_is_understood(gpu, tmp_path, said, code, ended, status):
    (tmp_path / "log").write_text(said)
    assert gpu.sanitized(tmp_path / "log", SimpleNamespace(returncode=code), ended)["status"] == status


# --- timing on a GPU ----------------------------------------------------------------------------------------------


class Event:
    """Of a GPU on which every call takes three milliseconds."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    synchronize = record

    def elapsed_time(self, other):
        return 3.0


@pytest.fixture
def a_gpu(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("wait"))
    monkeypatch.setattr(bench_measure, "Flush", lambda: lambda: order.append("flush"))
    return order


def test_calls_on_a_gpu_take_turns_with_a_cold_cache(a_gpu):
    calls = {name: (lambda name=name: a_gpu.append(name)) for name in "ab"}
    rounds = dict.fromkeys(calls, 2)
    found = bench_measure.cold_seconds(calls, dict.fromkeys(calls, 0.0), rounds)
    assert a_gpu == ["flush", "wait", "a", "flush", "wait", "b"] * 2
    assert found == {"a": [0.003] * 2, "b": [0.003] * 2}


def test_a_call_on_a_gpu_that_takes_longer_than_its_budget_is_made_twice(a_gpu):
    calls = {"short": lambda: a_gpu.append("short"), "long": lambda: time.sleep(0.02) or a_gpu.append("long")}
    found = bench_measure.on_gpu(calls, budget=0.01)
    assert a_gpu.count("long") == 2
    assert found["long"].rounds == 1
    assert found["short"].rounds >= bench_measure.GPU_LEAST
    assert found["short"].cold == 0.003


def test_a_wrong_result_is_not_timed_and_a_failure():
    from fairkernels.app.bench_cases import CASES
    from fairkernels.app.bench_gpu import ours

    case = next(case for case in CASES if case.operator == "symmetry_loss")
    right = ours("native" if not ours("native", case.operator).why_not(None) else "reference", case.operator)
    wrong = bench_gpu.replace(right, prepare=lambda *given: lambda: 1.01 * right.prepare(*given)())
    run = bench_gpu.GpuBench("cpu", time.time() + 60, copy=1e9)
    (problem,) = bench_gpu.logits((8, 4))
    cells = list(run.cells(case, problem, {"native": wrong, EAGER: case.rivals[EAGER]}))
    assert cells[0]["found"]["native"].startswith("WRONG: native, symmetry_loss")
    assert cells[0]["found"][EAGER]["microseconds"] > 0
    assert len(bench_gpu.failures(cells)) == 1


def test_cells_of_the_compiler_join_the_others():
    head = {"operator": "f", "variant": "", "kind": "k", "sizes": {"B": 2}, "pass": "forward"}
    timed = {"microseconds": 2.0, "wall_microseconds": 3.0, "gigabytes_per_second": 1.0, "share_of_copy": 0.5}
    timed |= {"launches": 1}
    cells = [{**head, "bytes": 8, "found": {"native": timed, EAGER: {**timed, "microseconds": 8.0}}}]
    cells += [{**head, "found": {"torch.compile": "left out: no time was left"}}]
    (cell,) = bench_gpu.merged(cells)
    assert list(cell["found"]) == ["native", EAGER, "torch.compile"]
    assert "0.25 native" in bench_gpu.table([cell])


def test_operators_of_the_benchmark_are_those_of_the_table():
    from fairkernels.ops.schema import OPERATORS

    assert bench_gpu.PROBLEMS.keys() == OPERATORS.keys()


# --- goals --------------------------------------------------------------------------------------------------------


def measured(goal, **times):
    """The cells of a goal; microseconds and share of the copy of an implementation, or why it was not timed."""
    found = {
        name: time if isinstance(time, str) else {"microseconds": 100 * time, "share_of_copy": time}
        for name, time in {**times, "F.cross_entropy": 1.0}.items()
    }
    return [
        {**bench_gpu.head(case, problem), "pass": goal.timed, "found": found}
        for case in bench_gpu.CASES
        for problem in goal.problems
        if case.operator == goal.operator and case.variant in goal.variants
    ]


@pytest.mark.parametrize(("goal", "good", "bad"), list(zip(bench_gpu.GOALS, (0.9, 0.95), (1.5, 0.8), strict=True)))
def test_a_goal_is_reached_where_its_worst_cell_reaches_it(goal, good, bad):
    cells = measured(goal, native=good, triton="left out: no time was left")
    native, triton = (bench_gpu.verdict(goal, backend, cells) for backend in bench_gpu.OURS)
    assert (native["verdict"], native["worst"], native["measured"]) == ("reached", good, native["asked"])
    assert (triton["verdict"], triton["measured"]) == ("not measured", 0)

    *others, last = cells
    assert bench_gpu.verdict(goal, "native", others)["verdict"] == "not measured"
    missed = bench_gpu.verdict(goal, "native", [*others, *measured(goal, native=bad)[-1:]])
    assert (missed["verdict"], missed["worst"]) == ("not reached", bad)
    assert missed["at"].endswith(bench_gpu.sizes_of(last))
    assert f"native: not reached, worst {bad}" in bench_gpu.told([missed])


def test_cells_that_no_goal_asks_for_do_not_count():
    goal = bench_gpu.GOALS[0]
    others = [
        {**cell, **other}
        for cell in measured(goal, native=2.0)
        for other in ({"pass": "forward"}, {"variant": "spec_weight=1"}, {"sizes": {"B": 2, "K": 2}})
    ]
    assert bench_gpu.verdict(goal, "native", others)["measured"] == 0


@pytest.mark.parametrize("goal", bench_gpu.GOALS)
def test_what_a_goal_asks_for_is_measured(goal):
    pairs = list(bench_gpu.GpuBench("cpu", 0.0).pairs())
    asked = [case for case, problem in pairs if goal.asks_for({**bench_gpu.head(case, problem), "pass": goal.timed})]
    assert len(asked) == len(goal.variants) * len(goal.problems)
    for case in asked:
        assert goal.timed in case.passes
        assert goal.figure is not bench_gpu.beside_cross_entropy or "F.cross_entropy" in case.rivals
