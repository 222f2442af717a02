"""`jit`: one program for each signature of a function.

A call goes flatten → look up → (trace → passes → lower, once) → run → unflatten. The signature is the
structure of the arguments with all that is static in them, and the shape, strides, dtype and device of
every tensor. Memory of donated arguments is taken when the program begins to run: whatever is raised before that
leaves them as they were.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fzero import tree
from fzero._torch import get_proxy_mode, is_functorch_wrapped, under_dynamo
from fzero.calls import shown
from fzero.errors import MeshError, TraceError
from fzero.program import donation
from fzero.program.graph.absent import traced_for
from fzero.program.graph.kinds import kinds_in
from fzero.program.graph.trace import Trace, collector_paused, trace_flat
from fzero.program.kept.family import Families, opened
from fzero.program.kept.retrace import Kept, names_of, told_of
from fzero.program.options import Options, takes_any_size
from fzero.program.program import Program
from fzero.program.signature import Signature, examples_of
from fzero.ranks.peers import together

logger = logging.getLogger(__name__)


class Jitted:
    """A function that runs as programs; made by `jit`."""

    def __init__(self, f: Callable[..., Any], donate: tuple[int, ...], options: Options):
        self.f = f
        self.donate = donate
        self.options = options
        self.calls = 0
        self.name = getattr(f, "__qualname__", type(f).__name__)
        self._names = names_of(f)
        self._kept = Kept(self.name, options.keep_programs)
        self._families = Families(options.keep_programs)
        functools.update_wrapper(self, f, updated=())

    @property
    def programs(self) -> tuple[Program, ...]:
        """The programs that are kept, in the order in which they were made: for a signature, or all of its sizes."""
        return self._kept.programs()

    def __repr__(self) -> str:
        usual = Options()
        given = {name: x for name in Options.names() if (x := getattr(self.options, name)) != getattr(usual, name)}
        donated = {"donate": self.donate} if self.donate else {}
        count = len(self.programs)
        made = f"jit({', '.join([self.name, *(f'{k}={shown.text(x)}' for k, x in (donated | given).items())])})"
        return f"{made}: {count or 'no'} program{'' if count == 1 else 's'}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if under_dynamo():
            raise TraceError(
                f"fz.jit: {self.name} is called under torch.compile, which would take it apart for a long time and "
                f"fail. Call it as it is: fz.jit has made one program of it. Inductor compiles that program with "
                f'lower="inductor".'
            )
        signature, leaves = self._open(args, kwargs)
        if get_proxy_mode() is not None or any(is_functorch_wrapped(x) for x in leaves):
            return self.f(*args, **kwargs)  # inside a trace or a transform it is part of that
        if signature.simulated_on is not None:
            raise MeshError(
                f"fz.jit: {self.name} got a state of a simulated mesh, on which nothing can run. Look at its program "
                f"with fz.trace, or make a real mesh."
            )
        self.calls += 1
        call = f"{self.name} (call {self.calls})"
        if self.donate:
            donation.check_distinct(leaves, signature, f"fz.jit: {self.name}")
        with together(call):
            known = self._known(signature, leaves)
            program = known or self._program(signature, leaves)
            if known is None:
                program.make_ready()
            program.agree(call, signature.by_path, leaves)
            if known is None:
                self._kept.put(signature, program)
                if takes_any_size(leaves, self.options):
                    self._families.of(signature, leaves).note(signature, program)
            return donation.run_donating(program, leaves, signature.donated, call)

    def trace(self, *args: Any, **kwargs: Any) -> Program:
        """Return the program for these arguments without running it."""
        signature, leaves = self._open(args, kwargs)
        return self._known(signature, leaves) or self._fixed(signature, leaves, self._cause(signature))

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Signature, list[Tensor]]:
        positions = functools.partial(self._positions, args, kwargs)
        return Signature.of((args, kwargs), f"fz.jit: {self.name}", donated=positions, names=self._names)

    def _positions(self, args: tuple[Any, ...], kwargs: dict[str, Any], hollow: tree.Hollow) -> frozenset[int]:
        """Return the positions, among all tensors of the arguments, of those that are donated."""
        if not self.donate:
            return frozenset()
        if late := [i for i in self.donate if i >= len(args)]:
            raise TypeError(
                f"fz.jit: {self.name} donates its argument {late[0]}, and was called with {len(args)} positional "
                f"arguments{' and ' + ', '.join(kwargs) if kwargs else ''}. Pass what is donated by position."
            )
        leaves, tensors, found = 0, 0, list[int]()
        for i, argument in enumerate(hollow.treedef.child(0).children()[: max(self.donate) + 1]):
            after = leaves + argument.num_leaves
            count = sum(slot is tree.PICKED for slot in hollow.slots[leaves:after])
            if i in self.donate:
                found += range(tensors, tensors + count)
            leaves, tensors = after, tensors + count
        return frozenset(found)

    def _known(self, signature: Signature, leaves: Sequence[Tensor]) -> Program | None:
        """Return the program that serves a signature, if one is kept."""
        found = self._kept.find(signature)
        if found is None and len(self._families):
            family = self._families.of(signature, leaves)
            while found is None and (made := family.serving(signature.shapes)) is not None:
                found = self._kept.find(made)
                if found is None:
                    family.forget(made)
        return found

    def _program(self, signature: Signature, leaves: Sequence[Tensor]) -> Program:
        """Trace a program for a signature, and, where sizes vary, for all that it can leave open."""
        cause = self._cause(signature)
        if takes_any_size(leaves, self.options):
            family = self._families.of(signature, leaves)
            if trace := opened(family, functools.partial(self._trace, signature), leaves, signature, self.name):
                return self._finished(trace, cause, signature, runs=True)
        return self._fixed(signature, leaves, cause, runs=True)

    def _fixed(self, signature: Signature, leaves: Sequence[Tensor], cause: str, *, runs: bool = False) -> Program:
        trace = self._trace(signature, examples_of(leaves, signature.simulated_on))
        return self._finished(trace, cause, signature, runs=runs)

    def _trace(self, signature: Signature, examples: Sequence[Tensor]) -> Trace:
        with collector_paused(), traced_for(signature.simulated_on):
            trace = trace_flat(self.f, examples, signature.hollow, paths=signature.paths, donated=signature.donated)
            return trace.replace(kinds=kinds_in(signature.hollow.fill(examples)))

    def _cause(self, signature: Signature) -> str:
        cause = self._kept.cause(signature)
        log = logger.warning if self.programs else logger.info
        log("fz.jit: tracing %s (program %d): %s", self.name, len(self.programs) + 1, cause)
        return cause

    def _finished(self, trace: Trace, cause: str, signature: Signature, *, runs: bool = False) -> Program:
        from fzero.program.make import made  # passes and lowerings are loaded for the first program

        return made(self.name, trace, self.options, cause, runs=runs, told=told_of(signature))


def jit(f: Callable[..., Any] | None = None, *, donate: int | Sequence[int] = (), **options: Any) -> Any:
    """Return `f` as a function that is traced once for each signature and then runs as one program.

    Args:
        f: a pure function of trees. Tensors in its arguments are inputs; everything else in them is constant
            and part of the signature. Left out, `jit` is a decorator: `@fz.jit(donate=(0,))`.
        donate: positions of arguments whose memory the call may reuse, from the moment that its program begins to
            run, also when that fails. Reading such a tensor afterwards raises `DonatedError`. What is raised
            before, while tracing or compiling, leaves the arguments as they were.
        **options: how the program is made; each of `fzero.program.options.Options`: `lower=`, `remat=`,
            `keep_gathered=`, `bucket=`, `overlap=`, `sizes=`, `keep_programs=`.

    Returns:
        The jitted function. With `lower="graph"` its results are bitwise those of `f`. `.programs` holds what was
        traced; a new trace is logged (logger `fzero`) with the arguments that caused it, by name and path.

    Raises:
        DonatedError: from the call, for an argument that was donated before.
        TraceError: from the call, if `f` looks at the values of tensors.
        ValueError: from the call, if donated memory is reached twice.
        ProgramMismatchError: from the call, on every rank, if ranks are about to run different collectives: programs of
            other functions, or of one whose collectives differ; or the optimizer, policy or layout of a state that they
            are given does. All else may differ, such as the lengths of batches.

    Example:
        >>> import torch
        >>> double = jit(lambda x: {"y": 2 * x})
        >>> double(torch.tensor([1.0, 2.0]))
        {'y': tensor([2., 4.])}
        >>> len(double.programs)
        1
    """
    if f is None:
        return functools.partial(jit, donate=donate, **options)
    if unknown := options.keys() - set(Options.names()):
        raise TypeError(
            f"fz.jit: there is no option {min(unknown)!r}. Options are donate, {', '.join(Options.names())}."
        )
    if isinstance(f, Jitted):
        f = f.f
    positions = (donate,) if isinstance(donate, int) else tuple(donate)
    if any(position < 0 for position in positions):
        raise ValueError(f"fz.jit: donate={donate!r}; positions of arguments count from 0.")
    return Jitted(f, positions, Options(**options))


def trace(f: Callable[..., Any], **jit_options: Any) -> Callable[..., Program]:
    """Return a function that gives the program of `f` for some arguments, running nothing.

    Args:
        f: a function, or a jitted one, whose own options then hold.
        **jit_options: those of `jit`.

    Returns:
        `g(*args, **kwargs) -> Program`. Arguments may be of a simulated mesh.

    Raises:
        TypeError, ValueError: there is no such option, or no such choice of one.
        TraceError: from the call, if `f` looks at the values of tensors.

    Example:
        >>> import torch
        >>> program = trace(lambda x: x + 1)(torch.zeros(3))
        >>> program
        Program(<lambda>: 1 inputs, 1 operations; first call)
    """
    jitted = f if isinstance(f, Jitted) and not jit_options else jit(f, **jit_options)
    return jitted.trace
