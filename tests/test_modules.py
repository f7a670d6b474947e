"""Modules, the compatible functions, and training through them."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

import fairkernels.functional as FK
from fairkernels import nn
from fairkernels.compat import syfar

LOGITS, LABELS = torch.randn(20, 5), torch.arange(20) % 4


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (
            nn.SymmetryLoss(eps=0.2, absent="zero", reduction="mean", temperature=2.0, ignore_index=3),
            FK.symmetry_loss,
        ),
        (nn.SpectralLoss(surrogate="soft", ignore_index=3, class_weight=torch.rand(5)), FK.spectral_loss),
        (nn.FairCrossEntropyLoss(torch.rand(5), spec_weight=0.3, label_smoothing=0.1), FK.fair_cross_entropy),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_module_is_its_function(module, function):
    options = {**module.options(), **dict(module.named_buffers())}
    torch.testing.assert_close(module(LOGITS, LABELS), function(LOGITS, LABELS, **options))
    torch.testing.assert_close(copy.deepcopy(module)(LOGITS, LABELS), module(LOGITS, LABELS))
    for name, value in module.options().items():
        assert value is None or f"{name}={value!r}" in repr(module)


def test_modules_take_sample_weights_and_move_their_buffers():
    weights = torch.rand(20)
    expected = FK.symmetry_loss(LOGITS, LABELS, sample_weight=weights)
    torch.testing.assert_close(nn.SymmetryLoss()(LOGITS, LABELS, sample_weight=weights), expected)
    module = nn.FairCrossEntropyLoss(torch.rand(5)).double()
    assert module.weight.dtype == torch.float64
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    other = nn.FairCrossEntropyLoss(torch.zeros(5).double())
    other.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(other.weight, module.weight)


def test_fair_cross_entropy_is_a_drop_in():
    ours, theirs = nn.FairCrossEntropyLoss(sym_weight=0.0), torch.nn.CrossEntropyLoss()
    torch.testing.assert_close(ours(LOGITS, LABELS), theirs(LOGITS, LABELS))
    total, parts = nn.FairCrossEntropyLoss(spec_weight=0.5, return_parts=True)(LOGITS, LABELS)
    torch.testing.assert_close(total, parts.cross_entropy + parts.symmetry + 0.5 * parts.spectral)


def official_penalty(outputs, labels, classes, eps):
    """What the official training code computes, in its own manner: sample by sample, pair by pair (transcribed)."""
    probabilities = torch.softmax(outputs, 1)
    rows = []
    for i in range(classes):
        members = probabilities[labels == i]
        rows.append(members.mean(0) if len(members) else torch.zeros(classes, dtype=outputs.dtype))
    total = outputs.new_zeros(())
    for i in range(classes):
        for j in range(i + 1, classes):
            a, b = rows[i][j], rows[j][i]
            total = total + (a - b).abs() / (a + b + eps) * (a + b)
    return total


@pytest.mark.parametrize(("samples", "classes"), [(8, 10), (64, 10), (16, 25)])
def test_compat_is_the_official_loop(samples, classes):
    outputs = torch.randn(samples, classes, dtype=torch.float64)
    labels = torch.randint(classes, (samples,))
    ours, theirs = outputs.clone().requires_grad_(), outputs.clone().requires_grad_()
    value, expected = (
        syfar.symmetry_penalty(ours, labels, classes),
        official_penalty(theirs, labels, classes, 0.1),
    )
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    if samples == 8:
        assert value > FK.symmetry_loss(outputs, labels) + 0.1  # the charge for absent classes is in it


def test_training_lowers_the_gap():
    torch.manual_seed(0)
    inputs, labels = torch.randn(120, 8), torch.arange(120) % 3
    inputs[labels == 1] += 0.7
    model, loss = torch.nn.Linear(8, 3), nn.FairCrossEntropyLoss(sym_weight=3.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    before = FK.symmetry_loss(model(inputs), labels).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss(model(inputs), labels).backward()
        optimizer.step()
    assert FK.symmetry_loss(model(inputs), labels).item() < before / 2
    assert F.cross_entropy(model(inputs), labels).item() < 1.1
