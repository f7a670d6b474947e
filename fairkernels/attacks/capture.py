"""The loop as one CUDA graph, and the compiled model: opt-in, and refused with a reason where they are not safe."""

from __future__ import annotations

import os
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fairkernels.ops import dispatch

if TYPE_CHECKING:
    from .base import Attack, Problem

MOST_GRAPHS = 8  # of an attack; each holds the memory of its loop
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
WARM_UP = 2  # rounds before a capture, in which libraries choose their algorithms


# --- CUDA graphs --------------------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    results: tuple[Tensor, ...]


class Graphs:
    """Loops recorded for every kind of call: shapes, options, and where the weights lie; the oldest are forgotten."""

    def __init__(self) -> None:
        self.recorded: OrderedDict[Any, Recorded] = OrderedDict()

    def __call__(self, attack: Attack, problem: Problem, start: Tensor) -> tuple[Tensor, ...]:
        reason = why_no_graph(attack.model, start)
        if reason is not None:
            raise RuntimeError(f"capture=True was asked for, but {reason}")

        leaves, tree = pytree.tree_flatten((problem, start))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = self.kind(attack, leaves)
        if key not in self.recorded:
            self.recorded[key] = record(attack, leaves, tree)
            while len(self.recorded) > MOST_GRAPHS:
                self.recorded.popitem(last=False)
        self.recorded.move_to_end(key)

        found = self.recorded[key]
        for static, value in zip(found.inputs, given, strict=True):
            static.copy_(value)
        found.graph.replay()
        return tuple(result.clone() for result in found.results)

    def kind(self, attack: Attack, leaves: list[Any]) -> Any:
        """Whatever a recording has burnt in."""
        arguments = tuple(layout(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        plain = (bool, int, float, str, tuple)
        options = {name: value for name, value in vars(attack).items() if isinstance(value, plain)}
        settings = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        model = attack.model
        weights = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        where = tuple(weight.data_ptr() for weight in weights)
        backend = dispatch.forced_backend(None)
        return arguments, tuple(options.items()), attack.loss, attack.normalization, settings, backend, where


def record(attack: Attack, leaves: list[Any], tree: Any) -> Recorded:
    static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    problem, start = pytree.tree_unflatten(static, tree)

    side = torch.cuda.Stream(start.device)
    side.wait_stream(torch.cuda.current_stream(start.device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            attack.climb(problem, start)
    torch.cuda.current_stream(start.device).wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side), weights_cast_anew():
            results = attack.climb(problem, start)
    except RuntimeError as error:
        raise RuntimeError(
            "capture=True was asked for, but the loop can not be captured; does the model or the loss wait for the "
            f"device, with .item(), nonzero or a copy to the CPU? {error}"
        ) from error
    return Recorded(graph, [leaf for leaf in static if isinstance(leaf, Tensor)], results)


def weights_cast_anew() -> torch.autocast:
    """The autocast that is on, but for its cache: a graph would read there after the cache is gone."""
    on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return torch.autocast("cuda", dtype, enabled=on, cache_enabled=False)


def why_no_graph(model: Any, images: Tensor) -> str | None:
    """Why a replayed loop would not be the loop, or None."""
    if images.device.type != "cuda":
        return f"CUDA graphs need images on a GPU, got {images.device}"
    if torch.cuda.is_current_stream_capturing():
        return "a graph is being captured already"
    if not isinstance(model, nn.Module):
        return f"only a module says where its weights lie, got {type(model).__name__}"
    if isinstance(model, torch._dynamo.OptimizedModule):
        return "the model is compiled already, perhaps with graphs of its own; pass the plain one and compile=True"
    if any(getattr(module, hooks) for module in model.modules() for hooks in HOOKS):
        return "hooks of the model would run once, when it is captured, and never again"
    elsewhere = {weight.device for weight in (*model.parameters(), *model.buffers())} - {images.device}
    if elsewhere:
        return f"the model has weights on {', '.join(map(str, elsewhere))}, the images are on {images.device}"
    return None


def layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


# --- torch.compile ------------------------------------------------------------------------------------------------


def compiled(model: Callable[..., Any]) -> Callable[..., Any]:
    reason = why_not_compiled(model)
    if reason is not None:
        raise RuntimeError(f"compile=True was asked for, but {reason}")
    return torch.compile(model)


def why_not_compiled(model: Any) -> str | None:
    """Why the model would not compile or not be itself, or None."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        return "the model is compiled already: leave compile=False"
    if torch.compiler.is_compiling():
        return "this is being compiled itself"
    if not torch._dynamo.is_dynamo_supported():
        return f"torch {torch.__version__} has no torch.compile for Python {sys.version.split()[0]} on {sys.platform}"
    on_cpu = isinstance(model, nn.Module) and any(weight.device.type == "cpu" for weight in model.parameters())
    compiler = os.environ.get("CXX", "g++")
    if on_cpu and not any(shutil.which(name) for name in (compiler, "g++", "clang++")):
        return f"there is no C++ compiler ({compiler}), which it needs on the CPU"
    return None
