"""What holds for every attack: ball and box, masks, no radius, more steps, targets, sizes per sample and class."""

from itertools import pairwise

import pytest
import torch
from attacked import EPS, batch, held_out, right, robust_digits, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st

import fairkernels
from fairkernels import attacks

MODEL = small_cnn()
LINF = ["FGSM", "FFGSM", "PGD", "TPGD", "MIFGSM", "APGD"]
STEPPED = {"PGD", "PGDL2", "TPGD", "MIFGSM", "APGD"}

radii = st.floats(0, 0.3)
seeds = st.integers(0, 2**62)


def made(name, model=MODEL, **options):
    if name not in STEPPED:
        options.pop("steps", None)
    return getattr(attacks, name)(model, **options)


def lengths(values):
    return values.flatten(1).norm(dim=1)


# --- ball and box -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINF)
@settings(max_examples=12)
@given(eps=radii, seed=seeds, steps=st.integers(1, 4))
def test_attacks_stay_in_ball_and_box(name, eps, seed, steps):
    images, labels = batch()
    adversarial = made(name, eps=eps, steps=steps, seed=seed)(images, labels)
    assert (adversarial - images).abs().max() <= eps + 1e-12
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


@settings(max_examples=12)
@given(eps=st.floats(0, 5), seed=seeds, steps=st.integers(0, 4))
def test_l2_attacks_stay_in_ball_and_box(eps, seed, steps):
    images, labels = batch()
    adversarial = attacks.PGDL2(MODEL, eps, eps / 2, steps, seed=seed)(images, labels)
    assert lengths(adversarial - images).max() <= eps * (1 + 1e-9) + 1e-14  # images are rounded
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*LINF, "PGDL2"])
def test_other_dtypes_stay_in_ball_and_box_but_for_rounding(name, dtype):
    images, labels = batch()
    images = images.to(dtype)
    found = made(name, small_cnn().to(dtype), steps=3)(images, labels)
    moved = (found - images).double()
    slack = torch.finfo(dtype).eps
    assert found.dtype == dtype
    assert (lengths(moved) if name == "PGDL2" else moved.abs()).max() <= (
        1.0 if name == "PGDL2" else 8 / 255
    ) + slack * 2
    assert found.min() >= 0
    assert found.max() <= 1


@pytest.mark.parametrize("name", [*LINF, "PGDL2"])
def test_without_a_radius_the_images_come_back(name):
    images, labels = batch()
    assert made(name, eps=0.0, steps=3)(images, labels).equal(images)


@settings(max_examples=20)
@given(data=st.data(), height=st.integers(3, 12), width=st.integers(3, 12), per_sample=st.booleans())
def test_outside_the_mask_nothing_changes_by_a_bit(data, height, width, per_sample):
    images, labels = batch(4, height=height, width=width)
    shape = (4, 1, height, width) if per_sample else (height, width)
    seed = data.draw(seeds)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    adversarial = attacks.MaskedPGD(MODEL, mask, eps=0.2, alpha=0.1, steps=3, seed=seed)(images, labels)
    outside = ~mask.expand_as(images)
    assert adversarial[outside].equal(images[outside])
    if mask.any():
        assert not adversarial.equal(images)


def test_normalised_images_outside_the_mask_change_by_no_bit():
    images, labels = batch()
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    normalised = (images - torch.tensor(mean).reshape(-1, 1, 1)) / torch.tensor(std).reshape(-1, 1, 1)
    mask = torch.rand(11, 10) < 0.5
    adversarial = attacks.MaskedPGD(MODEL, mask, normalization=(mean, std))(normalised, labels)
    outside = ~mask.expand_as(images)
    assert adversarial[outside].equal(normalised[outside])
    assert ((adversarial - normalised).abs() * torch.tensor(std).reshape(-1, 1, 1)).max() <= 8 / 255 + 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_black_and_white_stay_in_the_bounds_when_they_are_normalised(dtype):
    images, labels = batch()
    mean, std = (
        torch.tensor([0.485, 0.456, 0.406]).reshape(-1, 1, 1),
        torch.tensor([0.229, 0.224, 0.225]).reshape(-1, 1, 1),
    )
    normalised = ((images.float().round() - mean) / std).to(dtype)
    attack = attacks.PGD(small_cnn().to(dtype), eps=0.0, normalization=(mean, std))
    assert attack(normalised, labels).equal(normalised)


@pytest.mark.parametrize("name", ["PGD", "TPGD", "APGD"])
def test_any_layout_of_the_images_is_attacked_alike(name):
    images, labels = batch()
    expected = made(name)(images, labels)
    torch.testing.assert_close(made(name)(images.to(memory_format=torch.channels_last), labels), expected)
    torch.testing.assert_close(made(name)(images.mT.contiguous().mT, labels), expected)


@pytest.mark.parametrize("name", ["PGD", "PGDL2", "MIFGSM", "MaskedPGD"])
def test_every_step_runs_on_the_backend_asked_for(name):
    images, labels = batch()
    options = {"mask": torch.arange(10) % 2 == 0} if name == "MaskedPGD" else {}
    options |= {"eps": torch.linspace(0.1, 0.3, 9), "alpha": 0.05}
    expected = getattr(attacks, name)(MODEL, **options)(images, labels)
    with fairkernels.use_backend("reference"):
        torch.testing.assert_close(getattr(attacks, name)(MODEL, **options)(images, labels), expected)


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PGD", "PGDL2", "MIFGSM", "APGD"])
def test_sizes_per_sample_are_those_of_each_sample_alone(name):
    images, labels = batch(5)
    eps = torch.tensor([0.0, 0.01, 0.02, 0.1, 0.3])
    options = {} if name in ("MIFGSM", "APGD") else {"random_start": False}
    alpha = {} if name == "APGD" else {"alpha": eps / 3}
    together = made(name, eps=eps, steps=4, **alpha, **options)
    if name == "APGD":
        together.start = lambda problem, restart: problem.x
    found = together(images, labels)
    for row, radius in enumerate(eps.tolist()):
        alpha = {} if name == "APGD" else {"alpha": eps[row].item() / 3}
        alone = made(name, eps=radius, steps=4, **alpha, **options)
        if name == "APGD":
            alone.start = lambda problem, restart: problem.x
        torch.testing.assert_close(found[row : row + 1], alone(images[row : row + 1], labels[row : row + 1]))


def test_sizes_carry_no_gradient():
    images, labels = batch()
    eps = torch.full((9,), 0.1, requires_grad=True)
    for name in ("PGD", "APGD"):
        found = made(name, eps=eps, steps=3)(images, labels)
        assert not found.requires_grad
        assert found.equal(made(name, eps=eps.detach(), steps=3)(images, labels))


@pytest.mark.parametrize("name", ["PGD", "FFGSM", "MIFGSM", "APGD", "TPGD"])
def test_sizes_per_class_are_those_of_the_labels(name):
    images, labels = batch()
    radii = torch.linspace(0, 0.3, 7)
    by_class = made(name, eps=attacks.PerClass(radii), steps=3)(images, labels)
    assert by_class.equal(made(name, eps=radii[labels], steps=3)(images, labels))
    reach = (by_class - images).abs().flatten(1).amax(1)
    assert (reach <= radii[labels] + 1e-7).all()
    assert (reach[labels > 0] > 0).all()


def test_sizes_per_class_are_those_of_the_true_labels_where_targets_are_chosen():
    images, labels = batch()
    radii = torch.linspace(0.01, 0.3, 7)
    for targeted in ("random", "least-likely", lambda images, labels: (labels + 1) % 7):
        found = attacks.PGD(MODEL, attacks.PerClass(radii), 0.5, 1, targeted=targeted)(images, labels)
        assert ((found - images).abs().flatten(1).amax(1) <= radii[labels] + 1e-7).all()


# --- strength -----------------------------------------------------------------------------------------------------


def accuracy(attack, data):
    return right(attack.model, attack(data.images, data.labels), data.labels)


NOISE = 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PGD", "MIFGSM", "APGD"])
def test_more_steps_never_help_the_model(name):
    model, data = robust_digits(), held_out()
    found = [accuracy(made(name, model, eps=EPS, steps=steps), data) for steps in (1, 3, 10, 40)]
    assert all(later <= earlier + NOISE for earlier, later in pairwise(found))
    assert found[-1] < found[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LINF, "PGDL2"])
def test_a_larger_radius_never_helps_the_model(name):
    model, data = robust_digits(), held_out()
    scale = 10 if name == "PGDL2" else 1
    alphas = {} if name in ("FGSM", "FFGSM", "APGD") else {"alpha": EPS / 8 * scale}
    found = [accuracy(made(name, model, eps=r * EPS * scale, steps=20, **alphas), data) for r in (0, 0.5, 1, 1.5)]
    assert found[0] == right(model, data.images, data.labels)
    assert all(larger <= smaller + NOISE for smaller, larger in pairwise(found))
    assert found[-1] < found[0] - NOISE


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["last", "best"])
def test_the_best_iterate_and_restarts_are_never_weaker(keep):
    model, data = robust_digits(), held_out(300)
    once, often = (
        accuracy(attacks.PGD(model, EPS, EPS / 2, 5, keep=keep, restarts=restarts), data) for restarts in (1, 8)
    )
    assert often <= once
    if keep == "best":
        assert once <= accuracy(attacks.PGD(model, EPS, EPS / 2, 5), data)


@pytest.mark.parametrize("how", [True, "random", "least-likely", "next"])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_targeted_attacks_reach_their_target(how, loss):
    model, data = robust_digits(), held_out(100)
    seen = []

    def following(images, labels):
        return (labels + 1) % 10

    targeted = following if how == "next" else how
    attack = attacks.PGD(model, 0.6, 0.05, 40, targeted=targeted, loss=loss, keep="best")
    goal, attack.goal = attack.goal, lambda x, labels: seen.append(goal(x, labels)) or seen[-1]
    labels = (data.labels + 3) % 10 if how is True else data.labels
    adversarial = attack(data.images, labels)
    targets = seen[0].labels
    assert (targets != data.labels).all()
    assert right(model, adversarial, targets) > 0.8
    assert right(model, data.images, targets) < 0.05


@pytest.mark.parametrize("targeted", [0, 1])
def test_an_integer_says_whether_an_attack_is_targeted(targeted):
    images, labels = batch()
    expected = attacks.FGSM(MODEL, targeted=bool(targeted))(images, labels)
    assert attacks.FGSM(MODEL, targeted=targeted)(images, labels).equal(expected)


def test_random_targets_are_all_the_other_classes():
    model, data = robust_digits(), held_out(400)
    attack = attacks.PGD(model, targeted="random")
    with torch.no_grad():
        targets = attack.chosen_targets(model(data.images), data.labels, "random")
    ahead = torch.bincount((targets - data.labels) % 10, minlength=10)
    assert ahead[0] == 0
    assert (ahead[1:] > 20).all()


# --- frozen -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PGD", "PGDL2", "MIFGSM"])
def test_a_fooled_sample_moves_no_further(name):
    """It ends where it was first fooled: where an attack of fewer steps, not frozen, has brought it."""
    model, data = robust_digits(), held_out(200)
    size = {"eps": 1.2, "alpha": 0.15} if name == "PGDL2" else {"eps": 0.2, "alpha": 0.03}
    start = {} if name == "MIFGSM" else {"random_start": False}
    frozen = made(name, model, steps=12, freeze=True, **size, **start)(data.images, data.labels)
    expected, fooled = data.images.clone(), model(data.images).argmax(-1) != data.labels
    for steps in range(1, 13):
        step = made(name, model, steps=steps, **size, **start)(data.images, data.labels)
        expected = torch.where(fooled[:, None, None, None], expected, step)
        fooled |= model(step).argmax(-1) != data.labels
    torch.testing.assert_close(frozen, expected)
    assert 0.1 < fooled.double().mean() < 1
