"""Bad input: the documented error, naming the argument, what came and what was expected."""

import pytest
import torch

import fairkernels.functional as FK
from fairkernels import nn
from fairkernels.compat import syfar

Z, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
IMAGES = torch.rand(3, 2, 4, 4)
STEP = {"alpha": 0.1, "eps": 0.1}
BATCH_FUNCTIONS = (FK.soft_confusion, FK.symmetry_loss, FK.spectral_loss, FK.fair_cross_entropy)


@pytest.mark.parametrize("function", BATCH_FUNCTIONS)
@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        ([[1.0]], Y, TypeError, "logits must be a torch.Tensor, got list"),
        (Z.int(), Y, TypeError, "logits must be float32, float64, bfloat16 or float16, got torch.int32"),
        (Z.to(torch.complex64), Y, TypeError, "logits must be float32.* got torch.complex64"),
        (Z[0], Y, ValueError, r"logits must be \[..., B, K\] with K >= 1, got \[4\]"),
        (Z[:, :0], Y, ValueError, r"logits must be \[..., B, K\] with K >= 1, got \[6, 0\]"),
        (Z, Y.tolist(), TypeError, "labels must be a torch.Tensor, got list"),
        (Z, Y.float(), TypeError, "labels must hold .*class indices.*torch.float32"),
        (Z, Y.bool(), TypeError, "labels must hold integers .*torch.bool"),
        (Z, Y[:5], ValueError, r"labels must be \[6\] \(logits is \[6, 4\]\), got \[5\]"),
        (Z, Y[:, None], ValueError, r"labels must be \[6\] .* got \[6, 1\]"),
        (Z.expand(2, 6, 4), Y.expand(3, 6), ValueError, r"labels must be \[2, 6\] or \[6\] .* got \[3, 6\]"),
        (Z, Y.to("meta"), ValueError, r"labels must be on the device of logits \(cpu\), got meta"),
    ],
)
def test_logits_and_labels(function, logits, labels, error, message):
    with pytest.raises(error, match=message):
        function(logits, labels)


@pytest.mark.parametrize("function", BATCH_FUNCTIONS)
@pytest.mark.parametrize(("label", "row"), [(4, 3), (-1, 0), (2**40, 5), (-99, 2)])
def test_label_out_of_range_names_the_first_row(function, backend, label, row):
    labels = Y.clone()
    labels[row] = labels[5] = label
    used = backend if function in (FK.soft_confusion, FK.symmetry_loss) else None
    with pytest.raises(
        IndexError, match=rf"labels\[{row}\] is {label}, expected a class in \[0, 4\) or ignore_index -100"
    ):
        function(Z, labels, backend=used)
    with pytest.raises(IndexError, match=rf"labels\[1, {row}\] is {label}, expected"):
        function(Z.expand(2, 6, 4), torch.stack([Y, labels]), backend=used)


def test_counts_out_of_range(backend):
    with pytest.raises(IndexError, match=r"predictions\[1\] is 9, expected a class in \[0, 4\)"):
        FK.confusion_counts(torch.tensor([0, 9, 12]), torch.tensor([0, 1, 2]), num_classes=4, backend=backend)
    with pytest.raises(IndexError, match=r"labels\[0\] is 4, expected a class in \[0, 4\)"):
        FK.confusion_counts(torch.tensor([0, 1]), torch.tensor([4, 1]), num_classes=4, backend=backend)


@pytest.mark.parametrize(
    ("function", "args", "options", "error", "message"),
    [
        (
            FK.soft_confusion,
            (Z, Y),
            {"normalize": "rows"},
            ValueError,
            "normalize must be one of 'true', 'all', None",
        ),
        (FK.soft_confusion, (Z, Y), {"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
        (
            FK.soft_confusion,
            (Z, Y),
            {"temperature": float("nan")},
            ValueError,
            "temperature must be > 0, got nan",
        ),
        (FK.soft_confusion, (Z, Y), {"temperature": "1"}, TypeError, "temperature must be a number, got str"),
        (
            FK.soft_confusion,
            (Z, Y),
            {"ignore_index": 1.5},
            TypeError,
            "ignore_index must be an int, got float",
        ),
        (
            FK.soft_confusion,
            (Z, Y),
            {"sample_weight": torch.ones(5)},
            ValueError,
            r"sample_weight must be .*got \[5\]",
        ),
        (
            FK.soft_confusion,
            (Z, Y),
            {"sample_weight": Y},
            TypeError,
            "sample_weight must be float32.*got torch.int64",
        ),
        (
            *(FK.soft_confusion, (Z, Y), {"sample_weight": torch.ones(6, requires_grad=True)}, ValueError),
            "sample_weight carries no gradient here; pass sample_weight.detach",
        ),
        (FK.symmetry_loss, (Z, Y), {"eps": -0.1}, ValueError, "eps must be >= 0, got -0.1"),
        (FK.symmetry_loss, (Z, Y), {"eps": 10**400}, ValueError, "eps must be a float64"),
        (FK.symmetry_loss, (Z, Y), {"ignore_index": 2**63}, ValueError, "ignore_index must be an int64, got 92233"),
        (FK.confusion_counts, (Y, Y), {"num_classes": 2**40}, ValueError, "num_classes must be >= 1 and <= 1048576"),
        (FK.symmetry_loss, (Z, Y), {"eps": None}, TypeError, "eps must be a number, got NoneType"),
        (
            FK.symmetry_loss,
            (Z, Y),
            {"absent": "skip"},
            ValueError,
            "absent must be one of 'ignore', 'zero', got 'skip'",
        ),
        (
            FK.symmetry_loss,
            (Z, Y),
            {"reduction": "none"},
            ValueError,
            "reduction must be one of 'sum', 'mean'",
        ),
        (FK.symmetry_gap, (Z,), {}, ValueError, r"confusion must be \[..., K, K\], got \[6, 4\]"),
        (FK.symmetry_gap, (Z[0],), {}, ValueError, r"confusion must be \[..., M, N\], got \[4\]"),
        (
            FK.symmetry_gap,
            (Z[:4], torch.ones(3)),
            {},
            ValueError,
            r"counts must be \[4\] or \[4\], got \[3\]",
        ),
        (FK.symmetry_gap, (Z[:4],), {"eps": -1}, ValueError, "eps must be >= 0"),
        (FK.spectral_norm, (Z[0],), {}, ValueError, r"matrix must be \[..., M, N\], got \[4\]"),
        (
            FK.spectral_norm,
            (Z,),
            {"method": "svd"},
            ValueError,
            "method must be one of 'locg', 'power', got 'svd'",
        ),
        (FK.spectral_norm, (Z,), {"iters": 0}, ValueError, "iters must be >= 1, got 0"),
        (FK.spectral_norm, (Z,), {"tol": -1.0}, ValueError, "tol must be >= 0"),
        (FK.spectral_norm, (Z,), {"start": torch.ones(6)}, ValueError, r"start must be .* got \[6\]"),
        (
            FK.spectral_loss,
            (Z, Y),
            {"surrogate": "ce"},
            ValueError,
            "surrogate must be one of 'kl', 'kl-all'",
        ),
        (FK.spectral_loss, (Z, Y), {"margin": None}, TypeError, "margin must be a number"),
        (
            FK.spectral_loss,
            (Z, Y),
            {"class_weight": torch.ones(6)},
            ValueError,
            r"class_weight must be .*got \[6\]",
        ),
        (FK.fair_cross_entropy, (Z, Y), {"weight": torch.ones(6)}, ValueError, r"weight must be .*got \[6\]"),
        (
            FK.fair_cross_entropy,
            (Z, Y),
            {"label_smoothing": 1.5},
            ValueError,
            r"label_smoothing must be in \[0, 1\]",
        ),
        (
            FK.fair_cross_entropy,
            (Z, Y),
            {"reduction": "none"},
            ValueError,
            "reduction must be one of 'sum', 'mean'",
        ),
        (FK.fair_cross_entropy, (Z, Y), {"sym_reduction": "max"}, ValueError, "sym_reduction must be one of"),
        (FK.fair_cross_entropy, (Z, Y), {"sym_weight": None}, TypeError, "sym_weight must be a number"),
        (FK.fair_cross_entropy, (Z, Z.softmax(1)), {}, TypeError, "labels must hold integers .*not probabilities"),
        (
            FK.confusion_counts,
            (Y.float(), Y),
            {"num_classes": 4},
            TypeError,
            "predictions must hold integers",
        ),
        (FK.confusion_counts, (Y, Y.float()), {"num_classes": 4}, TypeError, "labels must hold integers"),
        (
            FK.confusion_counts,
            (Y, Y[:3]),
            {"num_classes": 4},
            ValueError,
            r"labels must be \[6\] .* got \[3\]",
        ),
        (FK.confusion_counts, (Y, Y), {"num_classes": 0}, ValueError, "num_classes must be >= 1 and <= 1048576, got 0"),
        (
            FK.confusion_counts,
            (Y, Y),
            {"num_classes": 4.0},
            TypeError,
            "num_classes must be an int, got float",
        ),
        (
            FK.confusion_counts,
            (Y[0], Y),
            {"num_classes": 4},
            ValueError,
            r"predictions must be \[..., B\], got \[\]",
        ),
    ],
)
def test_options(function, args, options, error, message):
    with pytest.raises(error, match=message):
        function(*args, **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x_adv": IMAGES.int()}, TypeError, "x_adv must be float32.* got torch.int32"),
        ({"x_adv": torch.tensor(1.0)}, ValueError, r"x_adv must be \[N, ...\], got \[\]"),
        (
            {"grad": IMAGES[:2]},
            ValueError,
            r"grad must be \[3, 2, 4, 4\] torch.float32 like x_adv, got \[2, 2, 4, 4\]",
        ),
        ({"x": IMAGES.double()}, ValueError, r"x must be .* like x_adv, got \[3, 2, 4, 4\] torch.float64"),
        ({"alpha": -1.0}, ValueError, "alpha must be >= 0, got -1.0"),
        ({"alpha": "0.1"}, TypeError, "alpha must be a number, got str"),
        ({"alpha": torch.ones(2)}, ValueError, r"alpha must broadcast to \[3, 2, 4, 4\], got \[2\]"),
        ({"eps": torch.ones(2, 1, 1, 1)}, ValueError, r"eps must broadcast to \[3, 2, 4, 4\]"),
        (
            {"eps": torch.ones(1, 2, 1, 1), "norm": "l2"},
            ValueError,
            "eps must be a number or one value per sample",
        ),
        ({"norm": "l1"}, ValueError, "norm must be one of 'linf', 'l2', got 'l1'"),
        ({"bounds": (1.0, 0.0)}, ValueError, r"bounds must be \(lowest, highest\)"),
        ({"bounds": 1.0}, TypeError, r"bounds must be a pair \(lowest, highest\), got 1.0"),
        ({"bounds": (0.0, None)}, TypeError, r"bounds\[1\] must be a number"),
        ({"bounds": (torch.ones(5), 1.0)}, ValueError, r"bounds\[0\] must broadcast"),
        ({"mask": [1]}, TypeError, "mask must be a torch.Tensor"),
        ({"mask": torch.ones(4, 4).int()}, TypeError, "mask must be floating, bool or uint8, got torch.int32"),
        ({"mask": torch.ones(5)}, ValueError, r"mask must broadcast to \[3, 2, 4, 4\], got \[5\]"),
        ({"out": IMAGES[:1]}, ValueError, "out must be .* like x_adv"),
        ({"out": IMAGES.clone().requires_grad_()}, ValueError, "out carries no gradient"),
    ],
)
def test_attack_step(changes, error, message):
    arguments = {"x_adv": IMAGES, "grad": IMAGES, "x": IMAGES, **STEP, **changes}
    tensors = [arguments.pop(name) for name in ("x_adv", "grad", "x")]
    with pytest.raises(error, match=message):
        FK.pgd_step(*tensors, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor"),
        ({"eps": -1.0}, ValueError, "eps must be >= 0"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got float"),
        ({"seed": 2**63}, ValueError, "seed must be an int64, got 9223372036854775808"),
        ({"norm": "l1"}, ValueError, "norm must be one of"),
        ({"bounds": None}, TypeError, "bounds must be a pair"),
    ],
)
def test_random_start(changes, error, message):
    arguments = {"x": IMAGES, "eps": 0.1, "seed": 0, **changes}
    with pytest.raises(error, match=message):
        FK.random_start(arguments.pop("x"), **arguments)


def test_out_with_internal_overlap():
    out = torch.rand(3, 2, 4, 1).expand(3, 2, 4, 4)
    with pytest.raises((RuntimeError, ValueError), match=r"out|single memory location"):
        FK.pgd_step(IMAGES, IMAGES, IMAGES, out=out, **STEP)


def test_modules_and_compat_raise_the_same():
    with pytest.raises(ValueError, match="absent must be one of"):
        nn.SymmetryLoss(absent="skip")(Z, Y)
    with pytest.raises(ValueError, match=r"num_classes must be 4 \(adv_outputs\), got 10"):
        syfar.symmetry_penalty(Z, Y, 10)


def test_the_native_library_checks_for_itself():
    """A direct caller of a private op gets an error, never memory that is not his."""
    from cases import COMPILED

    if "native" not in COMPILED:
        pytest.skip("the native library was not built")
    ops = torch.ops.fairkernels
    with pytest.raises(RuntimeError):
        ops._soft_confusion_native(Z, Y[:3], None, "true", 1.0, -100)
    with pytest.raises(RuntimeError):
        ops._symmetry_gap_native(Z, None, 0.1, "ignore", "sum")
    with pytest.raises(RuntimeError):
        ops._symmetry_loss_native(Z, Y.int(), None, 0.1, "ignore", "sum", 1.0, -100)
    with pytest.raises(RuntimeError):
        ops._symmetry_loss_backward_native(
            torch.ones(()), Z, Y, None, 0.1, "ignore", "sum", 1.0, -100, torch.zeros(1, 1)
        )
    with pytest.raises(RuntimeError):
        ops._confusion_counts_native(Y, Y[:2], 4, -100)
    with pytest.raises(RuntimeError, match="more than 2\\^63 elements"):
        ops._confusion_counts_native(Y, Y, 2**62, -100)
    with pytest.raises(RuntimeError):
        ops._pgd_step_native(
            IMAGES,
            IMAGES[:1],
            IMAGES,
            None,
            None,
            None,
            None,
            None,
            0.1,
            0.1,
            0.0,
            1.0,
            "linf",
            False,
            IMAGES.clone(),
        )
