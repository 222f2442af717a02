"""Collectives of `torch.distributed` that a function calls by itself.

They write into tensors that they are given, and hand out something to wait for. Neither a trace nor a gradient sees
that: a program would hold none of it, and what comes of one would count as a constant. So

    in a trace              each is replaced by the functional collective, its wait, and a copy into the tensors given;
                            what has no functional form is refused
    in `torch.func`         one that is given a tensor that is differentiated is refused; others run as they are

What is differentiated shows above the transforms of `torch.func` alone, where an operator arrives first. So what
refuses is registered there: outside of transforms nothing of it runs.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fzero._torch import (
    TRANSFORMS,
    OpOverload,
    TorchDispatchMode,
    c10d,
    finished_work,
    torch_pytree,
    transforms_off,
)
from fzero.errors import FzeroError, GradientError, ModuleError, ShapeError, TraceError
from fzero.modules.explain import COLLECTIVES, line_here, line_of_user
from fzero.operators import written
from fzero.ranks.groups import group_of, reduction_of
from fzero.wrapped import below_transforms, is_batched, is_constant, is_differentiated

# What a call writes: tensors that it was given, each with what it is to hold.
_Pairs = list[tuple[Tensor, Tensor]]


def _all_reduce(tensors: Sequence[Tensor], group: Any, op: Any, *_: Any) -> _Pairs:
    name, _size = group_of(group)
    return [(x, c10d.wait_tensor(c10d.all_reduce(_sent(x), _word(op), name))) for x in tensors]


def _broadcast(tensors: Sequence[Tensor], group: Any, root: int, *_: Any) -> _Pairs:
    name, _size = group_of(group)
    return [(x, c10d.wait_tensor(c10d.broadcast(_sent(x), root, name))) for x in tensors]


def _gathered(x: Tensor, group: Any) -> Tensor:
    name, size = group_of(group)
    return c10d.wait_tensor(c10d.all_gather_into_tensor(_sent(x).reshape(-1), size, name))


def _all_gather(outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], group: Any, *_: Any) -> _Pairs:
    return [
        pair
        for parts, x in zip(outputs, inputs, strict=True)
        for pair in _paired(parts, _gathered(x, group).view(group_of(group)[1], x.numel()).unbind())
    ]


def _all_gather_into(output: Tensor, x: Tensor, group: Any, *_: Any) -> _Pairs:
    return [(output, _gathered(x, group))]


def _all_gather_into_many(outputs: Sequence[Tensor], inputs: Sequence[Tensor], group: Any, *_: Any) -> _Pairs:
    return [(output, _gathered(x, group)) for output, x in zip(outputs, inputs, strict=True)]


def _reduce_scatter_into(output: Tensor, x: Tensor, group: Any, op: Any, *_: Any) -> _Pairs:
    name, size = group_of(group)
    return [(output, c10d.wait_tensor(c10d.reduce_scatter_tensor(_sent(x).reshape(-1), _word(op), size, name)))]


def _reduce_scatter_into_many(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], group: Any, op: Any, *_: Any
) -> _Pairs:
    many = zip(outputs, inputs, strict=True)
    return [pair for output, x in many for pair in _reduce_scatter_into(output, x, group, op)]


def _reduce_scatter(
    outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], group: Any, op: Any, *_: Any
) -> _Pairs:
    pairs = []
    for output, parts in zip(outputs, inputs, strict=True):
        for part in parts:
            _check(output, part)
        pairs += _reduce_scatter_into(output, torch.cat([_sent(part).reshape(-1) for part in parts]), group, op)
    return pairs


def _exchanged(x: Tensor, received: list[Any], sent: list[Any], group: Any) -> Tensor:
    return c10d.wait_tensor(c10d.all_to_all_single(_sent(x), received, sent, group_of(group)[0]))


def _all_to_all_into(output: Tensor, x: Tensor, group: Any, received: list[int], sent: list[int], *_: Any) -> _Pairs:
    size = group_of(group)[1]
    received = received or [output.shape[0] // size] * size
    sent = sent or [x.shape[0] // size] * size
    return [(output, _exchanged(x, received, sent, group))]


def _all_to_all(outputs: Sequence[Tensor], inputs: Sequence[Tensor], group: Any, *_: Any) -> _Pairs:
    received, sent = [x.numel() for x in outputs], [x.numel() for x in inputs]
    parts = _exchanged(torch.cat([_sent(x).reshape(-1) for x in inputs]), received, sent, group).split(received)
    return _paired(outputs, parts)


def _paired(outputs: Sequence[Tensor], parts: Sequence[Tensor]) -> _Pairs:
    if len(outputs) != len(parts):
        raise ShapeError(
            f"fz.jit: a collective of {len(parts)} ranks is given {len(outputs)} tensors to write to, at\n"
            f"{line_here()}\nGive one for each rank of the group."
        )
    return list(zip(outputs, parts, strict=True))


def _word(op: Any) -> str:
    name = reduction_of(op)
    if name == "premul_sum":
        raise TraceError(
            f"fz.jit: a reduction that multiplies first cannot be part of a program, at\n{line_here()}\n"
            f"Multiply the tensor, and reduce by ReduceOp.SUM."
        )
    return name


_MESSAGE = (
    "A program is one for all ranks, and this is between two. Use all_to_all_single, or mesh[axis].gather, in which "
    "all take part"
)
_WAITS = "The collectives of a program are in one order on all ranks, so that nothing waits for them: leave it out"
_OBJECT = (
    "An object is no tensor, and would be a constant of the program: do it before, and pass what comes of it as an "
    "argument; or send tensors, by mesh[axis].gather(x)"
)
# By the operator that arrives: the function that calls it, and what replaces it in a trace or, as text, the way out.
_CALLS: dict[str, tuple[str, Callable[..., _Pairs] | str]] = {
    "c10d::allreduce_": ("all_reduce", _all_reduce),
    "c10d::allreduce_coalesced_": ("all_reduce_coalesced", _all_reduce),
    "c10d::broadcast_": ("broadcast", _broadcast),
    "c10d::allgather_": ("all_gather", _all_gather),
    "c10d::allgather_coalesced_": ("all_gather_coalesced", _all_gather),
    "c10d::_allgather_base_": ("all_gather_into_tensor", _all_gather_into),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather_into_tensor", _all_gather_into_many),
    "c10d::reduce_scatter_": ("reduce_scatter", _reduce_scatter),
    "c10d::_reduce_scatter_base_": ("reduce_scatter_tensor", _reduce_scatter_into),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter_tensor", _reduce_scatter_into_many),
    "c10d::alltoall_": ("all_to_all", _all_to_all),
    "c10d::alltoall_base_": ("all_to_all_single", _all_to_all_into),
    "c10d::reduce_": ("reduce", "Use all_reduce, after which one rank may be the only one that uses the sum"),
    "c10d::gather_": ("gather", "Use all_gather, after which one rank may be the only one that uses what it brings"),
    "c10d::scatter_": ("scatter", "Use broadcast, of which each rank takes its part, or pass the part as an argument"),
    "c10d::send": ("send", _MESSAGE),
    "c10d::recv_": ("recv", _MESSAGE),
    "c10d::recv_any_source_": ("recv", _MESSAGE),
    "c10d::barrier": ("barrier", _WAITS),
    "c10d::monitored_barrier_": ("monitored_barrier", _WAITS),
    "_c10d_functional::isend": ("isend", _MESSAGE),
    "_c10d_functional::irecv": ("irecv", _MESSAGE),
    "_c10d_functional::batch_p2p_ops": ("batch_isend_irecv", _MESSAGE),
}
# Functional collectives, which a trace takes as they are.
_FUNCTIONAL = (
    "_c10d_functional::all_gather_into_tensor",
    "_c10d_functional::all_gather_into_tensor_coalesced",
    "_c10d_functional::all_reduce",
    "_c10d_functional::all_reduce_",
    "_c10d_functional::all_reduce_coalesced",
    "_c10d_functional::all_reduce_coalesced_",
    "_c10d_functional::all_to_all_single",
    "_c10d_functional::broadcast",
    "_c10d_functional::broadcast_",
    "_c10d_functional::reduce_scatter_tensor",
    "_c10d_functional::reduce_scatter_tensor_coalesced",
    "_c10d_functional_autograd::all_gather_into_tensor",
    "_c10d_functional_autograd::all_to_all_single",
    "_c10d_functional_autograd::reduce_scatter_tensor",
)


@contextlib.contextmanager
def collectives_replaced() -> Iterator[None]:
    """Inside a trace, the context in which collectives of `torch.distributed` become part of the program.

    Raises:
        ShapeError: inside, from a collective that is given tensors whose sizes or dtypes do not fit.
        TraceError: inside, from one that has no functional form.
    """
    if not dist.is_initialized():
        yield
        return
    try:
        with _Replacing():
            yield
    except FzeroError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        names = [f.name for f in frames if f.filename.startswith(_DISTRIBUTED) and "_object" in f.name]
        sent = next((name for name in names if not name.startswith("_")), None)
        if sent is None:
            raise
        raise TraceError(
            f"fz.jit: torch.distributed.{sent} cannot be part of a program, at\n{line_of_user(error)}\n{_OBJECT}."
        ) from error


_DISTRIBUTED = torch.__path__[0] + "/distributed/"


class _Replacing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, OpOverload) or "c10d" not in func.namespace:
            return func(*args, **(kwargs or {}))
        name, form = _CALLS.get(func._schema.name, (None, None))
        if form is None:
            return func(*torch_pytree.tree_map_only(Tensor, _unknown, args), **(kwargs or {}))
        if isinstance(form, str):
            raise TraceError(
                f"fz.jit: torch.distributed.{name} cannot be part of a program, at\n{line_here()}\n{form}."
            )
        for output, value in form(*args):
            _check(output, value)
            output.copy_(value.view(output.shape))
        return finished_work() if len(func._schema.returns) == 1 else (args[0], finished_work())


def _sent(x: Tensor) -> Tensor:
    """Return a tensor as a collective takes it, without gaps in memory."""
    return _unknown(x).contiguous()


def _unknown(x: Tensor) -> Tensor:
    """Return what a trace does not take for a constant: of that it would run the collective while it traces."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x) if is_constant(x) else x


def _check(output: Tensor, value: Tensor) -> None:
    """Raise where a copy would cast, or spread a few elements over many."""
    if output.dtype != value.dtype or output.numel() != value.numel():
        raise ShapeError(
            f"fz.jit: a collective brings {value.numel()} elements of {value.dtype} for a tensor of shape "
            f"{tuple(output.shape)} and {output.dtype}, at\n{line_here()}\n"
            f"The tensors of a collective have one dtype, and equal sizes on every rank."
        )


def _guarded(operator: OpOverload) -> Callable[..., Any]:
    """Return what runs in the place of a collective inside of a transform of `torch.func`."""
    call = _CALLS.get(operator._schema.name)
    name = f"torch.ops.{operator}" if call is None else f"torch.distributed.{call[0]}"

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in torch_pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(is_batched(x) for x in tensors):
            raise ModuleError(f"torch.vmap: {name} is called for a batch, at\n{line_here()}\n{COLLECTIVES}.")
        # Under no_grad what comes of a collective is a constant on purpose; a write into what is differentiated never.
        looked_at = tensors if torch.is_grad_enabled() else written(operator, args, kwargs)
        if any(is_differentiated(x) for x in looked_at):
            raise GradientError(
                f"fz.vjp: {name} is given a tensor that is differentiated, and has no gradient, at\n{line_here()}\n"
                f"{COLLECTIVES}. Where a constant is meant, give it x.detach()."
            )
        with transforms_off():
            return operator(
                *torch_pytree.tree_map_only(Tensor, below_transforms, args),
                **torch_pytree.tree_map_only(Tensor, below_transforms, kwargs),
            )

    return run


def _register(names: Sequence[str]) -> list[torch.library.Library]:
    libraries = {
        space: torch.library.Library(space, "IMPL") for space in dict.fromkeys(n.split("::")[0] for n in names)
    }
    for full in names:
        space, _, name = full.partition("::")
        packet = getattr(getattr(torch.ops, space), name, None)
        if packet is not None:  # else this version of torch has none
            libraries[space].impl(name, _guarded(packet.default), TRANSFORMS)
    return list(libraries.values())


# Held, since what is registered goes with them.
_LIBRARIES = _register((*_CALLS, *_FUNCTIONAL))
