"""What only a GPU shows: graphs, streams, kernels of large problems, sizes beyond 32 bits; the same bits every time."""

import pytest
import torch
from cases import (
    DEVICE,
    KERNELS,
    ON_GPU,
    plain,
    replace_tensors,
    runs,
    samples,
    sized,
    tensors,
    values_and_gradients,
)

import fairkernels.functional as FK
from fairkernels.app import bench_gpu
from fairkernels.app.bench_cases import CASES
from fairkernels.app.bench_rivals import handed_on
from fairkernels.ops import dispatch
from fairkernels.ops.samples import Sample
from fairkernels.ops.schema import OPERATORS

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU, and FAIRKERNELS_TEST_DEVICE=cuda")
every_kernel = pytest.mark.parametrize(("name", "backend"), [pair for pair in KERNELS if pair[1] != "reference"])


@pytest.fixture
def as_usual():
    """PyTorch's own operators are as they are by default, not made deterministic."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(ON_GPU, warn_only=True)


def benchmarked(name):
    """The calls of the benchmark: the sizes that matter."""
    for case in CASES:
        if case.operator == name:
            for problem in bench_gpu.PROBLEMS[name]:
                yield case.call(problem, DEVICE)


def calls_of(name):
    yield plain(name)
    yield sized(name, 100)
    if ON_GPU:
        yield from benchmarked(name)


def assert_same_bits(actual, expected, of):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{of}: {text}")


@every_kernel
def test_twenty_calls_give_the_same_bits(name, backend, as_usual):
    for s in calls_of(name):
        first, *others = (values_and_gradients(name, backend, s) for _ in range(20))
        for other in others:
            assert_same_bits(other, first, s.name)


@needs_gpu
@pytest.mark.parametrize(("name", "backend"), [pair for pair in KERNELS if pair[1] == "native"])
def test_tensors_of_another_device_are_refused(name, backend):
    """Also below the checks of ``fairkernels.functional``: an address of the host would end what the GPU can do."""
    for s in samples(name):
        dispatch.choose_for(OPERATORS[name], s.args[0], backend)  # raises where there is no such kernel for a GPU
        args = handed_on(name, s)
        for place, arg in enumerate(args):
            if torch.is_tensor(arg) and place > 0:
                mixed = (*args[:place], arg.cpu(), *args[place + 1 :])
                with pytest.raises(RuntimeError, match="must be on the device of"):
                    dispatch.forward(OPERATORS[name], mixed, backend)


# --- graphs and streams -------------------------------------------------------------------------------------------


def captured(function):
    """A graph of what a function does on the GPU, and the results that each replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def other_input(s):
    """Of the same shapes, and as valid."""
    return replace_tensors(s, lambda t: t.detach().roll(1, 0) if t.dim() else t.detach().clone())


@needs_gpu
@every_kernel
def test_a_graph_replayed_on_other_input_gives_what_a_call_gives(name, backend, as_usual):
    for s in [*samples(name), *benchmarked(name)]:
        if not s.args[0].numel():
            continue
        memory, other = replace_tensors(s, lambda t: t.detach().clone()), other_input(s)
        graph, results = captured(lambda memory=memory: values_and_gradients(name, backend, memory))
        for place, values in zip(tensors(memory), tensors(other), strict=True):
            place.copy_(values)
        graph.replay()
        assert_same_bits(results, values_and_gradients(name, backend, other), s.name)


WHILE = 1_000_000_000
"""Cycles, half a second or more."""


@needs_gpu
@every_kernel
def test_a_call_runs_on_the_current_stream_and_waits_for_no_other(name, backend, as_usual):
    for s in (plain(name), list(benchmarked(name))[-1]):
        expected = values_and_gradients(name, backend, s)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            values_and_gradients(name, backend, s)  # its memory is there, then
        torch.cuda.synchronize()

        torch.cuda._sleep(WHILE)
        with torch.cuda.stream(stream):
            results = values_and_gradients(name, backend, s)
        stream.synchronize()
        others_are_done = torch.cuda.default_stream().query()
        torch.cuda.synchronize()
        assert not others_are_done, f"{s.name} has waited for the default stream"
        assert_same_bits(results, expected, s.name)


# --- beyond 32 bits -----------------------------------------------------------------------------------------------

MOST = 2**31
"""Elements from which an index does not fit 32 bits with a sign."""


def free_gigabytes(needed):
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < needed:
        pytest.skip(f"needs {needed} GB of memory, {free:.0f} are free")


def on(name):
    """The backends that have a kernel."""
    return [backend for backend in ("native", "triton") if runs(backend, name)]


ROWS, COLUMNS = 2**11 + 3, 2**20 + 5
SLICE = 512


def huge_images():
    assert ROWS * COLUMNS > MOST
    return torch.rand(ROWS, COLUMNS, dtype=torch.float16, device=DEVICE)


@needs_gpu
@pytest.mark.parametrize("backend", on("pgd_step"))
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_step_beyond_32_bits(norm, backend, as_usual):
    free_gigabytes(30)
    x_adv, x, grad = huge_images(), huge_images(), huge_images().sub_(0.5)
    options = {"alpha": 0.01, "eps": 0.03, "norm": norm, "backend": backend}
    moved = FK.pgd_step(x_adv, grad, x, **options)
    for rows in torch.arange(ROWS).split(SLICE):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        expected = FK.pgd_step(x_adv[part], grad[part], x[part], **options)
        torch.testing.assert_close(moved[part], expected, rtol=0, atol=0 if norm == "linf" else 1e-3)


@needs_gpu
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_start_beyond_32_bits(norm, as_usual):
    """Every backend draws the same numbers; the last ones are no repetition of the first."""
    free_gigabytes(30)
    x = torch.full((ROWS, COLUMNS), 0.5, dtype=torch.float16, device=DEVICE)
    eps = 0.25 if norm == "linf" else 100.0
    starts = [FK.random_start(x, eps=eps, norm=norm, seed=1, backend=backend) for backend in on("random_start")]
    for rows in torch.arange(ROWS).split(SLICE):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        for other in starts[1:]:
            torch.testing.assert_close(other[part], starts[0][part], rtol=0, atol=1e-3)
    for start in starts:
        first, last = ((start[row].double() - 0.5) for row in (0, -1))
        assert last.isfinite().all()
        assert float(first.std() / last.std()) == pytest.approx(1, abs=0.05)
        assert abs(torch.corrcoef(torch.stack([first, last]))[0, 1]) < 0.03


TILES = 2**11
"""A power of 2: the gradient of a mean over so many copies is that of one, divided without rounding."""


@needs_gpu
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for name in ("soft_confusion", "symmetry_loss", "spectral_loss", "fair_cross_entropy", "trades_kl")
        for backend in on(name)
    ],
)
def test_batches_beyond_32_bits(name, backend, as_usual):
    """Of a batch and of many copies of it the rates are the same."""
    free_gigabytes(40 if name == "trades_kl" else 25)
    logits = torch.randn(1536, 1024, device=DEVICE, dtype=torch.bfloat16)
    second = torch.randn_like(logits) if name == "trades_kl" else torch.arange(1536, device=DEVICE) * 7 % 1000
    assert logits.numel() * TILES > MOST

    expected = values_and_gradients(name, backend, Sample("", (logits, second)))
    tiled = [t.repeat(TILES, *[1] * (t.dim() - 1)) for t in (logits, second)]
    found = values_and_gradients(name, backend, Sample("", tuple(tiled)))
    torch.testing.assert_close(found[0], expected[0], rtol=2e-2, atol=1e-5)
    gradient, one = found[-1], expected[-1].float() / TILES
    for rows in (slice(0, 1536), slice(-1536, None)):
        torch.testing.assert_close(gradient[rows].float(), one, rtol=2e-2, atol=2e-2 * one.abs().max().item())


@needs_gpu
@pytest.mark.parametrize("backend", on("same_class_mixup"))
def test_same_class_mixup_beyond_32_bits(backend, as_usual):
    free_gigabytes(20)
    x, labels = huge_images(), torch.arange(ROWS, device=DEVICE) % 7
    mixed, partner = FK.same_class_mixup(x, labels, lam=0.25, seed=3, backend=backend)
    for row in (0, ROWS // 2, ROWS - 2, ROWS - 1):
        expected = 0.25 * x[row].float() + 0.75 * x[partner[row]].float()
        torch.testing.assert_close(mixed[row].float(), expected, rtol=0, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("backend", on("confusion_counts"))
def test_confusion_counts_beyond_32_bits(backend, as_usual):
    free_gigabytes(60)
    labels = torch.randint(10, (MOST // TILES + 1,), device=DEVICE)
    predictions = (labels + (labels > 6)) % 10
    few = FK.confusion_counts(predictions, labels, num_classes=10, backend=backend)
    found = FK.confusion_counts(predictions.repeat(TILES), labels.repeat(TILES), num_classes=10, backend=backend)
    assert torch.equal(found, few * TILES)
