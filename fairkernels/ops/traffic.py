"""What one call of an operator must move and compute at least, whoever implements it: the floor of its time.

Called with the arguments of the public function. Every input is read once and every result written once in a pass; what
stays in the caches (counts, a row, a small matrix) is not charged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Traffic(NamedTuple):
    """Bytes of the forward and of the backward pass; operations of both together.

    Additions, multiplications, comparisons and exponentials count one each. ``backward`` is 0 where there is none.
    """

    forward: int
    backward: int
    operations: int


def size(tensor: Tensor) -> int:
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def logits_loss(logits: Tensor, labels: Tensor, **_: Any) -> Traffic:
    """One read of the logits; one read and one write of their gradient. Softmax 5 an element, gradient 4."""
    return Traffic(size(logits) + size(labels), 2 * size(logits) + size(labels), 9 * logits.numel())


def soft_confusion(logits: Tensor, labels: Tensor, **_: Any) -> Traffic:
    """As a loss, and the K x K result and its gradient."""
    once = logits_loss(logits, labels)
    matrix = logits[..., :1, :].numel() * logits.shape[-1] * logits.element_size()
    return Traffic(once.forward + matrix, once.backward + matrix, once.operations + logits.numel())


def symmetry_gap(confusion: Tensor, *_: Any, **__: Any) -> Traffic:
    """One read; one read and one write. Value and both derivatives 15 a pair."""
    return Traffic(size(confusion), 2 * size(confusion), 15 * confusion.numel() // 2)


def spectral_norm(matrix: Tensor, **_: Any) -> Traffic:
    """One read; the gradient ``u vᵀ`` is one write. One step is two products with the matrix."""
    return Traffic(size(matrix), size(matrix), 5 * matrix.numel())


def pgd_step(x_adv: Tensor, *_: Any, **__: Any) -> Traffic:
    """Three reads and one write: sign, step, two projections of two comparisons each."""
    return Traffic(4 * size(x_adv), 0, 8 * x_adv.numel())


def random_start(x: Tensor, **_: Any) -> Traffic:
    """One read and one write; ten rounds of Philox are 15 operations an element."""
    return Traffic(2 * size(x), 0, 20 * x.numel())


def confusion_counts(predictions: Tensor, labels: Tensor, *, num_classes: int, **_: Any) -> Traffic:
    """Two reads and the matrix."""
    problems = predictions.numel() // max(predictions.shape[-1], 1)
    return Traffic(size(predictions) + size(labels) + 8 * problems * num_classes**2, 0, 3 * predictions.numel())


def trades_kl(natural_logits: Tensor, adversarial_logits: Tensor, **_: Any) -> Traffic:
    """Two reads; two reads and two writes."""
    both = size(natural_logits) + size(adversarial_logits)
    return Traffic(both, 2 * both, 20 * natural_logits.numel())


def same_class_mixup(x: Tensor, labels: Tensor, **_: Any) -> Traffic:
    """Two reads (the sample and its partner) and one write."""
    return Traffic(3 * size(x) + size(labels), 0, 3 * x.numel())


def kl_dro_weights(class_losses: Tensor, *_: Any, **__: Any) -> Traffic:
    """One read and one write; about six evaluations of the divergence, 35 operations a class."""
    return Traffic(2 * size(class_losses), 0, 210 * class_losses.numel())
