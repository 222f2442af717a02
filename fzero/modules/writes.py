"""Parameters are there to be read: who writes one in its forward is stopped before it is done.

A full leaf may lie in the memory of the state, where nothing is gathered, or in memory of its own, where it is. A
write would change the state in the first case, each rank by itself, and be lost in the second. So a dispatch mode
looks at what operators write, whatever leads there: `no_grad`, `.data`, a view, or a kernel such as that of
`nn.Embedding(max_norm=)`. It sees memory, below the transforms of `torch.func`, eagerly and in a trace.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fzero._torch import TorchDispatchMode, dispatch_modes, storage_id
from fzero.errors import ModuleError, ParameterWriteError
from fzero.modules.explain import line_here
from fzero.wrapped import unwrapped

_aten = torch.ops.aten
# Operators whose gradient is a sparse tensor, and the argument that says so.
_SPARSE = {
    _aten.embedding.default: (4, "sparse"),
    _aten._embedding_bag.default: (5, "sparse"),
    _aten._embedding_bag_forward_only.default: (5, "sparse"),
}
# Operators that overwrite running statistics without saying so, where they are in training.
_NORMS = ("aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm")


@contextlib.contextmanager
def read_only(leaves: Iterable[tuple[str, Tensor]], *, differentiated: bool = False) -> Iterator[None]:
    """Return the context in which these tensors may not be written.

    Args:
        leaves: names and tensors.
        differentiated: whether gradients are taken by them, which have to be dense.

    Raises:
        ParameterWriteError: inside, at an operator that would write one.
        ModuleError: inside, at an embedding whose gradient would be sparse.
    """
    held = [(name, unwrapped(leaf)) for name, leaf in leaves]
    names = {storage_id(leaf): name for name, leaf in held if leaf.layout == torch.strided}
    active = next((mode for mode in reversed(dispatch_modes()) if isinstance(mode, _Watch)), None)
    if active is None:
        with _Watch(names, differentiated):
            yield
        return
    before = active.names, active.differentiated
    active.names, active.differentiated = {**names, **active.names}, differentiated or active.differentiated
    try:
        yield
    finally:
        active.names, active.differentiated = before


class _Watch(TorchDispatchMode):
    def __init__(self, names: dict[int, str], differentiated: bool) -> None:
        super().__init__()
        self.names, self.differentiated = names, differentiated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        if schema.is_mutable or schema.name in _NORMS:
            for x in _written(func, args, kwargs or {}):
                if x.layout == torch.strided and storage_id(x) in self.names:
                    raise _refused(func, self.names[storage_id(x)])
        elif self.differentiated and func in _SPARSE:
            position, name = _SPARSE[func]
            if args[position] if len(args) > position else (kwargs or {}).get(name):
                raise ModuleError(
                    f"fz.vjp: {func} is asked for a sparse gradient, at\n{line_here()}\n"
                    f"Gradients are dense here: they are reduced in equal pieces. Leave out sparse=True of the "
                    f"embedding (module.sparse = False before fz.functional)."
                )
        return func(*args, **(kwargs or {}))


def _refused(func: Any, name: str) -> ParameterWriteError:
    advice = "Write to a copy (.clone()), or compute the changed weight out of place and return what comes of it"
    if "renorm" in str(func):
        advice = "Leave out max_norm, and scale the rows that were looked up: x * (max_norm / x.norm(...)).clamp(max=1)"
    return ParameterWriteError(
        f"fz.functional: {func} writes to the parameter {name!r}, at\n{line_here()}\n"
        f"A function reads parameters, and an update alone changes them. {advice}; a constraint on the weights belongs "
        f"into the step, after fz.apply_gradients."
    )


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Iterate over the tensors that a call of an operator overwrites."""
    training = func._schema.name in _NORMS and args[5]
    for position, argument in enumerate(func._schema.arguments):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes or (training and argument.name in ("running_mean", "running_var")):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            many = value if isinstance(value, list | tuple) else (value,)
            yield from (x for x in many if isinstance(x, Tensor))
