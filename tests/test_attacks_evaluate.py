"""evaluate: class by class, for anybody's attacks."""

import math

import pytest
import torch
from attacked import EPS, batch, held_out, right, robust_digits, small_cnn
from torch import nn

from fairkernels import attacks


def batches(data, size):
    return list(zip(data.images.split(size), data.labels.split(size), strict=True))


def test_the_counts_are_those_of_the_predictions():
    model, data = robust_digits(), held_out(150)
    found = attacks.evaluate(model, batches(data, 64), {"weak": attacks.PGD(model, EPS, EPS / 4, 3)}, progress=False)
    attack = attacks.PGD(model, EPS, EPS / 4, 3)
    adversarial = torch.cat([attack(x, y) for x, y in batches(data, 64)])
    for name, images in (("clean", data.images), ("weak", adversarial)):
        expected = torch.zeros(10, 10, dtype=torch.int64)
        for label, predicted in zip(data.labels, model(images).argmax(-1), strict=True):
            expected[label, predicted] += 1
        assert found[name].confusion.equal(expected)
        assert found[name].accuracy == pytest.approx(right(model, images, data.labels))
        rates = [right(model, images[data.labels == c], data.labels[data.labels == c]) for c in range(10)]
        assert found[name].class_accuracy.tolist() == pytest.approx(rates)
        assert found[name].worst_class_accuracy == pytest.approx(min(rates))
    assert list(found) == ["clean", "weak"]
    assert found["clean"].largest_change == 0
    assert found["weak"].largest_change == pytest.approx(EPS, abs=1e-6)


def test_a_class_that_does_not_occur_is_not_the_worst():
    confusion = torch.tensor([[5, 0, 0], [0, 0, 0], [1, 0, 2]])
    outcome = attacks.Outcome(confusion, 0.0, 0.0)
    assert outcome.class_accuracy.isnan().tolist() == [False, True, False]
    assert (outcome.worst_class, outcome.worst_class_accuracy) == (2, pytest.approx(2 / 3))


def test_pixels_that_are_no_numbers_are_not_passed_over():
    images, labels = batch()
    broken = images.clone()
    broken[0, 0, 0, 0] = torch.nan
    ends = iter([broken, images])
    loader = [(images, labels)] * 2
    found = attacks.evaluate(small_cnn(), loader, {"broken": lambda x, y: next(ends)}, progress=False)
    assert math.isnan(found["broken"].largest_change)


def test_modes_are_as_before_whatever_a_peer_does():
    model = small_cnn().train()
    model[1].eval()
    seen = []

    class Careless:
        def __call__(self, images, labels):
            model.train()
            return images

    hook = model.register_forward_hook(lambda module, *_: seen.append(module.training))
    attacks.evaluate(model, [batch()], Careless(), progress=False)
    hook.remove()
    assert seen == [False, False]
    assert (model.training, model[1].training) == (True, False)


def test_torchattacks_objects_run():
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    model, data = robust_digits(), held_out(100)
    attack = torchattacks.PGD(model, eps=EPS, steps=10)
    found = attacks.evaluate(model, batches(data, 50), [attack], progress=False)
    assert found["PGD"].accuracy < found["clean"].accuracy
    assert found["PGD"].largest_change == pytest.approx(EPS, abs=1e-6)


def test_foolbox_objects_run_with_their_radius():
    foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed")
    model, data = robust_digits(), held_out(100)
    pair = (foolbox.attacks.LinfPGD(steps=10), EPS)
    found = attacks.evaluate(model, batches(data, 50), {"linf": pair}, progress=False)
    assert found["linf"].accuracy < found["clean"].accuracy
    assert found["linf"].largest_change == pytest.approx(EPS, abs=1e-6)
    with pytest.raises(TypeError, match="does not know its radius"):
        attacks.evaluate(model, batches(data, 50), foolbox.attacks.LinfPGD(), progress=False)


def test_autoattack_objects_run():
    """By the method that they have; the package is not on the index."""

    class AutoAttack:
        def run_standard_evaluation(self, x, y, bs):
            assert bs == len(x) == len(y)
            return (x + EPS).clamp(0, 1)

    model, data = robust_digits(), held_out(100)
    found = attacks.evaluate(model, batches(data, 50), AutoAttack(), progress=False)
    assert found["AutoAttack"].largest_change == pytest.approx(EPS, abs=1e-6)


def test_progress_goes_to_standard_error(capsys):
    attacks.evaluate(small_cnn(), [batch()], attacks.FGSM(small_cnn()))
    shown = capsys.readouterr()
    assert "2/2" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([3], TypeError, "an attack must be called with images and labels, got int"),
        ({"clean": print}, ValueError, "no attack can be called 'clean'"),
        ([lambda x, y: x, lambda x, y: x], ValueError, "attacks need names"),
        (lambda x, y: x[:1], ValueError, "an attack must return images like its own"),
    ],
)
def test_what_is_no_attack_is_refused(given, error, words):
    with pytest.raises(error, match=words):
        attacks.evaluate(small_cnn(), [batch()], given, progress=False)


def test_a_loader_without_batches_is_refused():
    with pytest.raises(ValueError, match="loader must give at least one batch"):
        attacks.evaluate(nn.Identity(), [], attacks.FGSM(nn.Identity()), progress=False)
