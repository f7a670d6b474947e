"""``make gpu``: builds, tests and measures everything on a machine with a GPU and without a network, in nine minutes.

Needs nothing but Python, torch, triton, nvcc, pytest and ninja; what else is missing leads to a reason. Every step has
processes and a time limit of its own and leaves the others alone. What came of them is one file, in ``$OUT`` or in
benchmarks/results, and a table. Where there is no GPU, or with ``--dry-run``, a little of everything runs on the CPU.
The settings of the GPU are never changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from fairkernels.app import bench_gpu  # noqa: E402
from fairkernels.app.json_file import write_json  # noqa: E402

MINUTES = 8.6

SUITE = (
    "test_forward.py",
    "test_gradients.py",
    "test_torch_contract.py",
    "test_triton_without_address.py",
    "test_meaning.py",
    "test_spectral.py",
)
"""Tests that run on tensors of either device."""

GPU_TESTS = ("test_gpu.py", "test_larger.py", "test_attacks_hygiene.py::test_a_captured_loop_is_the_loop")
"""Tests that need a GPU, or are for one; a dry run takes the first."""

GRACE = 15.0
"""Seconds in which a process may end by itself behind its deadline."""

HANGS = 100.0
"""Seconds for which a test may say nothing."""

MOST_FAILURES = 100

PROCESSES: list[subprocess.Popen[bytes]] = []
"""All that were started."""

OK, FAILED, SKIPPED, CUT = "ok", "failed", "skipped", "cut short"

AT_ITS_LIMIT = "it was ended at its time limit"


# --- processes ----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What all steps share."""

    dry: bool
    folder: Path
    """Of what processes write."""
    end: float
    """On the clock of time.time()."""
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def capability(self) -> str:
        return self.steps.get("machine", {}).get("capability") or "90"

    def environment(self, **more: str) -> dict[str, str]:
        """Of the package in this tree, compiled kernels and one thread, whatever the caller had in mind."""
        kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FAIRKERNELS_BACKEND")}
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(TESTS), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            **more,
        }


def start(command: Iterable[str | Path], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """In a session of its own, so that it can be ended with all that it has started."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=dict(environment),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    PROCESSES.append(process)
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_all() -> None:
    """A step leaves nothing behind, nor does who is stopped in one."""
    while PROCESSES:
        end(PROCESSES.pop())


def wait(process: subprocess.Popen[bytes], until: float) -> bool:
    """Whether it has ended by itself; if not it is ended."""
    try:
        process.wait(max(until - time.time(), 0.1))
    except subprocess.TimeoutExpired:
        end(process)
        return False
    return True


def tail(log: Path, lines: int = 20) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Of JSON; the last one may have been cut short."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def step_process(
    run: Run, step: str, until: float, *arguments: str, name: str | None = None
) -> tuple[list[dict[str, Any]], str | None]:
    """What a step of ``gpu_steps.py`` wrote, and why it did not come to its end, if it did not."""
    into, log = run.folder / f"{name or step}.jsonl", run.folder / f"{name or step}.log"
    command = [sys.executable, ROOT / "benchmarks/gpu_steps.py", step, "--into", into, *arguments]
    process = start(command, log, run.environment())
    ended = wait(process, until)
    if not ended:
        return lines_of(into), AT_ITS_LIMIT
    if process.returncode != 0:
        return lines_of(into), f"exit code {process.returncode}: " + " | ".join(tail(log, 3))
    return lines_of(into), None


# --- tests --------------------------------------------------------------------------------------------------------


def run_tests(run: Run, name: str, until: float, shares: int, *arguments: str) -> dict[str, Any]:
    """Some processes share the tests; one that breaks down or hangs is started again behind the test that did it."""
    outcomes = [run.folder / f"{name}-{number}.jsonl" for number in range(shares)]
    workers = [
        threading.Thread(target=run_share, args=(run, name, until, f"{number}/{shares}", path, arguments), daemon=True)
        for number, path in enumerate(outcomes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = summed(line for path in outcomes for line in lines_of(path))
    for path in outcomes:
        if not lines_of(path):
            found["status"] = FAILED
            found["failures"].append(f"{path.stem} has run nothing: " + " | ".join(tail(path.with_suffix(".log"), 5)))
    return found


def run_share(run: Run, name: str, until: float, share: str, outcomes: Path, arguments: tuple[str, ...]) -> None:
    environment = run.environment(
        FAIRKERNELS_SHARE=share,
        FAIRKERNELS_OUTCOMES=str(outcomes),
        FAIRKERNELS_DEADLINE=str(until - GRACE),
        FAIRKERNELS_TEST_DEVICE="cpu" if run.dry else "cuda",
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
        TORCHINDUCTOR_COMPILE_THREADS="1",
        CUBLAS_WORKSPACE_CONFIG=":4096:8",  # what PyTorch wants of it to be deterministic
    )
    options = ["-p", "outcomes", "-p", "no:cacheprovider", "-q", "--continue-on-collection-errors"]
    while time.time() < until - GRACE:
        before = began(outcomes)
        command = [sys.executable, "-m", "pytest", *options, *arguments]
        process = start(command, outcomes.with_suffix(".log"), environment)
        while process.poll() is None and time.time() < until and not hangs(outcomes):
            time.sleep(0.2)
        if process.poll() is None and time.time() >= until:
            end(process)
            note(outcomes, cut=began(outcomes)[-1:])
            return
        came_to_its_end = process.poll() is not None and 0 <= process.returncode <= 5
        end(process)
        if came_to_its_end or began(outcomes) == before:
            return


def began(outcomes: Path) -> list[str]:
    return [line["began"] for line in lines_of(outcomes) if "began" in line]


def note(outcomes: Path, **line: Any) -> None:
    with outcomes.open("a") as file:
        file.write("\n" + json.dumps(line) + "\n")


def hangs(outcomes: Path) -> bool:
    return outcomes.exists() and time.time() - outcomes.stat().st_mtime > HANGS


def summed(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Counts, failures with the first line of the error, reasons of what was skipped, what did not run: a test in which
    the time was over is no failure."""
    collected, started, outcome, reasons = 0, set(), {}, {}
    for line in lines:
        started -= {test for test in line.get("cut", ()) if test not in outcome}
        collected += line.get("collected", 0)
        if "began" in line:
            started.add(line["began"])
        if "test" in line and outcome.get(line["test"]) != FAILED:  # a test may pass and its teardown fail
            outcome[line["test"]], reasons[line["test"]] = line["outcome"], line["why"]
    for test in started - outcome.keys():
        outcome[test], reasons[test] = FAILED, "the process ended, or was ended, in it"
    failures = [f"{test}: {reasons[test][:300]}" for test, what in sorted(outcome.items()) if what == FAILED]
    counts = Counter(outcome.values())
    return {
        "status": FAILED if failures or not collected else OK,
        "collected": collected,
        "passed": counts["passed"],
        "failed": len(failures),
        "skipped": counts["skipped"],
        "not_run": collected - len(started),
        "failures": failures[:MOST_FAILURES],
        "skip_reasons": dict(Counter(reasons[t] for t, what in outcome.items() if what == "skipped").most_common(30)),
    }


# --- steps --------------------------------------------------------------------------------------------------------


def machine(run: Run, until: float) -> dict[str, Any]:
    lines, problem = step_process(run, "machine", until)
    facts = {key: value for line in lines for key, value in line.items()}
    return {"status": FAILED if problem else OK, "reason": problem, **facts}


def build(run: Run, until: float) -> dict[str, Any]:
    """The native library for this GPU alone; meanwhile Triton's kernels, on the cores that are left."""
    library, log = ROOT / "fairkernels/_kernels.so", run.folder / "build.log"
    if run.dry and library.exists():
        return {"status": SKIPPED, "reason": "it is already built"}
    began, facts = time.time(), {}
    environment = run.environment(
        FAIRKERNELS_NATIVE="1",
        FAIRKERNELS_CUDA="0" if run.dry else "1",
        FAIRKERNELS_CUDA_ARCHS=run.capability,
    )
    process = start([sys.executable, "setup.py", "build_ext", "--inplace"], log, environment)
    if not run.dry:
        facts["triton"] = triton_beside(run, process, until)
    ended = wait(process, until)
    facts["build_seconds"] = round(time.time() - began, 1)
    if not ended or process.returncode != 0:
        reason = f"exit code {process.returncode}" if ended else AT_ITS_LIMIT
        return {"status": FAILED, "reason": reason, **facts, "log": tail(log, 40)}
    return {"status": OK, **facts, "library_bytes": library.stat().st_size}


def triton_beside(run: Run, build: subprocess.Popen[bytes], until: float) -> dict[str, Any]:
    """Kernels are compiled into Triton's cache until the build is done."""
    into, log = run.folder / "triton.jsonl", run.folder / "triton.log"
    options = ["--deadline", str(until), "--processes", str(max(run.cores - 4, 1)), "--target", run.capability]
    command = [sys.executable, ROOT / "benchmarks/gpu_steps.py", "triton", "--into", into, *options]
    process = start(command, log, run.environment())
    while build.poll() is None and process.poll() is None and time.time() < until:
        time.sleep(0.2)
    if process.poll() is None:
        end(process)
    facts = {key: value for line in lines_of(into) for key, value in line.items()}
    return facts if process.returncode in (0, -signal.SIGKILL) else {**facts, "log": tail(log)}


def suite(run: Run, until: float) -> dict[str, Any]:
    files = [str(TESTS / name) for name in SUITE]
    if run.dry:
        return run_tests(run, "suite", until, 1, *files[:1], "-m", "not slow", "-k", "pgd_step and native and float32")
    return run_tests(run, "suite", until, max(run.cores - 2, 1), *files)


def gpu_tests(run: Run, until: float) -> dict[str, Any]:
    chosen = ["-k", "twenty and pgd_step"] if run.dry else ["-k", "not beyond_32_bits"]
    files = [str(TESTS / name) for name in GPU_TESTS[: 1 if run.dry else None]]
    return run_tests(run, "gpu", until, 1 if run.dry else 6, *files, *chosen)


def large(run: Run, until: float) -> dict[str, Any]:
    """One process: they need the memory for themselves."""
    if run.dry:
        return {"status": SKIPPED, "reason": "no GPU"}
    return run_tests(run, "large", until, 1, str(TESTS / "test_gpu.py"), "-k", "beyond_32_bits")


SANITIZERS = ("memcheck", "racecheck", "initcheck")


def sanitizers(run: Run, until: float) -> dict[str, Any]:
    """The smoke set under each tool, side by side, and once without, to see which kernels it reaches."""
    smoke = TESTS / "gpu_smoke.py"
    into, log = run.folder / "smoke.jsonl", run.folder / "smoke.log"
    device = "cpu" if run.dry else "cuda"
    environment = run.environment(FAIRKERNELS_TEST_DEVICE=device, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    plain = start([sys.executable, smoke, "--into", into], log, environment)
    tool = cuda_tool("compute-sanitizer")
    reason = "no GPU" if run.dry else None if tool else "there is no compute-sanitizer"
    watched = {}
    if reason is None:
        for name in SANITIZERS:
            options = ["--tool", name, "--print-limit", "200", "--error-exitcode", "9"]
            options += ["--report-api-errors", "no"] if name == "memcheck" else []
            command = [str(tool), *options, sys.executable, smoke]
            watched[name] = start(command, run.folder / f"{name}.log", environment)
    ended = wait(plain, until)
    found: dict[str, Any] = {key: value for line in lines_of(into) for key, value in line.items()}
    if not ended or plain.returncode != 0:
        found["smoke"] = {"status": FAILED, "reason": "did not come to its end", "log": tail(log)}
    for name in SANITIZERS:
        if name in watched:
            found[name] = sanitized(run.folder / f"{name}.log", watched[name], wait(watched[name], until))
        else:
            found[name] = {"status": SKIPPED, "reason": reason}
    results = [value["status"] for value in found.values() if isinstance(value, dict)]
    return {"status": next(status for status in (FAILED, CUT, OK, SKIPPED) if status in results), **found}


def cuda_tool(name: str) -> str | None:
    """On the PATH or where CUDA is."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("PATH"), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    places += [str(Path(nvcc).resolve().parent)] if nvcc else []
    return shutil.which(name, path=os.pathsep.join(filter(None, places)))


def sanitized(log: Path, process: subprocess.Popen[bytes], ended: bool) -> dict[str, Any]:
    """What a tool has found. Errors in kernels that are not ours are listed, and are not ours."""
    text = log.read_text(errors="replace")
    said = [line for line in text.splitlines() if line.startswith("=========")]
    if "Device not supported" in text:
        return {"status": SKIPPED, "reason": "the tool does not support this device", "said": said[:10]}
    ours = sum("fairkernels" in line for line in said)
    summary = next((line for line in reversed(said) if "SUMMARY" in line), None)
    if not ended or summary is None:
        status = FAILED if ours or ended else CUT
        return {"status": status, "reason": "it did not come to its end", "said": said[:60] or tail(log)}
    clean = process.returncode in (0, 9) and not ours
    return {"status": OK if clean else FAILED, "summary": summary, "lines_of_ours": ours, "said": said[:60]}


def selftest(run: Run, until: float) -> dict[str, Any]:
    only = ["--only", "pgd_step", "symmetry_gap"] if run.dry else []
    lines, problem = step_process(run, "selftest", until, "--deadline", str(until - GRACE), *only)
    wrong = [line for line in lines if not line.get("sound", True)]
    return {"status": FAILED if problem or wrong else OK, "reason": problem, "runs": lines}


def bench(run: Run, until: float) -> dict[str, Any]:
    return benchmark(run, "bench", until)


def compiler(run: Run, until: float) -> dict[str, Any]:
    """``torch.compile`` on the same cells; to be cut short is no failure, it may compile for long."""
    if run.dry:
        return {"status": SKIPPED, "reason": "no GPU"}
    found = benchmark(run, "compiler", until, "--compiler")
    return {**found, "status": CUT} if found["reason"] == AT_ITS_LIMIT and not found["failures"] else found


def benchmark(run: Run, name: str, until: float, *options: str) -> dict[str, Any]:
    deadline = ("--deadline", str(until - 2 * GRACE))
    lines, problem = step_process(run, "bench", until, *deadline, *options, name=name)
    facts, cells = lines[:1], lines[1:]
    wrong = bench_gpu.failures(cells)
    status = FAILED if problem or wrong else OK
    return {"status": status, "reason": problem, "failures": wrong, **(facts[0] if facts else {}), "cells": cells}


@dataclass(frozen=True)
class Step:
    """``least`` seconds are kept for it whatever the steps before it take, ``most`` are its limit."""

    name: str
    run: Callable[[Run, float], dict[str, Any]]
    least: float
    most: float


STEPS = (
    Step("machine", machine, 10, 60),
    Step("build", build, 60, 230),
    Step("suite", suite, 50, 180),
    Step("gpu", gpu_tests, 40, 60),
    Step("large", large, 30, 45),
    Step("sanitizers", sanitizers, 30, 90),
    Step("selftest", selftest, 30, 45),
    Step("bench", bench, 80, 150),
    Step("compiler", compiler, 45, 150),
)


def take(run: Run, step: Step, later: Iterable[Step]) -> dict[str, Any]:
    """A step within its limit; whatever goes wrong in it stays in it."""
    began = time.time()
    limit = min(step.most, run.end - began - sum(other.least for other in later))
    if limit < min(step.least, 10):
        return {"status": SKIPPED, "reason": "no time was left", "seconds": 0.0}
    try:
        found = step.run(run, began + limit)
    except Exception as error:
        found = {"status": FAILED, "reason": f"{type(error).__name__}: {error}"}
    finally:
        end_all()
    found = {key: value for key, value in found.items() if value is not None}
    return {**found, "seconds": round(time.time() - began, 1), "limit_seconds": round(limit, 1)}


# --- the result ---------------------------------------------------------------------------------------------------


def output_folder(run: Run) -> Path:
    """A dry run leaves nothing among the results."""
    return Path(os.environ.get("OUT") or ROOT / ("bench-output" if run.dry else "benchmarks/results"))


def file_name(run: Run, today: str) -> str:
    facts = run.steps.get("machine", {}).get("machine", {})
    words = re.findall(r"[a-z0-9]+", str(facts.get("gpu") or "gpu").lower())
    return f"{'dry-run' if run.dry else '-'.join(words)}-gpu-{today}.json"


def content_of(run: Run, seconds: float) -> dict[str, Any]:
    facts = run.steps.get("machine", {})
    return {
        "what": "make gpu" + (", dry run on the CPU: its figures mean nothing" if run.dry else ""),
        "date": date.today().isoformat(),
        "commit": facts.get("commit"),
        "machine": facts.get("machine"),
        "ok": all(step["status"] != FAILED for step in run.steps.values()),
        "seconds": round(seconds, 1),
        "goals": bench_gpu.verdicts(run.steps.get("bench", {}).get("cells", [])),
        "steps": run.steps,
    }


def report(content: Mapping[str, Any]) -> str:
    """Plain text, the short part last: who sees the end of it sees the most important."""
    lines = []
    for name, step in content["steps"].items():
        lines += [f"{name}: {failure}" for failure in step.get("failures", ())[:20]]
        lines += [f"{name}: {line}" for line in step.get("log", ()) if step["status"] == FAILED]
    timed = [content["steps"].get(name, {}) for name in ("bench", "compiler")]
    cells = bench_gpu.merged([cell for step in timed for cell in step.get("cells", ())])
    if cells:
        copy = timed[0].get("copy_gigabytes_per_second")
        lines += ["", f"Benchmark; a copy reaches {copy} GB/s", bench_gpu.table(cells)]
    lines += ["", "Goals, cold", bench_gpu.told(content["goals"])]
    lines += ["", f"{'step':<11} {'':<9} {'seconds':>8}"]
    for name, step in content["steps"].items():
        lines.append(f"{name:<11} {step['status']:<9} {step['seconds']:>8} {about(step)}".rstrip())
    return "\n".join(lines)


def about(step: Mapping[str, Any]) -> str:
    """A step in a few words."""
    counts = ("passed", "failed", "skipped", "not_run")
    parts = [f"{step[key]} {key.replace('_', ' ')}" for key in counts if key in step]
    parts += [f"{tool} {step[tool]['status']}" for tool in SANITIZERS if tool in step]
    parts += [str(step["reason"])[:150]] if "reason" in step else []
    return ", ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, a little of everything")
    parser.add_argument("--steps", default=",".join(step.name for step in STEPS), help="only these, by commas")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    options = parser.parse_args()
    chosen = [step for step in STEPS if step.name in options.steps.split(",")]

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(options.dry_run or not torch.cuda.is_available(), Path(folder), began + 60 * options.minutes)
        if run.dry:
            print("A dry run on the CPU: its figures mean nothing.", flush=True)
        for number, step in enumerate(chosen):
            print(f"{step.name} ...", end=" ", flush=True)
            run.steps[step.name] = take(run, step, chosen[number + 1 :])
            print(f"{run.steps[step.name]['status']}, {run.steps[step.name]['seconds']} s", flush=True)
            save(run, time.time() - began)
        if "OUT" in os.environ:
            shutil.make_archive(str(output_folder(run) / "make-gpu-logs"), "gztar", folder)
    content = content_of(run, time.time() - began)
    print(report(content))
    print(f"{content['seconds']} s, wrote {save(run, content['seconds'])}")
    return 0 if content["ok"] else 1


def save(run: Run, seconds: float) -> Path:
    """After every step: who is stopped in the next one has what came of this one."""
    folder = output_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(run, date.today().isoformat())
    write_json(content_of(run, seconds), path)
    return path


if __name__ == "__main__":
    sys.exit(main())
