"""Loops of plain PyTorch over a sharded state: calls return autograd tensors, `backward` adds up gradients.

    output = model(x)        the forward of `vjp`; its tensors leave as the outputs of one node of autograd
    loss.backward()          the node gives its cotangents to the pullback; the gradient is added to model.grads
    info = model.step()      apply_gradients: model.state is the next state, model.grads is empty

Everything between output and loss is PyTorch's own. What is sharded, scaled and reduced happens inside the
pullback, so it holds on every path that reaches the node: a scalar loss, any cotangent, several models.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fzero import tree
from fzero.autodiff.open import is_float
from fzero.autodiff.split_vjp import split_vjp
from fzero.autodiff.vjp import Pullback, call, vjp
from fzero.modules.deferred import without_parameters
from fzero.modules.functional import functional
from fzero.optim.base import Optimizer
from fzero.program.jit import jit
from fzero.sharding.algebra import add
from fzero.sharding.sharded import Sharded
from fzero.torch_crossing import crossing
from fzero.torch_names import missing
from fzero.train.state import State, init
from fzero.train.step import Skip, apply_gradients


class Model:
    """A function of a state's parameters that is called, differentiated and updated as PyTorch's modules are.

    The state stays immutable; the model only names the latest. `wrap` makes one of an `nn.Module`.

    Args:
        apply: `apply(params, *args, **kwargs)` returns any tree. It sees full parameters in the compute dtype.
        state: what to train. `model.state` may be set to another one, such as a restored state.
        evaluation: the same function in eval mode, called after `model.eval()`; default: `apply`.
        buffers: if given, both functions are `(params, buffers, *args, **kwargs) -> (output, buffers)`.
            `model.buffers` holds what they returned last; each rank has its own.
        cast_inputs: cast floating-point inputs to the policy's compute dtype.
        donate: `step` reuses the memory of the state and of the gradients. Whoever kept the old state and reads
            it gets `DonatedError`, and so does a `backward` through a call made before the step.
        traced: calls and their backwards run as two programs, traced once for each signature, see `fz.split_vjp`. Full
            leaves come when they are used and go, and none is held between forward and backward. Results are the same
            bits. Left out, all leaves are gathered at the call, and the backward finds them there.

    Attributes:
        state: the latest state.
        grads: the sum of the gradients since the last step, in the policy's reduce dtype from the second one on;
            each is the mean over the data axes. `None` before the first.
        buffers: see above.
        training: whether calls run `apply`.

    Example:
        >>> from fzero.ranks.mesh import make_mesh
        >>> from fzero.optim.sgd import sgd
        >>> state = init({"w": torch.ones(2)}, sgd(0.5), make_mesh("cpu"), policy="fp32")
        >>> model = Model(lambda params, x: params["w"] * x, state)
        >>> loss = model(torch.tensor([1.0, 2.0])).sum()
        >>> loss.backward()
        >>> info = model.step()
        >>> model(torch.ones(2))
        tensor([0.5000, 0.0000], grad_fn=<_NodeBackward>)
    """

    config: Any  # of a wrapped module that has one

    def __init__(
        self,
        apply: Callable[..., Any],
        state: State,
        *,
        evaluation: Callable[..., Any] | None = None,
        buffers: Any = None,
        cast_inputs: bool = True,
        donate: bool = True,
        traced: bool = False,
    ) -> None:
        if not isinstance(state, State):
            raise TypeError(
                f"torch_api.Model: expected a State, got {tree.describe(state)}. Make one with fz.init(params, "
                f"optimizer), or wrap a module: torch_api.wrap(module, optimizer)."
            )
        self.state = state
        self.grads: Sharded | None = None
        self.buffers = buffers
        self.training = True
        self._functions = {True: apply, False: evaluation or apply}
        self._cast_inputs = cast_inputs
        self._update = jit(apply_gradients, donate=(0, 1), lower="graph") if donate else apply_gradients
        self._halves = split_vjp(self._run, has_aux=True) if traced else None
        self._calls = 0  # since the last step, in training

    @property
    def device(self) -> torch.device:
        """The device of this rank, where inputs are to be."""
        return self.state.mesh.device

    def __getattr__(self, name: str) -> Any:
        raise missing(name, [name for name in (*vars(self), *dir(type(self))) if not name.startswith("_")])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function on this rank's inputs.

        Under a policy with a loss scale, fp16 outputs come out as fp32, so that cotangents outside of the model
        need no scale to stay above fp16's underflow.

        Returns:
            What the function returns. Where grad mode is on, its floating-point tensors are of autograd, and
            `backward` through them reaches `grads` and the inputs that require grad.

        Raises:
            TypeError: grad mode is on, and the function returns no floating-point tensor.
            ValueError: the function closes over a tensor that requires grad.
        """
        tracked, rest, hollow = tree.split((args, kwargs), lambda x: x.requires_grad)
        state, inputs = self._drawing_anew(), [x.detach() for x in tracked]
        others = rest, hollow, self.buffers, self.training
        if not torch.is_grad_enabled():
            output, self.buffers = call(lambda params: self._run(params, inputs, *others), state)
            return output
        if self._halves is None:
            function = lambda params, inputs: self._run(params, inputs, *others)  # noqa: E731
            output, pullback, self.buffers = vjp(function, state, inputs, has_aux=True)
        else:
            forward, backward = self._halves
            output, residuals, self.buffers = forward(state, inputs, *others)
            pullback = lambda cotangent: backward(residuals, cotangent)  # noqa: E731
        return self._joined(output, pullback, tracked)

    def step(self, skip: Skip | None = None) -> dict[str, Any]:
        """Update the state by the gradients, and forget them.

        Args:
            skip: what a gradient that is not finite does, see `fz.apply_gradients`.

        Returns:
            `info` of `fz.apply_gradients`: grad_norm, finite, lr, loss_scale.

        Raises:
            ValueError: no backward has reached the model since the last step.
        """
        if self.grads is None:
            raise ValueError(
                "torch_api.Model.step: there are no gradients: no backward has reached this model since its last step. "
                "Call loss.backward() on a loss made of its output, with grad mode on, before the step."
            )
        grads, self.grads = self.grads, None
        self.state, info = self._update(self.state, grads, skip)
        self._calls = 0
        return info

    def zero_grad(self) -> None:
        """Forget the gradients. `step` does so too."""
        self.grads = None

    def no_sync(self) -> AbstractContextManager[None]:
        """Do nothing: for loops that have it around all backwards but the last.

        Each backward reduces its gradient, so that only pieces are ever kept; results are the same either way.
        """
        return nullcontext()

    def train(self, mode: bool = True) -> Model:
        """Run `apply` from now on, or with `mode=False` the function for evaluation."""
        self.training = mode
        return self

    def eval(self) -> Model:
        """Run the function for evaluation from now on."""
        return self.train(False)

    def __repr__(self) -> str:
        return f"Model in {'training' if self.training else 'evaluation'}: {self.state!r}"

    def _drawing_anew(self) -> State:
        """The state, with random draws of its own for each call between two steps."""
        number = self._calls
        self._calls += self.training
        if number == 0:
            return self.state
        return self.state.for_microbatch(torch.full((), number, dtype=torch.int32, device=self.state.mesh.device))

    def _run(
        self, params: Any, inputs: list[Tensor], rest: list[Tensor], hollow: tree.Hollow, buffers: Any, training: bool
    ) -> tuple[Any, Any]:
        """Run the function on full parameters: a pure function of its arguments, so that it may be traced."""
        # Traced, all arguments are primals. Nothing is to be computed for those that are not to be differentiated.
        rest, buffers = tree.map(torch.detach, (rest, buffers))
        positional, keywords = self._cast(hollow.fill(inputs, rest))
        if buffers is None:
            return self._widened(self._functions[training](params, *positional, **keywords)), None
        output, buffers = self._functions[training](params, buffers, *positional, **keywords)
        return self._widened(output), buffers

    def _cast(self, inputs: Any) -> Any:
        dtype = self.state.policy.compute
        if not self._cast_inputs:
            return inputs
        return tree.map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)

    def _widened(self, output: Any) -> Any:
        # Inside the function that vjp sees: so the cotangent is scaled in fp32, before it becomes fp16.
        if self.state.policy.loss_scale is None:
            return output
        return tree.map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype == torch.float16 else x, output)

    def _joined(self, output: Any, pullback: Pullback, tracked: list[Tensor]) -> Any:
        """Return an output with its floating-point tensors as the outputs of a node of autograd."""
        floats, others, hollow = tree.split(output, is_float)
        if any(x.requires_grad for x in floats):
            raise ValueError(
                "torch_api.Model: the function closes over a tensor that requires grad, whose gradient would be lost. "
                "Pass it to the call as an argument."
            )
        outputs = crossing(
            lambda bars: pullback(hollow.fill(bars, [None] * len(others))), floats, tracked, self._add, self.device
        )
        return hollow.fill(outputs, others)

    def _add(self, gradient: Sharded) -> None:
        # Factors differ where the loss scale has moved between two calls; `add` brings them together.
        self.grads = gradient if self.grads is None else add(_in_reduce_dtype(self.grads), gradient)


def wrap(
    module: nn.Module | Callable[[], nn.Module],
    optimizer: Optimizer,
    *,
    cast_inputs: bool = True,
    donate: bool = True,
    traced: bool = False,
    **options: Any,
) -> Model:
    """Return a module and a new state of its parameters as a `Model`.

    Args:
        module: the module, or better a function without arguments that makes one, see `fz.init`. It is copied.
            After `model.eval()` all of it is in eval mode; `model.train()` gives its parts the modes that they
            have now, or puts all of it in training mode where the module itself is not.
        optimizer: such as `fz.adamw(3e-4)`.
        cast_inputs: see `Model`, and so `donate` and `traced`.
        **options: `mesh`, `layout`, `policy` and `seed` of `fz.init`.

    Returns:
        A model in training mode. `model.config` is that of the module, where it has one. Its buffers,
        such as the statistics of batch norm, are each rank's own.

    Example:
        >>> from fzero.ranks.mesh import make_mesh
        >>> from fzero.optim.sgd import sgd
        >>> model = wrap(lambda: nn.Linear(2, 3), sgd(0.1), mesh=make_mesh("cpu"), policy="fp32")
        >>> model(torch.ones(4, 2)).square().mean().backward()
        >>> bool(model.step()["finite"])
        True
    """
    configs: list[Any] = []

    def seen(made: nn.Module) -> nn.Module:
        configs.append(getattr(made, "config", None))
        return made

    whole = seen(module) if isinstance(module, nn.Module) else lambda: seen(module())
    apply, _, buffers = functional(_in_training(whole), buffers=True)
    state = init(module, optimizer, **options)
    buffers = tree.map(lambda buffer: buffer.to(state.mesh.device, copy=True), buffers)
    choices = {"cast_inputs": cast_inputs, "donate": donate, "traced": traced}
    model = Model(apply, state, evaluation=apply.eval, buffers=buffers, **choices)
    if configs[0] is not None:
        model.config = configs[0]
    return model


def _in_reduce_dtype(gradient: Sharded) -> Sharded:
    pieces = [
        piece if piece is None or policy is None else piece.to(policy.reduce)
        for piece, policy in zip(gradient.pieces, map(gradient.placement.policy_of, gradient.paths), strict=True)
    ]
    return gradient.replace(pieces=tuple(pieces))


def _in_training(module: nn.Module | Callable[[], nn.Module]) -> nn.Module | Callable[[], nn.Module]:
    """Return a copy of a module that shares its tensors, or a factory of it, in training mode."""
    if not isinstance(module, nn.Module):
        return lambda: _trained(module())
    return _trained(without_parameters(module, {id(t): t for t in (*module.parameters(), *module.buffers())}))


def _trained(module: nn.Module) -> nn.Module:
    return module if module.training else module.train()
