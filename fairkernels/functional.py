"""One function per operator.

Options are keyword-only; any floating dtype, any strides. The class axis is last and everything before the batch axis
is a batch of independent problems: logits ``[..., B, K]``, labels ``[..., B]`` or ``[B]`` (shared by all problems),
results ``[...]`` in the dtype of the logits (sums are kept in float32, float64 for float64). Matrices have the true
class in their rows, the predicted one in their columns. What has a derivative has a second one (reverse mode).

``backend`` forces ``"native"`` (compiled C++), ``"triton"`` or ``"reference"`` (plain PyTorch); a forced backend runs
or raises ``RuntimeError`` with the reason. See :func:`fairkernels.explain` and :func:`fairkernels.use_backend`.

Raises, in every function: ``TypeError`` for a wrong type or dtype, ``ValueError`` for a wrong shape, device or option,
both naming the argument; ``IndexError`` naming the first label outside ``[0, K)`` that is not ``ignore_index`` (on a
GPU nobody waits to look: the result is NaN; of counts the sample is missing).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fairkernels.ops import check, dispatch
from fairkernels.ops.autograd import run, run_unchecked
from fairkernels.ops.dispatch import Backend
from fairkernels.ops.schema import OPERATORS

__all__ = [
    "FairCrossEntropyParts",
    "confusion_counts",
    "fair_cross_entropy",
    "kl_dro_weights",
    "pgd_step",
    "random_start",
    "same_class_mixup",
    "soft_confusion",
    "spectral_loss",
    "spectral_norm",
    "symmetry_gap",
    "symmetry_loss",
    "trades_kl",
]

Absent = Literal["ignore", "zero"]
Normalize = Literal["true", "all"]
Reduction = Literal["sum", "mean"]
DivergenceReduction = Literal["batchmean", "sum", "none"]
Surrogate = Literal["kl", "kl-all", "soft", "gated"]
Method = Literal["locg", "power"]
Norm = Literal["linf", "l2"]

ABSENT = get_args(Absent)
NORMALIZATIONS = get_args(Normalize)
REDUCTIONS = get_args(Reduction)
DIVERGENCE_REDUCTIONS = get_args(DivergenceReduction)
SURROGATES = get_args(Surrogate)
METHODS = get_args(Method)
NORMS = get_args(Norm)


class FairCrossEntropyParts(NamedTuple):
    """The terms of the fair cross-entropy before their weights, detached: for the log."""

    cross_entropy: Tensor
    symmetry: Tensor
    spectral: Tensor
    confusion: Tensor


# --- confusion matrices -------------------------------------------------------------------------------------------


def soft_confusion(
    logits: Tensor,
    labels: Tensor,
    *,
    sample_weight: Tensor | None = None,
    normalize: Normalize | None = "true",
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_counts: bool = False,
    backend: Backend | None = None,
) -> Any:
    r"""Soft confusion matrix: the mean prediction of each true class (Sy-FAR, arXiv 2509.12939, Sec. 4).

    .. math:: C_{ij} = \frac{1}{n_i} \sum_{b : y_b = i} w_b \, \mathrm{softmax}(z_b / \tau)_j,
              \qquad n_i = \sum_{b : y_b = i} w_b

    Equivalent to::

        rates = torch.zeros(K, K).index_add(0, labels, (logits / temperature).softmax(-1))
        rates / torch.bincount(labels, minlength=K).clamp(min=1)[:, None]

    Args:
        logits: ``[..., B, K]``.
        labels: int ``[..., B]`` or ``[B]``, true classes.
        sample_weight: ``[..., B]`` or ``[B]``, non-negative; 1 if not given. Carries no gradient.
        normalize: ``"true"`` divides each row by ``n_i`` (a class that did not occur has a row of zeros), ``"all"``
            divides by the sum of the weights, ``None`` leaves the sums.
        temperature: τ, positive.
        ignore_index: rows with this label contribute nothing, whatever they hold.
        return_counts: also return ``n``.

    Returns:
        ``[..., K, K]``; with ``return_counts`` also ``[..., K]`` in the accumulation dtype (float32, float64 for
        float64: half precision can not count beyond 2048), which carries no gradient.

    Raises:
        TypeError, ValueError, IndexError: see :mod:`fairkernels.functional`.
    """
    labels, sample_weight = _batch(logits, labels, sample_weight, temperature)
    ignore_index = check.integer(ignore_index, "ignore_index")
    check.option(normalize, "normalize", (*NORMALIZATIONS, None))
    args = (logits, labels, sample_weight, normalize or "none", float(temperature), ignore_index)
    confusion, counts = run("soft_confusion", *args, backend=backend)
    return (confusion, counts) if return_counts else confusion


def confusion_counts(
    predictions: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    ignore_index: int = -100,
    backend: Backend | None = None,
) -> Tensor:
    """Confusion matrix of hard predictions, as ``sklearn.metrics.confusion_matrix``; deterministic.

    Equivalent to::

        torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).reshape(num_classes, num_classes)

    Args:
        predictions: int ``[..., B]``, predicted classes.
        labels: int ``[..., B]`` or ``[B]``, true classes.
        num_classes: K.
        ignore_index: rows with this label are not counted, whatever was predicted.

    Returns:
        int64 ``[..., K, K]``, rows the true class.

    Raises:
        TypeError, ValueError, IndexError: see :mod:`fairkernels.functional`; predictions out of range raise too (on a
            GPU such a sample is not counted, nor is one with a label out of range).
    """
    num_classes = check.class_count(num_classes, "num_classes")
    ignore_index = check.integer(ignore_index, "ignore_index")
    plain = type(predictions) is Tensor and type(labels) is Tensor and predictions.dtype is labels.dtype is torch.int64
    if plain and predictions.is_cpu and labels.is_cpu and predictions.dim() == labels.dim():
        counts = run_unchecked("confusion_counts", predictions, labels, num_classes, ignore_index, backend=backend)
        if counts is not None:
            return counts
    check.integers(predictions, "predictions")
    if predictions.dim() < 1:
        raise ValueError(f"predictions must be [..., B], got {check.shape(predictions)}")
    check.integers(labels, "labels")
    check.same_device(labels, "labels", predictions, "predictions")
    if predictions.dtype is not torch.int64 or labels.dtype is not torch.int64:
        predictions, labels = predictions.to(torch.int64), labels.to(torch.int64)
    if labels.shape != predictions.shape:
        labels = check.rows(labels, "labels", predictions.unsqueeze(-1), "predictions.unsqueeze(-1)")
    return run("confusion_counts", predictions, labels, num_classes, ignore_index, backend=backend)[0]


# --- symmetry -----------------------------------------------------------------------------------------------------


def symmetry_gap(
    confusion: Tensor,
    counts: Tensor | None = None,
    *,
    eps: float = 0.1,
    absent: Absent = "ignore",
    reduction: Reduction = "sum",
    backend: Backend | None = None,
) -> Tensor:
    r"""How much more often classes are mistaken one way than the other (Sy-FAR, arXiv 2509.12939, Eq. 4).

    .. math:: \sum_{i<j} a_{ij} \, |C_{ij} - C_{ji}| \, \frac{s_{ij}}{s_{ij} + \epsilon},
              \qquad s_{ij} = C_{ij} + C_{ji}

    Equivalent to::

        gap, mass = (confusion - confusion.mT).abs(), confusion + confusion.mT
        (gap * (mass / (mass + eps))).triu(1).sum((-2, -1))

    Args:
        confusion: ``[..., K, K]`` rates, rows the true class, non-negative.
        counts: ``[..., K]`` or ``[K]``, samples behind each row; without it a class is present if its row is not 0.
        eps: damps pairs of small mass; 0.1 in the paper's training, 1/K in its evaluation.
        absent: ``"ignore"`` compares only classes that are both present (:math:`a_{ij}`); ``"zero"`` compares all, as
            the official code does, which charges a class that merely did not occur.
        reduction: ``"sum"`` over the compared pairs, or their ``"mean"`` (0 if there are none).

    Returns:
        ``[...]``; 0 for a symmetric matrix.

    Raises:
        ValueError: if ``confusion`` is not square, ``eps`` is negative or an option is unknown.
    """
    check.square(confusion, "confusion")
    if counts is not None:
        counts = check.counts(counts, "counts", confusion.shape[:-1], confusion, "confusion")
    _symmetry_options(eps, absent, reduction)
    return run("symmetry_gap", confusion, counts, float(eps), absent, reduction, backend=backend)[0]


def symmetry_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    eps: float = 0.1,
    absent: Absent = "ignore",
    reduction: Reduction = "sum",
    sample_weight: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: Backend | None = None,
) -> Tensor:
    """Symmetry gap of the soft confusion matrix of a batch (Sy-FAR, arXiv 2509.12939, Eq. 4), in one pass.

    The kernels keep only the rates between classes of the batch: ``min(B, K)²`` values, never ``K²``, where
    ``absent="ignore"``; with ``"zero"`` the rows of these classes.

    Equivalent to::

        confusion, counts = soft_confusion(logits, labels, return_counts=True)
        symmetry_gap(confusion, counts, eps=eps)

    Args:
        logits: ``[..., B, K]``.
        labels: int ``[..., B]`` or ``[B]``, true classes.
        eps, absent, reduction: as in :func:`symmetry_gap`; a class is present if its samples weigh more than 0.
        sample_weight, temperature, ignore_index: as in :func:`soft_confusion`.

    Returns:
        ``[...]``; 0, attached to the graph, for an empty batch; NaN if a logit that counts is NaN.

    Raises:
        TypeError, ValueError, IndexError: see :mod:`fairkernels.functional`.
    """
    labels, sample_weight = _batch(logits, labels, sample_weight, temperature)
    ignore_index = check.integer(ignore_index, "ignore_index")
    _symmetry_options(eps, absent, reduction)
    args = (logits, labels, sample_weight, float(eps), absent, reduction, float(temperature), ignore_index)
    return run("symmetry_loss", *args, backend=backend)[0]


# --- spectral norm ------------------------------------------------------------------------------------------------


def spectral_norm(
    matrix: Tensor,
    *,
    method: Method = "locg",
    iters: int | None = None,
    tol: float | None = None,
    start: Tensor | None = None,
    return_vectors: bool = False,
    backend: Backend | None = None,
) -> Any:
    r"""Largest singular value, with the gradient :math:`u v^T` and a finite second derivative at ties and at 0.

    .. math:: \sigma(M) = \max_{\|v\| = 1} \|M v\|

    Equivalent to::

        torch.linalg.matrix_norm(matrix, 2)

    Args:
        matrix: ``[..., M, N]``.
        method: iteration of the kernels: ``"locg"`` (power iteration accelerated by its last two directions) or
            ``"power"``. The reference decomposes the matrix and ignores how a kernel would get there.
        iters: largest number of steps; if not given 64 (float64: 256), for ``"power"`` 1000.
        tol: relative residual at which the iteration stops; if not given 1e-5 (float64: 1e-10). The result is wrong by
            about its square, by up to half of it where singular values nearly tie.
        start: ``[..., N]`` or ``[N]``, first direction; carries no gradient.
        return_vectors: also return ``u`` and ``v``, which carry no gradient.

    Returns:
        ``[...]``; with ``return_vectors`` also ``u [..., M]`` and ``v [..., N]``. A zero matrix gives zeros.

    Raises:
        TypeError, ValueError: see :mod:`fairkernels.functional`.
    """
    check.matrix(matrix, "matrix")
    start, iters, tol = _spectral_options(matrix, "matrix", method, iters, tol, start)
    sigma, u, v = run("spectral_norm", matrix, start, method, iters, tol, backend=backend)
    return (sigma, u.to(matrix.dtype), v.to(matrix.dtype)) if return_vectors else sigma


def spectral_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    surrogate: Surrogate = "kl",
    margin: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    method: Method = "locg",
    iters: int | None = None,
    tol: float | None = None,
    start: Tensor | None = None,
    return_vectors: bool = False,
    backend: Backend | None = None,
) -> Any:
    r"""Spectral norm of a confusion matrix that can be trained (arXiv 2501.13273, Eq. 10; arXiv 2603.16732).

    Row i of the matrix collects the samples of class i; the surrogate says what a sample adds to it:

    - ``"kl"``: at its strongest wrong class, if that comes within ``margin`` (in logits) of the true one,
      ``-log softmax(z + margin * (1 - e_y))_y``; divided by the class's samples (the paper);
    - ``"kl-all"``: at every wrong class whose probability is within ``margin`` of the true one, ``-log p_y``; divided
      by the batch (the baseline in the Sy-FAR repository);
    - ``"soft"``: its probabilities of the wrong classes; divided by the class's samples;
    - ``"gated"``: the same, weighted by ``sigmoid(margin + z_j - z_y)``, which carries no gradient (CAR).

    Args:
        logits: ``[..., B, K]``.
        labels: int ``[..., B]`` or ``[B]``, true classes.
        surrogate, margin: see above; ``"soft"`` has no margin.
        class_weight: ``[..., K]`` or ``[K]``, multiplies the rows of the classes that occur; carries no gradient.
        ignore_index: rows with this label contribute nothing, whatever they hold.
        method, iters, tol, start, return_vectors: as in :func:`spectral_norm`; ``u`` and ``v`` are ``[..., K]``.

    Returns:
        ``[...]``; 0, attached to the graph, where no sample comes within the margin; NaN if a row that counts has no
        softmax (a NaN, an infinite largest logit).

    Raises:
        TypeError, ValueError, IndexError: see :mod:`fairkernels.functional`.
    """
    labels = check.batch(logits, labels)
    check.option(surrogate, "surrogate", SURROGATES)
    check.number(margin, "margin")
    ignore_index = check.integer(ignore_index, "ignore_index")
    per_class = (*logits.shape[:-2], logits.shape[-1])
    if class_weight is not None:
        class_weight = check.side_values(class_weight, "class_weight", per_class, logits, "logits")
    start, iters, tol = _spectral_options(logits, "logits", method, iters, tol, start)
    args = (logits, labels, class_weight, start, surrogate, float(margin), ignore_index, method, iters, tol)
    loss, u, v = run("spectral_loss", *args, backend=backend)
    return (loss, u.to(logits.dtype), v.to(logits.dtype)) if return_vectors else loss


# --- the whole objective ------------------------------------------------------------------------------------------


def fair_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    sym_weight: float = 1.0,
    spec_weight: float = 0.0,
    ce_weight: float = 1.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    eps: float = 0.1,
    absent: Absent = "ignore",
    sym_reduction: Reduction = "sum",
    surrogate: Surrogate = "soft",
    margin: float = 0.0,
    return_parts: bool = False,
    backend: Backend | None = None,
) -> Any:
    r"""Cross-entropy with the symmetry gap and the spectral norm of the same logits (arXiv 2509.12939, 2501.13273).

    .. math:: \lambda_{ce} \mathrm{CE}(z, y) + \lambda_{sym} L_{sym} + \lambda_{spec} \sigma

    Equivalent to::

        F.cross_entropy(logits, labels) + sym_weight * symmetry_loss(logits, labels) \
            + spec_weight * spectral_loss(logits, labels, surrogate="soft")

    Args:
        logits: ``[..., B, K]``.
        labels: int ``[..., B]`` or ``[B]``, true classes; class probabilities are not taken.
        sym_weight, spec_weight, ce_weight: weights of the terms; 0 skips a term.
        weight: ``[..., K]`` or ``[K]``, class weights of the cross-entropy; carries no gradient.
        reduction, label_smoothing: of the cross-entropy, as in ``torch.nn.functional.cross_entropy``.
        ignore_index: rows with this label contribute to no term.
        eps, absent, sym_reduction: of the symmetry gap, see :func:`symmetry_gap`.
        surrogate, margin: of the spectral norm, see :func:`spectral_loss`.
        return_parts: also return the terms before their weights and the soft confusion matrix.

    Returns:
        ``[...]``; with ``return_parts`` also a :class:`FairCrossEntropyParts`, detached. With both fairness weights 0
        it equals ``torch.nn.functional.cross_entropy``, for an empty batch (NaN for ``"mean"``) too.

    Raises:
        TypeError, ValueError, IndexError: see :mod:`fairkernels.functional`.
    """
    weights = (sym_weight, spec_weight, ce_weight)
    entropy = (reduction, label_smoothing, ignore_index)
    options = _fair_options(*weights, *entropy, eps, absent, sym_reduction, surrogate, margin, return_parts)
    plain = weight is None and type(logits) is Tensor and type(labels) is Tensor and labels.dtype is torch.int64
    if plain and logits.is_cpu and labels.is_cpu and labels.dim() == logits.dim() - 1:
        total = run_unchecked("fair_cross_entropy", logits, labels, None, *options, backend=backend)
        if total is not None:
            return total
    labels = check.batch(logits, labels)
    if weight is not None:
        weight = check.side_values(weight, "weight", (*logits.shape[:-2], logits.shape[-1]), logits, "logits")
    results = run("fair_cross_entropy", logits, labels, weight, *options, backend=backend)
    if not return_parts:
        return results[0]
    return results[0], FairCrossEntropyParts(*(part.to(logits.dtype) for part in results[1:5]))


# --- attack step --------------------------------------------------------------------------------------------------


def pgd_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    alpha: float | Tensor,
    eps: float | Tensor,
    norm: Norm = "linf",
    bounds: tuple[float | Tensor, float | Tensor] = (0.0, 1.0),
    targeted: bool = False,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""One step of projected gradient descent: along the gradient, back into the ball, into the bounds.

    Madry et al., arXiv 1706.06083, Sec. 2.1. Not differentiable: the result is detached.

    Equivalent to (``norm="linf"``)::

        moved = x_adv + alpha * mask * grad.sign()  # minus if targeted
        torch.clamp(torch.minimum(torch.maximum(moved, x - eps), x + eps), *bounds)

    With ``"l2"`` the step is :math:`\alpha\, g / (\|g\| + 10^{-10})`, ``mask`` multiplies ``g`` before its norm is
    taken, and the ball is per sample (all dimensions but the first).

    Args:
        x_adv: ``[N, ...]``, where the attack is.
        grad: like ``x_adv``, gradient of the loss that the attack raises (``targeted``: lowers).
        x: like ``x_adv``, the clean samples, centre of the ball.
        alpha: step size in units of ``x``: a number, ``[N]`` (one per sample), or what broadcasts to ``x``, such as
            ``[1, C, 1, 1]``; per sample at the finest with ``"l2"``.
        eps: radius of the ball, likewise.
        norm: ``"linf"`` or ``"l2"``.
        bounds: lowest and highest value, numbers or tensors that broadcast to ``x``.
        targeted: step down the gradient.
        mask: broadcasts to ``x``; where it is 0 nothing moves along the gradient.
        out: where the result goes, like ``x_adv``; may be ``x_adv`` itself.

    Returns:
        Like ``x_adv`` (``out`` if given). A gradient of 0 or NaN has no sign.

    Raises:
        TypeError, ValueError: see :mod:`fairkernels.functional`.
    """
    _images(x_adv, "x_adv")
    for name, value in (("grad", grad), ("x", x)):
        _like(value, name, x_adv, "x_adv")
    check.option(norm, "norm", NORMS)
    step, steps = _per_element(alpha, "alpha", x, norm == "l2")
    radius, radii = _per_element(eps, "eps", x, norm == "l2")
    (low, lows), (high, highs) = _bounds(bounds, x)
    if mask is not None:
        check.mask(mask, "mask")
        check.same_device(mask, "mask", x, "x")
        mask = _padded(mask, "mask", x)
    args = (x_adv, grad, x, steps, radii, lows, highs, mask, step, radius, low, high, norm, bool(targeted))
    if out is None:
        return run("pgd_step", *args, backend=backend)[0]

    _like(out, "out", x_adv, "x_adv")
    check.detached(out, "out")
    return _pgd_step_into(out, args, backend)


def _pgd_step_into(out: Tensor, args: tuple[Any, ...], backend: Backend | None) -> Tensor:
    """Straight into ``out`` where a kernel can and no input would be overwritten before it is read."""
    x_adv = args[0]
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("out= can not be used under torch.func transforms; use what pgd_step returns")
    reads = [arg for arg in args if isinstance(arg, Tensor)]
    seen = torch.compiler.is_compiling() or not dispatch.have_addresses((*args, out))
    if not seen and not any(_overlaps(out, read) for read in reads):
        forced = dispatch.forced_backend(backend)
        chosen = dispatch.choose("pgd_step", x_adv.device.type, x_adv.dtype, forced)
        if chosen != "reference":
            with torch.no_grad():
                result = dispatch.compute_into(OPERATORS["pgd_step"], args, out, chosen)
            if not out.is_inference():
                torch.autograd.graph.increment_version(out)  # for a graph that has saved it
            return result
    with torch.no_grad():
        return out.copy_(run("pgd_step", *args, backend=backend)[0])


def random_start(
    x: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm = "linf",
    bounds: tuple[float | Tensor, float | Tensor] = (0.0, 1.0),
    seed: int,
    backend: Backend | None = None,
) -> Tensor:
    r"""A uniform point of the ball around each sample, clipped to the bounds; where an attack starts.

    The library's own counter-based generator (Philox4x32-10) draws it: the same seed gives the same start, whatever
    the number of threads and the backend (``"l2"``: to the last place, as lengths are added up in another order); the
    global generator is neither read nor moved. Not differentiable.

    Equivalent to (``norm="linf"``)::

        torch.clamp(x + torch.empty_like(x).uniform_(-eps, eps), *bounds)

    Args:
        x: ``[N, ...]``, the clean samples.
        eps: radius, a number, ``[N]``, or what broadcasts to ``x`` (``"l2"``: per sample at the finest).
        norm: ``"linf"``: uniform in the box; ``"l2"``: uniform in the ball of each sample.
        bounds: lowest and highest value, numbers or tensors that broadcast to ``x``.
        seed: any int64.

    Returns:
        Like ``x``.

    Raises:
        TypeError, ValueError: see :mod:`fairkernels.functional`.
    """
    _images(x, "x")
    check.option(norm, "norm", NORMS)
    seed = check.integer(seed, "seed")
    radius, radii = _per_element(eps, "eps", x, norm == "l2")
    (low, lows), (high, highs) = _bounds(bounds, x)
    return run("random_start", x, radii, lows, highs, radius, low, high, norm, seed, backend=backend)[0]


# --- what training methods need beside their attack -----------------------------------------------------------------


def trades_kl(
    natural_logits: Tensor,
    adversarial_logits: Tensor,
    *,
    reduction: DivergenceReduction = "batchmean",
    backend: Backend | None = None,
) -> Tensor:
    r"""The robust term of TRADES, :math:`\mathrm{KL}(p \| q)` (arXiv 1901.08573, Eq. 5), without its NaNs.

    .. math:: \frac{1}{B} \sum_b \sum_j p_{bj} \log \frac{p_{bj}}{q_{bj}}

    With :math:`p = \mathrm{softmax}(z)` of the natural and :math:`q = \mathrm{softmax}(z')` of the adversarial logits;
    finite where a probability underflows, and accurate where p and q are close.

    Equivalent to::

        F.kl_div(adversarial_logits.log_softmax(-1), natural_logits.softmax(-1), reduction="batchmean")

    Args:
        natural_logits: ``[..., B, K]``.
        adversarial_logits: like ``natural_logits``.
        reduction: ``"batchmean"`` divides the sum by B, ``"sum"``, or ``"none"`` for one value a sample.

    Returns:
        ``[...]``, or ``[..., B]`` for ``"none"``; with gradients to both.

    Raises:
        TypeError, ValueError: see :mod:`fairkernels.functional`.
    """
    check.logits(natural_logits, "natural_logits")
    _like(adversarial_logits, "adversarial_logits", natural_logits, "natural_logits")
    check.option(reduction, "reduction", DIVERGENCE_REDUCTIONS)
    return run("trades_kl", natural_logits, adversarial_logits, reduction, backend=backend)[0]


def same_class_mixup(
    x: Tensor, labels: Tensor, *, lam: float | Tensor, seed: int, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    r"""Mix each sample with another one of its class (Domain Mixup, arXiv 2411.14424).

    .. math:: \tilde x_b = \lambda_b x_b + (1 - \lambda_b) x_{j(b)}

    Equivalent to::

        partner = [random.choice([j for j in members[y] if j != b] or [b]) for b, y in enumerate(labels)]
        lam * x + (1 - lam) * x[partner]

    Args:
        x: ``[B, ...]``.
        labels: int ``[B]``; any values, equal ones are a class.
        lam: share of the sample itself, a number or ``[B]``; in [0, 1], e.g. drawn from Beta(a, a).
        seed: any int64; the same seed gives the same partners, the global generator is not touched.

    Returns:
        ``mixed`` like ``x`` (detached) and ``partner``, int64 ``[B]``: uniform among the other samples of the class,
        the sample itself where it is alone.

    Raises:
        TypeError, ValueError: see :mod:`fairkernels.functional`.
    """
    _images(x, "x")
    check.integers(labels, "labels")
    check.same_device(labels, "labels", x, "x")
    labels = check.rows(
        labels.to(torch.int64), "labels", x.flatten(1) if x.dim() > 1 else x.unsqueeze(-1), "x.flatten(1)"
    )
    seed = check.integer(seed, "seed")
    share, shares = 0.0, None
    if isinstance(lam, Tensor):
        shares = check.side_values(lam, "lam", labels.shape, x, "x")
    else:
        check.non_negative(lam, "lam")
        if lam > 1:
            raise ValueError(f"lam must be in [0, 1], got {lam}")
        share = float(lam)
    mixed, partner = run("same_class_mixup", x, labels, shares, share, seed, backend=backend)
    return mixed, partner


def kl_dro_weights(
    class_losses: Tensor, counts: Tensor | None = None, *, radius: float = 0.5, backend: Backend | None = None
) -> Tensor:
    r"""Worst-case class weights in a KL ball round the uniform ones (FAAL, arXiv 2402.17729), without a solver.

    .. math:: \max_p \sum_c a_c p_c \quad \text{subject to} \quad \mathrm{KL}(u \| p) \le r, \; p \in \Delta

    Equivalent to::

        p = cvxpy.Variable(K)
        ball = [cvxpy.sum(p) == 1, cvxpy.sum(cvxpy.rel_entr(1 / K, p)) <= radius]
        cvxpy.Problem(cvxpy.Maximize(class_losses @ p), ball).solve()

    Args:
        class_losses: ``[..., K]``, a.
        counts: ``[..., K]`` or ``[K]``; classes with 0 are absent: u is uniform over the others, and they get 0.
        radius: r in nats, not negative; 0 leaves the uniform weights.

    Returns:
        ``[..., K]``, non-negative, sum 1 (0 where nobody is present); detached.

    Raises:
        TypeError, ValueError: see :mod:`fairkernels.functional`.
    """
    check.floating(class_losses, "class_losses")
    if class_losses.dim() < 1 or class_losses.shape[-1] == 0:
        raise ValueError(f"class_losses must be [..., K] with K >= 1, got {check.shape(class_losses)}")
    if counts is not None:
        counts = check.counts(counts, "counts", class_losses.shape, class_losses, "class_losses")
    check.non_negative(radius, "radius")
    return run("kl_dro_weights", class_losses, counts, float(radius), backend=backend)[0]


# --- what the checks share ----------------------------------------------------------------------------------------


def _batch(
    logits: Tensor, labels: Tensor, sample_weight: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor | None]:
    labels = check.batch(logits, labels)
    if sample_weight is not None:
        sample_weight = check.side_values(sample_weight, "sample_weight", logits.shape[:-1], logits, "logits")
    check.positive(temperature, "temperature")
    return labels, sample_weight


def _symmetry_options(eps: float, absent: str, reduction: str, reduction_name: str = "reduction") -> None:
    check.non_negative(eps, "eps")
    check.option(absent, "absent", ABSENT)
    check.option(reduction, reduction_name, REDUCTIONS)


@check.once
def _fair_options(
    sym_weight: float,
    spec_weight: float,
    ce_weight: float,
    reduction: str,
    label_smoothing: float,
    ignore_index: int,
    eps: float,
    absent: str,
    sym_reduction: str,
    surrogate: str,
    margin: float,
    return_parts: bool,
) -> tuple[Any, ...]:
    for name, value in (("sym_weight", sym_weight), ("spec_weight", spec_weight), ("ce_weight", ce_weight)):
        check.number(value, name)
    check.option(reduction, "reduction", REDUCTIONS)
    check.non_negative(label_smoothing, "label_smoothing")
    if label_smoothing > 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    ignore_index = check.integer(ignore_index, "ignore_index")
    _symmetry_options(eps, absent, sym_reduction, "sym_reduction")
    check.option(surrogate, "surrogate", SURROGATES)
    check.number(margin, "margin")
    weights = (float(sym_weight), float(spec_weight), float(ce_weight))
    symmetry = (float(eps), absent, sym_reduction)
    spectrum = (surrogate, float(margin))
    return *weights, reduction, float(label_smoothing), ignore_index, *symmetry, *spectrum, bool(return_parts)


def _spectral_options(
    matrix: Tensor, name: str, method: str, iters: int | None, tol: float | None, start: Tensor | None
) -> tuple[Tensor | None, int | None, float | None]:
    check.option(method, "method", METHODS)
    if iters is not None:
        iters = check.integer(iters, "iters")
        if iters < 1:
            raise ValueError(f"iters must be >= 1, got {iters}")
    if tol is not None:
        check.non_negative(tol, "tol")
        tol = float(tol)
    if start is not None:
        start = check.side_values(start, "start", (*matrix.shape[:-2], matrix.shape[-1]), matrix, name)
    return start, iters, tol


def _images(value: Any, name: str) -> None:
    check.floating(value, name)
    if value.dim() < 1:
        raise ValueError(f"{name} must be [N, ...], got {check.shape(value)}")


def _like(value: Any, name: str, other: Tensor, other_name: str) -> None:
    check.floating(value, name)
    check.same_device(value, name, other, other_name)
    if value.shape != other.shape or value.dtype != other.dtype:
        raise ValueError(
            f"{name} must be {check.shape(other)} {other.dtype} like {other_name}, "
            f"got {check.shape(value)} {value.dtype}"
        )


def _per_element(value: Any, name: str, x: Tensor, per_sample: bool) -> tuple[float, Tensor | None]:
    """A step size or radius: the number, or the tensor padded to the rank of x (a 1-D one is one value a sample)."""
    if not isinstance(value, Tensor):
        check.non_negative(value, name)
        return float(value), None
    check.floating(value, name)
    check.same_device(value, name, x, "x")
    if value.dim() == 1 and value.shape[0] == x.shape[0]:
        value = value.reshape(-1, *[1] * (x.dim() - 1))
    value = _padded(value, name, x)
    if per_sample and any(size != 1 for size in value.shape[1:]):
        raise ValueError(f"{name} must be a number or one value per sample with norm='l2', got {check.shape(value)}")
    return 0.0, value.detach()


def _bounds(bounds: Any, x: Tensor) -> tuple[tuple[float, Tensor | None], tuple[float, Tensor | None]]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"bounds must be a pair (lowest, highest), got {bounds!r}")
    low, high = (_bound(value, f"bounds[{i}]", x) for i, value in enumerate(bounds))
    if low[1] is None and high[1] is None and not low[0] <= high[0]:
        raise ValueError(f"bounds must be (lowest, highest), got {bounds!r}")
    return low, high


def _bound(value: Any, name: str, x: Tensor) -> tuple[float, Tensor | None]:
    if not isinstance(value, Tensor):
        check.number(value, name)
        return float(value), None
    check.floating(value, name)
    check.same_device(value, name, x, "x")
    return 0.0, _padded(value, name, x).detach()


def _padded(value: Tensor, name: str, x: Tensor) -> Tensor:
    """``value`` with ones in front of its shape up to the rank of x; must broadcast to x."""
    shape = (*[1] * (x.dim() - value.dim()), *value.shape)
    if len(shape) != x.dim() or any(size not in (1, wanted) for size, wanted in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{name} must broadcast to {check.shape(x)}, got {check.shape(value)}")
    return value.reshape(shape)


def _overlaps(out: Tensor, read: Tensor) -> bool:
    """Whether writing ``out`` could destroy what is still to be read; the same view, element by element, is safe."""
    if out.untyped_storage().data_ptr() != read.untyped_storage().data_ptr():
        return False
    return (out.data_ptr(), out.shape, out.stride()) != (read.data_ptr(), read.shape, read.stride())
