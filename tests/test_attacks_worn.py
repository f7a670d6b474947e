"""Eyeglasses, face masks and rectangles: their shapes, their search, what they leave alone."""

import numpy as np
import pytest
import torch
from attacked import batch, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image as pictures
from torch import nn

from fairkernels import attacks
from fairkernels.attacks import roa

WORN = [("EyeglassAttack", attacks.eyeglasses), ("FaceMaskAttack", attacks.face_mask)]

sizes = st.integers(16, 80)


# --- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("draw", "least", "most"), [(attacks.eyeglasses, 0.04, 0.2), (attacks.face_mask, 0.15, 0.35)])
@settings(max_examples=25)
@given(height=sizes, width=sizes)
def test_shapes_are_symmetric_and_of_moderate_size(draw, least, most, height, width):
    drawn = draw(height, width)
    assert drawn.shape == (height, width)
    assert drawn.dtype == torch.bool
    assert drawn.equal(drawn.flip(1))
    assert least < drawn.double().mean() < most


def test_shapes_lie_where_they_are_worn():
    glasses, mask = attacks.eyeglasses(100, 100), attacks.face_mask(100, 100)
    assert not (glasses & mask).any()
    assert not glasses[45, 25:33].any()  # one sees through the lenses
    assert glasses[:60].sum() == glasses.sum()
    assert mask[57:].sum() > 0.9 * mask.sum()


@pytest.mark.parametrize("draw", [attacks.eyeglasses, attacks.face_mask])
def test_shapes_of_no_size_are_refused(draw):
    with pytest.raises(ValueError, match="width must be >= 1, got 0"):
        draw(10, 0)
    with pytest.raises(TypeError, match="height must be an int, got float"):
        draw(10.5, 10)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_shapes_are_loaded_from_pictures(tmp_path, channels):
    drawn = attacks.face_mask(40, 30).numpy()
    picture = np.repeat(drawn[..., None].astype(np.float64), channels, -1)
    pictures.imsave(tmp_path / "mask.png", picture[..., 0] if channels == 1 else picture, cmap="gray")
    assert attacks.load_shape(tmp_path / "mask.png", 40, 30).numpy().tolist() == drawn.tolist()
    twice = attacks.load_shape(tmp_path / "mask.png", 80, 60)
    assert twice[::2, ::2].numpy().tolist() == drawn.tolist()


def test_shapes_are_loaded_from_arrays(tmp_path):
    np.save(tmp_path / "mask.npy", np.eye(5))
    assert attacks.load_shape(tmp_path / "mask.npy", 5, 5).equal(torch.eye(5).bool())
    np.save(tmp_path / "none.npy", np.zeros((5, 5)))
    with pytest.raises(ValueError, match="must hold a shape"):
        attacks.load_shape(tmp_path / "none.npy", 5, 5)
    with pytest.raises(FileNotFoundError):
        attacks.load_shape(tmp_path / "missing.png", 5, 5)


# --- what is worn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [None, "per sample"])
@pytest.mark.parametrize(
    ("attack", "drawn"), [("EyeglassAttack", attacks.eyeglasses), ("FaceMaskAttack", attacks.face_mask)]
)
def test_what_is_worn_raises_the_loss_and_leaves_the_face_alone(attack, drawn, shape, channels):
    model, (images, labels) = small_cnn(channels), batch(channels=channels, height=32, width=24)
    mask = drawn(32, 24) if shape is None else torch.rand(9, 1, 32, 24) < 0.3
    options = {} if shape is None else {"mask": mask}
    adversarial = getattr(attacks, attack)(model, steps=20, restarts=2, **options)(images, labels)
    outside = ~mask.expand_as(images)
    assert adversarial[outside].equal(images[outside])
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    before, after = (nn.functional.cross_entropy(model(x), labels, reduction="none") for x in (images, adversarial))
    assert (after > before).all()


def test_the_frames_start_at_the_worst_of_the_colours():
    model, (images, labels) = small_cnn(), batch(height=32, width=24)
    glasses = attacks.eyeglasses(32, 24)
    started = attacks.EyeglassAttack(model, steps=0)(images, labels)
    losses = []
    for colour in ((128, 128, 128), (220, 130, 0), (160, 105, 55), (200, 175, 30), (220, 210, 50)):
        painted = torch.where(glasses, torch.tensor(colour).reshape(3, 1, 1) / 255, images)
        losses.append(nn.functional.cross_entropy(model(painted), labels, reduction="none"))
    found = nn.functional.cross_entropy(model(started), labels, reduction="none")
    torch.testing.assert_close(found, torch.stack(losses).amax(0), atol=1e-6, rtol=0)


def test_eyeglasses_take_steps_per_sample_and_class():
    model, (images, labels) = small_cnn(), batch(4, height=24, width=4)  # as wide as the batch is large
    alphas = torch.tensor([0.0, 0.01, 0.05, 0.2])
    found = attacks.EyeglassAttack(model, steps=3, alpha=alphas)(images, labels)
    for row, alpha in enumerate(alphas.tolist()):
        alone = attacks.EyeglassAttack(model, steps=3, alpha=alpha)(images[row : row + 1], labels[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], alone)
    by_class = attacks.PerClass(torch.linspace(0, 0.3, 7))
    expected = attacks.EyeglassAttack(model, steps=3, alpha=by_class.values[labels])(images, labels)
    assert attacks.EyeglassAttack(model, steps=3, alpha=by_class)(images, labels).equal(expected)


def test_the_pattern_of_a_face_mask_is_as_coarse_as_its_grid():
    images, labels = torch.full((2, 3, 32, 32), 0.5, dtype=torch.float64), torch.tensor([1, 2])
    attack = attacks.FaceMaskAttack(small_cnn(), steps=1, alpha=0.1, grid=(2, 2), mask=torch.ones(32, 32))
    moved = attack(images, labels) - images
    assert moved.abs().max() <= 0.1 + 1e-12
    assert (moved[..., :8, :8] - moved[..., :1, :1]).abs().max() < 1e-12
    torch.testing.assert_close(moved.diff(dim=-1).diff(dim=-1)[..., 9:21], torch.zeros(2, 3, 32, 12).double())


# --- rectangles ---------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_all_rectangles_are_tried_the_last_that_fits_included(height, width, rows, columns, stride):
    rows, columns = min(rows, height), min(columns, width)
    places = roa.rectangles(height, width, (rows, columns), (stride, stride), torch.device("cpu"))
    assert (places.sum((1, 2)) == rows * columns).all()
    corners = {tuple(place.nonzero()[0].tolist()) for place in places}
    assert len(corners) == len(places)
    wanted = [{*range(0, room + 1, stride), room} for room in (height - rows, width - columns)]
    assert corners == {(top, left) for top in wanted[0] for left in wanted[1]}


@pytest.mark.parametrize("search_batch", [1, 20, 10_000])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_rectangle_is_the_worst_of_all(search_batch, targeted):
    model, (images, labels) = small_cnn(), batch()
    attack = attacks.ROA(model, (4, 3), (2, 3), steps=0, search_batch=search_batch, targeted=targeted)
    sign = -1 if targeted else 1
    losses = []
    for place in roa.rectangles(11, 10, (4, 3), (2, 3), images.device):
        painted = torch.where(place, 0.5, images)
        losses.append(sign * nn.functional.cross_entropy(model(painted), labels, reduction="none"))
    found = sign * nn.functional.cross_entropy(model(attack(images, labels)), labels, reduction="none")
    torch.testing.assert_close(found, torch.stack(losses).amax(0))


def test_the_search_takes_many_rectangles_at_once():
    model, (images, labels) = small_cnn(), batch()
    sizes = []
    model.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    attacks.ROA(model, 2, 1, steps=0, search_batch=300)(images, labels)
    assert sum(sizes) == 10 * 9 * 9
    assert len(sizes) == 3


@pytest.mark.parametrize("channels", [1, 3])
def test_outside_its_rectangle_roa_changes_no_bit(channels):
    model, (images, labels) = small_cnn(channels), batch(channels=channels)
    adversarial = attacks.ROA(model, (4, 3), 2, alpha=0.1, steps=10)(images, labels)
    touched = (adversarial != images).any(1)
    for sample in touched:
        rows, columns = sample.nonzero().T
        assert rows.max() - rows.min() < 4
        assert columns.max() - columns.min() < 3
    searched = attacks.ROA(model, (4, 3), 2, steps=0)(images, labels)
    loss = nn.functional.cross_entropy
    assert loss(model(adversarial), labels) > loss(model(searched), labels)
