"""Six defects of the peers, by name: what each of ours does instead."""

import pytest
import torch
from attacked import EPS, batch, held_out, right, robust_digits, small_cnn
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fairkernels import attacks
from fairkernels.attacks import losses
from fairkernels.attacks.loop import Worst
from fairkernels.attacks.objective import Found
from fairkernels.attacks.steps import along_momentum


def test_targeted_eyeglasses_that_walk_away_from_the_target():
    model, (images, _) = small_cnn(), batch(height=24, width=20)
    targets = (model(images).argmax(-1) + 2) % 7
    attack = attacks.EyeglassAttack(model, steps=40, targeted=True)
    with torch.no_grad():
        before, after = (
            nn.functional.cross_entropy(model(x), targets, reduction="none") for x in (images, attack(images, targets))
        )
    assert (after < before).all()


def test_rounding_that_kills_the_gradient():
    """Steps of a tenth of a level add up, while every image that is seen or returned has 8 bits."""
    model, (images, labels) = small_cnn(), batch(height=24, width=20)
    images = (images * 255).round() / 255
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    adversarial = attacks.EyeglassAttack(model, steps=30, alpha=0.1 / 255, decay=0.0)(images, labels)
    assert all((x * 255 - (x * 255).round()).abs().max() < 1e-9 for x in [*seen, adversarial])
    painted = seen[5]  # after the five colours that are tried
    assert ((adversarial - painted).abs() * 255).max().round() == 3
    loss = nn.functional.cross_entropy
    assert loss(model(adversarial), labels) > loss(model(painted), labels)


def test_restarts_that_keep_the_last():
    """More restarts can only fool more; the last of them alone would not do."""
    model, data = robust_digits(), held_out(300)
    found = [
        right(model, attacks.PGD(model, EPS, EPS / 2, 1, restarts=n)(data.images, data.labels), data.labels)
        for n in (1, 4, 16)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


def test_the_worst_is_what_reaches_the_goal_then_the_loss():
    worst = Worst()
    seen = [([0, 1, 0, 0], [5, 1, 2, 1]), ([1, 0, 0, 0], [1, 9, 3, 0]), ([1, 1, 0, 0], [0, 2, 1, 1])]
    for point, (reached, loss) in enumerate(seen, start=1):
        worst.see(torch.full((4, 1), point), torch.tensor(loss), torch.tensor(reached).bool())
    assert worst.point.flatten().tolist() == [2, 3, 2, 1]


@given(st.lists(st.floats(-50, -1), min_size=3, max_size=6, unique=True), st.data())
def test_margins_wrong_for_negative_logits(values, data):
    """Zeros in the place of a masked logit would win against negative ones."""
    label = data.draw(st.integers(0, len(values) - 1))
    logits, labels = torch.tensor([values], dtype=torch.float64), torch.tensor([label])
    lead = max(v for k, v in enumerate(values) if k != label) - values[label]
    ranked = sorted(values, reverse=True)
    assert losses.margin(logits, labels, False).item() == pytest.approx(lead)
    assert losses.margin(logits, labels, True).item() == pytest.approx(-lead)
    ratio = losses.difference_of_logits_ratio(logits, labels, False).item()
    assert ratio == pytest.approx(lead / (ranked[0] - ranked[2] + 1e-12))
    moved = losses.difference_of_logits_ratio(logits + 100, labels, False).item()
    assert moved == pytest.approx(ratio, rel=1e-6, abs=1e-9)


def test_a_target_that_comes_third_keeps_a_gradient():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]], requires_grad=True)
    losses.difference_of_logits_ratio(logits, torch.tensor([2]), True).backward()
    assert logits.grad.abs().max() > 0.1


def test_mifgsm_dividing_by_a_zero_gradient():
    """A sample without a gradient at first, here behind a ReLU, is not lost: later it moves."""

    class Behind(nn.Module):
        def forward(self, images):
            self.push = getattr(self, "push", 0) + 1
            alive = images if self.push > 1 else images * 0
            total = alive.flatten(1).sum(1)
            return torch.stack([total, -total], 1)

    images = torch.full((2, 1, 2, 2), 0.5)
    moved = attacks.MIFGSM(Behind(), eps=0.1, alpha=0.05, steps=2)(images, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(moved, images - 0.05)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_momentum_forgets_a_gradient_that_is_not_finite(wrong):
    grads = [torch.full((1, 1, 2, 2), value) for value in (1.0, wrong, -3.0)]
    grads[1][..., 0] = 1.0
    along = []
    step = along_momentum(lambda point, found, out: along.append(found.grad.clone()), 1.0)
    for grad in grads:
        step(grad, Found(grad, None, grad), grad)
    torch.testing.assert_close(torch.cat(along)[:, 0, 0, 1], torch.tensor([1.0, 1.0, 0.0]))
