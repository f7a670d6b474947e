"""The package builds wherever it can, says why where it cannot, and its source archive is complete."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import cuda_aot
import pytest

import fairkernels
from fairkernels.ops import library

ROOT = Path(__file__).resolve().parent.parent
INGREDIENTS = ("setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "README.md", "csrc", "fairkernels")
COMPILED = {"_C", "_kernels"}


@pytest.fixture
def source(tmp_path):
    """A clean copy of what the package is made from."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path / "source"
    folder.mkdir()
    for name in INGREDIENTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    for left_over in [*folder.glob("fairkernels/*.so"), *folder.glob("fairkernels/_build_reason.txt")]:
        left_over.unlink()
    return folder


def run(*command, cwd, **environment):
    """Runs offline, steered by nothing but ``environment``."""
    steered = re.compile("FAIRKERNELS_|CUDA_HOME|CUDA_PATH|CXX|PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if not steered.match(name)}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=inherited | {"PIP_NO_INDEX": "1"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def build_wheel(source, **environment):
    command = ("-m", "pip", "-v", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", "dist", ".")
    return run(*command, cwd=source, **environment)


def wheel(source):
    (path,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def compiled_parts(source):
    return {Path(name).name.split(".")[0] for name in wheel(source).namelist() if name.endswith(".so")}


def build_reason(source):
    return wheel(source).read("fairkernels/_build_reason.txt").decode()


def drop_operators(source):
    """Drops the operators, so that a build takes seconds."""
    for kernel in source.glob("csrc/**/*.c*"):
        if kernel.name != "module.cpp":
            kernel.unlink()


def path_without(program):
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not Path(folder, program).exists())


def test_build_info_has_the_documented_keys():
    built = pytest.importorskip("fairkernels._C", reason="the package was installed without compiled kernels")
    info = built.build_info()
    assert set(info) == {"version", "torch_target", "compiler", "cuda_archs", "cuda_version"}
    assert info["torch_target"] == "2.10"
    assert (info["cuda_archs"] is None) == (info["cuda_version"] is None)


def test_type_information_is_shipped():
    assert (Path(fairkernels.__file__).parent / "py.typed").exists()


@pytest.mark.slow
def test_source_archive_is_complete_and_builds(source, tmp_path):
    build_sdist = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    made = run("-c", build_sdist, cwd=source)
    assert made.returncode == 0, made.stdout

    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    needed = {path.relative_to(source) for path in (source / "csrc").rglob("*") if path.is_file()}
    needed |= {Path(name) for name in ("constraints.txt", "LICENSE", "README.md", "fairkernels/py.typed")}
    assert needed <= {path.relative_to(unpacked) for path in unpacked.rglob("*")}

    built = build_wheel(unpacked, FAIRKERNELS_NATIVE="1", FAIRKERNELS_CUDA="0")
    assert built.returncode == 0, built.stdout
    assert compiled_parts(unpacked) == COMPILED
    assert "fairkernels/py.typed" in wheel(unpacked).namelist()


@pytest.mark.slow
def test_without_a_compiler_the_package_is_plain_python_until_there_is_one(source):
    drop_operators(source)
    for environment, parts in (({}, COMPILED), ({"CXX": "/nonexistent"}, set()), ({}, COMPILED)):
        built = build_wheel(source, **environment)
        assert built.returncode == 0, built.stdout
        assert compiled_parts(source) == parts
        assert ("fairkernels/_build_reason.txt" in wheel(source).namelist()) == (not parts)
        if not parts:
            assert "no C++ compiler" in build_reason(source)
            assert "/nonexistent" in build_reason(source)


@pytest.mark.slow
def test_a_compile_error_is_recorded_or_fails_the_build(source):
    drop_operators(source)
    (source / "csrc/module.cpp").write_text("this is not C++;\n")

    built = build_wheel(source)
    assert built.returncode == 0, built.stdout
    assert compiled_parts(source) == set()
    assert re.search(r"module\.cpp:1:1: error:", build_reason(source))

    demanded = build_wheel(source, FAIRKERNELS_NATIVE="1")
    assert demanded.returncode != 0
    assert "FAIRKERNELS_NATIVE=1, but the compiler failed" in demanded.stdout


@pytest.mark.slow
def test_switched_off_is_recorded(source):
    assert build_wheel(source, FAIRKERNELS_NATIVE="0").returncode == 0
    assert compiled_parts(source) == set()
    assert "FAIRKERNELS_NATIVE=0" in build_reason(source)


@pytest.mark.slow
def test_demanding_cuda_without_nvcc_fails_clearly(source):
    built = build_wheel(source, FAIRKERNELS_CUDA="1", PATH=path_without("nvcc"))
    assert built.returncode != 0
    assert "FAIRKERNELS_CUDA=1, but nvcc was not found" in built.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FAIRKERNELS_NATIVE", "FAIRKERNELS_CUDA"])
def test_a_switch_takes_three_values(source, name):
    built = build_wheel(source, **{name: "yes"})
    assert built.returncode != 0
    assert f"{name} must be auto, 0 or 1, got 'yes'" in built.stdout


@pytest.mark.parametrize(
    ("archs", "flags"),
    [
        ("80 90 100", ["compute_80,code=[sm_80]", "compute_90,code=[sm_90,sm_100,compute_90]"]),
        ("75 86", ["compute_75,code=[sm_75]", "compute_80,code=[sm_86,compute_80]"]),
        ("90 90a", ["compute_90,code=[sm_90]", "compute_90a,code=[sm_90a,compute_90a]"]),
    ],
)
def test_gpus_that_the_sources_do_not_tell_apart_share_ptx(archs, flags):
    setup = cuda_aot.setup_module()
    found = setup["arch_flags"](setup["Cuda"]("nvcc", "13.0", archs.split()))
    assert found == [f"-gencode=arch={flag}" for flag in flags]


def test_all_gpus_that_the_sources_tell_apart_are_known():
    """Others get the PTX of an older one, and would miss what is for them alone."""
    sources = [path.read_text() for path in (ROOT / "csrc").rglob("*.*")]
    told = {int(number) for text in sources for number in re.findall(r"__CUDA_ARCH__ *[<>=]+ *(\d+)", text)}
    oldest, *others = cuda_aot.setup_module()["TOLD_APART"]
    assert told == {10 * number for number in others}, f"and from {oldest} on all alike"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(("source", "said"), [(None, "too short"), ("void gone(); void f() { gone(); }", "gone")])
def test_a_library_that_does_not_load_is_a_reason(source, said, tmp_path, monkeypatch):
    path = tmp_path / "_kernels.so"
    path.touch()
    if source is not None:
        subprocess.run(["g++", "-shared", "-fPIC", "-xc++", "-", "-o", path], input=source, text=True, check=True)
    monkeypatch.setattr(library, "LIBRARY", path)
    assert re.search(f"the native library does not load: .*{said}.* this is torch", library.load())
