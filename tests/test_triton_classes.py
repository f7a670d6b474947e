"""Class terms of more classes than the table's samples have, on the Triton kernels that serve them."""

from unittest.mock import patch

import pytest
import torch
from cases import reference, reference_gradient
from tolerance import assert_no_worse

from fairkernels.ops import triton_kernels
from fairkernels.ops.samples import IGNORE, Maker, with_rows
from fairkernels.ops.schema import OPERATORS, accumulation_dtype

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(triton_kernels.missing(DEVICE) is not None, reason="no triton kernels run here")

if triton_kernels.missing(DEVICE) is None:
    import triton

    from fairkernels.ops.triton_kernels import class_order, class_rates, launch
    from fairkernels.ops.triton_kernels.class_terms import Inputs, Results, Terms, Upstream
    from fairkernels.ops.triton_kernels.class_terms_large import backward_large, forward_large


# --- operators as terms -------------------------------------------------------------------------------------------


def terms_of(name, args):
    """Tensors and terms of a call of one of the four operators."""
    if name == "soft_confusion":
        logits, labels, sample_weight, normalize, temperature, ignore = args
        return Inputs(logits, labels, sample_weight), Terms(
            ignore, temperature=temperature, normalize=normalize, confusion=True
        )
    if name == "symmetry_loss":
        logits, labels, sample_weight, eps, absent, reduction, temperature, ignore = args
        return Inputs(logits, labels, sample_weight), Terms(
            ignore,
            temperature=temperature,
            symmetry=True,
            sym_weight=1.0,
            eps=eps,
            absent=absent,
            symmetry_mean=reduction == "mean",
        )
    if name == "spectral_loss":
        logits, labels, class_weight, start, surrogate, margin, ignore, method, iters, tol = args
        return Inputs(logits, labels, class_weight=class_weight, start=start), Terms(
            ignore,
            spectral=True,
            spec_weight=1.0,
            surrogate=surrogate,
            margin=margin,
            locg=method == "locg",
            iters=iters,
            tol=tol,
        )
    logits, labels, weight, sym, spec, ce, reduction, smoothing, ignore, eps, absent, sym_reduction, *rest = args
    surrogate, margin, parts = rest
    return Inputs(logits, labels, weight=weight), Terms(
        ignore,
        confusion=parts,
        entropy=True,
        symmetry=bool(sym) or parts,
        spectral=bool(spec) or parts,
        ce_weight=ce,
        sym_weight=sym,
        spec_weight=spec,
        entropy_mean=reduction == "mean",
        label_smoothing=smoothing,
        eps=eps,
        absent=absent,
        symmetry_mean=sym_reduction == "mean",
        surrogate=surrogate,
        margin=margin,
        fold=True,
    )


FIELDS = {
    "soft_confusion": ("confusion", "counts"),
    "symmetry_loss": ("total", "coefficients"),
    "spectral_loss": ("total", "u", "v"),
    "fair_cross_entropy": ("total", "entropy", "symmetry", "spectral", "confusion", "coefficients", "u", "v"),
}


def forward(name, args):
    """The operator's results and what the backward needs of them."""
    inputs, terms = terms_of(name, args)
    results = OPERATORS[name].fake(*args)
    results = dict(zip(FIELDS[name], results if isinstance(results, tuple) else (results,), strict=True))
    given = {
        key: result
        for key, result in results.items()
        if (key != "confusion" or terms.confusion)
        and (key != "coefficients" or terms.symmetry)
        and (key not in ("u", "v") or terms.spectral)
    }
    forward_large(inputs, terms, Results(**given))
    return results, given


def backward(name, args, given, upstream):
    inputs, terms = terms_of(name, args)
    kept = {key: given.get(key) for key in ("coefficients", "counts", "u", "v")}
    return backward_large(inputs, terms, Upstream(upstream, **kept))


def check(name, args, gradient=True):
    operator, dtype = OPERATORS[name], args[0].dtype
    exact, plain = reference(operator, args, torch.float64), reference(operator, args, dtype)
    results, given = forward(name, args)
    vectors = ("u", "v", "coefficients")
    fields = [field for field in FIELDS[name] if field not in vectors and (field in given or field == "total")]
    for field in fields:
        place = FIELDS[name].index(field)
        if field in ("symmetry", "spectral") and not getattr(terms_of(name, args)[1], field):
            continue
        assert_no_worse(results[field], plain[place], exact[place], accuracy=operator.allowed_error(dtype))
    if not gradient:
        return
    upstream = Maker(dtype, seed=5).normal(*exact[0].shape)
    grad = backward(name, args, given, upstream)
    assert grad.is_contiguous()
    assert grad.dtype == dtype
    true = reference_gradient(operator, args, upstream, torch.float64)
    if not true.isfinite().all():
        assert not grad.isfinite().all()
        return
    rough = reference_gradient(operator, args, upstream, dtype)
    assert_no_worse(grad, rough, true, size=0, accuracy=30 * operator.allowed_error(dtype))


# --- calls --------------------------------------------------------------------------------------------------------


def options(name, **changed):
    defaults = {
        "soft_confusion": {"sample_weight": None, "normalize": "true", "temperature": 1.0, "ignore_index": IGNORE},
        "symmetry_loss": {
            "sample_weight": None,
            "eps": 0.1,
            "absent": "ignore",
            "reduction": "sum",
            "temperature": 1.0,
            "ignore_index": IGNORE,
        },
        "spectral_loss": {
            "class_weight": None,
            "start": None,
            "surrogate": "soft",
            "margin": 0.0,
            "ignore_index": IGNORE,
            "method": "locg",
            "iters": None,
            "tol": None,
        },
        "fair_cross_entropy": {
            "weight": None,
            "sym_weight": 0.7,
            "spec_weight": 0.3,
            "ce_weight": 1.0,
            "reduction": "mean",
            "label_smoothing": 0.0,
            "ignore_index": IGNORE,
            "eps": 0.1,
            "absent": "ignore",
            "sym_reduction": "sum",
            "surrogate": "soft",
            "margin": 0.0,
            "return_parts": False,
        },
    }[name]
    assert changed.keys() <= defaults.keys()
    return tuple({**defaults, **changed}.values())


def batch(make, samples, classes, *leading, count=None):
    """Logits and labels; some are ignored."""
    labels = make.classes(*leading, samples, count=count or classes)
    return make.normal(*leading, samples, classes, scale=2.0), torch.where(labels % 7 == 3, IGNORE, labels)


SHAPES = {  # these kernels serve any number of classes, and few are run faster
    "fewer samples than classes": (9, 150),
    "more samples than classes": (40, 19),
    "few classes present": (11, 23),
    "problems": (5, 17, 2),
}
CALLS = [
    ("soft_confusion", {}),
    ("soft_confusion", {"normalize": "none", "temperature": 0.7}),
    ("soft_confusion", {"normalize": "all"}),
    ("symmetry_loss", {"temperature": 1.7}),
    ("symmetry_loss", {"reduction": "mean"}),
    ("symmetry_loss", {"absent": "zero", "reduction": "mean", "eps": 0.01}),
    ("symmetry_loss", {"absent": "zero"}),
    ("symmetry_loss", {"eps": 0.0}),
    ("spectral_loss", {}),
    ("spectral_loss", {"surrogate": "kl", "margin": 0.3}),
    ("spectral_loss", {"surrogate": "kl", "margin": -0.3}),
    ("spectral_loss", {"surrogate": "kl-all"}),
    ("spectral_loss", {"surrogate": "kl-all", "margin": 0.01}),
    ("spectral_loss", {"surrogate": "gated", "margin": 0.5}),
    ("fair_cross_entropy", {}),
    ("fair_cross_entropy", {"surrogate": "kl", "margin": 0.3, "return_parts": True, "absent": "zero"}),
    ("fair_cross_entropy", {"surrogate": "kl-all", "label_smoothing": 0.1, "sym_weight": 0.0}),
    ("fair_cross_entropy", {"surrogate": "gated", "reduction": "sum", "sym_reduction": "mean", "label_smoothing": 0.1}),
    ("fair_cross_entropy", {"ce_weight": 0.0, "spec_weight": 0.0}),
    ("fair_cross_entropy", {"sym_weight": 0.0, "spec_weight": 0.0, "return_parts": True}),
]
NAMES = [f"{name}: {', '.join(f'{key} {value}' for key, value in changed.items())}" for name, changed in CALLS]


@pytest.fixture(params=["whole rows", "rows in pieces"])
def pieces(request):
    if request.param == "whole rows":
        yield False
        return
    with patch.object(class_rates, "LONGEST_ROW", dict.fromkeys(class_rates.LONGEST_ROW, 16)):
        yield True


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "changed"), CALLS, ids=NAMES)
def test_no_less_accurate_than_plain_pytorch(name, changed, shape, pieces):
    if pieces and SHAPES[shape][1] > 100:
        pytest.skip("many pieces")
    for dtype in (torch.float64, torch.float32):
        count = 4 if shape == "few classes present" else None
        logits, labels = batch(Maker(dtype, DEVICE), *SHAPES[shape], count=count)
        check(name, (logits, labels, *options(name, **changed)))
