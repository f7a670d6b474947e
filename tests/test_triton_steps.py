"""Triton kernels of attacks and of mixing: what ordinary samples are too small for, and how often they launch."""

import itertools

import pytest
import torch
from cases import COMPILED
from tolerance import assert_no_worse

import fairkernels.functional as FK
from fairkernels.ops.reference._philox import LOW32
from fairkernels.ops.reference._philox import philox as reference_words

pytestmark = pytest.mark.skipif("triton" not in COMPILED, reason="needs a GPU or the interpreter")

if "triton" in COMPILED:
    import triton
    import triton.language as tl

    from fairkernels.ops.triton_kernels import elementwise, pgd_step, philox, random_start, same_class_mixup
    from fairkernels.ops.triton_kernels.launch import recorded

    @triton.jit
    def draw(out, first: tl.int64, seed: tl.int64, STREAM: tl.constexpr):
        a, b, c, d = philox.words(first + tl.arange(0, 16), STREAM, seed)
        tl.store(out + tl.arange(0, 64), philox.in_order(a, b, c, d).to(tl.int64))


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def attack_point(*shape, dtype=torch.float64):
    x = torch.rand(*shape, dtype=torch.float64)
    wide = x + 0.03 * torch.randn(*shape, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64), x
    return tuple(images.to(dtype) for images in wide)


def on_both(function, *args, **kwargs):
    return (function(*args, **kwargs, backend=backend) for backend in ("triton", "reference"))


# --- pgd_step -----------------------------------------------------------------------------------------------------


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "samples last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every second column": lambda t: torch.stack((t, t), -1).flatten(-2)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_with_parameters_of_every_shape(norm, layout, dtype):
    """Images of one layout or of several, blocks that are whole and blocks that are not."""
    points = [LAYOUTS[layout](images) for images in attack_point(7, 3, 13, 9, dtype=dtype)]
    mixed = [points[0], points[1].contiguous(), points[2]]
    sample, channel = torch.linspace(0.02, 0.3, 7), torch.linspace(0.05, 0.2, 3).view(1, 3, 1, 1)
    place = torch.rand(7, 1, 13, 9).round()
    cases = [
        {"alpha": 0.1, "eps": 0.2},
        {"alpha": 0.1, "eps": sample, "targeted": True},
        {"alpha": sample, "eps": sample, "bounds": (0.1 + channel / 4, 0.9 - channel / 4), "mask": place.bool()},
        {"alpha": sample, "eps": 0.2, "bounds": (0.2, 0.9 - channel / 4), "mask": place},
    ]
    for images, case in itertools.product((points, mixed), cases):
        exact = FK.pgd_step(*(t.double() for t in images), **case, norm=norm, backend="reference")
        ours, plain = on_both(FK.pgd_step, *images, **case, norm=norm)
        assert_no_worse(ours, plain, exact)
        assert ours.stride() == torch.empty_like(images[0]).stride()


@pytest.mark.parametrize(("shape", "launches"), [((2, 3, 50, 50), 1), ((2, 16384), 1), ((2, 3, 80, 70), 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("partials", [256, 4])
def test_a_long_step_of_many_elements(shape, launches, dtype, partials, monkeypatch):
    monkeypatch.setattr(pgd_step, "PARTIALS", partials)
    images = attack_point(*shape, dtype=dtype)
    if len(shape) == 4:
        images = [t.contiguous(memory_format=torch.channels_last) for t in images]
    mask = torch.rand(1, *shape[1:])
    for options in ({"alpha": 2.0, "eps": 3.0}, {"alpha": 50.0, "eps": 40.0}, {"alpha": 1.0, "eps": 2.0, "mask": mask}):
        exact = FK.pgd_step(*(t.double() for t in images), **options, norm="l2", backend="reference")
        with recorded() as seen:
            ours = FK.pgd_step(*images, **options, norm="l2", backend="triton")
        assert len(seen) == launches
        plain = FK.pgd_step(*images, **options, norm="l2", backend="reference")
        assert_no_worse(ours, plain, exact)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_numbers_reach_the_kernel_in_float64(norm):
    images = attack_point(3, 40)
    options = {"alpha": 0.1, "eps": 0.03, "bounds": (0.1, 0.7), "norm": norm}
    ours, theirs = on_both(FK.pgd_step, *images, **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


SPECIAL = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 0.3, 1.0, -2.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_every_special_value_is_treated_as_in_the_reference(dtype, as_tensors):
    x_adv, grad, x = (images.to(dtype) for images in torch.cartesian_prod(SPECIAL, SPECIAL, SPECIAL).T[:, None])
    for alpha, eps, high in itertools.product([0.1, torch.inf], [0.0, 0.2, torch.inf], [1.0, torch.inf, torch.nan]):
        numbers = [alpha, eps, 0.0, high]
        if as_tensors:
            numbers = [torch.where(torch.arange(x.numel()) % 2 == 0, number, 0.5)[None] for number in numbers]
        elif high != high:
            continue
        alphas, radii, *bounds = numbers
        ours, theirs = on_both(FK.pgd_step, x_adv, grad, x, alpha=alphas, eps=radii, bounds=tuple(bounds))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("long", [False, True])
def test_a_nan_spoils_its_own_sample_only(long):
    x_adv, grad, x = attack_point(3, 20000 if long else 50, dtype=torch.float32)
    grad[1, 7] = torch.nan
    moved = FK.pgd_step(x_adv, grad, x, alpha=0.1, eps=0.2, norm="l2", backend="triton")
    assert moved.isnan().all(1).tolist() == [False, True, False]
    assert moved.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_launch_and_nothing_copied(norm, layout):
    images = [LAYOUTS[layout](t) for t in attack_point(4, 3, 16, 16, dtype=torch.float32)]
    with recorded() as seen:
        FK.pgd_step(*images, alpha=0.1, eps=0.2, norm=norm, backend="triton")
        FK.random_start(images[0], eps=0.1, norm=norm, seed=1, backend="triton")
    assert len(seen) == 2
    for launch, given in zip(seen, (images, images[:1]), strict=True):
        places = [t.data_ptr() for t in launch.args if isinstance(t, torch.Tensor)]
        assert places[: len(given)] == [t.data_ptr() for t in given]
    assert [launch.options["STRAIGHT"] for launch in seen] == [True, layout == "contiguous"]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_another_batch_is_the_same_kernel(norm):
    """Whatever a kernel may be compiled for again does not depend on the number of samples."""
    kept = []
    for samples in (5, 16):
        x_adv, grad, x = attack_point(samples, 3, 8, 8, dtype=torch.float32)
        each = torch.rand(samples)
        labels = torch.arange(samples) % 3
        with recorded() as seen:
            FK.pgd_step(x_adv, grad, x, alpha=each, eps=each, norm=norm, backend="triton")
            FK.random_start(x, eps=each, norm=norm, seed=samples, backend="triton")
            FK.same_class_mixup(x, labels, lam=each, seed=samples, backend="triton")
        kept.append([(launch.name, launch.options, *specialized(launch)) for launch in seen])
    assert kept[0] == kept[1]


def specialized(launch):
    free = {"n", "samples", "seed"} if "linf" in launch.name else {"samples", "seed"}
    names = launch.kernel.arg_names
    return [
        argument
        for name, argument in zip(names, launch.args, strict=False)
        if name not in free and not isinstance(argument, (torch.Tensor, float))
    ]


# --- random_start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_start_with_parameters_of_every_shape(norm, layout, dtype):
    x = LAYOUTS[layout](torch.rand(7, 3, 13, 9).to(dtype))
    sample, channel = torch.linspace(0.02, 0.3, 7), torch.linspace(0.05, 0.2, 3).view(1, 3, 1, 1)
    for case in ({"eps": 0.1}, {"eps": sample, "bounds": (0.1 + channel / 4, 0.9 - channel / 4)}):
        exact = FK.random_start(x.double(), **case, norm=norm, seed=9, backend="reference")
        ours, plain = on_both(FK.random_start, x, **case, norm=norm, seed=9)
        assert_no_worse(ours, plain, exact)
        assert ours.stride() == torch.empty_like(x).stride()


@pytest.mark.skipif("native" not in COMPILED, reason="needs the compiled kernels")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])  # interpreted, bfloat16 is cut off
def test_starts_are_those_of_the_native_backend(dtype):
    """Bit by bit, but for the length of a vector, which is added up in another order."""
    x = torch.rand(5, 3, 17, 19).to(dtype)
    starts = {
        norm: [FK.random_start(x, eps=0.3, norm=norm, seed=7, backend=backend) for backend in ("triton", "native")]
        for norm in ("linf", "l2")
    }
    assert torch.equal(*starts["linf"])
    torch.testing.assert_close(*starts["l2"], rtol=0, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("first", [0, 2**32 - 8, 2**40 + 5])
@pytest.mark.parametrize("stream", [0, 1, 2])
def test_words_of_the_generator_are_those_of_the_reference(first, stream):
    for seed in (0, 1, -5, -(2**62) + 12345, 2**40 + 3):
        ours = torch.empty(64, dtype=torch.int64)
        draw[(1,)](ours, first, seed, STREAM=stream)
        index = first + torch.arange(16)
        zero = torch.zeros_like(index)
        key = (seed & LOW32, (seed >> 32) & LOW32)
        theirs = reference_words((index & LOW32, index >> 32, zero + stream, zero), key)
        assert torch.equal(ours, torch.stack(theirs, -1).flatten())


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**32 - 1, -(2**63), 2**63 - 1])
def test_the_whole_seed_counts(seed):
    x = torch.full((2, 9), 0.5, dtype=torch.float64)
    ours, theirs = on_both(FK.random_start, x, eps=0.3, seed=seed)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-16)


@pytest.mark.parametrize(("n", "launches"), [(1, 1), (3, 1), (1023, 1), (2045, 1), (2046, 2), (5117, 2)])
@pytest.mark.parametrize("partials", [256, 4])
def test_a_start_in_a_ball_of_many_dimensions(n, launches, partials, monkeypatch):
    """Samples begin anywhere within a counter, and end there."""
    monkeypatch.setattr(random_start, "PARTIALS", partials)
    x = torch.full((3, n), 0.5, dtype=torch.float64)
    with recorded() as seen:
        ours = FK.random_start(x, eps=3.0, norm="l2", bounds=(-9, 9), seed=4, backend="triton")
    assert len(seen) == launches
    theirs = FK.random_start(x, eps=3.0, norm="l2", bounds=(-9, 9), seed=4, backend="reference")
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("n", "launches"), [(8189, 1), (8190, 2)])
def test_a_start_of_many_dimensions_in_half_precision(n, launches):
    x = torch.rand(2, n).bfloat16()
    with recorded() as seen:
        ours = FK.random_start(x, eps=3.0, norm="l2", seed=4, backend="triton")
    assert len(seen) == launches
    exact = FK.random_start(x.double(), eps=3.0, norm="l2", seed=4, backend="reference")
    assert_no_worse(ours, FK.random_start(x, eps=3.0, norm="l2", seed=4, backend="reference"), exact)


# --- same_class_mixup ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixing_in_every_layout(layout, dtype):
    x, labels = LAYOUTS[layout](torch.rand(7, 3, 13, 9).to(dtype)), torch.tensor([1, 0, 1, 1, 2, 0, 1])
    for share in (0.3, torch.linspace(0, 1, 7)):
        exact, partner = FK.same_class_mixup(x.double(), labels, lam=share, seed=9, backend="reference")
        (ours, found), (plain, _) = on_both(FK.same_class_mixup, x, labels, lam=share, seed=9)
        assert torch.equal(found, partner)
        assert_no_worse(ours, plain, exact)
        assert ours.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(("samples", "launches"), [(31, 1), (32, 1), (33, 2), (400, 2)])
def test_partners_in_large_batches(samples, launches, monkeypatch):
    monkeypatch.setattr(same_class_mixup, "LABELS", 32)
    generator = torch.Generator().manual_seed(samples)
    labels = torch.randint(-3, 9, (samples,), generator=generator)
    x = torch.rand(samples, 2, dtype=torch.float64)
    with recorded() as seen:
        ours = FK.same_class_mixup(x, labels, lam=0.1, seed=-7, backend="triton")
    assert len(seen) == launches
    torch.testing.assert_close(ours, FK.same_class_mixup(x, labels, lam=0.1, seed=-7, backend="reference"))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(3, 0), (2, 0, 4), (1, 1, 1)])
def test_samples_of_next_to_nothing(norm, shape):
    images = attack_point(*shape)
    ours, theirs = on_both(FK.pgd_step, *images, alpha=0.1, eps=0.2, norm=norm)
    torch.testing.assert_close(ours, theirs)
    ours, theirs = on_both(FK.random_start, images[2], eps=0.2, norm=norm, seed=1)
    torch.testing.assert_close(ours, theirs)


def test_mixing_large_samples_and_samples_of_nothing():
    labels = torch.tensor([0, 1, 0, 1, 1])
    for x in (torch.rand(5, 3, 41, 43), torch.rand(5, 0), torch.rand(5)):
        ours, theirs = on_both(FK.same_class_mixup, x, labels, lam=0.4, seed=3)
        torch.testing.assert_close(ours, theirs)


# --- all of them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(3, 41), (2, 17000)])
def test_nothing_is_written_beside_the_result(norm, shape, monkeypatch):
    """Results lie between other numbers, which stay what they are."""
    buffers = []

    def between_others(like, **_):
        buffers.append(torch.full((like.numel() + 100,), 7, dtype=like.dtype))
        return buffers[-1][50:-50].view(like.shape)

    x_adv, grad, x = attack_point(*shape, dtype=torch.float32)
    labels = torch.arange(shape[0]) % 2
    monkeypatch.setattr(torch, "empty_like", between_others)
    FK.pgd_step(x_adv, grad, x, alpha=0.1, eps=0.2, norm=norm, backend="triton")
    FK.random_start(x, eps=0.2, norm=norm, seed=1, backend="triton")
    FK.same_class_mixup(x, labels, lam=0.4, seed=3, backend="triton")
    monkeypatch.undo()
    assert len(buffers) == 4
    for buffer in buffers:
        assert (buffer[:50] == 7).all()
        assert (buffer[-50:] == 7).all()


def test_elements_are_numbered_in_64_bits_where_32_are_too_few(monkeypatch):
    assert elementwise.index_type(2**30 - 1) == tl.int32
    assert elementwise.index_type(2**30) == tl.int64
    x_adv, grad, x = attack_point(3, 4, 50)
    options = {"alpha": torch.rand(4, 1), "eps": torch.rand(3)}
    moved = FK.pgd_step(x_adv, grad, x, **options, backend="triton")
    start = FK.random_start(x, eps=options["alpha"], seed=1, backend="triton")
    for module in (pgd_step, random_start):
        monkeypatch.setattr(module, "index_type", lambda _: tl.int64)
    torch.testing.assert_close(FK.pgd_step(x_adv, grad, x, **options, backend="triton"), moved, rtol=0, atol=0)
    torch.testing.assert_close(FK.random_start(x, eps=options["alpha"], seed=1, backend="triton"), start)
