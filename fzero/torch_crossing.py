"""A call of a sharded model as one node of autograd: cotangents go to the pullback, gradients come back.

output ◀── node ◀── inputs that require grad
└─◀──── token, a leaf of autograd: its hook passes the parameters' gradient on to the model
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fzero.sharding.sharded import Sharded

Pull = Callable[[tuple[Tensor, ...]], tuple[Any, ...]]


def crossing(
    pullback: Pull,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    add: Callable[[Sharded], None],
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Return outputs as those of a node of autograd.

    Args:
        pullback: from cotangents of the outputs to the gradient of the parameters and the cotangents of the inputs.
        outputs: floating-point tensors.
        inputs: tensors that require grad.
        add: what is done with the gradient of the parameters.
        device: where the node runs.
    """
    kept = _Crossing(pullback, add)
    token = torch.zeros((), device=device, requires_grad=True)
    token.register_hook(kept.collect)
    # A tensor that the pullback itself holds would close a circle through the node that holds the pullback.
    detached = [x.detach() for x in outputs]
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        joined: tuple[Tensor, ...] = _Node.apply(kept, detached, token, *inputs)
    return joined


class _Crossing:
    """What one call of a model leaves for its backward.

    The pullback is kept where autograd keeps saved tensors. So autograd frees it after a backward that does not retain
    the graph, however long the loss lives, and refuses a second one in its own words.
    """

    def __init__(self, pullback: Pull, add: Callable[[Sharded], None]) -> None:
        self.add = add
        self.packing: Any = pullback
        self.unpacked: Any = None
        self.gradient: Sharded | None = None

    def pack(self, saved: Tensor) -> Any:
        pullback, self.packing = self.packing, None
        return saved, pullback

    def unpack(self, packed: Any) -> Tensor:
        saved, self.unpacked = packed
        return saved

    def pull(self, cotangents: tuple[Tensor, ...]) -> list[Tensor]:
        """Run the pullback; return the cotangents of the inputs and keep the gradient for `collect`."""
        pullback, self.unpacked = self.unpacked, None
        self.gradient, inputs, *_ = pullback(cotangents)
        return inputs

    def collect(self, _: Tensor) -> None:
        """Pass the gradient on to the model: a hook of a leaf, which `torch.autograd.grad` of others does not reach."""
        gradient, self.gradient = self.gradient, None
        if gradient is not None:
            self.add(gradient)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, crossing: _Crossing, outputs: list[Tensor], token: Tensor, *inputs: Tensor) -> Any:
        ctx.crossing = crossing
        ctx.save_for_backward(token.detach())
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise ValueError(
                "torch_api.Model: create_graph=True asks for a second derivative through the call of a sharded model. "
                "Write it as a function instead: fz.grad inside the function of fz.value_and_grad, or torch.func.jvp "
                "of fz.grad."
            )
        (token,) = ctx.saved_tensors  # unpacks, or raises where the graph was freed
        inputs = ctx.crossing.pull(cotangents)
        return None, None, torch.zeros_like(token), *inputs
