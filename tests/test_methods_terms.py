"""What training methods need beside their attack: the TRADES term, mixing within a class, worst-case class weights."""

import pytest
import torch
import torch.nn.functional as F
from cases import COMPILED, KERNELS

import fairkernels.functional as FK
from fairkernels.nn import TRADESLoss
from fairkernels.ops.samples import Maker

BACKENDS_OF_WEIGHTS = [backend for name, backend in KERNELS if name == "kl_dro_weights"]
of_the_weights = pytest.mark.parametrize("backend", BACKENDS_OF_WEIGHTS)
of_the_compiled_weights = pytest.mark.parametrize("backend", [b for b in BACKENDS_OF_WEIGHTS if b in COMPILED])


def pair(*shape, scale=1.0, dtype=torch.float64):
    return Maker(dtype).normal(*shape, scale=scale), Maker(dtype, seed=1).normal(*shape, scale=scale)


# --- TRADES -------------------------------------------------------------------------------------------------------


def test_trades_is_the_divergence_of_pytorch():
    natural, adversarial = pair(8, 5)
    for reduction in ("batchmean", "sum"):
        expected = F.kl_div(adversarial.log_softmax(1), natural.softmax(1), reduction=reduction)
        torch.testing.assert_close(FK.trades_kl(natural, adversarial, reduction=reduction), expected)
    rows = F.kl_div(adversarial.log_softmax(1), natural.softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(FK.trades_kl(natural, adversarial, reduction="none"), rows)


def test_trades_gradients_are_those_of_the_formula():
    natural, adversarial = (logits.requires_grad_() for logits in pair(8, 5))
    value = FK.trades_kl(natural, adversarial, reduction="sum")
    by_natural, by_adversarial = torch.autograd.grad(value, (natural, adversarial))
    p, q = natural.softmax(1), adversarial.softmax(1)
    ratio = p.log() - q.log()
    torch.testing.assert_close(by_adversarial, q - p)
    torch.testing.assert_close(by_natural, p * (ratio - (p * ratio).sum(1, keepdim=True)))


def test_trades_is_finite_where_probabilities_underflow():
    natural = torch.tensor([[0.0, -1e4, 1e4], [0.0, -torch.inf, 1.0]], requires_grad=True)
    adversarial = torch.tensor([[1e4, 0.0, -1e4], [0.0, -torch.inf, 2.0]], requires_grad=True)
    value = FK.trades_kl(natural, adversarial, reduction="sum")
    assert value.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, (natural, adversarial)))


def test_trades_of_close_logits_keeps_its_digits():
    """In float32 the plain formula is wrong by 16 % here."""
    natural, noise = pair(64, 10)
    adversarial = natural + 1e-3 * noise
    exact = FK.trades_kl(natural.float().double(), adversarial.float().double())
    value = FK.trades_kl(natural.float(), adversarial.float())
    assert value.item() == pytest.approx(exact.item(), rel=1e-3)
    assert FK.trades_kl(natural, natural).item() == 0


def test_trades_hides_no_nan_of_an_impossible_class(backend):
    natural = torch.tensor([[0.0, -1e4]], requires_grad=True)
    adversarial = torch.tensor([[0.0, torch.nan]], requires_grad=True)
    value = FK.trades_kl(natural, adversarial, backend=backend)
    assert value.isnan()
    assert all(grad.isnan().any() for grad in torch.autograd.grad(value, (natural, adversarial)))


@pytest.mark.parametrize("shape", [(1, 5), (17, 3), (20, 40), (3, 70), (2, 1030)])
def test_trades_of_any_shape(shape, backend):
    """Rows side by side and one at a time, whole vectors and tails, more than one block."""
    natural, adversarial = (logits.requires_grad_() for logits in pair(*shape, scale=3.0))
    value = FK.trades_kl(natural, adversarial, reduction="none", backend=backend)
    upstream = torch.linspace(-1, 2, len(value), dtype=torch.float64)
    by_natural, by_adversarial = torch.autograd.grad(value, (natural, adversarial), upstream)

    p, q = natural.softmax(1), adversarial.softmax(1)
    ratio = natural.log_softmax(1) - adversarial.log_softmax(1)
    expected = (p * ratio).sum(1)
    slope = upstream[:, None]
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(by_adversarial, slope * (q - p), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(by_natural, slope * p * (ratio - expected[:, None]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("classes", [10, 70])
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_trades_gradients_of_close_logits_keep_their_digits(classes, scale, backend):
    """Also of confident rows; autograd of the plain formula loses four digits more than the kernel."""
    natural, noise = pair(64, classes)
    natural = (scale * natural).float()
    adversarial = (natural + 1e-3 * noise).float()

    def gradients(*logits, backend):
        leaves = [tensor.requires_grad_() for tensor in logits]
        return torch.autograd.grad(FK.trades_kl(*leaves, reduction="sum", backend=backend), leaves)

    wide = (natural.double(), adversarial.double())
    exact = gradients(*wide, backend="reference")
    for grad, true in zip(gradients(natural, adversarial, backend=backend), exact, strict=True):
        error = (grad - true).abs().max() / true.abs().max()
        assert error < (1e-3 if backend == "reference" else 1e-6)


def test_trades_loss_module():
    natural, adversarial = pair(8, 5)
    labels = torch.arange(8) % 5
    expected = F.cross_entropy(natural, labels, label_smoothing=0.1) + 3 * FK.trades_kl(natural, adversarial)
    torch.testing.assert_close(TRADESLoss(3.0, label_smoothing=0.1)(natural, adversarial, labels), expected)


# --- mixing within a class ----------------------------------------------------------------------------------------


def test_mixup_mixes_with_another_of_the_class():
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    x = torch.rand(7, 2, 3)
    for seed in range(50):
        mixed, partner = FK.same_class_mixup(x, labels, lam=0.3, seed=seed)
        assert torch.equal(labels[partner], labels)
        assert (partner == torch.arange(7)).tolist() == [False, False, False, True, False, False, True]
        torch.testing.assert_close(mixed, 0.3 * x + 0.7 * x[partner])


def test_partners_are_uniform():
    labels = torch.zeros(5, dtype=torch.int64)
    counts = torch.zeros(5, 5)
    for seed in range(2000):
        _, partner = FK.same_class_mixup(torch.zeros(5, 1), labels, lam=0.5, seed=seed)
        counts[torch.arange(5), partner] += 1
    others = counts[~torch.eye(5, dtype=torch.bool)]
    assert (counts.diagonal() == 0).all()
    assert ((others - 500).abs() < 5 * 500**0.5).all()


@pytest.mark.parametrize(
    "labels",
    [
        torch.arange(3000) % 7,
        torch.arange(500) ** 3 % 5000 - 2500,
        (torch.arange(64) % 5) * 2**60 - 2**62,
        torch.tensor([2**63 - 1, -(2**63), 0, 2**63 - 1, -(2**63), 1]),
        torch.arange(41)[::2] % 3,
    ],
    ids=["large classes", "many classes", "far apart", "the whole range", "strided"],
)
def test_every_backend_finds_the_same_partners(labels, backend):
    x = Maker(torch.float32).uniform(len(labels), 5)
    for seed in (0, -1, 2**40 + 3):
        mixed, partner = FK.same_class_mixup(x, labels, lam=0.3, seed=seed, backend=backend)
        expected, its_partner = FK.same_class_mixup(x, labels, lam=0.3, seed=seed, backend="reference")
        assert torch.equal(partner, its_partner)
        torch.testing.assert_close(mixed, expected)


def test_mixup_keeps_the_layout(backend):
    x = torch.rand(6, 3, 40, 33).to(memory_format=torch.channels_last)
    labels = torch.arange(6) % 2
    mixed, partner = FK.same_class_mixup(x, labels, lam=torch.linspace(0, 1, 6), seed=1, backend=backend)
    assert mixed.stride() == x.stride()
    share = torch.linspace(0, 1, 6)[:, None, None, None]
    torch.testing.assert_close(mixed, share * x + (1 - share) * x[partner])


def test_mixup_theorem_on_two_gaussian_classes():
    """Mixed samples of a class have the variance g(λ) σ², g = λ² + (1 - λ)²."""
    x = torch.randn(20000, 1, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20000) % 2
    for lam in (0.5, 0.8):
        mixed, _ = FK.same_class_mixup(x, labels, lam=lam, seed=1)
        assert mixed.var().item() == pytest.approx(lam**2 + (1 - lam) ** 2, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lam": 1.5}, ValueError, r"lam must be in \[0, 1\], got 1.5"),
        ({"lam": torch.rand(3)}, ValueError, r"lam must be .* got \[3\]"),
        ({"labels": torch.zeros(3)}, TypeError, "labels must hold integers"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels must be \[5\].* got \[3\]"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
    ],
)
def test_mixup_errors(changes, error, message):
    arguments = {"labels": torch.zeros(5, dtype=torch.int64), "lam": 0.5, "seed": 0, **changes}
    with pytest.raises(error, match=message):
        FK.same_class_mixup(torch.rand(5, 2), arguments.pop("labels"), **arguments)


# --- worst-case class weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [1e-4, 0.1, 0.5, 2.0])
def test_weights_lie_on_the_ball_and_beat_what_lies_in_it(radius):
    losses = Maker(torch.float64).normal(6)
    weights = FK.kl_dro_weights(losses, radius=radius)
    uniform = 1 / 6
    assert weights.sum().item() == pytest.approx(1)
    assert (uniform * (uniform / weights).log()).sum().item() == pytest.approx(radius, rel=1e-6)
    others = torch.distributions.Dirichlet(torch.ones(6).double()).sample((20000,))
    inside = others[(uniform * (uniform / others).log()).sum(1) <= radius]
    assert ((inside @ losses) <= (weights @ losses) + 1e-9).all()


@of_the_weights
@pytest.mark.parametrize("classes", [2, 15, 16, 17, 33, 200])
@pytest.mark.parametrize("radius", [1e-3, 0.5, 20.0, 300.0])
def test_weights_of_many_problems_agree_with_the_reference(classes, radius, backend):
    losses = Maker(torch.float64).normal(20, classes, scale=3.0)
    losses[::2] = losses[::2].exp()
    counts = (Maker(torch.float64, seed=1).uniform(20, classes) > 0.3).double()
    expected = FK.kl_dro_weights(losses, counts, radius=radius, backend="reference")
    weights = FK.kl_dro_weights(losses, counts, radius=radius, backend=backend)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)


@of_the_weights
def test_weights_in_a_small_ball_move_straight_up_the_losses(backend):
    """p = u (1 + sqrt(2 r) (a - mean) / deviation) up to terms of the size of r."""
    losses = Maker(torch.float64).normal(9)
    straight = (losses - losses.mean()) / losses.std(correction=0)
    weights = FK.kl_dro_weights(losses, radius=1e-12, backend=backend)
    torch.testing.assert_close(9 * weights - 1, 2e-12**0.5 * straight, rtol=0, atol=1e-8)


@of_the_compiled_weights
def test_weights_in_a_ball_without_bounds_are_the_worst_class(backend):
    for radius in (1e3, 1e30, torch.inf):
        weights = FK.kl_dro_weights(torch.tensor([0.0, 2.0, 1.0, 2.0]), radius=radius, backend=backend)
        assert weights.tolist() == [0, 0.5, 0, 0.5]


def test_weights_of_absent_classes_are_0():
    losses, counts = torch.tensor([5.0, 1.0, 2.0, 0.0]), torch.tensor([0.0, 3.0, 1.0, 2.0])
    weights = FK.kl_dro_weights(losses, counts, radius=0.5)
    assert weights[0] == 0
    torch.testing.assert_close(weights[1:], FK.kl_dro_weights(losses[1:], radius=0.5))


def test_weights_at_the_edges():
    alone = FK.kl_dro_weights(torch.tensor([1.0, 9.0]), torch.tensor([1.0, 0.0]))
    assert alone.tolist() == [1, 0]
    assert FK.kl_dro_weights(torch.ones(4)).tolist() == [0.25] * 4
    assert FK.kl_dro_weights(torch.arange(4.0), radius=0.0).tolist() == [0.25] * 4
    assert FK.kl_dro_weights(torch.arange(4.0), torch.zeros(4)).tolist() == [0.0] * 4
    assert FK.kl_dro_weights(torch.tensor([0.0, 1e-30])).isfinite().all()
    assert FK.kl_dro_weights(torch.tensor([0.0, torch.nan, 1.0])).isnan().all()


def test_weights_are_shift_and_scale_free():
    losses = Maker(torch.float64).normal(6)
    torch.testing.assert_close(FK.kl_dro_weights(3 * losses + 7), FK.kl_dro_weights(losses))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.tensor(1.0),), ValueError, r"class_losses must be \[..., K\] with K >= 1, got \[\]"),
        ((torch.zeros(3, dtype=torch.int64),), TypeError, "class_losses must be float32"),
        ((torch.zeros(3), torch.zeros(2)), ValueError, r"counts must be \[3\].* got \[2\]"),
    ],
)
def test_weights_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        FK.kl_dro_weights(*arguments)


# --- counts of pairs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "classes"), [(8, 50), (1027, 3), (5000, 45), (5003, 46), (40001, 50), (70003, 2), (70000, 100)]
)
def test_counts_of_many_pairs(samples, classes, backend, threads):
    """Tables that take turns, tables of bytes that come round to 0, no table; one thread and two."""
    generator = torch.Generator().manual_seed(samples)
    predictions, labels = torch.randint(classes, (2, samples), generator=generator)
    labels[: samples // 2] = predictions[: samples // 2] = 1
    ignored = labels == 0
    predictions[ignored] = -7
    expected = torch.bincount((labels * classes + predictions)[~ignored], minlength=classes**2)
    for count in (1, 2):
        threads(count)
        counts = FK.confusion_counts(predictions, labels, num_classes=classes, ignore_index=0, backend=backend)
        assert torch.equal(counts.flatten(), expected)
        both = torch.stack((labels, predictions), 1)
        counts = FK.confusion_counts(both[:, 1], both[:, 0], num_classes=classes, ignore_index=0, backend=backend)
        assert torch.equal(counts.flatten(), expected)


@pytest.mark.parametrize(("samples", "classes"), [(8, 50), (1027, 3), (40001, 50)])
def test_the_first_pair_without_a_class_is_named(samples, classes, backend):
    labels, predictions = torch.zeros(2, samples, dtype=torch.int64)
    predictions[samples - 1], predictions[samples - 3] = classes, -1
    with pytest.raises(IndexError, match=rf"predictions\[{samples - 3}\] is -1"):
        FK.confusion_counts(predictions, labels, num_classes=classes, backend=backend)
    labels[samples - 2] = classes
    with pytest.raises(IndexError, match=rf"labels\[{samples - 2}\] is {classes}"):
        FK.confusion_counts(predictions, labels, num_classes=classes, backend=backend)


def test_trades_errors():
    with pytest.raises(ValueError, match=r"adversarial_logits must be \[3, 4\] torch.float32 like natural_logits"):
        FK.trades_kl(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="reduction must be one of 'batchmean', 'sum', 'none'"):
        FK.trades_kl(torch.zeros(3, 4), torch.zeros(3, 4), reduction="mean")  # type: ignore[arg-type]


def test_trades_of_an_impossible_top_class_is_infinite():
    natural, adversarial = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 2.0, -torch.inf]])
    for backend in (*COMPILED, "reference"):
        assert FK.trades_kl(natural, adversarial, backend=backend).item() == torch.inf


def test_faal_of_a_large_radius_puts_all_on_the_worst_class():
    for backend in (*COMPILED, "reference"):
        weights = FK.kl_dro_weights(torch.tensor([1.0, 2.0, 3.0]), radius=1e4, backend=backend)
        torch.testing.assert_close(weights, torch.tensor([0.0, 0.0, 1.0]))
