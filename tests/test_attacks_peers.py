"""Step by step against the peers, in float64, and APGD against a second writing of the paper."""

import pytest
import torch
import torch.nn.functional as F
from attacked import EPS, batch, held_out, robust_digits, small_cnn
from scipy.stats import kstest

from fairkernels import attacks
from fairkernels import functional as FK


@pytest.fixture
def torchattacks():
    return pytest.importorskip(
        "torchattacks", reason="torchattacks is not installed: pip install --no-deps torchattacks"
    )


@pytest.fixture
def foolbox():
    return pytest.importorskip("foolbox", reason="foolbox is not installed: the extra [peers]")


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


# --- torchattacks -------------------------------------------------------------------------------------------------

FROM_THE_IMAGES = {
    "FGSM": {},
    "PGD": {"random_start": False},
    "PGDL2": {"random_start": False},
    "MIFGSM": {"decay": 0.9},
}


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
@pytest.mark.parametrize("name", FROM_THE_IMAGES)
def test_every_step_is_that_of_torchattacks(torchattacks, name, steps):
    model, (images, labels) = small_cnn(), batch()
    options = FROM_THE_IMAGES[name] | ({} if name == "FGSM" else {"steps": steps})
    ours, theirs = (getattr(library, name)(model, **options) for library in (attacks, torchattacks))
    assert_same(ours(images, labels), theirs(images, labels))


@pytest.mark.parametrize("name", ["FGSM", "PGD", "PGDL2", "MIFGSM"])
def test_targeted_steps_are_those_of_torchattacks(torchattacks, name):
    model, (images, labels) = small_cnn(), batch()
    options = {"random_start": False} if name.startswith("PGD") else {}
    theirs = getattr(torchattacks, name)(model, **options)
    theirs.set_mode_targeted_by_label(quiet=True)
    targets = (labels + 1) % 7
    assert_same(getattr(attacks, name)(model, targeted=True, **options)(images, targets), theirs(images, targets))


def test_the_least_likely_target_is_that_of_torchattacks(torchattacks):
    model, (images, labels) = small_cnn(), batch()
    theirs = torchattacks.PGD(model, random_start=False)
    theirs.set_mode_targeted_least_likely(quiet=True)
    ours = attacks.PGD(model, random_start=False, targeted="least-likely")
    assert_same(ours(images, labels), theirs(images, labels))


@pytest.mark.parametrize("name", ["FFGSM", "TPGD"])
def test_from_the_same_start_every_step_is_that_of_torchattacks(torchattacks, name, monkeypatch):
    model, (images, labels) = small_cnn(), batch()
    noise = torch.rand(images.shape, dtype=torch.float64) * 2 - 1
    scale = 8 / 255 if name == "FFGSM" else 0.001
    start = (images + scale * noise).clamp(0, 1)
    ours = getattr(attacks, name)(model)
    monkeypatch.setattr(ours, "start", lambda problem, restart: start)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *limits: self.copy_(scale * noise))
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    theirs = getattr(torchattacks, name)(model)(images, labels)
    monkeypatch.undo()
    monkeypatch.setattr(ours, "start", lambda problem, restart: start)
    assert_same(ours(images, labels), theirs)


def test_normalised_images_are_attacked_as_by_torchattacks(torchattacks):
    model, (images, labels) = small_cnn(), batch()
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    column = [torch.tensor(values, dtype=torch.float64).reshape(1, 3, 1, 1) for values in (mean, std)]
    normalised = (images - column[0]) / column[1]
    theirs = torchattacks.PGD(model, random_start=False)
    theirs.set_normalization_used(mean, std)
    ours = attacks.PGD(model, random_start=False, normalization=(mean, std))
    assert_same(ours(normalised, labels), theirs(normalised, labels))


# --- foolbox ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("name", "theirs", "eps"), [("PGD", "LinfPGD", 8 / 255), ("PGDL2", "L2PGD", 1.0)])
def test_every_step_is_that_of_foolbox(foolbox, name, theirs, eps, targeted):
    model, (images, labels) = small_cnn(), batch()
    attack = getattr(foolbox.attacks, theirs)(abs_stepsize=eps / 4, steps=7, random_start=False)
    goal = foolbox.criteria.TargetedMisclassification(labels) if targeted else labels
    found, _, _ = attack(foolbox.PyTorchModel(model, (0, 1)), images, goal, epsilons=eps)
    ours = getattr(attacks, name)(model, eps, eps / 4, 7, random_start=False, targeted=targeted)
    assert_same(ours(images, labels), found)


# --- starts -------------------------------------------------------------------------------------------------------


def start_of(attack, images, labels):
    """Where it begins: with step size 0 it stays there."""
    attack.alpha = 0.0
    return attack(images, labels) - images


def test_starts_in_the_box_are_distributed_as_those_of_torchattacks(torchattacks):
    model, images, labels = small_cnn(1), torch.full((64, 1, 11, 10), 0.02, dtype=torch.float64), torch.zeros(64).long()
    ours, theirs = (start_of(library.PGD(model, steps=1), images, labels) for library in (attacks, torchattacks))
    assert ours.min() == theirs.min() == -0.02  # clipped to the bounds
    inside = [values[values > -0.02] for values in (ours, theirs)]
    assert kstest(*inside).pvalue > 1e-3
    assert abs(len(inside[0]) - len(inside[1])) < 200


def test_starts_in_the_l2_ball_are_distributed_as_those_of_foolbox(foolbox):
    model, images = small_cnn(1), torch.full((2000, 1, 3, 3), 0.5, dtype=torch.float64)
    model[3].stride = (1, 1)
    ours = start_of(attacks.PGDL2(model, eps=0.4, steps=1), images, torch.zeros(2000).long())
    theirs = foolbox.attacks.L2PGD().get_random_start(as_eager(images), 0.4).raw - images
    for of in (lambda d: d.flatten(1).norm(dim=1), lambda d: d[:, 0, 0, 0], lambda d: d[:, 0, 1, 2]):
        assert kstest(of(ours), of(theirs)).pvalue > 1e-3


def as_eager(images):
    import eagerpy

    return eagerpy.astensor(images)


def test_the_start_of_tpgd_is_a_thousandth_of_a_normal():
    images = torch.full((64, 1, 11, 10), 0.5, dtype=torch.float64)
    moved = start_of(attacks.TPGD(small_cnn(1), steps=1), images, None)
    assert kstest(moved.flatten() / 0.001, "norm").pvalue > 1e-3


# --- APGD ---------------------------------------------------------------------------------------------------------


def dlr(logits, labels):
    """Equation 6 of the paper, sample by sample."""
    values = []
    for z, y in zip(logits, labels.tolist(), strict=True):
        top = z.sort(descending=True).values
        other = max(z[j] for j in range(len(z)) if j != y)
        values.append(-(z[y] - other) / (top[0] - top[2]))
    return torch.stack(values)


def auto_pgd(model, x, y, eps, steps, loss, start, rho=0.75, momentum=0.75):
    """Algorithm 1 of arXiv 2003.01690 for one sample after the other; whether each is misclassified on the way."""
    at = [0, 0.22]
    while at[-1] < 1:
        at.append(at[-1] + max(at[-1] - at[-2] - 0.03, 0.06))
    checks = [int(share * steps + 1e-9) for share in at]

    def look(point):
        point = point.detach().requires_grad_()
        logits = model(point[None])
        value = loss(logits, y[row : row + 1])[0]
        return value.item(), torch.autograd.grad(value, point)[0], logits.argmax().item() != y[row].item()

    def project(point):
        return torch.clamp(torch.min(torch.max(point, x[row] - eps), x[row] + eps), 0, 1)

    results = []
    for row in range(len(x)):
        step, point, before = 2 * eps, start[row], start[row]
        value, grad, fooled = look(point)
        best = (value, point, grad)
        at_check, rises, halved, last_check = value, 0, True, 0
        for k in range(steps):
            z = project(point + step * grad.sign())
            share = momentum if k else 1.0
            point, before = project(point + share * (z - point) + (1 - share) * (point - before)), point
            earlier = value
            value, grad, wrong = look(point)
            fooled |= wrong
            rises += value > earlier
            if value > best[0]:
                best = (value, point, grad)
            if k + 1 in checks:
                halved = rises <= rho * (k + 1 - last_check) or (not halved and at_check == best[0])
                if halved:
                    step, (_, point, grad) = step / 2, best
                at_check, rises, last_check = best[0], 0, k + 1
        results.append((fooled, best[0]))
    return results


@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_is_the_algorithm_of_the_paper(loss):
    """From the same start, on smooth logits, what is fooled agrees and, of the others, the best loss."""
    model, (images, _) = small_cnn(), batch(6)
    labels = model(images).argmax(-1)
    function = dlr if loss == "dlr" else lambda z, y: F.cross_entropy(z, y, reduction="none")
    start = FK.random_start(images, eps=0.05, seed=3)
    attack = attacks.APGD(model, eps=0.05, loss=loss)
    attack.start = lambda problem, restart: start
    found = attack(images, labels)
    expected = auto_pgd(model, images, labels, 0.05, 100, function, start)
    values = function(model(found), labels).tolist()
    assert (model(found).argmax(-1) != labels).tolist() == [fooled for fooled, _ in expected]
    robust = [(ours, theirs) for ours, (fooled, theirs) in zip(values, expected, strict=True) if not fooled]
    assert robust
    for ours, theirs in robust:
        assert ours == pytest.approx(theirs, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_leaves_the_robust_accuracy_of_the_algorithm(loss):
    """On a robust model, from other starts: within half a point."""
    model, data = robust_digits(), held_out(200)
    function = dlr if loss == "dlr" else lambda z, y: F.cross_entropy(z, y, reduction="none")
    found = attacks.APGD(model, eps=EPS, loss=loss)(data.images, data.labels)
    start = FK.random_start(data.images, eps=EPS, seed=11)
    expected = auto_pgd(model, data.images, data.labels, EPS, 100, function, start)
    robust = sum(not fooled for fooled, _ in expected)
    assert abs((model(found).argmax(-1) == data.labels).sum().item() - robust) <= 0.005 * len(expected)
