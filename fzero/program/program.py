"""A program: a traced function ready to run, and to be read."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from fzero.marks import line_of
from fzero.program.agree.order import collectives, digest
from fzero.program.failure import note_place
from fzero.program.graph.settle import at_shapes
from fzero.program.graph.sizes import Dim, Shapes
from fzero.program.graph.trace import Trace
from fzero.program.lower.python import Late, Lowered
from fzero.program.report.stage import Stage
from fzero.ranks.peers import compare

# Reports are loaded by who asks for one.
if TYPE_CHECKING:
    from fzero.program.report.memory import Memory
    from fzero.program.report.roofline import Device, Estimate
    from fzero.program.report.traffic import Traffic

# Shapes of inputs for which a program knows what it sends, where that depends on them.
_REMEMBERED = 64


@dataclass(frozen=True, eq=False)
class Program:
    """One traced signature of a function.

    Attributes:
        name: the function's name.
        trace: the graph after all passes.
        run: the graph as a function of its flat inputs, which it empties.
        cause: what made this trace necessary: `"first call"`, or how the arguments differ from the last trace's.
        stages: what each pass bought, in order.
        told: the optimizers, policies and layouts of its arguments as text, which ranks have to have in common.

    Example:
        >>> from fzero.program.jit import trace
        >>> program = trace(torch.mm)(torch.zeros(2, 3), torch.zeros(3, 4))
        >>> program.flops(), program.traffic().total, program.memory().peak
        (48, 0, 104)
    """

    name: str
    trace: Trace
    run: Lowered
    cause: str
    stages: tuple[Stage, ...] = ()
    told: Mapping[str, str] = field(default_factory=dict)

    def make_ready(self) -> None:
        """Do what may fail or take long before the first run: compile."""
        if isinstance(self.run, Late):
            self.run.make_ready()

    def __call__(self, inputs: list[Tensor]) -> Any:
        """Run on flat inputs; return the output's tree."""
        assert self.trace.output is not None, "a program is no loop body"
        try:
            with torch.no_grad():
                results = self.run(inputs)
        except Exception as error:
            note_place(error)
            raise
        return self.trace.output.fill(results)

    def serves(self, shapes: Shapes) -> bool:
        """Whether it leaves sizes open, and is for inputs of these shapes."""
        return self.trace.sizes is not None and self.trace.sizes.serve(shapes)

    def leaves_open(self, dims: Iterable[Dim], shapes: Shapes) -> bool:
        """Whether it serves these shapes, and leaves these dimensions open."""
        return self.serves(shapes) and self.trace.sizes is not None and set(dims) <= set(self.trace.sizes.dims)

    def at(self, shapes: Mapping[str, Sequence[int]]) -> Program:
        """Return a program that leaves sizes open as it is for other sizes: what it prints and reports are theirs.

        Args:
            shapes: path of an input, as `print` shows it, to its shape. The others stay as they are.

        Raises:
            ValueError: there is no such input, or the program is not for inputs of these shapes.
        """
        nodes = self.trace.module.graph.find_nodes(op="placeholder")
        known = {path: tuple(node.meta["val"].shape) for path, node in zip(self.trace.inputs, nodes, strict=True)}
        for path in shapes:
            if path not in known:
                near = difflib.get_close_matches(path, known, 1)
                hint = f"Did you mean {near[0]!r}?" if near else "program.print() lists them."
                raise ValueError(f"program.at: {self.name} has no input {path!r}. {hint}")
        asked = [tuple(shapes.get(path, shape)) for path, shape in known.items()]
        if asked != list(known.values()) and not self._is_for(asked, list(known.values())):
            sizes = self.trace.sizes
            opened = "none" if sizes is None else ", ".join(f"{self.trace.inputs[i]}.shape[{d}]" for i, d in sizes.dims)
            conditions = "" if sizes is None else "".join(f"\n  {text}" for text in sizes.conditions)
            raise ValueError(
                f"program.at: {self.name} is not for {', '.join(f'{p}: {tuple(s)}' for p, s in shapes.items())}. Sizes "
                f"that it leaves open: {opened}, from 2 on{', and' + conditions if conditions else ''}. Look at the "
                f"program for these arguments instead: fz.trace."
            )
        return dataclasses.replace(self, trace=at_shapes(self.trace, asked), stages=())

    def _is_for(self, asked: Shapes, known: Shapes) -> bool:
        sizes = self.trace.sizes
        if sizes is None or [len(a) for a in asked] != [len(k) for k in known]:
            return False
        rows = enumerate(zip(asked, known, strict=True))
        changed = {(i, d) for i, (a, k) in rows for d in range(len(a)) if a[d] != k[d]}
        return changed <= set(sizes.dims) and sizes.serve(asked)

    def text(self) -> str:
        """Return the program as readable code, each operation with its shape and the line that it comes from."""
        from fzero.program.report.text import text_of

        return text_of(self.trace, self.name)

    def print(self) -> None:
        """Print the program as readable code, with what it costs and what each pass bought."""
        print("\n\n".join([self.text(), *self._stage_table()]))

    def report(self) -> str:
        """Return what the program costs and what each pass bought, as text."""
        from fzero.program.report.text import costs

        return "\n\n".join([costs(self.memory(), self.traffic(), self.flops()), *self._stage_table()])

    def _stage_table(self) -> list[str]:
        from fzero.program.report.text import stage_table

        return [stage_table(self.stages)] if self.stages else []

    def memory(self) -> Memory:
        """Return the bytes that a rank holds: at rest, at the peak, and by kind over the schedule."""
        return self._memory

    def traffic(self) -> Traffic:
        """Return the bytes that a rank receives in one run, by axis and by collective."""
        return self._traffic

    def flops(self) -> int:
        """Return the floating-point operations of one run on one rank."""
        return self._flops

    def estimate(self, device: str | Device, *, between: Collection[str] = ()) -> Estimate:
        """Return how long one run takes at best: a roofline, see `fzero.program.report.roofline`.

        Args:
            device: `"A100-80GB"`, `"H100"`, `"H200"`, `"B200"`, or a `fzero.program.report.roofline.Device`.
            between: mesh axes whose neighbours stand in different nodes.

        Raises:
            ValueError: there is no such device.
        """
        from fzero.program.report.roofline import estimate

        return estimate(self.trace, device, between=between)

    @functools.cached_property
    def _memory(self) -> Memory:
        from fzero.program.report.memory import memory_of

        return memory_of(self.trace)

    @functools.cached_property
    def _traffic(self) -> Traffic:
        from fzero.program.report.traffic import traffic_of

        return traffic_of(self.trace)

    @functools.cached_property
    def _flops(self) -> int:
        from fzero.program.report.flops import flops_of

        return flops_of(self.trace)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the function's name, its collectives in order, and what is told; empty where there are none."""
        return digest(self.name, self.trace, self.told)

    def agree(self, call: str, arguments: Callable[[], Mapping[str, str]], inputs: Sequence[Tensor]) -> None:
        """Wait until all ranks are about to run programs of this function with these collectives.

        Without collectives it is this rank's own affair.

        Args:
            call: such as `step (call 7)`.
            arguments: path to dtype and shape, or to the constant that stands there.
            inputs: what it is about to run on.

        Returns:
            Nothing: where it returns, all ranks run the same.

        Raises:
            ProgramMismatchError: another rank is about to run something else, or nothing before the deadline.
            PeerError: another rank raised in this call.
        """
        if not self.digest or not dist.is_initialized():
            return
        if self.trace.sizes is None or not self.trace.sizes.sent:
            given, trace = self.digest, lambda: self.trace
        else:
            shapes = tuple(tuple(x.shape) for x in inputs)
            given, trace = self._digest_at(shapes), lambda: at_shapes(self.trace, shapes)
        compare(
            given,
            call,
            lambda: {**self.told, **arguments()},
            lambda: [(n, _place(node)) for n, node in collectives(trace())],
        )

    @functools.cached_property
    def _digest_at(self) -> Callable[[Shapes], str]:
        """The hash for inputs of some shapes."""
        return functools.lru_cache(_REMEMBERED)(
            lambda shapes: digest(self.name, at_shapes(self.trace, shapes), self.told)
        )

    def __repr__(self) -> str:
        count = sum(node.op == "call_function" for node in self.trace.module.graph.nodes)
        return f"Program({self.name}: {len(self.trace.inputs)} inputs, {count} operations; {self.cause})"

    def _repr_html_(self) -> str:
        from fzero.display.html import html_of_program

        return html_of_program(repr(self), self.memory(), self.traffic(), self.flops(), self.stages)


def _place(node: fx.Node) -> str | None:
    line = line_of(node)
    return None if line is None else f"{line[0]}:{line[1]}"
