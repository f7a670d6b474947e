"""A few random calls of the compiled kernels under the sanitizers; `make fuzz` makes 20,000."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parent / "fuzz"


def load(name):
    spec = importlib.util.spec_from_file_location(f"fuzz_{name}", FUZZ / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_sanitizers_find_nothing_in_random_calls():
    reason = load("run").missing()
    if reason:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, FUZZ / "run.py", "--calls", "300", "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr + done.stdout
