"""Class terms on the kernels that serve many classes; these take any number, and few are run faster."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from cases import DTYPES, call, reference, reference_gradient, replace_tensors
from test_forward import DTYPE_IDS, strided, transposed
from tolerance import assert_no_worse

import fairkernels.functional as FK
from fairkernels.app.bench_rivals import handed_on
from fairkernels.ops import samples, triton_kernels
from fairkernels.ops.samples import IGNORE, Maker, Sample, with_rows
from fairkernels.ops.schema import OPERATORS

pytest.importorskip("triton")

from fairkernels.ops.triton_kernels import class_order, class_rates, class_terms, confusion_counts, launch, trades_kl

pytestmark = pytest.mark.skipif(triton_kernels.missing("cpu") is not None, reason="no triton kernels run here")


@pytest.fixture(autouse=True)
def many_classes():
    """All numbers of classes are many."""
    if triton_kernels.missing("cpu") is not None:
        yield
        return
    with patch.object(class_terms, "fits_one_program", lambda logits, _: logits.shape[-1] == 1):  # one always does
        yield


@pytest.fixture
def pieces():
    """Rows of more than 16 classes are long: they are read in pieces of 4."""
    short = dict.fromkeys(class_rates.LONGEST_ROW, 16)
    with patch.object(class_rates, "LONGEST_ROW", short), patch.object(trades_kl, "LONGEST_ROW", short):
        yield


def check(name: str, s: Sample, gradient: bool = True) -> None:
    """Values and gradient are as near to those in float64 as plain PyTorch's."""
    operator, args, dtype = OPERATORS[name], handed_on(name, s), s.args[0].dtype
    exact, plain = reference(operator, args, torch.float64), reference(operator, args, dtype)
    for result, rough, true in zip(call(name, s, backend="triton"), plain, exact, strict=False):
        assert_no_worse(result, rough, true, accuracy=operator.allowed_error(dtype))
    if not gradient:
        return

    leaf = s.args[0].detach().requires_grad_()
    result = call(name, replace(s, args=(leaf, *s.args[1:])), backend="triton")[0]
    upstream = Maker(dtype, seed=5).normal(*result.shape)
    (grad,) = torch.autograd.grad(result, leaf, upstream)
    true = reference_gradient(operator, args, upstream, torch.float64)
    assert grad.is_contiguous()
    if not true.isfinite().all():
        assert not grad.isfinite().all()
        return
    rough = reference_gradient(operator, args, upstream, dtype)
    assert_no_worse(grad, rough, true, size=0, accuracy=SLOPE_ERROR * operator.allowed_error(dtype))


# --- every option, more and fewer samples than classes --------------------------------------------------------------

SLOPE_ERROR = 60
"""Errors of gradients beside those of values: singular vectors are found to the tolerance of the iteration, σ to its
square."""

SHAPES = {
    "fewer samples than classes": (9, 150),
    "more samples than classes": (20, 17, 3),
    "few classes present": (11, 23),
    "problems": (5, 17, 2),
}
CALLS = [
    ("soft_confusion", {}),
    ("soft_confusion", {"normalize": None, "temperature": 0.7}),
    ("soft_confusion", {"normalize": "all"}),
    ("symmetry_loss", {"temperature": 1.7}),
    ("symmetry_loss", {"reduction": "mean"}),
    ("symmetry_loss", {"absent": "zero", "reduction": "mean", "eps": 0.01}),
    ("symmetry_loss", {"absent": "zero"}),
    ("symmetry_loss", {"eps": 0.0}),
    ("spectral_loss", {"surrogate": "soft"}),
    ("spectral_loss", {"surrogate": "kl", "margin": 0.3}),
    ("spectral_loss", {"surrogate": "kl", "margin": -0.3}),
    ("spectral_loss", {"surrogate": "kl-all"}),
    ("spectral_loss", {"surrogate": "kl-all", "margin": 0.01}),
    ("spectral_loss", {"surrogate": "gated", "margin": 0.5}),
    ("fair_cross_entropy", {"spec_weight": 0.3}),
    ("fair_cross_entropy", {"spec_weight": 0.3, "surrogate": "kl", "return_parts": True, "absent": "zero"}),
    ("fair_cross_entropy", {"spec_weight": 0.3, "surrogate": "kl-all", "label_smoothing": 0.1, "sym_weight": 0.0}),
    ("fair_cross_entropy", {"spec_weight": 0.3, "surrogate": "gated", "reduction": "sum", "label_smoothing": 0.1}),
    ("fair_cross_entropy", {"ce_weight": 0.0, "sym_reduction": "mean"}),
    ("fair_cross_entropy", {"sym_weight": 0.0, "return_parts": True}),
]  # fmt: skip
IDS = [f"{name}: {', '.join(f'{key} {value}' for key, value in options.items())}" for name, options in CALLS]


def batch(make, count, classes, *leading, present=None):
    """Logits and labels, some of which are ignored."""
    labels = make.classes(*leading, count, count=present or classes)
    return make.normal(*leading, count, classes, scale=2.0), torch.where(labels % 7 == 3, IGNORE, labels)


def extra_tensors(name, options, make, logits):
    """Every weight that the operator takes."""
    *leading, count, classes = logits.shape
    if name in ("soft_confusion", "symmetry_loss"):
        return {"sample_weight": make.uniform(*leading, count)}
    if name == "spectral_loss":
        return {"class_weight": make.normal(*leading, classes), "start": make.uniform(classes)}
    return {"weight": make.uniform(*leading, classes)}


def cases_of(name, options, shape, dtype):
    make = Maker(dtype)
    logits, labels = batch(make, *SHAPES[shape], present=4 if shape == "few classes present" else None)
    yield Sample("plain", (logits, labels), options)
    if shape != "fewer samples than classes":
        yield Sample("weights", (logits, labels), {**options, **extra_tensors(name, options, make, logits)})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "options"), CALLS, ids=IDS)
def test_many_classes_are_no_less_accurate_than_plain_pytorch(name, options, shape):
    for s in cases_of(name, options, shape, torch.float64 if shape == "problems" else torch.float32):
        check(name, s)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["few classes present", "problems", "more samples than classes"])
@pytest.mark.parametrize(("name", "options"), CALLS, ids=IDS)
def test_long_rows_are_no_less_accurate_than_plain_pytorch(name, options, shape, pieces):
    for s in cases_of(name, options, shape, torch.float32):
        check(name, s)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CALLS, ids=IDS)
def test_more_classes_than_are_counted_on_the_chip(name, options):
    with patch.object(class_order, "MOST_BINS", 4), patch.object(class_order, "MOST_COUNTED", -1):
        for s in cases_of(name, options, "more samples than classes", torch.float32):
            check(name, s)


@pytest.mark.parametrize(("name", "options"), [*CALLS[1::4], CALLS[-1]], ids=[*IDS[1::4], IDS[-1]])
def test_classes_of_many_samples_are_divided(name, options):
    make = Maker()
    labels = torch.where(make.classes(2, 19, count=4) == 0, 3, make.every_class(19, 5))  # parts of any length, also 0
    logits = make.normal(2, 19, 5)
    s = Sample("divided", (logits, labels), {**options, **extra_tensors(name, options, make, logits)})
    with patch.object(class_rates, "SAMPLES_OF_A_PART", 1):
        with launch.recorded(run=False) as launches, torch.no_grad():
            call(name, s, backend="triton")
        assert "combine_parts" in [one.name for one in launches]
        check(name, s)


# --- the table's batches: NaN, ignored, absent, empty ---------------------------------------------------------------

BATCHES = [s.name for s in samples.classifier_batches(Maker(), longest=150)]


SURROGATES = ["soft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kl", "kl-all", "gated"))]


@pytest.mark.parametrize("label", BATCHES)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_any_batch(label, surrogate):
    s = next(s for s in samples.classifier_batches(Maker(), longest=150) if s.name == label)
    if s.args[0].shape[-2] > 100 and surrogate != "soft":
        pytest.skip("takes minutes interpreted; large batches are tested with the soft surrogate")
    check("fair_cross_entropy", replace(s, kwargs={"spec_weight": 0.3, "surrogate": surrogate, "return_parts": True}))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", ["soft_confusion", "symmetry_loss", "spectral_loss", "fair_cross_entropy"])
def test_every_dtype_and_layout(name, dtype):
    s = Sample("layouts", batch(Maker(dtype), 7, 12, 2))
    check(name, s)
    for layout in (transposed, strided):
        torch.testing.assert_close(
            call(name, replace_tensors(s, layout), backend="triton"),
            call(name, s, backend="triton"),
            rtol=1e-6,
            atol=1e-6,
        )


@pytest.mark.parametrize("name", ["soft_confusion", "symmetry_loss"])
@pytest.mark.parametrize("label", ["sample weights", "weights of 0", "NaN of weight 0"])
def test_sample_weights(name, label):
    check(name, next(s for s in samples.weighted(Maker()) if s.name == label))


@pytest.mark.parametrize("kind", ["few classes", "many classes", "long rows"])
@pytest.mark.parametrize("wrong", [99, -5, 2**40])
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in ("soft_confusion", "symmetry_loss", "spectral_loss", "fair_cross_entropy")]
    + [("soft_confusion", {"normalize": "all"}), ("fair_cross_entropy", {"sym_weight": 0.0})],
)
def test_label_that_is_no_class_gives_nan_and_reads_nothing_else(name, options, wrong, kind):
    """On a GPU nobody waits to look; the check of labels on the CPU is left out here."""
    s = Sample("wrong", (Maker().normal(5, 20).requires_grad_(), torch.tensor([0, wrong, 1, 3, 3])), options)
    with (
        patch.object(class_terms, "fits_one_program", lambda *_: kind == "few classes"),
        patch.dict(class_rates.LONGEST_ROW, dict.fromkeys(class_rates.LONGEST_ROW, 16 if kind == "long rows" else 32)),
        patch("fairkernels.ops.dispatch.check_classes"),
    ):
        result = call(name, s, backend="triton")[0]
        (grad,) = torch.autograd.grad(result.sum(), s.args[0])
    assert result.isnan().any()
    assert grad[1].isnan().any()


@pytest.mark.parametrize("name", ["soft_confusion", "symmetry_loss", "spectral_loss", "fair_cross_entropy"])
@pytest.mark.parametrize("classes", [4, 9, 80])
def test_a_label_that_is_no_class_with_fewer_samples_than_classes(name, classes):
    labels = torch.tensor([2, classes, -5, 3, 2**40])
    logits = Maker().normal(5, classes).requires_grad_()
    with patch("fairkernels.ops.dispatch.check_classes"):
        result = call(name, Sample("wrong", (logits, labels)), backend="triton")[0]
        result.sum().backward()
    assert result.isnan().any()
    assert not logits.grad[labels >= classes].isfinite().any()


# --- the order of samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered_by", ["counting", "sorting"])
@pytest.mark.parametrize(
    ("count", "classes", "layout"),
    [
        (300, 130, "in order"),
        (1100, 5, "in order"),
        (70, 200, "in order"),
        (70, 200, "transposed"),
        (70, 200, "alike"),
        (1, 5, "in order"),
        (0, 5, "in order"),
        (5, 5000, "in order"),
    ],
)
def test_class_order(ordered_by, count, classes, layout):
    labels = Maker().classes(2, count, count=classes + 2) - 1  # -1 and `classes` are no classes
    labels = torch.where(labels % 7 == 3, IGNORE, labels)
    if layout != "in order":
        labels = labels.t().contiguous().t() if layout == "transposed" else labels[:1].expand(labels.shape)
    known = torch.where((labels < 0) | (labels >= classes), 0, labels)
    keys = torch.where(labels == IGNORE, classes, known)
    in_order, order = keys.sort(dim=-1, stable=True)
    starts = torch.searchsorted(in_order, torch.arange(classes + 1).repeat(2, 1))
    with patch.object(class_order, "MOST_COUNTED", 10**6 if ordered_by == "counting" else -1):
        found = class_order.class_order(labels, classes, IGNORE)
        assert torch.equal(found.order.long(), order)
        assert torch.equal(found.starts.long(), starts)
        assert found.order.is_contiguous(), "kernels read it as if it were"
        assert found.starts.is_contiguous()
        assert torch.equal(class_order.class_starts(labels, classes, IGNORE).starts.long(), starts)


@pytest.mark.parametrize("name", ["symmetry_loss", "spectral_loss", "fair_cross_entropy"])
def test_sorted_samples_give_the_same(name):
    s = Sample("any", batch(Maker(), 9, 30))
    expected = call(name, s, backend="triton")
    with patch.object(class_order, "MOST_COUNTED", -1):
        torch.testing.assert_close(call(name, s, backend="triton"), expected, rtol=0, atol=0)
        check(name, s)


# --- launches -------------------------------------------------------------------------------------------------------


def launches_of(name, s, backward=False):
    leaf = s.args[0].clone().requires_grad_()
    with launch.recorded() as forward:
        result = call(name, replace(s, args=(leaf, *s.args[1:])), backend="triton")[0]
    with launch.recorded() as back:
        torch.autograd.grad(result.sum(), leaf)
    return [one.name for one in (back if backward else forward)]


@pytest.mark.parametrize("shape", [(9, 30), (30, 9)])
def test_launches(shape):
    s = Sample("any", batch(Maker(), *shape))
    assert launches_of("soft_confusion", s) == ["order_by_counting", "rates_by_class"]
    assert launches_of("soft_confusion", s, True) == ["gradient_by_logits"]
    sums = ["order_by_counting", "rates_by_class", "penalties_of_pairs", "terms_of_sums"]
    assert launches_of("symmetry_loss", s) == sums
    assert launches_of("fair_cross_entropy", s) == sums
    order = ["order_by_counting"]
    assert launches_of("symmetry_loss", s, True) == order * (shape[0] < shape[1]) + ["gradient_by_logits"]
    assert launches_of("fair_cross_entropy", s, True) == [*order, "gradient_by_logits"]


def test_trades_launches():
    pair = (Maker().normal(6, 5), Maker(seed=1).normal(6, 5))
    assert launches_of("trades_kl", Sample("mean", pair)) == ["divergences", "sum_of_tiles"]
    assert launches_of("trades_kl", Sample("rows", pair, {"reduction": "none"})) == ["divergences"]
    assert launches_of("trades_kl", Sample("mean", pair), True) == ["gradients"]


def test_a_mean_over_more_classes_than_a_block():
    logits = Maker().normal(6, 1100)
    options = {"weight": Maker(seed=1).uniform(1100), "sym_weight": 0.0}
    check("fair_cross_entropy", Sample("weights", (logits, torch.tensor([3, 1050, 3, 1099, 1023, 1024])), options))


# --- relatives ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_long_rows_of_trades(dtype, pieces):
    make, other = Maker(dtype), Maker(dtype, seed=1)
    for scale in (0.01, 1.0, 12.0):
        natural = make.normal(2, 3, 21)
        s = Sample("rows", (natural, natural + other.normal(2, 3, 21, scale=scale)))
        check("trades_kl", s)
    impossible = with_rows(make.normal(3, 21), (1,), 0.0)
    impossible[1, 4:9] = -torch.inf
    check("trades_kl", Sample("impossible", (impossible, impossible + other.normal(3, 21))))


def test_close_logits_of_trades_lose_nothing():
    """The divergence is of second order there: plain float32 finds some 16 % too much or too little of it."""
    natural = Maker().normal(3, 21)
    rounded = [z.requires_grad_() for z in (natural, natural + 1e-3 * Maker(seed=1).normal(3, 21))]
    exact = [z.detach().double().requires_grad_() for z in rounded]
    expected = FK.trades_kl(*exact, backend="reference")
    found = FK.trades_kl(*rounded, backend="triton")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    for actual, true in zip(torch.autograd.grad(found, rounded), torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(actual.double(), true, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("tiles", [5, 2500])
def test_sum_of_many_tiles_of_trades(tiles, mean):
    sums, total = Maker(torch.float64).uniform(2, tiles), torch.empty(2, dtype=torch.float64)
    trades_kl.sum_of_tiles[(2,)](sums, total, tiles, 7, MEAN=mean, REAL=launch.real_type(torch.float64), BLOCK=1024)
    torch.testing.assert_close(total, sums.sum(1) / (7 if mean else 1))


@pytest.mark.parametrize("classes", [3, 80])
def test_confusion_counts(classes):
    make = Maker()
    predictions = make.classes(2, 3000, count=classes + 2) - 1
    labels = predictions.flip(-1)
    with patch("fairkernels.ops.dispatch.check_classes"), patch.object(confusion_counts, "MOST_PARTS", 2):
        found = FK.confusion_counts(predictions, labels, num_classes=classes, ignore_index=2, backend="triton")
    expected = OPERATORS["confusion_counts"].reference(predictions, labels, classes, 2)
    assert torch.equal(found, expected)
