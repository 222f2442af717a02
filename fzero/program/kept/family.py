"""Signatures that differ in nothing but the sizes of tensors that are no state, and programs that serve many of them.

sizes (8, 32)     a program of its own, for these sizes
sizes (12, 32)    the first dimension varies: a program that leaves it open
sizes (16, 32)    served by that
sizes (16, 64)    the second varies too: a program that leaves both open
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fzero import tree
from fzero.program.graph.kinds import kinds_in
from fzero.program.graph.settle import settled
from fzero.program.graph.sizes import Dim, Shapes, Symbols
from fzero.program.graph.trace import Trace, collector_paused
from fzero.program.program import Program
from fzero.program.signature import Signature

logger = logging.getLogger(__name__)

# Signatures that are remembered, to open a program at the sizes of the first that fits.
_REMEMBERED = 8
# How many traces with open sizes a family tries. After that each new size has a program of its own.
_TRIES = 8


@dataclass
class Family:
    """What is known of such signatures.

    Attributes:
        flexible: positions of the tensors that are neither of a state nor donated: their sizes may vary.
        seen: the shapes of the first of them.
        varying: the dimensions that had more than one size.
        closed: those that a program could not leave open.
        programs: those that leave sizes open, with the signatures that they were made for, in that order.
        tries: how many were traced.
    """

    flexible: frozenset[int]
    seen: list[list[tuple[int, ...]]] = field(default_factory=list)
    varying: set[Dim] = field(default_factory=set)
    closed: set[Dim] = field(default_factory=set)
    programs: list[tuple[Signature, Program]] = field(default_factory=list)
    tries: int = 0

    def serving(self, shapes: Shapes) -> Signature | None:
        """Return the signature whose program leaves sizes open, and is for these shapes, too."""
        return next((made for made, program in reversed(self.programs) if program.serves(shapes)), None)

    def forget(self, made: Signature) -> None:
        """Let go of the program that was made for a signature."""
        self.programs = [(signature, program) for signature, program in self.programs if signature is not made]

    def note(self, signature: Signature, program: Program) -> None:
        """Remember a call and the program that was made for it, which all ranks agree on."""
        self.varying |= self._differences(signature.shapes)
        if len(self.seen) < _REMEMBERED:
            self.seen.append(signature.shapes)
        if program.trace.sizes is not None:
            self.programs.append((signature, program))

    def to_open(self, shapes: Shapes) -> tuple[Dim, ...]:
        """Return the dimensions that a program for these shapes is to leave open."""
        if self.tries >= _TRIES:
            return ()
        varying = self.varying | self._differences(shapes)
        return tuple(sorted((i, d) for i, d in varying - self.closed if shapes[i][d] > 1))

    def _differences(self, shapes: Shapes) -> set[Dim]:
        """Return the dimensions in which shapes differ from the first that were seen."""
        rows = enumerate(zip(self.seen[0], shapes, strict=True) if self.seen else ())
        return {(i, d) for i, (a, b) in rows for d in range(len(a)) if a[d] != b[d]}

    def first_like(self, shapes: Shapes, dims: Sequence[Dim]) -> list[tuple[int, ...]]:
        """Return the first shapes seen that differ from these in open dimensions alone, and have no such program."""
        for known in self.seen:
            if all(known[i][d] > 1 for i, d in dims) and not any(p.leaves_open(dims, known) for _, p in self.programs):
                filled = [list(shape) for shape in known]
                for i, d in dims:
                    filled[i][d] = shapes[i][d]
                if all(tuple(a) == tuple(b) for a, b in zip(filled, shapes, strict=True)):
                    return known
        return [tuple(shape) for shape in shapes]


class Families:
    """The families of a function's calls: at most `bound`, the last."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._families: dict[Any, Family] = {}
        self._flexible: dict[Any, frozenset[int]] = {}

    def __len__(self) -> int:
        return len(self._families)

    def of(self, signature: Signature, leaves: Sequence[Tensor]) -> Family:
        """Return the family of a call with these tensors."""
        flexible = self._flexible_in(signature, leaves)
        key = signature.without_sizes(flexible)
        if key not in self._families:
            self._families[key] = Family(flexible)
            _bound(self._families, self.bound)
        return self._families[key]

    def _flexible_in(self, signature: Signature, leaves: Sequence[Tensor]) -> frozenset[int]:
        key = (*signature.key[:2], signature.donated)
        if key not in self._flexible:
            kinds = enumerate(kinds_in(signature.hollow.fill(leaves)))
            self._flexible[key] = frozenset(i for i, kind in kinds if kind == "inputs") - signature.donated
            _bound(self._flexible, self.bound)
        return self._flexible[key]


def _bound(known: dict[Any, Any], bound: int) -> None:
    if len(known) > bound:
        del known[next(iter(known))]


def opened(
    family: Family,
    make: Callable[[Sequence[Tensor]], Trace],
    leaves: Sequence[Tensor],
    signature: Signature,
    name: str,
) -> Trace | None:
    """Trace a function with the sizes open that vary in a family.

    Args:
        family: what is known of the signature's family, this one included.
        make: makes a trace from examples of the inputs.
        leaves: the inputs.
        signature: of the call.
        name: the function's.

    Returns:
        A trace that serves the signature's shapes and others; `None` where a size has to be fixed. What could not be
        left open is logged, with the line of the user's code that asked for it.
    """
    shapes, slots = signature.shapes, signature.hollow.slots
    everywhere = zip(tree.structure_paths(signature.hollow.treedef), slots, strict=True)
    paths = [signature.named(path) for path, slot in everywhere if slot is tree.PICKED]
    hints = family.first_like(shapes, family.to_open(shapes))
    while dims := family.to_open(shapes):
        family.tries += 1
        symbols = Symbols(dims, hints, paths, family.flexible)
        try:
            with collector_paused():
                trace = settled(make(symbols.examples(leaves)), symbols)
        except Exception as error:
            # Whatever it was: a trace for these sizes alone has the last word, and raises what is the function's own.
            family.closed.update(dims)
            reason = str(error).strip().partition("\n")[0]
            logger.warning(
                "fz.jit: %s has a program for each size: with open sizes it does not trace: %s", name, reason
            )
            return None
        assert trace.sizes is not None, "it was traced with symbols"
        for dim, place in trace.sizes.fixed.items():
            family.closed.add(dim)
            log = "fz.jit: %s has a program for each size of %s: the number is asked for%s"
            logger.warning(log, name, _named(dim, paths), place)
        if trace.sizes.dims and trace.sizes.serve(shapes):
            logger.info("fz.jit: one program of %s serves all sizes of %s", name, ", ".join(_all_named(trace, paths)))
            return trace
        if hints == shapes and not trace.sizes.fixed:
            family.closed.update(dims)
        hints = shapes
    return None


def _named(dim: Dim, paths: Sequence[str]) -> str:
    return f"{paths[dim[0]]}.shape[{dim[1]}]"


def _all_named(trace: Trace, paths: Sequence[str]) -> list[str]:
    assert trace.sizes is not None, "it has open sizes"
    return [_named(dim, paths) for dim in trace.sizes.dims]
