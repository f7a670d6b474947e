"""Which backend runs: by argument, scope, environment; never a silent fallback; reasons in words."""

import os
import re
import subprocess
import sys
import sysconfig

import pytest
import torch
from cases import COMPILED, KERNELS, NAMES, plain
from torch._subclasses.fake_tensor import FakeTensorMode

import fairkernels
import fairkernels.functional as FK
from fairkernels.ops import dispatch, library, triton_kernels
from fairkernels.ops.schema import OPERATORS

needs_native = pytest.mark.skipif("native" not in COMPILED, reason="the native library was not built")
compiled_triton = pytest.mark.skipif(
    triton_kernels.missing("cpu") is None, reason="interpreted, triton runs on the CPU, too"
)
LOGITS, LABELS = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])


@needs_native
def test_a_cpu_tensor_runs_native():
    assert dispatch.choose("symmetry_loss", "cpu", torch.float32, None) == "native"
    text = fairkernels.explain("symmetry_loss", LOGITS)
    assert text.startswith(
        "symmetry_loss on cpu float32: native (on cpu the first of native, reference that can run: "
        "triton runs there for tests alone, interpreted)\n"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_tensor_runs_triton_where_there_is_a_kernel(name):
    """The tensor has no data and there need be no GPU."""
    with FakeTensorMode():
        tensor = torch.empty(3, 3, dtype=OPERATORS[name].dtypes[0], device="cuda")
        text = fairkernels.explain(name, tensor)
    dtype = str(tensor.dtype).removeprefix("torch.")
    why_not = triton_kernels.missing("cuda")
    if "triton" not in OPERATORS[name].kernels:
        why_not = f"there is no triton kernel of {name} yet"
    choice = "triton" if why_not is None else "reference"
    order = "on cuda the first of triton, native, reference that can run: this order was not measured on a GPU yet"
    assert text.startswith(f"{name} on cuda {dtype}: {choice} ({order})\n")
    assert f"  triton     {'can run' if why_not is None else 'can not run: ' + why_not}\n" in text


def test_other_devices_run_the_reference():
    text = fairkernels.explain("symmetry_loss", torch.empty(3, 3, device="meta"))
    assert text.startswith(
        "symmetry_loss on meta float32: reference (on meta the first of reference that can run: "
        "there are no kernels for such tensors)\n"
    )


@compiled_triton
def test_a_forced_backend_never_falls_back():
    why_not = dispatch.can_run("triton", OPERATORS["symmetry_loss"], "cpu", torch.float32)
    with pytest.raises(RuntimeError, match=re.escape(f"'triton' was asked for symmetry_loss, but {why_not}")):
        FK.symmetry_loss(LOGITS, LABELS, backend="triton")


@compiled_triton
def test_argument_goes_before_scope_before_choice():
    with fairkernels.use_backend("triton"):
        FK.symmetry_loss(LOGITS, LABELS, backend="reference")
        with pytest.raises(RuntimeError, match="triton"):
            FK.symmetry_loss(LOGITS, LABELS)
        with fairkernels.use_backend(None):
            FK.symmetry_loss(LOGITS, LABELS)
    FK.symmetry_loss(LOGITS, LABELS)


def test_scope_ends_with_an_exception():
    with pytest.raises(KeyError), fairkernels.use_backend("triton"):
        raise KeyError
    FK.symmetry_loss(LOGITS, LABELS)


def test_scopes_of_two_threads_may_end_in_any_order():
    first, second = fairkernels.use_backend("reference"), fairkernels.use_backend("triton")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.forced_backend(None) == "triton"
    second.__exit__(None, None, None)
    assert dispatch.forced_backend(None) is None


@needs_native
@compiled_triton
def test_backward_obeys_the_scope_it_runs_in():
    leaf = LOGITS.clone().requires_grad_()
    loss = FK.symmetry_loss(leaf, LABELS)
    with fairkernels.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' was asked for"):
        loss.backward()


@pytest.mark.parametrize("wrong", ["cuda", "", 3])
def test_unknown_backend(wrong):
    message = "backend must be one of 'native', 'triton', 'reference'"
    with pytest.raises(ValueError, match=message), fairkernels.use_backend(wrong):
        pass


def test_unknown_backend_of_a_call():
    for wrong in ("cuda", "", 0):
        with pytest.raises(ValueError, match="backend must be one of"):
            FK.symmetry_loss(LOGITS, LABELS, backend=wrong)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_environment_forces_a_backend():
    code = "import fairkernels; print(fairkernels.explain('symmetry_loss'))"
    done = run_python(code, FAIRKERNELS_BACKEND="reference")
    assert "symmetry_loss on cpu float32: reference (forced: reference)" in done.stdout, done.stderr


def test_environment_with_an_unknown_backend():
    code = "import torch, fairkernels.functional as FK; FK.symmetry_gap(torch.eye(3))"
    assert "backend must be one of" in run_python(code, FAIRKERNELS_BACKEND="cuda").stderr


@pytest.mark.parametrize("name", NAMES)
def test_explain_names_every_backend(name):
    s = plain(name)
    text = fairkernels.explain(name, *s.args)
    assert all(backend in text for backend in dispatch.BACKENDS)
    assert fairkernels.explain(getattr(FK, name), *s.args) == text


@compiled_triton
def test_explain_of_a_forced_backend_that_can_not_run():
    with fairkernels.use_backend("triton"):
        assert "nothing: backend 'triton' was asked for" in fairkernels.explain("symmetry_gap")


def test_explain_takes_tensors():
    with pytest.raises(TypeError, match=r"tensors must be a torch.Tensor, got int"):
        fairkernels.explain("pgd_step", 3)
    assert "symmetry_loss on cpu int64: reference" in fairkernels.explain("symmetry_loss", LABELS)


def test_explain_of_an_unknown_operator():
    with pytest.raises(ValueError, match=r"op must be one of soft_confusion, .* got 'softmax'"):
        fairkernels.explain("softmax")


def test_unsupported_device_has_a_reason():
    reason = dispatch.can_run("native", OPERATORS["symmetry_gap"], "meta", torch.float32)
    assert reason is not None


def test_a_missing_library_has_a_reason_and_the_reference_runs(tmp_path):
    """As after an install without a compiler."""
    code = (
        "import fairkernels.ops.library as library, torch\n"
        "import fairkernels.ops.dispatch as dispatch\n"
        "library.MISSING = 'the native library was not built: no compiler'\n"
        "dispatch.choose.cache_clear()\n"
        "import fairkernels, fairkernels.functional as FK\n"
        "print(FK.symmetry_gap(torch.rand(3, 3)))\n"
        "print(fairkernels.explain('symmetry_gap'))\n"
    )
    done = run_python(code)
    assert "can not run: the native library was not built: no compiler" in done.stdout, done.stderr
    assert "symmetry_gap on cpu float32: reference" in done.stdout


@pytest.mark.parametrize(("name", "backend"), KERNELS)
def test_everything_declared_in_the_table(name, backend):
    operator = OPERATORS[name]
    assert operator.reference is not None
    assert getattr(FK, name).__doc__
    assert len(list(operator.samples(dispatch_maker()))) > 0


def dispatch_maker():
    from fairkernels.ops.samples import Maker

    return Maker()


@needs_native
@pytest.mark.parametrize("name", [name for name in NAMES if "native" in OPERATORS[name].kernels])
def test_native_schema_is_the_public_one(name):
    """The private op takes what the public one takes, in the same order."""
    public = OPERATORS[name].schema
    private = getattr(torch.ops.fairkernels, f"_{name}_native").default._schema
    names = [argument.name for argument in public.arguments] + ["out"] * OPERATORS[name].writes_into
    assert [argument.name for argument in private.arguments] == names


def test_without_triton_there_is_a_reason_and_all_else_runs(tmp_path):
    """As after an install without the extra: nothing imports it."""
    (tmp_path / "triton.py").write_text("raise ImportError('not installed')\n")
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import fairkernels, fairkernels.functional as FK, torch\n"
        "print(FK.symmetry_gap(torch.rand(3, 3)))\n"
        "print(fairkernels.ops.triton_kernels.missing('cuda'))\n"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = run_python(code, PYTHONPATH=path, TRITON_INTERPRET="")
    assert "triton is not installed" in done.stdout, done.stderr


def test_gpus_that_the_triton_kernels_are_not_for_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (8, 0))[index])
    assert triton_kernels.other_gpu() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    assert "from sm_80 on, there is one of sm_75" in triton_kernels.other_gpu()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA's GPUs" in triton_kernels.other_gpu()


@pytest.mark.skipif(os.name == "nt", reason="Triton's builds for Windows bring a compiler")
def test_what_triton_starts_its_kernels_with_must_be_there(monkeypatch, tmp_path):
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    for variable in ("CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CC", "cc")
    assert triton_kernels.no_launcher() is None

    monkeypatch.setattr(sysconfig, "get_path", lambda *_: "/nowhere")
    assert "Python.h, and it is not in /nowhere" in triton_kernels.no_launcher()
    monkeypatch.setenv("CPATH", f"{os.pathsep}{tmp_path}")
    assert triton_kernels.no_launcher() is None

    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "a C compiler" in triton_kernels.no_launcher()


@pytest.mark.parametrize(
    ("archs", "device", "covered"),
    [
        *(("80 90 100", device, True) for device in ((8, 0), (8, 9), (9, 0), (10, 3), (12, 0))),
        ("80 90 100", (7, 5), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("80 100f", (10, 3), True),
        ("80 100f", (12, 0), False),
        ("80 100f", (9, 0), False),
    ],
)
def test_which_gpus_a_build_covers(archs, device, covered):
    assert library.covers(archs.split(), *device) == covered


@pytest.mark.parametrize(
    ("build", "driver", "capability", "reason"),
    [
        ({}, 13000, (9, 0), "this build has no CUDA kernels"),
        ({"cuda_archs": None}, 13000, (9, 0), "this build has no CUDA kernels"),
        ({"cuda_archs": ["90"], "cuda_version": "13.0"}, 12080, (9, 0), "the driver is of CUDA 12.8"),
        ({"cuda_archs": ["90"], "cuda_version": "13.0"}, 13000, (8, 0), "not for sm_80"),
        ({"cuda_archs": ["90"], "cuda_version": "13.0"}, 13010, (9, 0), None),
    ],
)
def test_cuda_kernels_that_can_not_run_say_why(build, driver, capability, reason, monkeypatch):
    monkeypatch.setattr(library, "build_info", lambda: build)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = library.cuda_missing.__wrapped__("pgd_step")
    assert found is None if reason is None else reason in found


def test_an_operator_without_cuda_kernels_says_so(monkeypatch):
    monkeypatch.setattr(library, "build_info", lambda: {"cuda_archs": ["90"], "cuda_version": "13.0"})
    assert "no CUDA kernel of trades_kl yet" in library.cuda_missing.__wrapped__("trades_kl")
