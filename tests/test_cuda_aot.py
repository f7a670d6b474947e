"""The CUDA kernels, compiled for GPUs that need not be there: in a process of its own, against the budget."""

import subprocess
import sys
from pathlib import Path

import budget
import cuda_aot
import pytest

PROGRAM = Path(__file__).with_name("cuda_aot.py")


@pytest.mark.slow
def test_what_kernels_need_is_within_the_budget():
    setup = cuda_aot.setup_module()
    try:
        setup["find_cuda"]()
    except setup["CannotBuild"] as reason:
        pytest.skip(str(reason))
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_document_is_up_to_date():
    assert cuda_aot.DOCUMENT.read_text() == cuda_aot.document(budget.read("cuda"))
