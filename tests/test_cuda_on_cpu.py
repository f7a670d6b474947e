"""What stands in for a GPU finds the mistakes that it is there for; a copy of its own, compiled on the spot."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    program = tmp_path_factory.mktemp("broken") / "broken"
    folders = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda_on_cpu'}"]
    source = ROOT / "tests/broken_kernels.cpp"
    subprocess.run([COMPILER, "-std=c++17", "-O1", *folders, str(source), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("order", ["forward", "reversed", "random"])
@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("right", "2016.0"),
        ("one_thread_stays_away", "divergent barrier: not all threads come to"),
        ("one_warp_at_another_barrier", "divergent barrier: threads wait at"),
        ("half_a_warp_exchanges", "divergent exchange: not all lanes of the mask come to"),
        ("not_in_its_own_mask", "wrong lane mask: lane"),
        ("partner_outside_the_mask", "is read at"),
        ("past_the_end", "shared memory is written out of bounds, declared at"),
        ("past_the_end_of_the_launch", "the shared memory of the launch is written out of bounds"),
        ("read_before_written", "nan"),
        ("right_in_clusters", "2.0"),
        ("no_barrier_in_clusters", "nan"),
        ("one_block_stays_away", "divergent barrier: not all threads come to"),
    ],
)
def test_mistakes_are_found(broken, kernel, said, order):
    environment = {**os.environ, "FAIRKERNELS_FIBERS": order}
    done = subprocess.run([broken, kernel], capture_output=True, text=True, env=environment, check=True)
    assert said in done.stdout
