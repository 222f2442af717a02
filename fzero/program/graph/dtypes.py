"""Dtypes that an operator refuses when it runs, and lets pass in a trace.

A trace runs on fake tensors, and the fakes of some operators look at shapes alone: a matrix product of float64 and
float32 is found only by the kernel, when the program runs and has taken what was donated to it. So a traced graph is
looked through once, against what the kernels ask for.
"""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fzero._torch import OpOverload
from fzero.errors import TraceError
from fzero.marks import line_of
from fzero.tree import describe

# Operands that have to share one dtype, by their names in the operator's schema.
_ALIKE: dict[str, tuple[str, ...]] = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "mv": ("self", "vec"),
    "addmm": ("self", "mat1", "mat2"),
    "baddbmm": ("self", "batch1", "batch2"),
    "addbmm": ("self", "batch1", "batch2"),
    "addmv": ("self", "mat", "vec"),
    "convolution": ("input", "weight", "bias"),
    "_cdist_forward": ("x1", "x2"),
    "_embedding_bag_forward_only": ("weight", "per_sample_weights"),
    "binary_cross_entropy": ("self", "target"),
    "complex": ("real", "imag"),
    "polar": ("abs", "angle"),
    "linalg_cross": ("self", "other"),
    "grid_sampler_2d": ("input", "grid"),
    "grid_sampler_3d": ("input", "grid"),
    "heaviside": ("self", "values"),
    "index_add": ("self", "source"),
    "index_copy": ("self", "source"),
    "index_put": ("self", "values"),
    "index_reduce": ("self", "source"),
    "put": ("self", "source"),
    "nll_loss_forward": ("self", "weight"),
    "nll_loss2d_forward": ("self", "weight"),
}
# Normalisations: the parameters share one dtype, that of the input, or float32 over an input of less.
_NORMS: dict[str, tuple[str, ...]] = {
    "native_layer_norm": ("input", "weight", "bias"),
    "native_group_norm": ("input", "weight", "bias"),
    "native_batch_norm": ("input", "weight", "bias", "running_mean", "running_var"),
    "_native_batch_norm_legit": ("input", "weight", "bias", "running_mean", "running_var"),
    "_native_batch_norm_legit_functional": ("input", "weight", "bias", "running_mean", "running_var"),
}
# Classes and indices, and the dtypes that they may have.
_INDICES: dict[str, tuple[str, tuple[torch.dtype, ...]]] = {
    "nll_loss_forward": ("target", (torch.int64, torch.uint8)),
    "nll_loss2d_forward": ("target", (torch.int64, torch.uint8)),
    "multi_margin_loss": ("target", (torch.int64,)),
    "multilabel_margin_loss_forward": ("target", (torch.int64,)),
    "embedding": ("indices", (torch.int64, torch.int32)),
    "index_add": ("index", (torch.int64, torch.int32)),
    "index_copy": ("index", (torch.int64,)),
    "index_fill": ("index", (torch.int64,)),
    "index_reduce": ("index", (torch.int64, torch.int32)),
    "index_select": ("index", (torch.int64, torch.int32)),
    "put": ("index", (torch.int64,)),
}
_LOW = (torch.bfloat16, torch.float16)


def check_dtypes(module: fx.GraphModule) -> None:
    """Raise if a graph, or the body of a loop in it, calls an operator with dtypes that its kernels refuse.

    Raises:
        TraceError: names the operator, its operands, and the line.
    """
    for body in module.children():
        if isinstance(body, fx.GraphModule):
            check_dtypes(body)
    for node in module.graph.nodes:
        if not isinstance(node.target, OpOverload) or node.target.namespace != "aten":
            continue
        name = node.target._schema.name.removeprefix("aten::")
        if name in _ALIKE:
            _check_alike(node, _operands(node, _ALIKE[name]))
        if name in _NORMS:
            _check_norm(node, _operands(node, _NORMS[name]))
        if name in _INDICES:
            which, allowed = _INDICES[name]
            for value in _operands(node, (which,)).values():
                if value.dtype not in allowed:
                    listed = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
                    raise _refused(node, {which: value}, f"takes {which} in {listed}", "Convert it: .long().")


def _check_alike(node: fx.Node, operands: dict[str, Tensor]) -> None:
    if len({value.dtype for value in operands.values()}) > 1:
        raise _refused(node, operands, "takes operands of one dtype", _CAST)


def _check_norm(node: fx.Node, operands: dict[str, Tensor]) -> None:
    first, *others = [value.dtype for value in operands.values()]
    wide = torch.float32 if first in _LOW else first
    if any(dtype != first for dtype in others) and any(dtype != wide for dtype in others):
        raise _refused(node, operands, "takes operands of one dtype, or float32 beside a lower input", _CAST)


_CAST = "Cast one of them: functions see parameters in the compute dtype of their policy, and a batch as it came."


def _operands(node: fx.Node, names: Sequence[str]) -> dict[str, Tensor]:
    """Return what stands for the named tensors among a node's arguments, those that are given."""
    found: dict[str, Tensor] = {}
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        given: Any = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        value = given.meta.get("val") if isinstance(given, fx.Node) else None
        if argument.name in names and isinstance(value, Tensor):
            found[argument.name] = value
    return found


def _refused(node: fx.Node, operands: dict[str, Tensor], rule: str, way_out: str) -> TraceError:
    line = line_of(node)
    where = "a line that is not known" if line is None else f"{line[0]}:{line[1]} in {line[2]}"
    code = "" if line is None else f"\n    {linecache.getline(line[0], line[1]).strip()}"
    listed = ", ".join(f"{name} {describe(value)}" for name, value in operands.items())
    return TraceError(f"fz.jit: {node.target} {rule}, and got {listed}, at\n  {where}{code}\n{way_out}")
