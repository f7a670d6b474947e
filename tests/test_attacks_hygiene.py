"""What an attack leaves as it found it, and what it refuses."""

import pickle
import re
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from attacked import batch, small_cnn
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fairkernels import attacks, use_backend
from fairkernels import functional as FK
from fairkernels.attacks import capture, objective

HALF = torch.arange(10) % 2 == 0


def every_attack(model, **options):
    return [
        attacks.FGSM(model, **options),
        attacks.FFGSM(model, **options),
        attacks.PGD(model, steps=2, **options),
        attacks.PGDL2(model, steps=2, **options),
        attacks.TPGD(model, steps=2, **options),
        attacks.MIFGSM(model, steps=2, **options),
        attacks.APGD(model, steps=5, **options),
        attacks.MaskedPGD(model, HALF, steps=2, **options),
        attacks.EyeglassAttack(model, steps=2, **options),
        attacks.FaceMaskAttack(model, steps=2, **options),
        attacks.ROA(model, (4, 3), (3, 3), steps=2, **options),
    ]


def names(attack):
    return type(attack).__name__


class Noisy(nn.Module):
    """Random in eval mode, too."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images + 0.05 * torch.randn_like(images))


class Breaking(nn.Module):
    """Fails after some passes."""

    def __init__(self, model, passes):
        super().__init__()
        self.model, self.passes = model, passes

    def forward(self, images):
        self.passes -= 1
        if self.passes < 0:
            raise ArithmeticError("broken")
        return self.model(images)


def marked(model):
    """In training mode but for a frozen BatchNorm, one parameter with a gradient, the others without."""
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.eval()
    first = next(model.parameters())
    first.grad = torch.full_like(first, 3.0)
    return model


def state(model):
    modes = [module.training for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    values = [value.clone() for value in model.state_dict().values()]
    return modes, grads, values, [p.requires_grad for p in model.parameters()]


def assert_as_before(model, before):
    modes, grads, values, flags = state(model)
    assert (modes, flags) == (before[0], before[3])
    for now, then in zip(grads, before[1], strict=True):
        assert (now is None) == (then is None)
        assert now is None or now.equal(then)
    assert all(now.equal(then) for now, then in zip(values, before[2], strict=True))


# --- hygiene ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", every_attack(small_cnn()), ids=names)
def test_nothing_is_left_behind(attack):
    images, labels = batch()
    given = images.clone(), labels.clone()
    before, generator = state(marked(attack.model)), torch.get_rng_state()
    adversarial = attack(images, labels)
    assert_as_before(attack.model, before)
    assert torch.get_rng_state().equal(generator)
    assert images.equal(given[0])
    assert labels.equal(given[1])
    assert adversarial.data_ptr() != images.data_ptr()
    assert not adversarial.requires_grad
    assert (adversarial.dtype, adversarial.shape) == (images.dtype, images.shape)


@pytest.mark.parametrize("attack", every_attack(small_cnn()), ids=names)
def test_the_operator_that_is_named_is_the_one_that_steps(monkeypatch, attack):
    steps, step = [], FK.pgd_step
    monkeypatch.setattr(FK, "pgd_step", lambda *args, **options: steps.append("pgd_step") or step(*args, **options))
    attack(*batch())
    assert set(steps) == ({attack.operator} if attack.operator else set())


def test_attacks_go_through_pickle():
    attack, data = attacks.PGD(small_cnn(), normalization=([0.0] * 3, [1.0] * 3)), batch()
    attack(*data)
    copied = pickle.loads(pickle.dumps(attack))
    assert copied(*data).equal(attack(*data))


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_nothing_is_left_behind_after_an_exception(passes):
    model = Breaking(small_cnn(), passes)
    before = state(marked(model))
    with pytest.raises(ArithmeticError):
        attacks.PGD(model)(*batch())
    assert_as_before(model, before)


def test_the_model_is_in_eval_mode_meanwhile():
    model, seen = marked(small_cnn()), []
    model.register_forward_hook(lambda module, *_: seen.extend(child.training for child in module.modules()))
    attacks.PGD(model, steps=3)(*batch())
    assert seen
    assert not any(seen)


def test_frozen_batchnorm_thawed_after_the_attack():
    """torchattacks calls ``model.train()``."""
    model = small_cnn().train()
    model[1].eval()
    attacks.PGD(model)(*batch())
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_where_the_caller_takes_none(context):
    model, (images, labels) = small_cnn(), batch()
    expected = attacks.PGD(model)(images, labels)
    with context():
        assert attacks.PGD(model)(images.clone(), labels.clone()).equal(expected)


def test_half_precision_does_not_underflow():
    """A mean over a large batch divides the gradient by its size; a sum does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).half()
    with torch.no_grad():
        model[1].weight.mul_(1e-4)
    images, labels = torch.rand(4096, 3, 2, 2).half(), torch.randint(5, (4096,))
    moved = attacks.FGSM(model)(images, labels) != images
    assert moved.float().mean() > 0.95


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: reading a value, sizes that depend on values."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["PGD", "PGDL2", "TPGD", "MIFGSM", "APGD", "EyeglassAttack", "FaceMaskAttack", "ROA"])
def test_no_step_waits_for_the_device(name):
    model, data = small_cnn(), batch()
    options = {"size": 3, "stride": 3} if name == "ROA" else {}
    options |= {"freeze": True, "eot": 2} | ({} if name == "APGD" else {"keep": "best"})
    counts = []
    for steps in (1, 30):
        with Waits() as waits:
            getattr(attacks, name)(model, steps=steps, **options)(*data)
        counts.append(waits.count)
    assert counts[0] == counts[1]


# --- seeds --------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_attack_and_each_call_another_start():
    model, data = small_cnn(), batch()
    one, same, other = (attacks.PGD(model, seed=seed) for seed in (5, 5, 6))
    first = one(*data)
    assert first.equal(same(*data))
    assert not first.equal(other(*data))
    second = one(*data)
    assert not first.equal(second)
    assert second.equal(same(*data))


def test_what_a_random_model_draws_comes_from_the_attack():
    data, noisy = batch(), Noisy(small_cnn())
    torch.manual_seed(1)
    first = attacks.PGD(noisy, eot=3, seed=2)(*data)
    untouched = torch.rand(5)
    torch.manual_seed(1)
    assert torch.rand(5).equal(untouched)
    assert attacks.PGD(noisy, eot=3, seed=2)(*data).equal(first)


def test_the_expectation_over_a_random_model_is_the_mean_of_its_gradients():
    class Alternating(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, images):
            self.calls += 1
            slope = images.flatten(1) @ torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
            return slope * (3.0 if self.calls % 2 else -1.0)

    images = torch.full((1, 1, 1, 2), 0.5)
    moved = attacks.FGSM(Alternating(), eps=0.1, eot=2, loss="margin")(images, torch.tensor([0]))
    torch.testing.assert_close(moved.flatten(), torch.tensor([0.4, 0.6]))


# --- refusals -----------------------------------------------------------------------------------------------------


def refused(error, words, model=None, images=None, labels=None, **options):
    good = batch()
    images, labels = (good[0] if images is None else images, good[1] if labels is None else labels)
    with pytest.raises(error, match=re.escape(words)):
        attacks.PGD(model or small_cnn(), **options)(images, labels)


def test_images_that_are_none_are_refused():
    images, _ = batch()
    refused(ValueError, "images must be in [0.0, 1.0], got values from", images=images * 255)
    refused(ValueError, "got values from nan", images=images / 0 * 0)
    refused(TypeError, "images must be float32, float64", images=(images * 255).to(torch.uint8))
    refused(ValueError, "images must be [N, C, H, W], got [11, 10]", images=images[0, 0])
    refused(TypeError, "images must be a torch.Tensor, got ndarray", images=images.numpy())
    refused(ValueError, "must be normalised as said", images=images * 9, normalization=([0.5] * 3, [0.2] * 3))
    refused(ValueError, "normalization is for 2 channels", normalization=([0.5] * 2, [0.2] * 2))


def test_labels_that_are_none_are_refused():
    _, labels = batch()
    with pytest.raises(TypeError, match="labels are missing"):
        attacks.PGD(small_cnn())(batch()[0])
    refused(ValueError, "labels must be [9] like images [9, 3, 11, 10], got [3]", labels=labels[:3])
    refused(TypeError, "labels must hold integers", labels=labels.double())
    refused(IndexError, "labels[0] must be in [0, 7), got 7", labels=torch.full((9,), 7))
    outside = torch.tensor([0] * 8 + [-100])
    for how in (False, True, "random", "least-likely"):
        refused(IndexError, "labels[8] must be in [0, 7), got -100", labels=outside, targeted=how)
    radii = attacks.PerClass(torch.full((3,), 0.1))
    refused(IndexError, "labels[1] must be in [0, 3), got 5", labels=torch.tensor([0, 5] + [0] * 7), eps=radii)


def test_where_nobody_looks_a_label_that_is_none_moves_no_sample(monkeypatch):
    """On a GPU the check would wait for the device; here what it would raise is left out."""
    monkeypatch.setattr(objective, "known", lambda labels, classes: (labels.clamp(0, 6), labels < classes))
    images, labels = batch(height=24, width=20)
    labels[2] = 9
    other = torch.arange(9) != 2
    for name, options in {"PGD": {"random_start": False}, "PGDL2": {"random_start": False}, "MIFGSM": {}}.items():
        moved = (getattr(attacks, name)(small_cnn(), **options)(images, labels) != images).flatten(1).any(1)
        assert moved.equal(other)
    painted, after = (attacks.EyeglassAttack(small_cnn(), steps=n)(images, labels) for n in (0, 3))
    assert (painted != after).flatten(1).any(1).equal(other)


def test_models_that_give_no_logits_or_no_gradient_are_refused():
    inner = small_cnn()
    for attack in [*every_attack(lambda x: (inner(x), x)), attacks.PGD(lambda x: (inner(x),), targeted="random")]:
        with pytest.raises(TypeError, match=re.escape("the model must return logits [N, K], got tuple")):
            attack(*batch())
    refused(ValueError, "the model must return logits [9, K], got [9]", model=lambda x: inner(x).sum(1))
    refused(RuntimeError, "the model gives no gradient", model=lambda x: inner(x).detach())
    refused(RuntimeError, "the model gives no gradient", model=lambda x: inner(torch.ones_like(x).requires_grad_()))
    refused(TypeError, "model must be a module or a function, got str", model="resnet")


def test_options_that_are_none_are_refused():
    refused(ValueError, "eps must be >= 0, got -1", eps=-1)
    refused(TypeError, "alpha must be a number, got str", alpha="2/255")
    refused(ValueError, "eps must be >= 0, got [-1.0]", eps=torch.tensor([-1.0]))
    refused(ValueError, "eps must broadcast to [9, 3, 11, 10], got [4]", eps=torch.ones(4))
    refused(ValueError, "bounds must be (lowest, highest), got (1, 0)", bounds=(1, 0))
    refused(ValueError, "restarts must be >= 1, got 0", restarts=0)
    refused(ValueError, "loss must be one of 'ce', 'margin', 'dlr'", loss="cw")
    refused(ValueError, "keep must be one of 'last', 'best', got 'worst'", keep="worst")
    refused(ValueError, "targeted must be one of False, True, 'random', 'least-likely'", targeted="least_likely")
    refused(ValueError, "loss must give one value a sample, [9], got []", loss=nn.functional.cross_entropy)
    refused(TypeError, "what loss gives must be a torch.Tensor, got float", loss=lambda logits, labels: 0.5)
    refused(
        ValueError,
        "loss='dlr' needs at least 3 classes, got 2",
        small_cnn(classes=2),
        loss="dlr",
        labels=torch.zeros(9, dtype=torch.long),
    )
    with pytest.raises(ValueError, match="TPGD leaves the clean prediction: it takes no targeted"):
        attacks.TPGD(small_cnn(), targeted=True)
    with pytest.raises(ValueError, match="it takes no keep"):
        attacks.APGD(small_cnn(), keep="last")
    with pytest.raises(ValueError, match="values must be "):
        attacks.PerClass(torch.ones(7, 1))
    with pytest.raises(ValueError, match="search_batch must be >= 1 and grey <= 1"):
        attacks.ROA(small_cnn(), grey=128)
    for attack in (attacks.MaskedPGD, attacks.EyeglassAttack, attacks.FaceMaskAttack):
        with pytest.raises(ValueError, match="mask must broadcast to"):
            attack(small_cnn(), mask=torch.ones(5, 5))(*batch())
    with pytest.raises(ValueError, match="size must fit into images of 11x10, got 70x70"):
        attacks.ROA(small_cnn())(*batch())


@pytest.mark.parametrize("attack", every_attack(small_cnn()), ids=names)
def test_an_empty_batch_comes_back_empty(attack):
    images, labels = batch()
    assert attack(images[:0], labels[:0]).shape == (0, 3, 11, 10)


# --- capture and compile ------------------------------------------------------------------------------------------


def test_cuda_graphs_are_refused_on_the_cpu():
    refused(RuntimeError, "capture=True was asked for, but CUDA graphs need images on a GPU, got cpu", capture=True)


def test_what_is_compiled_already_is_refused():
    model = torch.compile(small_cnn(), backend="eager")
    refused(RuntimeError, "compile=True was asked for, but the model is compiled already", model, compile=True)


@pytest.mark.slow
def test_a_compiled_model_is_attacked_alike():
    model, (images, labels) = marked(small_cnn()), batch()
    before = state(model)
    expected = attacks.PGD(model, steps=3)(images, labels)
    attack = attacks.PGD(model, steps=3, compile=True)
    torch.testing.assert_close(attack(images, labels), expected)
    assert_as_before(model, before)


class Replayed:
    """What a CUDA graph does, on the CPU: the recorded loop again, on the recorded memory."""

    def __init__(self, monkeypatch):
        self.records = 0
        monkeypatch.setattr(capture, "why_no_graph", lambda model, images: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", self.recording)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self.Graph())
        climb = attacks.Attack.climb

        def noted(attack, problem, start):
            results = climb(attack, problem, start)
            self.last = partial(climb, attack, problem, start), results
            return results

        monkeypatch.setattr(attacks.Attack, "climb", noted)

    def wait_stream(self, other):
        pass

    @contextmanager
    def recording(self, graph, stream):
        assert stream is self  # without one it would be that of another device perhaps
        self.records += 1
        yield
        graph.loop, graph.results = self.last

    class Graph:
        def replay(self):
            for result, fresh in zip(self.results, self.loop(), strict=True):
                result.copy_(fresh)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PGD", {"keep": "best", "restarts": 2, "eps": attacks.PerClass(torch.linspace(0, 0.2, 7))}),
        ("TPGD", {}),
        ("MIFGSM", {"freeze": True, "targeted": "random"}),
        ("APGD", {"normalization": ([0.5] * 3, [0.5] * 3)}),
        ("FaceMaskAttack", {}),
        ("ROA", {"size": 3, "stride": 3}),
    ],
)
def test_what_is_recorded_is_fed_every_call_anew(monkeypatch, name, options):
    model, (images, labels) = small_cnn(), batch()
    plain, captured = (getattr(attacks, name)(model, steps=4, capture=wanted, **options) for wanted in (False, True))
    data = [(images, labels), (images.flip(0) * 0.9, labels.flip(0)), (images[:4], labels[:4]), (images, labels)]
    data = [(2 * x - 1, y) for x, y in data] if "normalization" in options else data
    expected = [plain(*given) for given in data]
    replayed = Replayed(monkeypatch)
    found = [captured(*given) for given in data]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert replayed.records == 2  # one for each shape


def test_what_is_burnt_in_is_recorded_anew(monkeypatch):
    model, data = small_cnn(), batch()
    replayed = Replayed(monkeypatch)
    attack = attacks.PGD(model, capture=True)
    attack(*data)
    attack.eps = 0.2
    attack(*data)
    attack.steps = 3
    attack(*data)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    attack(*data)
    assert replayed.records == 3
    model[0] = nn.Conv2d(3, 8, 3, padding=1).double()
    attack(*data)
    assert replayed.records == 4
    attack.bounds = (-1.0, 1.0)
    attack(*data)
    assert replayed.records == 5
    with use_backend("reference"):
        attack(*data)
    assert replayed.records == 6
    for steps in range(1, 12):
        attack.steps = steps
        attack(*data)
    assert len(attack.graphs.recorded) == capture.MOST_GRAPHS


def test_a_loop_is_recorded_without_the_cache_of_autocast(monkeypatch):
    """A replay would read casts of the weights that are gone by then."""
    model, cached = small_cnn(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x: cached.append(torch.is_autocast_cache_enabled()) or forward(x))
    Replayed(monkeypatch)
    attacks.PGD(model, steps=1, capture=True)(*batch())
    assert cached == [True] * capture.WARM_UP + [False] + [True]  # the last is the replay, which here is the loop


def test_a_changed_momentum_is_recorded_anew(monkeypatch):
    replayed = Replayed(monkeypatch)
    attack = attacks.MIFGSM(small_cnn(), capture=True)
    attack(*batch())
    attack.decay = 0.5
    attack(*batch())
    assert replayed.records == 2


def test_graphs_are_refused_where_a_replay_would_not_be_the_loop(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0))

    def reason(model, images=on_gpu):
        return capture.why_no_graph(model, images)

    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    if not torch.cuda.is_available():
        assert "weights on cpu" in reason(nn.Linear(2, 2))
    assert "hooks" in reason(hooked)
    hooked_backward = nn.Linear(2, 2)
    hooked_backward.register_full_backward_hook(lambda *_: None)
    assert "hooks" in reason(hooked_backward)
    assert "only a module" in reason(lambda x: x)
    assert "compiled already" in reason(torch.compile(nn.Linear(2, 2), backend="eager"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("attack", ["PGD", "APGD", "MIFGSM", "TPGD"])
def test_a_captured_loop_is_the_loop(attack):
    model = small_cnn().float().cuda()
    images, labels = batch()
    images, labels = images.float().cuda(), labels.cuda()
    plain, captured = (getattr(attacks, attack)(model, steps=4, capture=capture) for capture in (False, True))
    for _ in range(3):
        torch.testing.assert_close(captured(images, labels), plain(images, labels))
        images, labels = images.flip(0), labels.flip(0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_loop_is_captured_on_the_gpu_of_its_images():
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        model = small_cnn().float().to(device)
        images, labels = (tensor.to(device) for tensor in batch())
        plain, captured = (attacks.PGD(model, steps=4, capture=capture) for capture in (False, True))
        for other in (images.float(), images.float().flip(0)):
            torch.testing.assert_close(captured(other, labels), plain(other, labels))
