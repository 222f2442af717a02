"""What an operator does besides returning a value: which arguments it writes, which it gives out again, if it draws.

Schemas tell most of it, and this file is the one place that reads them. What they leave out stands in the tables
below: batch norms overwrite the running statistics they are given, collectives the tensors they fill, and a few
operators return the memory of an argument. Arguments may be tensors or nodes of a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fzero._torch import OpOverload

_STATISTICS = ("running_mean", "running_var")
# Operators, of every overload, that overwrite arguments without saying so in their schema: the names of those
# arguments, and of one that decides whether they do. `batch_norm` writes its running statistics if `training` is true.
_WRITES: dict[str, tuple[tuple[str, ...], str | None]] = {
    "aten::batch_norm": (_STATISTICS, "training"),
    "aten::_batch_norm_impl_index": (_STATISTICS, "training"),
    "aten::native_batch_norm": (_STATISTICS, "training"),
    "aten::cudnn_batch_norm": (_STATISTICS, "training"),
    "aten::miopen_batch_norm": (_STATISTICS, "training"),
    "aten::instance_norm": (_STATISTICS, "use_input_stats"),
    "aten::batch_norm_update_stats": (_STATISTICS, None),
    "aten::batch_norm_gather_stats": (_STATISTICS, None),
    "aten::batch_norm_gather_stats_with_counts": (_STATISTICS, None),
    "aten::_cudnn_rnn": (("dropout_state",), "train"),
    "aten::miopen_rnn": (("dropout_state",), "train"),
    "c10d::allreduce_": (("tensors",), None),
    "c10d::allreduce_coalesced_": (("tensors",), None),
    "c10d::broadcast_": (("tensors",), None),
    "c10d::reduce_": (("tensors",), None),
    "c10d::recv_": (("tensors",), None),
    "c10d::recv_any_source_": (("tensors",), None),
    "c10d::_allgather_base_": (("output_tensor",), None),
    "c10d::allgather_": (("output_tensors",), None),
    "c10d::allgather_coalesced_": (("output_lists",), None),
    "c10d::allgather_into_tensor_coalesced_": (("outputs",), None),
    "c10d::_reduce_scatter_base_": (("output_tensor",), None),
    "c10d::reduce_scatter_": (("output_tensors",), None),
    "c10d::reduce_scatter_tensor_coalesced_": (("outputs",), None),
    "c10d::gather_": (("output_tensors",), None),
    "c10d::scatter_": (("output_tensors",), None),
    "c10d::alltoall_": (("output_tensors",), None),
    "c10d::alltoall_base_": (("output",), None),
    "inductor::resize_storage_bytes_": (("variable",), None),
    "inductor::accumulate_grad_": (("variable_grad",), None),
}
# Operators whose result may lie in the memory of an argument without saying so.
_VIEWS: dict[str, tuple[str, ...]] = {
    "aten::_unsafe_view": ("self",),
    "aten::lift": ("self",),
    "aten::native_dropout": ("input",),  # where it keeps everything
    "_c10d_functional::wait_tensor": ("tensor",),
}


def written(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the tensors, or nodes, among the arguments of a call whose memory it overwrites.

    Example:
        >>> x, y = torch.ones(2), torch.ones(2)
        >>> written(torch.ops.aten.add_.Tensor, (x, y), {})[0] is x
        True
    """
    if not isinstance(op, OpOverload):
        return []
    names, condition = _WRITES.get(op._schema.name, ((), None))
    if condition is not None and not _argument(op, condition, args, kwargs):
        names = ()
    if not names and not op._schema.is_mutable:
        return []
    arguments = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return list(_values(op, (*names, *arguments), args, kwargs))


def viewed(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the tensors, or nodes, among the arguments of a call in whose memory its results may lie.

    Example:
        >>> x = torch.ones(2, 3)
        >>> viewed(torch.ops.aten.view.default, (x, [6]), {})[0] is x
        True
    """
    if not isinstance(op, OpOverload):
        return []
    silent = (*_VIEWS.get(op._schema.name, ()), *_WRITES.get(op._schema.name, ((), None))[0])
    names = [a.name for a in op._schema.arguments if a.alias_info is not None or a.name in silent]
    return list(_values(op, names, args, kwargs))


def draws(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call of an operator draws random numbers.

    Attention kernels and recurrent layers are marked random whatever their dropout is, and `rrelu` in evaluation too;
    at a dropout of zero they draw nothing.
    """
    if not isinstance(op, OpOverload) or not _may_draw(op):
        return False
    name = op._schema.name
    if name == "aten::_fused_sdp_choice":  # which kernel will draw
        return False
    if name.startswith("aten::rrelu_with_noise"):
        return bool(_argument(op, "training", args, kwargs))
    if "attention" in name or "rnn" in name or "lstm" in name or "gru" in name:
        for argument in ("dropout_p", "p", "dropout"):
            if any(a.name == argument for a in op._schema.arguments):
                return bool(_argument(op, argument, args, kwargs))
    return True


@functools.cache
def _may_draw(op: OpOverload) -> bool:
    """Whether torch marks an operator as random: asked for each eager operation, where comparing tags would show."""
    return torch.Tag.nondeterministic_seeded in op.tags


def is_pure(op: Any) -> bool:
    """Return whether every call of an operator does nothing but return values that its arguments decide."""
    if not isinstance(op, OpOverload) or op._schema.is_mutable or op._schema.name in _WRITES:
        return False
    if "c10d" in op.namespace:  # what other ranks send decides
        return False
    return torch.Tag.nondeterministic_seeded not in op.tags


def written_by(node: fx.Node) -> list[fx.Node]:
    """Return the arguments of a node whose memory it overwrites."""
    return [x for x in written(node.target, node.args, node.kwargs) if isinstance(x, fx.Node)]


def _argument(op: OpOverload, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    for position, argument in enumerate(op._schema.arguments):
        if argument.name == name:
            given = args[position] if position < len(args) else kwargs.get(name)
            return argument.default_value if given is None else given
    return None


def _values(op: OpOverload, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    for name in names:
        yield from _flat(_argument(op, name, args, kwargs))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for element in value:
            yield from _flat(element)
    elif isinstance(value, torch.Tensor | fx.Node):
        yield value
