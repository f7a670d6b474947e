"""Theorems and invariances, over whatever hypothesis thinks of."""

import pytest
import torch
from cases import BACKENDS

pytest.importorskip("hypothesis")

import hypothesis
import hypothesis.strategies as st

import fairkernels.functional as FK

backends = st.sampled_from(BACKENDS)
seeds = st.integers(0, 2**31)


@st.composite
def square_rates(draw, most=12):
    """``[K, K]`` row-stochastic, some entries exactly 0."""
    classes, seed = draw(st.integers(1, most)), draw(seeds)
    generator = torch.Generator().manual_seed(seed)
    rates = torch.rand(classes, classes, generator=generator, dtype=torch.float64)
    rates = torch.where(torch.rand(classes, classes, generator=generator) < draw(st.floats(0, 0.7)), 0, rates)
    rates = rates + 1e-3 * torch.eye(classes)
    return rates / rates.sum(-1, keepdim=True)


@st.composite
def batches(draw):
    samples, classes, seed = draw(st.integers(1, 40)), draw(st.integers(1, 12)), draw(seeds)
    generator = torch.Generator().manual_seed(seed)
    logits = draw(st.sampled_from([0.1, 1.0, 10.0])) * torch.randn(samples, classes, generator=generator).double()
    return logits, torch.randint(classes, (samples,), generator=generator)


def disjoint_subsets(classes, seed):
    groups = torch.randint(3, (classes,), generator=torch.Generator().manual_seed(seed))
    return (groups == 0).nonzero().flatten(), (groups == 1).nonzero().flatten()


def mass(confusion, a, b):
    return confusion[a][:, b].sum()


@hypothesis.given(square_rates(), backends)
def test_a_symmetric_matrix_has_no_gap(confusion, backend):
    assert FK.symmetry_gap(confusion + confusion.mT, backend=backend).item() == 0


@hypothesis.given(square_rates(), seeds)
def test_subgroups_inherit_symmetry(confusion, seed):
    symmetric = (confusion + confusion.mT) / 2
    a, b = disjoint_subsets(len(confusion), seed)
    torch.testing.assert_close(mass(symmetric, a, b), mass(symmetric, b, a))


@hypothesis.given(square_rates(), seeds, backends)
def test_asymmetry_between_subgroups_is_bounded_by_the_pairs(confusion, seed, backend):
    a, b = disjoint_subsets(len(confusion), seed)
    difference = (mass(confusion, a, b) - mass(confusion, b, a)).abs()
    pairs = (confusion[a][:, b] - confusion[b][:, a].mT).abs().sum()
    total = FK.symmetry_gap(confusion, eps=0.0, backend=backend)
    assert difference <= pairs + 1e-12
    assert pairs <= total + 1e-12


@hypothesis.given(batches(), seeds, backends)
def test_names_of_classes_do_not_matter(batch, seed, backend):
    logits, labels = batch
    order = torch.randperm(logits.shape[-1], generator=torch.Generator().manual_seed(seed))
    renamed, names = logits[:, order], order.argsort()[labels]
    torch.testing.assert_close(
        FK.symmetry_loss(renamed, names, backend=backend), FK.symmetry_loss(logits, labels, backend=backend)
    )
    torch.testing.assert_close(
        FK.soft_confusion(renamed, names, backend=backend),
        FK.soft_confusion(logits, labels, backend=backend)[order][:, order],
    )
    torch.testing.assert_close(FK.spectral_loss(renamed, names), FK.spectral_loss(logits, labels))


@hypothesis.given(batches(), seeds, backends)
def test_order_of_samples_does_not_matter(batch, seed, backend):
    logits, labels = batch
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    expected = FK.symmetry_loss(logits, labels, backend=backend)
    torch.testing.assert_close(FK.symmetry_loss(logits[order], labels[order], backend=backend), expected)


@hypothesis.given(batches(), st.floats(-50, 50), backends)
def test_a_constant_added_to_a_row_changes_nothing(batch, constant, backend):
    logits, labels = batch
    torch.testing.assert_close(
        FK.symmetry_loss(logits + constant, labels, backend=backend),
        FK.symmetry_loss(logits, labels, backend=backend),
        rtol=1e-7,
        atol=1e-9,
    )


@hypothesis.given(batches(), backends)
def test_integer_weights_are_repetitions(batch, backend):
    logits, labels = batch
    times = torch.arange(len(labels)) % 3
    weighted = FK.symmetry_loss(logits, labels, sample_weight=times.double(), backend=backend)
    repeated = FK.symmetry_loss(logits.repeat_interleave(times, 0), labels.repeat_interleave(times), backend=backend)
    torch.testing.assert_close(weighted, repeated)


@hypothesis.given(batches(), backends)
def test_loss_of_logits_is_the_gap_of_their_confusion(batch, backend):
    for absent in ("ignore", "zero"):
        confusion, counts = FK.soft_confusion(*batch, return_counts=True, backend=backend)
        torch.testing.assert_close(
            FK.symmetry_loss(*batch, absent=absent, backend=backend),
            FK.symmetry_gap(confusion, counts, absent=absent, backend=backend),
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@hypothesis.given(seeds, st.floats(0, 0.5), st.floats(0, 2), st.sampled_from(["linf", "l2"]), backends)
def test_a_step_stays_in_ball_and_box(dtype, seed, eps, alpha, norm, backend):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 2, 6, generator=generator).to(dtype)
    x_adv = FK.random_start(x, eps=eps, norm=norm, seed=seed, backend=backend)
    for _ in range(3):
        grad = torch.randn(x.shape, generator=generator).to(dtype)
        x_adv = FK.pgd_step(x_adv, grad, x, alpha=alpha, eps=eps, norm=norm, backend=backend)
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        ulp = torch.finfo(dtype).eps  # of 1: rounding alone may leave the ball by as much
        delta = (x_adv.double() - x.double()).flatten(1)
        distance = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1) / delta.shape[1] ** 0.5
        radius = eps if norm == "linf" else eps / delta.shape[1] ** 0.5
        assert (distance <= radius + ulp).all()


@hypothesis.given(seeds, backends)
def test_an_ascent_step_raises_a_linear_loss(seed, backend):
    generator = torch.Generator().manual_seed(seed)
    x, grad = torch.rand(3, 9, generator=generator), torch.randn(3, 9, generator=generator)
    for norm in ("linf", "l2"):
        up = FK.pgd_step(x, grad, x, alpha=0.1, eps=0.2, norm=norm, backend=backend)
        down = FK.pgd_step(x, grad, x, alpha=0.1, eps=0.2, norm=norm, targeted=True, backend=backend)
        assert ((up - x) * grad).sum() > 0 > ((down - x) * grad).sum()
