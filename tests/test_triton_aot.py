"""The Triton kernels, compiled: nothing spills, nothing needs more than it did, no batch size compiles anew.

In a process of its own, without the interpreter: see ``triton_aot``.
"""

import os
import subprocess
import sys

import budget
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


def test_no_kernel_is_compiled_again_for_another_of_few_batch_sizes():
    run("--batches", "--quick")


@pytest.mark.slow
def test_no_kernel_is_compiled_again_for_another_batch_size():
    run("--batches")


def test_a_step_of_the_attack_moves_16_bytes_at_a_time():
    run("--wide")


def test_the_document_is_up_to_date():
    assert triton_aot.DOCUMENT.read_text() == triton_aot.document(budget.read("triton"))
