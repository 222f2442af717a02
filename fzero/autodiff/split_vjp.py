"""A function and its pullback as two programs, with what passes between them as data.

    out, residuals = forward(*primals)              one trace, cut in two: see `fzero.program.graph.partition`
    gradients = backward(residuals, cotangent)

`fz.vjp` closes over what its pullback needs. Here it is a pytree: it can be counted, moved to other memory, sent to
another process, held for several micro-batches, used again. It holds the pieces of sharded primals by reference and
no gathered leaf: the backward gathers again.

Both programs are of one trace, eagerly too. Inside another trace, such as `fz.jit`'s, they become part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fzero import tree
from fzero._torch import FakeTensor, disable_proxy_modes_tracing, get_proxy_mode, is_functorch_wrapped
from fzero.autodiff.open import Opened, Primal, Reduce, is_float
from fzero.autodiff.residuals import Residuals, SavedResiduals, check_held
from fzero.autodiff.vjp import abstract, check_cotangent, refuse_dynamo, vjp
from fzero.errors import MeshError, ResidualsError, TraceError
from fzero.program.agree.fingerprint import fingerprint
from fzero.program.graph.absent import traced_for
from fzero.program.graph.inline import inline
from fzero.program.graph.kinds import kinds_in
from fzero.program.graph.partition import Halves, cotangent_like, partition
from fzero.program.graph.trace import Trace, collector_paused, trace_flat
from fzero.program.options import Options
from fzero.program.program import Program
from fzero.program.signature import Signature, examples_of, simulated_on
from fzero.ranks.peers import together

# Eagerly both halves run operation by operation, on every device.
_OPTIONS = Options(lower="graph")


@dataclass(frozen=True)
class _Joint:
    """What is known of one signature: the two traces, and what their results look like."""

    halves: Halves
    output: Any  # a tree like the output, of tensors without memory
    fingerprint: str  # of the backward
    programs: dict[str, Program] = field(default_factory=dict)


class _Split:
    """A function with the joint traces of its signatures."""

    def __init__(self, f: Callable[..., Any], has_aux: bool, reduce: Reduce):
        self.f, self.has_aux, self.reduce = f, has_aux, reduce
        self.name = getattr(f, "__qualname__", type(f).__name__)
        self._joints: dict[Any, _Joint] = {}

    def forward(self, *primals: Any) -> tuple[Any, ...]:
        refuse_dynamo("fz.split_vjp")
        signature, tensors = self.open(primals)
        joint = self.joint(signature, tensors)
        halves = joint.halves
        output, aux, extras = self._run("forward", joint, signature, halves.forward, tensors)
        found = {"input": tensors, "output": tree.split((output, aux))[0], "extra": extras}
        residuals = Residuals(
            tuple(tensors[i] for i in halves.references),
            tuple(found[source.kind][source.index] for source in halves.sources),
            signature,
            joint.fingerprint,
        )
        return (output, residuals, aux) if self.has_aux else (output, residuals)

    def backward(self, residuals: Residuals, cotangent: Any) -> tuple[Any, ...]:
        refuse_dynamo("fz.split_vjp")
        if not isinstance(residuals, Residuals):
            raise TypeError(
                f"fz.split_vjp: backward takes the residuals of its forward and a cotangent, and got "
                f"{tree.describe(residuals)} for residuals."
            )
        joint = self.joint(residuals.signature)
        halves = joint.halves
        if residuals.program != joint.fingerprint:
            raise ResidualsError(
                f"fz.split_vjp: backward got the residuals of another function than {self.name}, or of another version "
                f"of it. Pass what its own forward returned."
            )
        held = check_held([*residuals.pieces, *residuals.saved], halves)
        cotangents = [c.contiguous() for c in check_cotangent(joint.output, cotangent)]
        _check_plain((*held, *cotangents))
        return self._run("backward", joint, residuals.signature, halves.backward, [*held, *cotangents])

    def open(self, primals: tuple[Any, ...]) -> tuple[Signature, list[Tensor]]:
        """Return what a forward is known by, and its tensors."""
        with traced_for(simulated_on(primals)):  # a state's key is made on its device
            opened = Opened.of(primals, range(len(primals)))
            opened.check_not_donated()
            arguments = opened.arguments()
        signature, tensors = Signature.of((arguments, {}), f"fz.split_vjp: {self.name}")
        _check_plain(tensors)
        return signature, tensors

    def joint(self, signature: Signature, tensors: Sequence[Tensor] | None = None) -> _Joint:
        """Return the two traces for arguments of a signature, made at its first call."""
        if signature.key not in self._joints:
            call = f"fz.split_vjp: {self.name}"
            with disable_proxy_modes_tracing(), together(call), collector_paused(), signature.surroundings():
                examples = signature.examples() if tensors is None else tensors
                self._joints[signature.key] = self._trace(signature, examples)
        return self._joints[signature.key]

    def _trace(self, signature: Signature, tensors: Sequence[Tensor]) -> _Joint:
        outputs: list[Any] = []

        def joint(*arguments: Any) -> tuple[Any, Any, tuple[Any, ...]]:
            given: Any = vjp(self.f, *arguments, has_aux=self.has_aux, reduce=self.reduce)
            output, pullback, aux = given if self.has_aux else (*given, None)
            outputs[:] = [output]
            floats, others, hollow = tree.split(output, is_float)
            cotangents = [cotangent_like(x, i) for i, x in enumerate(floats)]
            return output, aux, pullback(hollow.fill(cotangents, [None] * len(others)))

        examples = examples_of(tensors, signature.simulated_on)
        with traced_for(signature.simulated_on):
            trace = trace_flat(joint, examples, signature.hollow, paths=signature.paths)
        _check_closed(trace, self.name)
        trace = trace.replace(kinds=kinds_in(signature.hollow.fill(tensors)))
        halves = partition(trace, _by_reference(signature))
        return _Joint(halves, tree.map(abstract, outputs[0]), fingerprint(halves.backward))

    def _run(self, half: str, joint: _Joint, signature: Signature, trace: Trace, inputs: list[Tensor]) -> Any:
        if get_proxy_mode() is not None:
            assert trace.output is not None, "a half is no loop body"
            return trace.output.fill(inline(trace, inputs))
        if signature.simulated_on is not None:
            raise MeshError(
                f"fz.split_vjp: {self.name} got a state of a simulated mesh, on which nothing can run. Look at "
                f"fz.residuals, or at the program of fz.trace, or make a real mesh."
            )
        call = f"{half} of {self.name}"
        with together(call):
            program = joint.programs.get(half)
            if program is None:
                from fzero.program.make import made  # passes and lowerings are loaded for the first program

                program = made(call, trace, _OPTIONS, "first call")
            program.agree(call, signature.by_path, inputs)
            joint.programs[half] = program
            return program(list(inputs))


def split_vjp(
    f: Callable[..., Any], *, has_aux: bool = False, reduce: Reduce = "mean"
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the forward and the backward of a function as two functions of data.

    Args:
        f: as for `fz.vjp`: sees full parameters where a primal is a `State` or a `Sharded`. Returns any tree.
        has_aux: `f` returns `(output, aux)`; `aux` is not differentiated.
        reduce: gradients of a `State` or `Sharded` are the mean over the data axes, or the sum.

    Returns:
        `forward(*primals) -> (output, residuals)`, with `aux` as a third where asked for, and
        `backward(residuals, cotangent) -> gradients`, a tuple as a pullback of `fz.vjp` returns, with the same bits.
        `residuals` is a `Residuals`, a pytree: `residuals.saved` is what was kept, `residuals.pieces` the stored
        pieces of sharded primals by reference. The backward takes residuals of any forward of this function, as often
        as wanted, and of the same function in another process of the same world. Both work under `fz.jit`. As there,
        Python values that `f` reads are constants of its trace: pass as a tensor what changes.

    Raises:
        CotangentError: from `backward`, for a cotangent that does not match the output.
        DonatedError: from `backward`, once the memory of a primal was donated.
        MeshError: from both, for a state of a simulated mesh.
        RandomOpError: from `forward`: `f` draws random numbers from no key, or from one that stands around the call.
        ResidualsError: from `backward`, for residuals that were moved or changed, or are of another function.
        TraceError: from `forward`: `f` looks at the values of tensors, or a `torch.func` transform is around it.

    Source: You Only Linearize Once, Radul et al. 2022, arXiv 2204.10923; JAX's `linearize`.

    Example:
        >>> import torch
        >>> forward, backward = split_vjp(lambda w, x: torch.tanh(w * x))
        >>> output, residuals = forward(torch.tensor([0.0, 1.0]), torch.tensor(2.0))
        >>> residuals
        Residuals(3 tensors saved, 20 bytes; 0 by reference)
        >>> backward(residuals, torch.tensor([1.0, 0.0]))
        (tensor([2., 0.]), tensor(0.))
    """
    split = _Split(f, has_aux, reduce)
    return split.forward, split.backward


def residuals(f: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., SavedResiduals]:
    """Return a function that lists what the forward of `f` would save for its backward. Nothing is run.

    Args:
        f: as for `split_vjp`.
        has_aux: `f` returns `(output, aux)`.

    Returns:
        `listing(*primals)`: a tuple of `Saved`, one for each tensor of `residuals.saved`, each with its shape, dtype,
        `nbytes`, what made it and the line of the user's code. Pieces of sharded primals are not among them: they
        are held by reference. It works on states of a simulated mesh too.

    Raises:
        TraceError: from the call, if `f` looks at the values of tensors.

    Example:
        >>> import torch
        >>> listing = residuals(lambda w, x: torch.tanh(w * x))(torch.zeros(2), torch.tensor(2.0))
        >>> [(saved.source, saved.nbytes) for saved in listing]
        [('argument 0', 8), ('argument 1', 4), ('tanh', 8)]
    """
    split = _Split(f, has_aux, "mean")

    def listing(*primals: Any) -> SavedResiduals:
        return SavedResiduals(split.joint(*split.open(primals)).halves.saved)

    return listing


def _by_reference(signature: Signature) -> frozenset[int]:
    """Return the positions of tensors that belong to sharded primals, among all of the arguments."""
    nodes = tree.leaves(signature.hollow.fill(range(len(signature.paths))), is_leaf=lambda x: isinstance(x, Primal))
    found = [tree.leaves(node) for node in nodes if isinstance(node, Primal)]
    return frozenset(i for leaves in found for i in leaves if isinstance(i, int))


def _check_plain(tensors: Sequence[Tensor]) -> None:
    if any(is_functorch_wrapped(x) for x in tensors):
        raise TraceError(
            "fz.split_vjp: its programs are traced, and have no derivative or batch axis: they do not run under "
            "torch.func.vjp, jvp or vmap. Use fz.vjp there, or put the transform inside the function."
        )


def _check_closed(trace: Trace, name: str) -> None:
    for node in trace.module.graph.find_nodes(op="get_attr"):
        value = getattr(trace.module, str(node.target), None)
        if isinstance(value, FakeTensor):
            raise TraceError(
                f"fz.split_vjp: {name} closes over a tensor of {tree.describe(value)} that is being traced. Pass it as "
                f"an argument."
            )
