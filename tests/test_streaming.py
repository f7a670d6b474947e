"""The streaming confusion matrix: its average, its state, its sums over processes."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fairkernels.functional as FK
from fairkernels.nn import SoftConfusionMatrix


def batch(seed, samples=12, classes=4, missing=()):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    for absent in missing:
        labels[labels == absent] = (absent + 1) % classes
    return torch.randn(samples, classes, generator=generator), labels


def test_first_batch_is_not_damped():
    logits, labels = batch(0)
    torch.testing.assert_close(SoftConfusionMatrix(4)(logits, labels), FK.soft_confusion(logits, labels))


def test_the_average_is_the_weighted_mean_of_the_batches_in_which_a_class_occurred():
    module, beta = SoftConfusionMatrix(4, momentum=0.7), 0.7
    batches = [batch(seed, missing=(2,) if seed % 2 else ()) for seed in range(6)]
    for logits, labels in batches:
        current = module(logits, labels)
    for row in range(4):
        found = [FK.soft_confusion(z, y)[row] for z, y in batches if (y == row).any()]
        weights = torch.tensor([beta**age for age in reversed(range(len(found)))])
        expected = (weights[:, None] * torch.stack(found)).sum(0) / weights.sum()
        torch.testing.assert_close(current[row], expected)
        assert module.seen[row] == len(found)


def test_gradient_flows_through_the_current_batch_only():
    module = SoftConfusionMatrix(4, momentum=0.5)
    first, labels = batch(0)
    first.requires_grad_()
    module(first, labels)
    second = batch(1)[0].requires_grad_()
    FK.symmetry_gap(module(second, labels)).backward()
    assert first.grad is None

    plain = second.detach().clone().requires_grad_()
    old = FK.soft_confusion(first.detach(), labels)
    share = 0.5 * (1 - 0.5) / (1 - 0.25)
    FK.symmetry_gap((1 - share) * FK.soft_confusion(plain, labels) + share * old).backward()
    torch.testing.assert_close(second.grad, plain.grad)


def test_state_is_saved_and_restored():
    module, other = SoftConfusionMatrix(4), SoftConfusionMatrix(4)
    for seed in range(3):
        module(*batch(seed))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(*batch(9)), copy.deepcopy(module)(*batch(9)))
    other.reset()
    torch.testing.assert_close(other(*batch(9)), FK.soft_confusion(*batch(9)))


def test_eval_stands_still():
    module = SoftConfusionMatrix(4)
    module(*batch(0))
    before = module.confusion.clone()
    module.eval()
    seen = module(batch(1)[0].requires_grad_(), batch(1)[1])
    assert torch.equal(seen, before)
    assert torch.equal(module.confusion, before)
    assert not seen.requires_grad


def test_two_forwards_before_one_backward():
    module = SoftConfusionMatrix(4)
    first, second = (batch(seed)[0].requires_grad_() for seed in (0, 1))
    labels = batch(0)[1]
    (module(first, labels).square().sum() + module(second, labels).square().sum()).backward()
    assert first.grad.isfinite().all()
    assert second.grad.isfinite().all()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_half_precision_and_weights(momentum):
    module = SoftConfusionMatrix(4, momentum=momentum, temperature=2.0, ignore_index=3)
    logits, labels = batch(0)
    weight = torch.rand(12)
    current = module(logits.bfloat16(), labels, sample_weight=weight)
    expected = FK.soft_confusion(logits.bfloat16(), labels, sample_weight=weight, temperature=2.0, ignore_index=3)
    assert current.dtype == torch.bfloat16
    assert module.confusion.dtype == torch.float32
    torch.testing.assert_close(current, expected)


def test_momentum_of_zero_keeps_the_batch():
    module = SoftConfusionMatrix(4, momentum=0.0)
    logits, labels = batch(1)[0], torch.arange(12) % 4
    module(*batch(0))
    torch.testing.assert_close(module(logits, labels), FK.soft_confusion(logits, labels))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be >= 1"),
        ({"num_classes": 4.0}, TypeError, "num_classes must be an int"),
        ({"num_classes": 4, "momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        ({"num_classes": 4, "momentum": -0.1}, ValueError, "momentum must be >= 0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        SoftConfusionMatrix(**arguments)


def test_bad_logits():
    with pytest.raises(ValueError, match=r"logits must be \[B, 4\], got \[2, 12, 4\]"):
        SoftConfusionMatrix(4)(torch.zeros(2, 12, 4), torch.zeros(12, dtype=torch.int64))


# --- several processes --------------------------------------------------------------------------------------------


def joined_batches():
    """Two steps of a joined batch; in the first, class 3 occurs in one half only."""
    inputs = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.stack([torch.arange(20) % 3, torch.arange(20) % 4])
    labels[0, 15:] = 3
    return inputs, labels


def train(model, module, inputs, labels):
    """The streaming loss of two batches; the gradient of the second."""
    for x, y in zip(inputs, labels, strict=True):
        model.zero_grad()
        current = module(model(x), y)
        FK.symmetry_gap(current).backward()
    return current.detach()


def worker(rank, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 4)
    model = torch.nn.parallel.DistributedDataParallel(linear)
    inputs, labels = joined_batches()
    half = slice(10 * rank, 10 * rank + 10)
    module = SoftConfusionMatrix(4, process_group=dist.group.WORLD)
    current = train(model, module, inputs[:, half], labels[:, half])
    torch.save((current, linear.weight.grad, module.seen), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_with_the_joined_batch(tmp_path):
    mp.spawn(worker, (tmp_path / "store", tmp_path), nprocs=2)
    torch.manual_seed(0)
    linear, module = torch.nn.Linear(6, 4), SoftConfusionMatrix(4)
    expected = train(linear, module, *joined_batches())
    for rank in range(2):
        current, grad, seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(current, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad, linear.weight.grad, rtol=1e-6, atol=1e-6)
        assert torch.equal(seen, module.seen)
