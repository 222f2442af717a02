"""Signatures: what decides which program a call runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fzero import tree
from fzero._torch import FakeTensor, FakeTensorMode
from fzero.precision.autocast import autocast_here, under_autocast
from fzero.program.graph.absent import stand_in
from fzero.program.graph.sizes import order_of
from fzero.random.keyed import current_draw
from fzero.sharding.sharded import Sharded


class Signature:
    """The structure of a call's arguments with all that is static in them, and what each tensor looks like.

    Attributes:
        hollow: the arguments, `(args, kwargs)`, without their tensors.
        donated: positions of tensors whose memory the call may reuse.
        names: what the function calls its positional arguments, by their positions.
        simulated_on: the device of a simulated mesh among the arguments; `None` where there is none.
        key: what two calls have to have in common to run the same program.
    """

    def __init__(
        self,
        hollow: tree.Hollow,
        leaves: Sequence[Tensor],
        donated: frozenset[int],
        name: str,
        names: Callable[[int], str],
        simulated_on: torch.device | None,
    ):
        self.hollow = hollow
        self.names = names
        self.donated = donated
        self.simulated_on = simulated_on
        metas = tuple((x.shape, x.stride(), x.dtype, x.device) for x in leaves)
        constants = tuple(_constant(slot) for slot in hollow.slots)
        self.key = (hollow.treedef, constants, metas, *_ambient())
        try:
            self._hash = hash(self.key)  # once: a state has hundreds of leaves
        except TypeError as error:
            raise TypeError(
                f"{name} got an argument that is neither a tensor nor hashable, so it cannot be a constant "
                f"of the program: {error}. Pass tensors, numbers, strings or frozen dataclasses."
            ) from None

    @staticmethod
    def of(
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        call: str,
        *,
        donated: Callable[[tree.Hollow], frozenset[int]] = lambda _: frozenset(),
        names: Callable[[int], str] = str,
    ) -> tuple[Signature, list[Tensor]]:
        """Return the signature of a call's arguments, and their tensors.

        Args:
            arguments: `(args, kwargs)`.
            call: what is called, for the message.
            donated: the positions of tensors whose memory may be reused, of the arguments without their tensors.
            names: what the function calls its positional arguments.

        Raises:
            DonatedError: the memory of a tensor was donated.
            TypeError: an argument can be no constant of a program.
        """
        leaves, _, hollow = tree.split(arguments)
        return Signature(hollow, leaves, donated(hollow), call, names, simulated_on(arguments)), leaves

    @property
    def ambient(self) -> tuple[Any, ...]:
        """What stood around the call: autocast on a CPU and on CUDA, grad mode, the dtype of new tensors, a key."""
        return self.key[3:]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each tensor."""
        return [shape for shape, *_ in self.key[2]]

    def without_sizes(self, flexible: frozenset[int]) -> tuple[Any, ...]:
        """Return the key without the sizes of some tensors, of which the order of dimensions in memory is kept."""
        metas = [
            (order_of(*meta[:2]) or meta[:2], *meta[2:]) if i in flexible else meta
            for i, meta in enumerate(self.key[2])
        ]
        return (*self.key[:2], tuple(metas), *self.key[3:])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signature) and self._hash == other._hash and self.key == other.key

    def __hash__(self) -> int:
        return self._hash

    def examples(self) -> list[Tensor]:
        """Return tensors that look like the arguments', without memory."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            return [torch.empty_strided(s, strides, dtype=d, device=device) for s, strides, d, device in self.key[2]]

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """Inside, operations mean what they meant where the call was made."""
        cpu, cuda, grad, dtype, _ = self.ambient
        before = torch.get_default_dtype()
        with under_autocast((cpu, cuda)), torch.set_grad_enabled(grad):
            torch.set_default_dtype(dtype)
            try:
                yield
            finally:
                torch.set_default_dtype(before)

    @property
    def paths(self) -> list[str]:
        """The path of each tensor in `(args, kwargs)`, such as `0.params.w`."""
        names = tree.structure_paths(self.hollow.treedef)
        return [_short(p) for p, slot in zip(names, self.hollow.slots, strict=True) if slot is tree.PICKED]

    def named(self, path: str) -> str:
        """Return a path in `(args, kwargs)` with the argument by its name: `0.1.x` as `batch.x`."""
        which, _, rest = path.partition(".")
        first, dot, inner = rest.partition(".")
        return f"{self.names(int(first)) if which == '0' and first else first}{dot}{inner}"

    def by_path(self) -> dict[str, str]:
        """Return what each leaf of the arguments looks like, by its path, which begins with the argument's name."""
        names = tree.structure_paths(self.hollow.treedef)
        metas = iter(self.key[2])
        entries = {}
        for path, slot in zip(names, self.hollow.slots, strict=True):
            if slot is tree.PICKED:
                shape, stride, dtype, device = next(metas)
                text = f"{str(dtype).removeprefix('torch.')}{tuple(shape)} on {device}"
                entries[self.named(path)] = text if _is_dense(shape, stride) else f"{text} strides {stride}"
            else:
                entries[self.named(path)] = repr(slot)
        return entries


def simulated_on(arguments: Any) -> torch.device | None:
    """Return the device of a simulated mesh among the arguments, `None` if there is none."""
    nodes = tree.leaves(arguments, is_leaf=lambda x: isinstance(x, Sharded))
    return next((n.mesh.device for n in nodes if isinstance(n, Sharded) and n.mesh.simulated), None)


def examples_of(leaves: Sequence[Tensor], device: torch.device | None) -> Sequence[Tensor]:
    """Return tensors without memory that look like `leaves`, on what stands for the device of a simulated mesh."""
    if device is None or any(isinstance(x, FakeTensor) for x in leaves):  # those come of a trace around this one
        return leaves
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = stand_in(device)
        return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for x in leaves]


def _ambient() -> tuple[Any, ...]:
    """Return what else decides what an operation means: autocast, grad mode, the dtype of new tensors, a key around."""
    return (*autocast_here(), torch.is_grad_enabled(), torch.get_default_dtype(), current_draw() is not None)


def _constant(value: Any) -> Any:
    """Return what tells constants apart that Python takes for equal, 1 and 1.0, or 0.0 and -0.0. NaN equals NaN."""
    return type(value), value.hex() if isinstance(value, float) else value


def _short(path: str) -> str:
    """`0.1.params.w`, the path in (args, kwargs), as `1.params.w`; a keyword by its name."""
    return path.split(".", 1)[1] if "." in path else path


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True
