"""Building a model leaf by leaf: the factory runs once without values, and is replayed for one leaf at a time.

While the factory runs, every tensor it creates lies on the meta device and the operations that write
values are recorded. A leaf is later made by replaying the operations that its memory depends on, and no
others, so a model never has to fit on one device:

    factory()              w = empty(8, 8)   w.normal_()   b = ones(8)   b.mul_(2)      no values
    materialize("w")       w = empty(8, 8)   w.normal_()
    materialize("b")                                       b = ones(8)   b.mul_(2)

Dependence is followed through storages, since `.data`, views and `nn.Parameter(t)` share memory without
an operation that could be recorded.

A random operation draws from a seed made of (seed, path of the first leaf that depends on it, its number
among that leaf's draws): the first draw of `blocks.0.weight` from (0, "blocks.0.weight", 0). A leaf's values are
therefore the same whatever else the model holds and however many processes build it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fzero.modules.recording import Recorder, draw_seed, on_meta, recording
from fzero.modules.replay import Constant, View, leaves_of


@dataclass(frozen=True)
class Deferred:
    """A model whose parameters have no memory yet.

    Attributes:
        module: the model. Its parameters lie on the meta device; its buffers are real.
        paths: the names of the parameters, then of the buffers, as `state_dict` spells them. A tied
            parameter stands there once, under its first name.
    """

    module: nn.Module
    paths: tuple[str, ...]
    _recorder: Recorder = field(repr=False)
    _sources: Mapping[str, View | Constant] = field(repr=False)

    def materialize(self, path: str, device: torch.device | str | None = None) -> Tensor:
        """Return the values of one leaf, in memory of its own.

        The peak is the leaf itself where it is initialised in place, or by a chain of elementwise
        operations that keep its dtype. A cast holds source and result at once, and
        `nn.init.orthogonal_` a few copies of the leaf. A leaf cut from a larger tensor costs that tensor.
        Memory that the factory never wrote is zero.

        Args:
            path: one of `paths`.
            device: where to put it; by default where the factory asked for it. Random values are those
                of the device's own generator, so a CPU and a GPU draw different ones.

        Raises:
            ValueError: there is no such leaf.
        """
        if path not in self._sources:
            raise ValueError(f"deferred: there is no leaf {path!r}; the model has {', '.join(self.paths)}.")
        return self._recorder.values(self._sources[path], device)


def deferred(factory: Callable[[], nn.Module], seed: int = 0) -> Deferred:
    """Run `factory` without giving memory to the parameters, so that they can be made one at a time.

    The factory may use `torch.nn.init`, plain tensor operations and the libraries built on them. Where it
    looks at values (`.item()`, `if t.any()`, `.tolist()`, boolean masks) they are made on the spot. A
    generator that it passes to a random operation, or seeds that it sets, have no effect: the draws are
    those of `seed`. The random state of torch, numpy and Python is as before afterwards.

    Args:
        factory: returns the model.
        seed: of the random draws.

    Raises:
        TypeError: the factory returned something else than a module.
        TraceError: the factory uses an operation that cannot be recorded, or asks for the meta device.

    Example:
        >>> model = deferred(lambda: nn.Linear(2, 3))
        >>> model.paths, model.module.weight.device
        (('weight', 'bias'), device(type='meta'))
        >>> model.materialize("bias").shape
        torch.Size([3])
    """
    if torch.get_default_device().type == "meta":
        raise on_meta("the default device")
    recorder = Recorder(seed)
    with _random_state_kept(seed), recording(recorder):
        module = factory()
    if not isinstance(module, nn.Module):
        raise TypeError(f"deferred: the factory must return an nn.Module, got {type(module).__name__}.")

    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    leaves: dict[str, Tensor] = {**parameters, **buffers}
    for path, t in leaves.items():
        if t.is_meta and not recorder.holds(t):
            raise on_meta(f"{path} of the module")
    attributes = {path: t for path, t in _plain_tensors(module) if recorder.holds(t)}
    sources = {path: recorder.source(t) for path, t in {**leaves, **attributes}.items()}
    for path, source in sources.items():
        recorder.own(source, path)

    real = {id(t): recorder.values(sources[path]) for path, t in {**attributes, **buffers}.items()}
    return Deferred(
        module=without_parameters(module, real),
        paths=tuple(leaves),
        _recorder=recorder,
        _sources={path: sources[path] for path in leaves},
    )


def without_parameters(module: nn.Module, replaced: Mapping[int, Tensor] | None = None) -> nn.Module:
    """Return a copy of a module whose parameters lie on the meta device.

    Args:
        module: stays as it is.
        replaced: id of a tensor of the module -> what the copy holds in its place.

    Raises:
        TypeError: the module cannot be copied.
    """
    # copy.deepcopy takes what it finds here for the copy that it has already made of a tensor.
    twins: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    twins |= {id(t): t.detach() for _, t in _plain_tensors(module) if not t.is_leaf}
    twins |= replaced or {}
    try:
        return copy.deepcopy(module, twins)
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"fzero: {type(module).__name__} cannot be copied ({error}). Its attributes must be such that "
            f"copy.deepcopy takes them."
        ) from error


def _plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that submodules keep as plain attributes, alone or in lists, tuples and dicts."""
    registered = {id(t) for t in (*module.parameters(), *module.buffers())}
    for prefix, submodule in module.named_modules():
        for name, value in vars(submodule).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                for i, leaf in enumerate(leaves_of(value)):
                    if isinstance(leaf, Tensor) and id(leaf) not in registered:
                        yield f"{prefix}.{name}[{i}]", leaf


@contextmanager
def _random_state_kept(seed: int) -> Iterator[None]:
    """Draw numpy's and Python's random numbers from `seed`, and restore them and torch's afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            random.seed(seed)
            np.random.seed(draw_seed(seed, "numpy", 0) % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
