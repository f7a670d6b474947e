"""The Triton kernels, compiled: nothing spills, nothing needs more than it did, no batch size compiles anew.

In a process of its own, without the interpreter: see ``triton_aot``.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import triton_aot


def run(*options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, triton_aot.__file__, *options], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def test_kernels_for_float32_keep_their_budget():
    run("--quick")


@pytest.mark.slow
def test_all_kernels_keep_their_budget():
    run()


def test_no_kernel_is_compiled_again_for_another_batch_size():
    run("--batches")


def test_nothing_in_the_budget_spills():
    budget = triton_aot.written_budget()
    for name, found in budget["kernels"].items():
        for text, needs in found.items():
            assert set(needs) == {f"sm_{target}" for target in triton_aot.TARGETS}, f"{name} [{text}]"
            assert [spills for _, _, spills in needs.values()] == [0, 0, 0], f"{name} [{text}]"


def test_the_document_is_up_to_date():
    assert triton_aot.DOCUMENT.read_text() == triton_aot.document(triton_aot.written_budget())
    assert triton_aot.BUDGET.read_text() == triton_aot.as_json(json.loads(triton_aot.BUDGET.read_text()))


# --- the check itself ---------------------------------------------------------------------------------------------

KEY = ("kernel", "fp32: x", 90)
BUDGET = {"triton": __import__("triton").__version__, "kernels": {"kernel": {"fp32: x": {"sm_90": [40, 1024, 0]}}}}


@pytest.mark.parametrize(
    ("need", "complaint"),
    [
        (triton_aot.Need(40, 1024, 0), None),
        (triton_aot.Need(52, 1100, 0), None),
        (triton_aot.Need(60, 1024, 0), "takes 60 registers, its budget is 40"),
        (triton_aot.Need(40, 2048, 0), "takes 2048 bytes of shared memory, its budget is 1024"),
        (triton_aot.Need(40, 1024, 8), "spills 8 bytes"),
        (triton_aot.Need(40, 300_000, 0), "needs 300000 bytes of shared memory, there are 232448"),
        ("CompileError: no", "does not compile: CompileError: no"),
    ],
)
def test_what_exceeds_its_budget_is_found(need, complaint):
    found = list(triton_aot.complaints({KEY: need}, BUDGET))
    assert (complaint in found[0]) if complaint else not found


def test_what_is_not_in_the_budget_is_found_and_what_is_there_in_vain():
    assert "is not in the budget" in next(
        triton_aot.complaints({("other", "fp32: x", 90): triton_aot.Need(1, 1, 0)}, BUDGET)
    )
    assert "no call asks for it" in next(triton_aot.stale([], BUDGET))
